"""``blockvirt schedule``: snapshots that are taken by themselves, and how many of them stay."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from blockvirt.cli.client import segment
from blockvirt.cli.context import Context, parse_labels, pass_context
from blockvirt.cli.output import Column, output_option, show_one, show_rows
from blockvirt.errors import InvalidRequest

LIST = (
    Column("NAME", "name"),
    Column("CRON", "cron"),
    Column("FOR", "for"),
    Column("KEEP", "keep"),
    Column("STATE", "state"),
    Column("NEXT RUN", "next_run_at", "time"),
    Column("LAST RUN", "last_run_at", "time"),
    Column("MISSED", "missed_runs", "number"),
    Column("LAST ERROR", "last_error"),
    Column("PROBLEM", "problem"),
)
SHOW = (
    *LIST[:3],
    Column("VOLUMES", "covers"),
    *LIST[3:],
    Column("ID", "id"),
    Column("CREATED", "created_at", "time"),
    Column("REVISION", "revision", "number"),
)
PREVIEW = (
    Column("VOLUME", "volume"),
    Column("SNAPSHOT", "name"),
    Column("CREATED", "created_at", "time"),
    Column("RETENTION", "fate"),
    Column("BECAUSE", "reasons"),
)
RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
_CRON = "Five fields in UTC: minute, hour, day of month, month, day of week."


def _keep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--keep-last N`` and so on, as parameters ``keep_last`` ..."""
    for rule in reversed(RULES):
        newest = "the newest N" if rule == "last" else f"the newest of each of the newest N {_SPANS[rule]}"
        command = click.option(
            f"--keep-{rule}", metavar="N", type=click.IntRange(min=0), help=f"Keep {newest}; 0: no such rule."
        )(command)
    return command


_SPANS = {"hourly": "hours", "daily": "days", "weekly": "weeks", "monthly": "months", "yearly": "years"}


def _keep(given: Mapping[str, int | None]) -> dict[str, int]:
    return {rule: count for rule in RULES if (count := given[f"keep_{rule}"]) is not None}


@click.group("schedule")
def schedule_group() -> None:
    """Have snapshots taken by themselves, and old ones pruned."""


@schedule_group.command("create")
@click.argument("name")
@click.option("--cron", required=True, metavar="'M H D M W'", help=_CRON)
@click.option("--volume", help="For this volume; or give --label.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="For all volumes with it when it runs, in one instant; may be repeated.",
)
@_keep_options
@click.option("--paused", is_flag=True, help="Do not run it until it is resumed.")
@click.option("--dry-run", is_flag=True, help="Only say what it would do; nothing is stored.")
@output_option
@pass_context
def create(
    context: Context,
    /,
    name: str,
    cron: str,
    volume: str | None,
    labels: tuple[str, ...],
    paused: bool,
    dry_run: bool,
    output: str,
    **keep: int | None,
) -> None:
    """Create a schedule. A snapshot that it took stays if one --keep rule keeps it; without a rule all stay."""
    body: dict[str, Any] = {"name": name, "cron": cron, "labels": parse_labels(labels), "keep": _keep(keep)}
    if volume is not None:
        body["volume"] = volume
    if paused:
        body["paused"] = True
    if dry_run:
        _show_preview(context.client.call("POST", "/v1/schedules/preview", body), output)
    else:
        _show(context.client.call("POST", "/v1/schedules", body), output)


@schedule_group.command("list")
@output_option
@pass_context
def list_(context: Context, output: str) -> None:
    """List schedules with their next runs and the runs that were missed."""
    found = context.client.pages("/v1/schedules", "schedules")
    show_rows(found if output == "json" else map(_shown, found), LIST, output)


@schedule_group.command("show")
@click.argument("schedule")
@output_option
@pass_context
def show(context: Context, schedule: str, output: str) -> None:
    """Show a schedule, by name or id, and the volumes that it is for now."""
    _show(context.client.call("GET", f"/v1/schedules/{segment(schedule)}"), output)


@schedule_group.command("change")
@click.argument("schedule")
@click.option("--cron", metavar="'M H D M W'", help=_CRON)
@_keep_options
@click.option("--dry-run", is_flag=True, help="Only say what it would do then; nothing is stored.")
@output_option
@pass_context
def change(
    context: Context, /, schedule: str, cron: str | None, dry_run: bool, output: str, **keep: int | None
) -> None:
    """Change when a schedule runs, or what it keeps: the --keep rules given replace all that there were."""
    body: dict[str, Any] = {"cron": cron} if cron is not None else {}
    if rules := _keep(keep):
        body["keep"] = rules
    if not body:
        raise InvalidRequest("nothing to change was given", correction="give --cron or a --keep rule")
    _change(context, schedule, body, dry_run, output)


@schedule_group.command("pause")
@click.argument("schedule")
@output_option
@pass_context
def pause(context: Context, schedule: str, output: str) -> None:
    """Take and prune nothing until the schedule is resumed."""
    _change(context, schedule, {"paused": True}, False, output)


@schedule_group.command("resume")
@click.argument("schedule")
@output_option
@pass_context
def resume(context: Context, schedule: str, output: str) -> None:
    """Run a paused schedule again; what was due meanwhile is not caught up."""
    _change(context, schedule, {"paused": False}, False, output)


def _change(context: Context, schedule: str, body: dict[str, Any], dry_run: bool, output: str) -> None:
    path = f"/v1/schedules/{segment(schedule)}"
    if dry_run:
        _show_preview(context.client.call("PATCH", path, body | {"dry_run": True}), output)
    else:
        _show(context.client.call("PATCH", path, body), output)


@schedule_group.command("delete")
@click.argument("schedule")
@output_option
@pass_context
def delete(context: Context, schedule: str, output: str) -> None:
    """Delete a schedule; the snapshots that it took stay."""
    gone = context.client.call("DELETE", f"/v1/schedules/{segment(schedule)}")
    name = gone["schedule"]["name"] if gone.get("schedule") else schedule  # a damaged one cannot be shown any more
    columns = (Column("SCHEDULE", "name"), Column("DELETED", "deleted"))
    show_one(gone if output == "json" else gone | {"name": name}, columns, output)


@schedule_group.command("preview")
@click.argument("schedule")
@click.option("--runs", type=click.IntRange(min=0), default=5, show_default=True, help="Next runs to tell.")
@output_option
@pass_context
def preview(context: Context, schedule: str, runs: int, output: str) -> None:
    """Say when a schedule runs next, how many runs it missed, and which snapshots it would prune now."""
    path = f"/v1/schedules/{segment(schedule)}"
    found = context.client.call("GET", path)
    foreseen = context.client.call("GET", f"{path}/preview", query={"runs": runs})
    _show_preview(foreseen | {"missed_runs": found["missed_runs"]}, output)


def _show(schedule: dict[str, Any], output: str) -> None:
    show_one(schedule if output == "json" else _shown(schedule), SHOW, output)


def _shown(schedule: dict[str, Any]) -> dict[str, Any]:
    """Return the schedule with what it is for in words: its volume, or the labels that choose volumes."""
    names = [volume["name"] for volume in schedule["volumes"]]
    if schedule.get("volume_id"):
        chosen = names[0] if names else schedule["volume_id"]
    else:
        chosen = " ".join(f"{key}={value}" for key, value in schedule["labels"].items())
    return schedule | {"for": chosen, "covers": names}


def _show_preview(foreseen: dict[str, Any], output: str) -> None:
    if output == "json":
        show_one(foreseen, (), output)
        return
    rows = [
        decision
        | {
            "volume": volume["volume"],
            "fate": "keep" if decision["keep"] else "prune",
            "reasons": "; ".join(decision["reasons"]),
        }
        for volume in foreseen["volumes"]
        for decision in volume["decisions"]
    ]
    footer = [f"runs next at {moment}" for moment in foreseen["next_runs"]] or ["does not run next"]
    if "missed_runs" in foreseen:
        footer.append(f"runs missed so far: {foreseen['missed_runs']}")
    pruned = sum(row["fate"] == "prune" for row in rows)
    footer.append(f"snapshots that retention would prune now: {pruned} of {len(rows)}")
    show_rows(rows, PREVIEW, output, footer=footer)
