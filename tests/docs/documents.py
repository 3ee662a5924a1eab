"""Reads the project's Markdown: code blocks, commands, links and headings."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[2]
GUIDES = (
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
)  # fmt: skip
DOCUMENTS = [*GUIDES, ROOT / "CHANGELOG.md", *sorted((ROOT / "experiments").glob("*/**/README.md"))]

CODE = ("python", "sh")
NOT_CODE = ("text", "bibtex")
_MARK = re.compile(r"<!-- not run: (.+) -->")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      path, line: the place of its first line, for messages.
      language: the word after the fence, "" without one.
      mark: the reason in the comment `<!-- not run: REASON -->` directly before the block, or None.
      text: what the fences enclose.
    """

    path: pathlib.Path
    line: int
    language: str
    mark: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: pathlib.Path) -> list[Block]:
    """Returns the fenced blocks of a document, in order."""
    found, lines, opened = [], path.read_text().splitlines(), None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        before = [text for text in lines[:opened] if text.strip()]
        mark = _MARK.fullmatch(before[-1].strip()) if before else None
        text = "\n".join(lines[opened + 1 : number]) + "\n"
        found.append(Block(path, opened + 2, lines[opened][3:].strip(), mark and mark[1], text))
        opened = None
    assert opened is None, f"{path}: a block is not closed"
    return found


def commands(block: Block) -> list[list[str]]:
    """Returns the commands of a shell block as words; comments, continued lines and `&&` are resolved."""
    words = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    found = []
    for line in words:
        found.append([])
        for word in line:
            if word == "&&":
                found.append([])
            else:
                found[-1].append(word)
    return [command for command in found if command]


def prose(path: pathlib.Path) -> str:
    """Returns a document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(path: pathlib.Path) -> list[str]:
    """Returns the inline code of a document."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def links(path: pathlib.Path) -> list[str]:
    """Returns the targets of all links and images of a document."""
    return re.findall(r"\]\(([^()\s]+)\)", prose(path))


def anchors(path: pathlib.Path) -> set[str]:
    """Returns the anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
