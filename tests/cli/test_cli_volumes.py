"""Volume commands against a daemon with a script: several volumes in one command, some of which are refused."""

from typing import Any

import pytest

from tests.cli.conftest import Command
from tests.cli.scripted import JOB, Script, rows, volume

REFUSED = {"code": "in-use", "status": 409, "detail": "volume b is in use", "correction": "use force"}


def gone(name: str, **fields: Any) -> dict[str, Any]:
    """The answer to a deletion."""
    return {"deleted": True, "volume": volume(name), "obstacles": [], "freed_bytes": 7, "snapshots": 2} | fields


@pytest.fixture
def purging(script: Script) -> Script:
    """Volume a goes with a job, b is refused."""
    script.on("DELETE", "/v1/volumes/a?purge=true", gone("a", job_id="j1"))
    script.on("DELETE", "/v1/volumes/b?purge=true", REFUSED, status=409)
    script.on("DELETE", "/v1/volumes/c?purge=true", gone("c", job_id="j2"))
    script.on("GET", "/v1/jobs/j1?wait_s=60", JOB | {"state": "running"}, JOB | {"state": "done"})
    return script


async def test_what_went_before_a_refusal_is_said_and_waited_for(command: Command, purging: Script) -> None:
    told = await command("volume", "delete", "a", "b", "c", "--purge", "--wait", "-o", "csv")
    assert told.code == 5
    assert [(row["name"], row["deleted"]) for row in rows(told.out)] == [("a", "yes")]
    assert "not deleted: b, c\n" in told.err
    assert "blockvirt: volume b is in use\n" in told.err
    asked = [path for _, path, _ in purging.asked]
    assert asked.count("/v1/jobs/j1?wait_s=60") == 2, "waited for to its end"
    assert "/v1/volumes/c?purge=true" not in asked


async def test_programs_are_told_the_same(command: Command, purging: Script) -> None:
    told = await command("volume", "delete", "a", "b", "--purge", "-o", "json")
    assert (told.code, told.json) == (5, [gone("a", job_id="j1")])
    assert '"code": "in-use"' in told.err


async def test_a_job_that_fails_beside_a_refusal_is_said_too(command: Command, purging: Script) -> None:
    purging.on("GET", "/v1/jobs/j1?wait_s=60", JOB | {"state": "failed", "error": "a device is missing"})
    told = await command("volume", "delete", "a", "b", "--purge", "--wait")
    assert told.code == 5
    assert "job j1 (reclaim of v) failed" in told.err
    assert "a device is missing" in told.err
    assert "volume b is in use" in told.err


async def test_what_went_into_the_trash_before_a_refusal_is_named(command: Command, script: Script) -> None:
    script.on("DELETE", "/v1/volumes/a", gone("a", purge_at="2026-11-23T02:00:00Z"))
    script.on("DELETE", "/v1/volumes/b", REFUSED, status=409)
    told = await command("volume", "delete", "a", "b")
    assert told.code == 5
    assert "'blockvirt trash restore id-a' brings it back" in told.err


async def test_a_refusal_of_the_first_says_nothing_else(command: Command, purging: Script) -> None:
    told = await command("volume", "delete", "b", "--purge", "--wait")
    assert (told.code, told.out) == (5, "")
    assert told.err.startswith("blockvirt: volume b is in use\n")
