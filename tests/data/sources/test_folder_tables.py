"""Captions tables: a fault costs one row, and is counted and named."""

import os

import pytest
from image_folder import captions, fill, labels, left_out, names, opened

from dalle_jax.data.sources.source import decode_captions
from dalle_jax.errors import DataError


def table(tmp_path, content, images="a.png b.png c.png", name="captions.csv", **options):
    return opened(fill(tmp_path, images, {name: content}), **options)


@pytest.mark.parametrize("key", ["file", "file_name", "filename", "image", "path", "File_Name", " file "])
@pytest.mark.parametrize("caption", ["caption", "text", "title", "description", "Text"])
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv", "Captions.CSV"])
def test_names_of_tables_and_columns(tmp_path, key, caption, name):
    content = [{key: "b.png", caption: "a cat"}, {key: "a.png", caption: "a dog"}]
    if name.lower().endswith("csv"):
        content = f"{key},{caption}\nb.png,a cat\na.png,a dog\n"
    source = table(tmp_path, content, "a.png b.png", name)
    assert names(source) == ["b.png", "a.png"], "the order of the rows"
    assert captions(source) == {"b.png": ["a cat"], "a.png": ["a dog"]} and not source.left_out


def test_several_captions(tmp_path):
    rows = [{"file": "a.png", "captions": ["one", "two"]}, {"file": "b.png", "caption": ["three", "four"]}]
    assert captions(table(tmp_path, rows, "a.png b.png", "captions.jsonl")) == {
        "a.png": ["one", "two"], "b.png": ["three", "four"]
    }  # fmt: skip
    (tmp_path / "captions.jsonl").unlink()
    assert captions(table(tmp_path, 'file,captions\na.png,"one, a comma|two"\n', "a.png")) == {
        "a.png": ["one, a comma", "two"]
    }


@pytest.mark.parametrize(
    "content",
    [
        "file,caption\na.png,one\nb.png,two\n",
        "\ufefffile,caption\r\na.png,one\r\nb.png,two",
        "file, caption\na.png, one\nb.png,  two  \n",
        "file;caption\na.png;one\nb.png;two\n",
        "file\tcaption\na.png\tone\nb.png\ttwo\n",
        'file;caption;size, in pixels\na.png;"one"\n\nb.png;two;;;\n',
        '"file","caption"\r"a.png","one"\r"b.png","two"\r',
        'id,"file" , "caption"\n1,a.png,one\n,,\n2, "b.png" ,"two"\n',
        "caption,file\none,./a.png\ntwo,.//b.png\n",
    ],
)
def test_kinds_of_csv(tmp_path, content):
    source = table(tmp_path, content, "a.png b.png")
    assert captions(source) == {"a.png": ["one"], "b.png": ["two"]} and not source.left_out


def test_commas_quotes_and_lines_inside_quotes(tmp_path):
    content = 'file,caption\na.png,"a ""big"", wet\ncat\n\non a mat"\nb.png,a 12" pizza\nc.png,""\n'
    assert captions(table(tmp_path, content)) == {
        "a.png": ['a "big", wet\ncat\n\non a mat'], "b.png": ['a 12" pizza'], "c.png": []
    }  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        'a.png,"a cat',  # an unclosed quote up to the end, or to the next quote
        'a.png,"a cat"s',
        'a.png,"a "big" cat"',
        "a.png,a cat, asleep",
        'a.png,"a cat", asleep',
    ],
)
@pytest.mark.parametrize(
    "rest", ["b.png,two\nc.png,three\n", 'b.png,"two"\nc.png,"three"\n', 'b.png,two\nc.png,three"\n']
)
def test_a_damaged_row_costs_one_image(tmp_path, row, rest):
    source = table(tmp_path, f"file,caption\n{row}\n{rest}")
    assert names(source) == ["b.png", "c.png"] and left_out(source) == {"damaged row": 1}
    assert "captions.csv line 2" in labels(source)
    assert captions(source)["b.png"] == ["two"]


def test_an_unclosed_quote_hides_no_row_with_a_missing_image(tmp_path):
    source = table(tmp_path, 'file,caption\na.png,"a cat\ngone.jpg,two"\nb.png,three\n', "a.png b.png")
    assert captions(source) == {"b.png": ["three"]} and left_out(source) == {"damaged row": 1, "missing file": 1}


def test_an_unclosed_quote_in_the_header_is_an_error(tmp_path):
    with pytest.raises(DataError, match="captions.csv"):
        table(tmp_path, 'file,"caption\na.png,one\n')


def test_long_cells(tmp_path):
    """The csv module of Python stops at 131,072 characters."""
    long = "word " * 60_000
    assert captions(table(tmp_path, f'file,caption\na.png,"{long}"\nb.png,{long}\n', "a.png b.png")) == {
        "a.png": [long], "b.png": [long.strip()]
    }  # fmt: skip


def test_many_quotes_are_read_in_linear_time(tmp_path):
    rows = "".join(f'{n}.png,"a ""\n' for n in range(3000)) + 'a.png,"ok"\n'
    source = table(tmp_path, f"file,caption\n{rows}", "a.png")
    assert captions(source) == {"a.png": ["ok"]} and left_out(source) == {"damaged row": 3000}


def test_line_ends_of_unicode_stay_in_a_text(tmp_path):
    text = "one\u2028two\u0085three\x0bfour\x1cfive"
    assert captions(table(tmp_path, f'file,caption\na.png,"{text}"\n', "a.png")) == {"a.png": [text]}
    row = f'{{"file": "a.png", "caption": "{text.replace(chr(11), "").replace(chr(28), "")}"}}\r\n'
    for first in (row, "\n" + row):
        assert captions(table(tmp_path, first, "a.png", "captions.jsonl")) == {
            "a.png": ["one\u2028two\u0085threefourfive"]
        }


@pytest.mark.parametrize(
    "row",
    ["7", "null", "NaN", '"a.png"', '["a.png", "x"]', "nonsense", '{"file": "a.png"', "[" * 100_000, "9" * 5000, "\0"],
)
def test_a_line_of_jsonl_that_is_no_object_costs_one_row(tmp_path, row):
    source = table(tmp_path, f'{row}\n{{"file": "b.png", "caption": "two"}}\n', "b.png", "captions.jsonl")
    assert captions(source) == {"b.png": ["two"]} and left_out(source) == {"damaged row": 1}
    assert "captions.jsonl line 1" in labels(source)


def test_a_caption_that_is_no_text_is_left_out(tmp_path):
    rows = [
        {"file": "a.png", "captions": ["one", None, 3, float("nan"), "two"]},
        {"file": "b.png", "caption": {"en": "x"}},
        {"file": "c.png", "caption": "three"},
    ]
    source = table(tmp_path, rows, name="captions.jsonl")
    assert captions(source) == {"a.png": ["one", "two"], "c.png": ["three"]}
    assert left_out(source) == {"caption that is no text": 4}
    assert "captions.jsonl line 1: None" in labels(source) and "line 2" in labels(source)


@pytest.mark.parametrize("empty", [None, float("nan"), "", "  ", []])
def test_a_row_without_a_caption_is_an_image_without_a_caption(tmp_path, empty):
    """A tokenizer can train on it. The next usual key counts if the first one is empty."""
    rows = [{"file": "a.png", "caption": empty}, {"file": "b.png", "caption": empty, "text": "two"}]
    assert captions(table(tmp_path, rows, "a.png b.png", "captions.jsonl")) == {"a.png": [], "b.png": ["two"]}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("gone.png", "missing file"),
        ("nul\0.png", "missing file"),
        ("\ud800.png", "missing file"),
        ("A.PNG", "missing file"),
        ("x" * 5000, "missing file"),
        ("", "row without a file name"),
        (None, "row without a file name"),
        (7, "row without a file name"),
        ("folder", "row with a file that is no image"),
        ("folder/note.md", "row with a file that is no image"),
        ("captions.jsonl", "row with a file that is no image"),
        ("../secret.png", "row with a name outside the folder"),
        ("folder/../../secret.png", "row with a name outside the folder"),
        ("folder/../a.png", "row with a name outside the folder"),
        ("..\\secret.png", "row with a name outside the folder"),
        ("/dev/zero", "row with a name outside the folder"),
        ("\\\\server\\a.png", "row with a name outside the folder"),
        ("C:\\a.png", "row with a name outside the folder"),
        ("https://example.org/a.png", "row with a name outside the folder"),
        ("pipe.png", "missing file"),
    ],
)
def test_a_row_that_names_no_image_of_the_folder(tmp_path, name, reason):
    fill(tmp_path, "secret.png root/folder/b.png", {"root/folder/note.md": "x"})
    os.mkfifo(tmp_path / "root" / "pipe.png")
    rows = [{"file": name, "caption": "one"}, {"file": "a.png", "caption": "two"}]
    source = table(tmp_path / "root", rows, "a.png folder/b.png", "captions.jsonl")
    expected = {reason: 1, "not in captions.jsonl": 1, "not a regular file": 1}
    assert captions(source) == {"a.png": ["two"]} and left_out(source) == expected
    assert "captions.jsonl line 1" in labels(source)


def test_an_absolute_name_inside_the_folder_is_left_out_too(tmp_path):
    source = table(tmp_path, f"file,caption\n{tmp_path}/a.png,one\nb.png,two\n", "a.png b.png")
    assert captions(source) == {"b.png": ["two"]}
    assert left_out(source) == {"not in captions.csv": 1, "row with a name outside the folder": 1}


def test_an_empty_cell_for_the_file(tmp_path):
    source = table(tmp_path, "file,caption\n,one\na.png,two\n", "a.png")
    assert captions(source) == {"a.png": ["two"]} and left_out(source) == {"row without a file name": 1}


def test_names_with_backslashes_and_without_an_ending(tmp_path):
    source = table(tmp_path, "file,caption\nx\\a.png,one\n0001,two\n", "x/a.png 0001")
    assert captions(source) == {"x/a.png": ["one"], "0001": ["two"]} and not source.other_files


def test_images_that_the_table_does_not_list_are_counted(tmp_path):
    source = table(tmp_path, "file,caption\na.png,one\n", "a.png b.png x/c.png")
    assert names(source) == ["a.png"] and left_out(source) == {"not in captions.csv": 2}
    assert "b.png" in labels(source) and "x/c.png" in labels(source)


def test_one_table_is_read_and_the_others_are_counted(tmp_path):
    """captions before metadata, JSONL before CSV, and the one nearest to the top."""
    csv = lambda text: f"file,caption\na.png,{text}\n"
    tables = {"captions.csv": csv("csv"), "metadata.csv": csv("m"), "x/captions.csv": csv("x")}
    source = opened(fill(tmp_path, "a.png", {**tables, "captions.jsonl": [{"file": "a.png", "caption": "jsonl"}]}))
    assert captions(source) == {"a.png": ["jsonl"]} and left_out(source) == {"second captions table": 3}
    assert "x/captions.csv" in labels(source) and not source.other_files
    (tmp_path / "captions.jsonl").unlink()
    assert captions(opened(tmp_path)) == {"a.png": ["csv"]}


def test_the_keys_that_hold_file_and_caption_can_be_chosen(tmp_path):
    rows = [{"file": "a.png", "photo": "b.png", "caption": "no", "Alt": "yes"}]
    fill(tmp_path, "a.png b.png", {"captions.jsonl": rows})
    assert captions(opened(tmp_path, caption_key="alt")) == {"a.png": ["yes"]}
    assert captions(opened(tmp_path, caption_key="Alt", image_key="photo")) == {"b.png": ["yes"]}
    for wrong in ({"caption_key": "txt"}, {"image_key": "img"}):
        with pytest.raises(DataError, match="'alt'") as caught:
            opened(tmp_path, **wrong)
        assert f"data.{next(iter(wrong))}" in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "content, found",
    [
        ("name,label\na.png,one\n", "'name', 'label'"),
        ("file,label\na.png,one\n", "'file', 'label'"),
        ("a.png,one\nb.png,two\n", "'a.png', 'one'"),
        ("file,caption\ngone.png,one\n", "missing file: 1"),
        ("file,caption\n,\n", "captions.csv"),
        ("file,caption\n", "captions.csv"),
        ("", "captions.csv"),
        ('file,caption\na.png,"one\n', "damaged row: 1"),
    ],
)
def test_a_table_without_a_usable_row_is_an_error(tmp_path, content, found):
    with pytest.raises(DataError) as caught:
        table(tmp_path, content)
    assert found in str(caught.value) and str(tmp_path) in str(caught.value)


def test_one_undecodable_row_costs_one_example(tmp_path):
    values = (b"caf\xe9", b"tea", b"\\ud800")
    content = b"".join(b'{"file": "%d.png", "caption": "%s"}\n' % row for row in enumerate(values))
    source = table(tmp_path, content, "0.png 1.png 2.png", "captions.jsonl")
    for index in (0, 2):
        with pytest.raises(Exception, match="undecodable"):
            decode_captions(source.record(index))
    assert source[1]["captions"] == ["tea"]


def test_rows_with_the_same_image_are_examples_each(tmp_path):
    source = table(tmp_path, "file,caption\na.png,one\nb.png,two\na.png,three\n", "a.png b.png")
    assert [source[index]["captions"] for index in range(3)] == [["one"], ["two"], ["three"]]
