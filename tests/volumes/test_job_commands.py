"""Cancel, pause and resume: in every state, of jobs at work and of those that wait, and several at once."""

import asyncio
from collections.abc import Generator
from pathlib import Path

import pytest

from blockvirt.errors import BlockvirtError, MetadataFault, WrongJobState
from blockvirt.limits import JOB_RETRY_S
from blockvirt.meta.store import Store
from blockvirt.volumes.job_states import FINISHED, State
from blockvirt.volumes.jobs import JobBoard
from tests.volumes.conftest import until
from tests.volumes.job_bench import START_S, Bench, new_job, stored

# State before -> what cancel, pause and resume make of a job that can be cancelled, and of one that cannot.
TABLE = """
queued     cancelled  paused  queued     -  paused  queued
running    cancelled  paused  running    -  paused  running
paused     cancelled  paused  queued     -  paused  queued
done       -          -       -          -  -       -
failed     cancelled  paused  queued     -  paused  queued
cancelled  cancelled  -       -          -  -       -
"""
CASES = [
    (kind, before, command, afters[index + offset])
    for before, *afters in (line.split() for line in TABLE.strip().splitlines())
    for offset, kind in ((0, "flatten"), (3, "reclaim"))
    for index, command in enumerate(("cancel", "pause", "resume"))
]


@pytest.fixture
def bench(tmp_path: Path) -> Generator[Bench]:
    store = Store.open(tmp_path / "metadata", create=True, reserve_bytes=0)
    yield Bench(store)
    store.close()


async def command(board: JobBoard, name: str, job_id: str) -> str:
    """The state that a command leads to; '-' where it is refused."""
    try:
        return str((await getattr(board, name)(job_id)).state)
    except WrongJobState as refused:
        return "-" if refused.correction else "refused without a word on what is possible"


async def put_in_state(bench: Bench, kind: str, state: str) -> str:
    """Store a job as one that has come into ``state`` half-way."""
    finished_s = START_S if state in FINISHED else 0.0
    return await bench.put(new_job(kind, state=state, position=1, done_units=1, finished_s=finished_s))


@pytest.mark.parametrize(("kind", "before", "name", "after"), CASES)
async def test_a_command_to_a_job_that_nobody_works_on(
    bench: Bench, kind: str, before: str, name: str, after: str
) -> None:
    job_id = await put_in_state(bench, kind, before)
    assert await command(bench.board, name, job_id) == after
    expected = before if after == "-" else after
    assert (bench.board.get(job_id).state, stored(bench.store, job_id).state) == (expected, expected)
    again = JobBoard(bench.store, bench.clock)
    assert again.get(job_id).state == expected
    worker = bench.flatten if kind == "flatten" else bench.reclaim
    worker.allow()
    bench.clock.now_s += JOB_RETRY_S - 1
    async with bench.at_work() as board:
        await board.finished(await bench.put(new_job(kind, subject="other")))
        if expected in ("queued", "running"):
            assert (await board.finished(job_id)).state == "done"
    assert worker.steps_of("web1") == ([1, 2] if expected in ("queued", "running") else [])


@pytest.mark.parametrize(
    ("kind", "name", "after"), [(kind, name, after) for kind, before, name, after in CASES if before == "running"]
)
async def test_a_command_to_a_job_at_work(bench: Bench, kind: str, name: str, after: str) -> None:
    worker = bench.flatten if kind == "flatten" else bench.reclaim
    async with bench.at_work() as board:
        job_id = await bench.put(new_job(kind))
        await worker.until_waiting("web1")
        asked = asyncio.create_task(command(board, name, job_id))
        await asyncio.sleep(0)
        if after in ("-", "running"):
            assert await asked == after
            worker.allow()
            assert (await board.finished(job_id)).state == "done"
            return
        assert not asked.done(), "the step that has begun is finished first"
        assert board.get(job_id).state == "running"
        worker.allow(1)
        assert await asked == after
        assert worker.at_once == 0, "nothing is at work any more"
    assert worker.steps_of("web1") == [0]
    assert (stored(bench.store, job_id).state, stored(bench.store, job_id).position) == (after, 1)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_paused_job_goes_on_where_it_was(bench: Bench, restarted: bool) -> None:
    job_id = await bench.put(new_job("reclaim"))
    async with bench.at_work() as board:
        await bench.reclaim.until_waiting("web1")
        pausing = asyncio.create_task(board.pause(job_id))
        await asyncio.sleep(0)
        bench.reclaim.allow()
        await pausing
        await board.finished(await bench.put(new_job("reclaim", subject="other")))
        if not restarted:
            await board.resume(job_id)
            assert (await board.finished(job_id)).state == "done"
    if restarted:
        bench.new_board()
        async with bench.at_work() as board:
            await board.finished(await bench.put(new_job("reclaim", subject="third")))
            assert board.get(job_id).state == "paused", "a restart resumes nothing that somebody paused"
            await board.resume(job_id)
            assert (await board.finished(job_id)).state == "done"
    assert bench.reclaim.steps_of("web1") == [0, 1, 2]


@pytest.mark.parametrize("name", ["cancel", "pause"])
async def test_what_is_done_before_its_worker_could_stop_is_done(bench: Bench, name: str) -> None:
    async with bench.at_work() as board:
        job_id = await bench.put(new_job(position=2))
        await bench.flatten.until_waiting("web1")
        asked = asyncio.create_task(command(board, name, job_id))
        await asyncio.sleep(0)
        bench.flatten.allow()
        assert await asked == "-"
        assert board.get(job_id).state == "done"


@pytest.mark.parametrize(
    ("kind", "name", "after"), [("flatten", "cancel", "cancelled"), ("reclaim", "pause", "paused")]
)
async def test_a_job_that_fails_while_it_is_to_stop_stops(bench: Bench, kind: str, name: str, after: str) -> None:
    worker = bench.flatten if kind == "flatten" else bench.reclaim
    worker.failures.append(OSError(5, "Input/output error"))
    async with bench.at_work() as board:
        job_id = await bench.put(new_job(kind))
        await worker.until_waiting("web1")
        asked = asyncio.create_task(command(board, name, job_id))
        await asyncio.sleep(0)
        worker.allow()
        assert await asked == after
        assert "Input/output error" in board.get(job_id).error
        await bench.after(2 * JOB_RETRY_S)
        await board.finished(await bench.put(new_job(kind, subject="other")))
        assert board.get(job_id).state == after, "and is not tried again"


async def test_a_refusal_is_a_conflict_that_says_what_is_possible(bench: Bench) -> None:
    job_id = await put_in_state(bench, "reclaim", "failed")
    with pytest.raises(WrongJobState) as refused:
        await bench.board.cancel(job_id)
    assert (refused.value.code, refused.value.http_status) == ("job-state", 409)
    assert "cannot be cancelled" in refused.value.message
    assert "it can be paused or resumed" in refused.value.correction


async def test_several_commands_at_once(bench: Bench) -> None:
    async with bench.at_work() as board:
        job_id = await bench.put(new_job())
        await bench.flatten.until_waiting("web1")
        names = ("pause", "pause", "cancel", "cancel", "pause", "resume")
        asked = [asyncio.create_task(command(board, name, job_id)) for name in names]
        await asyncio.sleep(0)
        bench.flatten.allow(1)
        states = await asyncio.gather(*asked)
    assert states == ["-", "-", "cancelled", "cancelled", "-", "-"]
    assert stored(bench.store, job_id).state == "cancelled"


async def test_resuming_what_is_about_to_pause_lets_it_go_on(bench: Bench) -> None:
    async with bench.at_work() as board:
        job_id = await bench.put(new_job())
        await bench.flatten.until_waiting("web1")
        asked = [asyncio.create_task(command(board, name, job_id)) for name in ("pause", "resume")]
        await asyncio.sleep(0)
        bench.flatten.allow()
        assert await asyncio.gather(*asked) == ["paused", "queued"]
        assert (await board.finished(job_id)).state == "done"
    assert bench.flatten.steps_of("web1") == [0, 1, 2]


async def test_a_command_takes_effect_though_nobody_waits_for_it(bench: Bench) -> None:
    async with bench.at_work() as board:
        job_id = await bench.put(new_job())
        await bench.flatten.until_waiting("web1")
        asked = asyncio.create_task(board.pause(job_id))
        await asyncio.sleep(0)
        asked.cancel()
        bench.flatten.allow(1)
        await until(lambda: board._queues.entries[job_id].run is None)
        assert board.get(job_id).state == "paused"
        asked = asyncio.create_task(board.resume(job_id))
        await asyncio.sleep(0)
        asked.cancel()
        bench.flatten.allow()
        assert (await board.finished(job_id)).state == "done"


@pytest.mark.parametrize("name", ["cancel", "pause"])
async def test_a_command_in_the_moment_of_the_start_wins(
    bench: Bench, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The command is on its way to the store when the board starts the job: the store's order decides."""
    job_id = await bench.put(new_job())
    bench.board.get(job_id)
    bench.flatten.allow()
    asked = asyncio.create_task(command(bench.board, name, job_id))
    await asyncio.sleep(0)
    async with bench.at_work() as board:
        state = await asked
        await board.finished(await bench.put(new_job(subject="other")))
        assert state == board.get(job_id).state == stored(bench.store, job_id).state
    assert bench.flatten.steps_of("web1") == []
    assert not caplog.records, "nothing is wrong with that"


async def test_a_command_that_cannot_be_recorded_is_not_said_to_be_done(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def commit(store: Store, change: object) -> object:
        raise MetadataFault("the metadata store has failed")

    async with bench.at_work() as board:
        job_id = await bench.put(new_job())
        await bench.flatten.until_waiting("web1")
        with monkeypatch.context() as patched:
            patched.setattr(Store, "commit", commit)
            asked = asyncio.create_task(board.pause(job_id))
            await asyncio.sleep(0)
            bench.flatten.allow(1)
            with pytest.raises(BlockvirtError, match="store has failed"):
                await asked
            assert board.get(job_id).state == "running"
        assert (await board.pause(job_id)).state == "paused"
    assert stored(bench.store, job_id).state == State.PAUSED


async def test_waiting_for_a_paused_job_goes_on_until_it_has_ended(bench: Bench) -> None:
    job_id = await put_in_state(bench, "flatten", "paused")
    bench.flatten.allow()
    async with bench.at_work() as board:
        assert board.get(job_id).state == "paused"
        waiting = [asyncio.create_task(board.finished(job_id)) for _ in range(3)]
        await until(lambda: len(board._queues.entries[job_id].waiters) == 3)
        waiting[0].cancel()
        await board.resume(job_id)
        assert [(await task).state for task in waiting[1:]] == ["done", "done"]
        assert not board._queues.entries[job_id].waiters
