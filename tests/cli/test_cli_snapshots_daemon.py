"""Snapshots, clones, reverts, schedules and the trash on a real daemon, by the commands that people type."""

import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from blockvirt.nbd.client import NbdClient
from blockvirt.units import MIB
from tests.real.daemon import Daemon

CHUNK_BYTES = 16384


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A running daemon with a volume ``v`` of 16 MiB; what it leaves behind must be sound."""
    with Daemon() as started:
        started.create(16 * MIB)
        yield started
        started.stop()
        started.check()


def as_json(daemon: Daemon, *words: str) -> Any:
    """What a command prints with ``-o json``; it must not fail."""
    return json.loads(daemon.cli(*words, "-o", "json"))


def ran(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may fail."""
    return subprocess.run(
        [*daemon.command()[:5], *words], capture_output=True, text=True, env=daemon.environment(), check=False
    )


@asynccontextmanager
async def opened(daemon: Daemon, export: str = "v") -> AsyncIterator[NbdClient]:
    """A session on an export."""
    async with await NbdClient.connect_unix(str(daemon.socket)) as client:
        await client.go(export)
        yield client


async def write(daemon: Daemon, text: bytes, offset_bytes: int = 0) -> None:
    """Write to v, and end the session."""
    async with opened(daemon) as client:
        await client.write(offset_bytes, text)
        await client.disconnect()


async def read(daemon: Daemon, export: str, length_bytes: int) -> bytes:
    """Read the beginning of an export, and end the session."""
    async with opened(daemon, export) as client:
        found = await client.read(0, length_bytes)
        await client.disconnect()
        return found


def tree(daemon: Daemon) -> list[str]:
    """The first column of the list of v's snapshots."""
    header, *lines = daemon.cli("snapshot", "list", "v").splitlines()
    return [line[: header.index("CREATED")].rstrip() for line in lines]


async def test_back_and_forth(daemon: Daemon) -> None:
    await write(daemon, b"monday")
    first = as_json(daemon, "snapshot", "create", "v@monday", "--label", "by=hand")
    assert (first["name"], first["labels"], first["mapped_bytes"]) == ("monday", {"by": "hand"}, CHUNK_BYTES)
    await write(daemon, b"tuesday")
    daemon.cli("snapshot", "create", "v@tuesday")
    async with opened(daemon) as client:
        refused = ran(daemon, "snapshot", "revert", "v@monday")
        assert refused.returncode == 5
        assert "session" in refused.stderr
        dry = as_json(daemon, "snapshot", "revert", "v@monday", "--force", "--dry-run")
        assert (dry["reverted"], dry["needs_reopen"]) == (False, True)
        forced = ran(daemon, "snapshot", "revert", "v@monday", "--force", "--safety-name", "kept")
        assert forced.returncode == 0, forced.stderr
        assert "blockvirt volume reopen v" in forced.stderr
        await client.closed()
    assert tree(daemon) == ["v", "|-- monday", "|   |-- tuesday", "|   `-- kept", "`-- (head)"]
    daemon.cli("volume", "reopen", "v")
    assert await read(daemon, "v", 7) == b"monday\0"
    daemon.cli("snapshot", "revert", "v@kept", "--no-safety")
    assert await read(daemon, "v", 7) == b"tuesday"
    assert tree(daemon) == ["v", "|-- monday", "|-- tuesday", "|-- kept", "`-- (head)"]


async def test_clones_hold_on_to_their_origin_until_flattened(daemon: Daemon) -> None:
    await write(daemon, b"origin")
    daemon.cli("snapshot", "create", "v@base")
    clone = as_json(daemon, "snapshot", "clone", "v@base", "c", "--size", "32MiB", "--label", "a=b")
    assert (clone["size_bytes"], clone["origin"], clone["labels"]) == (32 * MIB, "v@base", {"a": "b"})
    assert await read(daemon, "c", 6) == b"origin"
    assert as_json(daemon, "snapshot", "show", "v@base")["clones"] == ["c"]
    assert ran(daemon, "snapshot", "clone", "v@base", "d", "--size", "1MiB").returncode == 1
    job = as_json(daemon, "clone", "flatten", "c", "--wait")
    assert (job["state"], job["kind"]) == ("done", "flatten")
    assert job["id"] in [each["id"] for each in as_json(daemon, "job", "list", "--kind", "flatten")]
    assert as_json(daemon, "job", "show", job["id"])["percent"] == 100
    assert ran(daemon, "job", "cancel", job["id"]).returncode == 5, "it is done"
    assert as_json(daemon, "snapshot", "show", "v@base")["clones"] == []
    assert await read(daemon, "c", 6) == b"origin"


async def test_changed_blocks(daemon: Daemon) -> None:
    await write(daemon, b"x" * 3 * CHUNK_BYTES)
    daemon.cli("snapshot", "create", "v@a")
    async with opened(daemon) as client:
        await client.write(5 * CHUNK_BYTES, b"new")
        await client.zero(CHUNK_BYTES, CHUNK_BYTES)
    daemon.cli("snapshot", "create", "v@b")
    await write(daemon, b"later", 9 * CHUNK_BYTES)
    between = as_json(daemon, "snapshot", "diff", "v@a", "v@b")
    assert between["changes"] == [
        {"offset_bytes": CHUNK_BYTES, "length_bytes": CHUNK_BYTES, "zero": True},
        {"offset_bytes": 5 * CHUNK_BYTES, "length_bytes": CHUNK_BYTES, "zero": False},
    ]
    assert (between["data_bytes"], between["zero_bytes"]) == (CHUNK_BYTES, CHUNK_BYTES)
    by_now = daemon.cli("snapshot", "diff", "v@b", "-o", "csv").splitlines()
    assert by_now[1:] == [f"{9 * CHUNK_BYTES},{CHUNK_BYTES},data"]
    assert ran(daemon, "snapshot", "diff", "v@a", "v@none").returncode == 4


async def test_deleting_frees_what_was_said(daemon: Daemon) -> None:
    await write(daemon, b"a" * 2 * CHUNK_BYTES)
    daemon.cli("snapshot", "create", "v@a")
    daemon.cli("snapshot", "create", "v@b")
    await write(daemon, b"b" * 2 * CHUNK_BYTES)
    daemon.cli("snapshot", "create", "v@c")
    dry = as_json(daemon, "snapshot", "delete", "v@a", "v@b", "--dry-run")
    assert [each["exclusive_bytes"] for each in dry["snapshots"]] == [0, 0]
    assert (dry["freed_bytes"], dry["deleted"]) == (2 * CHUNK_BYTES, False)
    daemon.cli("snapshot", "hold", "v@b", "--tag", "legal")
    held = ran(daemon, "snapshot", "delete", "v@a", "v@b", "--force")
    assert held.returncode == 5
    assert "legal" in held.stderr
    assert [each["name"] for each in as_json(daemon, "snapshot", "list", "v")] == ["a", "b", "c"], "all or none"
    daemon.cli("snapshot", "release", "v@b", "--tag", "legal")
    used_bytes = as_json(daemon, "pool", "show")["used_bytes"]
    assert as_json(daemon, "snapshot", "delete", "v@a", "v@b", "--wait")["deleted"] is True
    assert used_bytes - as_json(daemon, "pool", "show")["used_bytes"] == 2 * CHUNK_BYTES
    assert await read(daemon, "v@c", 1) == b"b"


def test_a_group_is_one_instant(daemon: Daemon) -> None:
    daemon.cli("volume", "create", "w", "--size", "1MiB")
    group = as_json(daemon, "group", "snapshot", "both", "v", "w")
    assert {each["volume"] for each in group["snapshots"]} == {"v", "w"}
    assert len({each["created_at"] for each in group["snapshots"]}) == 1
    assert ran(daemon, "group", "snapshot", "again", "v", "none").returncode == 4
    assert ran(daemon, "snapshot", "create", "w@both", "v@both").returncode == 5
    assert len(as_json(daemon, "snapshot", "list")) == 2, "all or none"
    made_up = as_json(daemon, "snapshot", "create", "v")
    assert as_json(daemon, "snapshot", "show", made_up["id"])["name"].startswith("snap-")


def test_names_that_are_none(daemon: Daemon) -> None:
    for name in ("a@b", "a/b", "", "A", "x" * 300, "\udcff"):
        refused = ran(daemon, "snapshot", "create", f"v@{name}")
        assert (refused.returncode, refused.stderr[:11]) == (1, "blockvirt: "), name
        assert ran(daemon, "snapshot", "show", f"v@{name}").returncode == 4, name
    assert as_json(daemon, "snapshot", "list") == []


def test_schedules(daemon: Daemon) -> None:
    cron = "0 2 * * *"
    dry = daemon.cli("schedule", "create", "nightly", "--cron", cron, "--volume", "v", "--keep-last", "2", "--dry-run")
    assert dry.count("runs next at") == 5
    assert as_json(daemon, "schedule", "list") == []
    made = as_json(daemon, "schedule", "create", "nightly", "--cron", cron, "--volume", "v", "--keep-daily", "7")
    assert (made["keep"], made["state"], made["missed_runs"]) == ({"daily": 7}, "active", 0)
    assert as_json(daemon, "schedule", "pause", "nightly")["state"] == "paused"
    assert as_json(daemon, "schedule", "resume", "nightly")["state"] == "active"
    changed = as_json(daemon, "schedule", "change", "nightly", "--cron", "*/5 * * * *", "--keep-last", "3")
    assert (changed["cron"], changed["keep"]) == ("*/5 * * * *", {"last": 3})
    daemon.cli("snapshot", "create", "v@mine")
    foreseen = as_json(daemon, "schedule", "preview", "nightly", "--runs", "3")
    assert (len(foreseen["next_runs"]), foreseen["missed_runs"]) == (3, 0)
    assert "not taken by this schedule" in daemon.cli("schedule", "preview", "nightly")
    for nonsense in ("", "* * * *", "0 0 30 2 *", "61 * * * *", "every day"):
        refused = ran(daemon, "schedule", "create", "n", "--cron", nonsense, "--volume", "v")
        assert (refused.returncode, "do:" in refused.stderr) == (1, True), nonsense
    assert ran(daemon, "schedule", "create", "n", "--cron", cron).returncode == 1, "for which volumes?"
    assert [line.split()[0] for line in daemon.cli("schedule", "list").splitlines()] == ["NAME", "nightly"]
    daemon.cli("schedule", "delete", "nightly")
    assert ran(daemon, "schedule", "show", "nightly").returncode == 4


async def test_a_volume_comes_back_from_the_trash(daemon: Daemon) -> None:
    await write(daemon, b"precious")
    daemon.cli("snapshot", "create", "v@a")
    before = as_json(daemon, "volume", "show", "v")
    assert (before["snapshots"], before["exclusive_bytes"]) == (1, CHUNK_BYTES)
    gone = ran(daemon, "volume", "delete", "v")
    assert f"blockvirt trash restore {before['id']}" in gone.stderr
    daemon.cli("volume", "create", "v", "--size", "1MiB")
    assert [each["id"] for each in as_json(daemon, "trash", "list")] == [before["id"]]
    assert ran(daemon, "trash", "restore", "v").returncode == 5, "its name is in use by now"
    back = as_json(daemon, "trash", "restore", "v", "--name", "old")
    assert (back["id"], back["name"]) == (before["id"], "old")
    assert await read(daemon, "old@a", 8) == b"precious"
    daemon.cli("volume", "delete", "old")
    assert as_json(daemon, "trash", "purge", "old", "--dry-run")["freed_bytes"] == CHUNK_BYTES
    purged = as_json(daemon, "trash", "purge", "old", "--wait")
    assert (purged["kind"], purged["state"]) == ("purge", "done")
    assert as_json(daemon, "trash", "list") == []
    at_once = as_json(daemon, "volume", "delete", "v", "--purge", "--wait")[0]
    assert at_once["deleted"] is True
    assert "purge_at" not in at_once
    assert as_json(daemon, "job", "show", at_once["job_id"])["state"] == "done"
