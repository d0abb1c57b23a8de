"""``blockvirt volume``: allocate, list, show, grow, rename, delete."""

from collections.abc import Sequence
from typing import Any

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, parse_labels, pass_context, size_given
from blockvirt.cli.job_progress import wait_for
from blockvirt.cli.output import Column, output_option, show_rows, size_for_people, to_the_second
from blockvirt.cli.volume_view import show_volume
from blockvirt.errors import BlockvirtError

LIST = (
    Column("NAME", "name"),
    Column("SIZE", "size_bytes", "size"),
    Column("MAPPED", "mapped_bytes", "size"),
    Column("STATE", "state"),
    Column("SESSIONS", "sessions", "number"),
    Column("UNITS", "units"),
    Column("LABELS", "labels"),
)
DELETED = (
    Column("NAME", "name"),
    Column("DELETED", "deleted"),
    Column("SIZE", "size_bytes", "size"),
    Column("FREES", "freed_bytes", "size"),
    Column("SNAPSHOTS", "snapshots", "number"),
    Column("IN TRASH UNTIL", "purge_at", "time"),
    Column("NEEDS FORCE BECAUSE", "obstacles"),
)


@click.group("volume")
def volume_group() -> None:
    """Allocate and look after volumes."""


@volume_group.command("create")
@click.argument("name", required=False)
@click.option("--size", required=True, help="Such as 10GiB, 512MiB, 2TB; a bare number is bytes.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@click.option("--device", "devices", multiple=True, metavar="NAME", help="Place it on this device; may be repeated.")
@click.option(
    "--device-label", "device_labels", multiple=True, metavar="KEY=VALUE", help="Place it on devices with this label."
)
@output_option
@pass_context
def create(
    context: Context,
    name: str | None,
    size: str,
    labels: tuple[str, ...],
    devices: tuple[str, ...],
    device_labels: tuple[str, ...],
    output: str,
) -> None:
    """Create a volume; without NAME one is made up.

    The same command again is no error: it shows the volume that is there.
    """
    body: dict[str, Any] = {"size": size_given(size), "labels": parse_labels(labels)}
    if name is not None:
        body["name"] = name
    if devices or device_labels:
        body["placement"] = {"devices": list(devices), "labels": parse_labels(device_labels)}
    show_volume(context.client.call("POST", "/v1/volumes", body), output)


@volume_group.command("list")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only those with it; may be repeated.")
@output_option
@pass_context
def list_(context: Context, labels: tuple[str, ...], output: str) -> None:
    """List volumes in the order of their names."""
    parse_labels(labels)
    show_rows(context.client.pages("/v1/volumes", "volumes", {"label": list(labels)} if labels else None), LIST, output)


@volume_group.command("show")
@click.argument("volume")
@output_option
@pass_context
def show(context: Context, volume: str, output: str) -> None:
    """Show a volume, by name or id, and where its data lies."""
    show_volume(context.client.call("GET", f"/v1/volumes/{segment(volume)}"), output)


@volume_group.command("resize")
@click.argument("volume")
@click.option("--size", required=True, help="The new size; volumes only grow.")
@click.option(
    "--reconnect", is_flag=True, help="Drop its sessions afterwards, so that clients come back to the new size."
)
@output_option
@pass_context
def resize(context: Context, volume: str, size: str, reconnect: bool, output: str) -> None:
    """Grow a volume, also while it is in use.

    New sessions see the new size. QEMU with a reconnect-delay comes back by itself when its session is dropped; then
    tell the guest with QMP block_resize.
    """
    body = {"size": size_given(size), "reconnect": reconnect}
    show_volume(context.client.call("PATCH", f"/v1/volumes/{segment(volume)}", body), output)


@volume_group.command("rename")
@click.argument("volume")
@click.argument("name")
@output_option
@pass_context
def rename(context: Context, volume: str, name: str, output: str) -> None:
    """Give a volume another name; open sessions stay."""
    show_volume(context.client.call("PATCH", f"/v1/volumes/{segment(volume)}", {"name": name}), output)


@volume_group.command("label")
@click.argument("volume")
@click.argument("labels", nargs=-1, metavar="[KEY=VALUE]...")
@output_option
@pass_context
def label(context: Context, volume: str, labels: tuple[str, ...], output: str) -> None:
    """Replace the labels of a volume by those given."""
    body = {"labels": parse_labels(labels)}
    show_volume(context.client.call("PATCH", f"/v1/volumes/{segment(volume)}", body), output)


@volume_group.command("reopen")
@click.argument("volume")
@output_option
@pass_context
def reopen(context: Context, volume: str, output: str) -> None:
    """Bring a volume that has stopped back as after a power cut.

    A volume stops when a sync of it fails. Mend the disk first; check the filesystem on the volume afterwards.
    """
    show_volume(context.client.call("POST", f"/v1/volumes/{segment(volume)}/reopen"), output)


@volume_group.command("delete")
@click.argument("volumes", nargs=-1, required=True, metavar="VOLUME...")
@click.option(
    "--force",
    is_flag=True,
    help="Also while mapped or in use: mappings go, sessions are dropped. Also if a snapshot is damaged.",
)
@click.option("--purge", is_flag=True, help="For good, at once: not into the trash.")
@click.option("--wait", is_flag=True, help="With --purge: wait until the space is free, with a bar on a terminal.")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and what that frees.")
@output_option
@pass_context
def delete(
    context: Context, volumes: tuple[str, ...], force: bool, purge: bool, wait: bool, dry_run: bool, output: str
) -> None:
    """Put volumes into the trash with their snapshots, or with --purge delete them for good.

    In the trash a volume is whole, and can be had back until its deadline; its name is free at once. Where one is
    refused, those named before it have gone, and those behind it stay.
    """
    given = {"force": force, "purge": purge, "dry_run": dry_run}
    query = {name: "true" for name, value in given.items() if value}
    gone: list[dict[str, Any]] = []
    refusal: BlockvirtError | None = None
    for volume in volumes:
        try:
            gone.append(context.client.call("DELETE", f"/v1/volumes/{segment(volume)}", query=query))
        except BlockvirtError as error:
            if not gone:
                raise
            refusal = error
            break
    if wait:
        _wait(context, gone, refusal)
    _show_gone(gone, output, _together(context, gone) if dry_run and len(gone) > 1 else ())
    if refusal is not None:
        if output != "json" and not dry_run:
            click.echo(f"not deleted: {', '.join(volumes[len(gone) :])}", err=True)
        raise refusal


def _wait(context: Context, gone: Sequence[dict[str, Any]], refusal: BlockvirtError | None) -> None:
    """Wait for what was begun. What goes wrong with it is only said where a refusal is to end the command."""
    try:
        wait_for(context.client, [each["job_id"] for each in gone if each.get("job_id")])
    except BlockvirtError as error:
        if refusal is None:
            raise
        click.echo("; ".join(part for part in (error.message, error.cause, error.correction) if part), err=True)


def _together(context: Context, gone: Sequence[dict[str, Any]]) -> Sequence[str]:
    """Return what to say below a list of volumes that may share chunks: the sum of the lines would be too little."""
    body = {"volumes": [each["volume"]["id"] for each in gone]}
    freed_bytes = context.client.call("POST", "/v1/volumes/space", body)["freed_bytes"]
    return [f"together they would free {size_for_people(freed_bytes)}"]


def _show_gone(gone: Sequence[dict[str, Any]], output: str, footer: Sequence[str] = ()) -> None:
    rows = [
        each
        | {
            "name": each["volume"]["name"],
            "size_bytes": each["volume"]["size_bytes"],
            "obstacles": "; ".join(each["obstacles"]),
        }
        for each in gone
    ]
    show_rows(gone if output == "json" else rows, DELETED, output, footer=footer)
    for each in gone:
        if each["deleted"] and each.get("purge_at"):
            click.echo(_in_the_trash(each["volume"], each["purge_at"]), err=True)


def _in_the_trash(volume: dict[str, Any], purge_at: str) -> str:
    commands = f"'blockvirt trash restore {volume['id']}' brings it back, 'blockvirt trash purge {volume['id']}'"
    return f"{volume['name']} is in the trash until {to_the_second(purge_at)}: {commands} frees its space"
