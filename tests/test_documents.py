"""The documents: what they point at exists, and what they tell a reader to type can be typed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_changelog_is_open_for_the_next_release() -> None:
    """What changes for users is written down with the change."""
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


def named(path: Path) -> str:
    """The path as people write it."""
    return str(path.relative_to(ROOT))


def headings(document: Path) -> set[str]:
    """The anchors that a Markdown viewer makes from the headings."""
    found = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_somewhere(document: Path) -> None:
    """A pointer to a file or a heading that is not there is worse than none."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        goal = (document.parent / name).resolve() if name else document
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in headings(goal)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_make_targets_in_documents_exist(document: Path) -> None:
    """What a reader is told to type can be typed."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = set(re.findall(r"`make ([a-z-]+)", document.read_text()))
    said |= set(re.findall(r"^make ([a-z-]+)", document.read_text(), re.MULTILINE))
    assert said <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_tests_named_in_documents_exist(document: Path) -> None:
    """A promise that points at its test points at a real one: `tests/path.py::name`, or `name` after such a path."""
    missing = []
    for path, names in re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)?`(?:, `test_\w+`)*)", document.read_text()):
        text = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        wanted = re.findall(r"test_\w+", names)
        missing += [f"{path}::{name}" for name in wanted if f"def {name}(" not in text]
        if not text:
            missing.append(path)
    assert not missing
