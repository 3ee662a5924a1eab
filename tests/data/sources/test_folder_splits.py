"""Training and validation sides of a folder."""

import os
import pickle

import pytest
from image_folder import captions, fill, labels, left_out, names, opened

from dalle_jax.data.sources.folder.splits import HELD_OUT, held_out_by_hash
from dalle_jax.errors import DataError


def many(folder, count, start=0):
    return " ".join(f"{folder}{number}.png" for number in range(start, start + count))


def sides(root, **options):
    """Returns the names of both splits, which share none."""
    train, validation = names(opened(root, "train", **options)), names(opened(root, "validation", **options))
    assert not set(train) & set(validation) and train and validation
    return train, validation


@pytest.mark.parametrize("held_out", [*HELD_OUT, "Val", "TEST"])
def test_sub_folders_are_the_splits(tmp_path, held_out):
    fill(tmp_path, f"{many('train/', 6)} {many(f'{held_out}/x/', 3)}")
    train, validation = sides(tmp_path)
    assert train == many("train/", 6).split() and validation == many(f"{held_out}/x/", 3).split()
    assert names(opened(tmp_path, held_out)) == validation, "the folder's own name works, too"
    assert len(opened(tmp_path)) == 9


def test_the_first_of_several_held_out_folders_is_validation(tmp_path):
    fill(tmp_path, f"{many('train/', 2)} test/t.png val/v.png")
    assert sides(tmp_path)[1] == ["val/v.png"] and names(opened(tmp_path, "test")) == ["test/t.png"]


def test_splits_one_folder_down(tmp_path):
    """As a zip file that holds one folder is unpacked."""
    fill(tmp_path, "mine/train/a.png mine/val/b.png")
    assert sides(tmp_path) == (["mine/train/a.png"], ["mine/val/b.png"])


@pytest.mark.parametrize("held_out", ["validation", "val", "test"])
def test_images_at_the_top_and_a_folder_to_hold_out(tmp_path, held_out):
    fill(tmp_path, f"{many('', 20)} more/a.png {many(f'{held_out}/', 5)}")
    train, validation = sides(tmp_path)
    assert len(train) == 21 and validation == many(f"{held_out}/", 5).split()


def test_a_validation_folder_is_held_out_from_other_folders(tmp_path):
    fill(tmp_path, f"{many('images/', 20)} validation/a.png test/b.png")
    train, validation = sides(tmp_path)
    assert validation == ["validation/a.png"] and "test/b.png" in train


@pytest.mark.parametrize("classes", ["train car bus boat", "test car bus boat", "cat dog"])
def test_classes_that_are_called_like_a_split(tmp_path, classes):
    """Both sides must exist; else all classes are read."""
    fill(tmp_path, " ".join(many(f"{name}/", 10) for name in classes.split()))
    train, validation = sides(tmp_path)
    assert len(train) + len(validation) == 10 * len(classes.split())
    assert all(any(name.startswith(each) for name in train) for each in classes.split())


@pytest.mark.parametrize("only", ["train", "validation", "train/x"])
def test_a_folder_in_which_everything_is_has_no_splits(tmp_path, only):
    fill(tmp_path, many(f"{only}/", 30))
    assert sum(map(len, sides(tmp_path))) == 30


def test_images_outside_of_both_folders_are_counted_once(tmp_path):
    fill(tmp_path, "train/a.png val/b.png other/c.png d.png .x/a.png val/.x/a.png")
    train, validation = opened(tmp_path, "train"), opened(tmp_path, "validation")
    assert left_out(train) == {"hidden folder": 1, "outside of the splits' folders": 2}
    assert left_out(validation) == {"hidden folder": 1} and "val/.x" in labels(validation)
    assert left_out(opened(tmp_path)) == {"hidden folder": 2}


def test_a_table_at_the_top_next_to_the_splits(tmp_path):
    rows = [{"file": f"{name}.png", "caption": name} for name in ("train/a", "train/b", "val/c")]
    fill(tmp_path, "train/a.png train/b.png val/c.png val/d.png", {"captions.jsonl": rows, "train/a.txt": "not this"})
    train, validation = opened(tmp_path, "train"), opened(tmp_path, "validation")
    assert captions(train) == {"train/a.png": ["train/a"], "train/b.png": ["train/b"]} and not left_out(train)
    assert captions(validation) == {"val/c.png": ["val/c"]}
    assert left_out(validation) == {"not in captions.jsonl": 1} and "val/d.png" in labels(validation)


def test_a_table_inside_a_split(tmp_path):
    tables = {"train/captions.csv": "file,caption\na.png,one\n", "val/b.txt": "two"}
    fill(tmp_path, "train/a.png val/b.png", tables)
    assert captions(opened(tmp_path)) == {"train/a.png": ["one"], "val/b.png": ["two"]}


def test_sub_folders_by_name(tmp_path):
    fill(tmp_path, f"{many('car/', 20)} {many('bus/old/', 5)} {many('bus/', 15)}")
    assert names(opened(tmp_path, "car")) == sorted(many("car/", 20).split())
    assert len(opened(tmp_path, "bus/old")) == 5
    for unknown in ("lorry", "test", "bu", "train[:50%]"):
        with pytest.raises(DataError, match="'bus', 'car'"):
            opened(tmp_path, unknown)


def test_neither_split_reads_the_folder_of_the_other(tmp_path):
    fill(tmp_path, f"{many('car/', 20)} {many('bus/old/', 5)} {many('bus/', 15)}")

    def both(train, validation):
        options = {"train_split": train, "eval_split": validation}
        one, other = (set(names(opened(tmp_path, split, **options))) for split in (train, validation))
        assert one and other and not one & other
        return len(one), len(other)

    assert both("bus", "car") == (20, 20)
    assert both("bus", "bus/old") == (15, 5) and both("bus/old", "bus") == (5, 15)
    assert both("car", "validation")[0] == 20
    train, validation = both("train", "bus")
    assert validation == 20 and train <= 20


def test_a_link_to_a_training_image_is_not_held_out(tmp_path):
    fill(tmp_path, "train/a.png train/b.png val/c.png")
    (tmp_path / "val" / "d.png").symlink_to(tmp_path / "train" / "a.png")
    os.link(tmp_path / "train" / "b.png", tmp_path / "val" / "e.png")
    assert sides(tmp_path)[1] == ["val/c.png"]
    assert left_out(opened(tmp_path, "validation")) == {"link to a training image": 2}


def test_links_are_on_the_side_of_their_file(tmp_path):
    fill(tmp_path, many("real/", 60))
    for number in range(60):
        (tmp_path / f"{number}.png").symlink_to(tmp_path / "real" / f"{number}.png")
    train, validation = sides(tmp_path)
    assert {name.split("/")[-1] for name in train}.isdisjoint(name.split("/")[-1] for name in validation)
    assert len(train) + len(validation) == 120


def test_about_a_twentieth_is_held_out_and_stays_so():
    """From 1,000 to 1,100 images, the old ones stay on their side."""
    never = lambda name: pytest.fail("no image of a large set is read")
    before = held_out_by_hash([f"{n}.png" for n in range(1000)], never)
    after = held_out_by_hash([f"{n}.png" for n in range(1100)], never)
    assert 35 <= len(before) <= 65
    assert {name for name in after if int(name[:-4]) < 1000} == before < after


@pytest.mark.parametrize("count", [2, 3, 10, 39])
def test_small_sets_hold_out_at_least_one_and_train_on_one(count):
    for trial in range(50):
        names = [f"{trial}-{n}" for n in range(count)]
        held_out = held_out_by_hash(names, lambda name: True)
        assert 1 <= len(held_out) < count and held_out <= set(names)
        assert held_out == held_out_by_hash(names[::-1], lambda name: True)


@pytest.mark.parametrize("damage", ["image", "caption"])
def test_the_next_image_is_held_out_if_the_first_is_damaged(tmp_path, damage):
    texts = {f"{n}.txt": f"number {n}" for n in range(10)}
    fill(tmp_path, many("", 10), texts)
    (first,) = sides(tmp_path)[1]
    (tmp_path / (first if damage == "image" else first.replace(".png", ".txt"))).write_bytes(b"\xff")
    train, validation = sides(tmp_path)
    assert first in validation and len(validation) == 2 and len(train) == 8
    other = next(name for name in validation if name != first)
    assert opened(tmp_path, "validation")[validation.index(other)]["captions"] == [f"number {other[:-4]}"]


def test_a_set_without_captions_is_checked_for_images_only(tmp_path):
    fill(tmp_path, many("", 10))
    assert len(sides(tmp_path)[1]) == 1


def test_one_image_cannot_be_divided(tmp_path):
    fill(tmp_path, "a.png")
    assert names(opened(tmp_path, "train")) == names(opened(tmp_path)) == ["a.png"]
    with pytest.raises(DataError, match="data.eval_split"):
        opened(tmp_path, "validation")


def test_identity_changes_with_the_examples(tmp_path):
    fill(tmp_path, many("", 40), {"0.txt": "zero"})
    identity = lambda split="train", **options: opened(tmp_path, split, **options).identity
    first = identity()
    assert first == identity() == pickle.loads(pickle.dumps(opened(tmp_path, "train"))).identity
    seen = {first, identity("validation"), identity("all"), identity("all", caption_lines="first")}
    assert len(seen) == 4
    before = identity("all")
    for name, content in (("0.txt", b"nil"), ("1.txt", b"one"), ("2.png", b"x"), ("new.png", b"x")):
        (tmp_path / name).write_bytes(content)
        assert (now := identity("all")) not in seen | {before}
        seen.add(now)
    fill(tmp_path, "", {"captions.csv": "file,caption\n2.png,two\n"})
    table = identity("all")
    fill(tmp_path, "", {"captions.csv": "file,caption\n2.png,owt\n"})
    assert len({*seen, table, identity("all")}) == len(seen) + 2
