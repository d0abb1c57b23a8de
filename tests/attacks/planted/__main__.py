"""`python -m tests.attacks.planted BUG ARGUMENTS...`: blockvirt with a planted bug, for attacks on a real daemon."""

import sys

import pytest

from tests.attacks.planted.bugs import bug_named


def main() -> None:
    """Plant the bug that the first argument names, then be blockvirt."""
    bug = bug_named(sys.argv.pop(1)) if len(sys.argv) > 1 else sys.exit(__doc__)
    bug.plant(pytest.MonkeyPatch())
    from blockvirt.cli.main import main as blockvirt

    sys.argv[0] = "blockvirt"
    blockvirt()


if __name__ == "__main__":
    main()
