"""The names of emoji: parses them, phrases captions and assigns emoji to splits.

The names are the CLDR short names that Unicode's emoji charts print ("woman firefighter: dark skin tone"). The `emoji`
package holds them without punctuation (":woman_firefighter_dark_skin_tone:"), so this module restores it.

Combinations of role, gender and skin tone are held out. For every role that is drawn for several genders and in every
tone, each gender loses one tone, a different one per gender. The split "heldout" thus asks for a woman firefighter with
dark skin. The model has seen women firefighters, firefighters with dark skin and women with dark skin, but never all
three at once.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import zlib
from collections.abc import Iterable

import emoji

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = {
    "man": "man",
    "men": "man",
    "woman": "woman",
    "women": "woman",
    "person": "person",
    "people": "person",
}
_TONE = re.compile(r"_(medium-light|medium-dark|light|medium|dark)_skin_tone")
_HAIR = re.compile(r"^(man|woman|person)_(red_hair|curly_hair|white_hair|blond_hair|bald|beard)$")
_SEVERAL = re.compile(r"^(couple_with_heart|kiss|family)((?:_(?:man|woman|person|adult|boy|girl|child))+)$")
_FLAG = re.compile("^[\U0001f1e6-\U0001f1ff]{2}$|^\U0001f3f4[\U000e0061-\U000e007f]+$")


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
      sequence: its characters, fully qualified.
      base: the name before the colon: "woman firefighter", "flag", "red apple".
      parts: the parts of the name after the colon: ("dark skin tone",), ("man", "woman", "boy"), ("brazil",).
      role: a person's occupation or activity, without the gender: "firefighter"; "" for other emoji.
      gender: "man", "woman" or "person"; "" if role is "".
      tone: one of TONES, "several", or "".
    """

    sequence: str
    base: str
    parts: tuple[str, ...] = ()
    role: str = ""
    gender: str = ""
    tone: str = ""

    @property
    def name(self) -> str:
        """The CLDR short name in lower case."""
        return self.base + (": " + ", ".join(self.parts) if self.parts else "")

    def captions(self) -> tuple[str, ...]:
        """Returns the name, followed by other phrasings of its parts."""
        base = self.base
        if not self.parts:
            return (base, f"emoji of {base}", f"{base} emoji", f"a picture of {base}")
        parts = " and ".join(self.parts)
        if base == "flag":
            return (self.name, f"flag of {parts}", f"the flag of {parts}", f"{parts} flag")
        joined = f"{base} with {parts}" if self.tone or base in GENDERS else f"{base} of {parts}"
        return (self.name, joined, f"{parts} {base}", f"a picture of {joined}")


def all_emoji() -> list[Emoji]:
    """Returns every fully qualified emoji that Unicode recommends, in the order of their characters."""
    status = emoji.STATUS["fully_qualified"]
    found = [parse(key, data["en"]) for key, data in emoji.EMOJI_DATA.items() if data["status"] == status]
    genders = collections.defaultdict(set)
    for item in found:
        genders[item.role].add(item.gender)
    # "firefighter" is the person that belongs to "man firefighter" and "woman firefighter".
    found = [
        dataclasses.replace(item, role=item.base, gender="person")
        if not item.role and genders.get(item.base, set()) & {"man", "woman"}
        else item
        for item in found
    ]
    return sorted(found, key=lambda item: item.sequence)


def parse(sequence: str, short_name: str) -> Emoji:
    """Parses a name of the `emoji` package.

    Args:
      sequence: the characters.
      short_name: a name such as ":woman_firefighter_dark_skin_tone:".

    Returns:
      The emoji; role and gender are set if the name begins with a gender.
    """
    name = short_name.strip(":")
    if _FLAG.match(sequence):
        return Emoji(sequence, "flag", (_plain(name),))
    if name.startswith("keycap_"):
        return Emoji(sequence, "keycap", (name.removeprefix("keycap_"),))
    tones = _TONE.findall(name)
    tone_parts = tuple(f"{tone} skin tone" for tone in tones)
    tone = "" if not tones else tones[0] if len(tones) == 1 else "several"
    name = _TONE.sub("", name)
    if several := _SEVERAL.match(name):
        return Emoji(sequence, _plain(several[1]), (*several[2].split("_")[1:], *tone_parts), tone=tone)
    if hair := _HAIR.match(name):
        part = _plain(hair[2])
        return Emoji(sequence, hair[1], (*tone_parts, part), part, hair[1], tone)
    first, _, role = name.partition("_")
    if first in GENDERS and not role.startswith("and_"):
        return Emoji(sequence, _plain(name), tone_parts, _plain(role) or "adult", GENDERS[first], tone)
    return Emoji(sequence, _plain(name), tone_parts, tone=tone)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("“", "").replace("”", "").lower().split())


def split_emoji(items: Iterable[Emoji], shared: Iterable[str], seed: int) -> dict[str, list[Emoji]]:
    """Assigns emoji to the splits.

    Args:
      items: all emoji that can be drawn.
      shared: sequences that share their drawing with another sequence (some flags); they stay in training.
      seed: seed of the choice.

    Returns:
      "heldout": combinations of role, gender and tone that training never sees.
      "validation": a random tenth of the rest, without those that training needs to see a held-out role in its tone.
      "train": all others.
    """
    items, shared = list(items), set(shared)
    tones = collections.defaultdict(lambda: collections.defaultdict(set))
    for item in items:
        if item.role:
            tones[item.role][item.gender].add(item.tone)
    splits: dict[str, list[Emoji]] = {"train": [], "heldout": [], "validation": []}
    for item in items:
        if item.sequence in shared:
            splits["train"].append(item)
        elif item.tone and item.tone == _held_out_tone(item, tones[item.role], seed):
            splits["heldout"].append(item)
        elif zlib.crc32(f"{seed} {item.sequence}".encode()) % 10 == 0:
            splits["validation"].append(item)
        else:
            splits["train"].append(item)
    unseen = {(item.role, item.tone) for item in splits["heldout"]}
    unseen -= {(item.role, item.tone) for item in splits["train"]}
    for item in list(splits["validation"]):
        if (item.role, item.tone) in unseen:
            unseen.remove((item.role, item.tone))
            splits["validation"].remove(item)
            splits["train"].append(item)
    return splits


def _held_out_tone(item: Emoji, tones: dict[str, set[str]], seed: int) -> str | None:
    """Returns the tone that training never sees with this role and gender, or None."""
    complete = [gender for gender in sorted(tones) if tones[gender] >= set(TONES)]
    if not item.role or len(complete) < 2 or item.gender not in complete:
        return None
    # An emoji that faces right is a mirrored one that faces left, so both lose the same tone.
    first = zlib.crc32(f"{seed} {item.role.removesuffix(' facing right')}".encode())
    return TONES[(first + 2 * complete.index(item.gender)) % len(TONES)]
