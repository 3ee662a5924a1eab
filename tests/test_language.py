"""The language rule of CONTRIBUTING.md: phrases that prose, messages and names of this project avoid.

Reads the Markdown files; docstrings, comments, string literals and defined names of every Python file; comments and
messages of shell scripts; and all cells of notebooks. Other code passes.
"""

import io
import json
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# pattern: what to write instead
BANNED = {
    r"beside": "next to, in addition to",
    r"for ever": "forever",
    r"told(?! apart)": "reported, logged, given",
    r"(?:gets?|got|getting) on": "makes progress",
    r"(?:goes|go|going|went|gone) on": "resumes, continues",
    r"anew": "again",
    r"so many": "N, this many",
    r"of (?:its|their|your|one's|his|her) own": "its own, your own",
    r"one's own": "your own",
    r"by (?:itself|themselves)": "alone",
    r"(?:wants?|wanted) (?:an?|the|it|its|no|at|this|that|their|each|all)": "needs",
    r"(?:is|are|was|were|be|been) refused|refuses?": "is rejected, rejects",
    r"pictures?": "image",
    r"(?<![</])(?<!paper's )figures?(?! \d| of the paper| \{|>)": "metric, value",  # <figure> is HTML
    r"where there (?:is|are|was|were) none": "or None",
    r"judges?|judged": "feature extractor, scored",
    r"the other prior's": "the autoregressive prior's, MaskGIT's",
}
_PHRASES = {re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): instead for pattern, instead in BANNED.items()}
# A sentence whose subject is "What …". Questions pass.
_SUBJECT = re.compile(r'(?:^|[.!?] |""")(What\b[^.?!]*)(?:[.!]|"""|$)')

# File: phrases that stay there, with the reason.
ALLOWED = {
    # These are captions of data sets. Other words would be other data.
    "dalle_jax/data/builders/emoji_captions/names.py": {"picture"},
    "dalle_jax/data/builders/shapes_captions/scenes.py": {"picture"},
    # A key that earlier versions stored.
    "tests/data/sources/test_sources.py": {"picture"},
}

_LITERALS = {tokenize.STRING, tokenize.COMMENT}
if hasattr(tokenize, "FSTRING_MIDDLE"):  # from Python 3.12 on
    _LITERALS.add(tokenize.FSTRING_MIDDLE)


def python_prose(source):
    """Yields (line, text) of comments, string literals and defined names; runs of comments are joined."""
    comments, begun, last, defining = [], 0, -1, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if defining:
            yield token.start[0], _words(token.string)
        defining = token.type == tokenize.NAME and token.string in ("def", "class")
        if token.type == tokenize.COMMENT:
            if comments and token.start[0] != last + 1:
                yield begun, " ".join(comments)
                comments = []
            if not comments:
                begun = token.start[0]
            comments.append(token.string.lstrip("# "))
            last = token.start[0]
        elif token.type in _LITERALS and not _is_name(token.string):
            yield token.start[0], token.string
    if comments:
        yield begun, " ".join(comments)


def _is_name(literal):
    """Whether a string literal holds an identifier, a key or a path, and no prose."""
    return re.fullmatch(r"\w*[\"'][\w./:{}*-]*[\"']", literal) is not None


def _words(name):
    """Splits snake_case and CamelCase into words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name)


def shell_prose(source):
    """Yields (line, text) of comments and of quoted strings with a blank in them."""
    for number, line in enumerate(source.splitlines(), 1):
        if comment := re.search(r"(?:^|\s)#\s*(.*)$", line):
            yield number, comment[1]
        for text in re.findall(r"\"([^\"]* [^\"]*)\"", line):
            yield number, text


def notebook_prose(source):
    """Yields (cell, text) of Markdown cells, and of the comments and strings of code cells."""
    for number, cell in enumerate(json.loads(source)["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield number, text
        else:
            code = "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in text.splitlines())
            yield from ((number, found) for _, found in python_prose(code + "\n"))


def markdown_prose(source):
    """Yields (line, text) of paragraphs; link targets, inline code and the code in fenced blocks are no prose."""
    begun, lines, fenced = 1, [], False
    for number, line in enumerate([*source.splitlines(), ""], 1):
        if line.startswith("```"):
            fenced = not fenced
        if fenced:
            line = "".join(line.partition("# ")[1:])
        if not line.strip():
            if lines:
                yield begun, re.sub(r"`[^`]*`|\]\([^()]*\)", "`", " ".join(lines))
            begun, lines = number + 1, []
        else:
            lines.append(line.strip())


READERS = {".py": python_prose, ".sh": shell_prose, ".ipynb": notebook_prose, ".md": markdown_prose}
_FOLDERS = ("configs", "dalle_jax", "docs", "experiments", "tests")


def files():
    """The project's own files."""
    found = [*ROOT.glob("*"), *(path for folder in _FOLDERS for path in (ROOT / folder).rglob("*"))]
    return sorted(path for path in found if path.suffix in READERS and path != pathlib.Path(__file__))


def offences(path):
    """Returns a message for each banned phrase in a file."""
    name, found = str(path.relative_to(ROOT)), []
    allowed = ALLOWED.get(name, ())
    for line, text in READERS[path.suffix](path.read_text()):
        text = " ".join(text.split())
        for pattern, instead in _PHRASES.items():
            for match in pattern.finditer(text):
                found.append((line, match[0], instead))
        for match in _SUBJECT.finditer(text):
            found.append((line, f"{match[1][:30]}…", "begin with the subject"))
    return [f"{name}:{line}: {phrase!r} → {instead}" for line, phrase, instead in found if phrase not in allowed]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_language(path):
    found = offences(path)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text, caught",
    [
        ("# waits for ever", True),
        ('"""Draws pictures."""', True),
        ("# what is\n# drawn a\n# new and by\n# itself", True),
        ('raise ValueError("is refused here")', True),
        ('"""What no training can use is rejected."""', True),
        ("def test_it_is_refused(): ...", True),
        ("class PictureSet: ...", True),
        ("picture = judge(beside)", False),
        ('config["pictures"]', False),
        ("# figure 11 of the paper, at least as many as before", False),
        ('"""Images forever. Say what is missing."""', False),
    ],
)
def test_what_counts(text, caught, tmp_path, monkeypatch):
    monkeypatch.setattr("test_language.ROOT", tmp_path)
    file = tmp_path / "some.py"
    file.write_text(text + "\n")
    assert bool(offences(file)) is caught
