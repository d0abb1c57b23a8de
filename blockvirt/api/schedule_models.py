"""Schedules on the wire."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, RootModel

from blockvirt.api.wire import Answer, Change, Labels, Query, Request
from blockvirt.limits import MAX_KEPT_SNAPSHOTS, MAX_PREVIEW_RUNS

Keep = Annotated[
    dict[Literal["last", "hourly", "daily", "weekly", "monthly", "yearly"], Annotated[int, Field(ge=0)]],
    Field(
        description=f"How many of the schedule's snapshots stay, rule by rule (0 to {MAX_KEPT_SNAPSHOTS}); one stays "
        "if one rule keeps it. Without a rule above 0 all stay.",
        examples=[{"hourly": 24, "daily": 7}],
    ),
]
Cron = Annotated[str, Field(description="Five fields as in crontab(5), in UTC.", examples=["0 * * * *"])]
RUNS = 5  # next runs that a preview tells where nothing is asked for: a screen has room for more

# --- requests ------------------------------------------------------------------------------------------------------


class ScheduleCreate(Request):
    """A schedule to create: for one volume, or for all that carry certain labels when it runs."""

    name: str = Field(description="1 to 39 of a-z 0-9 . _ -.")
    cron: Cron
    volume: str | None = Field(None, description="Name or id of the volume.")
    labels: Labels = Field(default_factory=dict)
    keep: Keep = Field(default_factory=dict)
    paused: bool = False


class SchedulePatch(Change):
    """What to change of a schedule; the rules to keep by are replaced as a whole."""

    cron: Cron | None = None
    keep: Keep | None = None
    paused: bool | None = None


class PreviewQuery(Query):
    """How far to look ahead."""

    runs: int = Field(RUNS, ge=0, le=MAX_PREVIEW_RUNS, description="Next runs to tell.")


# --- answers -------------------------------------------------------------------------------------------------------


class ScheduledVolume(Answer):
    """A volume that a schedule is for now."""

    id: str
    name: str


class Schedule(Answer):
    """When snapshots are taken by themselves, of which volumes, and how many stay."""

    id: str
    name: str
    cron: str
    volume_id: str | None = Field(None, description="The one volume that it is for; missing: those with its labels.")
    labels: Labels
    volumes: list[ScheduledVolume] = Field(description="Those that it is for now.")
    keep: dict[str, int]
    state: Literal["active", "running", "paused", "volume-gone"]
    problem: str | None = Field(None, description="Why it takes no snapshots, and what to do.")
    next_run_at: datetime | None = Field(None, description="Missing: it is paused, or its volume is gone.")
    last_run_at: datetime | None = Field(None, description="Whatever came of it; missing: never.")
    last_error: str | None = Field(None, description="What went wrong in the last run.")
    missed_runs: int = Field(description="Runs that took no snapshots, or not in time, since it was created.")
    revision: int = Field(description="Also the ETag.")
    created_at: datetime


class ScheduleList(Answer):
    """A page of schedules in the order of their names."""

    schedules: list[Schedule]
    next_page_token: str | None = Field(None, description="Missing on the last page.")


class RetentionDecision(Answer):
    """What becomes of one snapshot."""

    snapshot_id: str
    name: str
    created_at: datetime
    keep: bool
    reasons: list[str]


class VolumeRetention(Answer):
    """What becomes of a volume's snapshots, newest first."""

    volume_id: str
    volume: str
    decisions: list[RetentionDecision]


class SchedulePreview(Answer):
    """What a schedule would do: its next runs, and what retention makes of the snapshots that are there now."""

    next_runs: list[datetime]
    volumes: list[VolumeRetention]


class ScheduleDeletion(Answer):
    """A schedule that is gone; its snapshots are not."""

    deleted: bool
    schedule: Schedule | None = Field(None, description="As it was; missing: its record was damaged.")


class ScheduleOrPreview(RootModel[Schedule | SchedulePreview]):
    """The schedule as it is now; with ``dry_run`` what it would do."""
