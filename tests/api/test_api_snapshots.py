"""Snapshots over HTTP, on a real socket and a real pool: taking, reading, holding and deleting them."""

import asyncio
from typing import Any
from urllib.parse import quote

import pytest

from blockvirt.api import idempotency
from blockvirt.api.paging import page_token
from blockvirt.device import read_one
from blockvirt.meta.keys import Table
from blockvirt.units import KIB, MIB
from tests.api.conftest import PoolApi, serve_pool

CHUNK = 4 * KIB


@pytest.fixture
async def v(pool_api: PoolApi) -> PoolApi:
    """The API of a pool with the volume 'v', which has something in it."""
    await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
    await pool_api.write("v", 0, b"a" * 4 * CHUNK)
    return pool_api


async def names(api: PoolApi, query: str = "") -> list[str]:
    listed = await api.ok("GET", "/v1/snapshots" + query)
    return [f"{each['volume']}@{each['name']}" for each in listed["snapshots"]]


async def test_a_volume_is_enough(v: PoolApi) -> None:
    made = await v.call("POST", "/v1/snapshots", {"volume": "v"})
    snapshot = made.json
    assert made.status == 201
    assert made.headers["Location"] == f"/v1/snapshots/{snapshot['id']}"
    assert snapshot["name"].startswith("snap-")
    assert (snapshot["size_bytes"], snapshot["mapped_bytes"], snapshot["exclusive_bytes"]) == (MIB, 4 * CHUNK, 0)
    (uri,) = snapshot["nbd_uris"]
    assert uri.startswith(f"nbd+unix:///v@{snapshot['name']}?socket=")
    shown = await v.call("GET", made.headers["Location"])
    assert shown.json == snapshot
    assert shown.headers["ETag"] == made.headers["ETag"] == '"1"'
    assert (await v.ok("GET", f"/v1/snapshots/v@{snapshot['name']}")) == snapshot
    assert (await v.ok("GET", "/v1/volumes/v"))["snapshots"] == 1


async def test_it_holds_what_was_replied_to_in_an_open_volume(v: PoolApi) -> None:
    handle = await v.open("v")
    handle.write_now(0, memoryview(b"b" * CHUNK))
    handle.settle()
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    handle.write_now(0, memoryview(b"c" * CHUNK))
    handle.settle()
    reading = v.readers.open(v.services.snapshots.find("v@s"), "r")
    into = bytearray(2 * CHUNK)
    await read_one(reading, 0, memoryview(into))
    assert bytes(into) == b"b" * CHUNK + b"a" * CHUNK
    await reading.close()


async def test_pages_labels_and_volumes(v: PoolApi) -> None:
    await v.ok("POST", "/v1/volumes", {"size": MIB, "name": "w"})
    for number in range(5):
        await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": f"s{number}", "labels": {"odd": str(number % 2)}})
        await v.ok("POST", "/v1/snapshots", {"volume": "w", "name": f"s{number}"})
    everything = await names(v)
    assert len(everything) == 10
    for query in ("?limit=1", "?limit=3", "?limit=5", "?limit=10"):
        found: list[str] = []
        token = ""
        while True:
            listed = await v.ok("GET", f"/v1/snapshots{query}{token}")
            assert 0 < len(listed["snapshots"]) <= int(query.split("=")[1])
            found += [f"{each['volume']}@{each['name']}" for each in listed["snapshots"]]
            if "next_page_token" not in listed:
                break
            token = f"&page_token={listed['next_page_token']}"
        assert found == everything, query
    assert await names(v, "?volume=v") == [f"v@s{number}" for number in range(5)]
    assert await names(v, "?label=odd=1") == ["v@s1", "v@s3"]
    first = await v.ok("GET", "/v1/snapshots?volume=v&label=odd=0&limit=2")
    assert [each["name"] for each in first["snapshots"]] == ["s0", "s2"]
    token = first["next_page_token"]
    assert await names(v, f"?volume=v&label=odd=0&limit=2&page_token={token}") == ["v@s4"]
    assert await v.refused("GET", f"/v1/snapshots?volume=v&page_token={token}") == (422, "invalid-argument")
    volume_id = first["snapshots"][0]["volume_id"]
    for forged in (volume_id, f"{volume_id}/x", f"{volume_id}/x/y", f"{volume_id}/x/1.0/2"):
        query = f"?page_token={page_token('snapshots&', forged)}"
        assert await v.refused("GET", f"/v1/snapshots{query}") == (422, "invalid-argument"), forged
    assert await v.refused("GET", "/v1/snapshots?volume=none") == (404, "not-found")
    assert await v.refused("GET", "/v1/snapshots?label=odd") == (422, "invalid-argument")


async def test_pages_go_on_behind_a_snapshot_that_went(v: PoolApi) -> None:
    for number in range(5):
        await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": f"s{number}"})
    first = await v.ok("GET", "/v1/snapshots?limit=2")
    await v.ok("DELETE", "/v1/snapshots/v@s1")
    rest = await names(v, f"?limit=9&page_token={first['next_page_token']}")
    assert rest == ["v@s2", "v@s3", "v@s4"]


async def test_the_tree_is_told(v: PoolApi) -> None:
    for name in ("a", "b"):
        await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": name})
    await v.ok("POST", "/v1/snapshots/v@a/revert", {"safety_name": "old"})
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "c"})
    listed = await v.ok("GET", "/v1/snapshots?volume=v")
    ids = {each["id"]: each["name"] for each in listed["snapshots"]}
    parents = {each["name"]: ids.get(each.get("parent_id")) for each in listed["snapshots"]}
    assert parents == {"a": None, "b": "a", "old": "b", "c": "a"}
    assert ids[listed["head_parent_id"]] == "c"
    for name, parent in parents.items():
        assert ids.get((await v.ok("GET", f"/v1/snapshots/v@{name}")).get("parent_id")) == parent, name


@pytest.mark.parametrize(
    "name", ["", "a@b", "a/b", "a\0b", "x" * 300, "Ä", "S", "-s", "9f234b8c33044f23b7b86c5e6edac9cc"]
)
async def test_names_that_cannot_be(v: PoolApi, name: str) -> None:
    assert await v.refused("POST", "/v1/snapshots", {"volume": "v", "name": name}) == (422, "invalid-name")
    group = {"volumes": ["v"], "name": name}
    assert await v.refused("POST", "/v1/snapshots/group", group) == (422, "invalid-name")
    assert await names(v) == []


@pytest.mark.parametrize(
    "name", ["@", "v@", "@s", "v@s@s", "v@s\0", "v@" + "x" * 600, "x" * 600 + "@s", "s", "v@Ä", "\0"]
)
@pytest.mark.parametrize("verb", ["", "/hold", "/revert", "/clone", "/changes"])
async def test_snapshots_that_are_not_there(v: PoolApi, name: str, verb: str) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    method = "GET" if verb in ("", "/changes") else "POST"
    assert await v.refused(method, f"/v1/snapshots/{quote(name, safe='')}{verb}") == (404, "not-found")


async def test_a_name_is_taken_once(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    assert await v.refused("POST", "/v1/snapshots", {"volume": "v", "name": "s"}) == (409, "exists-incompatible")


async def test_of_a_volume_that_is_not_there(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    await v.ok("DELETE", "/v1/volumes/v")
    for volume in ("v", v.services.catalogue.trash.list()[0].id, "none", "", "a@b", "\0", "x" * 600):
        assert await v.refused("POST", "/v1/snapshots", {"volume": volume}) == (404, "not-found"), volume
    assert await v.refused("GET", "/v1/snapshots/v@s") == (404, "not-found")
    assert await names(v) == []


async def test_a_group_is_of_one_instant(v: PoolApi) -> None:
    await v.ok("POST", "/v1/volumes", {"size": MIB, "name": "w"})
    group = await v.ok("POST", "/v1/snapshots/group", {"volumes": ["v", "w"], "name": "g", "labels": {"a": "b"}})
    assert {each["volume"] for each in group["snapshots"]} == {"v", "w"}
    assert {(each["name"], each["group_id"]) for each in group["snapshots"]} == {("g", group["group_id"])}
    assert all(each["labels"] == {"a": "b"} for each in group["snapshots"])
    made_up = await v.ok("POST", "/v1/snapshots/group", {"volumes": ["v", "w"]})
    assert len({each["name"] for each in made_up["snapshots"]}) == 1


@pytest.mark.parametrize(
    ("volumes", "expected"),
    [
        ([], (422, "invalid-argument")),
        (["v", "v"], (422, "invalid-argument")),
        (["v", "none"], (404, "not-found")),
        (["v", "w"], (409, "exists-incompatible")),
        ([f"v{number}" for number in range(257)], (422, "invalid-argument")),
    ],
)
async def test_a_group_is_all_or_none(v: PoolApi, volumes: list[str], expected: tuple[int, str]) -> None:
    await v.ok("POST", "/v1/volumes", {"size": MIB, "name": "w"})
    await v.ok("POST", "/v1/snapshots", {"volume": "w", "name": "g"})
    assert await v.refused("POST", "/v1/snapshots/group", {"volumes": volumes, "name": "g"}) == expected
    assert await names(v) == ["w@g"]


async def test_one_volume_by_name_and_by_id_is_no_group(v: PoolApi) -> None:
    volume_id = (await v.ok("GET", "/v1/volumes/v"))["id"]
    refused = await v.refused("POST", "/v1/snapshots/group", {"volumes": ["v", volume_id]})
    assert refused == (422, "invalid-argument")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/snapshots", {"volume": "v"}),
        ("/v1/snapshots/group", {"volumes": ["v"]}),
        ("/v1/snapshots/v@s/clone", {}),
        ("/v1/schedules", {"name": "n", "cron": "0 * * * *", "volume": "v"}),
    ],
)
async def test_an_idempotency_key_repeats_the_answer(v: PoolApi, path: str, body: dict[str, Any]) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    key = {"Idempotency-Key": "one"}
    first = await v.call("POST", path, body, headers=key)
    again = await v.call("POST", path, body, headers=key)
    assert (first.status, again.status) == (201, 201)
    assert first.json == again.json
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers.get("Location") == first.headers.get("Location")


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/snapshots", {"volume": "v"}), ("/v1/snapshots/v@s/clone", {})],
)
async def test_a_deed_and_its_kept_answer_are_one_transaction(
    v: PoolApi, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    """Else a crash between the two would make a second one when the request comes again."""
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    monkeypatch.setattr(idempotency, "MAX_IDEMPOTENCY_KEYS", 0)
    refused = await v.call("POST", path, body, headers={"Idempotency-Key": "five"})
    assert (refused.status, refused.json["code"]) == (409, "limit-reached")
    assert await names(v) == ["v@s"]
    assert v.services.catalogue.count() == 1


async def test_holds(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    assert (await v.ok("POST", "/v1/snapshots/v@s/hold"))["holds"] == ["manual"]
    held = await v.call("POST", "/v1/snapshots/v@s/hold", {"tag": "legal"})
    assert held.json["holds"] == ["manual", "legal"]
    assert held.headers["ETag"] == '"3"'
    assert await v.refused("POST", "/v1/snapshots/v@s/hold", {"tag": "a b"}) == (422, "invalid-name")
    for body in ({}, {"snapshots": ["v@s"], "force": True}):
        path = "/v1/snapshots/delete" if body else "/v1/snapshots/v@s?force=true"
        assert await v.refused("POST" if body else "DELETE", path, body or None) == (409, "in-use")
    assert (await v.ok("DELETE", "/v1/snapshots/v@s?dry_run=true"))["obstacles"] == ["v@s is held: manual, legal"]
    assert await v.refused("DELETE", "/v1/volumes/v?force=true") == (409, "in-use")
    assert (await v.ok("POST", "/v1/snapshots/v@s/release", {"tag": "legal"}))["holds"] == ["manual"]
    assert (await v.ok("POST", "/v1/snapshots/v@s/release", {}))["holds"] == []
    assert (await v.ok("POST", "/v1/snapshots/v@s/release"))["holds"] == []
    assert (await v.ok("DELETE", "/v1/snapshots/v@s"))["deleted"] is True


async def test_deleting_says_what_it_frees_and_frees_it(v: PoolApi) -> None:
    for name in ("a", "b", "c"):
        await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": name})
        await v.write("v", 0, name.encode() * 2 * CHUNK)
    one = await v.ok("DELETE", "/v1/snapshots/v@a?dry_run=true")
    assert (one["deleted"], one["freed_bytes"], one["job_ids"]) == (False, 2 * CHUNK, [])
    two = await v.ok("POST", "/v1/snapshots/delete", {"snapshots": ["v@b", "v@c"], "dry_run": True})
    assert (two["freed_bytes"], [each["name"] for each in two["snapshots"]]) == (4 * CHUNK, ["b", "c"])
    used_bytes = v.pool.engine.storage.status().used_bytes
    gone = await v.ok("POST", "/v1/snapshots/delete", {"snapshots": ["v@a", "v@b", "v@c"]})
    assert (gone["deleted"], gone["freed_bytes"], len(gone["job_ids"])) == (True, 6 * CHUNK, 3)
    for job_id in gone["job_ids"]:
        assert (await v.ok("GET", f"/v1/jobs/{job_id}?wait_s=60"))["state"] == "done"
    await v.until_reclaimed()
    assert used_bytes - v.pool.engine.storage.status().used_bytes >= 6 * CHUNK
    assert await names(v) == []
    assert await v.read("v", 0, 4 * CHUNK) == b"c" * 2 * CHUNK + b"a" * 2 * CHUNK


async def test_several_go_all_or_none(v: PoolApi) -> None:
    for name in ("a", "b"):
        await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": name})
    await v.ok("POST", "/v1/snapshots/v@b/hold")
    for snapshots, expected in ((["v@a", "v@b"], (409, "in-use")), (["v@a", "v@none"], (404, "not-found"))):
        assert await v.refused("POST", "/v1/snapshots/delete", {"snapshots": snapshots}) == expected
    assert await v.refused("POST", "/v1/snapshots/delete", {"snapshots": []}) == (422, "invalid-argument")
    assert await names(v) == ["v@a", "v@b"]


async def test_a_snapshot_that_is_read_goes_by_force(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    reading = v.readers.open(v.services.snapshots.find("v@s"), "r")
    assert (await v.ok("GET", "/v1/snapshots/v@s"))["sessions"] == 1
    assert (await v.ok("DELETE", "/v1/snapshots/v@s?dry_run=true"))["obstacles"] == ["1 sessions read v@s"]
    assert await v.refused("DELETE", "/v1/snapshots/v@s") == (409, "in-use")
    assert (await v.ok("DELETE", "/v1/snapshots/v@s?force=true"))["deleted"] is True
    assert reading.lost.done()
    await reading.close()


async def test_only_the_revision_that_was_read_is_deleted(v: PoolApi) -> None:
    made = await v.call("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    await v.ok("POST", "/v1/snapshots/v@s/hold")
    await v.ok("POST", "/v1/snapshots/v@s/release")
    refused = await v.call("DELETE", "/v1/snapshots/v@s", headers={"If-Match": made.headers["ETag"]})
    assert (refused.status, refused.json["code"]) == (412, "precondition-failed")
    assert (await v.call("DELETE", "/v1/snapshots/v@s", headers={"If-Match": '"3"'})).status == 200


@pytest.mark.parametrize(
    "body",
    [None, {}, {"volume": 1}, {"volume": "v", "more": 1}, {"volume": "v", "labels": {"a": 1}}, [], "v"],
)
async def test_bodies_that_are_no_snapshot(v: PoolApi, body: Any) -> None:
    refused = await v.call("POST", "/v1/snapshots", body)
    assert refused.status == (415 if body is None else 422)
    assert await names(v) == []


async def test_a_body_may_be_missing_where_nothing_in_it_is_needed(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    cases = (
        (b"", "application/json", 200),
        (b"", "", 200),
        (b"{}", "text/plain", 415),
        (b" ", "application/json", 422),
    )
    for data, kind, status in cases:
        answer = await v.call("POST", "/v1/snapshots/v@s/hold", data=data, headers={"Content-Type": kind})
        assert answer.status == status, (data, kind)
    document = await v.ok("GET", "/v1/openapi.json")
    assert document["paths"]["/v1/snapshots/{snapshot}/hold"]["post"]["requestBody"]["required"] is False
    assert document["paths"]["/v1/snapshots"]["post"]["requestBody"]["required"] is True


async def test_many_at_once(v: PoolApi) -> None:
    made = await asyncio.gather(*(v.call("POST", "/v1/snapshots", {"volume": "v"}) for _ in range(20)))
    assert {answer.status for answer in made} == {201}
    assert len(await names(v)) == 20
    same = await asyncio.gather(*(v.call("POST", "/v1/snapshots", {"volume": "v", "name": "s"}) for _ in range(5)))
    assert sorted(answer.status for answer in same) == [201, 409, 409, 409, 409]


async def test_a_damaged_snapshot_is_said_to_be(short_tmp_path: Any) -> None:
    async with serve_pool(short_tmp_path) as api:
        await api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v"})
        made = await api.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
        store = api.pool.engine.store
        await store.commit(lambda writer: writer.put(Table.SNAPSHOTS, made["id"].encode(), b"\1{}xxxx"))
        await api.ok("POST", "/v1/snapshots", {"volume": "v", "name": "t"})
        await api.ok("POST", "/v1/volumes", {"size": MIB, "name": "w"})
        damaged = await api.ok("POST", "/v1/volumes", {"size": MIB, "name": "x"})
        for name in ("w", "x"):
            await api.ok("POST", "/v1/snapshots", {"volume": name, "name": "s"})
        await store.commit(lambda writer: writer.put(Table.VOLUMES, damaged["id"].encode(), b"\1{}xxxx"))
        assert await api.refused("GET", "/v1/snapshots/v@s") == (503, "damaged-record")
        assert sorted(await names(api)) == ["v@t", "w@s"], "the others go on"
        assert await names(api, "?volume=v") == ["v@t"]
        assert await api.refused("GET", "/v1/snapshots?volume=x") == (503, "damaged-record")


async def test_a_clone_and_its_origin_hold_more_together_than_each_alone(v: PoolApi) -> None:
    await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": "s"})
    await v.call("POST", "/v1/snapshots/v@s/clone", {"name": "c"})
    await v.write("c", 0, b"c" * CHUNK)
    alone = [(await v.ok("DELETE", f"/v1/volumes/{name}?dry_run=true"))["freed_bytes"] for name in ("v", "c")]
    assert alone == [0, CHUNK], "the clone keeps all that its origin has"
    together = await v.ok("POST", "/v1/volumes/space", {"volumes": ["v", "c"]})
    assert together == {"volumes": ["v", "c"], "freed_bytes": 5 * CHUNK}
    assert (await v.ok("POST", "/v1/volumes/space", {"volumes": ["c"]}))["freed_bytes"] == CHUNK
    assert (await v.call("POST", "/v1/volumes/space", {"volumes": ["c", "x"]})).status == 404
