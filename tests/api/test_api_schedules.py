"""Schedules over HTTP, on a real pool."""

from typing import Any

import pytest

from blockvirt.meta.keys import Table
from blockvirt.units import MIB
from tests.api.conftest import PoolApi

HOURLY = {"name": "hourly", "cron": "0 * * * *", "volume": "v", "keep": {"hourly": 24, "last": 3}}


@pytest.fixture
async def v(pool_api: PoolApi) -> PoolApi:
    """The API of a pool with the volume 'v'."""
    await pool_api.ok("POST", "/v1/volumes", {"size": MIB, "name": "v", "labels": {"tier": "gold"}})
    return pool_api


async def test_create_show_list(v: PoolApi) -> None:
    made = await v.call("POST", "/v1/schedules", HOURLY)
    volume_id = (await v.ok("GET", "/v1/volumes/v"))["id"]
    schedule = made.json
    assert made.status == 201
    assert made.headers["Location"] == f"/v1/schedules/{schedule['id']}"
    assert made.headers["ETag"] == '"1"'
    assert (schedule["name"], schedule["cron"], schedule["state"]) == ("hourly", "0 * * * *", "active")
    assert (schedule["volume_id"], schedule["volumes"]) == (volume_id, [{"id": volume_id, "name": "v"}])
    assert (schedule["keep"], schedule["missed_runs"]) == ({"last": 3, "hourly": 24}, 0)
    assert schedule["next_run_at"].endswith(":00:00Z")
    assert not {"last_run_at", "last_error"} & schedule.keys()
    again = await v.call("POST", "/v1/schedules", HOURLY)
    assert (again.status, again.json) == (200, schedule)
    assert await v.refused("POST", "/v1/schedules", HOURLY | {"keep": {}}) == (409, "exists-incompatible")
    for path in ("/v1/schedules/hourly", made.headers["Location"]):
        assert await v.ok("GET", path) == schedule
    by_label = {"name": "gold", "cron": "30 2 * * MON-FRI", "labels": {"tier": "gold"}, "paused": True}
    paused = await v.ok("POST", "/v1/schedules", by_label)
    assert (paused["state"], paused["labels"]) == ("paused", {"tier": "gold"})
    assert [each["name"] for each in paused["volumes"]] == ["v"]
    assert not {"next_run_at", "volume_id"} & paused.keys()
    first = await v.ok("GET", "/v1/schedules?limit=1")
    second = await v.ok("GET", f"/v1/schedules?limit=1&page_token={first['next_page_token']}")
    assert [each["name"] for each in first["schedules"] + second["schedules"]] == ["gold", "hourly"]
    assert "next_page_token" not in second


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cron": ""}, (422, "invalid-argument")),
        ({"cron": "nonsense"}, (422, "invalid-argument")),
        ({"cron": "* * * * * *"}, (422, "invalid-argument")),
        ({"cron": "61 * * * *"}, (422, "invalid-argument")),
        ({"cron": "0 0 30 2 *"}, (422, "invalid-argument")),
        ({"cron": "@hourly"}, (422, "invalid-argument")),
        ({"cron": "0 * * * *" + " " * 300}, (422, "invalid-argument")),
        ({"cron": 5}, (422, "invalid-argument")),
        ({"keep": {"hourly": -1}}, (422, "invalid-argument")),
        ({"keep": {"hourly": 10_001}}, (422, "invalid-argument")),
        ({"keep": {"hourly": True}}, (422, "invalid-argument")),
        ({"keep": {"hourly": 1.5}}, (422, "invalid-argument")),
        ({"keep": {"sometimes": 1}}, (422, "invalid-argument")),
        ({"keep": [1]}, (422, "invalid-argument")),
        ({"paused": "yes"}, (422, "invalid-argument")),
        ({"labels": {"a": "b"}}, (422, "invalid-argument")),
        ({"volume": None}, (422, "invalid-argument")),
        ({"volume": "none"}, (404, "not-found")),
        ({"volume": "v@s"}, (404, "not-found")),
        ({"name": ""}, (422, "invalid-name")),
        ({"name": "a@b"}, (422, "invalid-name")),
        ({"name": "a/b"}, (422, "invalid-name")),
        ({"name": "a\0b"}, (422, "invalid-name")),
        ({"name": "x" * 40}, (422, "invalid-name")),
        ({"name": "x" * 300}, (422, "invalid-name")),
        ({"more": 1}, (422, "invalid-argument")),
    ],
)
async def test_nonsense(v: PoolApi, change: dict[str, Any], expected: tuple[int, str]) -> None:
    assert await v.refused("POST", "/v1/schedules", HOURLY | change) == expected
    assert await v.refused("POST", "/v1/schedules/preview", HOURLY | change) == expected
    assert await v.ok("GET", "/v1/schedules") == {"schedules": []}


async def test_changes(v: PoolApi) -> None:
    await v.ok("POST", "/v1/schedules", HOURLY)
    changed = await v.call("PATCH", "/v1/schedules/hourly", {"cron": "5 * * * *"}, headers={"If-Match": '"1"'})
    assert (changed.status, changed.json["cron"], changed.json["keep"]) == (200, "5 * * * *", {"last": 3, "hourly": 24})
    assert changed.headers["ETag"] == '"2"'
    for method in ("PATCH", "DELETE"):
        body = {"paused": True} if method == "PATCH" else None
        refused = await v.call(method, "/v1/schedules/hourly", body, headers={"If-Match": '"1"'})
        assert (refused.status, refused.json["code"]) == (412, "precondition-failed")
    paused = await v.ok("PATCH", "/v1/schedules/hourly", {"paused": True, "keep": {"daily": 2}})
    assert (paused["state"], paused["keep"], paused["revision"]) == ("paused", {"daily": 2}, 3)
    for nonsense in ({"cron": "x"}, {"keep": {"x": 1}}, {"name": "new"}, {"volume": "v"}):
        assert await v.refused("PATCH", "/v1/schedules/hourly", nonsense) == (422, "invalid-argument"), nonsense
    dry = await v.ok("PATCH", "/v1/schedules/hourly", {"paused": False, "cron": "7 0 * * *", "dry_run": True})
    assert len(dry["next_runs"]) == 5
    assert all(each.endswith("T00:07:00Z") for each in dry["next_runs"])
    assert (await v.ok("GET", "/v1/schedules/hourly"))["revision"] == 3, "it was only asked"


async def test_previews_say_what_retention_would_do(v: PoolApi) -> None:
    for name in ("a", "b"):
        await v.ok("POST", "/v1/snapshots", {"volume": "v", "name": name})
    made = await v.ok("POST", "/v1/schedules", HOURLY)
    records = await v.services.snapshots.create({"v": "auto1"}, schedule_id=made["id"])
    await v.services.snapshots.create({"v": "auto2"}, schedule_id=made["id"])
    preview = await v.ok("GET", "/v1/schedules/hourly/preview?runs=3")
    assert len(preview["next_runs"]) == 3
    (volume,) = preview["volumes"]
    assert (volume["volume"], [each["name"] for each in volume["decisions"]]) == ("v", ["auto2", "auto1", "b", "a"])
    assert all(each["keep"] for each in volume["decisions"])
    assert volume["decisions"][1]["snapshot_id"] == records[0].id
    assert volume["decisions"][3]["reasons"] == ["not taken by this schedule"]
    dry = await v.ok("PATCH", "/v1/schedules/hourly", {"keep": {"last": 1}, "dry_run": True})
    doomed = [each["name"] for each in dry["volumes"][0]["decisions"] if not each["keep"]]
    assert doomed == ["auto1"]
    new = await v.ok(
        "POST", "/v1/schedules/preview", HOURLY | {"name": "other", "labels": {"tier": "gold"}, "volume": None}
    )
    assert [each["volume"] for each in new["volumes"]] == ["v"]
    assert [each["name"] for each in (await v.ok("GET", "/v1/schedules"))["schedules"]] == ["hourly"]
    for bad in ("runs=-1", "runs=101", "runs=x"):
        assert await v.refused("GET", f"/v1/schedules/hourly/preview?{bad}") == (422, "invalid-argument"), bad


async def test_its_snapshots_stay_when_it_goes(v: PoolApi) -> None:
    made = await v.ok("POST", "/v1/schedules", HOURLY)
    await v.services.snapshots.create({"v": "auto"}, schedule_id=made["id"])
    assert (await v.ok("GET", "/v1/snapshots/v@auto"))["schedule_id"] == made["id"]
    gone = await v.ok("DELETE", "/v1/schedules/hourly")
    assert (gone["deleted"], gone["schedule"]["id"]) == (True, made["id"])
    assert (await v.ok("GET", "/v1/snapshots/v@auto"))["name"] == "auto"
    for method, path in (
        ("GET", "/v1/schedules/hourly"),
        ("DELETE", "/v1/schedules/hourly"),
        ("GET", f"/v1/schedules/{made['id']}/preview"),
        ("GET", "/v1/schedules/%00"),
        ("GET", "/v1/schedules/" + "x" * 600),
    ):
        assert await v.refused(method, path) == (404, "not-found"), path
    assert await v.refused("PATCH", "/v1/schedules/hourly", {"paused": True}) == (404, "not-found")


async def test_a_damaged_one_can_be_deleted(v: PoolApi) -> None:
    made = await v.ok("POST", "/v1/schedules", HOURLY)
    store = v.pool.engine.store
    await store.commit(lambda writer: writer.put(Table.SCHEDULES, made["id"].encode(), b"\1{}xxxx"))
    assert await v.refused("GET", "/v1/schedules/hourly") == (503, "damaged-record")
    assert await v.ok("DELETE", "/v1/schedules/hourly") == {"deleted": True}
    assert await v.ok("GET", "/v1/schedules") == {"schedules": []}
