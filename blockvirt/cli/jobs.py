"""``blockvirt job``: what takes time, how far it is, and stopping it."""

from typing import Any

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, pass_context
from blockvirt.cli.job_progress import wait_for
from blockvirt.cli.output import Column, output_option, show_one, show_rows

LIST = (
    Column("ID", "id"),
    Column("KIND", "kind"),
    Column("SUBJECT", "subject"),
    Column("STATE", "state"),
    Column("DONE", "percent", "percent"),
    Column("RATE", "rate_per_s", "number"),
    Column("LEFT", "eta_s", "duration"),
    Column("CREATED", "created_at", "time"),
    Column("ERROR", "error"),
)
SHOW = (
    *LIST[:-1],
    Column("STARTED", "started_at", "time"),
    Column("FINISHED", "finished_at", "time"),
    Column("UNITS DONE", "done_units", "number"),
    Column("UNITS", "total_units", "number"),
    Column("VOLUME ID", "volume_id"),
    Column("DETAIL", "detail"),
    Column("ERROR", "error"),
)
STATES = ("queued", "running", "paused", "done", "failed", "cancelled")


@click.group("job")
def job_group() -> None:
    """Look after jobs: flattening, purging, giving space back, scrubbing."""


@job_group.command("list")
@click.option("--state", type=click.Choice(STATES), help="Only those in this state.")
@click.option("--kind", help="Only those of a kind: flatten, reclaim, purge, scrub.")
@click.option("--volume", help="Only those of one volume.")
@output_option
@pass_context
def list_(context: Context, state: str | None, kind: str | None, volume: str | None, output: str) -> None:
    """List jobs, oldest first; the last few that are finished too."""
    given = {"state": state, "kind": kind, "volume": volume}
    query = {name: value for name, value in given.items() if value is not None}
    show_rows([_shown(job, output) for job in context.client.pages("/v1/jobs", "jobs", query)], LIST, output)


@job_group.command("show")
@click.argument("job")
@output_option
@pass_context
def show(context: Context, job: str, output: str) -> None:
    """Show a job."""
    _show(context.client.call("GET", f"/v1/jobs/{segment(job)}"), output)


@job_group.command("cancel")
@click.argument("job")
@output_option
@pass_context
def cancel(context: Context, job: str, output: str) -> None:
    """Give a job up for good. What a purge or a reclaim has to delete stays deleted: those cannot be."""
    _show(context.client.call("POST", f"/v1/jobs/{segment(job)}/cancel"), output)


@job_group.command("pause")
@click.argument("job")
@output_option
@pass_context
def pause(context: Context, job: str, output: str) -> None:
    """Stop a job until it is resumed, also over restarts of the daemon."""
    _show(context.client.call("POST", f"/v1/jobs/{segment(job)}/pause"), output)


@job_group.command("resume")
@click.argument("job")
@output_option
@pass_context
def resume(context: Context, job: str, output: str) -> None:
    """Let a paused job go on, or a failed one try again, from where it was."""
    _show(context.client.call("POST", f"/v1/jobs/{segment(job)}/resume"), output)


@job_group.command("wait")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@output_option
@pass_context
def wait(context: Context, jobs: tuple[str, ...], output: str) -> None:
    """Wait until jobs are done, with a bar on a terminal; exit code 1 if one fails or is cancelled."""
    show_rows([_shown(job, output) for job in wait_for(context.client, jobs)], LIST, output)


def _show(job: dict[str, Any], output: str) -> None:
    show_one(_shown(job, output), SHOW, output)


def _shown(job: dict[str, Any], output: str) -> dict[str, Any]:
    """Return the job with its rate in a form for a table."""
    if output == "table" and job.get("rate_per_s") is not None:
        return job | {"rate_per_s": f"{job['rate_per_s']:.1f}/s"}
    return job
