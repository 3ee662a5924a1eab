"""Random folders and tables, compared with slow and plain readers that are written here."""

import collections
import csv
import io
import json
import os
import pathlib
import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st
from image_folder import captions, left_out, names, opened, png

from dalle_jax.data.sources.folder.tables import read_table
from dalle_jax.errors import DataError

IMAGES = (".png", ".JPG", ".webp")
FOLDERS = st.sampled_from(("train", "val", "test", "Validation", "a", "b c", ".hidden", "@eaDir"))
FILES = st.builds(
    str.__add__,
    st.sampled_from(("a", "A", "b", "cat_01", ".x")),
    st.sampled_from((*IMAGES, ".png", ".txt", ".TXT", ".png.txt", ".caption", ".svg", "")),
)
PATHS = st.builds(lambda folders, file: "/".join([*folders, file]), st.lists(FOLDERS, max_size=2), FILES)


def plain_reader(root):
    """Returns captions by image, the counts of other files, and the number of hidden files."""
    visible, hidden = [], 0
    for folder, _, files in os.walk(root):
        for file in files:
            name = os.path.relpath(os.path.join(folder, file), root)
            if any(part.startswith(".") or part == "@eaDir" for part in name.split("/")):
                hidden += 1
            else:
                visible.append(name)
    images = [name for name in visible if name.lower().endswith((".png", ".jpg", ".webp"))]
    found, used = {}, set(images)
    for image in images:
        stem = os.path.splitext(image)[0]
        found[image] = None
        for wanted in (f"{stem}.txt", f"{image}.txt", f"{stem}.caption", f"{image}.caption"):
            same = [name for name in visible if name.lower() == wanted.lower()]
            if same:
                first = [n for n in same if n.startswith(os.path.splitext(wanted)[0])] or same
                found[image] = sorted(first)[0]
                used.add(found[image])
                break
    others = collections.Counter(os.path.splitext(n)[1].lower() or "no ending" for n in visible if n not in used)
    return found, others, hidden


def plain_splits(images):
    """Returns (train, validation) if sub-folders are the splits, else None."""
    top = lambda name: name.split("/")[0] if "/" in name else ""
    while len(tops := {top(name) for name in images}) == 1 and "" not in tops:
        (folder,) = tops
        images = [name[len(folder) + 1 :] for name in images]
    lower = {folder.lower() for folder in tops}
    held_out = [name for name in ("validation", "val", "test") if name in lower]
    if "train" not in lower and "" not in lower:
        held_out = [name for name in held_out if name != "test"]
    rest = lower - set(held_out)
    if not held_out or not rest:
        return None
    is_train = lambda name: top(name).lower() == "train" if "train" in lower else top(name).lower() in rest
    return [n for n in images if is_train(n)], [n for n in images if top(n).lower() == held_out[0]]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(PATHS, st.text("xy \n", max_size=5), min_size=1, max_size=12))
def test_a_random_folder(files):
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, content in files.items():
            path = root / name
            if path.is_dir() or any(parent.is_file() for parent in path.parents):
                continue  # "a" is a folder and a file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png() if name.endswith(IMAGES) else content.encode())
        expected, others, hidden = plain_reader(root)
        try:
            source = opened(root)
        except DataError:
            assert not expected
            return
        assert captions(source) == {
            image: (root / text).read_text().splitlines() if text else [] for image, text in expected.items()
        }
        assert dict(source.other_files) == dict(others)
        assert names(source) == sorted(expected)
        texts = {text for text in expected.values() if text}
        everything = sum(len(found) for _, _, found in os.walk(root))
        assert everything == len(source) + len(texts) + sum(others.values()) + hidden
        _check_splits(root, source)


def _check_splits(root, source):
    everything, parts, missing = set(names(source)), {}, {}
    for split in ("train", "validation"):
        try:
            part = opened(root, split)
        except DataError as error:  # a single image
            assert len(everything) == 1 and "validation" in str(error)
            return
        parts[split], missing[split] = set(names(part)), left_out(part)
    train, validation = parts.values()
    assert train and validation and not train & validation
    outside = "outside of the splits' folders"
    if (found := plain_splits(sorted(everything))) is None:
        assert train | validation == everything
    else:
        assert [len(part) for part in (train, validation)] == [len(part) for part in found]
        for part, plain in zip((train, validation), found):
            assert all(name.endswith(each) for name, each in zip(sorted(part), plain))
        assert missing["train"].get(outside, 0) + len(train) + len(validation) <= len(everything)
    sums = collections.Counter(missing["train"]) + collections.Counter(missing["validation"])
    del sums[outside]
    assert set(sums) <= set(left_out(source)) and all(sums[key] <= left_out(source)[key] for key in sums)


CELLS = st.text(st.sampled_from("ab ,;\t\"'|\n\r\u2028ü"), max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(CELLS, min_size=1, max_size=8),
    st.sampled_from(",;\t"),
    st.sampled_from((csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC)),
    st.sampled_from(("\n", "\r\n")),
)
def test_a_random_csv_table_is_read_as_python_reads_it(cells, delimiter, quoting, end):
    images = [f"{number}.png" for number in range(len(cells))]
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerows([("file", "text"), *zip(images, cells)])
    table = read_table("captions.csv", written.getvalue().encode(), images, images)
    expected = list(csv.reader(io.StringIO(written.getvalue(), newline=""), delimiter=delimiter))[1:]
    assert [row.file for row in table.rows] == [file for file, _ in expected]
    assert [row.captions for row in table.rows] == [(cell,) if cell.strip() else () for _, cell in expected]
    assert not table.skipped


LINES = st.text(st.sampled_from('ab,"; .\u2028'), max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.none(), LINES), min_size=1, max_size=12))
def test_damaged_lines_hide_no_other_row(lines):
    """None stands for a sound row. Its image and caption are read, whatever stands before and after it."""
    rows = [f"{place}.png,caption {place}" if line is None else line for place, line in enumerate(lines)]
    sound = {f"{place}.png": (f"caption {place}",) for place, line in enumerate(lines) if line is None}
    content = "\n".join(["file,caption", *rows]).encode()
    try:
        table = read_table("captions.csv", content, set(sound), set(sound))
    except DataError:
        assert not sound
        return
    assert dict(table.rows) == sound
    assert len(table.rows) + len(table.skipped) <= sum(bool(row.strip()) for row in rows)
    blank = [row for row in rows if not row.replace(",", "").replace('"', "").strip()]
    assert len(table.rows) + len(table.skipped) >= len(sound) + (len(blank) < len(rows) - len(sound))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text("ab \u2028", max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=4,
)
ROWS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {}, optional={"file": st.one_of(st.sampled_from(("a.png", "../a.png", "x")), VALUES), "caption": VALUES}
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ROWS, max_size=6))
def test_a_random_jsonl_table(rows):
    rows = [{"file": "a.png", "caption": "sound"}, *rows]
    expected, skipped = [], 0
    for row in rows:
        if not isinstance(row, dict) or row.get("file") != "a.png":
            skipped += 1
            continue
        caption = row.get("caption")
        given = caption if isinstance(caption, list) else [caption]
        texts = tuple(each for each in given if isinstance(each, str))
        empty = (
            caption is None or caption == [] or caption != caption or (isinstance(caption, str) and not caption.strip())
        )
        if empty:
            expected.append(())
            continue
        skipped += len(given) - len(texts)
        if texts:
            expected.append(texts)
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    table = read_table("captions.jsonl", content, {"a.png"}, {"a.png"})
    assert [row.captions for row in table.rows] == expected
    assert len(table.skipped) == skipped


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode)), st.sampled_from(("csv", "jsonl")))
def test_any_bytes_are_a_table_or_a_data_error(content, kind):
    first = b"file,caption\n" if kind == "csv" else b'{"file": "a.png", "caption": "x"}\n'
    for table in (content, first + content):
        try:
            read_table(f"captions.{kind}", table, {"a.png"}, {"a.png"})
        except DataError as error:
            assert "captions" in str(error)
