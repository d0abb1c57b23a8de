"""``blockvirt snapshot export`` and ``import``: snapshots as streams, through pipes and files, to another machine."""

import os
import sys
import time
from collections.abc import Iterator

import click

from blockvirt.cli.client import Refused, segment
from blockvirt.cli.connection import NotHttp
from blockvirt.cli.context import Context, pass_context
from blockvirt.cli.output import Column, output_option, show_rows
from blockvirt.cli.stream_meter import Progress
from blockvirt.errors import BlockvirtError

IMPORTED = (
    Column("SNAPSHOT", "snapshot"),
    Column("CREATED", "created_at", "time"),
    Column("SIZE", "size_bytes", "size"),
    Column("MAPPED", "mapped_bytes", "size"),
    Column("ID", "id"),
)
_BLOCK_BYTES = 64 * 1024
_PICTURE_S = 0.5


class StreamCut(BlockvirtError):
    """The daemon could not send a stream to its end."""

    code, http_status = "stream-cut", 500


@click.command("export")
@click.argument("snapshot")
@click.option("--since", metavar="BASE", help="Only what differs from this snapshot, which the receiver must have.")
@pass_context
def export(context: Context, snapshot: str, since: str | None) -> None:
    """Write a snapshot to standard output as a stream, for 'snapshot import' here or on another machine.

    With --since it holds what differs from BASE, without it everything. A stream that breaks off is refused when it is
    imported, so a file that is not complete does no harm.
    """
    if sys.stdout.isatty():
        raise click.UsageError("a stream is not for a terminal: send it to a file or through a pipe")
    query = {} if since is None else {"since": since}
    blocks = context.client.take_stream(f"/v1/snapshots/{segment(snapshot)}/stream", query)
    try:
        for block in _watched(blocks):
            _write(block)
        _write(b"")
    except (NotHttp, TimeoutError, ConnectionResetError) as error:
        raise StreamCut(
            f"the stream of {snapshot} broke off",
            cause=f"{error}; the daemon's log says why",
            correction="what was written is only a part, which no import takes: export it again",
        ) from error


def _write(block: bytes) -> None:
    """Write to standard output, all of it for an empty block; raises ClickException where it cannot take it."""
    try:
        sys.stdout.buffer.write(block)
        if not block:
            sys.stdout.flush()
    except BrokenPipeError:  # who reads has gone: it says itself why
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered must not fail again at exit
        raise click.ClickException(f"the stream is not complete: {error.strerror}") from error


@click.command("import")
@click.argument("volume")
@output_option
@pass_context
def import_(context: Context, volume: str, output: str) -> None:
    """Read streams from standard input and make their snapshots, with the names they had.

    A whole snapshot becomes a new VOLUME; what differs from a base continues the VOLUME that holds exactly that base.
    A stream that is cut, altered or interrupted leaves the volume as it was; those before it stay.
    """
    if sys.stdin.isatty():
        raise click.UsageError("a stream is not typed: have it come from a file or through a pipe")
    try:
        made = context.client.send_stream(f"/v1/volumes/{segment(volume)}/import", _watched(_input()))["snapshots"]
    except Refused as refusal:
        kept = refusal.problem.get("details", {}).get("imported", ())
        if kept and output != "json":
            click.echo(f"imported before that: {', '.join(f'{volume}@{name}' for name in kept)}", err=True)
        raise
    rows = made if output == "json" else [each | {"snapshot": f"{each['volume']}@{each['name']}"} for each in made]
    show_rows(rows, IMPORTED, output)


def _input() -> Iterator[bytes]:
    while block := os.read(sys.stdin.fileno(), _BLOCK_BYTES):
        yield block


def _watched(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass blocks on, with a line of progress on stderr where that is a terminal."""
    if not sys.stderr.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        yield from blocks
        return
    progress, due_s = Progress(), 0.0
    try:
        for block in blocks:
            progress.meter.feed(block)
            if (now_s := time.monotonic()) >= due_s:
                due_s = now_s + _PICTURE_S
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
                click.echo(f"\r{progress.line(now_s, columns - 1)}\x1b[K", nl=False, err=True)
            yield block
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)
