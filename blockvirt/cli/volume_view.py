"""A volume, printed: after whatever made it, changed it or brought it back."""

from typing import Any

import click

from blockvirt.cli.output import Column, show_one

SHOW = (
    Column("NAME", "name"),
    Column("ID", "id"),
    Column("STATE", "state"),
    Column("SIZE", "size_bytes", "size"),
    Column("MAPPED", "mapped_bytes", "size"),
    Column("CHUNK", "chunk_bytes", "size"),
    Column("ORIGIN", "origin"),
    Column("SNAPSHOTS", "snapshots", "number"),
    Column("IN SNAPSHOTS", "snapshot_bytes", "size"),
    Column("EXCLUSIVE", "exclusive_bytes", "size"),
    Column("LABELS", "labels"),
    Column("PLACEMENT", "placed"),
    Column("LIES ON", "lies_on"),
    Column("SESSIONS", "sessions", "number"),
    Column("UNITS", "units"),
    Column("CREATED", "created_at", "time"),
    Column("REVISION", "revision", "number"),
    Column("NBD URI", "nbd_uris"),
    Column("DAMAGE", "damage"),
)


def show_volume(volume: dict[str, Any], output: str) -> None:
    """Print a volume; where its size was rounded up, that is said on stderr."""
    if "requested_size_bytes" in volume:
        click.echo(f"rounded up to whole sectors of 512 bytes: {volume['size_bytes']} bytes", err=True)
    if output != "json":
        placement = volume["placement"]
        labels = [f"{key}={value}" for key, value in placement["labels"].items()]
        volume["placed"] = " ".join([*placement["devices"], *labels]) or "any device"
        shares = volume.get("located") or []
        volume["lies_on"] = [f"{share['device']}:{share['live_bytes']}" for share in shares]
    columns = [column for column in SHOW if column.key not in _WHERE_THERE or column.key in volume]
    show_one(volume, columns, output)


_WHERE_THERE = ("damage", "origin", "snapshot_bytes", "exclusive_bytes")
"""Fields without which there is no line either."""
