"""Every workdir of a chain has one owner, and a second command says who before it changes anything."""

import os
import threading

import pytest
from tiny_job import tiny_config

from dalle_jax.checkpoints.ownership import owned
from dalle_jax.configuration import config_files
from dalle_jax.errors import WorkdirInUse
from dalle_jax.jobs import quickstart
from dalle_jax.jobs import train as train_job
from dalle_jax.training.loop import train


@pytest.fixture
def work_in():
    """Returns a function that owns a workdir in another thread until the end of the test."""
    end, threads = threading.Event(), []

    def work_in(workdir):
        begun = threading.Event()

        def work():
            with owned(workdir):
                begun.set()
                end.wait()

        threads.append(threading.Thread(target=work))
        threads[-1].start()
        assert begun.wait(20)

    yield work_in
    end.set()
    for thread in threads:
        thread.join()


def test_a_training(load, trained, work_in):
    config = load("dvae.py:small")
    work_in(config.workdir)
    before = os.listdir(config.workdir)
    with pytest.raises(WorkdirInUse, match=config.workdir):
        train_job.run(config, config.workdir)
    with pytest.raises(WorkdirInUse, match=config.workdir):
        train(tiny_config(), config.workdir)
    assert not trained and os.listdir(config.workdir) == before == ["owner.json"]


def test_the_tokenizer_of_a_prior(load, trained, work_in):
    """The prior gives its own workdir back."""
    config = load("prior.py:small")
    work_in("runs/dvae-small")
    with pytest.raises(WorkdirInUse, match="runs/dvae-small"):
        train_job.run(config, config.workdir)
    assert not trained and os.listdir("runs/dvae-small") == ["owner.json"]
    assert "owner.json" not in os.listdir(config.workdir)


def test_a_prior_owns_its_workdir_while_its_tokenizer_is_trained(load, monkeypatch):
    seen = []

    def trained(config, workdir, **_):
        seen.extend(os.path.exists(f"{each}/owner.json") for each in (workdir, "runs/prior-small"))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_job, "train", trained)
    config = load("prior.py:small")
    with pytest.raises(KeyboardInterrupt):
        train_job.run(config, config.workdir)
    assert seen == [True, True] and not os.path.exists("runs/prior-small/owner.json")


@pytest.mark.parametrize("stage", ["", "dvae", "prior", "maskgit", "clip"])
def test_the_stages_of_quickstart(work_in, tmp_path, stage):
    """All of them are owned from the beginning to the report, which needs them all."""
    root = quickstart.__file__.rpartition("/dalle_jax/")[0]
    config = config_files.load(f"{root}/configs/quickstart.py")
    work_in(tmp_path / "runs" / stage)
    with pytest.raises(WorkdirInUse, match=f"runs.*{stage}"):
        quickstart.run(config, str(tmp_path / "runs"))
    found = [os.path.join(folder, name) for folder, _, names in os.walk(tmp_path) for name in names]
    assert found == [str(tmp_path / "runs" / stage / "owner.json")], "nothing else was made"
