"""Scrub: what lies on the disks is read and compared with its checksums while everything is served.

As a job that can be paused, cancelled and resumed, and is started by hand or by a schedule. What it finds is kept with
its result; nothing is repaired, and who reads a damaged chunk is refused as ever.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from blockvirt.errors import InvalidRequest
from blockvirt.limits import SCRUB_MIN_RATE_BYTES, SCRUB_RATE_BYTES
from blockvirt.meta.keys import Table
from blockvirt.meta.records import ScrubFinding, ScrubRecord
from blockvirt.snapshots.scrub_chunks import ChunkProof
from blockvirt.snapshots.scrub_pace import Pace
from blockvirt.snapshots.scrub_records import SCRUB, Wish, files_of_volumes, find, queue, results, standing
from blockvirt.snapshots.scrub_run import Clocks, ScrubCounters, ScrubRun, in_words
from blockvirt.units import format_size
from blockvirt.volumes.engine import Engine
from blockvirt.volumes.jobs import Moot, Running

__all__ = ["Clocks", "Scrubbing", "in_words"]

log = logging.getLogger("blockvirt.scrub")


@dataclass(frozen=True, slots=True)
class Results:
    """The last scrubs, and what stands of the damage that they found."""

    scrubs: Sequence[ScrubRecord]
    """The newest first."""
    standing: Sequence[ScrubFinding]


class Scrubbing:
    """The worker of scrub jobs. One per pool."""

    def __init__(self, engine: Engine, *, rate_bytes: int = SCRUB_RATE_BYTES, clocks: Clocks | None = None) -> None:
        """Registers with the job board: make it in the same turn of the event loop in which the engine has started.

        ``rate_bytes`` per second are read where a scrub does not say otherwise.
        """
        self.counters = ScrubCounters()
        self._engine = engine
        self._store = engine.store
        self._rate_bytes = rate_bytes
        self._clocks = clocks or Clocks()
        engine.jobs.register(SCRUB, self.work, cancellable=True, retries=False)

    async def start(self, volumes: Sequence[str] = (), rate_bytes: int = 0, *, scheduled_for_s: float = 0.0) -> str:
        """Queue a scrub of volumes (names or ids; none: of everything) and return the id of its job.

        The one at work is joined where it is the same. ``rate_bytes`` per second, 0 as configured. Raises NotFound,
        InUse for another one at work, InvalidRequest for a rate below ``SCRUB_MIN_RATE_BYTES``.
        """
        if 0 < rate_bytes < SCRUB_MIN_RATE_BYTES:
            raise InvalidRequest(
                f"a scrub at {format_size(rate_bytes)} a second would hardly end",
                correction=f"give {format_size(SCRUB_MIN_RATE_BYTES)} or more",
            )
        wish = Wish(tuple(volumes), rate_bytes, scheduled_for_s)
        job_id = await self._store.commit(lambda writer: queue(writer, wish, self._clocks.time_s()))
        self._engine.jobs.wake(job_id)
        return job_id

    def results(self) -> Results:
        """Return the results of the last scrubs; raises MetadataFault."""
        with self._store.read() as reader:
            scrubs = results(reader)
            return Results(tuple(scrubs), tuple(standing(reader, scrubs)))

    async def work(self, job: Running) -> None:
        """Do a scrub job. Raises Moot where its volumes are gone, NotFound where its record is, MetadataFault."""
        with self._store.read() as reader:
            record = find(reader, job.record.id)
            left = [each for each in record.volumes if reader.get(Table.VOLUMES, each.encode()) is not None]
            files = files_of_volumes(reader, left) if record.volumes else None
        if record.volumes and not left:
            raise Moot("what was to be read was deleted meanwhile")
        run = ScrubRun(
            context=self._engine.context,
            job=job,
            record=record,
            proof=ChunkProof(self._engine.context, files),
            pace=Pace(record.rate_bytes or self._rate_bytes),
            clocks=self._clocks,
            counters=self.counters,
        )
        await run.go()
        done = run.record
        log.info(
            "scrub of %s: %d records and %d chunks (%s) looked at, %d not, %d damaged",
            *(job.record.subject, done.records, done.chunks, format_size(done.read_bytes)),
            *(done.unread_chunks, done.damaged),
        )
