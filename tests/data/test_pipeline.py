import itertools
import json

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest
from memory_source import CAPTIONS, SIZE, MemorySource

from dalle_jax.data import examples
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.prefetch import prefetch_to_mesh
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.tally import TRUNCATED, Note, Tally
from dalle_jax.data.text import TextModel
from dalle_jax.errors import CheckpointError, ConfigError, DataError
from dalle_jax.token_layout import PaddedIds


@pytest.fixture(scope="module")
def model():
    return TextModel.train([*CAPTIONS, "again"], vocab_size=200)


@pytest.fixture(scope="module")
def layout(model):
    return PaddedIds(model.vocab_size, 24)


@pytest.fixture
def make(model, layout):
    """Creates a pipeline over a memory source, with all randomness switched on."""

    def build(*, source=None, train=True, batch_size=8, seed=3, rows=None, **options):
        settings = {"augment": "dvae", "bpe_dropout": 0.2, "image_size": SIZE, **options}
        return Pipeline(
            DataOptions(**settings),
            model,
            layout,
            split="train",
            train=train,
            batch_size=batch_size,
            seed=seed,
            rows=rows,
            source=MemorySource(side=12) if source is None else source,
        )

    return build


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches])


def test_shapes_and_dtypes_of_a_batch(make, layout):
    with iter(make()) as iterator:
        batch = next(iterator)
    assert set(batch) == {"image", "text", "index"}
    assert batch["image"].shape == (8, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
    assert batch["text"].shape == (8, 24) and batch["text"].dtype == np.int32
    assert batch["index"].shape == (8,) and batch["index"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    assert (batch["text"] < layout.ids).all()
    np.testing.assert_array_equal(batch["text"][:, -1], layout.empty()[-1])


def test_text_belongs_to_the_image(make, model, layout):
    with iter(make(bpe_dropout=0.0)) as iterator:
        for batch in take(iterator, 10):
            for index, text in zip(batch["index"], batch["text"], strict=True):
                caption = model.decode(text[text < layout.vocab])
                assert caption.removesuffix(" again") == CAPTIONS[index]


def test_every_example_once_per_epoch_and_epochs_differ(make):
    with iter(make()) as iterator:
        order = indices(take(iterator, 14))  # 112 places: three epochs of 37, and one more place
    epochs = order[:111].reshape(3, 37)
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()
    assert not (epochs[0] == np.arange(37)).all()


def test_seeds_differ_also_by_an_epoch(make):
    """The first epoch of seed 4 must not equal the second epoch of seed 3."""
    with iter(make(seed=3)) as a, iter(make(seed=4)) as b:
        first, second = indices(take(a, 10)), indices(take(b, 10))
    assert not (first[:37] == second[:37]).all() and not (first[37:74] == second[:37]).all()


def test_randomness_changes_with_the_epoch(make):
    """In each epoch the same example has another crop and another text."""
    with iter(make(source=MemorySource(count=1, side=40), batch_size=40)) as iterator:
        batch = next(iterator)
    assert len({image.tobytes() for image in batch["image"]}) > 20
    assert len({text.tobytes() for text in batch["text"]}) > 5


def test_training_draws_a_caption_and_evaluation_uses_the_first(make, model, layout):
    def again(pipeline, count):
        with iter(pipeline) as iterator:
            texts = np.concatenate([batch["text"] for batch in take(iterator, count)])
        return [model.decode(text[text < layout.vocab]).endswith("again") for text in texts]

    assert 0.35 < np.mean(again(make(), 37)) < 0.65
    assert not any(again(make(train=False), 4))


def test_evaluation_is_plain_and_repeatable(make):
    """Without shuffle, augmentation and dropout two passes are equal, and each row is the example of its place."""
    pipeline = make(train=False, source=MemorySource())
    with iter(pipeline) as iterator:
        once = list(iterator)
    with iter(pipeline) as iterator:
        assert_same(once, list(iterator))
    assert len(once) == len(pipeline) == 5
    valid = np.concatenate([batch["valid"] for batch in once])
    assert valid.dtype == np.bool_ and valid.tolist() == [True] * 37 + [False] * 3
    assert indices(once)[valid].tolist() == list(range(37))
    images = np.concatenate([batch["image"] for batch in once])[valid]
    for index in range(37):
        np.testing.assert_array_equal(images[index], pipeline.source[index]["image"])


@pytest.mark.parametrize("train", [True, False])
def test_hosts_together_give_the_global_batch(make, train):
    def source():
        return MemorySource(side=12, broken=range(5, 16))

    with iter(make(train=train, source=source())) as whole:
        expected = take(whole, 5)
    for hosts in (2, 4):
        parts = []
        for host in range(hosts):
            rows = range(host * 8 // hosts, (host + 1) * 8 // hosts)
            with iter(make(train=train, source=source(), rows=rows)) as iterator:
                parts.append(take(iterator, 5))
        joined = [
            {key: np.concatenate([part[key] for part in group]) for key in group[0]}
            for group in zip(*parts, strict=True)
        ]
        assert_same(joined, expected)
    with iter(make(train=train, source=source(), rows=(1, 2, 6))) as iterator:  # a mesh may assign any rows to a host
        assert_same(take(iterator, 5), [{key: value[[1, 2, 6]] for key, value in batch.items()} for batch in expected])


@pytest.mark.parametrize("cache", [False, True])
def test_resumed_equals_uninterrupted(make, cache):
    pipeline = make(cache=cache)
    with iter(pipeline) as iterator:
        expected = take(iterator, 12)
    with iter(pipeline) as iterator:
        take(iterator, 7)  # in the middle of the second epoch
        state = iterator.get_state()
    with iter(make(cache=cache)) as fresh:
        fresh.set_state(state)
        assert fresh.get_state() == state
        assert_same(take(fresh, 5), expected[7:])
        fresh.set_state(state)  # going back works in a used iterator too
        assert_same(take(fresh, 5), expected[7:])


def test_batches_at_the_beginning_are_left_out(make):
    pipeline = make()
    with iter(pipeline) as iterator:
        expected, state = take(iterator, 6), iterator.get_state()
    with pipeline.batches(4) as later:
        assert_same(take(later, 2), expected[4:])
        assert later.get_state() == state


def test_workers_change_nothing_and_resume(make):
    """Batches and counts do not depend on the number of workers, and a run resumes with any number."""

    def pipeline(workers):
        return make(workers=workers, source=MemorySource(side=12, broken=[4, 9]))

    alone = pipeline(0)
    with iter(alone) as iterator:
        expected = take(iterator, 9)
    two = pipeline(2)
    with iter(two) as iterator:
        assert_same(take(iterator, 5), expected[:5])
        state = iterator.get_state()
    assert two.skipped() == alone.skipped() == {"missing file": 2}
    with iter(pipeline(1)) as iterator:
        iterator.set_state(state)
        assert_same(take(iterator, 4), expected[5:])


def test_an_error_in_a_worker_is_the_same_error(make):
    pipeline = make(workers=1)
    pipeline._make._source.broken = set(range(37))  # past the check at the start
    with iter(pipeline) as iterator, pytest.raises(DataError, match="missing file"):
        next(iterator)


def test_grain_checkpoint_handler_accepts_the_iterator(make, tmp_path):
    handler = ocp.CheckpointManager(tmp_path / "run")
    with iter(make()) as iterator:
        take(iterator, 3)
        handler.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        handler.wait_until_finished()
        expected = take(iterator, 2)
    with iter(make()) as fresh:
        handler.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
        assert_same(take(fresh, 2), expected)
    handler.close()


def test_a_state_of_another_run_is_rejected(make):
    state = iter(make()).get_state()
    with pytest.raises(CheckpointError, match="batch_size"):
        iter(make(batch_size=4)).set_state(state)
    with pytest.raises(CheckpointError, match="seed"):
        iter(make(seed=5)).set_state(state)
    with pytest.raises(CheckpointError, match=r"\[\]"):
        iter(make()).set_state(b"[]")


def test_prefetch_state_follows_the_batches_handed_out(make):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with iter(make()) as iterator:
        expected = take(iterator, 7)
    ahead = prefetch_to_mesh(iter(make()), sharding, size=2)
    start = ahead.get_state()
    first = take(ahead, 4)
    assert_same(first, expected[:4])
    assert all(len(array.sharding.device_set) == 8 for array in first[0].values())
    state = ahead.get_state()
    assert json.loads(state)["batches"] == 4  # although six or more were read
    assert_same(take(ahead, 1), expected[4:5])
    ahead.set_state(state)
    assert_same(take(ahead, 3), expected[4:])
    ahead.set_state(start)
    assert_same(take(ahead, 1), expected[:1])
    ahead.close()


def test_prefetch_ends_with_the_evaluation(make):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for size in (0, 2, 10):
        ahead = prefetch_to_mesh(iter(make(train=False)), device, size=size)
        assert len(list(ahead)) == 5
        ahead.close()


def test_cache_reads_once_and_changes_nothing(make):
    source = MemorySource(side=12, broken=[3])
    pipeline = make(source=source, cache=True)
    with iter(pipeline) as iterator:
        cached = take(iterator, 20)  # more than four epochs
    assert source.reads <= 37 + 2 + 16  # the checks at the start read too, and two threads may meet
    with iter(make(source=MemorySource(side=12, broken=[3]))) as iterator:
        assert_same(cached, take(iterator, 20))
    assert pipeline.skipped() == {"missing file": 1}


@pytest.mark.parametrize(("augment", "side", "needed"), [("none", 12, 37 * SIZE**2 * 3), ("dvae", 12, 37 * 12**2 * 3)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_split_that_does_not_fit_into_memory_is_not_kept(make, augment, side, needed, workers):
    """Each worker process would keep a copy. Batches do not depend on it."""
    drawn = []
    for spare in (0, -1):
        how = dict(augment=augment, cache=True, workers=workers, cache_bytes=needed * max(workers, 1) + spare)
        pipeline = make(source=MemorySource(side=side), **how)
        assert (pipeline._make._cache is not None) == (spare == 0)
        if not workers:
            before = pipeline.source.reads
            with iter(pipeline) as iterator:
                drawn.append(take(iterator, 14))
            assert (pipeline.source.reads - before <= 39) == (spare == 0)
    if drawn:
        assert_same(*drawn)


def test_a_cache_that_is_too_small_is_reported(make, monkeypatch):
    said = []
    monkeypatch.setattr(examples.logging, "log_first_n", lambda _, text, n, *values: said.append(text % values))
    make(augment="none", cache=True, cache_bytes=7_000)
    assert len(said) == 1 and "cache_bytes=7104" in said[0]
    make(augment="none", cache=True, train=False, cache_bytes=7_000)
    make(augment="none", cache=True)
    assert len(said) == 1


def test_trainings_of_one_process_share_decoded_examples(make, model):
    """The cache is shared by source and image size. A source that may change has no identity and shares nothing."""
    sources = [MemorySource(side=12) for _ in range(4)]
    for source, identity in zip(sources, ("one", "one", "another", "one")):
        source.identity = identity
    drawn = []
    for source, size in zip(sources, (SIZE, SIZE, SIZE, SIZE // 2)):
        with iter(make(source=source, cache=True, image_size=size, augment="none")) as iterator:
            drawn.append(take(iterator, 10))
    assert_same(drawn[0], drawn[1])
    assert sources[0].reads >= 37 and sources[1].reads <= 2  # the check at the start reads too
    assert sources[2].reads >= 37 and sources[3].reads >= 37
    bare = MemorySource(side=12)
    with iter(make(source=bare, cache=True)) as iterator:
        take(iterator, 10)
    assert bare.reads >= 37


def test_unreadable_examples_are_replaced_in_training_and_marked_in_evaluation(make):
    broken = [0, 3, 8, 11]
    pipeline = make(source=MemorySource(side=12, broken=broken))
    with iter(pipeline) as iterator:
        order = indices(take(iterator, 37))  # eight epochs
    counts = np.bincount(order, minlength=37)
    assert (counts[broken] == 0).all()
    assert (np.delete(counts, broken) >= 8).all()  # every readable example still occurs once per epoch
    assert pipeline.skipped() == {"missing file": 4}
    assert pipeline.counts() == {"left_out/missing file": 4, "captions_truncated": 0}
    with iter(make(train=False, source=MemorySource(broken=broken))) as iterator:
        valid = np.concatenate([batch["valid"] for batch in iterator])
    assert np.flatnonzero(~valid).tolist() == [*broken, 37, 38, 39]


def test_one_readable_example_is_enough(make):
    with iter(make(source=MemorySource(side=12, broken=[i for i in range(37) if i != 20]))) as iterator:
        assert set(indices(take(iterator, 3))) == {20}


def truncating(model, *, count=10, length=3, train=True):
    """A pipeline whose captions are longer than the layout's text."""
    short = PaddedIds(model.vocab_size, length)
    options, source = DataOptions(image_size=SIZE), MemorySource(count=count)
    return Pipeline(options, model, short, split="train", train=train, batch_size=8, seed=0, source=source)


def test_truncated_captions_are_counted(model):
    pipeline = truncating(model)
    with iter(pipeline) as iterator:
        batch = take(iterator, 5)[0]
    assert (batch["text"] < model.vocab_size).all()
    assert pipeline.counts() == {"captions_truncated": 10}
    assert pipeline.skipped() == {}


def summaries(caplog):
    return [record.getMessage() for record in caplog.records if "captions (" in record.getMessage()]


@pytest.mark.parametrize("train, read", [(True, 16), (False, 10)])
def test_the_share_of_truncated_captions_is_logged_once(model, caplog, train, read):
    """After the first pass over a small source; rows of padding are not captions."""
    pipeline = truncating(model, train=train)
    with caplog.at_level("WARNING"):
        with iter(pipeline) as iterator:
            take(iterator, 1)
            assert not summaries(caplog)
            take(iterator, 1)
            assert len(summaries(caplog)) == 1
        with iter(pipeline) as iterator:
            take(iterator, 2)
    (line,) = summaries(caplog)
    assert f"{read} of the first {read} captions (100%)" in line and "text.length=3" in line
    named = [record for record in caplog.records if "truncated caption" in record.getMessage()]
    assert len(named) == 5 and "text.length" in named[0].getMessage()


def test_a_truncated_caption_after_the_first_thousand_is_reported(caplog):
    tally = Tally("source", (), text_length=7, epoch=10**9)
    with caplog.at_level("WARNING"):
        for _ in range(3):
            tally.add((), rows=500)
        tally.add((Note(TRUNCATED, 3, "#3", ""),), rows=300)
        assert not summaries(caplog)
        tally.add((), rows=700)
        tally.add((Note(TRUNCATED, 4, "#4", ""),), rows=5000)
    (line,) = summaries(caplog)
    assert "1 of the first 2500 captions (0.04%)" in line


def test_an_unreadable_source_is_not_blamed_on_truncated_captions(model, monkeypatch):
    pipeline = truncating(model)
    monkeypatch.setattr(examples, "_MAX_SUBSTITUTES", 0)
    pipeline.source.broken = set(range(10)) - {int(pipeline._make._order[0])}
    with pytest.raises(DataError, match="missing file") as caught:
        pipeline._make(0)
    assert "truncated" not in str(caught.value)


def test_no_share_is_logged_without_truncated_captions(make, caplog):
    with caplog.at_level("WARNING"), iter(make()) as iterator:
        take(iterator, 20)
    assert not caplog.records


def write_folder(path, broken):
    """Writes four images with captions; if `broken`, three of them have a fault each."""
    for name in "abcd":
        noise = np.random.default_rng(ord(name)).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        PIL.Image.fromarray(noise).save(path / f"{name}.png")
        (path / f"{name}.txt").write_text(f"image {name}")
    if broken:
        whole = (path / "a.png").read_bytes()
        (path / "a.png").write_bytes(whole[: len(whole) // 2])
        (path / "b.txt").write_bytes(b"na\xefve")
        (path / "c.txt").write_text("  \n")
    return DataOptions(source="folder", path=str(path), image_size=SIZE)


def test_a_folder_with_faults_is_counted_and_named(tmp_path, model, layout, caplog):
    options = write_folder(tmp_path, broken=True)
    with caplog.at_level("WARNING"):
        pipeline = Pipeline(options, model, layout, split="all", train=True, batch_size=4)
        with iter(pipeline) as iterator:
            assert set(indices(take(iterator, 4))) == {3}
    assert pipeline.skipped() == {"empty caption": 1, "undecodable text": 1, "unreadable image": 1}
    for fault in ("unreadable image: a.png", "undecodable text: b.png", "empty caption: c.png"):
        assert caplog.text.count(fault) == 1


def test_captions_do_not_matter_without_a_text_model(tmp_path):
    pipeline = Pipeline(
        write_folder(tmp_path, broken=True),
        split="all",
        train=True,
        batch_size=4,
    )
    with iter(pipeline) as iterator:
        batches = take(iterator, 4)
    assert set(batches[0]) == {"image", "index"}
    assert set(indices(batches)) == {1, 2, 3}
    assert pipeline.counts() == {"left_out/unreadable image": 1}


def test_nothing_readable_is_an_error_at_once(tmp_path, model, layout):
    options = write_folder(tmp_path, broken=True)
    (tmp_path / "d.png").write_bytes(b"not an image")
    for train in (True, False):
        with pytest.raises(DataError, match="unreadable image: 2"):
            Pipeline(
                options,
                model,
                layout,
                split="all",
                train=train,
                batch_size=4,
            )


def test_a_long_unreadable_stretch_ends_the_run(make):
    """After the check at the start, training must not search forever."""
    pipeline = make()
    pipeline._make._source.broken = set(range(37))
    with iter(pipeline) as iterator, pytest.raises(DataError, match="37"):
        next(iterator)


def test_arguments_that_do_not_fit_are_errors(make, model):
    with pytest.raises(ConfigError, match="batch_size"):
        make(batch_size=0)
    with pytest.raises(ConfigError, match="seed"):
        make(seed=-1)
    with pytest.raises(DataError, match="memory"):
        make(source=MemorySource(count=0))
    with pytest.raises(ConfigError, match=f"{model.vocab_size}"):
        Pipeline(
            DataOptions(),
            model,
            PaddedIds(5, 24),
            split="train",
            train=True,
            batch_size=8,
            source=MemorySource(),
        )


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_wide_images_are_padded_on_request(tmp_path, train, cache):
    pixels = np.zeros((8, 32, 3), np.uint8)
    pixels[:, :4] = 200, 0, 0  # lost to the centre square
    for name in "abc":
        PIL.Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    read = {}
    for fit in ("crop", "pad"):
        options = DataOptions(source="folder", path=str(tmp_path), image_size=16, fit=fit, cache=cache)
        with iter(Pipeline(options, split="train", train=train, batch_size=1)) as batches:
            read[fit] = next(batches)["image"][0]
    assert not read["crop"].any()
    np.testing.assert_array_equal(read["pad"][[0, -1]], 255)
    np.testing.assert_array_equal(read["pad"][8, [0, 1, 2, 15]], [[200, 0, 0]] * 2 + [[0, 0, 0]] * 2)


def test_captions_with_unknown_letters_are_counted(caplog):
    """They are used, counted, and the first ones are named with their letters."""
    foreign = TextModel.train(["a red circle"] * 3, vocab_size=40)
    layout = PaddedIds(foreign.vocab_size, 24)
    source = MemorySource(count=10)
    pipeline = Pipeline(
        DataOptions(image_size=SIZE), foreign, layout, split="train", train=True, batch_size=5, source=source
    )
    missing = set().union(*(foreign.unknown_letters(caption) for caption in source.captions()))
    assert missing
    with caplog.at_level("WARNING"), iter(pipeline) as iterator:
        take(iterator, 4)
    assert pipeline.counts()["captions_with_unknown_letters"] == 10 and pipeline.skipped() == {}
    named = [line for line in caplog.messages if "unknown letters" in line]
    assert len(named) == 5 and any(letter in named[0] for letter in missing)
