"""Wrong values are found before the first training of a chain begins, whichever training they belong to."""

import pathlib

import pytest

from dalle_jax.errors import UserError
from dalle_jax.jobs import train as train_job

# Of every training: key, wrong value.
COMMON = [
    ("seed", -1),
    ("seed", 2**32),
    ("steps", 0),
    ("batch_size", 0),
    ("batch_size", -4),
    ("eval_batches", 0),
    ("max_nonfinite", 0),
    ("profile_steps", -1),
    ("cadence.log", 0),
    ("cadence.eval", -1),
    ("cadence.preview", -1),
    ("cadence.checkpoint", -5),
    ("keep.last", 0),
    ("keep.best", -1),
    ("timeout_seconds.data", 0.0),
    ("timeout_seconds.step", -1.0),
    ("mesh.data", 0),
    ("mesh.data", 64),
    ("mesh.fsdp", 5),
    ("ema.decay", 1.0),
    ("ema.every", 0),
    ("optimizer.b1", -0.1),
    ("optimizer.b2", 2.0),
    ("optimizer.eps", 0.0),
    ("optimizer.weight_decay", -1.0),
    ("optimizer.clip_norm", -1.0),
    ("optimizer.decay", "some"),
    ("optimizer.first_moment", "float8"),
    ("optimizer.accumulate_steps", 0),
    ("optimizer.accumulate_steps", 7),
    ("schedules.learning_rate.kind", "no"),
    ("schedules.learning_rate.peak", -1e-3),
    ("schedules.learning_rate.peak", float("nan")),
    ("schedules.learning_rate.warmup_steps", -1),
    ("from_data.passes", 0.0),
    ("from_data.max_steps", 1),
    ("data.image_size", 0),
    ("data.image_size", 30),
    ("data.path", ""),
    ("data.path", "no/such/folder"),
    ("data.source", "no_such_data_set"),
    ("data.source", "tar_shards"),
    ("data.augment", "flip"),
    ("data.workers", -1),
    ("data.train_split", "no_such_split"),
    ("data.eval_split", "no_such_split"),
    ("data.caption_lines", "some"),
    ("data.caption_from", "the sky"),
    ("data.max_pixels", 0),
    ("data.max_file_bytes", -1),
    ("start_from", "no/such/run"),
]  # fmt: skip
TEXT = [
    ("data.bpe_dropout", 1.0),
    ("data.bpe_dropout", -0.5),
    ("text.length", 0),
    ("text.vocab_size", 0),
    ("text.vocab_size", 5),
    ("text.path", "no/such/sentencepiece.model"),
]
TRUNK = [
    ("prior", "diffusion"),
    ("data_tokens", "sometimes"),
    ("tokenizer_from", "no/such/run"),
    ("model.caption_drop", 1.5),
    ("model.trunk.width", 0),
    ("model.trunk.width", -16),
    ("model.trunk.depth", 0),
    ("model.trunk.heads", 0),
    ("model.trunk.heads", 3),
    ("model.trunk.norm", "no"),
    ("model.trunk.activation", "no"),
    ("model.trunk.remat", "some"),
    ("model.trunk.dtype", "float12"),
    ("model.trunk.dropout", 1.0),
    ("model.trunk.attention_kernel", "no"),
    ("model.trunk.attention_kernel", "cudnn"),
    # The tokenizer that is trained first:
    ("tokenizer.steps", -3),
    ("tokenizer.seed", -1),
    ("tokenizer.batch_size", 0),
    ("tokenizer.model.vocab_size", 0),
    ("tokenizer.model.hidden", 0),
    ("tokenizer.model.code_dim", 0),
    ("tokenizer.model.code_dim", 49),
    ("tokenizer.model.encoder_blocks", -1),
    ("tokenizer.model.tokens_per_side", 5),
    ("tokenizer.model.dtype", "float12"),
    ("tokenizer.objective.init", "luck"),
    ("tokenizer.objective.commitment", -1.0),
    ("tokenizer.objective.code_decay", 1.0),
    ("tokenizer.optimizer.b2", 1.5),
    ("tokenizer.schedules.learning_rate.end", -1.0),
    ("tokenizer.data.train_split", "no_such_split"),
    ("tokenizer.data.path", "no/such/folder"),
    ("tokenizer.data.image_size", 64),
]  # fmt: skip
WRONG = {
    "prior": COMMON + TEXT + TRUNK + [
        ("model.kernel", 0),
        ("model.kernel", 4),
        ("model.order", "spiral"),
        ("model.attention", "no"),
    ],
    "maskgit": COMMON + TEXT + TRUNK + [
        ("model.steps", 0),
        ("model.head", "no"),
        ("model.neighbour_kernel", 2),
        ("model.label_smoothing", 1.5),
        ("model.choice_temperature", -1.0),
    ],
    "clip": COMMON + TEXT + [
        ("optimizer.accumulate_steps", 2),
        ("negatives.spoiled", -1),
        ("model.patch", 0),
        ("model.patch", 5),
        ("model.embed_dim", 0),
        ("model.image_width", 0),
        ("model.image_heads", 3),
        ("model.text_depth", -1),
        ("model.text_heads", 5),
        ("model.image_readout", "no"),
        ("model.dtype", "float12"),
        ("model.attention_kernel", "splash"),
        ("model.attention_kernel", "cudnn"),
    ],
    "dvae": COMMON + [
        ("model.code_dim", 0),
        ("schedules.learning_rate.end", -1.0),
    ],
    "dvae.py:folder": [
        ("model.hidden", 7),
        ("model.codebook_dim", 0),
        ("model.groups", 0),
        ("model.in_kernel", 2),
        ("model.stem_factor", 5),
        ("objective.init", "luck"),
        ("schedules.temperature.start", -1.0),
        ("schedules.temperature.end", 0.0),
        ("schedules.kl_weight.start", -1.0),
    ],
}  # fmt: skip
# The token of the message, where it is not the last part of the key.
TOKENS = {
    "data.image_size": "image.size|patch",
    "data.source": "data.source|no_such_data_set",
    "data.train_split": "no_such_split",
    "data.eval_split": "no_such_split",
    "tokenizer.data.train_split": "no_such_split",
    "optimizer.accumulate_steps": "accumulat",
    "schedules.learning_rate.peak": "schedules.learning_rate",
    "schedules.temperature.start": "schedules.temperature",
    "schedules.temperature.end": "schedules.temperature",
    "schedules.kl_weight.start": "schedules.kl_weight",
    "schedules.learning_rate.end": "schedules.learning_rate",
    "tokenizer.schedules.learning_rate.end": "tokenizer.schedules.learning_rate",
    "model.stem_factor": "image size",
    "model.dtype": "float12",
    "model.trunk.dtype": "float12",
}
CASES = [(name, key, value) for name, rows in WRONG.items() for key, value in rows]


@pytest.mark.parametrize("name, key, value", CASES, ids=[f"{name}-{key}={value}" for name, key, value in CASES])
def test_nothing_is_trained(load, trained, name, key, value):
    config = load(name if ":" in name else f"{name}.py:small")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=TOKENS.get(key, key.rpartition(".")[2])):
        train_job.run(config, config.workdir)
    assert not trained


@pytest.mark.parametrize("name", ["prior", "maskgit", "clip"])
def test_enough_values_are_tried(name):
    assert len(WRONG[name]) >= 40


@pytest.mark.parametrize("name, section", [("prior", "model.trunk"), ("clip", "model")])
def test_a_kernel_of_another_device(load, trained, name, section):
    config = load(f"{name}.py:small")
    config.update_from_flattened_dict({f"{section}.dtype": "bfloat16", f"{section}.attention_kernel": "cudnn"})
    with pytest.raises(UserError, match=f"{section}.attention_kernel=auto"):
        train_job.run(config, config.workdir)
    assert not trained


@pytest.mark.parametrize("key", ["--workdir", "tokenizer.workdir"])
@pytest.mark.parametrize("place", ["a_file", "a_file/run"])
def test_workdirs(load, trained, key, place):
    pathlib.Path("a_file").write_text("")
    config = load("prior.py:small")
    if key == "--workdir":
        workdir = place
    else:
        config.tokenizer.workdir, workdir = place, "run"
    with pytest.raises(UserError, match="a_file"):
        train_job.run(config, workdir)
    assert not trained


def test_images_without_captions(load, trained, tmp_path, folder):
    """A tokenizer can be trained on them, a prior cannot."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for image in pathlib.Path(folder).glob("*.png"):
        (bare / image.name).write_bytes(image.read_bytes())
    for name in ("prior", "maskgit", "clip"):
        with pytest.raises(UserError, match="caption"):
            train_job.run(load(f"{name}.py:small", data__path=str(bare)), "run")
    assert not trained
