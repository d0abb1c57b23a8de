"""Waiting for jobs: until each is finished, with a bar on a terminal.

The bar goes to stderr, so that what a command prints stays whole in a pipe.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

from blockvirt.cli.client import Client, segment
from blockvirt.cli.output import duration
from blockvirt.errors import BlockvirtError

FINISHED = ("done", "failed", "cancelled")
_LOOK_S = 60  # what the daemon lets a request wait at most
_LOOK_ON_TERMINAL_S = 1  # between two pictures of the bar
_BAR_CELLS = 24


class JobNotDone(BlockvirtError):
    """A job that was waited for failed, or was cancelled."""

    code, http_status = "job-not-done", 500


def wait_for(client: Client, job_ids: Iterable[str]) -> list[dict[str, Any]]:
    """Return the jobs, all done; raises JobNotDone for the first that is not, Refused, Unreachable.

    Interrupted by the keyboard, it says how to wait on: the jobs do not stop.
    """
    done = []
    for job_id in job_ids:
        try:
            job = _watch(client, job_id)
        except KeyboardInterrupt:
            click.echo(f"\nthe job goes on: 'blockvirt job wait {job_id}' waits again", err=True)
            raise
        if job["state"] != "done":
            raise JobNotDone(
                f"job {job_id} ({job['kind']} of {job['subject']}) {_ENDS[job['state']]}",
                cause=job.get("error") or "",
                correction="" if job["state"] == "cancelled" else f"'blockvirt job resume {job_id}' tries it again",
                job=job,
            )
        done.append(job)
    return done


_ENDS = {"failed": "failed", "cancelled": "was cancelled"}


def _watch(client: Client, job_id: str) -> dict[str, Any]:
    shows = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    try:
        while True:
            wait_s = _LOOK_ON_TERMINAL_S if shows else _LOOK_S
            job = client.call("GET", f"/v1/jobs/{segment(job_id)}", query={"wait_s": wait_s})
            if job["state"] in FINISHED:
                return job
            if shows:
                columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
                click.echo(f"\r{bar(job, columns - 1)}\x1b[K", nl=False, err=True)
    finally:
        if shows:
            click.echo("\r\x1b[K", nl=False, err=True)


def bar(job: Mapping[str, Any], width: int) -> str:
    """Return the picture of a job in at most ``width`` cells: percent, rate, time left, as far as they are known."""
    percent, rate, left_s = job.get("percent"), job.get("rate_per_s"), job.get("eta_s")
    parts = [f"{job['kind']} of {job['subject']}"]
    if percent is not None:
        filled = int(_BAR_CELLS * percent / 100)
        parts.append(f"[{'#' * filled}{'.' * (_BAR_CELLS - filled)}] {percent:5.1f}%")
    if job["state"] != "running":
        parts.append(job["state"])
    if rate is not None:
        parts.append(f"{rate:.1f}/s")
    if left_s is not None:
        parts.append(f"{duration(left_s)} left")
    if job.get("detail"):
        parts.append(job["detail"])
    return "  ".join(parts)[: max(width, 0)]
