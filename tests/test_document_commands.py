"""What the documents tell a reader to type exists in the command line."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from blockvirt.cli.main import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def named(path: Path) -> str:
    """The path as people write it."""
    return str(path.relative_to(ROOT))


def commands_in(document: Path) -> Iterator[list[str]]:
    """The words of each blockvirt command in code, inline or in a shell block; optional parts in brackets left out."""
    text = document.read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(
        r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).replace("\n", " ")
    )
    for line in lines:
        if match := re.match(r"(?:\S*/)?blockvirt (.*)", line):
            yield shlex.split(re.sub(r"\[[^]]*\]|#.*|\.\.\.", " ", match[1]))


def check_command(words: list[str]) -> str:
    """Return what is wrong with a command by the command line's own tree; nothing if it could be typed."""
    command: click.Command = cli
    rest = iter(words)
    for word in rest:
        if word == "|":
            break  # alternatives follow; the first is enough
        if word.startswith("-"):
            name = word.split("=")[0]
            options = [param for param in command.params if name in (*param.opts, *param.secondary_opts)]
            if not options and name != "--help":
                return f"{command.name} has no option {name}"
            if options and isinstance(options[0], click.Option) and not options[0].is_flag and "=" not in word:
                next(rest, None)
        elif isinstance(command, click.Group):
            found = command.get_command(click.Context(command), word)
            if found is None:
                return f"{command.name} has no command {word}"
            command = found
    return ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_in_documents_exist(document: Path) -> None:
    """A command or an option that was renamed is renamed in the documents too."""
    wrong = {shlex.join(words): problem for words in commands_in(document) if (problem := check_command(words))}
    assert not wrong


def test_wrong_commands_are_found() -> None:
    """The check above is not blind."""
    assert check_command(["-s", "var", "volume", "create", "v", "--size", "1GiB"]) == ""
    assert check_command(["volume", "make", "v"]) != ""
    assert check_command(["volume", "create", "v", "--colour", "red"]) != ""
