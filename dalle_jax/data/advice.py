"""Remarks on a data set for its owner: each says what was found and which key helps."""

from __future__ import annotations

from collections.abc import Iterator

from dalle_jax.data.caption_statistics import CaptionStatistics
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.survey import Survey

# Shares and numbers from which a remark is made.
_TRANSLATIONS = 0.2
_OTHER_SCRIPTS = 0.2
_MANY_CAPTIONS = 20
_CUT = 0.01
_ENLARGED = 0.05
_CROPPED = 0.2
_BLANK = 0.01
_WITHOUT_CAPTION = 0.05
_OWN = ("folder", "tar_shards")  # sources in which copies can be deleted
_IMAGES_NOT_READ = (".svg", ".heic", ".heif", ".avif", ".jp2", ".pdf", ".eps", ".psd", ".dng", ".cr2", ".nef", ".arw")


def advise(found: Survey, options: DataOptions) -> tuple[str, ...]:
    """Returns remarks, the most important first; () if nothing stands out.

    Args:
      found: the survey.
      options: those that it was made with.
    """
    remarks = [*_on_captions(found, options), *_on_images(found, options)]
    unread = {ending: count for ending, count in found.other_files.items() if ending in _IMAGES_NOT_READ}
    if unread:
        listed = ", ".join(f"{count:,} {ending}" for ending, count in unread.items())
        remarks.append(f"{listed} are not read. Convert them to PNG or JPEG if they belong to the set.")
    return tuple(remarks)


def _on_captions(found: Survey, options: DataOptions) -> Iterator[str]:
    captions = found.captions
    if captions is None:
        yield "No image has a caption, so only an image tokenizer can be trained." + _caption_remedy(options)
        return
    if captions.without > _WITHOUT_CAPTION:
        yield f"{captions.without:.0%} of the images have no caption; a prior skips them." + _caption_remedy(options)
    if options.caption_lines == "all" and (reason := _many_languages(captions)):
        remedy = "To use the first line alone, set --config.data.caption_lines=first."
        if options.source != "folder":
            remedy = "Write the first line alone if you want one language."
        yield f"{reason} {remedy}"
    tokens = captions.tokens
    if tokens and tokens.text_length is not None and tokens.share_cut > _CUT:
        yield (
            f"{tokens.share_cut:.0%} of the captions are longer than text.length={tokens.text_length}. "
            f"--config.text.length={tokens.length_for_99_percent} cuts one in a hundred, "
            f"{tokens.length_for_all} none."
        )


def _many_languages(captions: CaptionStatistics) -> str:
    if captions.translations >= _TRANSLATIONS:
        return f"{captions.translations:.0%} of the captions begin with a language code: they are translations."
    if captions.other_scripts >= _OTHER_SCRIPTS:
        return f"{captions.other_scripts:.0%} of the captions are in another script than their image's first one."
    if captions.per_image.median >= _MANY_CAPTIONS:
        return f"An image has {captions.per_image.median} captions (median). Training draws one of them each time."
    return ""


def _caption_remedy(options: DataOptions) -> str:
    if options.source != "folder":
        return ""
    others = [name for name in ("file_names", "folder_names", "paths") if name != options.caption_from]
    return f" Captions can be made from names: --config.data.caption_from={', '.join(others[:-1])} or {others[-1]}."


def _on_images(found: Survey, options: DataOptions) -> Iterator[str]:
    images = found.images
    seen = sum(images.formats.values())
    if images.below_image_size > _ENLARGED * seen:
        yield (
            f"{images.below_image_size:,} of {seen:,} images are smaller than data.image_size={options.image_size} and "
            "are enlarged, which makes them blurred. A smaller --config.data.image_size fits them."
        )
    if images.cropped > _CROPPED * seen:
        yield (
            f"{images.cropped:,} of {seen:,} images lose more than a third, because the centre square is used. "
            "--config.data.fit=pad adds white instead, so that all of an image is seen."
        )
    if images.blank > _BLANK * seen:
        pad = ", or use all of an image with --config.data.fit=pad" if options.fit == "crop" else ""
        more = ", …" if images.blank > len(images.blank_names) else ""
        yield (
            f"{images.blank:,} images have a single colour as the model sees them, on white where they are transparent "
            f"({', '.join(images.blank_names)}{more}). Remove or crop them{pad}."
        )
    if images.in_both_splits and options.source in _OWN:
        sampled = any(split.looked_at < split.examples for split in found.splits.values())
        yield (
            f"{'At least ' if sampled else ''}{images.in_both_splits:,} validation images are also training images "
            "(the same bytes), so validation looks better than it is. Delete the copies."
        )
