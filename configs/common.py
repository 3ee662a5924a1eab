"""Sections that several configs share."""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


def data(source: str, image_size: int, **options) -> ConfigDict:
    """The `data` section, every key of `DataOptions` spelled out."""
    section = ConfigDict(
        {
            "source": source,
            "image_size": image_size,
            "augment": "none",
            "path": placeholder(str),  # one's own files: DataOptions.path says for which sources
            "data_dir": placeholder(str),  # None: $DALLE_JAX_DATA or ~/.cache/dalle_jax/data
            "image_key": "image",
            "caption_key": "caption",
            "builder_kwargs": {},
            "train_split": "train",
            "eval_split": "validation",
            "cache": False,
            "workers": 0,
            "bpe_dropout": 0.0,
        }
    )
    section.update(options)
    return section


def shapes(**options) -> ConfigDict:
    """The embedded pictures of coloured shapes."""
    return data("shapes_captions", 32, cache=True, builder_kwargs={"num_train": 24_576}, **options)


def emoji(**options) -> ConfigDict:
    """The colour emoji of an installed font (Debian and Ubuntu: fonts-noto-color-emoji)."""
    return data("emoji_captions", 32, cache=True, builder_kwargs={"image_size": 32}, **options)


def folder(image_size: int, **options) -> ConfigDict:
    """Pictures of one's own: --config.data.path=DIR, with name.png + name.txt, captions.jsonl or captions.csv."""
    return data("folder", image_size, workers=2, train_split="train", eval_split="validation", **options)


def tar_shards(image_size: int, **options) -> ConfigDict:
    """Image–caption tar shards of one's own (img2dataset, WebDataset): --config.data.path=DIR."""
    return data("tar_shards", image_size, workers=2, **options)


def coco(image_size: int = 256, **options) -> ConfigDict:
    """MS-COCO's captions: --config.data.path=DIR with the official files, or TFDS's `coco_captions` in data_dir."""
    return data("coco_captions", image_size, caption_key="captions/text", workers=2, **options)


def cub(image_size: int = 256, **options) -> ConfigDict:
    """CUB-200-2011 with ten captions a picture: --config.data.path=DIR with the official files."""
    return data("cub_captions", image_size, eval_split="test", workers=2, **options)


def schedule(kind: str, **numbers) -> dict:
    """A section of `schedules` (dalle_jax/optim/schedules.py has the kinds)."""
    return {"kind": kind, **{name: _own(number) for name, number in numbers.items()}}


def set_steps(config: ConfigDict, steps: int) -> FieldReference:
    """Sets `config.steps`, and gives it for what follows `--config.steps=N`: schedules that end with the training."""
    config.steps = steps
    return config.get_oneway_ref("steps")


def _own(value):
    """A reference of its own, where it is one: else a key that is set by itself would take others along."""
    return value.identity() if isinstance(value, FieldReference) else value


def run(config: ConfigDict, *, batch_size: int, every: int | FieldReference, split: int = 0) -> None:
    """Mesh, batch and cadence: the end of each training config.

    Args:
      config: gets the keys; has `steps` (see `set_steps`).
      every: steps between evaluations, previews and checkpoints.
      split: parameters are split over one in so many of the devices (`fsdp`), with so many copies of them all (`data`);
        0: each device has all of them.
    """
    config.mesh = mesh(data=split or -1, fsdp=-1 if split else 1)
    # Ask the TPU compiler to exchange while it computes; False where a libtpu does not know these options.
    config.overlap_exchanges = split > 0
    config.batch_size = batch_size
    log = max(1, min(50, config.steps // 20))
    config.cadence = ConfigDict({"log": log, **{what: _own(every) for what in ("eval", "preview", "checkpoint")}})
    config.eval_batches = 8
    config.keep = ConfigDict({"last": 2, "best": 0})  # two, for the day when the newest turns out damaged
    config.max_nonfinite = 20
    # The longest wait for a batch; and, with several hosts, for a step, an evaluation batch, a checkpoint or compiling.
    config.timeout_seconds = ConfigDict({"data": 600.0, "step": 1800.0})
    config.profile_steps = 0  # how many steps to record in <workdir>/profile, for TensorBoard and Perfetto


def mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> ConfigDict:
    """How many devices along each axis (dalle_jax/distributed/sharding.py); -1: all that are left."""
    return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


def sampling() -> ConfigDict:
    """How tokens are drawn: the fields of `dalle_jax.priors.sampling.SamplingOptions`; None: the prior's own."""
    return ConfigDict({
        "temperature": 1.0, "final_temperature": placeholder(float), "top_k": placeholder(int),
        "top_p": placeholder(float), "guidance": 0.0, "steps": placeholder(int), "order": placeholder(str),
        "choice_temperature": placeholder(float),
    })  # fmt: skip
