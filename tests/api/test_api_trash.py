"""The trash over HTTP, with deadlines that no calendar shows: an older daemon, or a wrong clock, may have left some."""

from math import inf

import pytest

from blockvirt.api.wire import timestamp
from tests.api.conftest import PoolApi

LAST = "9999-12-31T23:59:59Z"


@pytest.mark.parametrize("trash_s", [1e12, 1e300, inf])
async def test_a_deadline_that_is_out_of_range_can_be_shown(pool_api: PoolApi, trash_s: float) -> None:
    catalogue = pool_api.services.catalogue
    await pool_api.ok("POST", "/v1/volumes", {"size": 4096, "name": "sane"})
    await pool_api.ok("DELETE", "/v1/volumes/sane")
    catalogue._trash_s, usual_s = trash_s, catalogue._trash_s
    for name in ("a", "b"):
        await pool_api.ok("POST", "/v1/volumes", {"size": 4096, "name": name})
        assert (await pool_api.ok("DELETE", f"/v1/volumes/{name}"))["purge_at"] == LAST
    catalogue._trash_s = usual_s
    shown = (await pool_api.ok("GET", "/v1/trash"))["volumes"]
    assert shown[0]["name"] == "sane"
    assert {(each["name"], each["purge_at"]) for each in shown[1:]} == {("a", LAST), ("b", LAST)}
    paged, token = [], ""
    for _ in shown:
        page = await pool_api.ok("GET", f"/v1/trash?limit=1{token}")
        paged += page["volumes"]
        token = f"&page_token={page.get('next_page_token')}"
    assert paged == shown
    assert (await pool_api.ok("POST", f"/v1/trash/{shown[1]['id']}/restore"))["name"] == shown[1]["name"]


@pytest.mark.parametrize("seconds", [1e12, 1e300, inf, float("nan")])
def test_times_beyond_the_calendar(seconds: float) -> None:
    assert timestamp(seconds).isoformat() == "9999-12-31T23:59:59+00:00"


@pytest.mark.parametrize("seconds", [-1e12, -1e300, -inf])
def test_times_before_the_calendar(seconds: float) -> None:
    assert timestamp(seconds).isoformat() == "1970-01-01T00:00:00+00:00"
