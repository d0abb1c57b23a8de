"""``blockvirt snapshot``: take, list, show, hold, delete. Going back, cloning and comparing are in ``snapshot_use``."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import click

from blockvirt.cli.changes import diff
from blockvirt.cli.client import Client, segment
from blockvirt.cli.context import Context, parse_labels, pass_context
from blockvirt.cli.groups import show_group, take_group
from blockvirt.cli.job_progress import wait_for
from blockvirt.cli.output import Column, output_option, show_one, show_rows, size_for_people
from blockvirt.cli.snapshot_tree import tree_rows
from blockvirt.cli.snapshot_use import clone, revert
from blockvirt.cli.streams import export, import_
from blockvirt.errors import InvalidRequest

TREE = (
    Column("NAME", "drawn"),
    Column("CREATED", "created_at", "time"),
    Column("SIZE", "size_bytes", "size"),
    Column("MAPPED", "mapped_bytes", "size"),
    Column("EXCLUSIVE", "exclusive_bytes", "size"),
    Column("HOLDS", "holds"),
    Column("CLONES", "clones"),
)
FLAT = (
    Column("VOLUME", "volume"),
    Column("NAME", "name"),
    *TREE[1:],
    Column("ID", "id"),
    Column("PARENT", "parent_id"),
    Column("LABELS", "labels"),
)
SHOW = (
    Column("SNAPSHOT", "snapshot"),
    Column("ID", "id"),
    Column("CREATED", "created_at"),
    *TREE[2:],
    Column("LABELS", "labels"),
    Column("SESSIONS", "sessions", "number"),
    Column("PARENT", "parent_id"),
    Column("GROUP", "group_id"),
    Column("SCHEDULE", "schedule_id"),
    Column("REVISION", "revision", "number"),
    Column("NBD URI", "nbd_uris"),
)
DELETED = (
    Column("SNAPSHOT", "snapshot"),
    Column("DELETED", "deleted"),
    Column("FREES ALONE", "exclusive_bytes", "size"),
    Column("FREES TOGETHER", "freed_bytes", "size"),
    Column("HOLDS", "holds"),
    Column("SESSIONS", "sessions", "number"),
)
_LABEL = click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be repeated.")


@click.group("snapshot")
def snapshot_group() -> None:
    """Take snapshots of volumes, and use them. A snapshot is called VOLUME@NAME; its id will do too."""


for _command in (revert, clone, diff, export, import_):
    snapshot_group.add_command(_command)


@snapshot_group.command("create")
@click.argument("snapshots", nargs=-1, required=True, metavar="VOLUME[@NAME]...")
@_LABEL
@output_option
@pass_context
def create(context: Context, snapshots: tuple[str, ...], labels: tuple[str, ...], output: str) -> None:
    """Take a snapshot of a volume, in use or not; of several volumes in one instant, or of none.

    Without NAME one is made up. Snapshots of one instant share their name.
    """
    wanted = [text.partition("@")[::2] for text in snapshots]
    names = {name for _, name in wanted}
    if len(names) > 1:
        raise InvalidRequest(
            f"snapshots of one instant share their name, and these have {len(names)}",
            correction="give all the same NAME, or take them one by one",
        )
    name, given = names.pop(), parse_labels(labels)
    if len(wanted) > 1:
        show_group(take_group(context, [volume for volume, _ in wanted], name, given), output)
        return
    body: dict[str, Any] = {"volume": wanted[0][0], "labels": given}
    if "@" in snapshots[0]:
        body["name"] = name
    _show(context.client.call("POST", "/v1/snapshots", body), output)


@snapshot_group.command("list")
@click.argument("volume", required=False)
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only those with it; may be repeated.")
@output_option
@pass_context
def list_(context: Context, volume: str | None, labels: tuple[str, ...], output: str) -> None:
    """List the snapshots of VOLUME, or of all volumes; the table is a tree, with the head where the volume is now.

    What led to the head is one column; what a revert left behind hangs beside it. EXCLUSIVE is what deleting that
    snapshot alone would free.
    """
    parse_labels(labels)
    query: dict[str, Any] = {"label": list(labels)} if labels else {}
    if volume is not None:
        query["volume"] = volume
    pages = _warned(context.client.whole_pages("/v1/snapshots", query))
    if output != "table":
        show_rows((each for page in pages for each in page["snapshots"]), FLAT, output)
        return
    found: list[dict[str, Any]] = []
    heads: dict[str, str] = {}
    for page in pages:
        found += page["snapshots"]
        if volume is not None and page["snapshots"]:
            heads[page["snapshots"][0]["volume_id"]] = page.get("head_parent_id") or ""
    show_rows(_trees(context.client, found, heads), TREE, output, folds=False)


def _warned(pages: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Pass pages on, and say on stderr behind the last one what is missing from them."""
    damaged: list[str] = []
    for page in pages:
        damaged += page.get("damaged", ())
        yield page
    if damaged:
        names = ", ".join(damaged[:5]) + (f" and {len(damaged) - 5} more" if len(damaged) > 5 else "")
        click.echo(f"left out, because their records are damaged ('blockvirt check' says more): {names}", err=True)


def _trees(client: Client, found: list[dict[str, Any]], heads: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all trees; ``heads`` are the heads' parents by volume id, asked for where they are missing."""
    volumes = [(key, list(group)) for key, group in groupby(found, lambda each: (each["volume"], each["volume_id"]))]
    for (name, volume_id), snapshots in sorted(volumes, key=lambda each: each[0]):
        if volume_id not in heads:
            page = client.call("GET", "/v1/snapshots", query={"volume": volume_id, "limit": 1})
            heads[volume_id] = page.get("head_parent_id") or ""
        yield from tree_rows(name, snapshots, heads[volume_id])


@snapshot_group.command("show")
@click.argument("snapshot")
@output_option
@pass_context
def show(context: Context, snapshot: str, output: str) -> None:
    """Show a snapshot, and the NBD URIs of its read-only export."""
    _show(context.client.call("GET", f"/v1/snapshots/{segment(snapshot)}"), output)


@snapshot_group.command("delete")
@click.argument("snapshots", nargs=-1, required=True, metavar="SNAPSHOT...")
@click.option(
    "--force", is_flag=True, help="Also while sessions read one, and if one is damaged. Never while one is held."
)
@click.option("--dry-run", is_flag=True, help="Only say what would go, and what that frees.")
@click.option("--wait", is_flag=True, help="Wait until the space is free, with a bar on a terminal.")
@output_option
@pass_context
def delete(context: Context, snapshots: tuple[str, ...], force: bool, dry_run: bool, wait: bool, output: str) -> None:
    """Delete snapshots, all or none. Clones and younger snapshots are not in the way.

    Their bytes come back in the background; what several share is free when all of them are gone.
    """
    body = {"snapshots": list(snapshots), "force": force, "dry_run": dry_run}
    gone = context.client.call("POST", "/v1/snapshots/delete", body)
    if wait:
        wait_for(context.client, gone["job_ids"])
    if output == "json":
        show_one(gone, (), output)
        return
    rows = [
        each
        | {
            "snapshot": _full_name(each),
            "deleted": gone["deleted"],
            "freed_bytes": gone["freed_bytes"],
        }
        for each in gone["snapshots"]
    ]
    columns = [column for column in DELETED if output == "csv" or column.key != "freed_bytes"]
    verb = "free" if gone["deleted"] else "would free"
    footer = [f"together they {verb} {size_for_people(gone['freed_bytes'])}"]
    show_rows(rows, columns, output, footer=[*footer, *(f"in the way: {each}" for each in gone["obstacles"])])


@snapshot_group.command("hold")
@click.argument("snapshot")
@click.option("--tag", default="manual", show_default=True, help="Each tag holds by itself.")
@output_option
@pass_context
def hold(context: Context, snapshot: str, tag: str, output: str) -> None:
    """Keep a snapshot, and with it its volume, from being deleted until the tag is released."""
    _show(context.client.call("POST", f"/v1/snapshots/{segment(snapshot)}/hold", {"tag": tag}), output)


@snapshot_group.command("release")
@click.argument("snapshot")
@click.option("--tag", default="manual", show_default=True, help="The tag that it is held by.")
@output_option
@pass_context
def release(context: Context, snapshot: str, tag: str, output: str) -> None:
    """Take a hold away; one that is not there is no error."""
    _show(context.client.call("POST", f"/v1/snapshots/{segment(snapshot)}/release", {"tag": tag}), output)


def _full_name(snapshot: dict[str, Any]) -> str:
    return f"{snapshot['volume']}@{snapshot['name']}"


def _show(snapshot: dict[str, Any], output: str) -> None:
    show_one(snapshot if output == "json" else snapshot | {"snapshot": _full_name(snapshot)}, SHOW, output)
