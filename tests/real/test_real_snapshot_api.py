"""Snapshots over HTTP on a daemon as its users run it: with sessions that are open, killed in between, proven sound."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from blockvirt.nbd.client import NbdClient, NbdClientError, RefusedOption
from tests.real.daemon import Daemon

CHUNK = 64 << 10
MIB = 1 << 20


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A running daemon with the volume 'v' of 16 MiB; afterwards its files must be sound."""
    with Daemon() as started:
        started.create(16 * MIB)
        yield started
        started.stop()
        started.check()


def ask(daemon: Daemon, method: str, path: str, body: object = None, *, status: int = 200) -> Any:
    """Send a request; the JSON of its answer, which must have ``status``."""
    got, raw = daemon.http(method, path, body)
    assert got == status, raw
    return json.loads(raw)


@asynccontextmanager
async def session(daemon: Daemon, export: str) -> AsyncIterator[NbdClient]:
    """Open an export."""
    async with await NbdClient.connect_unix(str(daemon.socket)) as client:
        await client.go(export)
        client.begin()
        yield client


async def content(daemon: Daemon, export: str, chunks: int) -> bytes:
    """The first byte of each of the first chunks of an export."""
    async with session(daemon, export) as client:
        return b"".join([await client.read(chunk * CHUNK, 1) for chunk in range(chunks)])


async def test_from_the_first_snapshot_to_the_last_byte_freed(daemon: Daemon) -> None:
    async with session(daemon, "v") as guest:
        await guest.write(0, b"a" * 3 * CHUNK)
        ask(daemon, "POST", "/v1/snapshots", {"volume": "v", "name": "a"}, status=201)
        await guest.write(CHUNK, b"b" * CHUNK)
        ask(daemon, "POST", "/v1/snapshots", {"volume": "v", "name": "b"}, status=201)
        await guest.write(2 * CHUNK, b"c" * CHUNK)
    for export, expected in (("v", b"abc"), ("v@a", b"aaa"), ("v@b", b"aba")):
        assert await content(daemon, export, 3) == expected
    changes = ask(daemon, "GET", "/v1/volumes/v/changes?since=v@a")["changes"]
    assert changes == [{"offset_bytes": CHUNK, "length_bytes": 2 * CHUNK, "zero": False}]

    daemon.crash_and_restart()
    assert ask(daemon, "GET", "/v1/snapshots/v@b/changes?since=v@a")["changes"] == [
        {"offset_bytes": CHUNK, "length_bytes": CHUNK, "zero": False}
    ]
    async with session(daemon, "v") as guest:
        assert ask(daemon, "POST", "/v1/snapshots/v@a/revert", {}, status=409)["code"] == "in-use"
        done = ask(daemon, "POST", "/v1/snapshots/v@a/revert", {"force": True, "safety_name": "old"})
        assert (done["reverted"], done["needs_reopen"]) == (True, True)
        with pytest.raises(NbdClientError):
            await guest.read(0, 1)
    with pytest.raises(RefusedOption):
        await content(daemon, "v", 1)
    ask(daemon, "POST", "/v1/volumes/v/reopen")
    assert await content(daemon, "v", 3) == b"aaa"
    assert await content(daemon, "v@old", 3) == b"abc"

    ask(daemon, "POST", "/v1/snapshots/v@old/clone", {"name": "c"}, status=201)
    gone = ask(daemon, "POST", "/v1/snapshots/delete", {"snapshots": ["v@a", "v@b", "v@old"]})
    ask(daemon, "DELETE", "/v1/volumes/v")
    assert await content(daemon, "c", 3) == b"abc"
    job = ask(daemon, "POST", "/v1/volumes/c/flatten", status=202)
    purge = ask(daemon, "DELETE", "/v1/trash/v", status=202)
    for job_id in (*gone["job_ids"], job["id"], purge["id"]):
        assert ask(daemon, "GET", f"/v1/jobs/{job_id}?wait_s=20")["state"] == "done", job_id
    assert await content(daemon, "c", 3) == b"abc"
    volumes = ask(daemon, "GET", "/v1/volumes")["volumes"]
    assert [(each["name"], each.get("origin"), each["mapped_bytes"]) for each in volumes] == [("c", None, 3 * CHUNK)]
    ask(daemon, "DELETE", "/v1/volumes/c?purge=true")


async def test_schedules_and_jobs_outlive_the_daemon(daemon: Daemon) -> None:
    schedule = {"name": "hourly", "cron": "0 * * * *", "volume": "v", "keep": {"last": 2}}
    made = ask(daemon, "POST", "/v1/schedules", schedule, status=201)
    ask(daemon, "POST", "/v1/snapshots", {"volume": "v", "name": "s"}, status=201)
    ask(daemon, "POST", "/v1/snapshots/v@s/hold")
    ask(daemon, "POST", "/v1/volumes", {"name": "w", "size": MIB}, status=201)
    purge = ask(daemon, "DELETE", "/v1/volumes/w?purge=true")
    daemon.crash_and_restart()
    assert ask(daemon, "GET", f"/v1/jobs/{purge['job_id']}?wait_s=20")["state"] == "done"
    found = ask(daemon, "GET", "/v1/schedules/hourly")
    assert (found["id"], found["next_run_at"]) == (made["id"], made["next_run_at"])
    assert ask(daemon, "GET", "/v1/snapshots/v@s")["holds"] == ["manual"]
    refused = ask(daemon, "DELETE", "/v1/volumes/v?purge=true&force=true", status=409)
    assert refused["code"] == "in-use"
