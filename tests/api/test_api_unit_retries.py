"""Mapping a volume again: by its number, and by an Idempotency-Key where the first answer was lost."""

import pytest

from blockvirt.api import idempotency
from blockvirt.api.idempotency import Idempotency
from blockvirt.units import GIB
from tests.api.conftest import Api

LUNS = "/v1/hosts/web1/luns"


@pytest.fixture
async def prepared(api: Api) -> Api:
    """An API with a host and two volumes, none of them mapped."""
    await api.call("POST", "/v1/hosts", {"name": "web1"})
    for name in ("v", "w"):
        await api.call("POST", "/v1/volumes", {"size": GIB, "name": name})
    return api


async def test_the_same_number_again_answers_200(prepared: Api) -> None:
    first = await prepared.call("POST", LUNS, {"volume": "v", "number": 3})
    again = await prepared.call("POST", LUNS, {"volume": "v", "number": 3})
    assert (first.status, again.status) == (201, 200)
    assert first.json == again.json
    assert first.headers["Location"] == again.headers["Location"] == f"{LUNS}/3"
    for body in ({"volume": "v"}, {"volume": "v", "number": 4}, {"volume": "w", "number": 3}):
        assert (await prepared.call("POST", LUNS, body)).status == 409, body


async def test_a_key_repeats_the_answer_and_another_does_not(prepared: Api) -> None:
    first = await prepared.call("POST", LUNS, {"volume": "v"}, headers={"Idempotency-Key": "one"})
    again = await prepared.call("POST", LUNS, {"volume": "v"}, headers={"Idempotency-Key": "one"})
    assert (first.status, again.status, again.headers["Idempotency-Replayed"]) == (201, 201, "true")
    assert first.json == again.json
    assert first.headers["Location"] == again.headers["Location"]
    assert (await prepared.call("POST", LUNS, {"volume": "v"}, headers={"Idempotency-Key": "two"})).status == 409
    assert (await prepared.call("POST", LUNS, {"volume": "v"})).status == 409
    assert len((await prepared.call("GET", LUNS)).json["luns"]) == 1


async def test_a_unit_and_its_kept_answer_are_one_transaction(prepared: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a crash between the two would refuse the request when it comes again."""
    monkeypatch.setattr(idempotency, "MAX_IDEMPOTENCY_KEYS", 0)
    refused = await prepared.call("POST", LUNS, {"volume": "v"}, headers={"Idempotency-Key": "one"})
    assert (refused.status, refused.json["code"]) == (409, "limit-reached")
    assert (await prepared.call("GET", LUNS)).json == {"luns": []}


async def test_a_crash_right_after_the_mapping_loses_no_answer(prepared: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def dead(*_: object) -> None:
        raise SystemError("the daemon dies here")

    monkeypatch.setattr(Idempotency, "keep_alone", dead)
    await prepared.call("POST", LUNS, {"volume": "v"}, headers={"Idempotency-Key": "one"})
    units = (await prepared.call("GET", LUNS)).json["luns"]
    again = await prepared.call("POST", LUNS, {"volume": "v"}, headers={"Idempotency-Key": "one"})
    assert (again.status, [again.json]) == (201, units)


async def test_a_key_for_a_unit_that_is_there_keeps_that_answer(prepared: Api) -> None:
    body = {"volume": "v", "number": 3}
    await prepared.call("POST", LUNS, body)
    first = await prepared.call("POST", LUNS, body, headers={"Idempotency-Key": "one"})
    again = await prepared.call("POST", LUNS, body, headers={"Idempotency-Key": "one"})
    assert (first.status, again.status, again.headers["Idempotency-Replayed"]) == (200, 200, "true")
    assert first.json == again.json
