"""Hosts, logical units, the pool, devices and sessions over HTTP."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from blockvirt.pool import membership
from blockvirt.pool.labels import read_label
from blockvirt.units import GIB
from blockvirt.volumes import storage
from tests.api.conftest import Api, PoolApi


async def test_a_host_sees_units(api: Api) -> None:
    made = await api.call("POST", "/v1/hosts", {"name": "web1"})
    assert made.status == 201
    assert (await api.call("POST", "/v1/hosts", {"name": "web1"})).status == 200
    assert (await api.call("POST", "/v1/hosts", {"name": "web1", "labels": {"a": "b"}})).status == 409
    volume = (await api.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})).json
    unit = await api.call("POST", "/v1/hosts/web1/luns", {"volume": "v"})
    assert unit.status == 201
    assert (unit.json["export"], unit.json["volume_id"], unit.json["number"]) == ("web1/lun0", volume["id"], 0)
    assert unit.json["nbd_uris"][1] == "nbd://127.0.0.1:10809/web1/lun0"
    assert (await api.call("GET", "/v1/hosts/web1/luns")).json == {"luns": [unit.json]}
    assert (await api.call("GET", unit.headers["Location"])).json == unit.json
    assert (await api.call("GET", "/v1/hosts")).json["hosts"][0]["luns"] == [unit.json]
    assert (await api.call("GET", "/v1/volumes/v")).json["units"] == ["web1/lun0"]
    info = (await api.call("GET", "/v1/luns/web1/lun0/attach-info")).json
    assert info["export"] == "web1/lun0"
    assert info["nbd_uris"] == unit.json["nbd_uris"]


async def test_labels_are_bounded_everywhere(api: Api) -> None:
    many = {f"k{number}": "" for number in range(65)}
    for path, body in (("/v1/hosts", {"name": "h"}), ("/v1/devices", {"path": "/x"}), ("/v1/volumes", {"size": 512})):
        assert (await api.call("POST", path, body | {"labels": many})).json["code"] == "limit-reached"
        assert (await api.call("POST", path, body | {"labels": {"": "x"}})).status == 422
        assert (await api.call("POST", path, body | {"labels": {"a": "b"}})).status == 201


async def test_what_a_mapping_may_not_do_over_http(api: Api) -> None:
    await api.call("POST", "/v1/hosts", {"name": "web1"})
    for name in ("v", "w"):
        await api.call("POST", "/v1/volumes", {"size": GIB, "name": name})
    await api.call("POST", "/v1/hosts/web1/luns", {"volume": "v", "number": 5})
    taken = await api.call("POST", "/v1/hosts/web1/luns", {"volume": "w", "number": 5})
    twice = await api.call("POST", "/v1/hosts/web1/luns", {"volume": "v"})
    assert (taken.status, twice.status) == (409, 409)
    assert taken.json["code"] == twice.json["code"] == "exists-incompatible"
    for body in ({"volume": "w", "number": -1}, {"volume": "w", "number": 99999}, {"volume": "w", "number": "1"}, {}):
        assert (await api.call("POST", "/v1/hosts/web1/luns", body)).status == 422
    assert (await api.call("POST", "/v1/hosts/web2/luns", {"volume": "w"})).status == 404
    assert (await api.call("POST", "/v1/hosts/web1/luns", {"volume": "none"})).status == 404
    for number in ("x", "-1", "9999999999", "05", "+5", "5.0"):
        assert (await api.call("GET", f"/v1/hosts/web1/luns/{number}")).status == 422, number
    assert (await api.call("DELETE", "/v1/hosts/web1/luns/05")).status == 422
    assert (await api.call("GET", "/v1/hosts/web1/luns/5")).status == 200
    assert (await api.call("GET", "/v1/luns/web1/lun05/attach-info")).status == 404
    assert (await api.call("GET", "/v1/luns/web1/lun7/attach-info")).status == 404
    assert (await api.call("GET", "/v1/luns/web1/x/attach-info")).status == 404


async def test_unmap_and_delete_over_http(api: Api) -> None:
    await api.call("POST", "/v1/hosts", {"name": "web1"})
    volume = (await api.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})).json
    await api.call("POST", "/v1/hosts/web1/luns", {"volume": "v"})
    api.sessions.add("web1/lun0", volume["id"])
    assert (await api.call("DELETE", "/v1/volumes/v")).status == 409
    assert (await api.call("DELETE", "/v1/hosts/web1/luns/0")).status == 409
    assert (await api.call("DELETE", "/v1/hosts/web1")).status == 409
    assert (await api.call("DELETE", "/v1/hosts/web1/luns/0?force=yes")).status == 200
    assert (await api.call("DELETE", "/v1/hosts/web1")).status == 200
    assert (await api.call("GET", "/v1/hosts/web1")).status == 404


async def test_the_pool_and_its_policy(api: Api) -> None:
    await api.call("POST", "/v1/volumes", {"size": GIB})
    pool = (await api.call("GET", "/v1/pool")).json
    assert (pool["promised_bytes"], pool["volumes"], pool["level"]) == (GIB, 1, "ok")
    assert (pool["capacity_bytes"], pool["overcommit_ratio"]) == (100 * GIB, 10)
    changed = await api.call("PATCH", "/v1/pool", {"overcommit_ratio": 1.5})
    assert changed.json["overcommit_ratio"] == 1.5
    for bad in (
        {"overcommit_ratio": 0.5},
        {"overcommit_ratio": "2"},
        {"near_ratio": 0},
        {"near_ratio": 0.99},
        {"x": 1},
    ):
        refused = await api.call("PATCH", "/v1/pool", bad)
        assert refused.status == 422, bad
    # JSON has no NaN, but Python's own encoder writes one.
    for number in (b"NaN", b"Infinity", b"1e999"):
        data = b'{"overcommit_ratio": ' + number + b"}"
        odd = await api.call("PATCH", "/v1/pool", data=data, headers={"Content-Type": "application/json"})
        assert odd.status == 422, number
    assert (await api.call("GET", "/v1/pool")).json["overcommit_ratio"] == 1.5


async def test_devices_over_http(api: Api) -> None:
    made = await api.call("POST", "/v1/devices", {"path": "/srv/fast", "limit": "10GiB", "labels": {"media": "nvme"}})
    assert made.status == 201
    assert (made.json["name"], made.json["limit_bytes"], made.json["labels"]) == ("fast", 10 * GIB, {"media": "nvme"})
    assert (await api.call("GET", "/v1/devices")).json == {"devices": [made.json]}
    placed = {"size": GIB, "placement": {"labels": {"media": "nvme"}}}
    assert (await api.call("POST", "/v1/volumes", placed)).json["placement"]["labels"] == {"media": "nvme"}
    assert (await api.call("POST", "/v1/devices", {"path": "/x/fast"})).status == 409
    await api.call("POST", "/v1/devices", {"path": "/srv/full"})
    assert (await api.call("DELETE", "/v1/devices/full")).status == 409
    assert (await api.call("DELETE", "/v1/devices/none")).status == 404
    assert (await api.call("DELETE", "/v1/devices/fast")).json == made.json
    for bad in (
        {},
        {"path": ""},
        {"path": "not/absolute"},
        {"path": "/nul\0"},
        {"path": "/x", "limit": "10G"},
        {"path": 5},
    ):
        assert (await api.call("POST", "/v1/devices", bad)).status == 422


async def test_a_device_that_is_added_again(
    pool_api: PoolApi, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind a crash between the device and the answer that was to be kept under the key."""
    folder, key = short_tmp_path / "fast", {"Idempotency-Key": "one"}
    folder.mkdir()
    wanted = {"path": str(folder), "limit": "1GiB", "labels": {"media": "nvme"}}
    with monkeypatch.context() as crashed:
        crashed.setattr(pool_api.services.idempotency, "keep_alone", _crash)
        assert (await pool_api.call("POST", "/v1/devices", wanted, headers=key)).status == 500
    made = await pool_api.call("POST", "/v1/devices", wanted, headers=key)
    assert (made.status, made.json["path"], made.json["limit_bytes"]) == (200, str(folder), GIB)
    assert made.headers["Location"] == f"/v1/devices/{made.json['name']}"
    again = await pool_api.call("POST", "/v1/devices", wanted, headers=key)
    assert (again.status, again.json, again.headers["Idempotency-Replayed"]) == (200, made.json, "true")
    (short_tmp_path / "link").symlink_to(folder)
    exact = wanted | {"name": made.json["name"], "reserve": made.json["reserve_bytes"]}
    for same in (wanted, exact, exact | {"path": str(short_tmp_path / "link")}):
        answer = await pool_api.call("POST", "/v1/devices", same)
        assert (answer.status, answer.json["id"]) == (200, made.json["id"]), same
    (short_tmp_path / "other").mkdir()
    others: tuple[dict[str, Any], ...] = (
        {"limit": "2GiB"},
        {"labels": {}},
        {"reserve": made.json["reserve_bytes"] + 512},
        {"name": "another"},
        {"name": made.json["name"], "path": str(short_tmp_path / "other")},
    )
    for other in others:
        assert await pool_api.refused("POST", "/v1/devices", wanted | other) == (409, "exists-incompatible"), other
    assert len((await pool_api.ok("GET", "/v1/devices"))["devices"]) == 2


async def test_requests_for_devices_that_come_at_once(pool_api: PoolApi, short_tmp_path: Path) -> None:
    for number, key in enumerate((None, {"Idempotency-Key": "one"})):
        (folder := short_tmp_path / f"d{number}").mkdir()
        wanted = {"path": str(folder), "limit": "1GiB", "labels": {"media": "nvme"}}
        unkeyed = (pool_api.call("POST", "/v1/devices", wanted) for _ in range(3))
        answers = await asyncio.gather(pool_api.call("POST", "/v1/devices", wanted, headers=key), *unkeyed)
        assert sorted(answer.status for answer in answers) == [200, 200, 200, 201]
        assert len({answer.json["id"] for answer in answers}) == 1
        label = read_label(folder)
        assert label is not None
        assert label.device == answers[0].json["id"]
        removals = await asyncio.gather(*(pool_api.call("DELETE", f"/v1/devices/{label.device}") for _ in range(3)))
        assert sorted(answer.status for answer in removals) == [200, 404, 404]
        assert read_label(folder) is None


async def test_a_client_that_does_not_wait_for_its_device(
    pool_api: PoolApi, short_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is added as a whole, and the same request again gets it."""
    loop = asyncio.get_running_loop()
    labelled, go_on = asyncio.Event(), threading.Event()
    real = membership.add_device

    def slow(*given: Any, **more: Any) -> Any:
        device = real(*given, **more)
        loop.call_soon_threadsafe(labelled.set)
        go_on.wait()
        return device

    monkeypatch.setattr(storage, "add_device", slow)
    (folder := short_tmp_path / "new").mkdir()
    asking = asyncio.ensure_future(pool_api.call("POST", "/v1/devices", {"path": str(folder)}))
    await labelled.wait()
    asking.cancel()  # its connection ends
    with pytest.raises(asyncio.CancelledError):
        await asking
    go_on.set()
    made = await pool_api.call("POST", "/v1/devices", {"path": str(folder)})
    label = read_label(folder)
    assert label is not None
    assert (made.status, made.json["id"]) == (200, label.device)


async def _crash(record: object) -> None:
    raise RuntimeError("the daemon dies here")


async def test_sessions_over_http(api: Api) -> None:
    ids = [(await api.call("POST", "/v1/volumes", {"size": GIB, "name": name})).json["id"] for name in ("a", "b")]
    for volume_id, name in ((ids[0], "a"), (ids[0], "a"), (ids[1], "b")):
        api.sessions.add(name, volume_id)
    listed = (await api.call("GET", "/v1/sessions")).json["sessions"]
    assert [session["volume"] for session in listed] == ["a", "a", "b"]
    assert listed[0] | {"since": ""} == {
        "id": "s0",
        "export": "a",
        "volume_id": ids[0],
        "volume": "a",
        "peer": "unix:1",
        "mode": "rw",
        "since": "",
        "bytes_read": 1,
        "bytes_written": 2,
        "requests": 3,
    }
    assert len((await api.call("GET", "/v1/sessions?volume=b")).json["sessions"]) == 1
    assert (await api.call("GET", "/v1/sessions?volume=c")).status == 404
    assert (await api.call("DELETE", "/v1/sessions/s0")).json == {"dropped": 1}
    assert (await api.call("DELETE", "/v1/sessions/s0")).status == 404
    assert (await api.call("DELETE", "/v1/sessions?volume=b")).json == {"dropped": 1}
    assert (await api.call("DELETE", "/v1/sessions")).json == {"dropped": 1}
