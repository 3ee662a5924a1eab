"""The data job: looks at a data set and says what it holds, without training. Every training begins with it.

<workdir>/data.json            the survey
<workdir>/samples/data.png     images as the model will see them, with their captions
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.configuration.values import natural
from dalle_jax.data import survey as surveys
from dalle_jax.data import text_models
from dalle_jax.data.advice import advise
from dalle_jax.data.augment import augment, fit_square
from dalle_jax.data.sources.decoding import decode_image
from dalle_jax.data.sources.once import opened_once
from dalle_jax.data.sources.own import choose_source
from dalle_jax.data.sources.record import UnreadableExample
from dalle_jax.data.sources.source import DataOptions, Source, decode_captions
from dalle_jax.data.spread import in_spread_order
from dalle_jax.data.survey import SplitSurvey, Survey
from dalle_jax.data.text import CaptionModel
from dalle_jax.distributed.turns import first_host_first, is_first
from dalle_jax.errors import DataError
from dalle_jax.jobs.checks import check_text_model
from dalle_jax.priors.condition import Label
from dalle_jax.priors.registry import condition_of
from dalle_jax.reporting.contact_sheet import Shown, contact_sheet
from dalle_jax.reporting.images import save_png
from dalle_jax.storage import json_files
from dalle_jax.storage.files import check_writable, expanded, is_remote, make_workdir, write_errors, write_json
from dalle_jax.storage.obstacles import make_way_for_file
from dalle_jax.token_layout import LARGEST_VOCABULARY, LONGEST_STREAM

_SHOWN = {"train": 24, "validation": 8}  # images on the contact sheet
_TRIED = 4  # examples read for each image shown, because some cannot be read
_DRAWN = ("shapes_captions", "emoji_captions")  # drawn by this package: nothing in them surprises
_NAMED_ENDINGS = 6
# Reasons that the log says in other words.
_IN_WORDS = {"empty caption": "without caption", "too many pixels": "above data.max_pixels"}


def run(config: ConfigDict, workdir: str) -> Survey | None:
    """Looks at the data set of `configs/data.py`.

    Args:
      config: `data` and `text`.
      workdir: directory of the results.

    Returns:
      The survey; None on other hosts than the first.

    Raises:
      UserError: see `look_at`.
    """
    check(config, workdir)
    return look_at(config, workdir)


def check(config: ConfigDict, workdir: str) -> None:
    """Rejects whatever can be rejected before the data set is opened, and creates `workdir`.

    Raises:
      ConfigError: an invalid value, or a `workdir` that cannot be written.
    """
    options = from_config(DataOptions, config.data, "data")
    choose_source(options.source, options.path)
    for key, most in (("length", LONGEST_STREAM), ("vocab_size", LARGEST_VOCABULARY)):
        if config.text[key] is not None:
            natural(f"config.text.{key}", config.text[key], 1, most)
    if config.text.path:
        check_text_model(config.text.path)
    check_writable(workdir)


def look_at(config: ConfigDict, workdir: str) -> Survey | None:
    """Looks at the data set of a configuration, on the first host. Logs, writes data.json and the contact sheet.

    A training looks quickly, and only once: it does nothing if data.json describes the same files already.

    Args:
      config: the configuration of a training or of `configs/data.py`.
      workdir: directory of the run.

    Returns:
      The survey; None if there was nothing to do.

    Raises:
      ConfigError: an invalid section `data`, or a text vocabulary that is too small for the captions.
      DataError: the data set cannot be opened, or nothing in it is usable. A prior and CLIP need captions.
    """
    options = from_config(DataOptions, config.data, "data")
    with first_host_first("the look at the data set"), opened_once():
        options = dataclasses.replace(options, source=choose_source(options.source, options.path))
        return _look_at(config, options, make_workdir(workdir)) if is_first() else None


def _look_at(config: ConfigDict, options: DataOptions, workdir: str) -> Survey | None:
    training = config.job == "train"
    sources = surveys.open_splits(options)
    key = _key(options, sources, config)
    if training and _stored_key(workdir) == key:
        return None
    drawn = options.source in _DRAWN
    kind, text = condition_of(config), config.get("text") or {}
    if training and text and issubclass(kind, Label):
        if not text.get("path"):
            kind.train(sources["train"].captions(), text["vocab_size"])  # an error if there are too many
        text = {}
    captions = "counted" if not training else "required" if "text" in config else "ignored"
    found = surveys.survey(
        options,
        sources,
        text_length=text.get("length"),
        text_model=_text_model(text, workdir),
        vocab_size=text.get("vocab_size"),
        captions=captions,
        effort=_effort(options, training),
    )
    lines, advice = describe(found, options), advise(found, options)
    sheet = expanded(workdir) / "samples" / "data.png"
    with write_errors(sheet):
        if not is_remote(sheet):
            make_way_for_file(sheet)
        save_png(sheet, draw(sources, options, found))
    write_json(expanded(workdir) / "data.json", {**found.to_dict(), "advice": advice, "key": key})
    if drawn and training:
        logging.info("%s. See %s.", lines[0], sheet)
        return found
    for line in lines:
        logging.info("%s", line)
    logging.info("  See %s and data.json next to it.", sheet)
    for remark in advice:
        logging.warning("  Note: %s", remark)
    return found


def _effort(options: DataOptions, training: bool) -> surveys.Effort:
    """Returns how much to read: a training must not wait, and object storage answers slowly."""
    if not training:
        return surveys.THOROUGH
    return surveys.GLANCE if options.source in _DRAWN or is_remote(options.path) else surveys.QUICK


def _text_model(text: Mapping[str, Any], workdir: str) -> CaptionModel | None:
    """Returns the text model that a training in `workdir` uses, if it exists already."""
    for path in (workdirs.text_model_path(workdir), text.get("path")):
        if path and expanded(path).exists():
            return text_models.load(path)
    return None


def _key(options: DataOptions, sources: Mapping[str, Source], config: ConfigDict) -> str:
    """Returns a text that changes with the data set or with the options of the look."""
    text = dict(config.get("text") or {})
    parts = [repr(options), json.dumps(text, sort_keys=True, default=str)]
    parts += [f"{len(source)} {source.identity}" for source in sources.values()]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _stored_key(workdir: str) -> str | None:
    try:
        return json_files.read(expanded(workdir) / "data.json", dict, DataError, "").get("key")
    except DataError:
        return None


# -- in words -----------------------------------------------------------------------------------------------------


def describe(found: Survey, options: DataOptions) -> list[str]:
    """Returns the survey in about ten lines, the first of which stands alone."""
    train, validation = found.splits["train"], found.splits["validation"]
    where = f"{found.path} ({found.source})" if found.path else found.source
    lines = [
        f"Data: {where}: {train.examples:,} images for training, {validation.examples:,} held out ({validation.split})"
    ]
    for split in found.splits.values():
        if split.looked_at < split.examples:
            lines.append(f"  {split.split}: looked at {split.looked_at:,}; the numbers below are those of this sample")
        elif split.decoded < split.looked_at:
            lines.append(f"  {split.split}: decoded {split.decoded:,} images, and read the headers of the others")
    captions = found.captions
    if captions is None:
        lines.append("  captions: none")
    else:
        words = captions.words
        lines.append(_describe_captions(found, options))
        if captions.translations or captions.other_scripts:
            lines.append(
                f"  languages: {captions.translations:.0%} of the captions begin with a language code, "
                f"{captions.other_scripts:.0%} are in another script than the first one of their image"
            )
        lines.append(f"  first captions: {' | '.join(_shortened(each, 60) for each in captions.first)}")
        lines.append(
            f"  words: {words.median} a caption (median), at most {words.most}; {captions.different_words:,} different"
        )
        if captions.tokens:
            lines.append(_describe_tokens(captions.tokens))
    lines.append(_describe_images(found, options))
    left_out = [
        f"{split.split}: {_reasons(each)}" for split in found.splits.values() if (each := _left_out(split, found))
    ]
    if left_out:
        lines.append(f"  left out of {'; of '.join(left_out)}")
    if found.other_files:
        lines.append(f"  other files: {_endings(found.other_files)}")
    return lines


def _describe_captions(found: Survey, options: DataOptions) -> str:
    train, spread = found.splits["train"], found.captions.per_image
    made = "" if options.caption_from == "files" else f", made from {options.caption_from.replace('_', ' ')}"
    about = "about " if train.looked_at < train.examples else ""
    every = train.with_captions == train.examples
    if every and spread.most == 1:
        return f"  captions: one for each image{made}"
    have_one = "every image" if every else f"{about}{train.with_captions:,} of {train.examples:,} images"
    return (
        f"  captions: {about}{train.captions:,} for training{made}; {spread.median} an image (median), at most "
        f"{spread.most}; {have_one} {'has' if every else 'have'} one"
    )


def _left_out(split: SplitSurvey, found: Survey) -> dict[str, int]:
    """Returns what a split lacks. Where nothing has a caption, the images without one are no exception."""
    return {reason: n for reason, n in split.left_out.items() if found.captions or reason != "empty caption"}


def _describe_tokens(tokens) -> str:
    spread = tokens.per_caption
    line = f"  tokens: {spread.median} a caption (median), at most {spread.most}, "
    line += f"with a vocabulary of {tokens.vocab_size:,}{' trained for this look' if tokens.trained else ''}"
    if tokens.share_cut is not None:
        line += f"; {tokens.share_cut:.1%} of the captions are cut at text.length={tokens.text_length}"
    return f"{line}; {tokens.length_for_99_percent} positions hold 99% of them, {tokens.length_for_all} all"


def _describe_images(found: Survey, options: DataOptions) -> str:
    images = found.images
    smallest, median, largest = (
        f"{width}x{height}" for width, height in (images.smallest, images.median, images.largest)
    )
    line = f"  sizes: {smallest} to {largest}, median {median}" if smallest != largest else f"  sizes: all {smallest}"
    line += f"; {images.below_image_size:,} below data.image_size={options.image_size}"
    line += f"; {_counts(images.formats)} ({_counts(images.modes)})"
    if images.blank:
        line += f"; of a single colour: {images.blank:,}"
    if images.duplicates:
        line += f"; with the content of another one: {images.duplicates:,}"
    return line


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _reasons(counts: Mapping[str, int]) -> str:
    return _counts({_IN_WORDS.get(reason, reason): count for reason, count in counts.items()})


def _endings(counts: Mapping[str, int]) -> str:
    """Returns "7,858 .ogg, 248 .svg, 12 others"."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[_NAMED_ENDINGS:])
    return _counts(dict(ordered[:_NAMED_ENDINGS])) + (f", {rest:,} others" if rest else "")


def _shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


# -- the contact sheet --------------------------------------------------------------------------------------------


def draw(sources: Mapping[str, Source], options: DataOptions, found: Survey):
    """Draws images that are spread over each split, as the model will see them.

    Args:
      sources: the splits by the names of `surveys.SPLITS`.
      options: `image_size`.
      found: the survey, for the headings.

    Returns:
      uint8 [H', W', 3].
    """
    groups = []
    for name, heading in (("train", "Training"), ("validation", "Held out")):
        split = found.splits[name]
        groups.append((f"{heading}: {split.examples:,} images", _shown(sources[name], options, _SHOWN[name])))
    title = f"{found.path or found.source}, as the model sees it: {options.image_size} by {options.image_size} pixels"
    return contact_sheet(groups, title=title, subtitle=_subtitle(found))


def _subtitle(found: Survey) -> str:
    if found.captions is None:
        return "No image has a caption."
    spread, parts = found.captions.per_image, []
    parts.append(f"{spread.median} caption{'s' * (spread.median != 1)} an image (median), at most {spread.most}")
    if found.captions.translations:
        parts.append(f"{found.captions.translations:.0%} of the captions are translations")
    if found.captions.without:
        parts.append(f"{found.captions.without:.0%} of the images have none")
    return "; ".join(parts)


def _shown(source: Source, options: DataOptions, count: int) -> Sequence[Shown]:
    shown = {}
    for tried, index in enumerate(in_spread_order(len(source))):
        if len(shown) == count or tried == _TRIED * count:
            break
        try:
            record = source.record(index)
            image = fit_square(decode_image(record, options.limits), options.fit)
            image = augment(image, options.image_size, "none", None)
        except UnreadableExample:
            continue
        try:
            captions = decode_captions(record)
        except UnreadableExample:
            captions = ["(no caption)"]
        more = f"and {len(captions) - 1} more" if len(captions) > 1 else ""
        shown[index] = Shown(image, captions[0], more)
    return [shown[index] for index in sorted(shown)]
