"""``blockvirt scrub``: have everything on the disks read and compared with its checksums, while it is served."""

from typing import Any

import click

from blockvirt.cli.client import EXIT_FAILED
from blockvirt.cli.context import Context, pass_context, size_given
from blockvirt.cli.job_progress import wait_for
from blockvirt.cli.output import Column, output_option, show_one, show_rows

JOB = (
    Column("JOB", "id"),
    Column("KIND", "kind"),
    Column("SUBJECT", "subject"),
    Column("STATE", "state"),
)
SCRUBS = (
    Column("JOB", "id"),
    Column("STATE", "state"),
    Column("OF", "of"),
    Column("BEGUN", "begun_at", "time"),
    Column("ENDED", "ended_at", "time"),
    Column("READ", "read_bytes", "size"),
    Column("RECORDS", "records", "number"),
    Column("CHUNKS", "chunks", "number"),
    Column("UNREAD", "unread_chunks", "number"),
    Column("DAMAGED", "damaged", "number"),
)


@click.group("scrub")
def scrub_group() -> None:
    """Look for damage on the disks while everything is served."""


@scrub_group.command("start")
@click.argument("volumes", nargs=-1, metavar="[VOLUME]...")
@click.option("--rate", help="Bytes per second at most, such as 100MiB; as configured by default.")
@click.option("--wait", is_flag=True, help="Wait until it is done, with a bar on a terminal.")
@output_option
@pass_context
def start(context: Context, volumes: tuple[str, ...], rate: str | None, wait: bool, output: str) -> int:
    """Read everything that has a checksum, or some volumes with their snapshots, in the background, and compare.

    'blockvirt job' shows, pauses and cancels it. With --wait the exit code is 1 if anything is damaged.
    """
    body: dict[str, Any] = {"volumes": list(volumes)}
    if rate is not None:
        body["rate"] = size_given(rate)
    job = context.client.call("POST", "/v1/scrubs", body)
    if not wait:
        show_one(job, JOB, output)
        return 0
    wait_for(context.client, [job["id"]])
    scrubs = context.client.call("GET", "/v1/scrubs")["scrubs"]
    scrub = next(each for each in scrubs if each["id"] == job["id"])
    show_one(_shown(scrub, output), SCRUBS, output)
    _show_damage(scrub["findings"], output)
    return EXIT_FAILED if scrub["damaged"] else 0


@scrub_group.command("status")
@output_option
@pass_context
def status(context: Context, output: str) -> None:
    """Show the last scrubs, newest first, and the damage that still stands."""
    found = context.client.call("GET", "/v1/scrubs")
    if output == "json":
        show_one(found, (), output)
        return
    show_rows([_shown(each, output) for each in found["scrubs"]], SCRUBS, output)
    _show_damage(found["standing"], output)


def _shown(scrub: dict[str, Any], output: str) -> dict[str, Any]:
    """Return a scrub with what it is of in a form for a table."""
    return scrub if output == "json" else scrub | {"of": " ".join(scrub["volumes"]) or "everything"}


def _show_damage(findings: list[dict[str, Any]], output: str) -> None:
    for finding in findings if output == "table" else ():
        click.echo(f"damaged: {damage_in_words(finding)}", err=True)


def damage_in_words(finding: dict[str, Any]) -> str:
    """Return a finding of the API as one sentence."""
    concerned, path = ", ".join(finding["concerns"]), finding.get("path", "")
    if finding["kind"] == "chunk":
        where = f"{finding['length_bytes']} bytes at {finding['volume_offset_bytes']} of {concerned}"
        return f"{where} (at {finding['offset_bytes']} of {path}): {finding['problem']}"
    at = f" at {finding['offset_bytes']}" if "offset_bytes" in finding else ""
    return f"{path}{at}: {finding['problem']}" + (f"; concerns {concerned}" if concerned else "")
