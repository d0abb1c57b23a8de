"""docs/cli.md names every command and every option. (That it names no others is tested for all documents.)"""

from collections.abc import Iterator

import click
import pytest

from blockvirt.cli.main import cli
from tests.cli.conftest import ROOT

DOCUMENT = (ROOT / "docs" / "cli.md").read_text()
EVERYWHERE = {"--output", "--help", "--version"}


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with its whole name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


COMMANDS = dict(commands(cli, "blockvirt"))


def test_every_command_goes_by_its_own_name() -> None:
    """Commands are imported when they are asked for, by a name that stands beside them in a table."""
    assert len(cli.commands) == 16
    assert {name: command.name for name, command in cli.commands.items()} == {name: name for name in cli.commands}
    assert {"blockvirt serve", "blockvirt volume list", "blockvirt session drop"} < set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    rows = [line for line in DOCUMENT.splitlines() if line.startswith((f"| `{name} ", f"| `{name}`"))]
    assert len(rows) == 1
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            longest = max(parameter.opts, key=len)
            assert longest in EVERYWHERE or f"`{longest}" in rows[0], longest
    assert COMMANDS[name].help, "and has help of its own"
