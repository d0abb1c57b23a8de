"""The entry point: global options, the groups of commands, and one place where failures become words and exit codes."""

import sys
from itertools import pairwise

import click

from blockvirt import __version__
from blockvirt.cli.client import EXIT_FAILED
from blockvirt.cli.context import Context, default_state_dir, report
from blockvirt.cli.hosts import host_group, lun_group
from blockvirt.cli.pool import device_group, pool_group
from blockvirt.cli.process import check, serve, status
from blockvirt.cli.sessions import session_group
from blockvirt.cli.volumes import volume_group
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


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
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


for command in (volume_group, host_group, lun_group, device_group, pool_group, session_group, serve, check, status):
    cli.add_command(command)


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
    except BrokenPipeError:  # 'blockvirt volume list | head'
        sys.stderr.close()
        code = 141
    sys.exit(code if isinstance(code, int) else 0)


def _wants_json(words: list[str]) -> bool:
    return any(word in ("-ojson", "--output=json") for word in words) or any(
        option in ("-o", "--output") and value == "json" for option, value in pairwise(words)
    )
