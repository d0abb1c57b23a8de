"""The job board at work: order, bounds, progress, failures and retries, what is kept and what is told."""

import asyncio
from collections.abc import Generator
from pathlib import Path

import pytest

from blockvirt.errors import DeviceFault, MetadataFault, NotFound, PoolFull, ShuttingDown
from blockvirt.ids import new_id
from blockvirt.limits import FINISHED_JOBS_PER_KIND, JOB_PROGRESS_S, JOB_RETRY_S, RUNNING_JOBS_PER_KIND
from blockvirt.meta.keys import Table
from blockvirt.meta.store import Store, Writer
from blockvirt.volumes.job_states import State
from blockvirt.volumes.jobs import Running, queue_job
from tests.volumes.conftest import until
from tests.volumes.job_bench import START_S, Bench, new_job, stored


@pytest.fixture
def bench(tmp_path: Path) -> Generator[Bench]:
    store = Store.open(tmp_path / "metadata", create=True, reserve_bytes=0)
    yield Bench(store)
    store.close()


async def test_a_job_is_done_step_by_step(bench: Bench) -> None:
    async with bench.at_work() as board:
        job_id = await bench.put(new_job(volume_id="7"))
        await bench.flatten.until_waiting("web1")
        assert (board.get(job_id).state, stored(bench.store, job_id).state) == ("running", "running")
        bench.clock.now_s += 10
        bench.flatten.allow()
        seen = await board.finished(job_id)
    assert bench.flatten.steps_of("web1") == [0, 1, 2]
    assert (seen.state, seen.percent, seen.done_units, seen.total_units) == ("done", 100.0, 3, 3)
    assert (seen.started_s, seen.finished_s, seen.volume_id) == (START_S, START_S + 10, "7")
    assert stored(bench.store, job_id).position == 3, "the end makes the last progress durable"


async def test_a_job_is_there_if_and_only_if_its_deed_is(bench: Bench) -> None:
    record = new_job()

    def deed(writer: Writer) -> None:
        queue_job(writer, record)
        raise NotFound("the deed fails")

    with pytest.raises(NotFound):
        await bench.store.commit(deed)
    with pytest.raises(NotFound):
        bench.board.get(record.id)


@pytest.mark.parametrize("job_id", ["", "x" * 600, "5ad0cd27-6a5c-4c3a-8f3c-0c2d7d5c3c11", "é"])
async def test_a_job_that_is_not_there(bench: Bench, job_id: str) -> None:
    for ask in (bench.board.cancel, bench.board.pause, bench.board.resume, bench.board.finished):
        with pytest.raises(NotFound):
            await ask(job_id)


async def test_jobs_start_in_order_of_creation_and_only_so_many_of_a_kind_at_once(bench: Bench) -> None:
    order = [f"v{number}" for number in range(6)]
    for number in (3, 0, 5, 1, 4, 2):
        await bench.put(new_job(subject=order[number], created_s=START_S + number))
    await bench.put(new_job("reclaim", subject="r", created_s=START_S + 99))
    async with bench.at_work() as board:
        await bench.flatten.until_waiting(*order[:RUNNING_JOBS_PER_KIND])
        await bench.reclaim.until_waiting("r")
        bench.flatten.allow()
        for job in board.list():
            if job.kind == "flatten":
                await board.finished(job.id)
    assert bench.flatten.most_at_once == RUNNING_JOBS_PER_KIND
    firsts = [subject for subject, step in bench.flatten.done if step == 0]
    assert sorted(firsts[:2]) == order[:2]
    assert sorted(firsts) == order


async def test_progress_is_seen_at_once_and_stored_now_and_then(bench: Bench) -> None:
    async with bench.at_work() as board:
        job_id = await bench.put(new_job())
        await bench.flatten.until_waiting("web1")
        commits = bench.store.stats().commits
        bench.clock.now_s += JOB_PROGRESS_S - 1
        bench.flatten.allow(1)
        await until(lambda: board.get(job_id).done_units == 1)
        seen = board.get(job_id)
        assert seen.percent == pytest.approx(100 / 3)
        assert (seen.rate_per_s, seen.eta_s) == (0.25, 8.0)
        await bench.flatten.until_waiting("web1")
        assert bench.store.stats().commits == commits
        assert stored(bench.store, job_id).position == 0
        bench.clock.now_s += 1
        bench.flatten.allow(1)
        await until(lambda: stored(bench.store, job_id).position == 2)
        await bench.flatten.until_waiting("web1")
        assert bench.store.stats().commits == commits + 1
        assert stored(bench.store, job_id).state == "running"


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (DeviceFault("device d1 is missing", correction="bring it back"), "device d1 is missing; bring it back"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
        (KeyError("oops"), "a mistake of blockvirt, see its log: KeyError('oops')"),
        (asyncio.CancelledError(), "a mistake of blockvirt, see its log: CancelledError()"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_failure_is_told_and_ends_nothing_else(bench: Bench, failure: BaseException, told: str) -> None:
    bench.flatten.failures.append(failure)
    async with bench.at_work() as board:
        broken = await bench.put(new_job())
        bench.flatten.allow()
        seen = await board.finished(broken)
        assert (seen.state, seen.error) == ("failed", told)
        assert (await board.finished(await bench.put(new_job(subject="other")))).state == "done"
        await bench.after(10 * JOB_RETRY_S)
        assert (await board.finished(await bench.put(new_job(subject="third")))).state == "done"
        assert board.get(broken).state == "failed", "this kind waits for somebody to resume it"
        await board.resume(broken)
        seen = await board.finished(broken)
        assert (seen.state, seen.error) == ("done", "")


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_kind_that_retries_goes_on_after_a_while_from_where_it_was(bench: Bench, restarted: bool) -> None:
    bench.reclaim.failures.append(OSError(5, "Input/output error"))
    job_id = await bench.put(new_job("reclaim", position=1, done_units=1))
    bench.reclaim.allow()
    async with bench.at_work() as board:
        assert (await board.finished(job_id)).state == "failed"
        await bench.after(JOB_RETRY_S - 1)
        other = await bench.put(new_job("reclaim", subject="other"))
        await board.finished(other)
        assert board.get(job_id).state == "failed", "not yet"
        if not restarted:
            await bench.after(1.0)
            await until(lambda: board.get(job_id).state == "done")
    if restarted:
        board = bench.new_board()
        async with bench.at_work():
            await bench.after(1.0)
            await until(lambda: board.get(job_id).state == "done")
    assert bench.reclaim.steps_of("web1") == [1, 2]


async def test_a_clock_that_is_set_back_delays_no_retry(bench: Bench) -> None:
    bench.reclaim.failures.append(OSError(5, "Input/output error"))
    bench.reclaim.allow()
    async with bench.at_work() as board:
        job_id = await bench.put(new_job("reclaim"))
        assert (await board.finished(job_id)).state == "failed"
        await bench.after(-86_400.0)
        await until(lambda: board.get(job_id).state == "done")


async def put_history(bench: Bench) -> list[str]:
    """Store as many jobs that are over as are kept; returns their ids, oldest first. The first has failed."""
    states = (State.FAILED, State.DONE, State.CANCELLED)
    over = [new_job(state=states[n % 3], finished_s=START_S - 1_000 + n) for n in range(FINISHED_JOBS_PER_KIND)]

    def store_all(writer: Writer) -> None:
        for job in reversed(over):
            writer.put_record(Table.JOBS, job.id.encode(), job)

    await bench.store.commit(store_all)
    return [job.id for job in over]


async def test_of_jobs_that_are_over_the_newest_are_kept(bench: Bench) -> None:
    over = await put_history(bench)
    others = [new_job(state=State.PAUSED), new_job("purge"), new_job("reclaim", state=State.FAILED, finished_s=START_S)]
    waiting = {await bench.put(job) for job in others}
    await bench.board.resume(over[3])
    bench.flatten.allow(3)
    async with bench.at_work() as board:
        await board.finished(over[3])
        assert board.get(over[0]).state == "failed", "a job that was resumed made room for its own end"
        newer = await bench.put(new_job())
        await bench.flatten.until_waiting("web1")
        assert board.get(over[0]).state == "failed", "room is made at the end, not before"
        bench.flatten.allow()
        await board.finished(newer)
        left = {job.id for job in board.list()}
    assert left == {*over[1:], *waiting, newer}
    with bench.store.read() as reader:
        assert {key.decode() for key, _ in reader.scan(Table.JOBS)} == left


async def test_the_oldest_job_that_is_over_can_still_be_cancelled_and_resumed(bench: Bench) -> None:
    over = await put_history(bench)
    assert (await bench.board.cancel(over[0])).state == "cancelled"
    assert stored(bench.store, over[0]).state == "cancelled"
    await bench.board.cancel(await bench.put(new_job()))
    await bench.board.cancel(await bench.put(new_job()))
    await bench.board.cancel(await bench.put(new_job()))
    assert next(iter(bench.board._queues.kinds["flatten"].over)) == over[3]
    paused = await bench.put(new_job(state=State.PAUSED))
    bench.board.get(paused)
    await asyncio.gather(bench.board.resume(over[3]), bench.board.cancel(paused))
    assert stored(bench.store, over[3]).state == "queued", "resumed a moment before it would have been forgotten"
    assert bench.board.get(over[3]).state == "queued"


async def test_each_failure_is_waited_for_anew(bench: Bench) -> None:
    bench.reclaim.failures.append(OSError(5, "one"))
    job_id = await bench.put(new_job("reclaim"))
    bench.reclaim.allow()
    async with bench.at_work() as board:
        assert (await board.finished(job_id)).error == "[Errno 5] one"
        await board.finished(await bench.put(new_job("reclaim", subject="other")))
        assert board.get(job_id).error == "[Errno 5] one"
        bench.clock.now_s += JOB_RETRY_S / 2
        bench.reclaim.failures.append(OSError(5, "two"))
        await board.resume(job_id)
        assert (await board.finished(job_id)).error == "[Errno 5] two"
        await until(lambda: board._queues.entries[job_id].run is None)
        await bench.after(JOB_RETRY_S / 2 + 1)
        await board.finished(await bench.put(new_job("reclaim", subject="third")))
        assert board.get(job_id).error == "[Errno 5] two"
        await bench.after(JOB_RETRY_S / 2)
        await until(lambda: board.get(job_id).state == "done")


async def test_resuming_what_is_queued_does_not_queue_it_twice(bench: Bench) -> None:
    tried: list[str] = []

    async def worker(job: Running) -> None:
        if job.record.subject == "busy":
            await asyncio.Event().wait()
        tried.append(job.record.subject)
        raise OSError(5, "Input/output error")

    bench.board.register("purge", worker, cancellable=False, retries=True)
    for _ in range(RUNNING_JOBS_PER_KIND - 1):
        await bench.put(new_job("purge", subject="busy"))
    job_id = await bench.put(new_job("purge", created_s=START_S + 1))
    for _ in range(3):
        assert (await bench.board.resume(job_id)).state == "queued"
    async with bench.at_work() as board:
        await board.finished(job_id)
        await board.finished(await bench.put(new_job("purge", subject="other", created_s=START_S + 2)))
    assert tried == ["web1", "other"]


async def test_what_is_told_of_the_jobs(bench: Bench) -> None:
    one = await bench.put(new_job(volume_id="a", created_s=2.0, state=State.PAUSED))
    two = await bench.put(new_job(volume_id="b", created_s=1.0))
    three = await bench.put(new_job("reclaim", volume_id="a", created_s=3.0))
    board = bench.board
    assert [job.id for job in board.list()] == [two, one, three]
    assert [job.id for job in board.list(state="queued")] == [two, three]
    assert [job.id for job in board.list(kind="flatten", volume_id="a")] == [one]
    expected = {(kind, str(state)): 0 for kind in ("flatten", "reclaim") for state in State}
    assert board.counts() == expected | {("flatten", "paused"): 1, ("flatten", "queued"): 1, ("reclaim", "queued"): 1}


async def test_jobs_that_nobody_named_are_found_too(bench: Bench) -> None:
    async with bench.at_work() as board:
        assert board.list() == ()
        record = new_job()
        await bench.store.commit(lambda writer: queue_job(writer, record))
        assert [job.id for job in board.list()] == [record.id]
        board.wake()
        await bench.flatten.until_waiting("web1")


async def test_a_job_of_a_kind_that_nobody_does_stays_queued(bench: Bench) -> None:
    strange = await bench.put(new_job("defragment"))
    bench.flatten.allow()
    async with bench.at_work() as board:
        await board.finished(await bench.put(new_job()))
        assert board.get(strange).state == "queued"


async def test_a_damaged_job_is_left_alone(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    damaged = new_id()
    await bench.store.commit(lambda writer: writer.put(Table.JOBS, damaged.encode(), b"what is this"))
    bench.flatten.allow()
    async with bench.at_work() as board:
        assert (await board.finished(await bench.put(new_job()))).state == "done"
        assert len(board.list()) == 1
        with pytest.raises(NotFound):
            board.get(damaged)
    with bench.store.read() as reader:
        assert reader.get(Table.JOBS, damaged.encode()) is not None
    assert len([record for record in caplog.records if "left alone" in record.message]) == 1


async def test_the_end_of_the_board_interrupts_jobs_and_keeps_their_progress(bench: Bench) -> None:
    async with bench.at_work() as board:
        job_id = await bench.put(new_job())
        bench.flatten.allow(2)
        await until(lambda: board.get(job_id).done_units == 2)
        assert stored(bench.store, job_id).position == 0
        waiting = [asyncio.create_task(ask(job_id)) for ask in (board.finished, board.pause, board.cancel)]
        await until(lambda: len(bench.board._queues.entries[job_id].waiters) == 1)
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(error, ShuttingDown)
    with pytest.raises(ShuttingDown):
        await board.finished(job_id)
    assert (stored(bench.store, job_id).state, stored(bench.store, job_id).position) == ("running", 2)
    bench.flatten.allow()
    bench.new_board()
    async with bench.at_work() as board:
        assert (await board.finished(job_id)).state == "done"
    assert bench.flatten.steps_of("web1") == [0, 1, 2]


async def test_for_want_of_space_progress_is_only_deferred(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.commit
    refused: list[int] = []

    async def commit(store: Store, change: object) -> object:
        if len(refused) < 2:
            refused.append(1)
            raise PoolFull("no room for metadata")
        return await real(store, change)  # type: ignore[arg-type]

    async with bench.at_work() as board:
        job_id = await bench.put(new_job("reclaim"))
        await bench.reclaim.until_waiting("web1")
        monkeypatch.setattr(Store, "commit", commit)
        bench.clock.now_s += 2 * JOB_PROGRESS_S
        bench.reclaim.allow()
        await until(lambda: len(refused) == 2)  # the progress, then the end
        await until(lambda: board._queues.entries[job_id].run is None)
        assert bench.reclaim.steps_of("web1") == [0, 1, 2]
        assert stored(bench.store, job_id).state == "running"
        await bench.after(JOB_RETRY_S)
        assert (await board.finished(job_id)).state == "done"


async def test_a_store_that_has_failed_does_not_end_the_board(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await bench.put(new_job())
    bench.board.get(job_id)
    with monkeypatch.context() as patched:
        reads: list[int] = []

        def broken(store: Store) -> None:
            reads.append(1)
            raise MetadataFault("the metadata store has failed")

        patched.setattr(Store, "read", broken)
        task = asyncio.create_task(bench.board.run())
        await until(lambda: bool(reads))
    bench.board.wake()
    await bench.flatten.until_waiting("web1")
    task.cancel()
    await asyncio.wait([task])


async def test_a_worker_may_see_that_it_is_to_stop(bench: Bench) -> None:
    seen: list[bool] = []
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def worker(job: Running) -> None:
        assert (job.record.state, job.record.started_s) == ("running", START_S)
        seen.append(job.stopping)
        begun.set()
        await go_on.wait()
        seen.append(job.stopping)
        job.checkpoint()

    bench.board.register("purge", worker, cancellable=False, retries=True)
    async with bench.at_work() as board:
        job_id = await bench.put(new_job("purge"))
        await begun.wait()
        pausing = asyncio.create_task(board.pause(job_id))
        await asyncio.sleep(0)
        go_on.set()
        assert (await pausing).state == "paused"
    assert seen == [False, True]
