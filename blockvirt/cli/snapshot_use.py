"""``blockvirt snapshot revert`` and ``clone``: back to what a volume held, or a new volume that begins with it."""

from typing import Any

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, parse_labels, pass_context, size_given
from blockvirt.cli.output import Column, output_option, show_one
from blockvirt.cli.volume_view import show_volume

REVERT = (
    Column("VOLUME", "volume"),
    Column("REVERTED", "reverted"),
    Column("TO", "snapshot"),
    Column("KEPT AS", "safety"),
    Column("IN THE WAY", "obstacles"),
    Column("NEEDS REOPEN", "needs_reopen"),
)


@click.command("revert")
@click.argument("snapshot")
@click.option(
    "--force", is_flag=True, help="Also while in use: sessions are dropped, and NBD refuses it until it is reopened."
)
@click.option("--no-safety", is_flag=True, help="Do not keep what the volume holds now as a snapshot.")
@click.option("--safety-name", metavar="NAME", help="What to call that; 'before-revert-' and the time by default.")
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@output_option
@pass_context
def revert(
    context: Context,
    snapshot: str,
    force: bool,
    no_safety: bool,
    safety_name: str | None,
    dry_run: bool,
    output: str,
) -> None:
    """Take a volume back to one of its snapshots, in place. Younger snapshots stay.

    What the volume holds now becomes a snapshot first, so that a revert can be undone by another one.
    """
    body: dict[str, Any] = {"force": force, "safety": not no_safety, "dry_run": dry_run}
    if safety_name is not None:
        body["safety_name"] = safety_name
    done = context.client.call("POST", f"/v1/snapshots/{segment(snapshot)}/revert", body)
    volume, safety = done["volume"]["name"], done.get("safety")
    kept_as = f"{volume}@{safety['name']}" if safety else ""
    shown = {
        "volume": volume,
        "reverted": done["reverted"],
        "snapshot": f"{volume}@{done['snapshot']['name']}",
        "safety": kept_as,
        "obstacles": "; ".join(done["obstacles"]),
        "needs_reopen": done["needs_reopen"],
    }
    show_one(done if output == "json" else shown, REVERT, output)
    for line in _next_steps(
        volume,
        kept_as,
        reverted=done["reverted"],
        needs_force=bool(done["obstacles"]),
        needs_reopen=done["needs_reopen"],
    ):
        click.echo(line, err=True)


def _next_steps(volume: str, kept_as: str, *, reverted: bool, needs_force: bool, needs_reopen: bool) -> list[str]:
    """Return what is left to do for who reverted."""
    lines = []
    if needs_force and not reverted:
        lines.append("it is in use: this needs --force, and 'blockvirt volume reopen' afterwards")
    elif needs_reopen and not reverted:
        lines.append(f"nobody has it open: it goes on waiting for 'blockvirt volume reopen {volume}' afterwards")
    elif needs_reopen:
        lines.append(
            f"NBD refuses {volume} now: power off the guests that had it open, whose caches are from before, then run "
            f"'blockvirt volume reopen {volume}'"
        )
    if reverted and kept_as:
        lines.append(f"what it held is {kept_as}: 'blockvirt snapshot revert {kept_as}' undoes this")
    return lines


@click.command("clone")
@click.argument("snapshot")
@click.argument("newvolume", required=False)
@click.option("--size", help="Such as 10GiB; the snapshot's by default, never less.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="May be repeated.")
@click.option("--device", "devices", multiple=True, metavar="NAME", help="Place it on this device; may be repeated.")
@click.option(
    "--device-label", "device_labels", multiple=True, metavar="KEY=VALUE", help="Place it on devices with this label."
)
@output_option
@pass_context
def clone(
    context: Context,
    snapshot: str,
    newvolume: str | None,
    size: str | None,
    labels: tuple[str, ...],
    devices: tuple[str, ...],
    device_labels: tuple[str, ...],
    output: str,
) -> None:
    """Make a new volume that begins with what a snapshot holds, writable at once; without NEWVOLUME a name is made up.

    It shares what neither of the two changes; 'blockvirt clone flatten' makes it independent.
    """
    body: dict[str, Any] = {"labels": parse_labels(labels)}
    if newvolume is not None:
        body["name"] = newvolume
    if size is not None:
        body["size"] = size_given(size)
    if devices or device_labels:
        body["placement"] = {"devices": list(devices), "labels": parse_labels(device_labels)}
    show_volume(context.client.call("POST", f"/v1/snapshots/{segment(snapshot)}/clone", body), output)
