"""``blockvirt trash``: deleted volumes, until their deadline."""

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, pass_context
from blockvirt.cli.job_progress import wait_for
from blockvirt.cli.output import Column, output_option, show_one, show_rows
from blockvirt.cli.volume_view import show_volume

LIST = (
    Column("NAME", "name"),
    Column("ID", "id"),
    Column("SIZE", "size_bytes", "size"),
    Column("SNAPSHOTS", "snapshots", "number"),
    Column("DELETED", "trashed_at", "time"),
    Column("PURGED AT", "purge_at", "time"),
)
WOULD_GO = (
    Column("NAME", "name"),
    Column("ID", "id"),
    Column("SIZE", "size_bytes", "size"),
    Column("SNAPSHOTS", "snapshots", "number"),
    Column("WOULD FREE", "freed_bytes", "size"),
)
JOB = (
    Column("JOB", "id"),
    Column("KIND", "kind"),
    Column("SUBJECT", "subject"),
    Column("STATE", "state"),
)


@click.group("trash")
def trash_group() -> None:
    """Look into the trash, bring volumes back, or let go of them for good."""


@trash_group.command("list")
@output_option
@pass_context
def list_(context: Context, output: str) -> None:
    """List the volumes in the trash; what goes first comes first."""
    show_rows(context.client.pages("/v1/trash", "volumes"), LIST, output)


@trash_group.command("restore")
@click.argument("volume")
@click.option("--name", metavar="NEW", help="Under another name: the old one may be in use by now.")
@output_option
@pass_context
def restore(context: Context, volume: str, name: str | None, output: str) -> None:
    """Bring a volume back with its snapshots, by id, or by name if just one in the trash was called so."""
    body = {"name": name} if name is not None else {}
    show_volume(context.client.call("POST", f"/v1/trash/{segment(volume)}/restore", body), output)


@trash_group.command("purge")
@click.argument("volume")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and what that frees.")
@click.option("--wait", is_flag=True, help="Wait until the space is free, with a bar on a terminal.")
@output_option
@pass_context
def purge(context: Context, volume: str, dry_run: bool, wait: bool, output: str) -> None:
    """Delete a volume in the trash for good, with its snapshots. Its space comes back in the background."""
    path = f"/v1/trash/{segment(volume)}"
    if dry_run:
        would_go = context.client.call("DELETE", path, query={"dry_run": "true"})
        show_one(would_go if output == "json" else would_go | would_go["volume"], WOULD_GO, output)
        return
    job = context.client.call("DELETE", path)
    show_one(wait_for(context.client, [job["id"]])[0] if wait else job, JOB, output)
