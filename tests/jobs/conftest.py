"""A chain of trainings in which nothing is trained.

The fixtures import the package, because pytest may load this file before `tests/conftest.py` installs the type checker.
"""

import pytest
from own_images import TINY_BEIT, TINY_CLIP, TINY_DVAE, TINY_PRIOR, TINY_VQ, TINY_VQGAN, Trained, make_folder


@pytest.fixture
def trained(monkeypatch):
    """The (configuration, workdir) of each training that would run; the first one raises `Trained`."""
    from dalle_jax.jobs import train as train_job

    seen = []

    def train(config, workdir, **_):
        seen.append((config, workdir))
        raise Trained

    monkeypatch.setattr(train_job, "train", train)
    return seen


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder of 24 captioned images."""
    return make_folder(tmp_path_factory.mktemp("own") / "images")


@pytest.fixture
def load(folder, tmp_path, monkeypatch):
    """Returns a function that loads "prior.py:small" with tiny sizes and this folder; workdirs are in `tmp_path`."""
    from dalle_jax.aot.target import load_target
    from dalle_jax.jobs import train as train_job

    monkeypatch.chdir(tmp_path)
    root = train_job.__file__.rpartition("/dalle_jax/")[0]

    def load(target, **changes):
        config = load_target(f"{root}/configs/{target}")
        tiny = {"dvae": TINY_DVAE, "vq": TINY_VQ, "vqgan": TINY_VQGAN, "clip": TINY_CLIP, "prior": TINY_PRIOR}
        tiny["beit"] = TINY_BEIT
        for part in (config, *([config.tokenizer] if "tokenizer" in config else [])):
            part.update_from_flattened_dict(tiny[part.task])
        if not config.data.path and config.data.source in ("auto", "folder"):
            config.data.path = folder
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        return config

    return load


@pytest.fixture
def pretend(monkeypatch):
    """Returns a function that makes a workdir look like a training that has reached a step."""
    from dalle_jax.checkpoints import workdir as workdirs

    steps = {}

    def latest_step(workdir):
        return steps.get(str(workdir))

    monkeypatch.setattr(workdirs, "latest_step", latest_step)
    monkeypatch.setattr(workdirs, "is_complete", lambda workdir, config: steps.get(str(workdir), -1) >= config["steps"])
    return steps
