"""`configs/beit.py` from its tokenizer to fine-tuned classes, and what is rejected before it begins."""

import numpy as np
import pytest
from own_images import TINY_VQ, images

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.data.labels import Labels
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.evaluation import layer_features
from dalle_jax.jobs import train as train_job

SHORT = dict(steps=2, eval_batches=1, cadence__eval=2, cadence__preview=2, cadence__checkpoint=2, batch_size=8)
TOKENIZER = {f"tokenizer__{key.replace('.', '__')}": value for key, value in TINY_VQ.items()}
TOKENIZER |= {f"tokenizer__{key}": value for key, value in SHORT.items()}


@pytest.fixture
def classes(tmp_path):
    """Class folders of 10 images each, with 4 of them in `val`."""
    for number, content in enumerate(content for name, content in images().items() if name.endswith(".png")):
        split, name = "val" if number % 5 == 0 else "train", ("cat", "dog 2")[number % 2]
        folder = tmp_path / "classes" / split / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(content)
    return str(tmp_path / "classes")


def test_tokens_at_half_size_then_classes(load, classes):
    train_job.run(load("beit.py:small", **SHORT, **TOKENIZER), "run")
    tokenizer, _ = workdirs.load_tokenizer("run")
    assert tokenizer.image_size == 32 and tokenizer.downsample == 4 and workdirs.latest_step("run") == 2
    features = layer_features.open_model("run").extract(np.zeros((2, 64, 64, 3), np.uint8))
    assert features.shape == (2, 2, 16)

    labels = dict(model__target="labels", data__path=classes, start_from="run")
    train_job.run(load("beit.py:small", **SHORT, **labels), "labels")
    assert not workdirs.has_tokenizer("labels") and "tokenizer" not in workdirs.read_config("labels")
    stored = workdirs.load_text_model("labels")
    assert isinstance(stored, Labels) and stored.names == ("cat", "dog 2")
    with Checkpoints("labels", read_only=True) as checkpoints:
        assert checkpoints.restore_params(2)["head_labels"]["kernel"].shape == (16, 2)
    assert layer_features.open_model("labels").extract(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 2, 16)


def test_pixels_need_no_tokenizer(load):
    mae = dict(model__target="normalized_pixels", model__masks="random", model__masked_share=0.75)
    train_job.run(load("beit.py:small", **SHORT, **mae), "run")
    assert not workdirs.has_tokenizer("run") and workdirs.latest_step("run") == 2


@pytest.mark.parametrize(
    ("changes", "token"),
    [
        ({"model__patch": 7}, r"model\.patch"),
        ({"model__target": "colours"}, r"model\.target"),
        ({"model__trunk__attention_kernel": "splash"}, "attention_kernel"),
        ({"tokenizer__data__source": "tar_shards"}, r"tokenizer\.data\.source"),
    ],
)
def test_rejected_before_the_training(load, trained, changes, token):
    with pytest.raises(ConfigError, match=token):
        train_job.run(load("beit.py:small", **SHORT, **TOKENIZER, **changes), "run")
    assert not trained


def test_images_without_classes_are_rejected(load):
    with pytest.raises(DataError, match="0 classes"):
        train_job.run(load("beit.py:small", **SHORT, model__target="labels"), "run")
    with pytest.raises(ConfigError, match="shapes_captions"):
        train_job.run(load("beit.py:shapes", **SHORT, model__target="labels"), "run")
