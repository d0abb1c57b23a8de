"""The one place that creates tasks: a task is held until it ends, and its failure is never lost."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger("blockvirt.tasks")


class TaskSet:
    """Background tasks of one owner. The owner closes the set; a task that fails is logged with its name."""

    def __init__(self, name: str, on_failure: Callable[[BaseException], None] | None = None) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_failure = on_failure

    def start(self, work: Coroutine[Any, Any, Any], name: str, *, awaited: bool = False) -> asyncio.Task[Any]:
        """Run ``work`` in the background under ``name`` and hold on to it until it is done.

        ``awaited`` says that somebody awaits it: the failure is his, and not reported here.
        """
        task = asyncio.create_task(work, name=f"{self._name}:{name}")
        self._tasks.add(task)
        task.add_done_callback(self._awaited_done if awaited else self._done)
        return task

    def _awaited_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        # Who awaits it may have been cancelled meanwhile: asyncio would then log an error that nobody is to mend.
        if not task.cancelled() and (error := task.exception()):
            log.debug("task %s ended with %r", task.get_name(), error)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        if error := task.exception():
            log.error("task %s failed", task.get_name(), exc_info=error)
            if self._on_failure is not None:
                self._on_failure(error)

    def __len__(self) -> int:
        return len(self._tasks)

    async def wait(self) -> None:
        """Return when no task is left, whatever became of them."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def close(self) -> None:
        """Cancel what is left and wait for its end."""
        for task in list(self._tasks):
            task.cancel()
        await self.wait()
