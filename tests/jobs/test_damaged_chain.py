"""Harms to each file of a finished chain: tokenizer, prior and CLIP. Each is noticed, or changes no number.

Not harmed are files that nothing reads (TensorBoard, samples), `data.json`, from which nothing is computed, and the log
`metrics.jsonl`.
"""

import collections
import contextlib
import logging
import random
import shutil

import jax
import pytest

from dalle_jax import TextToImage
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.configuration import config_files
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import on_mesh
from dalle_jax.errors import CheckpointError, UserError
from dalle_jax.jobs import train as train_job
from dalle_jax.jobs.preparation import prepare
from dalle_jax.optim.optimizers import make_optimizer
from dalle_jax.pytree import fingerprint
from dalle_jax.storage import checksummed
from dalle_jax.tasks import registry
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.training.step import TrainState, make_init
from dalle_jax.training.validation import mesh_and_options

pytestmark = pytest.mark.slow

UNREAD = ("tensorboard", "samples", "metrics.jsonl", "data.json", "profile")
SHAPES = {"image_size": 16, "builder_kwargs": {"image_size": 16, "num_train": 64, "num_validation": 16}}
RUN = {"batch_size": 16, "steps": 4, "eval_batches": 1, "keep": {"last": 2, "best": 1}, "mesh": {"data": 1}} | {
    "cadence": {"log": 1, "eval": 2, "preview": 4, "checkpoint": 2}
}


def configurations(folder):
    """Returns the configurations of the prior with its tokenizer, and of CLIP."""
    data = {**SHAPES, "data_dir": str(folder / "drawn")}
    prior = config_files.load("configs/prior.py:shapes")
    prior.update({"workdir": str(folder / "prior"), "data": data, "text": {"vocab_size": 64, "length": 20}, **RUN})
    prior.update({"model": {"trunk": {"width": 16, "depth": 2, "heads": 2}}, "data_tokens": "once"})
    model = {"vocab_size": 16, "hidden": 96, "blocks_per_group": 1, "codebook_dim": 96}
    prior.tokenizer.update({"workdir": str(folder / "dvae"), "data": data, "model": model, **RUN})
    clip = config_files.load("configs/clip.py:shapes")
    tower = {"width": 16, "depth": 1, "heads": 2}
    model = {f"{kind}_{size}": n for kind in ("image", "text") for size, n in tower.items()} | {"embed_dim": 8}
    clip.update({"workdir": str(folder / "clip"), "data": data, "text": {"vocab_size": 64, "length": 20}, **RUN})
    clip.update({"model": model, "negatives": {"spoiled": 0}})
    return prior, clip


class Place:
    """A data iterator that remembers its place only."""

    def get_state(self):
        raise NotImplementedError

    def set_state(self, state):
        self.state = state


class Chain:
    """A finished chain in `folder`, and all that is computed from its files."""

    def __init__(self, folder):
        self.folder = folder
        self.prior, self.clip = configurations(folder)
        for config in (self.prior, self.clip):
            train_job.run(config, config.workdir)
        ClipScorer.load(folder / "clip").save(folder / "prior")
        self.prior = prepare(self.prior)
        mesh, options, average = mesh_and_options(self.prior)
        task = registry.build(self.prior, self.prior.workdir).task
        self._abstract = make_init(task, make_optimizer(options), average, mesh, 0)[1]
        shutil.copytree(folder, folder / "kept", ignore=shutil.ignore_patterns("drawn", *UNREAD))

    def files(self):
        """Lists the files that something reads, relative to the folder."""
        kept = self.folder / "kept"
        return sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())

    def restore(self, run):
        shutil.rmtree(self.folder / run)
        shutil.copytree(self.folder / "kept" / run, self.folder / run)

    def numbers(self, run):
        """Returns what readers get from a run: fingerprints of all that they compute with."""
        workdir = self.folder / run
        if run == "dvae":
            tokenizer, params = workdirs.load_tokenizer(workdir)
            return repr(tokenizer), fingerprint(params)
        if run == "clip":
            return of_scorer(ClipScorer.load(workdir))
        return self._drawing(), self._resuming()

    def _drawing(self):
        model = TextToImage.load(self.prior.workdir, mesh=make_mesh(data=1))
        params = fingerprint([model.params, model.tokenizer_params])
        sizes = repr(model.prior), repr(model.tokenizer), model.image_size, model.step
        return params, sizes, model.text_model.__reduce__(), of_scorer(model.scorer)

    def _resuming(self):
        task = registry.build(self.prior, self.prior.workdir).task
        place = Place()
        with on_mesh(make_mesh(data=1)), Checkpoints(self.prior.workdir, best_metric="image_nats") as checkpoints:
            defaults = registry.defaults(self.prior)
            best = checkpoints.best_step
            items = checkpoints.restore(self._abstract.items(), place, self.prior, defaults)
        stored = workdirs.read_config(self.prior.workdir), workdirs.is_complete(self.prior.workdir, self.prior)
        return fingerprint(task.frozen), fingerprint(TrainState.from_items(items)), place.state, stored, best


def of_scorer(scorer):
    return repr(scorer.clip.options), fingerprint(scorer.params), scorer.text_model.__reduce__()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return Chain(tmp_path_factory.mktemp("chain"))


def flip(content, draw, _):
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


HARMS = {
    "flip": flip,
    "half": lambda content, *_: content[: len(content) // 2],
    "short": lambda content, *_: content[:-1],
    "empty": lambda *_: b"",
    "zeros": lambda content, *_: bytes(len(content)),
    "swap": lambda content, draw, other: other,
}


def kind(file):
    """Returns the group of a file in the table."""
    parts = file.parts
    if "checkpoints" in parts:
        return f"{parts[0]}: checkpoints"
    return (
        f"{parts[0]}: {parts[1]}" if len(parts) > 2 else f"{parts[0]}: {'tokens' if 'tokens' in parts[1] else parts[1]}"
    )


@contextlib.contextmanager
def warnings():
    """Collects the messages that users see."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("absl").addHandler(handler)
    checksummed.log_once.cache_clear()
    try:
        yield said
    finally:
        logging.getLogger("absl").removeHandler(handler)


def outcome(chain, file, harmed, expected, usual):
    """Returns "noticed", "same", or what went wrong."""
    run = file.parts[0]
    (chain.folder / file).write_bytes(harmed)
    try:
        with warnings() as said:
            found = chain.numbers(run)
    except UserError:
        return "noticed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        chain.restore(run)
    return "noticed" if set(said) - set(usual) else "same" if found == expected[run] else "other numbers"


# Orbax abandons its other reads when one of them fails.
@pytest.mark.filterwarnings("ignore:coroutine '_read_array:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <coroutine:pytest.PytestUnraisableExceptionWarning")
def test_every_harm_is_noticed_or_changes_nothing(chain):
    draw, table, wrong = random.Random(0), collections.Counter(), []
    for run in ("dvae", "clip", "prior"):
        chain.restore(run)
    with warnings() as usual:
        expected = {run: chain.numbers(run) for run in ("dvae", "clip", "prior")}
    files = chain.files()
    groups = collections.defaultdict(list)
    for file in files:
        groups[kind(file)].append(file)
    for group, members in groups.items():
        alike = {file: [x for x in files if x != file and x.name == file.name] for file in members}
        flips = [(file, "flip") for file in members for _ in range(max(1, 8 // len(members)))]
        others = [(file, harm) for file in members for harm in HARMS if harm != "flip"]
        for file, harm in draw.sample(flips, min(len(flips), 16)) + draw.sample(others, min(len(others), 16)):
            content = (chain.folder / file).read_bytes()
            other = (chain.folder / "kept" / draw.choice(alike[file] or files)).read_bytes()
            harmed = HARMS[harm](content, draw, other) if content else b"x"
            if harmed == content:
                continue
            result = outcome(chain, file, harmed, expected, usual)
            table[group, result if result in ("noticed", "same") else "wrong"] += 1
            if result not in ("noticed", "same"):
                wrong.append(f"{file} {harm}: {result}")
        print(group, {result: table[group, result] for result in ("noticed", "same", "wrong")}, flush=True)
    assert not wrong, "\n".join(wrong)


def test_another_tokenizer_of_the_same_sizes(chain):
    """A whole module of another training is no damage, but the prior does not work with it."""
    tokenizer, params = workdirs.load_tokenizer(chain.folder / "prior")
    workdirs.save_tokenizer(chain.folder / "prior", tokenizer, jax.tree.map(lambda x: -x, params))
    try:
        with pytest.raises(CheckpointError, match="image_tokenizer"):
            TextToImage.load(chain.prior.workdir)
        with pytest.raises(CheckpointError, match="image_tokenizer"):
            train_job.run(chain.prior, chain.prior.workdir)
    finally:
        chain.restore("prior")
