"""Page tokens: where to go on, sealed against reading meaning into them. Pure.

A token holds the last name of the page before, so that items that come and go meanwhile shift nothing, and what was
listed, so that it is not used on another list.
"""

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from blockvirt.errors import InvalidRequest

T = TypeVar("T")


def page_token(listing: str, after: str) -> str:
    """Return the token that goes on behind ``after`` in ``listing`` (what was listed, its filter included)."""
    return base64.urlsafe_b64encode(json.dumps([listing, after], separators=(",", ":")).encode()).decode().rstrip("=")


def page_after(token: str | None, listing: str) -> str:
    """Return the name to go on after, '' for the first page; raises InvalidRequest for a token of another list."""
    if token is None:
        return ""
    try:
        parts = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        parts = None
    if not (isinstance(parts, list) and len(parts) == 2 and parts[0] == listing and isinstance(parts[1], str)):
        raise InvalidRequest(
            "the page_token does not belong to this list",
            correction="send the next_page_token of the page before, with the same filter; or none for the first page",
        )
    return parts[1]


def page_of(
    listing: str, items: Sequence[T], place: Callable[[T], tuple[float, str]], after: str, limit: int
) -> tuple[Sequence[T], str | None]:
    """Return up to ``limit`` of all ``items`` behind ``after``, and the token of the next page (None: that was all).

    ``place`` says where an item stands in their order: a number, then a name.
    """
    last = _place(after)
    if last is not None:
        items = [item for item in items if place(item) > last]
    if len(items) <= limit:
        return items, None
    return items[:limit], place_token(listing, place(items[limit - 1]))


def place_token(listing: str, place: tuple[float, str]) -> str:
    """Return the token that goes on behind a place, in a list that is ordered by a number and a name."""
    return page_token(listing, f"{place[0]!r}/{place[1]}")


def place_after(token: str | None, listing: str) -> tuple[float, str] | None:
    """Return the place to go on after, None for the first page; raises InvalidRequest for a token of another list."""
    return _place(page_after(token, listing))


def _place(after: str) -> tuple[float, str] | None:
    if not after:
        return None
    number, _, name = after.partition("/")
    try:
        return float(number), name
    except ValueError:
        return float("inf"), name
