"""Page tokens: where to go on, sealed against reading meaning into them. Pure.

A token holds the last name of the page before, so that items that come and go meanwhile shift nothing, and a digest of
what was listed, so that it is not used on another list. A digest, because a filter may be nearly as long as a request's
line, which has to hold both.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TypeVar

from blockvirt.errors import InvalidRequest

T = TypeVar("T")
_DIGEST_BYTES = 9  # nobody but a client itself gains by two lists of the same digest


def page_token(listing: str, after: str) -> str:
    """Return the token that goes on behind ``after`` in ``listing`` (what was listed, its filter included)."""
    parts = json.dumps([_digest(listing), after], separators=(",", ":"))
    return base64.urlsafe_b64encode(parts.encode()).decode().rstrip("=")


def _digest(listing: str) -> str:
    return hashlib.blake2b(listing.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def page_after(token: str | None, listing: str) -> str:
    """Return the name to go on after, '' for the first page; raises InvalidRequest for a token of another list."""
    if token is None:
        return ""
    try:
        parts = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        parts = None
    if not (isinstance(parts, list) and len(parts) == 2 and parts[0] == _digest(listing) and _is_text(parts[1])):
        raise InvalidRequest(
            "the page_token does not belong to this list",
            correction="send the next_page_token of the page before, with the same filter; or none for the first page",
        )
    return str(parts[1])


def _is_text(after: object) -> bool:
    """Tell whether a place can be written as a key: JSON's escapes may spell half a character."""
    return isinstance(after, str) and not any("\ud800" <= character <= "\udfff" for character in after)


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
