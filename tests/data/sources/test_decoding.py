"""Images of every kind become upright RGB; damaged, huge and dangerous ones are skipped with a reason."""

import io
import pathlib
import struct
import tracemalloc
import zlib

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import PIL.ImageCms
import PIL.ImageFile
import pytest

from dalle_jax.data.sources import decoding
from dalle_jax.data.sources.decoding import Limits, decode_image
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.record import Record, UnreadableExample
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import ConfigError

RAMP = np.tile(np.arange(256, dtype=np.float64), (4, 1))  # [4, 256], black to white


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def decode(content, **limits):
    return decode_image(Record(content, (), "cat.png", {}), Limits(**limits))


def reason(content, **limits):
    with pytest.raises(UnreadableExample) as caught:
        decode(content, **limits)
    assert "object at" not in str(caught.value) and "cat.png" in str(caught.value)
    return caught.value.reason


def photo(height, width, seed=0):
    """Returns a smooth image of random colours, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return np.asarray(PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC))


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, kind",
    [
        ((RAMP * 257).astype(np.uint16), "PNG"),
        ((RAMP * 257).astype(np.uint16), "TIFF"),
        ((RAMP * 257).astype(">u2"), "TIFF"),  # "I;16B"
        ((RAMP * 257).astype(np.int32), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        ((RAMP * 1_000_000).astype(np.int32), "TIFF"),
        ((RAMP * 300 - 9000).astype(np.int32), "TIFF"),
        ((RAMP / 255).astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 257).astype(np.float32), "TIFF"),
        ((RAMP * 1e9 - 1e6).astype(np.float32), "TIFF"),
    ],
)
def test_deep_grey_is_scaled_to_8_bits(values, kind):
    if values.dtype == np.dtype(">u2"):
        image = PIL.Image.frombytes("I;16B", values.shape[::-1], values.tobytes())
    else:
        image = PIL.Image.fromarray(values)
    image = decode(encode(image, kind))
    assert image.dtype == np.uint8 and image.shape == (4, 256, 3)
    np.testing.assert_array_equal(image, np.repeat(RAMP[..., None], 3, -1))


def test_values_that_are_no_number():
    values = np.array([[0.0, 0.5, 1.0, np.nan, np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(decode(encode(values, "TIFF"))[0, :, 0], [0, 128, 255, 0, 255, 0])
    np.testing.assert_array_equal(decode(encode(np.full((2, 2), np.nan, np.float32), "TIFF")), 0)
    np.testing.assert_array_equal(decode(encode(np.full((2, 2), 0.5, np.float32), "TIFF")), 128)


def test_dark_16_bit_png_stays_dark():
    np.testing.assert_array_equal(decode(encode(np.full((2, 2), 250, np.uint16))), 1)


def test_a_transparent_value_of_16_bits_is_white():
    values = np.array([[0, 514, 65535]], np.uint16)
    found = decode(insert(encode(values), b"tRNS", struct.pack(">H", 514), before=b"IDAT"))
    np.testing.assert_array_equal(found[0, :, 0], [0, 255, 255])


READS_RAW_YCBCR = int(PIL.__version__.partition(".")[0]) >= 13  # earlier versions take such a TIFF for a cut one


@pytest.mark.parametrize(
    "mode, kind",
    [
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        *[("YCbCr", "TIFF")] * READS_RAW_YCBCR,
        ("1", "PNG"),
        ("1", "TIFF"),
        ("P", "GIF"),
        ("LAB", "TIFF"),
    ],
)
def test_other_colour_models(mode, kind):
    colours = [(255, 255, 255), (0, 0, 0)] + ([] if mode == "1" else [(220, 40, 40), (40, 60, 210)])
    shown = PIL.Image.fromarray(np.repeat(np.array([colours], np.uint8), 16, 0).repeat(16, 1))
    if mode == "LAB":
        profiles = PIL.ImageCms.createProfile("sRGB"), PIL.ImageCms.createProfile("LAB")
        stored = PIL.ImageCms.profileToProfile(shown, *profiles, outputMode="LAB")
    else:
        stored = shown.quantize(8) if mode == "P" else shown.convert(mode)
    found = decode(encode(stored, kind)).astype(int)
    for place, colour in enumerate(colours):
        np.testing.assert_allclose(found[8, 8 + 16 * place], colour, atol=12)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(mode):
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, :, 3] = 255
    found = decode(encode(PIL.Image.fromarray(pixels).convert(mode)))
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_array_equal(found[1], 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_show_their_first_frame(kind):
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    found = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50))
    np.testing.assert_allclose(found.astype(int), np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=6)


# -- damage that does not concern the pixels --------------------------------------------------------------------------


def insert(png, kind, data, before=b"IEND"):
    """Returns a PNG with one more chunk."""
    place = png.index(before) - 4
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:place] + chunk + png[place:]


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    "kind, data",
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2_000_000)),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
        (b"zTXt", b"Comment\0\7" + b"unknown compression"),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        (b"iCCP", b"profile\0\7" + b"unknown compression"),
    ],
)
def test_texts_and_profiles_of_a_png_do_not_cost_the_image(kind, data, before):
    pixels = photo(12, 16)
    content = insert(encode(pixels), kind, data, before)
    np.testing.assert_array_equal(decode(content), pixels)


def test_a_png_full_of_bombs_stays_small():
    """A hundred texts that would each unpack to 20 MB."""
    bomb = b"Comment\0\0" + zlib.compress(bytes(20_000_000), 1)
    content = encode(photo(12, 16))
    for _ in range(100):
        content = insert(content, b"zTXt", bomb, b"IDAT")
    tracemalloc.start()
    assert decode(content).shape == (12, 16, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000_000


def exif(orientation_type, value):
    """Returns EXIF data with one entry, the orientation, of some type and with these four bytes."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, orientation_type, 1, value, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "data",
    [
        exif(2, b"six\0"),
        exif(7, b"\6\0\0\0"),
        exif(5, b"\xff\xff\xff\xff"),
        exif(12, b"\0\0\0\0"),
        exif(3, b"\6\0\0\0")[:-6],
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
def test_damaged_exif_does_not_cost_the_image(kind, data):
    pixels = photo(12, 16)
    np.testing.assert_array_equal(decode(encode(pixels, kind, exif=data)), decode(encode(pixels, kind)))


def test_exif_whose_other_entries_have_wrong_types():
    """Only the orientation is used. Pillow fails when it writes the others back."""
    entries = struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0") + struct.pack("<HHI4s", 0x011A, 2, 1, b"a\0\0\0")
    data = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    assert decode(encode(photo(12, 16), exif=data)).shape == (16, 12, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :10] = 255, 0, 0
    data = PIL.Image.Exif()
    data[0x0112] = orientation
    found = decode(encode(pixels, exif=data))
    expected = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(pixels),
    }[orientation]  # fmt: skip
    np.testing.assert_array_equal(found, expected)


# -- rejected -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_unreadable(kind):
    content = encode(np.random.default_rng(0).integers(0, 256, (60, 70, 3)).astype(np.uint8), kind)
    assert reason(content[: len(content) // 2]) == "unreadable image"


@pytest.mark.parametrize("content", [b"", b"text", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", bytes(1000)])
def test_other_bytes_are_unreadable(content):
    assert reason(content) == "unreadable image"


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(run) (w) file\nshowpage\n%%EOF\n",
        encode(photo(8, 8), "EPS"),
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 40) + bytes(20) + b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\n",
        encode(photo(8, 8), "PDF"),
        encode(photo(8, 8), "ICNS"),
    ],
)
def test_only_raster_formats_are_opened(content, monkeypatch):
    """An EPS file must never reach Ghostscript, whatever its name."""
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    assert reason(content) == "unreadable image"


def test_no_other_place_opens_images():
    """Images of unknown origin are opened in one place. Tests may open their own files."""
    package = pathlib.Path(decoding.__file__).parents[2]
    places = [path.name for path in package.rglob("*.py") if "Image.open(" in path.read_text("utf-8")]
    assert places == ["decoding.py"]


def header_of(kind, width, height):
    """Returns a small file whose header claims many pixels."""
    if kind == "PNG":
        data = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + b"IHDR" + data + struct.pack(">I", zlib.crc32(b"IHDR" + data))
        small = encode(photo(8, 8))
        return small[:8] + chunk + small[33:]
    content = bytearray(encode(photo(8, 8), kind))
    if kind == "JPEG":
        place = content.index(b"\xff\xc0") + 5
        content[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "BMP":
        content[18:26] = struct.pack("<ii", width, height)
    elif kind == "GIF":
        content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF"])
@pytest.mark.parametrize("width, height", [(9000, 6000), (20000, 20000)])
def test_too_many_pixels_are_rejected_by_their_header(kind, width, height, monkeypatch):
    content = header_of(kind, width, height)
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("it was unpacked"))
    assert reason(content) == "too many pixels"


def test_a_deflate_bomb_is_rejected():
    """A PNG of less than 2 MB that unpacks to 200 MB."""
    content = encode(PIL.Image.new("L", (14000, 14000)), compress_level=1)
    assert len(content) < 2_000_000
    tracemalloc.start()
    assert reason(content) == "too many pixels"
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_the_limits_are_options(tmp_path):
    content = encode(photo(30, 40))
    assert decode(content, max_pixels=1200).shape == (30, 40, 3)
    assert reason(content, max_pixels=1199) == "too many pixels"
    assert decode(content, max_file_bytes=len(content)).shape == (30, 40, 3)
    assert reason(content, max_file_bytes=len(content) - 1) == "file too large"
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "a.txt").write_text("a")
    for options in ({"max_pixels": 1199}, {"max_file_bytes": 100}):
        source = open_source(DataOptions(source="folder", path=str(tmp_path), **options), "all")
        with pytest.raises(UnreadableExample, match="too"):
            source[0]
    for options in ({"max_pixels": 0}, {"max_pixels": 10**9}, {"max_file_bytes": 0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DataOptions(**options)


# -- large images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_large_image_is_decoded_at_a_reduced_size(kind):
    pixels = photo(2400, 3200)
    content = encode(pixels, kind)
    whole, reduced = decode(content), decode(content, image_size=32)
    assert whole.shape == (2400, 3200, 3) and 4 * 32 <= min(reduced.shape[:2]) <= 10 * 32
    height, width = reduced.shape[:2]
    shown = np.asarray(PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BOX))
    assert np.abs(reduced.astype(int) - shown).mean() < 2


def test_a_jpeg_is_reduced_while_it_is_decoded(monkeypatch):
    """Its full size is never in memory."""
    content = encode(photo(2400, 3200), "JPEG")
    monkeypatch.setattr(PIL.Image.Image, "reduce", lambda *_: pytest.fail("it was decoded at a larger size"))
    assert decode(content, image_size=100).shape == (600, 800, 3)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA", "I;16"])
def test_every_mode_is_reduced(mode):
    grey = np.full((2048, 2048), 200, np.uint8)
    stored = grey.astype(np.uint16) * 257 if mode == "I;16" else PIL.Image.fromarray(grey).convert(mode)
    found = decode(encode(stored, compress_level=1), image_size=64)
    assert found.shape == (256, 256, 3) and (found == 200).all()


def test_a_reduced_image_is_upright():
    pixels = np.zeros((2100, 2800, 3), np.uint8)
    pixels[:, :1400] = 255
    data = PIL.Image.Exif()
    data[0x0112] = 6
    found = decode(encode(pixels, "JPEG", exif=data), image_size=32)
    assert found.shape[0] > found.shape[1] and found[:10].min() > 200 and found[-10:].max() < 50


def test_ordinary_images_are_never_reduced():
    """Below four megapixels, or below eight times the requested size, pixels stay as they are stored."""
    pixels = photo(1000, 1300)
    np.testing.assert_array_equal(decode(encode(pixels), image_size=8), pixels)
    assert decode(encode(photo(2000, 2100), "JPEG"), image_size=251).shape == (2000, 2100, 3)
    assert decode(encode(photo(2000, 2100), "JPEG"), image_size=250).shape == (1000, 1050, 3)
