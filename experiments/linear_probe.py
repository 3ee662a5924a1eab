"""Measures what each layer of a trained model knows about an image: linear classifiers on its averaged hidden states.

    python experiments/linear_probe.py --workdir runs/prior-shapes runs/maskgit-shapes runs/clip-shapes --output=DIR
    python experiments/linear_probe.py --workdir runs/prior-small --path=CLASSES --output=DIR   # class folders

Without `--path`, the images are those of each model's training: the shapes with the attributes that their captions
state, the emoji with their kinds, or folders. CLASSES has a folder for each class, perhaps inside `train` and `val`, as
ImageNet and CIFAR-10 are usually unpacked. Training images train the classifiers and choose their regularisation; the
evaluation split tests them. `--untrained` adds each model with random parameters, for comparison.

Writes `probes.json` and `probes.png`, the accuracy by layer, and prints the table. Layer 0 is the embeddings of tokens
or patches. Published numbers stand in experiments/results/probes/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from etils import epath

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.folder.class_folders import ClassFolders
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, Source
from dalle_jax.data.spread import Selected, evenly
from dalle_jax.errors import DataError
from dalle_jax.evaluation.image_labels import labels_of
from dalle_jax.evaluation.layer_features import LayerFeatures, open_model
from dalle_jax.metrics import linear_classifier
from dalle_jax.reporting.tables import save_json
from dalle_jax.storage.files import write_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

UNTRAINED = ", untrained"
_COLUMNS = 4  # panels in a row

Curves = dict[str, dict[str, Any]]  # by attribute: "chance", "accuracy" and "penalty" of each layer


@dataclasses.dataclass(frozen=True)
class Examples:
    """Features of images, with their labels.

    Attributes:
      features: float32 [n, L, D].
      labels: class of each image by attribute, or None.
    """

    features: np.ndarray
    labels: Mapping[str, Sequence[str | None]]

    def labelled(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the features, [m, L, D], and the classes, [m], of the images that have an attribute."""
        found = self.labels.get(name, ())
        rows = [i for i, label in enumerate(found) if label is not None]
        return self.features[rows], np.array([found[i] for i in rows], str)


def read_examples(
    extract: Callable[[np.ndarray], np.ndarray], source: Source, options: DataOptions, count: int, folders: ClassFolders
) -> Examples:
    """Extracts the features of up to `count` images that are spread evenly over a split.

    Args:
      extract: maps images, uint8 [B, H, W, 3], to features, float32 [B, L, D].
      source: the split.
      options: `image_size` and `fit` say how the images are prepared.
      count: number of images.
      folders: see `labels_of`.
    """
    chosen = Selected(source, evenly(len(source), count))
    pipeline = Pipeline(options, split="", train=False, batch_size=64, source=chosen)
    features, labels = [], []
    with contextlib.closing(iter(pipeline)) as batches:
        for batch in batches:
            features.append(np.asarray(extract(batch["image"]))[batch["valid"]])
            labels += [labels_of(chosen.record(int(i)), folders) for i in batch["index"][batch["valid"]]]
    names = dict.fromkeys(name for found in labels for name in found)
    return Examples(np.concatenate(features), {name: [found.get(name) for found in labels] for name in names})


def probe(train: Examples, test: Examples) -> Curves:
    """Trains a classifier for each attribute and layer.

    Args:
      train: images that train the classifiers and choose their regularisation.
      test: images that test them.

    Returns:
      By attribute: the accuracy of each layer, the chosen penalties, and the accuracy of the most frequent class.
      An attribute that only one class or too few images have is left out.

    Raises:
      DataError: no attribute is left.
    """
    curves, failed = {}, None
    for name in train.labels:
        (features, labels), (test_features, test_labels) = train.labelled(name), test.labelled(name)
        try:
            found = [
                linear_classifier.accuracy(features[:, layer], labels, test_features[:, layer], test_labels)
                for layer in range(features.shape[1])
            ]
        except DataError as error:
            failed = error
            continue
        curves[name] = {
            "classes": len(set(labels)),
            "chance": found[0].chance,
            "accuracy": [each.accuracy for each in found],
            "penalty": [each.penalty for each in found],
        }
    if not curves:
        raise failed or DataError("The images have no labels. Give --path=DIR, a folder whose sub-folders are classes.")
    return curves


def mean_curve(curves: Curves) -> list[float]:
    """Returns the mean accuracy of each layer over all attributes."""
    return np.mean([row["accuracy"] for row in curves.values()], axis=0).tolist()


def text_table(curves: Curves) -> str:
    """Formats the accuracies as a Markdown table: one row for each attribute, one column for each layer."""
    layers = range(len(mean_curve(curves)))
    lines = [f"| Attribute | Chance | {' | '.join(f'Layer {i}' for i in layers)} |", "|---|---|" + "---|" * len(layers)]
    chance = float(np.mean([row["chance"] for row in curves.values()]))
    rows = {name: (row["chance"], row["accuracy"]) for name, row in curves.items()}
    if len(rows) > 1:
        rows["mean"] = chance, mean_curve(curves)
    for name, (chance, accuracies) in rows.items():
        lines.append(f"| {name} | {chance:.3f} | {' | '.join(f'{x:.3f}' for x in accuracies)} |")
    return "\n".join(lines)


def plot(models: Mapping[str, Curves], path: epath.Path) -> None:
    """Plots one panel for each model with a line for each attribute, and a panel with the means of all models."""
    count = len(models) + 1
    columns = min(count, _COLUMNS)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows), layout="constrained", sharey=True, squeeze=False
    )
    of_models, means = axes.ravel()[: count - 1], axes.ravel()[count - 1]
    for axis, (title, curves) in zip(of_models, models.items()):
        for number, (name, row) in enumerate(curves.items()):
            axis.plot(row["accuracy"], color=f"C{number}", marker=".", label=name)
            axis.axhline(row["chance"], color=f"C{number}", linestyle=":", linewidth=0.8)
        axis.set(title=title)
    for title, curves in models.items():
        means.plot(mean_curve(curves), marker=".", linestyle="--" if UNTRAINED in title else "-", label=title)
    means.set(title="mean of all attributes")
    for axis in axes.ravel()[:count]:
        axis.set_xlabel("layer")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    for axis in axes.ravel()[count:]:
        axis.remove()
    for axis in (of_models[0], means):
        axis.legend(frameon=False, fontsize=7)
    axes[0, 0].set_ylabel("accuracy (dotted: chance)")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=70)
    plt.close(figure)
    write_file(path, drawn.getvalue())


def measure(model: LayerFeatures, data: Mapping[str, Any], train: int, test: int) -> Curves:
    """Probes a model.

    Args:
      model: the model.
      data: a `data` section.
      train: number of training images.
      test: number of test images.
    """
    options = from_config(DataOptions, {**data, "augment": "none", "image_size": model.image_size}, "data")
    sources = [open_source(options, split) for split in (options.train_split, options.eval_split)]
    names = [source.without_image(i).name for source in sources for i in evenly(len(source), 4096)]
    folders = ClassFolders(names)
    return probe(*(read_examples(model.extract, source, options, count, folders)
                   for source, count in zip(sources, (train, test))))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, nargs="+", help="workdirs of priors, BEiTs or CLIPs")
    parser.add_argument("--output", required=True)
    parser.add_argument("--path", help="a folder whose sub-folders are classes; default: the data of each training")
    parser.add_argument("--fit", default="crop", choices=("crop", "pad"), help="of the images of --path")
    parser.add_argument("--train", type=int, default=4096, help="images that train the classifiers")
    parser.add_argument("--test", type=int, default=2048, help="images that test them")
    parser.add_argument(
        "--step", type=lambda step: step if step == "best" else int(step), help="of the checkpoints, or best"
    )
    parser.add_argument("--untrained", action="store_true", help="also probe each model with random parameters")
    args = parser.parse_args()

    models, found = {}, {}
    for workdir in args.workdir:
        own = workdirs.read_config(workdir)["data"] if not args.path else {}
        data = own or {"source": "folder", "path": args.path, "fit": args.fit}
        for untrained in (False, True)[: 1 + args.untrained]:
            model = open_model(workdir, args.step, untrained)
            title = f"{epath.Path(workdir).name}{UNTRAINED if untrained else ''} ({model.title})"
            models[title] = measure(model, data, args.train, args.test)
            found[title] = {"workdir": workdir, "untrained": untrained, "attributes": models[title]}
            print(f"{title}\n\n{text_table(models[title])}\n", flush=True)
    settings = {name: getattr(args, name) for name in ("path", "train", "test", "step")}
    out = epath.Path(args.output)
    save_json(out / "probes.json", {"settings": settings | {"device": jax.devices()[0].device_kind}, "models": found})
    plot(models, out / "probes.png")


if __name__ == "__main__":
    main()
