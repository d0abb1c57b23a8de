"""``blockvirt clone`` and ``blockvirt group``: cutting a clone loose, and snapshots of several volumes at once."""

from typing import Any

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, parse_labels, pass_context
from blockvirt.cli.job_progress import wait_for
from blockvirt.cli.output import Column, output_option, show_one, show_rows

JOB = (
    Column("JOB", "id"),
    Column("KIND", "kind"),
    Column("SUBJECT", "subject"),
    Column("STATE", "state"),
)
SNAPSHOTS = (
    Column("SNAPSHOT", "snapshot"),
    Column("ID", "id"),
    Column("CREATED", "created_at", "time"),
    Column("SIZE", "size_bytes", "size"),
    Column("GROUP", "group_id"),
)


@click.group("clone")
def clone_group() -> None:
    """Look after clones; 'blockvirt snapshot clone' makes them."""


@clone_group.command("flatten")
@click.argument("volume")
@click.option("--wait", is_flag=True, help="Wait until it is done, with a bar on a terminal.")
@output_option
@pass_context
def flatten(context: Context, volume: str, wait: bool, output: str) -> None:
    """Copy what a clone shares with its origin, in the background, so that it needs that no more.

    It can be in use meanwhile. 'blockvirt job' shows, pauses and cancels it; what is copied stays copied.
    """
    job = context.client.call("POST", f"/v1/volumes/{segment(volume)}/flatten")
    show_one(wait_for(context.client, [job["id"]])[0] if wait else job, JOB, output)


@click.group("group")
def group_group() -> None:
    """Treat several volumes as one."""


@group_group.command("snapshot")
@click.argument("name")
@click.argument("volumes", nargs=-1, required=True, metavar="VOLUME...")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@output_option
@pass_context
def snapshot(context: Context, name: str, volumes: tuple[str, ...], labels: tuple[str, ...], output: str) -> None:
    """Take a snapshot called NAME of each VOLUME, all in one instant, or none."""
    show_group(take_group(context, list(volumes), name, parse_labels(labels)), output)


def take_group(context: Context, volumes: list[str], name: str, labels: dict[str, str]) -> dict[str, Any]:
    """Take snapshots of one instant and return the API's answer; an empty ``name`` is made up there."""
    body: dict[str, Any] = {"volumes": volumes, "labels": labels}
    if name:
        body["name"] = name
    return context.client.call("POST", "/v1/snapshots/group", body)


def show_group(group: dict[str, Any], output: str) -> None:
    """Print the snapshots of a group; as JSON the API's answer."""
    if output == "json":
        show_one(group, (), output)
    else:
        rows = [each | {"snapshot": f"{each['volume']}@{each['name']}"} for each in group["snapshots"]]
        show_rows(rows, SNAPSHOTS, output)
