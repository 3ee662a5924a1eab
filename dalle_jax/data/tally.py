"""Counts the examples that a pipeline skips and the captions that lose something, and reports them in the log."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from absl import logging

from dalle_jax.data.sources.source import LeftOut

UNKNOWN_CLASS = "class that training has not seen"
TRUNCATED, UNKNOWN_LETTERS = "truncated caption", "caption with unknown letters"
USED = (TRUNCATED, UNKNOWN_LETTERS)  # reasons for which an example is still used
_NAMED_PER_REASON = 5  # examples named in the log for each reason
_FIRST_SUMMARY = 1000  # captions read before the share of truncated ones is reported


@dataclasses.dataclass(frozen=True)
class Note:
    """Something to count about one example: why it was skipped, or what its caption lost.

    Attributes:
      reason: the heading under which it is counted, a few words.
      index: the example's place in the source.
      name: the example's name.
      detail: what was found, or "".
    """

    reason: str
    index: int
    name: str
    detail: str


class Tally:
    """Counts different examples by reason, on this host.

    The first examples of each reason are named in the log. One further line gives the share of truncated captions.
    """

    def __init__(self, description: str, left_out: Sequence[LeftOut], *, text_length: int | None, epoch: int):
        """Logs what the source says it lacks.

        Args:
          description: the source, for log lines.
          left_out: examples that the source lacks (`Source.left_out`).
          text_length: T, the length to which captions are truncated; None if captions are not read.
          epoch: rows that this host reads in one pass over the source.
        """
        self._description, self._left_out, self._text_length = description, left_out, text_length
        self._seen: dict[str, set[int]] = collections.defaultdict(set)
        self._read = self._truncated = 0  # rows with an example, and how many of their captions were truncated
        self._summary_at = max(1, min(_FIRST_SUMMARY, epoch))
        for found in left_out:
            names = ", ".join(found.names) + (", …" if found.count > len(found.names) else "")
            logging.warning("%s: %s: the data set lacks %d: %s", description, found.reason, found.count, names)

    def add(self, notes: Sequence[Note], rows: int) -> None:
        """Counts one batch.

        Args:
          notes: the notes on its examples.
          rows: how many of its rows hold an example.
        """
        for note in notes:
            self._truncated += note.reason == TRUNCATED
            seen = self._seen[note.reason]
            if note.index in seen:
                continue
            seen.add(note.index)
            if len(seen) <= _NAMED_PER_REASON:
                more = " (further ones are counted only)" if len(seen) == _NAMED_PER_REASON else ""
                logging.warning("%s: %s: %s %s%s", self._description, note.reason, note.name, note.detail, more)
        self._read += rows
        if self._text_length is not None and self._summary_at and self._read >= self._summary_at:
            self._summarize()

    def _summarize(self) -> None:
        """Reports the share of truncated captions, once. Without any so far, looks again after twice as many rows."""
        if not self._truncated:
            self._summary_at = 2 * self._read
            return
        self._summary_at = 0
        logging.warning(
            "%s: %d of the first %d captions (%.3g%%) have more than text.length=%d tokens and were truncated. "
            "Raise text.length if their last words matter.",
            self._description, self._truncated, self._read, 100 * self._truncated / self._read, self._text_length,
        )  # fmt: skip

    def skipped(self) -> dict[str, int]:
        """Returns the number of different examples skipped so far, by reason; {} if none."""
        counts = collections.Counter({found.reason: found.count for found in self._left_out})
        counts.update({reason: len(seen) for reason, seen in self._seen.items() if reason not in USED})
        return dict(sorted(counts.items()))

    def counts(self) -> dict[str, int]:
        """Returns the counts by their names in the training log.

        Returns:
          {"left_out/<reason>": skipped examples}; with captions also "captions_truncated" and, if there are any,
          "captions_with_unknown_letters", the number of different examples with such a caption.
        """
        counts = {f"left_out/{reason}": count for reason, count in self.skipped().items()}
        if self._text_length is not None:
            counts["captions_truncated"] = len(self._seen.get(TRUNCATED, ()))
            if unknown := self._seen.get(UNKNOWN_LETTERS):
                counts["captions_with_unknown_letters"] = len(unknown)
        return counts
