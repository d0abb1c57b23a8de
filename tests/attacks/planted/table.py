"""`python -m tests.attacks.planted.table`: write the table of planted bugs into docs/testing.md, at its end."""

from pathlib import Path

from tests.attacks.planted.bugs import all_bugs

DOCUMENT = Path(__file__).parents[3] / "docs" / "testing.md"
HEADING = "## Planted bugs\n"


def section() -> str:
    """Return the section on planted bugs, to the end of the document."""
    rows = "".join(f"| {bug.attack} | `{bug.name}` | {bug.what} | {', '.join(bug.breaks)} |\n" for bug in all_bugs())
    return f"""{HEADING}
An attack that does not find a bug proves nothing, so bugs are planted: patches of the product that only a test can
switch on (`tests/attacks/planted`). Each must be caught by its attack; `make test` plants those that are caught
quickly, `make prove` all of them, and `python -m tests.attacks --bugs NAME` one.

| caught by | planted bug | what the code does wrong then | breaks |
|---|---|---|---|
{rows}"""


def main() -> None:
    """Rewrite the document."""
    before = DOCUMENT.read_text().partition(HEADING)[0]
    DOCUMENT.write_text(before.rstrip() + "\n\n" + section())


if __name__ == "__main__":
    main()
