"""What every command knows: the state directory, the daemon it talks to, and how a failure is said."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click

from blockvirt.cli.client import EXIT_FAILED, EXIT_UNREACHABLE, Client, Refused, Unreachable
from blockvirt.errors import BlockvirtError, InvalidRequest

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Context:
    """The global options of one run."""

    state_dir: str
    url: str | None
    _client: Client | None = field(default=None)

    @property
    def client(self) -> Client:
        """The daemon, connected at the first request."""
        if self._client is None:
            self._client = Client(self.state_dir, self.url)
        return self._client


pass_context = click.make_pass_decorator(Context)


def default_state_dir() -> str:
    """Return where the daemon keeps its state if nobody says: the system's place for root, the user's otherwise."""
    if os.geteuid() == 0:
        return "/var/lib/blockvirt"
    # os.path: pathlib brings urllib and ipaddress along, 3 ms of every command.
    return os.path.join(os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share"), "blockvirt")


def report(error: BlockvirtError, *, as_json: bool) -> int:
    """Say on stderr what happened, why, and what to do; return the exit code."""
    if as_json:
        problem = dict(error.problem) if isinstance(error, Refused) else {"code": error.code, "detail": error.message}
        if not isinstance(error, Refused):
            problem |= {"cause": error.cause, "correction": error.correction, "details": error.details}
        print(json.dumps(problem), file=sys.stderr)
    else:
        print(f"blockvirt: {error.message}", file=sys.stderr)
        if error.cause:
            print(f"  why: {error.cause}", file=sys.stderr)
        if error.correction:
            print(f"  do:  {error.correction}", file=sys.stderr)
    if isinstance(error, Refused):
        return error.exit_code
    return EXIT_UNREACHABLE if isinstance(error, Unreachable) else EXIT_FAILED


def parse_labels(given: tuple[str, ...]) -> dict[str, str]:
    """Return labels from KEY=VALUE words; raises InvalidRequest."""
    labels = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InvalidRequest(f"{text!r} is not a label", correction="write KEY=VALUE")
        labels[key] = value
    return labels


def size_given(text: str) -> int | str:
    """Return a size as the API takes it: on a command line a bare number can only be bytes."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 20 else text
