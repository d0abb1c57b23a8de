"""``blockvirt host`` and ``blockvirt lun``: who sees which volume under which number."""

import re
from typing import Any

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, parse_labels, pass_context
from blockvirt.cli.output import Column, output_option, show_one, show_rows
from blockvirt.errors import InvalidRequest

_UNIT = re.compile(r"([^/]+)/lun(0|[1-9][0-9]*)", re.ASCII)  # as units are exported: lun05 is not lun5

HOSTS = (
    Column("NAME", "name"),
    Column("STATE", "state"),
    Column("UNITS", "units", "number"),
    Column("LABELS", "labels"),
    Column("CREATED", "created_at"),
)
UNITS = (
    Column("EXPORT", "export"),
    Column("VOLUME", "volume"),
    Column("SIZE", "size_bytes", "size"),
    Column("STATE", "state"),
    Column("NBD URI", "nbd_uris"),
)
ATTACH = (
    Column("EXPORT", "export"),
    Column("VOLUME ID", "volume_id"),
    Column("NBD URI", "nbd_uris"),
    Column("QEMU", "qemu"),
    Column("LIBVIRT", "libvirt_xml"),
    Column("NBD-CLIENT", "nbd_client"),
    Column("COPY IN", "nbdcopy_in"),
    Column("COPY OUT", "nbdcopy_out"),
)


@click.group("host")
def host_group() -> None:
    """Look after hosts: the machines that see logical units."""


@host_group.command("create")
@click.argument("name")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@output_option
@pass_context
def create(context: Context, name: str, labels: tuple[str, ...], output: str) -> None:
    """Create a host."""
    _show_host(context.client.call("POST", "/v1/hosts", {"name": name, "labels": parse_labels(labels)}), output)


@host_group.command("list")
@output_option
@pass_context
def list_hosts(context: Context, output: str) -> None:
    """List hosts."""
    hosts = list(context.client.pages("/v1/hosts", "hosts"))
    show_rows(hosts if output == "json" else [host | {"units": len(host["luns"])} for host in hosts], HOSTS, output)


@host_group.command("show")
@click.argument("host")
@output_option
@pass_context
def show(context: Context, host: str, output: str) -> None:
    """Show a host, by name or id, and its logical units."""
    _show_host(context.client.call("GET", f"/v1/hosts/{segment(host)}"), output)


@host_group.command("delete")
@click.argument("host")
@click.option("--force", is_flag=True, help="Also with logical units: they go, their sessions are dropped.")
@output_option
@pass_context
def delete(context: Context, host: str, force: bool, output: str) -> None:
    """Delete a host."""
    query = {"force": str(force).lower()}
    _show_host(context.client.call("DELETE", f"/v1/hosts/{segment(host)}", query=query), output)


def _show_host(host: dict[str, Any], output: str) -> None:
    shown = host if output == "json" else host | {"units": [unit["export"] for unit in host["luns"]]}
    show_one(shown, (Column("NAME", "name"), Column("ID", "id"), *HOSTS[1:]), output)


@click.group("lun")
def lun_group() -> None:
    """Map volumes to hosts as logical units."""


@lun_group.command("map")
@click.argument("host")
@click.argument("volume")
@click.option("--lun", "number", type=click.IntRange(min=0), help="Its number; by default the next free one.")
@output_option
@pass_context
def map_(context: Context, host: str, volume: str, number: int | None, output: str) -> None:
    """Show VOLUME to HOST as a logical unit."""
    body: dict[str, Any] = {"volume": volume}
    if number is not None:
        body["number"] = number
    show_one(context.client.call("POST", f"/v1/hosts/{segment(host)}/luns", body), UNITS, output)


@lun_group.command("unmap")
@click.argument("unit", metavar="HOST/lunN")
@click.option("--force", is_flag=True, help="Also while in use: its sessions are dropped.")
@output_option
@pass_context
def unmap(context: Context, unit: str, force: bool, output: str) -> None:
    """Take a logical unit away from its host."""
    match = _UNIT.fullmatch(unit)
    if match is None:
        raise InvalidRequest(f"{unit!r} names no logical unit", correction="write HOST/lunN, such as web1/lun0")
    path = f"/v1/hosts/{segment(match[1])}/luns/{match[2]}"
    show_one(context.client.call("DELETE", path, query={"force": str(force).lower()}), UNITS, output)


@lun_group.command("list")
@click.argument("host", required=False)
@output_option
@pass_context
def list_units(context: Context, host: str | None, output: str) -> None:
    """List the logical units of HOST, or of all hosts."""
    if host is not None:
        units = context.client.call("GET", f"/v1/hosts/{segment(host)}/luns")["luns"]
    else:
        units = [unit for each in context.client.pages("/v1/hosts", "hosts") for unit in each["luns"]]
    show_rows(units, UNITS, output)


@lun_group.command("attach-info")
@click.argument("export", metavar="HOST/lunN|VOLUME")
@output_option
@pass_context
def attach_info(context: Context, export: str, output: str) -> None:
    """Say how to attach a logical unit, or a volume under its own name.

    Prints the NBD URIs and lines to paste for QEMU, libvirt, nbd-client and nbdcopy.
    """
    if "/" in export:
        host, _, lun = export.rpartition("/")
        path = f"/v1/luns/{segment(host)}/{segment(lun)}/attach-info"
    else:
        path = f"/v1/volumes/{segment(export)}/attach-info"
    info = context.client.call("GET", path)
    if output != "table":
        show_one(info, ATTACH, output)
        return
    for uri in info["nbd_uris"]:
        click.echo(uri)
    for title, text in (
        ("QEMU (-blockdev with reconnect-delay, -device)", info["qemu"]),
        ("libvirt", info["libvirt_xml"]),
        ("Linux nbd-client (as root)", info["nbd_client"]),
        ("copy an image in", info["nbdcopy_in"]),
        ("copy it out", info["nbdcopy_out"]),
    ):
        click.echo(f"\n# {title}\n{text}")
