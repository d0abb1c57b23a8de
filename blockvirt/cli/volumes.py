"""``blockvirt volume``: allocate, list, show, grow, rename, delete."""

from typing import Any

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, parse_labels, pass_context, size_given
from blockvirt.cli.output import Column, output_option, show_one, show_rows

LIST = (
    Column("NAME", "name"),
    Column("SIZE", "size_bytes", "size"),
    Column("MAPPED", "mapped_bytes", "size"),
    Column("STATE", "state"),
    Column("SESSIONS", "sessions", "number"),
    Column("UNITS", "units"),
    Column("LABELS", "labels"),
)
SHOW = (
    Column("NAME", "name"),
    Column("ID", "id"),
    Column("STATE", "state"),
    Column("SIZE", "size_bytes", "size"),
    Column("MAPPED", "mapped_bytes", "size"),
    Column("CHUNK", "chunk_bytes", "size"),
    Column("LABELS", "labels"),
    Column("PLACEMENT", "placed"),
    Column("LIES ON", "lies_on"),
    Column("SESSIONS", "sessions", "number"),
    Column("UNITS", "units"),
    Column("CREATED", "created_at"),
    Column("REVISION", "revision", "number"),
    Column("NBD URI", "nbd_uris"),
    Column("DAMAGE", "damage"),
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
    volume = context.client.call("POST", "/v1/volumes", body)
    if "requested_size_bytes" in volume:
        click.echo(f"rounded up to whole sectors of 512 bytes: {volume['size_bytes']} bytes", err=True)
    _show(volume, output)


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
    _show(context.client.call("GET", f"/v1/volumes/{segment(volume)}"), output)


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
    _show(context.client.call("PATCH", f"/v1/volumes/{segment(volume)}", body), output)


@volume_group.command("rename")
@click.argument("volume")
@click.argument("name")
@output_option
@pass_context
def rename(context: Context, volume: str, name: str, output: str) -> None:
    """Give a volume another name; open sessions stay."""
    _show(context.client.call("PATCH", f"/v1/volumes/{segment(volume)}", {"name": name}), output)


@volume_group.command("label")
@click.argument("volume")
@click.argument("labels", nargs=-1, metavar="[KEY=VALUE]...")
@output_option
@pass_context
def label(context: Context, volume: str, labels: tuple[str, ...], output: str) -> None:
    """Replace the labels of a volume by those given."""
    body = {"labels": parse_labels(labels)}
    _show(context.client.call("PATCH", f"/v1/volumes/{segment(volume)}", body), output)


@volume_group.command("reopen")
@click.argument("volume")
@output_option
@pass_context
def reopen(context: Context, volume: str, output: str) -> None:
    """Bring a volume that has stopped back as after a power cut.

    A volume stops when a sync of it fails. Mend the disk first; check the filesystem on the volume afterwards.
    """
    _show(context.client.call("POST", f"/v1/volumes/{segment(volume)}/reopen"), output)


@volume_group.command("delete")
@click.argument("volumes", nargs=-1, required=True, metavar="VOLUME...")
@click.option("--force", is_flag=True, help="Also while mapped or in use: mappings go, sessions are dropped.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@output_option
@pass_context
def delete(context: Context, volumes: tuple[str, ...], force: bool, dry_run: bool, output: str) -> None:
    """Delete volumes and what is on them."""
    query = {"force": str(force).lower(), "dry_run": str(dry_run).lower()}
    gone = [context.client.call("DELETE", f"/v1/volumes/{segment(volume)}", query=query) for volume in volumes]
    rows = [
        each
        | {
            "name": each["volume"]["name"],
            "size_bytes": each["volume"]["size_bytes"],
            "obstacles": "; ".join(each["obstacles"]),
        }
        for each in gone
    ]
    columns = (
        Column("NAME", "name"),
        Column("DELETED", "deleted"),
        Column("SIZE", "size_bytes", "size"),
        Column("FREES", "freed_bytes", "size"),
        Column("NEEDS FORCE BECAUSE", "obstacles"),
    )
    show_rows(gone if output == "json" else rows, columns, output)


def _show(volume: dict[str, Any], output: str) -> None:
    if output != "json":
        placement = volume["placement"]
        labels = [f"{key}={value}" for key, value in placement["labels"].items()]
        volume["placed"] = " ".join([*placement["devices"], *labels]) or "any device"
        shares = volume.get("located") or []
        volume["lies_on"] = [f"{share['device']}:{share['live_bytes']}" for share in shares]
    columns = [column for column in SHOW if column.key != "damage" or "damage" in volume]
    show_one(volume, columns, output)
