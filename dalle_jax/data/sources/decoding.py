"""Decodes the encoded image of an example: upright, RGB, transparent parts on white.

This is the only place where files of unknown origin are opened as images. Only raster formats are tried. Pillow would
otherwise start Ghostscript for an EPS file that is named `cat.png`. Sizes are checked before anything is unpacked.

Most images are 8-bit and are used as they are. The others are converted:

    16-bit grey             divided by 257
    32-bit integers, float  scaled from the smallest of these ranges that holds all values: [0, 1] (float only),
                            [0, 255], [0, 65535]; else from the image's own minimum and maximum
    CMYK, YCbCr, LAB        Pillow's conversion to RGB
    animations              the first frame

A photo of 48 megapixels would cost more than a gigabyte on its way to 128 pixels. An image above 4 megapixels whose
short side is at least eight times the requested size is therefore decoded at a reduced size, at least four times the
requested one. A JPEG is reduced while it is decoded, so that its full size is never in memory.

    H, W image size    S requested size
"""

from __future__ import annotations

import dataclasses
import io
import struct

import numpy as np
import PIL.Image
import PIL.ImageCms

from dalle_jax.data.sources.record import Record, UnreadableExample

# Pillow decodes no larger image.
MOST_PIXELS = 2 * PIL.Image.MAX_IMAGE_PIXELS

_RASTER = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
PIL.Image.init()
_FORMATS = tuple(name for name in _RASTER if name in PIL.Image.OPEN)  # AVIF and others are parts of some builds only
_REDUCED_FROM_PIXELS = 4_000_000
_REDUCED_FROM_RATIO = 8  # of the short side to S
_REDUCED_TO_RATIO = 4
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")  # those that decide the pixels


@dataclasses.dataclass(frozen=True)
class Limits:
    """The largest image to decode, and the size that it is decoded for.

    Attributes:
      max_pixels: the most pixels of an image, read from its header.
      max_file_bytes: the most bytes of an encoded image.
      image_size: S, so that a much larger image may be decoded at a reduced size; None for the full size.
    """

    max_pixels: int = 50_000_000
    max_file_bytes: int = 100 * 2**20
    image_size: int | None = None


def is_decoded(image_format: str | None) -> bool:
    """Returns whether `decode_image` opens files of a format, by Pillow's name."""
    return image_format in _FORMATS


def decode_image(record: Record, limits: Limits = Limits()) -> np.ndarray:
    """Decodes the image: upright, RGB, transparent parts on white.

    Args:
      record: the example.
      limits: the largest image to decode, and the size that it is needed for.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UnreadableExample: if the bytes are not a complete image, or exceed the limits.
    """
    content, name = record.image, record.name
    if isinstance(content, np.ndarray):
        if content.dtype != np.uint8 or content.ndim != 3 or content.shape[-1] not in (1, 3):
            raise UnreadableExample("unreadable image", name, f"{content.dtype} {content.shape}")
        return np.broadcast_to(content, (*content.shape[:2], 3))
    if len(content) > limits.max_file_bytes:
        found = f"{len(content):,} bytes, data.max_file_bytes is {limits.max_file_bytes:,}"
        raise UnreadableExample("file too large", name, found)
    try:
        _check_png(content, name, limits)
        return _decode(content, name, limits)
    except UnreadableExample:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UnreadableExample("too many pixels", name, str(error)) from error
    except Exception as error:  # Pillow raises anything from OSError to SyntaxError on damaged bytes
        # Texts and colour profiles of a PNG do not change its pixels here. Damaged or large ones do not cost the image.
        if (pixels := _without_texts(content)) is not None:
            return decode_image(dataclasses.replace(record, image=pixels), limits)
        found = f"{type(error).__name__}: {error}"
        if isinstance(error, PIL.UnidentifiedImageError):
            found = f"it begins with {content[:8]!r}; expected one of {', '.join(_FORMATS)}" if content else "0 bytes"
        raise UnreadableExample("unreadable image", name, found) from error


@dataclasses.dataclass(frozen=True)
class Header:
    """Format, mode and size of an image file, without its pixels.

    Attributes:
      format: "PNG", "JPEG", …; "array" if the image is stored decoded.
      mode: Pillow's mode ("RGB", "RGBA", "L", …).
      size: (width, height) in pixels, as stored: not yet upright.
    """

    format: str
    mode: str
    size: tuple[int, int]


def read_header(record: Record, limits: Limits = Limits()) -> Header | None:
    """Reads the header of an image without decoding it.

    Args:
      record: the example.
      limits: the largest image.

    Returns:
      The header, or None if it cannot be read or exceeds the limits; `decode_image` then gives the reason.
    """
    content = record.image
    if isinstance(content, np.ndarray):
        mode = {3: "RGB", 1: "L"}.get(content.shape[-1] if content.ndim == 3 else 0)
        return Header("array", mode, (content.shape[1], content.shape[0])) if mode else None
    for each in (content, _without_texts(content)):
        try:
            _check_png(content, record.name, limits)
            with PIL.Image.open(io.BytesIO(each or b""), formats=_FORMATS) as image:
                _check_pixels(*image.size, record.name, limits)
                return Header(image.format, image.mode, image.size)
        except Exception:  # Pillow raises anything from OSError to SyntaxError on damaged bytes
            continue
    return None


def _decode(content: bytes, name: str, limits: Limits) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        _check_pixels(*image.size, name, limits)
        kept = _reduced_side(*image.size, limits.image_size)
        if kept is not None:
            image.draft(None, (kept, kept))  # only a JPEG is reduced here
        return upright_rgb(image, kept)


def upright_rgb(image: PIL.Image.Image, least_side: int | None = None) -> np.ndarray:
    """Returns the pixels of an open image: upright, RGB, transparent parts on white.

    Args:
      image: of any mode.
      least_side: reduces the image by a whole factor, if its short side then is still at least this; None keeps it.

    Returns:
      uint8 [H, W, 3].
    """
    image.load()
    orientation = _orientation(image)
    image = _to_8_bits(image)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
    else:
        image = _lab_to_rgb(image) if image.mode == "LAB" else image.convert("RGB")
    if least_side is not None and (factor := min(image.size) // least_side) > 1:
        image = image.reduce(factor)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode == "RGBA":
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(image)


def _check_png(content: bytes, name: str, limits: Limits) -> None:
    """Checks the size of a PNG before it is opened, because Pillow then unpacks its texts."""
    if content.startswith(_PNG_START) and len(content) >= 24:
        _check_pixels(*struct.unpack(">II", content[16:24]), name, limits)


def _check_pixels(width: int, height: int, name: str, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        found = f"{width} x {height}, data.max_pixels is {limits.max_pixels:,}"
        raise UnreadableExample("too many pixels", name, found)


def _reduced_side(width: int, height: int, size: int | None) -> int | None:
    """Returns the least short side to decode for images of `size` pixels, or None if the whole image is decoded."""
    if size is None or width * height <= _REDUCED_FROM_PIXELS or min(width, height) < _REDUCED_FROM_RATIO * size:
        return None
    return _REDUCED_TO_RATIO * size


def _orientation(image: PIL.Image.Image) -> int | None:
    """Returns the orientation of the camera, or None if there is none or the EXIF data are damaged."""
    try:
        found = image.getexif().get(_ORIENTATION)
        return int(found) if found in _UPRIGHT else None
    except Exception:  # Pillow raises anything on damaged EXIF data, which must not cost the image
        return None


def _to_8_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Scales grey values of 16 or 32 bits to "L", or to "LA" if one value means transparent."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode != "F" and (image.mode != "I" or image.format in ("PNG", "PPM")):
        low, high = 0, 65535
    else:
        low, high = _value_range(values)
    with np.errstate(all="ignore"):  # values that are not finite become black or white
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / ((high - low) or 1.0))
    grey = PIL.Image.fromarray(np.rint(np.clip(np.nan_to_num(scaled, nan=0.0), 0, 255)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(PIL.Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _value_range(values: np.ndarray) -> tuple[float, float]:
    """Returns the range that stands for black to white; see the module."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    usual = ([1.0] if values.dtype.kind == "f" else []) + [255.0, 65535.0]
    return next(((0.0, top) for top in usual if low >= 0.0 and high <= top), (low, high))


def _lab_to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    lab, rgb = PIL.ImageCms.createProfile("LAB"), PIL.ImageCms.createProfile("sRGB")
    return PIL.ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")


def _without_texts(content: bytes) -> bytes | None:
    """Returns a PNG with only the chunks that decide its pixels, or None if nothing can be left out."""
    if not content.startswith(_PNG_START):
        return None
    kept, place = [_PNG_START], len(_PNG_START)
    while place + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        if kind in _PNG_CHUNKS or kind[:1].isupper():
            kept.append(content[place : place + 12 + length])
        place += 12 + length
    shorter = b"".join([*kept, content[place:]])
    return shorter if len(shorter) < len(content) else None
