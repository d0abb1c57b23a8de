"""Jobs and kill -9: a new board goes on from what the store says, whichever commit was the last one to be made."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blockvirt.errors import BlockvirtError, MetadataFault
from blockvirt.limits import JOB_PROGRESS_S
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Store, Writer
from blockvirt.volumes.jobs import JobBoard, Running, queue_job
from tests.volumes.job_bench import Clock, new_job, stored

STEPS = 4
COMMITS = 3 + 2 * STEPS  # to be queued, started, done; and in each step the deed and the progress


class Dying:
    """Makes the process 'die' around a commit: that one is made or not, nobody hears of it, and no other is made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int, *, is_made: bool) -> None:
        self.made = 0
        self.is_dead = asyncio.Event()
        real = Store.commit

        async def commit(store: Store, change: Callable[[Writer], Any]) -> Any:
            self.made += 1
            if self.made < last:
                return await real(store, change)
            if self.made == last and is_made:
                await real(store, change)
            self.is_dead.set()
            raise MetadataFault("this process is dead")

        monkeypatch.setattr(Store, "commit", commit)


def deed(writer: Writer, step: int) -> None:
    """What a step leaves in the store; repeating it does no harm, leaving one out does."""
    for earlier in range(step):
        assert writer.get(Table.RECLAIM, b"step %d" % earlier) is not None, "a step was left out"
    writer.put(Table.RECLAIM, b"step %d" % step, b"done")


async def work(store: Store, clock: Clock, begun: list[int], job: Running) -> None:
    """Do the steps, each with a durable deed; the clock makes each progress durable too."""
    for step in range(job.record.position, STEPS):
        begun.append(step)
        job.checkpoint()
        await store.commit(partial(deed, step=step))
        clock.now_s += JOB_PROGRESS_S
        await job.advance(step + 1, STEPS, step + 1)


def new_board(store: Store, clock: Clock, begun: list[int]) -> JobBoard:
    """A board as a new process makes it."""
    board = JobBoard(store, clock)
    board.register("reclaim", partial(work, store, clock, begun), cancellable=False, retries=True)
    return board


async def live_until_dead(path: Path, job: Any, dying: Dying) -> None:
    """Queue a job and work on it until the process dies, or the job is done."""
    store = Store.open(path, create=True, reserve_bytes=0)
    clock = Clock()
    board = new_board(store, clock, [])
    running = asyncio.create_task(board.run())
    try:
        await store.commit(lambda writer: queue_job(writer, job))
        board.wake(job.id)
        ended = asyncio.create_task(board.finished(job.id))
        died = asyncio.create_task(dying.is_dead.wait())
        await asyncio.wait([ended, died], return_when=asyncio.FIRST_COMPLETED)
    except BlockvirtError:
        assert dying.is_dead.is_set()
    running.cancel()
    await asyncio.wait([running])
    store.close()


@pytest.mark.parametrize("is_made", [False, True])
@pytest.mark.parametrize("last", range(1, COMMITS + 1))
async def test_a_new_board_goes_on(tmp_path: Path, last: int, is_made: bool) -> None:
    path = tmp_path / "metadata"
    job = new_job("reclaim")
    with pytest.MonkeyPatch.context() as patched:
        dying = Dying(patched, last, is_made=is_made)
        await live_until_dead(path, job, dying)
        assert dying.is_dead.is_set()
    store = Store.open(path)
    begun: list[int] = []
    board = new_board(store, Clock(), begun)
    if last == 1 and not is_made:
        assert board.list() == (), "neither the deed nor its job"
    else:
        position = stored(store, job.id).position
        running = asyncio.create_task(board.run())
        assert (await board.finished(job.id)).state == "done"
        running.cancel()
        await asyncio.wait([running])
        assert begun == list(range(position, STEPS)), "it goes on from the stored position"
        with store.read() as reader:
            assert reader.count(Table.RECLAIM) == STEPS
    store.close()


async def test_the_commits_are_those_that_are_counted_on(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        dying = Dying(patched, COMMITS + 1, is_made=False)
        await live_until_dead(tmp_path / "metadata", new_job("reclaim"), dying)
    assert dying.made == COMMITS
    assert not dying.is_dead.is_set()


@pytest.mark.parametrize("command", ["pause", "cancel"])
async def test_a_command_that_was_not_answered_may_be_lost_but_harms_nothing(tmp_path: Path, command: str) -> None:
    store = Store.open(tmp_path / "metadata", create=True, reserve_bytes=0)
    begun, held = asyncio.Event(), asyncio.Event()

    async def worker(job: Running) -> None:
        begun.set()
        await held.wait()

    board = JobBoard(store, Clock())
    board.register("flatten", worker, cancellable=True, retries=False)
    job = new_job()
    await store.commit(lambda writer: queue_job(writer, job))
    running = asyncio.create_task(board.run())
    await begun.wait()
    asked = asyncio.create_task(getattr(board, command)(job.id))
    await asyncio.sleep(0)
    store.close()  # from here on nothing is committed
    running.cancel()
    await asyncio.wait([running, asked])
    assert isinstance(asked.exception(), BlockvirtError)
    again = Store.open(tmp_path / "metadata")
    assert stored(again, job.id).state == "running"
    held.set()
    board = JobBoard(again, Clock())
    board.register("flatten", worker, cancellable=True, retries=False)
    running = asyncio.create_task(board.run())
    assert (await board.finished(job.id)).state == "done"
    running.cancel()
    await asyncio.wait([running])
    again.close()
