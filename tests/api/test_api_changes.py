"""Changed blocks over HTTP, on a real pool: compared with plain bytes."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.api import changes as answers
from blockvirt.api.snapshot_models import ChangedRange, Changes
from blockvirt.limits import API_MAX_CHANGES, MAX_VOLUME_BYTES
from blockvirt.snapshots.changed_blocks import Page
from blockvirt.snapshots.changes import changed_runs
from blockvirt.units import KIB, MIB
from tests.api.conftest import PoolApi

CHUNK = 4 * KIB
SIZE = 4 * MIB + 1024  # two leaves, and a last chunk that is cut


@pytest.fixture
async def v(pool_api: PoolApi) -> PoolApi:
    """The API of a pool with the empty volume 'v'."""
    await pool_api.ok("POST", "/v1/volumes", {"size": SIZE, "name": "v"})
    return pool_api


async def everything(api: PoolApi, path: str, since: str | None = None, limit: int = 1000) -> list[dict[str, Any]]:
    """All ranges, page by page."""
    found: list[dict[str, Any]] = []
    offset = 0
    while True:
        query = f"?offset={offset}&limit={limit}" + (f"&since={since}" if since is not None else "")
        page = await api.ok("GET", f"{path}/changes{query}")
        assert page["chunk_bytes"] == CHUNK
        assert len(page["changes"]) <= limit
        found += page["changes"]
        if "next_offset_bytes" not in page:
            return found
        assert len(page["changes"]) == limit
        assert page["next_offset_bytes"] > offset
        offset = page["next_offset_bytes"]


def chunks(changes: list[dict[str, Any]]) -> dict[int, bool]:
    """Chunk -> whether it reads as zeros; each is told at most once, in order."""
    found: dict[int, bool] = {}
    for change in changes:
        first, end = change["offset_bytes"] // CHUNK, -(-(change["offset_bytes"] + change["length_bytes"]) // CHUNK)
        assert change["offset_bytes"] % CHUNK == 0
        assert change["offset_bytes"] + change["length_bytes"] <= SIZE
        for chunk in range(first, end):
            assert chunk not in found
            assert not found or chunk > max(found)
            found[chunk] = change["zero"]
    return found


def differing(old: bytes, new: bytes) -> set[int]:
    return {at // CHUNK for at in range(0, len(new), CHUNK) if old[at : at + CHUNK] != new[at : at + CHUNK]}


async def test_histories_of_writes_and_zeros(v: PoolApi) -> None:
    dice = random.Random(3)
    content = bytearray(SIZE)
    states: dict[str, bytes] = {}
    for step in range(4):
        handle = await v.open("v")
        for _ in range(12):
            chunk, length = dice.randrange(SIZE // CHUNK), dice.randrange(1, 4) * CHUNK
            start, end = chunk * CHUNK, min(SIZE, chunk * CHUNK + length)
            if dice.random() < 0.3:
                await handle.zero(start, end - start, punch=True)
                content[start:end] = bytes(end - start)
            else:
                data = dice.randbytes(end - start)
                await handle.write(start, memoryview(data))
                content[start:end] = data
        await handle.close()
        states[f"s{step}"] = bytes(content)
        await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": f"s{step}"})
    for newer in states:
        for older in (*states, None):
            since = None if older is None else f"v@{older}"
            found = chunks(await everything(v, f"/v1/snapshots/v@{newer}", since))
            before = bytes(SIZE) if older is None else states[older]
            assert differing(before, states[newer]) <= found.keys(), (older, newer)
            zeros = {chunk for chunk, zero in found.items() if zero}
            assert all(not any(states[newer][chunk * CHUNK : (chunk + 1) * CHUNK]) for chunk in zeros)
            for limit in (1, 2, 7):
                paged = await everything(v, f"/v1/snapshots/v@{newer}", since, limit)
                assert chunks(paged) == found, (older, newer, limit)


async def test_exactly_what_was_written(v: PoolApi) -> None:
    await v.write("v", 0, b"a" * 3 * CHUNK)
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "a"})
    handle = await v.open("v")
    await handle.write(CHUNK + 5, memoryview(b"b"))
    await handle.zero(2 * CHUNK, CHUNK, punch=True)
    await handle.write(SIZE - 512, memoryview(b"c" * 512))
    await handle.close()
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "b"})
    expected = [
        {"offset_bytes": CHUNK, "length_bytes": CHUNK, "zero": False},
        {"offset_bytes": 2 * CHUNK, "length_bytes": CHUNK, "zero": True},
        {"offset_bytes": 4 * MIB, "length_bytes": 1024, "zero": False},
    ]
    page = await v.ok("GET", "/v1/snapshots/v@b/changes?since=v@a")
    assert page == {"changes": expected, "size_bytes": SIZE, "chunk_bytes": CHUNK}
    assert await everything(v, "/v1/volumes/v", "v@a") == expected
    inside = await v.ok("GET", f"/v1/snapshots/v@b/changes?since=v@a&offset={CHUNK + 512}&limit=1")
    assert inside["changes"] == [{"offset_bytes": CHUNK + 512, "length_bytes": CHUNK - 512, "zero": False}]
    assert await everything(v, "/v1/snapshots/v@b", "v@b") == []
    assert await everything(v, "/v1/snapshots/v@a") == [{"offset_bytes": 0, "length_bytes": 3 * CHUNK, "zero": False}]


async def test_a_volume_is_told_as_it_is_now(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    handle = await v.open("v")
    for number in range(5):
        assert handle.write_now(number * 2 * CHUNK, memoryview(b"x" * CHUNK)) or number == 0
        await handle.write(number * 2 * CHUNK, memoryview(b"x" * CHUNK))
        found = chunks(await everything(v, "/v1/volumes/v", "v@s"))
        assert list(found) == [2 * each for each in range(number + 1)]
    await handle.close()


async def test_across_a_revert_and_between_a_clone_and_its_origin(v: PoolApi) -> None:
    await v.write("v", 0, b"a" * 4 * CHUNK)
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    await v.write("v", 0, b"b" * CHUNK)
    done = await v.ok("POST", "/v1/snapshots/v@s/revert", {"safety_name": "old"})
    assert done["reverted"]
    await v.write("v", CHUNK, b"c" * CHUNK)
    assert list(chunks(await everything(v, "/v1/volumes/v", "v@old"))) == [0, 1]
    assert list(chunks(await everything(v, "/v1/volumes/v", "v@s"))) == [1]
    await v.ok("POST", "/v1/snapshots/v@s/clone", {"name": "c", "size": SIZE + MIB})
    assert await everything(v, "/v1/volumes/c", "v@s") == []
    await v.write("c", 2 * CHUNK, b"d" * CHUNK)
    assert list(chunks(await everything(v, "/v1/volumes/c", "v@old"))) == [0, 2]


async def test_what_cannot_be_asked(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    assert (await v.ok("GET", f"/v1/snapshots/v@s/changes?offset={SIZE}"))["changes"] == []
    assert await v.refused("GET", f"/v1/snapshots/v@s/changes?offset={SIZE + 1}") == (422, "out-of-range")
    for bad in ("offset=-1", "offset=x", "limit=0", "limit=10001", "offset=1&offset=2", "more=1"):
        assert await v.refused("GET", f"/v1/snapshots/v@s/changes?{bad}") == (422, "invalid-argument"), bad
    for since in ("v@none", "v", "", "none@s"):
        assert await v.refused("GET", f"/v1/snapshots/v@s/changes?since={since}") == (404, "not-found"), since
    assert await v.refused("GET", "/v1/volumes/none/changes") == (404, "not-found")
    assert await v.refused("GET", "/v1/volumes/v@s/changes") == (404, "not-found")


async def test_a_base_that_goes_meanwhile(v: PoolApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at its name and the thread that compares, it may be deleted, and its map reclaimed."""
    await v.write("v", 0, b"a" * CHUNK)
    for name in ("s", "t"):
        await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": name})
    snapshots = v.services.snapshots
    kept = {f"v@{name}": snapshots.find(f"v@{name}") for name in ("s", "t")}
    await v.ok("POST", "/v1/snapshots/delete", {"snapshots": ["v@s"]})
    monkeypatch.setattr(snapshots, "find", kept.__getitem__)
    assert (await v.call("GET", "/v1/snapshots/v@t/changes?since=v@s")).status == 404
    assert (await v.call("GET", "/v1/snapshots/v@s/changes")).status == 404
    assert (await v.call("GET", "/v1/snapshots/v@t/changes")).status == 200


NUMBERS = st.integers(0, MAX_VOLUME_BYTES)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, st.booleans())), st.none() | NUMBERS, NUMBERS, NUMBERS)
def test_what_is_written_by_hand_is_what_the_model_writes(
    ranges: list[tuple[int, int, bool]], more: int | None, size_bytes: int, chunk_bytes: int
) -> None:
    model = Changes(
        changes=[ChangedRange(offset_bytes=at, length_bytes=length, zero=zero) for at, length, zero in ranges],
        next_offset_bytes=more,
        size_bytes=size_bytes,
        chunk_bytes=chunk_bytes,
    )
    text = answers.written(Page(ranges, more, size_bytes), chunk_bytes)
    assert text == model.model_dump_json(exclude_none=True)
    assert Changes.model_validate_json(text, strict=True, extra="forbid") == model


async def test_pages_are_found_and_written_beside_the_event_loop(v: PoolApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests are served on the loop, and the longest page takes milliseconds."""
    await v.write("v", 0, b"a" * CHUNK)
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    threads: list[threading.Thread] = []

    def noted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            threads.append(threading.current_thread())
            return original(*arguments)

        return call

    monkeypatch.setattr(answers, "written", noted(answers.written))
    monkeypatch.setattr("blockvirt.snapshots.changed_blocks.changed_runs", noted(changed_runs))
    for path in ("/v1/snapshots/v@s", "/v1/volumes/v"):
        page = await v.ok("GET", f"{path}/changes?limit={API_MAX_CHANGES}")
        assert page["changes"] == [{"offset_bytes": 0, "length_bytes": CHUNK, "zero": False}]
    assert len(threads) == 4
    assert threading.main_thread() not in threads
