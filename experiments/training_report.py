"""Reports trained priors on their own data: a grid of seen and held-out captions, curves, and metrics.

    python experiments/training_report.py --workdir runs/prior-emoji runs/maskgit-emoji --output=DIR

Writes three files. `grid.png` has real, reconstructed and generated images, with captions of the training split on the
left and held-out ones on the right. `curves.png` has validation and training curves of dVAE and priors. `training.json`
has the metrics of both splits.
"""

from __future__ import annotations

import argparse
import io
import json

import matplotlib
import numpy as np
from etils import epath

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.evaluation.measure import Model, Options, measure
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.reporting.images import image_grid, save_png
from dalle_jax.reporting.tables import save_json, table
from dalle_jax.storage.files import write_file
from dalle_jax.text_to_image.text_to_image import TextToImage

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = {  # title: (metric, unit)
    "dVAE: PSNR of argmax tokens": ("psnr", "dB"),
    "dVAE: codebook perplexity": ("codebook_perplexity", "codes"),
    "Prior: image tokens": ("image_nats", "nats per token"),
    "Prior: text tokens": ("text_nats", "nats per token"),
}


def read_metrics(workdir: str) -> list[dict]:
    """Reads the lines of `metrics.jsonl`."""
    path = epath.Path(workdir).expanduser() / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(tokenizer: list[dict], priors: dict[str, list[dict]], path: epath.Path) -> None:
    """Plots one panel per metric: the training split in grey, validation in one colour per prior."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3), layout="constrained")
    for axis, (title, (name, unit)) in zip(axes, PANELS.items()):
        runs = {"validation": tokenizer} if title.startswith("dVAE") else priors
        for number, (run, lines) in enumerate(runs.items()):
            for split, color, label in (("train", "0.7", None if number else "training"), ("eval", f"C{number}", run)):
                points = [(line["step"], line[f"{split}/{name}"]) for line in lines if f"{split}/{name}" in line]
                if points:
                    axis.plot(*zip(*points), color=color, label=label)
        axis.set(title=title, xlabel="update", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    write_file(path, drawn.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--workdir", required=True, nargs="+", help="workdirs of trained priors with the same tokenizer"
    )
    parser.add_argument(
        "--tokenizer_workdir", help="workdir of their dVAE's training; default: that of the first prior's config"
    )
    parser.add_argument("--output", required=True)
    parser.add_argument("--count", type=int, default=128, help="captions of each split for the metrics")
    parser.add_argument("--rows", type=int, default=12, help="captions of each split in the grid")
    parser.add_argument("--samples", type=int, default=2, help="samples of each caption and prior in the grid")
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()

    config = workdirs.read_config(args.workdir[0])
    models = [TextToImage.load(workdir) for workdir in args.workdir]
    sampling = {"guidance": args.guidance, "temperature": args.temperature}
    measured = {model.prior.name: Model(model, SamplingOptions(**sampling)) for model in models}
    metrics, rows = {"runs": {model.prior.name: [model.workdir, model.step] for model in models}}, []
    for name, split in (("seen", config["data"]["train_split"]), ("held out", "heldout")):
        tests = open_test_set(config["data"], Protocol(split, "first", args.count))
        metrics[name] = measure(measured, tests, Options(blur=())).metrics
        shown = np.linspace(0, args.count - 1, args.rows).astype(int)
        real, captions = tests.images(shown), [tests.captions[i] for i in shown]
        reconstructed = models[0].decode(models[0].encode(real))
        samples = [model.generate(captions, args.samples, **sampling) for model in models]
        for number, caption in enumerate(captions):
            drawn = [image for of_model in samples for image in of_model[number]]
            rows.append((f"{name}: {caption}", [real[number], reconstructed[number], *drawn]))
    out = epath.Path(args.output)
    columns = ("real", "dVAE", *(model.prior.name for model in models for _ in range(args.samples)))
    save_png(out / "grid.png", image_grid(rows, columns, cell_size=96, blocks=2))
    save_json(out / "training.json", metrics)
    tokenizer = args.tokenizer_workdir or config["tokenizer"]["workdir"]
    priors = {model.prior.name: read_metrics(workdir) for model, workdir in zip(models, args.workdir)}
    curves(read_metrics(tokenizer), priors, out / "curves.png")
    print(table(metrics))


if __name__ == "__main__":
    main()
