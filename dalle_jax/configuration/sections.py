"""Sections that several config files share, and the helpers that build them.

config.optimizer = section(OptimizerOptions, b2=0.96)  # every field of the dataclass can be set by a flag
override(config, {"mesh.data": 2, "model.trunk.remat": "dots"})  # dotted keys over the defaults
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from dalle_jax.configuration.options import closest, defaults_of
from dalle_jax.errors import ConfigError

Overrides = Mapping[str, Any]

# The `data` sections of the known data sets: fields of `dalle_jax.data.sources.source.DataOptions`.
SHAPES = dict(source="shapes_captions", image_size=32, cache=True, builder_kwargs={"num_train": 24_576})  # embedded
# The same with one object in each image, whose colour and shape are its class.
SHAPE_CLASSES = dict(SHAPES, condition="label", builder_kwargs={"num_train": 4096, "classes": True})
EMOJI = dict(source="emoji_captions", image_size=32, cache=True, builder_kwargs={"image_size": 32})  # a font's
FOLDER = dict(source="folder", workers=None)  # your own: name.png + name.txt, captions.jsonl or captions.csv
TAR_SHARDS = dict(source="tar_shards", workers=None)  # your own, from img2dataset or WebDataset
OWN = dict(source="auto", image_size=32, cache=True)  # your own, small: folder or tar shards
CLASSES = dict(condition="label", caption_from="folder_names")  # of a folder for each class
IMAGENET = dict(FOLDER, **CLASSES, image_size=256, augment="dvae")
COCO = dict(source="coco_captions", image_size=256, caption_key="captions/text", workers=None)
LARGER_TEXT = dict(max_vocab_size=4096, max_text_length=128)  # of `from_data`, for more than a small model
CUB = dict(source="cub_captions", image_size=256, eval_split="test", workers=None)


def section(cls: type, *, without: Collection[str] = (), **values: Any) -> ConfigDict:
    """Returns a section with every field of an options dataclass, so that a flag can set each of them.

    Args:
      cls: the dataclass. A field whose type is a dataclass becomes a section inside this one.
      without: fields that are derived from other keys and so have no key.
      **values: values that differ from the defaults. None stands for "not set".

    Raises:
      ConfigError: a value for a field that the dataclass does not have.
    """
    hints = {name: hint for name, hint in typing.get_type_hints(cls).items() if name not in without}
    fields = {field.name for field in dataclasses.fields(cls)} & set(hints)
    if unknown := [name for name in values if name not in fields]:
        raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}{closest(unknown[0], fields)}.")
    defaults = defaults_of(cls)
    return ConfigDict({name: _typed(hints[name], {**defaults, **values}[name]) for name in sorted(fields)})


def _typed(hint: Any, value: Any) -> Any:
    """Returns a field's value as a flag can change it: with the field's type, also if it is None."""
    if dataclasses.is_dataclass(hint):
        given = value if isinstance(value, (Mapping, ConfigDict)) else dataclasses.asdict(value)
        return section(hint, **dict(given))
    if isinstance(value, (Mapping, ConfigDict)):
        return ConfigDict(value)
    if isinstance(value, FieldReference):
        return own(value)
    if value is None:
        return placeholder(next(one for one in typing.get_args(hint) if one is not types.NoneType))
    return float(value) if hint is float else value


def own(value: Any) -> Any:
    """Returns a separate copy of a reference, and any other value unchanged.

    Two keys that shared one reference would both change when one of them is set.
    """
    return value.identity() if isinstance(value, FieldReference) else value


def override(config: ConfigDict, *changes: Overrides | Callable[[FieldReference], Overrides]) -> None:
    """Sets dotted keys of a configuration: {"model.trunk.norm": "rmsnorm"}.

    Args:
      config: the configuration. It has every key already.
      *changes: values by key, or a function that returns them, given a reference to `config.steps`. A dict as value
        replaces the whole section.

    Raises:
      ConfigError: a key that the configuration does not have.
    """
    steps = config.get_oneway_ref("steps")
    for change in changes:
        for key, value in (change(steps) if callable(change) else change).items():
            *parents, last = key.split(".")
            place = config
            for name in parents:
                place = place.get(name, {})
            if last not in place:
                raise ConfigError(f"The configuration has no key {key!r}, which an override sets.")
            del place[last]  # else the old value's references and type would stay
            place[last] = ConfigDict(value) if isinstance(value, Mapping) else own(value)


def schedule(kind: str, **numbers: Any) -> dict[str, Any]:
    """Returns a section of `schedules`; `dalle_jax/optim/schedules.py` has the kinds."""
    return {"kind": kind, **{name: own(number) for name, number in numbers.items()}}


def set_steps(config: ConfigDict, steps: int | None) -> FieldReference:
    """Sets `config.steps` and returns a reference to it, so that schedules can follow `--config.steps=N`.

    None stands for a number that the data set's size determines (`size_rules.py`). Schedules follow it as well. Adds
    `config.minutes`, too. If it is set, `steps` is planned at the start of the run (training/budget.py).
    """
    if steps is not None or "steps" not in config:
        config.steps = placeholder(int) if steps is None else steps
    if "minutes" not in config:
        config.minutes = placeholder(float)
    return config.get_oneway_ref("steps")


# The share of `minutes` in which a prior's image tokenizer is trained. The prior gets what is left of them.
TOKENIZER_SHARE = 0.3


def share_minutes(config: ConfigDict, name: str, share: float = TOKENIZER_SHARE) -> None:
    """Plans the training of section `name`, which comes first, for a share of `config.minutes`.

    `config.minutes` are those of the whole command. `--config.<name>.minutes=M` replaces the share, and
    `--config.<name>.steps=N` is a fixed number of updates.
    """
    config[name].minutes = config.get_oneway_ref("minutes") * share


def check_minutes(config: ConfigDict, given: Collection[str]) -> None:
    """Settles which of `minutes` and `steps` decides, for the keys given on the command line.

    A training that is given its own `steps` is not planned, although a share of the minutes would be its own.

    Args:
      config: a configuration. Its `minutes` are changed.
      given: dotted keys that were given.

    Raises:
      ConfigError: `steps` and `minutes` of one training were given.
    """
    for key in given:
        *parents, last = key.split(".")
        if last != "steps":
            continue
        place = config
        for name in parents:
            place = place[name]
        minutes = ".".join([*parents, "minutes"])
        if minutes in given:
            raise ConfigError(
                f"config.{key}={place.steps} and config.{minutes}={place.minutes:g} exclude each other: minutes plan "
                "the number of steps. Give one of them."
            )
        if place.get("minutes") is not None:
            place.minutes = None


def text(vocab_size: int | None, length: int | None) -> ConfigDict:
    """Returns the `text` section: size of the vocabulary, positions, and the file of a text model to use (or None).

    A size of None is determined by the captions (`size_rules.py`).
    """
    sizes = {"vocab_size": vocab_size, "length": length}
    sizes = {name: placeholder(int) if size is None else size for name, size in sizes.items()}
    return ConfigDict({**sizes, "path": placeholder(str)})


# Keys of `data` that belong to one training alone: its augmentations, and what a prior draws from.
OWN_DATA_KEYS = ("augment", "bpe_dropout", "condition")


def follow_data(tokenizer: ConfigDict, data: ConfigDict) -> None:
    """Makes the `data` section of a prior's tokenizer follow that of the prior, key by key.

    `--config.data.path=DIR` then holds for both trainings, and `--config.tokenizer.data.path=DIR` for one of them.

    Args:
      tokenizer: the tokenizer's training configuration.
      data: the prior's `data` section.
    """
    for key in data:
        if key in OWN_DATA_KEYS:
            continue
        section = data[key]
        del tokenizer.data[key]  # else the old type would stay
        if isinstance(section, ConfigDict):
            tokenizer.data[key] = ConfigDict({name: section.get_oneway_ref(name) for name in section})
        else:
            tokenizer.data[key] = data.get_oneway_ref(key)


def mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> ConfigDict:
    """Returns the `mesh` section: devices along each axis (dalle_jax/distributed/mesh.py). -1: all that are left."""
    return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


def split_over_chips(copies: int) -> Overrides:
    """Returns overrides that split the parameters over all chips (`fsdp`), with `copies` copies of them (`data`).

    The TPU compiler is asked to exchange while it computes.
    """
    return {"mesh.data": copies, "mesh.fsdp": -1, "overlap_exchanges": True}


def cadence(every: int | FieldReference) -> Overrides:
    """Returns overrides that evaluate, preview and save every `every` steps."""
    return {f"cadence.{event}": every for event in ("eval", "preview", "checkpoint")}


def between(least: int, reference: FieldReference, largest: int) -> FieldReference:
    """Returns a reference to the number in [least, largest] that is nearest to a reference's value."""
    # References have no minimum and no maximum.
    smaller = (reference + largest - abs(reference - largest)) // 2
    return (smaller + least + abs(smaller - least)) // 2


def chosen_by(reference: FieldReference, values: Mapping[str, str]) -> FieldReference:
    """Returns a reference to the entry of `values` under a reference's value, or to the first one if it has none."""
    first = next(iter(values.values()))  # the options reject the unknown value itself
    return reference._apply_op(lambda key: values.get(key, first))  # the public operators are arithmetic


def keep_best(steps: FieldReference) -> Overrides:
    """Returns overrides that evaluate eight times and keep the best checkpoint, for sets soon learned by heart."""
    return {"cadence.eval": (steps + 7) // 8, "keep.best": 1}


def training_loop(config: ConfigDict, batch_size: int, every: int | FieldReference) -> None:
    """Adds the mesh, the batch size and the cadence: the end of each training config.

    Args:
      config: the configuration. It has `steps`.
      batch_size: examples per update, over all devices.
      every: steps between evaluations, previews and checkpoints. A number holds for long trainings; shorter ones have
        four of each.
    """
    steps = config.get_oneway_ref("steps")
    config.mesh = mesh()
    config.overlap_exchanges = False  # a libtpu that does not know these options needs False
    config.batch_size = batch_size
    config.cadence = ConfigDict({"log": between(1, steps // 20, 50), "eval": 0, "preview": 0, "checkpoint": 0})
    override(config, cadence(every if isinstance(every, FieldReference) else between(1, (steps + 3) // 4, every)))
    config.metric_writers = "tensorboard"  # or "tensorboard,wandb"; "": only metrics.jsonl and index.html
    config.eval_batches = 8
    config.keep = ConfigDict({"last": 2, "best": 0})  # keep two in case the newest is corrupt
    config.stop_after = 0  # evaluations without improvement after which the training stops; 0: never
    config.max_nonfinite = 20
    # The longest wait for a batch; and, with several hosts, for a step, an evaluation batch, a checkpoint or compiling.
    config.timeout_seconds = ConfigDict({"data": 600.0, "step": 1800.0})
    config.profile_steps = 0  # steps to record in <workdir>/profile, for TensorBoard and Perfetto


# The keys of a training that people set, with their meaning. Config files add their own and list them in --help.
TRAINING_KEYS = {
    "workdir": "directory of the run: configuration, checkpoints, logs",
    "data.path": "your images and captions, or your copy of the data set",
    "data.source": "folder, tar_shards, auto (one of these two), shapes_captions, emoji_captions, coco_captions, …",
    "data.image_size": "height and width of the images, in pixels",
    "steps": "number of updates, None: by the size of the data set; schedules that end with the training follow it",
    "minutes": "instead of steps: minutes until the command ends, image tokenizer included; timed at the start",
    "batch_size": "examples per update, over all devices",
    "optimizer.accumulate_steps": "slices of a batch; more need less memory",
    "cadence.checkpoint": "steps between checkpoints",
    "stop_after": "evaluations without improvement after which the training stops; 0: never",
    "seed": "seed of parameters, data order and noise",
}
SAMPLING_KEYS = {
    "sampling.temperature": "divides the logits; 0 takes the most likely token",
    "sampling.top_k": "keep the k most likely tokens; None: all",
    "sampling.top_p": "keep the most likely tokens up to this probability; None: all",
    "sampling.steps": "number of decoding steps, MaskGIT or model.order=diagonal; None: the model's default",
    "sampling.guidance": "weight of the caption (classifier-free guidance); 0: no guidance",
}
