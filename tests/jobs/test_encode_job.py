"""Tests of the encode job: it resumes after a kill, and trainings read its tokens and reject those of others."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from own_images import make_folder
from processes import finish, free_address, spawn

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration import config_files
from dalle_jax.data.token_store import TokenStore
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.jobs import encode as encode_job
from dalle_jax.jobs import train as train_job
from dalle_jax.tasks import encoded_split, registry

TOKENIZER = DVAETokenizer(DVAEOptions(image_size=16, vocab_size=16, hidden=8, blocks_per_group=1, stem_factor=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("encoded") / "images")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(encoded_split, "PART", 8)
    monkeypatch.setattr(encoded_split, "BATCH", 8)


@pytest.fixture(scope="module")
def save_tokenizer(tmp_path_factory):
    """Returns a function that saves a tokenizer with the parameters of a seed, and returns its folder."""
    shapes = nn.meta.unbox(jax.eval_shape(TOKENIZER.init, jax.random.key(0)))

    def save(seed):
        path, rng = tmp_path_factory.mktemp("tokenizer"), np.random.default_rng(seed)
        params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
        workdirs.save_tokenizer(path, TOKENIZER, params)
        return str(path)

    return save


@pytest.fixture
def encode(folder, tmp_path, save_tokenizer):
    """Returns a function that runs the job, which writes into "tokens"; keywords are keys of its configuration."""
    root = encode_job.__file__.rpartition("/dalle_jax/")[0]
    first = save_tokenizer(0)

    def run(**changes):
        config = config_files.load(f"{root}/configs/encode.py")
        config.update_from_flattened_dict({"tokenizer_workdir": first, "data.path": folder, "data.train_split": "all"})
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        return encode_job.run(config, str(tmp_path / "tokens"))

    return run


def parts(tmp_path):
    return {file.name: file.read_bytes() for file in sorted((tmp_path / "tokens").glob("part-*.npy"))}


def test_a_killed_job_resumes(encode, tmp_path, monkeypatch):
    store = encode()
    whole = parts(tmp_path)
    assert len(store) == 24 and len(whole) == 3 and store.description.image_size == 16
    for name in ("part-00001.npy", "part-00002.npy"):
        (tmp_path / "tokens" / name).unlink()

    write, written = TokenStore.write, []

    def killed(self, part, *args):
        if written:
            raise KeyboardInterrupt
        written.append(part)
        write(self, part, *args)

    monkeypatch.setattr(TokenStore, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        encode()
    assert written == [1] and set(parts(tmp_path)) == {"part-00000.npy", "part-00001.npy"}
    monkeypatch.setattr(TokenStore, "write", lambda self, part, *args: [written.append(part), write(self, part, *args)])
    encode()
    assert written == [1, 2] and parts(tmp_path) == whole


def test_hosts_share_the_parts(encode, tmp_path, monkeypatch):
    encode()
    whole = parts(tmp_path)
    for name in whole:
        (tmp_path / "tokens" / name).unlink()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for host, expected in ((1, {"part-00001.npy"}), (0, set(whole))):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        encode()
        assert set(parts(tmp_path)) == expected
    assert parts(tmp_path) == whole


HOST = """
import sys

_, address, index, folder, tokenizer, workdir = sys.argv
from dalle_jax.configuration import config_files
from dalle_jax.distributed.joining import start
from dalle_jax.jobs import encode
from dalle_jax.tasks import encoded_split

start("encode", address, 2, int(index), connect_seconds=120)
encoded_split.PART = encoded_split.BATCH = 8
config = config_files.load("configs/encode.py")
changes = {"tokenizer_workdir": tokenizer, "data.path": folder, "data.train_split": "all", "data.workers": 0}
config.update_from_flattened_dict(changes)
print("written", *encode.run(config, workdir).faults())
"""


def test_two_hosts(folder, save_tokenizer, tmp_path):
    """Each of them ends when all parts are there, although the first one has more to do."""
    address, arguments = free_address(), (folder, save_tokenizer(0), str(tmp_path / "tokens"))
    said = finish([spawn(["-c", HOST, address, str(host), *arguments]) for host in range(2)])
    assert [status for status, *_ in said] == [0, 0], said
    assert all(out.splitlines()[-1] == "written" for _, out, _ in said)
    assert len(parts(tmp_path)) == 3


def test_a_folder_of_other_tokens_is_left_alone(encode, tmp_path, save_tokenizer):
    encode()
    before = parts(tmp_path)
    for changes, word in (({"tokenizer_workdir": save_tokenizer(1)}, "parameters"), ({"data__image_size": 32}, "size")):
        with pytest.raises(ConfigError, match=f"tokens.*{word}"):
            encode(**changes)
    with pytest.raises(ConfigError, match="tokenizer_workdir"):
        encode(tokenizer_workdir="")
    assert parts(tmp_path) == before


@pytest.fixture
def prior(load, tmp_path, folder):
    """Returns a function that loads a tiny prior on the encoded images; keywords are keys of its configuration."""

    def make(**changes):
        usual = {"data.path": folder, "data.train_split": "all", "data.eval_split": "all", "data.image_size": 16}
        sizes = {"text.vocab_size": 64, "text.length": 8, "steps": 2, "data_tokens": str(tmp_path / "tokens")}
        return load("prior.py:small", **usual, **sizes, **changes)

    return make


def test_a_training_reads_the_tokens_and_their_tokenizer(encode, prior, trained, tmp_path, monkeypatch):
    encode()
    config = prior(workdir=str(tmp_path / "run"))
    with pytest.raises(Exception, match="^$"):  # `Trained`: the prior's training begins, and no other one
        train_job.run(config, config.workdir)
    ((config, workdir),) = trained
    assert config.task == "prior" and config.tokenizer_from == str(tmp_path / "tokens")

    monkeypatch.setattr(encoded_split, "_encode", None)  # nothing is encoded here
    given = registry.build(config, workdir)
    monkeypatch.undo()
    config.data_tokens = "once"
    once = registry.build(config, workdir)
    for job in (given, once):
        assert set(job.task.frozen) == {"tokenizer"}
    for ours, theirs, _ in zip(given.train_batches(), once.train_batches(), range(8), strict=False):
        assert set(ours) == {"tokens", "index", "text"} and ours["tokens"].dtype == np.uint16
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_tokens_of_others_are_rejected_before_a_training(encode, prior, trained, tmp_path, save_tokenizer, folder):
    with pytest.raises(ConfigError, match="data_tokens"):  # they do not exist yet
        train_job.run(prior(), str(tmp_path / "run"))
    encode()
    with pytest.raises(ConfigError, match="data_tokens.*tokenizer"):
        train_job.run(prior(tokenizer_from=save_tokenizer(1)), str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="image_size=16"):
        train_job.run(prior(data__image_size=32), str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="augment"):
        train_job.run(prior(data__augment="prior"), str(tmp_path / "run"))
    assert not trained and not (tmp_path / "run" / "image_tokenizer").exists()
