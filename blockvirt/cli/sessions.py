"""``blockvirt session``: who uses what, and ending it."""

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, pass_context
from blockvirt.cli.output import Column, output_option, show_one, show_rows
from blockvirt.errors import InvalidRequest

SESSIONS = (
    Column("ID", "id"),
    Column("EXPORT", "export"),
    Column("VOLUME", "volume"),
    Column("PEER", "peer"),
    Column("MODE", "mode"),
    Column("SINCE", "since"),
    Column("READ", "bytes_read", "size"),
    Column("WRITTEN", "bytes_written", "size"),
    Column("REQUESTS", "requests", "number"),
)


@click.group("session")
def session_group() -> None:
    """Look at open NBD sessions, and drop them."""


@session_group.command("list")
@click.option("--volume", help="Only those of one volume.")
@output_option
@pass_context
def list_(context: Context, volume: str | None, output: str) -> None:
    """List the open sessions."""
    query = {"volume": volume} if volume is not None else None
    show_rows(context.client.call("GET", "/v1/sessions", query=query)["sessions"], SESSIONS, output)


@session_group.command("drop")
@click.argument("session", required=False)
@click.option("--volume", help="All sessions of one volume.")
@click.option("--all", "everything", is_flag=True, help="All sessions of the daemon.")
@output_option
@pass_context
def drop(context: Context, session: str | None, volume: str | None, everything: bool, output: str) -> None:
    """Drop SESSION, those of a volume, or all. Clients with a reconnect-delay come back."""
    if (session is not None) + (volume is not None) + everything != 1:
        raise InvalidRequest("which sessions is not clear", correction="give one of SESSION, --volume or --all")
    path = "/v1/sessions" if session is None else f"/v1/sessions/{segment(session)}"
    query = {"volume": volume} if volume is not None else None
    show_one(context.client.call("DELETE", path, query=query), (Column("DROPPED", "dropped", "number"),), output)
