"""Scrubs over HTTP, on a real pool."""

import asyncio
from pathlib import Path

from blockvirt.meta.keys import Table
from blockvirt.snapshots.sealing import Sealer
from tests.api.conftest import PoolApi
from tests.volumes.conftest import until

CHUNK = 4096


async def sealed(api: PoolApi) -> Path:
    """Make a volume of ten sealed chunks; returns its backing file."""
    await api.ok("POST", "/v1/volumes", {"size": 10 * CHUNK, "name": "v"})
    await api.write("v", 0, bytes(range(10)) * CHUNK)
    await api.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    sealer = asyncio.create_task(Sealer(api.pool.engine).run())

    def done() -> bool:
        with api.pool.engine.store.read() as reader:
            return not reader.count(Table.SEALS)

    await until(done)
    sealer.cancel()
    return next((api.pool.device / "files").iterdir())


async def test_a_scrub_from_its_start_to_what_it_found(pool_api: PoolApi) -> None:
    path = await sealed(pool_api)
    assert (await pool_api.ok("GET", "/v1/scrubs")) == {"scrubs": [], "standing": []}
    answer = await pool_api.call("POST", "/v1/scrubs")
    assert (answer.status, answer.headers["Location"]) == (202, f"/v1/jobs/{answer.json['id']}")
    assert (answer.json["kind"], answer.json["subject"]) == ("scrub", "everything")
    job = await pool_api.ok("GET", f"/v1/jobs/{answer.json['id']}?wait_s=20")
    assert (job["state"], job["percent"]) == ("done", 100)
    clean = (await pool_api.ok("GET", "/v1/scrubs"))["scrubs"][0]
    assert (clean["id"], clean["state"], clean["damaged"], clean["findings"]) == (job["id"], "done", 0, [])
    assert (clean["chunks"], clean["unread_chunks"], clean["volumes"], clean["scheduled"]) == (10, 0, [], False)
    assert clean["begun_at"] <= clean["ended_at"]
    assert "rate_bytes_per_s" not in clean
    with path.open("r+b") as file:
        file.seek(3 * CHUNK)
        file.write(b"!")
    job = await pool_api.ok("POST", "/v1/scrubs", {"volumes": ["v"], "rate": "100MiB"})
    assert (job["subject"], "volume_id" in job) == ("v", True)
    await pool_api.ok("GET", f"/v1/jobs/{job['id']}?wait_s=20")
    found = await pool_api.ok("GET", "/v1/scrubs")
    newest = found["scrubs"][0]
    assert (newest["volumes"], newest["rate_bytes_per_s"], newest["damaged"]) == (["v"], 100 << 20, 1)
    assert newest["findings"] == found["standing"]
    assert found["standing"] == [
        {
            "kind": "chunk",
            "problem": "it does not hold what it was sealed with",
            "concerns": ["v", "v@s"],
            "path": str(path),
            "offset_bytes": 3 * CHUNK,
            "length_bytes": CHUNK,
            "volume_offset_bytes": 3 * CHUNK,
            "chunk": 3,
        }
    ]


async def test_what_is_refused(pool_api: PoolApi) -> None:
    assert await pool_api.refused("POST", "/v1/scrubs", {"volumes": ["nobody"]}) == (404, "not-found")
    assert await pool_api.refused("POST", "/v1/scrubs", {"rate": "1KiB"}) == (422, "invalid-argument")
    assert await pool_api.refused("POST", "/v1/scrubs", {"rate": "10G"}) == (422, "invalid-size")
    await pool_api.ok("POST", "/v1/volumes", {"size": CHUNK, "name": "v"})
    job = await pool_api.ok("POST", "/v1/scrubs", {})
    assert (await pool_api.ok("POST", "/v1/scrubs", {}))["id"] == job["id"]
    assert await pool_api.refused("POST", "/v1/scrubs", {"volumes": ["v"]}) == (409, "in-use")
    await pool_api.ok("POST", f"/v1/jobs/{job['id']}/cancel")
    (cancelled,) = (await pool_api.ok("GET", "/v1/scrubs"))["scrubs"]
    assert (cancelled["state"], "ended_at" in cancelled) == ("cancelled", False)


async def test_one_whose_job_is_forgotten_is_still_told(pool_api: PoolApi) -> None:
    job = await pool_api.ok("POST", "/v1/scrubs", {})
    await pool_api.ok("GET", f"/v1/jobs/{job['id']}?wait_s=20")
    await pool_api.pool.engine.store.commit(lambda writer: writer.delete(Table.JOBS, job["id"].encode()))
    board = pool_api.pool.engine.jobs
    board._queues.forget(board._queues.entries[job["id"]])
    assert [each["state"] for each in (await pool_api.ok("GET", "/v1/scrubs"))["scrubs"]] == ["done"]
