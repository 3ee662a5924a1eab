"""Captions, images, masks and tokens of every kind that callers give, next to what training makes of an image file."""

import io

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from dalle_jax.data.augment import augment, fit_square
from dalle_jax.data.sources.decoding import decode_image
from dalle_jax.data.sources.record import Record
from dalle_jax.errors import DataError
from dalle_jax.text_to_image import inputs

S = 8
WIDE = np.random.default_rng(0).integers(0, 256, (12, 20, 4), np.uint8)
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "HSV", "LAB", "YCbCr")
PNG_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")


def pil(mode):
    """An image of a mode, wider than high."""
    if mode in ("I;16", "I", "F"):
        values = WIDE[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        return PIL.Image.fromarray(values * 257 if mode == "I;16" else values)
    image = PIL.Image.fromarray(WIDE)
    return image if mode == "RGBA" else image.convert("LA" if mode == "LA" else "RGB").convert(mode)


def as_in_training(image, fit="crop"):
    """Returns uint8 [S, S, 3] as training and evaluation read the PNG of an image."""
    file = io.BytesIO()
    image.save(file, "PNG")
    pixels = decode_image(Record(file.getvalue(), (), "a.png", {}))
    return augment(fit_square(pixels, fit), S, "none", None)


def kind(value):
    """Returns a name of a value for a test's id. It is the same in every process, unlike an object's address."""
    if isinstance(value, str):
        return value
    return f"{getattr(value, 'mode', getattr(value, 'dtype', type(value).__name__))}{getattr(value, 'shape', '')}"


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("mode", PNG_MODES)
def test_files_and_pil_images_equal_training(tmp_path, mode, fit):
    expected = as_in_training(pil(mode), fit)
    pil(mode).save(tmp_path / "a.png")
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), pil(mode)):
        np.testing.assert_array_equal(inputs.image(given, S, fit), expected)
    assert expected.shape == (S, S, 3) and expected.std() > 0


@pytest.mark.parametrize("mode", MODES)
def test_pil_images_of_every_mode(mode):
    found = inputs.image(pil(mode), S)
    assert found.shape == (S, S, 3) and found.dtype == np.uint8 and found.std() > 0


def test_a_photo_is_upright_as_in_training(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(WIDE[..., :3]).save(tmp_path / "a.png", exif=exif)
    given = PIL.Image.open(tmp_path / "a.png")
    turned = augment(np.rot90(WIDE[..., :3], -1), S, "none", None)
    np.testing.assert_array_equal(inputs.image(given, S), turned)
    np.testing.assert_array_equal(inputs.image(tmp_path / "a.png", S), turned)


RGB, GREY = WIDE[..., :3], WIDE[..., 0]
THREE = np.stack([GREY] * 3, axis=-1)


@pytest.mark.parametrize(
    "given, expected",
    [
        (RGB, RGB),
        (RGB[None], RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (RGB.transpose(2, 0, 1)[None], RGB),
        (RGB.astype(np.int64), RGB),
        (RGB.tolist(), RGB),
        (RGB / 255, RGB),
        ((RGB / 255).astype(np.float32), RGB),
        (jnp.asarray(RGB), RGB),
        (jnp.asarray(RGB / 255), RGB),
        (GREY, THREE),
        (GREY[..., None], THREE),
        (GREY[None], THREE),
        ((GREY / 255)[None], THREE),
        (WIDE, "RGBA"),
        (WIDE.transpose(2, 0, 1), "RGBA"),
        (WIDE / 255, "RGBA"),
        (np.asfortranarray(RGB), RGB),
        (RGB[::-1, ::-1], RGB[::-1, ::-1]),
    ],
    ids=kind,
)
def test_arrays(given, expected):
    if isinstance(expected, str):
        expected = as_in_training(pil(expected))
    else:
        expected = augment(expected, S, "none", None)
    np.testing.assert_array_equal(inputs.image(given, S), expected)
    np.testing.assert_array_equal(inputs.images(given, S), expected[None])


def test_small_floats_of_jax():
    whole = jnp.asarray(np.zeros((S, S, 3)) + 0.5, jnp.bfloat16)
    assert (inputs.image(whole, S) == 128).all()


def test_batches_and_lists_of_different_sizes(tmp_path):
    batch = np.random.default_rng(1).integers(0, 256, (3, S, S, 3), np.uint8)
    np.testing.assert_array_equal(inputs.images(batch, S), batch)
    np.testing.assert_array_equal(inputs.images(batch.transpose(0, 3, 1, 2), S), batch)
    pil("L").save(tmp_path / "a.png")
    mixed = inputs.images([batch[0], WIDE, tmp_path / "a.png", pil("P"), batch[1] / 255], S)
    assert mixed.shape == (5, S, S, 3)
    np.testing.assert_array_equal(mixed[[0, 4]], batch[:2])
    np.testing.assert_array_equal(mixed[2], as_in_training(pil("L")))


@pytest.mark.parametrize(
    "given, words",
    [
        (RGB.astype(np.float32), "Divide by 255"),
        (RGB / 127.5 - 1, "from -1"),
        (np.full((S, S, 3), np.nan), "nan"),
        (RGB.astype(np.uint16) * 257, "to 255"),
        (RGB.astype(np.int32) - 9, "to 255"),
        (np.zeros((S, S, 3), bool), "bool"),
        (np.zeros((S, S, 3), complex), "complex"),
        (np.zeros((S, S, 5), np.uint8), r"\(8, 8, 5\)"),
        (np.zeros((0, S, 3), np.uint8), r"\(0, 8, 3\)"),
        (np.zeros(9, np.uint8), r"\(9,\)"),
        (np.zeros((2, S, S, 3), np.uint8), "2 images"),
        (np.zeros((0, S, S, 3), np.uint8), "0 images"),
        (np.zeros((1, 1, S, S, 3), np.uint8), r"\(1, 1, 8"),
        ([], "0 images"),
        (None, "None"),
        (5, "int64"),
        (b"abc", "S3"),
        ({"image": 1}, "dict"),
        ([[1, 2], [3]], "list"),
        ("nowhere.png", "nowhere.png"),
        ("", "''"),
        ("a\0b", "a"),
        ("/dev/null", "null"),
    ],
    ids=kind,
)
def test_what_is_no_image_is_rejected(given, words):
    with pytest.raises(DataError, match=words):
        inputs.image(given, S)


def test_damaged_files_are_rejected(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="a.png"):
        inputs.image(tmp_path / "a.png", S)
    file = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    half = PIL.Image.open(io.BytesIO(file.getvalue()[:4000]))
    with pytest.raises(DataError, match="PIL"):
        inputs.image(half, S)
    with pytest.raises(DataError, match="No image"):
        inputs.images([], S)


# -- masks --------------------------------------------------------------------------------------------------------

MARKED = np.zeros((S, S), bool)
MARKED[2:4, 5:] = True


@pytest.mark.parametrize(
    "given",
    [
        MARKED,
        MARKED.astype(np.uint8),
        MARKED.astype(np.uint8) * 255,
        MARKED.astype(np.float32),
        MARKED[..., None],
        MARKED[None],
        MARKED[None, ..., None],
        MARKED.tolist(),
        jnp.asarray(MARKED),
        PIL.Image.fromarray(MARKED),
        PIL.Image.fromarray(MARKED.astype(np.uint8) * 255),
        PIL.Image.fromarray(MARKED.astype(np.uint8) * 255).convert("RGB"),
        PIL.Image.fromarray(MARKED.astype(np.uint8) * 255).convert("P"),
    ],
    ids=kind,
)
def test_masks(given, tmp_path):
    np.testing.assert_array_equal(inputs.mask(given, (S, S), S), MARKED)
    if isinstance(given, PIL.Image.Image):
        given.save(tmp_path / "mask.png")
        np.testing.assert_array_equal(inputs.mask(tmp_path / "mask.png", (S, S), S), MARKED)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (5, 7), (40, 41)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_mask_follows_its_image(shape, fit):
    """A pixel of the result is marked exactly if a white pixel of the same place reaches it."""
    rng = np.random.default_rng(0)
    for _ in range(9):
        marked = np.zeros(shape, bool)
        marked[tuple(rng.integers(0, side) for side in shape)] = True
        painted = np.zeros((*shape, 3), np.float64)
        painted[marked] = 1e6  # so that the least share is seen
        side = (min if fit == "crop" else max)(shape)
        top, left = (abs(length - side) // 2 for length in shape)
        if fit == "crop":
            square = painted[top : top + side, left : left + side]
        else:
            square = np.pad(painted, ((top, side - shape[0] - top), (left, side - shape[1] - left), (0, 0)))
        expected = np.zeros((S, S), bool)
        for y, x in np.argwhere(square[..., 0] > 0):
            rows, columns = (slice(i * S // side, -(-(i + 1) * S // side)) for i in (y, x))
            expected[rows, columns] = True
        np.testing.assert_array_equal(inputs.mask(marked, shape, S, fit), expected)


@pytest.mark.parametrize(
    "given, words",
    [
        (MARKED[:4], r"\(4, 8\)"),
        (np.zeros((2, S, S)), r"\(2, 8, 8\)"),
        (np.full((S, S), np.nan), "finite"),
        (np.full((S, S), "x"), "finite"),
        (PIL.Image.fromarray(np.zeros((S, S, 4), np.uint8)), "transparent"),
        (None, "None"),
        ("nowhere.png", "nowhere.png"),
    ],
    ids=kind,
)
def test_what_is_no_mask_is_rejected(given, words):
    with pytest.raises(DataError, match=words):
        inputs.mask(given, (S, S), S)


# -- captions and tokens ------------------------------------------------------------------------------------------


def test_captions():
    assert inputs.captions("a star") == ["a star"]
    assert inputs.captions(("a star", np.str_("a circle"))) == ["a star", "a circle"]
    assert inputs.captions(np.array(["a", "b"])) == ["a", "b"] and inputs.captions(iter(["a"])) == ["a"]


@pytest.mark.parametrize(
    "given",
    [b"a star", None, 5, 1.5, np.int32(5), jnp.int32(5), [b"a star"], ["a star", None], [5], [["a star"]]],
    ids=kind,
)
def test_what_is_no_caption_is_rejected(given):
    with pytest.raises(DataError, match="string"):
        inputs.captions(given)


def test_tokens():
    found = inputs.tokens([[0, 1], [2, 3]], (None, 2), 4)
    assert found.dtype == np.int32 and found.tolist() == [[0, 1], [2, 3]]
    for given in ([[0, 4]], [[-1, 0]], [[0.0, 1.0]], [[0]], [0, 1], [[True, False]], [], None, [["a", "b"]]):
        with pytest.raises(DataError, match="(?i)token|value"):
            inputs.tokens(given, (None, 2), 4)
