"""``blockvirt device`` and ``blockvirt pool``: the disks given to the pool, and how much of them may be promised."""

import os
from typing import Any

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, parse_labels, pass_context, size_given
from blockvirt.cli.output import Column, output_option, show_one, show_rows
from blockvirt.errors import InvalidRequest

DEVICES = (
    Column("NAME", "name"),
    Column("STATE", "state"),
    Column("CAPACITY", "capacity_bytes", "size"),
    Column("USED", "used_bytes", "size"),
    Column("FREE", "free_bytes", "size"),
    Column("LIMIT", "limit_bytes", "size"),
    Column("RESERVE", "reserve_bytes", "size"),
    Column("LABELS", "labels"),
    Column("PATH", "path"),
    Column("PROBLEM", "problem"),
)
POOL = (
    Column("LEVEL", "level"),
    Column("CAPACITY", "capacity_bytes", "size"),
    Column("USED", "used_bytes", "size"),
    Column("FREE", "free_bytes", "size"),
    Column("RESERVED", "reserved_bytes", "size"),
    Column("PROMISED", "promised_bytes", "size"),
    Column("LARGEST NEW VOLUME", "largest_bytes", "size"),
    Column("BECAUSE", "explanation"),
    Column("VOLUMES", "volumes", "number"),
    Column("OVERCOMMIT", "overcommit_ratio"),
    Column("NEAR FROM", "near_ratio"),
    Column("BRAKE FROM", "brake_ratio"),
    Column("CHUNK", "chunk_bytes", "size"),
    Column("ID", "id"),
)


@click.group("device")
def device_group() -> None:
    """Give disks to the pool."""


@device_group.command("add")
@click.argument("directory", type=click.Path(file_okay=False))
@click.option("--name", help="By default made from the directory.")
@click.option("--limit", help="Use at most so much of its filesystem.")
@click.option("--reserve", help="Leave so much of its filesystem free; by default 1 %, 16MiB to 1GiB.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="For placement; may be repeated.")
@output_option
@pass_context
def add(
    context: Context,
    directory: str,
    name: str | None,
    limit: str | None,
    reserve: str | None,
    labels: tuple[str, ...],
    output: str,
) -> None:
    """Take DIRECTORY into the pool: it gets a label file, and volumes may be placed on it."""
    body: dict[str, Any] = {"path": os.path.abspath(directory), "labels": parse_labels(labels)}
    body |= {key: size_given(size) for key, size in (("limit", limit), ("reserve", reserve)) if size is not None}
    body |= {"name": name} if name is not None else {}
    show_one(context.client.call("POST", "/v1/devices", body), DEVICES, output)


@device_group.command("list")
@output_option
@pass_context
def list_(context: Context, output: str) -> None:
    """List the devices of the pool, usable or not."""
    show_rows(context.client.call("GET", "/v1/devices")["devices"], DEVICES, output)


@device_group.command("remove")
@click.argument("device")
@output_option
@pass_context
def remove(context: Context, device: str, output: str) -> None:
    """Take an empty device out of the pool."""
    show_one(context.client.call("DELETE", f"/v1/devices/{segment(device)}"), DEVICES, output)


@click.group("pool")
def pool_group() -> None:
    """Look at the pool, and set its policy."""


@pool_group.command("show")
@output_option
@pass_context
def show(context: Context, output: str) -> None:
    """Show capacity, used, promised and reserved bytes, and the policy."""
    show_pool(context, context.client.call("GET", "/v1/pool"), output)


@pool_group.command("set")
@click.option("--overcommit", type=float, metavar="RATIO", help="Promised bytes / capacity, at most.")
@click.option("--near", type=float, metavar="RATIO", help="Used / capacity at which the level is 'near'.")
@click.option("--brake", type=float, metavar="RATIO", help="Used / capacity from which no volume is created or grown.")
@output_option
@pass_context
def set_(context: Context, overcommit: float | None, near: float | None, brake: float | None, output: str) -> None:
    """Set the policy. What is promised already stays promised."""
    given = (("overcommit_ratio", overcommit), ("near_ratio", near), ("brake_ratio", brake))
    body = {key: value for key, value in given if value is not None}
    if not body:
        raise InvalidRequest("nothing to set", correction="give --overcommit, --near or --brake")
    show_pool(context, context.client.call("PATCH", "/v1/pool", body), output)


def show_pool(context: Context, pool: dict[str, Any], output: str) -> None:
    """Print the pool with the largest volume one could get now."""
    pool |= {"size_info": context.client.call("GET", "/v1/size-info")}
    show_one(pool if output == "json" else pool | pool["size_info"], POOL, output)
