"""Page tokens: the daemon takes each that it gives out, and no other one hurts it."""

from urllib.parse import quote

import pytest

from blockvirt.api.paging import page_after, page_token
from blockvirt.limits import MAX_LABEL_CHARS, MAX_LABELS
from tests.api.conftest import PoolApi

WIDEST = "\U0001f4be"  # four bytes of UTF-8, each of which a URL writes as three characters
LARGEST_LABEL = {WIDEST * MAX_LABEL_CHARS: WIDEST * MAX_LABEL_CHARS}
MOST_LABELS = {f"{number:02}": "x" * 90 for number in range(MAX_LABELS)}  # as long as a request's line may get


@pytest.mark.parametrize("labels", [LARGEST_LABEL, MOST_LABELS], ids=["largest", "most"])
async def test_lists_by_the_largest_labels_have_further_pages(pool_api: PoolApi, labels: dict[str, str]) -> None:
    for name in ("a", "b", "c"):
        await pool_api.ok("POST", "/v1/volumes", {"size": 4096, "name": name, "labels": labels})
        await pool_api.ok("POST", "/v1/snapshots", {"volume": "a", "name": name, "labels": labels})
    chosen = "".join(f"&label={quote(f'{key}={value}')}" for key, value in labels.items())
    for collection in ("volumes", "snapshots"):
        found, token = [], ""
        while True:
            page = await pool_api.ok("GET", f"/v1/{collection}?limit=1{chosen}{token}")
            found += [each["name"] for each in page[collection]]
            if "next_page_token" not in page:
                break
            token = f"&page_token={page['next_page_token']}"
        assert found == ["a", "b", "c"]
        answer = await pool_api.refused("GET", f"/v1/{collection}?limit=1{token}")
        assert answer == (422, "invalid-argument"), "another filter, another list"


@pytest.mark.parametrize("listing", ["volumes", "hosts", "schedules", "snapshots&", "trash", "jobs&&&"])
async def test_a_token_whose_place_is_no_text_is_refused(pool_api: PoolApi, listing: str) -> None:
    collection = listing.rstrip("&")
    for after in ("\ud800", "1.0/\ud800"):
        answer = await pool_api.refused("GET", f"/v1/{collection}?page_token={page_token(listing, after)}")
        assert answer == (422, "invalid-argument")
    assert page_after(page_token(listing, "1.0/x"), listing) == "1.0/x"
