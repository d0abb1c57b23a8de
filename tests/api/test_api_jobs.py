"""Jobs and the trash over HTTP, on a real pool."""

import asyncio

import pytest

from blockvirt.meta.records import JobRecord
from blockvirt.units import KIB, MIB
from blockvirt.volumes.jobs import Job, JobBoard, Running, queue_job
from tests.api.conftest import PoolApi

CHUNK = 4 * KIB
UNKNOWN = "9f234b8c-3304-4f23-b7b8-6c5e6edac9cc"


class Worker:
    """Does the jobs of a kind of this test's own: it works until it is let go on, or asked to stop."""

    def __init__(self, api: PoolApi) -> None:
        self.api = api
        self.stepping = asyncio.Event()
        self.go_on = asyncio.Event()
        self.fails = False
        self.made = 0
        api.services.jobs.register("test", self.work, cancellable=True, retries=False)

    async def work(self, job: Running) -> None:
        """Step on and on, telling progress."""
        while not self.go_on.is_set():
            job.checkpoint()
            await job.advance(25, 100, 1)
            job.detail = "a quarter"
            self.stepping.set()
            await asyncio.sleep(0)
        if self.fails:
            raise OSError("the disk is on fire")

    async def start(self) -> str:
        """Queue a job and return its id once it is at work."""
        self.stepping.clear()
        job_id = await self.queue()
        await self.stepping.wait()
        return job_id

    async def queue(self) -> str:
        """Queue a job and return its id."""
        self.made += 1
        job_id = f"00000000-0000-4000-8000-{self.made:012d}"
        record = JobRecord(id=job_id, kind="test", state="queued", subject="x", created_s=float(self.made))
        await self.api.pool.engine.store.commit(lambda writer: queue_job(writer, record))
        self.api.services.jobs.wake(job_id)
        return job_id


@pytest.fixture
async def worker(pool_api: PoolApi) -> Worker:
    """Who does the jobs of the kind 'test'."""
    return Worker(pool_api)


async def test_a_job_from_its_start_to_its_end(pool_api: PoolApi, worker: Worker) -> None:
    job_id = await worker.start()
    shown = await pool_api.ok("GET", f"/v1/jobs/{job_id}")
    assert (shown["state"], shown["kind"], shown["subject"]) == ("running", "test", "x")
    assert (shown["done_units"], shown["total_units"], shown["percent"]) == (25, 100, 25.0)
    assert shown["detail"] == "a quarter"
    assert shown["created_at"] == "1970-01-01T00:00:01Z"
    assert "started_at" in shown
    assert not {"volume_id", "finished_at", "error"} & shown.keys()
    assert (await pool_api.ok("GET", f"/v1/jobs/{job_id}?wait_s=0.01"))["state"] == "running"
    waiting = asyncio.create_task(pool_api.ok("GET", f"/v1/jobs/{job_id}?wait_s=60"))
    worker.go_on.set()
    ended = await waiting
    assert (ended["state"], "detail" in ended) == ("done", False)
    assert (await pool_api.ok("GET", f"/v1/jobs/{job_id}?wait_s=60"))["state"] == "done", "at once"


async def test_cancel_in_every_state(pool_api: PoolApi, worker: Worker) -> None:
    running = await worker.start()
    assert (await pool_api.ok("POST", f"/v1/jobs/{running}/cancel"))["state"] == "cancelled"
    assert (await pool_api.ok("POST", f"/v1/jobs/{running}/cancel"))["state"] == "cancelled", "twice is once"
    both = [await worker.start(), await worker.start()]
    queued = await worker.queue()  # no more than two of a kind run at once
    assert (await pool_api.ok("POST", f"/v1/jobs/{queued}/cancel"))["state"] == "cancelled"
    paused = both[0]
    assert (await pool_api.ok("POST", f"/v1/jobs/{paused}/pause"))["state"] == "paused"
    assert (await pool_api.ok("POST", f"/v1/jobs/{paused}/cancel"))["state"] == "cancelled"
    worker.fails = True
    worker.go_on.set()
    failed = await pool_api.ok("GET", f"/v1/jobs/{both[1]}?wait_s=60")
    assert (failed["state"], failed["error"]) == ("failed", "the disk is on fire")
    assert (await pool_api.ok("POST", f"/v1/jobs/{both[1]}/cancel"))["state"] == "cancelled"
    worker.fails = False
    done = await worker.queue()
    assert (await pool_api.ok("GET", f"/v1/jobs/{done}?wait_s=60"))["state"] == "done"
    assert await pool_api.refused("POST", f"/v1/jobs/{done}/cancel") == (409, "job-state")
    for job_id in (running, queued, paused):
        for verb in ("pause", "resume"):
            assert await pool_api.refused("POST", f"/v1/jobs/{job_id}/{verb}") == (409, "job-state"), verb


async def test_pause_and_resume(pool_api: PoolApi, worker: Worker) -> None:
    job_id = await worker.start()
    paused = await pool_api.ok("POST", f"/v1/jobs/{job_id}/pause")
    assert (paused["state"], paused["done_units"]) == ("paused", 25)
    assert (await pool_api.ok("GET", f"/v1/jobs/{job_id}?wait_s=0.01"))["state"] == "paused"
    worker.stepping.clear()
    assert (await pool_api.ok("POST", f"/v1/jobs/{job_id}/resume"))["state"] in ("queued", "running")
    await worker.stepping.wait()
    worker.go_on.set()
    assert (await pool_api.ok("GET", f"/v1/jobs/{job_id}?wait_s=60"))["state"] == "done"


async def test_who_waits_does_not_keep_the_daemon_from_stopping(pool_api: PoolApi, worker: Worker) -> None:
    job_id = await worker.start()
    asked = asyncio.Event()
    board = pool_api.services.jobs

    async def finished(job_id: str) -> Job:
        asked.set()
        return await JobBoard.finished(board, job_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "finished", finished)
        waiting = asyncio.create_task(pool_api.ok("GET", f"/v1/jobs/{job_id}?wait_s=60"))
        await asked.wait()
    await pool_api.server.stop()
    assert (await waiting)["state"] == "running", "an answer, not a connection that is cut when its time is over"
    worker.go_on.set()
    await board.finished(job_id)


async def test_pages_and_filters(pool_api: PoolApi, worker: Worker) -> None:
    worker.go_on.set()
    await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    volume = await pool_api.ok("GET", "/v1/volumes/v")
    purge = await pool_api.ok("DELETE", "/v1/volumes/v?purge=true")
    ids = [await worker.queue() for _ in range(5)]
    for job_id in (*ids, purge["job_id"]):
        await pool_api.ok("GET", f"/v1/jobs/{job_id}?wait_s=60")
    for limit in (1, 2, 5):
        found: list[str] = []
        query = f"?kind=test&limit={limit}"
        token = ""
        while True:
            page = await pool_api.ok("GET", f"/v1/jobs{query}{token}")
            assert 0 < len(page["jobs"]) <= limit
            found += [job["id"] for job in page["jobs"]]
            if "next_page_token" not in page:
                break
            token = f"&page_token={page['next_page_token']}"
        assert found == ids, limit
    token = (await pool_api.ok("GET", "/v1/jobs?kind=test&limit=1"))["next_page_token"]
    assert await pool_api.refused("GET", f"/v1/jobs?kind=purge&page_token={token}") == (422, "invalid-argument")
    assert (await pool_api.ok("GET", "/v1/jobs?state=running")) == {"jobs": []}
    mine = (await pool_api.ok("GET", f"/v1/jobs?volume={volume['id']}&state=done"))["jobs"]
    assert [(job["id"], job["kind"]) for job in mine] == [(purge["job_id"], "purge")]
    assert await pool_api.refused("GET", "/v1/jobs?volume=v") == (404, "not-found"), "its name is free"
    assert await pool_api.refused("GET", "/v1/jobs?state=nonsense") == (422, "invalid-argument")


async def test_what_cannot_be_asked(pool_api: PoolApi, worker: Worker) -> None:
    worker.go_on.set()
    job_id = await worker.queue()
    for bad in ("wait_s=-1", "wait_s=61", "wait_s=x", "wait_s=nan", "wait_s=inf", "more=1"):
        assert await pool_api.refused("GET", f"/v1/jobs/{job_id}?{bad}") == (422, "invalid-argument"), bad
    for unknown in (UNKNOWN, "none", "%00", "x" * 600):
        assert await pool_api.refused("GET", f"/v1/jobs/{unknown}?wait_s=60") == (404, "not-found")
        for verb in ("cancel", "pause", "resume"):
            assert await pool_api.refused("POST", f"/v1/jobs/{unknown}/{verb}") == (404, "not-found")


async def test_a_deletion_cannot_be_given_up(pool_api: PoolApi) -> None:
    await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    gone = await pool_api.ok("DELETE", "/v1/volumes/v?purge=true")
    assert await pool_api.refused("POST", f"/v1/jobs/{gone['job_id']}/cancel") == (409, "job-state")
    assert (await pool_api.ok("GET", f"/v1/jobs/{gone['job_id']}?wait_s=60"))["state"] == "done"


# --- the trash -------------------------------------------------------------------------------------------------------


async def test_a_deleted_volume_can_be_had_back(pool_api: PoolApi) -> None:
    made = await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    await pool_api.write("v", 0, b"a" * 2 * CHUNK)
    await pool_api.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    await pool_api.write("v", 0, b"b" * CHUNK)
    dry = await pool_api.ok("DELETE", "/v1/volumes/v?dry_run=true")
    assert (dry["deleted"], dry["freed_bytes"], dry["snapshots"]) == (False, 3 * CHUNK, 1)
    assert not {"purge_at", "job_id"} & dry.keys()
    gone = await pool_api.ok("DELETE", "/v1/volumes/v")
    assert (gone["deleted"], gone["freed_bytes"], "job_id" in gone) == (True, 3 * CHUNK, False)
    (trashed,) = (await pool_api.ok("GET", "/v1/trash"))["volumes"]
    assert (trashed["id"], trashed["name"], trashed["size_bytes"], trashed["snapshots"]) == (made["id"], "v", MIB, 1)
    assert trashed["purge_at"] == gone["purge_at"] > trashed["trashed_at"]
    assert await pool_api.refused("GET", "/v1/volumes/v") == (404, "not-found")
    assert (await pool_api.ok("GET", "/v1/pool"))["promised_bytes"] == MIB
    restored = await pool_api.ok("POST", "/v1/trash/v/restore")
    assert (restored["id"], restored["name"], restored["snapshots"]) == (made["id"], "v", 1)
    assert await pool_api.read("v", 0, 2 * CHUNK) == b"b" * CHUNK + b"a" * CHUNK
    assert (await pool_api.ok("GET", "/v1/trash"))["volumes"] == []


async def test_a_name_that_is_taken_by_now(pool_api: PoolApi) -> None:
    ids = []
    for _ in range(3):
        ids.append((await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"}))["id"])
        await pool_api.ok("DELETE", "/v1/volumes/v")
    await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    listed: list[str] = []
    token = ""
    while True:
        page = await pool_api.ok("GET", f"/v1/trash?limit=2{token}")
        listed += [volume["id"] for volume in page["volumes"]]
        if "next_page_token" not in page:
            break
        token = f"&page_token={page['next_page_token']}"
    assert listed == ids
    for verb, method in (("/restore", "POST"), ("", "DELETE"), ("?dry_run=true", "DELETE")):
        assert await pool_api.refused(method, f"/v1/trash/v{verb}") == (409, "exists-incompatible"), verb
    assert await pool_api.refused("POST", f"/v1/trash/{ids[0]}/restore") == (409, "exists-incompatible")
    for name in ("", "a@b", "a/b", "\0", "x" * 300):
        body = {"name": name}
        assert await pool_api.refused("POST", f"/v1/trash/{ids[0]}/restore", body) == (422, "invalid-name")
    assert (await pool_api.ok("POST", f"/v1/trash/{ids[0]}/restore", {"name": "w"}))["name"] == "w"
    assert await pool_api.refused("POST", f"/v1/trash/{ids[0]}/restore", {"name": "x"}) == (404, "not-found")


async def test_purging(pool_api: PoolApi) -> None:
    await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    await pool_api.write("v", 0, b"a" * 2 * CHUNK)
    await pool_api.ok("DELETE", "/v1/volumes/v")
    used_bytes = pool_api.pool.engine.storage.status().used_bytes
    dry = await pool_api.ok("DELETE", "/v1/trash/v?dry_run=true")
    assert (dry["volume"]["name"], dry["freed_bytes"]) == ("v", 2 * CHUNK)
    purged = await pool_api.call("DELETE", "/v1/trash/v")
    assert (purged.status, purged.json["kind"], purged.json["subject"]) == (202, "purge", "v")
    assert purged.headers["Location"] == f"/v1/jobs/{purged.json['id']}"
    assert (await pool_api.ok("GET", purged.headers["Location"] + "?wait_s=60"))["state"] == "done"
    await pool_api.until_reclaimed()
    assert used_bytes - pool_api.pool.engine.storage.status().used_bytes >= 2 * CHUNK
    assert (await pool_api.ok("GET", "/v1/pool"))["promised_bytes"] == 0
    for method, path in (
        ("DELETE", "/v1/trash/v"),
        ("POST", "/v1/trash/v/restore"),
        ("DELETE", f"/v1/trash/{UNKNOWN}"),
    ):
        assert await pool_api.refused(method, path) == (404, "not-found")


async def test_a_held_snapshot_keeps_its_volume(pool_api: PoolApi) -> None:
    await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    await pool_api.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    await pool_api.ok("POST", "/v1/snapshots/v@s/hold")
    for query in ("", "?purge=true", "?force=true&purge=true"):
        assert await pool_api.refused("DELETE", f"/v1/volumes/v{query}") == (409, "in-use"), query
    assert (await pool_api.ok("GET", "/v1/volumes/v"))["snapshots"] == 1


async def test_for_good_at_once(pool_api: PoolApi) -> None:
    await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    await pool_api.open("v")
    assert await pool_api.refused("DELETE", "/v1/volumes/v?purge=true") == (409, "in-use")
    gone = await pool_api.ok("DELETE", "/v1/volumes/v?purge=true&force=true")
    assert "purge_at" not in gone
    assert (await pool_api.ok("GET", f"/v1/jobs/{gone['job_id']}?wait_s=60"))["state"] == "done"
    assert (await pool_api.ok("GET", "/v1/trash"))["volumes"] == []
