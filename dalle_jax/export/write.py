"""Writes an exported folder from a run, see `checkpoints.exported` for its files.

| Run                                                 | Export                                              |
|-----------------------------------------------------|-----------------------------------------------------|
| training of a prior                                 | the prior, its image tokenizer, text model and CLIP |
| training or import of an image tokenizer            | the tokenizer                                       |
| training or import of a CLIP                        | the CLIP and its text model                         |
| training of adapters (LoRA) with `adapters`         | the adapters and the text model                     |
| exported folder                                     | the same model, in another dtype for instance       |
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dalle_jax.checkpoints import exported, frozen
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.downloaded import local
from dalle_jax.checkpoints.exported import ADAPTERS, CLIP, PRIOR, TOKENIZER
from dalle_jax.checkpoints.folders import check_workdir
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.clip.stored import has_clip
from dalle_jax.errors import CheckpointError, ConfigError
from dalle_jax.export import card
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.priors import trained
from dalle_jax.priors.registry import condition_of
from dalle_jax.priors.trained import lora_of
from dalle_jax.pytree import PyTree, fingerprint
from dalle_jax.storage import hub
from dalle_jax.storage.files import expanded, full_path, write_errors, write_file, write_json
from dalle_jax.text_to_image.clip_scorer import ClipScorer

DTYPES = ("float32", "bfloat16")
# Keys whose values are paths on this machine. Of `data.path` the last part stays, the name of the data set.
_PATHS = ("workdir", "start_from", "tokenizer_from", "data_tokens", "path", "data_dir")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an export and of its model card.

    Attributes:
      dtype: "float32" or "bfloat16"; see `exported.rounded`. Modules inside a prior stay float32 without `compact`.
      step: step of the checkpoint, "best", or None for the latest.
      clip: folder of a CLIP that a prior's export includes; None for the one in its workdir, if any.
      license: identifier for the model card, such as "apache-2.0"; None if it is not stated.
      report: folder of an evaluation, whose metrics the card shows; None for those of the training alone.
      caption: example caption in the card; None for a known one of the data set.
      repo: "owner/name" on a hub, under which the card says how to draw; None for the folder's name.
      adapters: export the adapters (LoRA) of a run alone. Otherwise they are merged into their base.
      base: name of the base of exported adapters; None for the run that they were trained from.
      compact: of a prior in bfloat16: round its embeddings, its image tokenizer and its CLIP too.
    """

    dtype: str = "float32"
    step: int | str | None = None
    clip: str | None = None
    license: str | None = None
    report: str | None = None
    caption: str | None = None
    repo: str | None = None
    adapters: bool = False
    base: str | None = None
    compact: bool = False

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype={self.dtype} is unknown; expected one of {', '.join(DTYPES)}.")
        card.check_license(self.license)
        if self.base and not self.adapters:
            raise ConfigError(f"--base={self.base} is for --adapters alone.")
        if self.compact and (self.adapters or self.dtype != "bfloat16"):
            raise ConfigError("--compact rounds all weights of a prior to bfloat16: add --dtype=bfloat16.")


def kind_of(workdir: str) -> str:
    """Returns the kind of model in a folder: "prior", "image_tokenizer" or "clip".

    Raises:
      CheckpointError: it holds no model, or one that cannot be exported.
    """
    if workdirs.has_config(workdir):
        task = workdirs.read_config(workdir)["task"]
        kind = TOKENIZER if task in tokenizers.TASKS else task
        if kind not in (PRIOR, TOKENIZER, CLIP):
            raise CheckpointError(
                f"{workdir} holds a training of task {task!r}; only priors, image tokenizers and CLIPs can be exported."
            )
        return kind
    if workdirs.has_tokenizer(workdir):
        return TOKENIZER
    if has_clip(workdir):
        return CLIP
    check_workdir(workdir)
    workdirs.read_config(workdir)  # raises, with the reason
    raise CheckpointError(f"{workdir} holds no model.")


def export(workdir: str, output: str, options: Options) -> str:
    """Writes the model of a run into a folder.

    Args:
      workdir: workdir of a training, folder of an importer, or exported folder; local, "gs://…" or "hf://owner/name".
      output: the folder to write, new or an earlier export; local or "gs://…".
      options: see `Options`.

    Returns:
      What was exported, in one line.

    Raises:
      ConfigError: the output holds something else.
      CheckpointError: the run holds no model, or it is damaged.
      UserError: a file cannot be written.
    """
    workdir, options = local(workdir), dataclasses.replace(options, clip=local(options.clip))
    if str(full_path(workdir)) == str(full_path(output)):
        raise ConfigError(f"--output={output} is the run itself: give another folder.")
    kind = kind_of(workdir)
    write = {PRIOR: _prior, TOKENIZER: _tokenizer, CLIP: _clip, ADAPTERS: _adapters}
    base = _check_adapters(workdir, options) if options.adapters else None
    kind, report = ADAPTERS if options.adapters else kind, card.report(options.report)
    if options.compact and kind != PRIOR:
        raise ConfigError(f"--compact is for priors, and {workdir} holds a model of kind {kind}: leave it out.")
    if workdirs.has_config(workdir):
        with open_run(workdir) as run:
            run.resolve(options.step)  # an error must not cost an earlier export
    exported.begin(output)
    found = write[kind](workdir, expanded(output), options)
    config = None
    if workdirs.has_config(workdir):  # not for an imported tokenizer or CLIP
        with open_run(workdir) as run:
            config = run.config(found.step)
        if kind != ADAPTERS and "lora" in config:
            config["lora"]["rank"] = 0  # they are merged
        config = without_paths(config)
        write_json(expanded(output) / "config.json", config)
    precision = f"{'all weights' if options.compact else 'kernels'} in {options.dtype}"
    about = card.About(
        kind, precision, found.step, found.parameters, found.summary, config, options.license,
        card.evaluation(workdir, found.step), report, options.caption,
        options.repo, os.path.basename(str(output).rstrip("/")), base,
    )  # fmt: skip
    write_file(expanded(output) / "README.md", card.text(about))
    description = {"kind": kind, "dtype": options.dtype, "step": found.step, "frozen": found.frozen}
    description["base"] = None if base is None else {"name": base, "fingerprint": found.base}
    exported.finish(output, description)
    return f"{kind}, {found.parameters:,} parameters, {options.dtype}: {found.summary}"


@dataclasses.dataclass(frozen=True)
class _Written:
    """A written export: step, number of parameters, a summary, and the hashes of frozen modules and of a base."""

    step: int | None
    parameters: int
    summary: str
    frozen: str | None = None
    base: str | None = None


def _check_adapters(workdir: str, options: Options) -> str:
    """Returns the name of the base of a run's adapters.

    Raises:
      ConfigError: the run has no adapters, or they would be published with a base that is on this machine alone.
    """
    if kind_of(workdir) != PRIOR or not lora_of(workdirs.read_config(workdir)).rank:
        raise ConfigError(f"--adapters: {workdir} was not trained with adapters (config.lora.rank). Leave it out.")
    base = options.base or trained.load_base(workdir)[1]
    if options.repo and not base.startswith(hub.SCHEME):
        raise ConfigError(
            f"--push={options.repo}: the base of the adapters is {base}, a folder of this machine. Push an export of "
            "it, and give its address: --base=hf://OWNER/NAME."
        )
    return base


def _adapters(workdir: str, output: epath.Path, options: Options) -> _Written:
    _, tokenizer_params = workdirs.load_tokenizer(workdir)
    base, _ = trained.load_base(workdir)
    mark = fingerprint({"tokenizer": tokenizer_params, "base": base})
    with open_run(workdir, best_metric="image_nats") as run:
        step = run.resolve(options.step)
        params, config = run.restore_params(step, frozen=mark), run.config(step)
    exported.write_params(output, jax.device_get(params))
    _copy(expanded(workdir) / "text", output / "text")
    summary = f"Adapters of rank {lora_of(config).rank} for a prior of {_count(base):,} parameters"
    return _Written(step, _count(params), summary, mark, fingerprint(base))


def _prior(workdir: str, output: epath.Path, options: Options) -> _Written:
    tokenizer, tokenizer_params = workdirs.load_tokenizer(workdir)
    mark = fingerprint({"tokenizer": tokenizer_params})
    with open_run(workdir, best_metric="image_nats") as run:
        step = run.resolve(options.step)
        params = trained.restore(run, workdir, step, tokenizer_params=tokenizer_params)
        config = run.config(step)
    condition, text_model = condition_of(config).load(config, workdir)
    exported.write_params(output, exported.rounded(params, options.dtype, options.compact))
    if options.compact:
        tokenizer_params = exported.rounded(tokenizer_params, options.dtype, compact=True)
        mark = fingerprint({"tokenizer": jax.tree.map(lambda x: x.astype(np.float32), tokenizer_params)})
    frozen.save(output / TOKENIZER, tokenizers.to_dict(tokenizer), tokenizer_params, frozen.SAFETENSORS)
    if text_model is not None:
        _copy(expanded(workdir) / "text", output / "text")
    for folder in condition.own_modules:
        module, module_params = frozen.load(expanded(workdir) / folder, "Run the training again.")
        frozen.save(output / folder, module, exported.rounded(module_params, "float32"), frozen.SAFETENSORS)
    if folder := options.clip or (workdir if has_clip(workdir) else None):
        ClipScorer.load(folder).save(output, options.dtype if options.compact else "float32")
    size, vocab = config["data"]["image_size"], tokenizer.vocab_size
    height, width = tokenizer.grid(size)
    summary = f"{config['prior']}, {size} x {size} pixels as {height} x {width} tokens of {vocab:,}, given {condition}"
    return _Written(step, _count(params), summary, mark)


def _tokenizer(workdir: str, output: epath.Path, options: Options) -> _Written:
    imported = workdirs.has_tokenizer(workdir)
    step = options.step
    if not imported:
        with open_run(workdir) as run:
            step = workdirs.tokenizer_step(workdir) if options.step is None else run.resolve(options.step)
    elif workdirs.has_config(workdir):
        step = workdirs.latest_step(workdir)
    tokenizer, params = workdirs.load_tokenizer(workdir, None if imported else step)
    description, rounded = tokenizers.to_dict(tokenizer), exported.rounded(params, options.dtype)
    frozen.save(output / TOKENIZER, description, rounded, frozen.SAFETENSORS)
    size = tokenizer.image_size
    height, width = tokenizer.grid(size)
    summary = f"{tokenizer.kind}, {size} x {size} pixels as {height} x {width} tokens of {tokenizer.vocab_size:,}"
    return _Written(step, _count(params), summary)


def _clip(workdir: str, output: epath.Path, options: Options) -> _Written:
    step = None
    if workdirs.has_config(workdir):
        with open_run(workdir, best_metric="loss") as run:
            step = run.resolve(options.step)
    scorer = ClipScorer.load(workdir, step)
    scorer.save(output, options.dtype)
    if (expanded(workdir) / "text").is_dir():
        _copy(expanded(workdir) / "text", output / "text")  # for trainings that start from the export
    return _Written(step, _count(scorer.params), repr(scorer))


def _copy(source: epath.Path, target: epath.Path) -> None:
    """Copies the files of a folder, whose content `load_text_model` has checked."""
    with write_errors(target):
        contents = {path.name: path.read_bytes() for path in source.iterdir() if not path.is_dir()}
    for name, content in contents.items():
        write_file(target / name, content)


def _count(params: PyTree) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration without paths of this machine, because an export may be published."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found[key] = without_paths(value)
        elif key in _PATHS and isinstance(value, str) and "/" in (name := hub.name_of(value)):
            last = os.path.basename(name.rstrip("/")) if key in ("path", "workdir") else None
            found[key] = name if hub.is_hub(name) else last
        else:
            found[key] = value
    return found
