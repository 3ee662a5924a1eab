"""Compares CLIP, Inception-v3, FID and the Inception score with the original packages, and prints a table.

    python experiments/parity.py

It uses random weights of the published sizes and the comparisons of the tests. It takes a minute or two on a CPU. It
needs the tests' packages (`pip install -e '.[test]'`) and the originals:
`pip install torch==2.13.0 torchvision==0.28.0 open_clip_torch==3.3.0 transformers==5.23.0`, then
`pip install --no-deps torch-fidelity==0.4.0 pytorch-fid==0.3.0`. For vectors, features and logits, the table has the
largest absolute difference. For FID and the Inception score, it has the relative difference.
"""

import pathlib
import sys
import tempfile

TESTS = pathlib.Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS / folder) for folder in (".", "pretrained", "metrics")]

import conftest  # noqa: E402, F401  sets JAX's flags before JAX is imported
import numpy as np  # noqa: E402
import test_frechet  # noqa: E402
import test_import_clip  # noqa: E402
import test_inception  # noqa: E402
import test_inception_score  # noqa: E402
from torchvision_on_cpu import import_torchvision  # noqa: E402

from dalle_jax.metrics import frechet, inception_score  # noqa: E402
from dalle_jax.models.clip import CLIPOptions  # noqa: E402
from dalle_jax.pretrained import inception  # noqa: E402


def clip():
    """Compares the vectors of ViT-B/32, of images and of captions."""
    import open_clip
    import transformers

    options = CLIPOptions()
    model = test_import_clip.shake(open_clip.create_model("ViT-B-32-quickgelu", pretrained=None))
    images, captions = test_import_clip.open_clip_differences(model, options, 64)
    yield "CLIP, images", "open_clip ViT-B-32-quickgelu", images
    yield "CLIP, captions", "open_clip ViT-B-32-quickgelu", captions
    model = test_import_clip.transformers_model(transformers, options)
    images, captions = test_import_clip.transformers_differences(model, options, 64)
    yield "CLIP, images", "transformers.CLIPModel", images
    yield "CLIP, captions", "transformers.CLIPModel", captions


def network():
    """Compares features and logits of Inception-v3, each with the resizing of the other package."""
    import torch

    arrays = test_inception.random_arrays()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, inception.FILE)
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)
        both = test_inception.features(inception.load(path), path)
    for name, (ours, theirs) in both.items():
        what, package = name.rsplit(", ", 1)
        yield f"Inception-v3, {what}", package, float(np.abs(ours - theirs).max())


def metrics():
    """Compares FID and the Inception score of equal features and logits."""
    for counts in ((4000, 3000), (400, 500)):
        a, b = (test_frechet.features(count, 512, seed) for seed, count in enumerate(counts))
        expected = test_frechet.torch_fidelity_distance(a, b)
        ours = frechet.distance(test_frechet.statistics(a, batch=100), test_frechet.statistics(b, batch=100))
        yield f"FID of {counts[0]} and {counts[1]} rows of 512", "torch-fidelity", abs(ours / expected - 1)
    logits = np.random.default_rng(0).normal(size=(5000, 1008)).astype(np.float32) * 3
    stats = inception_score.add(inception_score.empty(len(logits)), logits, np.arange(len(logits)))
    expected = test_inception_score.torch_fidelity_score(logits)
    for name, ours, theirs in zip(("mean", "deviation"), inception_score.compute(stats).values(), expected):
        yield f"Inception score of 5000 rows, {name}", "torch-fidelity", abs(ours / theirs - 1)


if __name__ == "__main__":
    import_torchvision()
    print("| value | package | difference |\n|---|---|---|")
    for part in (metrics, network, clip):
        for what, package, difference in part():
            print(f"| {what} | {package} | {difference:.1e} |", flush=True)
