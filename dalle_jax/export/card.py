"""The model card of an export, README.md: data, metrics with their protocol, licence, and how to draw."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from dalle_jax.checkpoints.exported import ADAPTERS, CLIP, PRIOR, TOKENIZER
from dalle_jax.data.known_captions import known_captions
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.reporting.units import with_unit
from dalle_jax.storage import hub, json_files
from dalle_jax.storage.files import expanded

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,49}")
_TITLES = {
    PRIOR: "Images from captions", TOKENIZER: "Image tokenizer", CLIP: "CLIP: images and captions in one space",
    ADAPTERS: "Adapters (LoRA) of a prior",
}  # fmt: skip
_TAGS = {PRIOR: "text-to-image", ADAPTERS: "text-to-image", TOKENIZER: "image-to-image", CLIP: "feature-extraction"}
_SAMPLED = "one image per caption"


@dataclasses.dataclass(frozen=True)
class About:
    """The content of a card.

    Attributes:
      kind: one of `exported.KINDS`.
      precision: the dtype of which weights in the files.
      step: step of the checkpoint, or None for an imported model.
      parameters: number of parameters.
      summary: sizes, in one line.
      config: configuration of the training, or None for an imported model.
      license: identifier, or None if it is not stated.
      metrics: the training's evaluation at this step, by name; {} without one.
      report: metrics of `configs/evaluate.py` with their protocol; {} without them.
      caption: example caption, or None.
      repo: "owner/name" on a hub, or None.
      folder: name of the folder.
      base: name of the base of adapters, or None.
    """

    kind: str
    precision: str
    step: int | None
    parameters: int
    summary: str
    config: Mapping[str, Any] | None
    license: str | None
    metrics: Mapping[str, float]
    report: Mapping[str, Any]
    caption: str | None
    repo: str | None
    folder: str
    base: str | None = None


def check_license(name: str | None) -> None:
    """Raises a `ConfigError` for a licence that is no identifier."""
    if name is not None and not _LICENSE.fullmatch(name):
        raise ConfigError(
            f"--license={name} is no identifier of a licence; expected lower-case letters, digits, '.', '+' and '-', "
            "such as apache-2.0, mit, cc-by-4.0 or other."
        )


def evaluation(workdir: str, step: int | None) -> dict[str, float]:
    """Reads the training's evaluation at a step from metrics.jsonl; {} without one."""
    rows = [row for row in read_metrics(workdir) if row["step"] == step]
    found = {name: value for row in rows for name, value in row.items() if name.startswith("eval/")}
    return {name.removeprefix("eval/"): value for name, value in found.items() if isinstance(value, (int, float))}


def report(folder: str | None) -> dict[str, Any]:
    """Reads `report.json` of an evaluation; {} for None.

    Raises:
      DataError: the file is missing or damaged.
    """
    if folder is None:
        return {}
    remedy = "Give the workdir of a finished evaluation (configs/evaluate.py)."
    return json_files.read(expanded(folder) / "report.json", dict, DataError, remedy)


def text(about: About) -> str:
    """Returns the card: a YAML header for hubs, then Markdown."""
    head = {
        "library_name": "dalle_jax", "pipeline_tag": _TAGS[about.kind], "tags": ["dalle_jax", "jax", about.kind],
        **({"license": about.license} if about.license else {}),
        **({"base_model": hub.parse(about.base).repo} if hub.is_hub(about.base) else {}),
    }  # fmt: skip
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {_TITLES[about.kind]}: {about.repo or about.folder}",
        f"{about.summary}. {about.parameters:,} parameters, {about.precision}. Trained with dalle_jax.",
        _use(about),
        *_data(about.config),
        *_training(about),
        *_metrics(about),
        "## Licence\n\n" + (about.license or "Not stated. Ask the authors before you use the weights."),
    ]
    return "\n\n".join(parts) + "\n"


def _use(about: About) -> str:
    where = f"hf://{about.repo}" if about.repo else about.folder
    install = f"pip install -e {'.[hub]' if about.repo else '.'}  # in a clone of dalle_jax"
    if about.kind == TOKENIZER:
        train = "python -m dalle_jax.main --config=configs/prior.py:small --config.data.path=DIR \\\n  "
        return f"## How to use\n\n```sh\n{install}\n{train}--config.tokenizer_from={where}\n```"
    if about.kind == CLIP:
        code = f'from dalle_jax import ClipScorer\n\nscorer = ClipScorer.load("{where}")\n'
        code += "scores = scorer.score(images, captions)  # float32 [B], cosines"
        return f"## How to use\n\n```sh\n{install}\n```\n\n```python\n{code}\n```"
    caption = about.caption or next(iter(known_captions(about.config)), "CAPTION")
    base = f', base="{about.base}"' if about.base else ""
    code = f'from dalle_jax import TextToImage\n\nmodel = TextToImage.load("{where}"{base})\n'
    code += f"images = model.generate({caption!r}, n=8, seed=0)  # uint8 [8, H, W, 3]"
    command = f"python -m dalle_jax.main --config=configs/generate.py --config.model_workdir={where} \\\n  "
    command += f"--config.prompts={shlex.quote(caption)} --config.n=8"
    return f"## How to draw\n\n```sh\n{install}\n{command}\n```\n\n```python\n{code}\n```"


def _data(config: Mapping[str, Any] | None) -> list[str]:
    """Describes the data of the training; nothing for an imported model."""
    if config is None:
        return []
    data = config["data"]
    rows = {
        "source": data.get("source"), "name": data.get("path"), "image size": f"{data['image_size']} pixels",
        "training split": data.get("train_split"), "held-out split": data.get("eval_split"),
        "augmentation": data.get("augment"),
    }  # fmt: skip
    return ["## Data\n\n" + _table(rows)]


def _training(about: About) -> list[str]:
    if about.config is None:
        return []
    config = about.config
    rows = {
        "task": config["task"], "updates": about.step, "examples per update": config.get("batch_size"),
        "seed": config.get("seed"), "started from": config.get("start_from"), "base": about.base,
    }  # fmt: skip
    return ["## Training\n\n" + _table(rows) + "\n\nconfig.json holds the whole configuration."]


def _metrics(about: About) -> list[str]:
    """Shows the training's evaluation and an evaluation's report, each with its protocol."""
    parts = []
    if about.metrics and about.config is not None:
        count, size = about.config.get("eval_batches", 0), about.config.get("batch_size", 0)
        split = about.config["data"].get("eval_split")
        parts += [
            f"Evaluation of the training at update {about.step:,}, on at most {count * size:,} examples of the split "
            f"{split!r}:",
            _table({name: with_unit(name, value) for name, value in about.metrics.items()}),
        ]
    if protocol := about.report.get("protocol"):
        for name, values in about.report.items():
            numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
            if numbers and name not in ("protocol", "blur", "best_of", "run"):
                shown = {key: with_unit(key, value) for key, value in numbers.items()}
                parts += [f"Evaluation by `configs/evaluate.py`, {name}, {_SAMPLED}:", _table(shown)]
        parts += ["Protocol:", _table({key: value for key, value in protocol.items() if not isinstance(value, dict)})]
    return ["## Metrics\n\n" + "\n\n".join(parts)] if parts else ["## Metrics\n\nNot measured."]


def _table(rows: Mapping[str, Any]) -> str:
    """Formats rows as a Markdown table; values that are None are left out."""
    cells = {key: str(value).replace("|", r"\|").replace("\n", " ") for key, value in rows.items() if value is not None}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells.items())])
