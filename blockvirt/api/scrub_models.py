"""Scrubs on the wire."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from blockvirt.api.wire import Answer, Request, Size


class ScrubCreate(Request):
    """What to read, and how fast."""

    volumes: list[str] = Field(default_factory=list, description="Names or ids; none: everything.")
    rate: Size | None = Field(None, description="Bytes per second at most, 1 MiB or more; as configured by default.")


class ScrubFinding(Answer):
    """One piece of damage."""

    kind: Literal["chunk", "file", "record", "metadata"] = Field(
        description="A sealed chunk, a whole backing file, a record of the metadata, or a part of the metadata's file."
    )
    problem: str
    concerns: list[str] = Field(description="Volumes, and snapshots as VOLUME@SNAPSHOT, that see it; the first few.")
    path: str | None = Field(None, description="The file that it is in.")
    offset_bytes: int | None = Field(None, description="Where in that file, of a chunk or of the metadata's file.")
    length_bytes: int | None = None
    volume_offset_bytes: int | None = Field(None, description="Of a chunk: where in the volumes that see it.")
    chunk: int | None = Field(None, description="Of a chunk: its number in the backing file.")


class Scrub(Answer):
    """A scrub and what it found."""

    id: str = Field(description="Also that of its job.")
    state: Literal["queued", "running", "paused", "done", "failed", "cancelled"]
    volumes: list[str] = Field(description="What it reads, by the names at its beginning; none: everything.")
    scheduled: bool = Field(description="Whether the schedule asked for it.")
    rate_bytes_per_s: int | None = Field(None, description="Missing: as configured.")
    created_at: datetime
    begun_at: datetime | None = None
    ended_at: datetime | None = Field(None, description="When it was through with everything.")
    read_bytes: int
    records: int = Field(description="Rows of the metadata that were looked at.")
    chunks: int = Field(description="Sealed chunks that were compared with their checksums.")
    unread_chunks: int = Field(description="Those that could not be looked at, because their device is away.")
    damaged: int
    findings: list[ScrubFinding] = Field(description="What is damaged; the first 100.")


class ScrubList(Answer):
    """The last scrubs, the newest first."""

    scrubs: list[Scrub]
    standing: list[ScrubFinding] = Field(
        description="The damage that is still there: found by the last scrub of everything that came to its end, or "
        "later, and not deleted since."
    )
