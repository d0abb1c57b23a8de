"""What the models of requests and answers are made of: strictness, sizes, labels, times, pages.

Requests refuse unknown fields. Sizes come in as bytes or as strings with a unit (``blockvirt.units``) and go out as
bytes only; times go out as RFC 3339 in UTC.
"""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from blockvirt.errors import InvalidRequest
from blockvirt.limits import API_MAX_PAGE_ITEMS, API_MAX_PAGE_TOKEN_CHARS, API_PAGE_ITEMS
from blockvirt.units import parse_size

SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": "^[0-9]{1,20} ?(B|[KMGTP]i?B)$", "examples": ["10GiB", "512MiB", "2TB"]},
    ],
    "description": "Bytes, or a number with one of the units KiB MiB GiB TiB PiB (powers of 1024) or KB MB GB TB PB "
    "(powers of 1000). A bare 10G is refused: it means different sizes to different tools.",
}
_LAST_S = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()
Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema(SIZE_SCHEMA)]
Labels = Annotated[dict[str, str], Field(description="Free key-value pairs.", examples=[{"team": "web"}])]


class Request(BaseModel):
    """What comes in a body."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Query(Request):
    """What comes in a query: text, from which numbers and truth values are read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Answer(BaseModel):
    """What goes out."""

    model_config = ConfigDict(frozen=True)


def timestamp(seconds: float) -> datetime:
    """Return a time of the records (seconds since the epoch) as the API shows it; beyond the calendar: its end."""
    if not seconds < _LAST_S:  # not a number either
        seconds = _LAST_S
    return datetime.fromtimestamp(max(0.0, seconds), UTC)


class ListQuery(Query):
    """Which page of a list."""

    limit: int = Field(API_PAGE_ITEMS, ge=1, le=API_MAX_PAGE_ITEMS, description="Items on a page.")
    page_token: str | None = Field(
        None,
        max_length=API_MAX_PAGE_TOKEN_CHARS,
        description="The next_page_token of the page before, not changed in any way.",
    )


class LabelListQuery(ListQuery):
    """Which items by their labels, and which page of them."""

    label: list[str] = Field(default_factory=list, description="KEY=VALUE; may be repeated, all of them must match.")

    def labels(self) -> dict[str, str]:
        """Return the labels that must match; raises InvalidRequest."""
        labels = {}
        for text in self.label:
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise InvalidRequest(f"{text[:80]!r} is not a label", correction="write label=KEY=VALUE")
            labels[key] = value
        return labels


class ForceQuery(Query):
    """How hard to try."""

    force: bool = Field(False, description="Also where it is in use: sessions are dropped, mappings removed.")


class DryRunQuery(Query):
    """Whether only to say what would happen."""

    dry_run: bool = Field(False, description="Change nothing, say what would go.")


class DeleteQuery(ForceQuery, DryRunQuery):
    """How hard to try, or only to say what would happen."""


class Change(Request):
    """A request in a body that may also be a question."""

    dry_run: bool = Field(False, description="Change nothing, say what would happen.")
