"""A snapshot stream's header as read from elsewhere: nothing in it is believed before it was looked at. Pure."""

import json
from typing import Any

from blockvirt.errors import InvalidName
from blockvirt.ids import check_name, is_id
from blockvirt.limits import (
    MAX_CHUNK_BYTES,
    MAX_LABEL_CHARS,
    MAX_LABELS,
    MAX_VOLUME_BYTES,
    MIN_CHUNK_BYTES,
    SECTOR_BYTES,
    STREAM_MAX_CREATED_S,
)
from blockvirt.snapshots.stream_format import StreamBase, StreamHeader, StreamSnapshot

_HEADER_FIELDS = frozenset(StreamHeader.__dataclass_fields__)
_SNAPSHOT_FIELDS = frozenset(StreamSnapshot.__dataclass_fields__)
_BASE_FIELDS = frozenset(StreamBase.__dataclass_fields__)
_ID_CHARS = 36


def decode_header(body: bytes) -> StreamHeader:
    """Return the header that ``body`` holds; raises ValueError, with the reason, for anything but a whole, sane one."""
    try:
        values = json.loads(body.decode(), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    fields = _fields(values, _HEADER_FIELDS, "the header")
    snapshot = _snapshot(fields["snapshot"])
    chunk_bytes = _count(fields["chunk_bytes"], "chunk_bytes", MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)
    if chunk_bytes & (chunk_bytes - 1):
        raise ValueError("chunk_bytes is not a power of two")
    return StreamHeader(
        stream_id=_id(fields["stream_id"], "stream_id"),
        volume_name=_name(fields["volume_name"], "volume"),
        volume_size_bytes=_size(fields["volume_size_bytes"], "volume_size_bytes"),
        chunk_bytes=chunk_bytes,
        changed_bytes=_count(fields["changed_bytes"], "changed_bytes", 0, snapshot.size_bytes),
        snapshot=snapshot,
        base=None if fields["base"] is None else _base(fields["base"]),
    )


def _snapshot(value: object) -> StreamSnapshot:
    fields = _fields(value, _SNAPSHOT_FIELDS, "the snapshot")
    created_s = fields["created_s"]
    if type(created_s) not in (int, float) or not 0 <= created_s < STREAM_MAX_CREATED_S:
        raise ValueError("created_s is not a time")
    return StreamSnapshot(
        id=_id(fields["id"], "the snapshot's id"),
        name=_name(fields["name"], "snapshot"),
        created_s=float(created_s),
        labels=_labels(fields["labels"]),
        size_bytes=_size(fields["size_bytes"], "the snapshot's size_bytes"),
    )


def _base(value: object) -> StreamBase:
    fields = _fields(value, _BASE_FIELDS, "the base")
    return StreamBase(_id(fields["id"], "the base's id"), _name(fields["name"], "snapshot"))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a field is there twice")  # readers would differ on which one counts
    return values


def _fields(value: object, names: frozenset[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != names:
        raise ValueError(f"{what} is not an object with the fields {', '.join(sorted(names))}")
    return value


def _id(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) != _ID_CHARS or not is_id(value):
        raise ValueError(f"{what} is not an id")
    return value


def _name(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the name of the {what} is not a string")
    try:
        return check_name(value, what=what)
    except InvalidName as error:
        raise ValueError(error.message) from error


def _count(value: object, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is not a whole number from {least} to {most}")
    return value


def _size(value: object, what: str) -> int:
    size_bytes = _count(value, what, SECTOR_BYTES, MAX_VOLUME_BYTES)
    if size_bytes % SECTOR_BYTES:
        raise ValueError(f"{what} is not a multiple of {SECTOR_BYTES}")
    return size_bytes


def _labels(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_LABELS:
        raise ValueError(f"labels is not an object of at most {MAX_LABELS} fields")
    for text in [*value.keys(), *value.values()]:
        if not isinstance(text, str) or len(text) > MAX_LABEL_CHARS:
            raise ValueError(f"a label is not a string of at most {MAX_LABEL_CHARS} characters")
        text.encode()  # half a surrogate pair can be written in JSON, but never be sent on
    return value
