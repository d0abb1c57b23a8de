"""The entry point: global options, the groups of commands, and one place where failures become words and exit codes."""

import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from itertools import pairwise

import click

from blockvirt import __version__
from blockvirt.cli.client import EXIT_FAILED
from blockvirt.cli.context import Context, default_state_dir, report
from blockvirt.errors import BlockvirtError

EXIT_CODES = """\b
Exit codes:
  0  done
  1  the daemon refused, or failed
  2  wrong usage
  3  no daemon answers
  4  there is no such thing
  5  a conflict: it exists, is in use, or was changed meanwhile
  6  not enough space
('check' has its own, see there.)"""


def _volume() -> click.Command:
    from blockvirt.cli.volumes import volume_group

    return volume_group


def _snapshot() -> click.Command:
    from blockvirt.cli.snapshots import snapshot_group

    return snapshot_group


def _clone() -> click.Command:
    from blockvirt.cli.groups import clone_group

    return clone_group


def _group() -> click.Command:
    from blockvirt.cli.groups import group_group

    return group_group


def _schedule() -> click.Command:
    from blockvirt.cli.schedules import schedule_group

    return schedule_group


def _job() -> click.Command:
    from blockvirt.cli.jobs import job_group

    return job_group


def _scrub() -> click.Command:
    from blockvirt.cli.scrub import scrub_group

    return scrub_group


def _trash() -> click.Command:
    from blockvirt.cli.trash import trash_group

    return trash_group


def _host() -> click.Command:
    from blockvirt.cli.hosts import host_group

    return host_group


def _lun() -> click.Command:
    from blockvirt.cli.hosts import lun_group

    return lun_group


def _device() -> click.Command:
    from blockvirt.cli.pool import device_group

    return device_group


def _pool() -> click.Command:
    from blockvirt.cli.pool import pool_group

    return pool_group


def _session() -> click.Command:
    from blockvirt.cli.sessions import session_group

    return session_group


def _serve() -> click.Command:
    from blockvirt.cli.process import serve

    return serve


def _check() -> click.Command:
    from blockvirt.cli.process import check

    return check


def _status() -> click.Command:
    from blockvirt.cli.process import status

    return status


class Commands(MutableMapping[str, click.Command]):
    """Commands by name, each imported when it is asked for: a listing waits for none of the others."""

    def __init__(self, importers: Mapping[str, Callable[[], click.Command]]) -> None:
        self._importers = dict(importers)

    def __getitem__(self, name: str) -> click.Command:
        return self._importers[name]()

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._importers[name] = lambda: command

    def __delitem__(self, name: str) -> None:
        del self._importers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._importers)

    def __len__(self) -> int:
        return len(self._importers)


COMMANDS = Commands(
    {
        "volume": _volume,
        "snapshot": _snapshot,
        "clone": _clone,
        "group": _group,
        "schedule": _schedule,
        "job": _job,
        "scrub": _scrub,
        "trash": _trash,
        "host": _host,
        "lun": _lun,
        "device": _device,
        "pool": _pool,
        "session": _session,
        "serve": _serve,
        "check": _check,
        "status": _status,
    }
)


@click.group(commands=COMMANDS, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-s",
    "--state-dir",
    envvar="BLOCKVIRT_STATE_DIR",
    default=default_state_dir,
    type=click.Path(file_okay=False),
    help="Where the daemon keeps its state and its sockets; /var/lib/blockvirt for root.",
)
@click.option(
    "--url",
    envvar="BLOCKVIRT_URL",
    help="A daemon by TCP, such as http://127.0.0.1:8470, instead of the state directory's socket.",
)
@click.version_option(__version__, prog_name="blockvirt")
@click.pass_context
def cli(context: click.Context, state_dir: str, url: str | None) -> None:
    """Thin copy-on-write volumes for virtual machines, served over NBD."""
    context.obj = Context(state_dir, url)


def main() -> None:
    """Run the command line and exit."""
    try:
        code = cli.main(standalone_mode=False)
    except BlockvirtError as error:
        code = report(error, as_json=_wants_json(sys.argv[1:]))
    except click.ClickException as error:
        error.show()
        # 'check' says 2 for "corrupt": a typing mistake must not look like that.
        context = getattr(error, "ctx", None)
        code = EXIT_FAILED if context is not None and context.command.name == "check" else error.exit_code
    except click.exceptions.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


def _wants_json(words: list[str]) -> bool:
    return any(word in ("-ojson", "--output=json") for word in words) or any(
        option in ("-o", "--output") and value == "json" for option, value in pairwise(words)
    )
