"""Volumes over HTTP, on a real socket and a real store."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from blockvirt.api import idempotency
from blockvirt.limits import IDEMPOTENCY_KEY_S
from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord
from blockvirt.meta.store import Writer
from blockvirt.units import GIB, TIB
from tests.api.conftest import Api


async def test_a_size_alone_is_enough(api: Api) -> None:
    made = await api.call("POST", "/v1/volumes", {"size": "10GiB"})
    assert made.status == 201
    volume = made.json
    assert volume["size_bytes"] == 10 * GIB
    assert volume["mapped_bytes"] == 0
    assert volume["nbd_uris"] == [
        f"nbd+unix:///{volume['name']}?socket={api.unix_path.parent}/nbd.sock",
        f"nbd://127.0.0.1:10809/{volume['name']}",
    ]
    assert made.headers["Location"] == f"/v1/volumes/{volume['id']}"
    shown = await api.call("GET", made.headers["Location"])
    assert shown.json == volume | {"located": [], "exclusive_bytes": 0, "snapshot_bytes": 0}
    assert shown.headers["ETag"] == made.headers["ETag"] == '"1"'


async def test_the_same_request_again_answers_200(api: Api) -> None:
    wanted = {"size": GIB, "name": "v", "labels": {"a": "b"}}
    first = await api.call("POST", "/v1/volumes", wanted)
    again = await api.call("POST", "/v1/volumes", wanted)
    assert (first.status, again.status) == (201, 200)
    assert first.json == again.json
    other = await api.call("POST", "/v1/volumes", wanted | {"size": "2GiB"})
    assert other.status == 409
    assert other.json["code"] == "exists-incompatible"


async def test_rounding_is_said(api: Api) -> None:
    made = await api.call("POST", "/v1/volumes", {"size": 1000})
    assert (made.json["size_bytes"], made.json["requested_size_bytes"]) == (1024, 1000)
    exact = await api.call("POST", "/v1/volumes", {"size": 1024})
    assert "requested_size_bytes" not in exact.json


@pytest.mark.parametrize(
    ("size", "code"),
    [
        (0, "invalid-size"),
        (-1, "invalid-size"),
        (1 << 64, "invalid-size"),
        (1.5, "invalid-size"),
        (True, "invalid-size"),
        (None, "invalid-size"),
        ([], "invalid-size"),
        ("10G", "invalid-size"),
        ("1.5GiB", "invalid-size"),
        ("10 GiBs", "invalid-size"),
        ("-1", "invalid-size"),
        ("", "invalid-size"),
        ("65TiB", "invalid-size"),
    ],
)
async def test_sizes_that_are_refused(api: Api, size: Any, code: str) -> None:
    refused = await api.call("POST", "/v1/volumes", {"size": size})
    assert (refused.status, refused.json["code"]) == (422, code)
    assert refused.json["correction"]
    assert (await api.call("GET", "/v1/volumes")).json == {"volumes": []}


async def test_both_spellings_of_a_bare_unit_are_named(api: Api) -> None:
    refused = await api.call("POST", "/v1/volumes", {"size": "10G"})
    assert "10GiB" in refused.json["correction"]
    assert "10GB" in refused.json["correction"]


async def test_a_full_promise_says_what_would_fit(api: Api) -> None:
    await api.call("POST", "/v1/volumes", {"size": 900 * GIB})
    info = (await api.call("GET", "/v1/size-info")).json
    assert (info["largest_bytes"], info["limited_by"]) == (100 * GIB, "overcommit")
    refused = await api.call("POST", "/v1/volumes", {"size": "101GiB"})
    assert (refused.status, refused.json["code"]) == (507, "overcommit-limit")
    assert refused.json["details"]["would_fit_bytes"] == 100 * GIB
    assert (await api.call("POST", "/v1/volumes", {"size": info["largest_bytes"]})).status == 201
    api.space.level = "brake"
    full = await api.call("POST", "/v1/volumes", {"size": 512})
    assert (full.status, full.json["code"], full.json["retryable"]) == (507, "pool-full", True)
    assert full.json["details"]["would_fit_bytes"] == 0


async def test_change_with_and_without_an_etag(api: Api) -> None:
    await api.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})
    changed = await api.call("PATCH", "/v1/volumes/v", {"size": "2GiB", "name": "w"}, headers={"If-Match": '"1"'})
    assert changed.status == 200
    assert (changed.json["name"], changed.json["size_bytes"]) == ("w", 2 * GIB)
    assert changed.headers["ETag"] == '"2"'
    for etag in ('"1"', 'W/"2"', "2", "nonsense"):
        refused = await api.call("PATCH", "/v1/volumes/w", {"name": "x"}, headers={"If-Match": etag})
        assert (refused.status, refused.json["code"]) == (412, "precondition-failed")
        assert (await api.call("DELETE", "/v1/volumes/w", headers={"If-Match": etag})).status == 412
    assert (await api.call("PATCH", "/v1/volumes/w", {"name": "x"}, headers={"If-Match": "*"})).status == 200
    shrink = await api.call("PATCH", "/v1/volumes/x", {"size": GIB})
    assert (shrink.status, shrink.json["code"]) == (422, "invalid-size")
    assert (await api.call("PATCH", "/v1/volumes/none", {"name": "y"})).status == 404


async def test_reconnect_drops_sessions_after_the_growth(api: Api) -> None:
    volume = (await api.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})).json
    api.sessions.add("v", volume["id"])
    quiet = await api.call("PATCH", "/v1/volumes/v", {"size": 2 * GIB})
    assert quiet.json["sessions"] == 1
    loud = await api.call("PATCH", "/v1/volumes/v", {"size": 3 * GIB, "reconnect": True})
    assert (loud.json["sessions"], loud.json["size_bytes"]) == (0, 3 * GIB)
    assert api.open_volumes.sizes == {volume["id"]: 3 * GIB}


async def test_delete_says_what_goes(api: Api) -> None:
    volume = (await api.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})).json
    api.sessions.add("v", volume["id"])
    dry = await api.call("DELETE", "/v1/volumes/v?dry_run=true")
    assert (dry.json["deleted"], dry.json["obstacles"]) == (False, ["1 session uses it"])
    refused = await api.call("DELETE", "/v1/volumes/v")
    assert (refused.status, refused.json["code"]) == (409, "in-use")
    gone = await api.call("DELETE", "/v1/volumes/v?force=true")
    assert (gone.status, gone.json["deleted"]) == (200, True)
    assert (await api.call("GET", "/v1/volumes/v")).status == 404
    assert (await api.call("DELETE", "/v1/volumes/v")).status == 404


async def test_pages_and_labels(api: Api) -> None:
    for number in range(7):
        await api.call("POST", "/v1/volumes", {"size": 512, "name": f"v{number}", "labels": {"odd": str(number % 2)}})
    names: list[str] = []
    query = "?limit=2"
    while True:
        page = (await api.call("GET", "/v1/volumes" + query)).json
        names += [volume["name"] for volume in page["volumes"]]
        if "next_page_token" not in page:
            break
        query = f"?limit=2&page_token={page['next_page_token']}"
    assert names == [f"v{number}" for number in range(7)]
    odd = (await api.call("GET", "/v1/volumes?label=odd=1&limit=2")).json
    assert [volume["name"] for volume in odd["volumes"]] == ["v1", "v3"]
    token = odd["next_page_token"]
    rest = (await api.call("GET", f"/v1/volumes?label=odd=1&page_token={token}")).json
    assert [volume["name"] for volume in rest["volumes"]] == ["v5"]
    for bad in (
        f"page_token={token}",
        "page_token=x",
        "page_token=%00",
        "limit=0",
        "limit=1001",
        "limit=x",
        "label=odd",
    ):
        refused = await api.call("GET", f"/v1/volumes?{bad}")
        assert (refused.status, refused.json["code"]) == (422, "invalid-argument"), bad


async def test_an_idempotency_key_repeats_the_answer(api: Api) -> None:
    key = {"Idempotency-Key": "one"}
    first = await api.call("POST", "/v1/volumes", {"size": GIB}, headers=key)
    again = await api.call("POST", "/v1/volumes", {"size": GIB}, headers=key)
    assert (first.status, again.status) == (201, 201)
    assert first.json == again.json
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert api.services.catalogue.count() == 1
    other = await api.call("POST", "/v1/volumes", {"size": 2 * GIB}, headers=key)
    assert (other.status, other.json["code"]) == (422, "invalid-argument")
    await api.call("DELETE", f"/v1/volumes/{first.json['id']}")
    assert (await api.call("POST", "/v1/volumes", {"size": GIB}, headers=key)).json == first.json
    api.clock.now_s += IDEMPOTENCY_KEY_S + 1
    late = await api.call("POST", "/v1/volumes", {"size": GIB}, headers=key)
    assert late.json["id"] != first.json["id"]


async def test_a_volume_and_its_kept_answer_are_one_transaction(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a crash between the two would make a second volume when the request comes again."""
    monkeypatch.setattr(idempotency, "MAX_IDEMPOTENCY_KEYS", 0)
    refused = await api.call("POST", "/v1/volumes", {"size": GIB}, headers={"Idempotency-Key": "five"})
    assert (refused.status, refused.json["code"]) == (409, "limit-reached")
    assert api.services.catalogue.count() == 0
    assert api.services.catalogue.promised_bytes == 0


async def test_a_failure_is_not_kept_under_its_key(api: Api) -> None:
    key = {"Idempotency-Key": "two"}
    api.space.level = "brake"
    assert (await api.call("POST", "/v1/volumes", {"size": GIB}, headers=key)).status == 507
    api.space.level = "ok"
    assert (await api.call("POST", "/v1/volumes", {"size": GIB}, headers=key)).status == 201


async def test_a_key_whose_request_runs_is_pending(api: Api) -> None:
    with api.services.idempotency.running("three"):
        refused = await api.call("POST", "/v1/volumes", {"size": GIB}, headers={"Idempotency-Key": "three"})
    assert (refused.status, refused.json["code"], refused.json["retryable"]) == (409, "operation-pending", True)
    assert refused.headers["Retry-After"] == "1"
    assert (await api.call("POST", "/v1/volumes", {"size": GIB}, headers={"Idempotency-Key": "three"})).status == 201


async def test_many_at_once_under_one_key_make_one_volume(api: Api) -> None:
    key = {"Idempotency-Key": "four"}
    answers = await asyncio.gather(*(api.call("POST", "/v1/volumes", {"size": GIB}, headers=key) for _ in range(10)))
    assert {answer.status for answer in answers} <= {201, 409}
    assert len({answer.json["id"] for answer in answers if answer.status == 201}) == 1
    assert api.services.catalogue.count() == 1


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
async def test_keys_that_cannot_be_kept(api: Api, key: str) -> None:
    refused = await api.call("POST", "/v1/volumes", {"size": GIB}, headers={"Idempotency-Key": key})
    assert (refused.status, refused.json["code"]) == (422, "invalid-argument")


async def test_kept_answers_are_swept_away(api: Api) -> None:
    for number in range(40):
        await api.call("POST", "/v1/volumes", {"size": 512}, headers={"Idempotency-Key": f"old{number}"})
    api.clock.now_s += IDEMPOTENCY_KEY_S + 1
    for number in range(8):
        await api.call("POST", "/v1/volumes", {"size": 512}, headers={"Idempotency-Key": f"new{number}"})
    with api.store.read() as reader:
        kept = [key for key, _ in reader.scan(Table.IDEMPOTENCY)]
    assert len(kept) == 8


async def test_a_damaged_volume_is_shown_as_one(api: Api) -> None:
    for name in ("a", "b"):
        await api.call("POST", "/v1/volumes", {"size": GIB, "name": name})
    volume_id = (await api.call("GET", "/v1/volumes/a")).json["id"]
    await api.store.commit(lambda writer: writer.put(Table.VOLUMES, volume_id.encode(), b"\1{}xxxx"))
    listed = (await api.call("GET", "/v1/volumes")).json["volumes"]
    assert [(volume["name"], volume["state"]) for volume in listed] == [("a", "damaged"), ("b", "available")]
    assert (await api.call("GET", "/v1/volumes/a")).json["damage"]
    refused = await api.call("DELETE", "/v1/volumes/a")
    assert (refused.status, refused.json["code"]) == (503, "damaged-record")
    assert "restore-metadata" in refused.json["correction"]


async def test_a_stopped_volume_waits_to_be_reopened(api: Api) -> None:
    volume_id = (await api.call("POST", "/v1/volumes", {"size": GIB, "name": "v"})).json["id"]

    def stop(writer: Writer) -> None:
        branch = writer.record(BranchRecord, Table.BRANCHES, number_key(1))
        assert branch is not None
        writer.put_record(Table.BRANCHES, number_key(1), replace(branch, stopped="fdatasync: EIO"))

    await api.store.commit(stop)
    shown = (await api.call("GET", "/v1/volumes/v")).json
    assert (shown["state"], shown["damage"]) == ("stopped", "fdatasync: EIO")
    assert (await api.call("POST", "/v1/volumes/v/reopen")).status == 409
    api.open_volumes.stopped.append(volume_id)
    assert (await api.call("POST", "/v1/volumes/v/reopen")).status == 200
    assert (await api.call("POST", "/v1/volumes/none/reopen")).status == 404


async def test_how_to_attach(api: Api) -> None:
    volume = (await api.call("POST", "/v1/volumes", {"size": TIB // 2, "name": "v"})).json
    info = (await api.call("GET", "/v1/volumes/v/attach-info")).json
    assert info["nbd_uris"] == volume["nbd_uris"]
    assert json.loads(info["qemu_blockdev"])["export"] == "v"
    assert "-persist" in info["nbd_client"]
