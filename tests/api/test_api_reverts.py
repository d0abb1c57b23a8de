"""Reverts and clones over HTTP, on a real pool."""

import asyncio
from typing import Any

import pytest

from blockvirt.errors import VolumeStopped
from blockvirt.units import KIB, MIB
from tests.api.conftest import PoolApi
from tests.volumes.conftest import until

CHUNK = 4 * KIB


@pytest.fixture
async def v(pool_api: PoolApi) -> PoolApi:
    """The API of a pool with the volume 'v', which held 'a' at its snapshot 's' and holds 'b' now."""
    await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    await pool_api.write("v", 0, b"a" * 2 * CHUNK)
    await pool_api.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    await pool_api.write("v", 0, b"b" * 2 * CHUNK)
    return pool_api


async def names(api: PoolApi) -> list[str]:
    return [each["name"] for each in (await api.ok("GET", "/v1/snapshots?volume=v"))["snapshots"]]


# --- reverts ---------------------------------------------------------------------------------------------------------


async def test_back_and_forth(v: PoolApi) -> None:
    done = await v.ok("POST", "/v1/snapshots/v@s/revert")
    assert (done["reverted"], done["needs_reopen"], done["obstacles"]) == (True, False, [])
    assert (done["volume"]["name"], done["volume"]["state"], done["volume"]["snapshots"]) == ("v", "available", 2)
    assert done["snapshot"]["name"] == "s"
    assert done["safety"]["name"].startswith("before-revert-")
    assert await v.read("v", 0, 2 * CHUNK) == b"a" * 2 * CHUNK
    back = await v.ok("POST", f"/v1/snapshots/{done['safety']['id']}/revert", {"safety": False})
    assert "safety" not in back
    assert await v.read("v", 0, 2 * CHUNK) == b"b" * 2 * CHUNK
    assert await names(v) == ["s", done["safety"]["name"]]
    assert "origin" not in await v.ok("GET", "/v1/volumes/v"), "it came from itself"
    same = await v.call("POST", "/v1/volumes", {"name": "v", "size": MIB})
    assert (same.status, same.json["id"]) == (200, done["volume"]["id"])
    await v.ok("POST", "/v1/snapshots/v@s/clone", {"name": "c"})
    await v.ok("POST", "/v1/snapshots", {"volume": "c", "name": "t"})
    await v.ok("POST", "/v1/snapshots/c@t/revert")
    assert (await v.ok("GET", "/v1/volumes/c"))["origin"] == "v@s", "by way of its own snapshot"


async def test_a_dry_run_changes_nothing(v: PoolApi) -> None:
    dry = await v.ok("POST", "/v1/snapshots/v@s/revert", {"dry_run": True})
    assert (dry["reverted"], dry["obstacles"], dry["needs_reopen"]) == (False, [], False)
    await v.open("v")
    dry = await v.ok("POST", "/v1/snapshots/v@s/revert", {"dry_run": True, "force": True})
    assert (dry["obstacles"], dry["needs_reopen"]) == (["1 sessions have it open"], True)
    assert await v.read("v", 0, CHUNK) == b"b" * CHUNK
    assert await names(v) == ["s"]


async def test_while_attached(v: PoolApi) -> None:
    handle = await v.open("v")
    assert await v.refused("POST", "/v1/snapshots/v@s/revert") == (409, "in-use")
    assert await v.read("v", 0, CHUNK) == b"b" * CHUNK
    done = await v.ok("POST", "/v1/snapshots/v@s/revert", {"force": True, "safety_name": "old"})
    assert (done["needs_reopen"], done["safety"]["name"], done["volume"]["state"]) == (True, "old", "stopped")
    assert handle.lost.done()
    assert "reverted to snapshot s" in done["volume"]["damage"]
    reopened = await v.ok("POST", "/v1/volumes/v/reopen")
    assert reopened["state"] == "available"
    assert await v.read("v", 0, CHUNK) == b"a" * CHUNK


async def test_once_more_before_it_is_reopened(v: PoolApi) -> None:
    """The wrong snapshot was chosen: the right one comes in its place, and NBD is refused all the while."""
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "t"})
    await v.open("v")
    await v.ok("POST", "/v1/snapshots/v@s/revert", {"force": True})
    with pytest.raises(VolumeStopped):
        await v.open("v")
    assert (await v.ok("POST", "/v1/snapshots/v@t/revert", {"dry_run": True}))["needs_reopen"]
    done = await v.ok("POST", "/v1/snapshots/v@t/revert", {"safety_name": "wrong"})
    assert (done["needs_reopen"], done["volume"]["state"]) == (True, "stopped")
    assert "reverted to snapshot t" in done["volume"]["damage"]
    with pytest.raises(VolumeStopped, match="stopped"):
        await v.open("v")
    assert (await v.ok("POST", "/v1/volumes/v/reopen"))["state"] == "available"
    assert await v.read("v", 0, CHUNK) == b"b" * CHUNK
    await v.ok("POST", "/v1/snapshots/v@wrong/revert", {"safety": False})
    assert await v.read("v", 0, CHUNK) == b"a" * CHUNK


async def test_a_snapshot_before_it_is_reopened(v: PoolApi) -> None:
    await v.open("v")
    await v.ok("POST", "/v1/snapshots/v@s/revert", {"force": True, "safety_name": "old"})
    registry, volume_id = v.pool.engine.registry, v.services.catalogue.get("v").id
    async with registry.pinned(volume_id, reverted=True):  # as while the snapshot is taken
        assert (await v.ok("GET", "/v1/volumes/v"))["state"] == "stopped"
        with pytest.raises(VolumeStopped):
            await v.open("v")
        with pytest.raises(VolumeStopped):
            async with registry.pinned(volume_id):
                pass
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "t"})
    with pytest.raises(VolumeStopped):
        await v.open("v")
    assert await names(v) == ["s", "old", "t"]
    await v.ok("POST", "/v1/snapshots/v@t/clone", {"name": "c"})
    assert await v.read("c", 0, CHUNK) == b"a" * CHUNK
    assert (await v.ok("POST", "/v1/volumes/v/reopen"))["state"] == "available"
    await v.write("v", 0, b"d" * CHUNK)
    await v.ok("POST", "/v1/snapshots/v@t/revert", {"safety": False})
    assert await v.read("v", 0, CHUNK) == b"a" * CHUNK


async def test_a_reopen_that_comes_while_a_snapshot_is_taken(v: PoolApi) -> None:
    await v.open("v")
    await v.ok("POST", "/v1/snapshots/v@s/revert", {"force": True})
    async with v.pool.engine.registry.pinned(v.services.catalogue.get("v").id, reverted=True):
        reopening = asyncio.create_task(v.ok("POST", "/v1/volumes/v/reopen"))
        await until(lambda: v.pool.engine.registry._slots[v.services.catalogue.get("v").id].lock.locked())
    assert (await reopening)["state"] == "available"
    assert await v.read("v", 0, CHUNK) == b"a" * CHUNK


async def test_what_stopped_for_a_failure_is_not_reverted(v: PoolApi) -> None:
    handle = await v.open("v")
    v.pool.engine.registry.opened()[0].volume.stop("a sync failed", OSError("no"))
    await handle.close()
    for path, body in (("/v1/snapshots/v@s/revert", {"force": True}), ("/v1/snapshots", {"volume": "v"})):
        assert await v.refused("POST", path, body) == (503, "volume-stopped")
    await v.ok("POST", "/v1/volumes/v/reopen")
    await v.ok("POST", "/v1/snapshots/v@s/revert")


@pytest.mark.parametrize("name", ["a@b", "a/b", "\0", "x" * 300])
async def test_names_of_a_safety_snapshot(v: PoolApi, name: str) -> None:
    assert await v.refused("POST", "/v1/snapshots/v@s/revert", {"safety_name": name}) == (422, "invalid-name")
    assert await v.read("v", 0, CHUNK) == b"b" * CHUNK


async def test_a_safety_snapshot_that_cannot_be(v: PoolApi) -> None:
    refused = await v.refused("POST", "/v1/snapshots/v@s/revert", {"safety_name": "s"})
    assert refused == (409, "exists-incompatible")
    body = {"safety_name": "old", "safety": False}
    assert await v.refused("POST", "/v1/snapshots/v@s/revert", body) == (422, "invalid-argument")
    assert await v.read("v", 0, CHUNK) == b"b" * CHUNK


async def test_two_reverts_at_once(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "t"})
    await v.write("v", 0, b"c" * CHUNK)
    both = await asyncio.gather(
        v.call("POST", "/v1/snapshots/v@s/revert", {"safety_name": "x"}),
        v.call("POST", "/v1/snapshots/v@t/revert", {"safety_name": "y"}),
    )
    assert [answer.status for answer in both] == [200, 200]
    content = await v.read("v", 0, CHUNK)
    assert content in (b"a" * CHUNK, b"b" * CHUNK)
    first, second = ("y", "x") if content == b"a" * CHUNK else ("x", "y")
    sizes = {}
    for name in (first, second):
        clone = await v.ok("POST", f"/v1/snapshots/v@{name}/clone", {"name": f"clone-{name}"})
        sizes[name] = await v.read(clone["name"], 0, CHUNK)
    assert sizes[first] == b"c" * CHUNK, "what the earlier of the two found"
    assert sizes[second] in (b"a" * CHUNK, b"b" * CHUNK)
    assert sizes[second] != content


async def test_to_a_smaller_size_and_back(v: PoolApi) -> None:
    await v.ok("PATCH", "/v1/volumes/v", {"size": 2 * MIB})
    promised = (await v.ok("GET", "/v1/pool"))["promised_bytes"]
    done = await v.ok("POST", "/v1/snapshots/v@s/revert")
    assert (done["volume"]["size_bytes"], done["safety"]["size_bytes"]) == (MIB, 2 * MIB)
    assert (await v.ok("GET", "/v1/pool"))["promised_bytes"] == promised - MIB
    back = await v.ok("POST", f"/v1/snapshots/{done['safety']['id']}/revert", {"safety": False})
    assert back["volume"]["size_bytes"] == 2 * MIB


# --- clones ----------------------------------------------------------------------------------------------------------


async def test_a_clone_is_a_volume(v: PoolApi) -> None:
    made = await v.call("POST", "/v1/snapshots/v@s/clone", {"name": "c", "labels": {"a": "b"}})
    assert made.status == 201
    assert made.headers["Location"] == f"/v1/volumes/{made.json['id']}"
    assert (made.json["size_bytes"], made.json["mapped_bytes"]) == (MIB, 2 * CHUNK)
    assert (made.json["origin"], made.json["labels"]) == ("v@s", {"a": "b"})
    assert await v.read("c", 0, 2 * CHUNK) == b"a" * 2 * CHUNK
    await v.write("c", CHUNK, b"c" * CHUNK)
    assert await v.read("c", 0, 2 * CHUNK) == b"a" * CHUNK + b"c" * CHUNK
    assert await v.read("v", 0, 2 * CHUNK) == b"b" * 2 * CHUNK
    assert (await v.ok("GET", "/v1/snapshots/v@s"))["clones"] == ["c"]
    shown = await v.ok("GET", "/v1/volumes/c")
    assert (shown["origin"], shown["exclusive_bytes"], shown["snapshot_bytes"]) == ("v@s", CHUNK, 0)
    listed = (await v.ok("GET", "/v1/volumes"))["volumes"]
    assert [(each["name"], each.get("origin"), each["snapshots"]) for each in listed] == [
        ("c", "v@s", 0),
        ("v", None, 1),
    ]


async def test_a_size_may_be_larger_only(v: PoolApi) -> None:
    made = await v.ok("POST", "/v1/snapshots/v@s/clone", {"name": "c", "size": "2MiB"})
    assert made["size_bytes"] == 2 * MIB
    assert await v.read("c", MIB, CHUNK) == bytes(CHUNK)
    for size, code in (
        (MIB - 512, "invalid-size"),
        (0, "invalid-size"),
        ("1M", "invalid-size"),
        ("65TiB", "invalid-size"),
    ):
        assert await v.refused("POST", "/v1/snapshots/v@s/clone", {"size": size}) == (422, code)
    rounded = await v.ok("POST", "/v1/snapshots/v@s/clone", {"size": MIB + 1})
    assert (rounded["size_bytes"], rounded["requested_size_bytes"]) == (MIB + 512, MIB + 1)


async def test_the_same_clone_again(v: PoolApi) -> None:
    first = await v.call("POST", "/v1/snapshots/v@s/clone", {"name": "c"})
    again = await v.call("POST", "/v1/snapshots/v@s/clone", {"name": "c"})
    assert (first.status, again.status) == (201, 200)
    assert again.json["id"] == first.json["id"]
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "t"})
    other: list[tuple[str, dict[str, Any]]] = [
        ("v@t", {"name": "c"}),
        ("v@s", {"name": "v"}),
        ("v@s", {"name": "c", "size": 2 * MIB}),
        ("v@s", {"name": "c", "labels": {"a": "b"}}),
    ]
    for snapshot, body in other:
        refused = await v.refused("POST", f"/v1/snapshots/{snapshot}/clone", body)
        assert refused == (409, "exists-incompatible"), (snapshot, body)
    plain = await v.refused("POST", "/v1/volumes", {"name": "c", "size": MIB})
    assert plain == (409, "exists-incompatible"), "an empty volume was asked for, and a clone is there"


@pytest.mark.parametrize("name", ["", "a@b", "a/b", "\0", "x" * 300])
async def test_names_of_a_clone(v: PoolApi, name: str) -> None:
    assert await v.refused("POST", "/v1/snapshots/v@s/clone", {"name": name}) == (422, "invalid-name")


async def test_a_clone_outlives_its_origin(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots/v@s/clone", {"name": "c"})
    await v.ok("DELETE", "/v1/snapshots/v@s")
    volume = await v.ok("GET", "/v1/volumes/v")
    assert (await v.ok("GET", "/v1/volumes/c"))["origin"] == "v"
    gone = await v.ok("DELETE", "/v1/volumes/v?purge=true")
    assert (await v.ok("GET", f"/v1/jobs/{gone['job_id']}?wait_s=60"))["state"] == "done"
    assert await v.read("c", 0, 2 * CHUNK) == b"a" * 2 * CHUNK
    shown = await v.ok("GET", "/v1/volumes/c")
    assert (shown["origin"], shown["exclusive_bytes"]) == (volume["id"], 2 * CHUNK)
    plain = await v.refused("POST", "/v1/volumes", {"name": "c", "size": MIB})
    assert plain == (409, "exists-incompatible")


async def test_flattening(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots/v@s/clone", {"name": "c"})
    started = await v.call("POST", "/v1/volumes/c/flatten")
    assert (started.status, started.json["kind"], started.json["subject"]) == (202, "flatten", "c")
    assert (await v.ok("GET", f"{started.headers['Location']}?wait_s=60"))["state"] == "done"
    shown = await v.ok("GET", "/v1/volumes/c")
    assert "origin" not in shown
    assert shown["exclusive_bytes"] == 2 * CHUNK
    assert await v.read("c", 0, 2 * CHUNK) == b"a" * 2 * CHUNK
    assert await v.refused("POST", "/v1/volumes/c/flatten") == (422, "invalid-argument")
    assert await v.refused("POST", "/v1/volumes/none/flatten") == (404, "not-found")
