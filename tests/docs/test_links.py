"""Links and paths in the documents lead somewhere."""

import re

import pytest
from documents import DOCUMENTS, ROOT, anchors, links, prose, spans

_PATHS = re.compile(r"(?:dalle_jax|configs|experiments|tests|docs)/[\w./-]*\w/?")
_CONFIG = re.compile(r"(configs/\w+\.py)(?::[\w.]+)?")
name = lambda path: str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_resolve(path):
    for target in links(path):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name(path)}: {target} does not exist"
        assert not anchor or anchor in anchors(found), f"{name(path)}: {target}: there is no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_paths_in_inline_code_exist(path):
    for span in spans(path):
        if _PATHS.fullmatch(span) or _CONFIG.fullmatch(span):
            assert (ROOT / span.partition(":")[0]).exists(), f"{name(path)}: `{span}` does not exist"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_names_are_in_the_files_that_documents_name(path):
    """`NAME` in `FILE`: the file holds the name."""
    for word, file in re.findall(r"`(\w+)` in\s+`(dalle_jax/[\w./]+\.py)`", prose(path)):
        assert re.search(rf"\b{word}\b", (ROOT / file).read_text()), f"{name(path)}: {file} has no {word}"


def test_every_guide_is_linked_from_the_readme():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert set((ROOT / "docs").glob("*.md")) <= linked


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
