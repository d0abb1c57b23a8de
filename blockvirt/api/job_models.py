"""Jobs on the wire."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from blockvirt.api.wire import Answer, ListQuery, Query
from blockvirt.limits import API_MAX_WAIT_S


class JobListQuery(ListQuery):
    """Which jobs, and which page of them."""

    state: Literal["queued", "running", "paused", "done", "failed", "cancelled"] | None = Field(
        None, description="Only those in this state."
    )
    kind: str | None = Field(None, description="Only those of this kind.")
    volume: str | None = Field(None, description="Name or id of a volume, or id of a deleted one: only its jobs.")


class JobQuery(Query):
    """How long to wait for a job."""

    wait_s: float = Field(
        0.0, ge=0, le=API_MAX_WAIT_S, description="Answer when it is over, at the latest after so many seconds."
    )


class Job(Answer):
    """Something that takes time, and goes on after a restart."""

    id: str
    kind: str = Field(description="'flatten', 'reclaim', 'purge' or 'scrub'.")
    state: Literal["queued", "running", "paused", "done", "failed", "cancelled"]
    subject: str = Field(description="What it works on: the name of a volume or a snapshot.")
    volume_id: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    done_units: int
    total_units: int | None = Field(None, description="Missing: not known yet.")
    percent: float | None = Field(None, description="0 to 100; missing: not known yet.")
    rate_per_s: float | None = Field(None, description="Units per second; missing unless it runs for a while.")
    eta_s: float | None = Field(None, description="Seconds that are left at this rate; missing: unknown.")
    error: str | None = Field(None, description="Why it failed.")
    detail: str | None = Field(None, description="What it is at just now, in words.")


class JobList(Answer):
    """A page of jobs in order of creation; of those that are over only the newest are kept."""

    jobs: list[Job]
    next_page_token: str | None = Field(None, description="Missing on the last page.")
