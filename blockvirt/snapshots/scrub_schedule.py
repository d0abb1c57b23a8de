"""When a scrub of everything begins by itself. A run that the daemon was down for is made up for once, at its start."""

import asyncio
import logging

from blockvirt.errors import BlockvirtError, ShuttingDown
from blockvirt.limits import SCHEDULE_CLOCK_STEP_S, SCHEDULE_LOOK_S
from blockvirt.meta.store import Store
from blockvirt.snapshots.cron import next_run_s
from blockvirt.snapshots.schedule_worker import Wait, wait_for
from blockvirt.snapshots.scrub import Clocks, Scrubbing
from blockvirt.snapshots.scrub_records import results
from blockvirt.volumes.transactions import pool_record

log = logging.getLogger("blockvirt.scrub")


class ScrubSchedule:
    """Starts the scrubs of a pool. One per process."""

    def __init__(
        self,
        store: Store,
        scrubbing: Scrubbing,
        cron: str,
        *,
        clocks: Clocks | None = None,
        wait: Wait = wait_for,
    ) -> None:
        """``cron`` is what ``check_cron`` returned; empty: never. ``wait`` waits for an event or for so long."""
        self._store = store
        self._scrubbing = scrubbing
        self._cron = cron
        self._clocks = clocks or Clocks()
        self._wait = wait

    async def run(self) -> None:
        """Work until cancelled. Never sleeps longer than ``limits.SCHEDULE_LOOK_S``: the clock may be set meanwhile."""
        never = asyncio.Event()
        while self._cron:
            wait_s = SCHEDULE_LOOK_S
            try:
                now_s = self._clocks.time_s()
                due_s = next_run_s(self._cron, self.due_after_s(now_s))
                if due_s <= now_s:
                    await self._scrubbing.start(scheduled_for_s=now_s)
                    log.info("the scrub of everything that was due is queued")
                    continue
                wait_s = min(due_s - now_s, SCHEDULE_LOOK_S)
            except ShuttingDown:
                raise
            except BlockvirtError as error:  # another one is at work, or the metadata are full: it stays owed
                log.warning("the scrub that is due does not begin yet: %s", error)
            await self._wait(never, wait_s)

    def due_after_s(self, now_s: float) -> float:
        """Return the time after which a run is owed: the last one's, or that of the pool's making.

        What is noted counts, unless it lies so far in the future that the clock must have been wrong when it was.
        """
        with self._store.read() as reader:
            last_s = max((record.scheduled_for_s for record in results(reader)), default=0.0)
            last_s = last_s or pool_record(reader).created_s
        return last_s if last_s <= now_s + SCHEDULE_CLOCK_STEP_S else now_s
