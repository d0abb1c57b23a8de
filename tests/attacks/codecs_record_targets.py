"""Targets of the attack "codecs": what is read back from disks. See ``codecs_wire_targets``.

Where a checksum guards a form, half of the inputs get one that fits: what is behind it must hold without it, too.
"""

import json
import struct
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from blockvirt.checksum import crc32c
from blockvirt.errors import DamagedRecord, DeviceFault, MetadataFault
from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun import leaf as leaves
from blockvirt.meta import records
from blockvirt.pool import labels
from blockvirt.volumes import journal, journal_frames
from blockvirt.volumes.journal_frames import Kind

_KEY = b"key"
_KINDS: tuple[Any, ...] = get_args(records.Record)
_ID = "6f1a3e1c-7d1b-4a52-9d1e-0123456789ab"


def record(data: bytes) -> None:
    """The first byte: which record, and whether its checksum is made to fit."""
    if not data:
        return
    cls = _KINDS[data[0] % len(_KINDS)]
    stored = data[1:]
    if data[0] >= 128:
        stored = records.seal(_KEY, bytes([records.RECORD_VERSION]) + stored)
    try:
        found = records.decode(cls, _KEY, stored)
    except (DamagedRecord, MetadataFault):
        return
    assert stored == records.seal(_KEY, stored[:-4]), "a record is believed, and its checksum does not fit"
    again = records.encode(_KEY, found)
    assert records.encode(_KEY, records.decode(cls, _KEY, again)) == again, "a record is stored as it was read"


def record_examples() -> list[bytes]:
    """One of each kind, with a checksum that fits as it is, and one to be made."""
    found = []
    for number, cls in enumerate(_KINDS):
        stored = records.encode(_KEY, cls(**{name: _some(kind) for name, kind in get_type_hints(cls).items()}))
        first = 128 + (number - 128) % len(_KINDS)
        found += [bytes([number]) + stored, bytes([first]) + stored[1:-4]]
    return found


def _some(kind: Any) -> Any:
    origin = get_origin(kind)
    if origin is dict:
        return {"a": _some(get_args(kind)[1])}
    if origin is tuple:
        inside = get_args(kind)[0]
        return (_some(inside),) if inside is not int else (3, 4)
    if hasattr(kind, "__dataclass_fields__"):
        hints = get_type_hints(kind)
        return kind(**{each.name: _some(hints[each.name]) for each in fields(kind)})
    known: dict[Any, Any] = {int: 7, str: _ID, float: 1.5, bool: False}
    return known.get(kind, 9)


def leaf(data: bytes) -> None:
    """A stored leaf, as it is below its checksum."""
    try:
        entries = leaves.decode(data)
    except DamagedRecord:
        return
    assert len(entries) == LEAF_CHUNKS
    again = leaves.encode(entries)
    assert leaves.decode(again) == entries, "a leaf is stored as it was read"
    assert len(again) <= 1 + LEAF_CHUNKS * 7


def leaf_examples() -> list[bytes]:
    """Both forms."""
    few, many = leaves.NO_ENTRIES[:], leaves.NO_ENTRIES[:]
    few[3], few[4], few[511] = 1 << 40, (1 << 40) + 1, (1 << 56) - 1
    for slot in range(LEAF_CHUNKS):
        many[slot] = (slot * 7919) % 1000 << 20
    return [leaves.encode(few), leaves.encode(many), leaves.encode(leaves.NO_ENTRIES)]


def frames(data: bytes) -> None:
    """The first byte: whether the rest is a log, or bodies (kind u8, length u8) of which one is made."""
    if not data:
        return
    log = _log(data[1:]) if data[0] & 1 else data[1:]
    at, chain = 0, 0
    for number, frame in enumerate(journal_frames.read_frames(log, 1, 1, 0), 1):
        packed, chain = journal_frames.pack(frame.kind, 1, number, frame.body, chain)
        assert log[at : at + len(packed)] == packed, "a frame is packed as it was read"
        at += len(packed)
        with suppress(DamagedRecord):
            _read_body(frame)
    # A log that ends there: whatever lies behind must not be an error.
    journal_frames.is_followed(log, at, 1, 1, chain, log)
    journal_frames.first_generation(log)


def _read_body(frame: journal_frames.Frame) -> None:
    if frame.kind is Kind.MAP:
        list(frame.changes())
    else:
        frame.marked()
    if frame.kind is Kind.DATA:
        parts = list(frame.data())
        again, _ = journal_frames.pack_data(1, 1, frame.marked(), parts, 0)
        assert again[journal_frames.HEADER.size :] == frame.body, "data is packed as it was read"


def _log(data: bytes) -> bytes:
    log, chain, at, number = b"", 0, 0, 0
    while at + 2 <= len(data):
        kind, length = data[at] % 4, data[at + 1]
        number += 1
        rest = journal_frames.HEADER.pack(0, kind, len(data[at + 2 : at + 2 + length]), 0, 1, number)[4:]
        rest += data[at + 2 : at + 2 + length]
        chain = crc32c(rest, chain)
        log += struct.pack("<I", chain) + rest
        at += 2 + length
    return log


def frame_examples() -> list[bytes]:
    """A log of map changes and a mark, and one of a mark with data."""
    changes = journal_frames.CHANGE.pack(1, 2, 3) * 2
    first, chain = journal_frames.pack(Kind.MAP, 1, 1, changes, 0)
    mark, _ = journal_frames.pack_mark(1, 2, 1, chain)
    data, _ = journal_frames.pack_data(1, 1, 1, [(1, 4096, b"data"), (2, 0, b"more")], 0)
    body = data[journal_frames.HEADER.size :]
    return [
        b"\0" + first + mark,
        b"\0" + data,
        b"\1\1" + bytes([len(changes)]) + changes + b"\2\x08" + bytes(8),
        b"\1\3" + bytes([len(body)]) + body,
    ]


def header(data: bytes) -> None:
    """The first byte: whether the rest is a journal's header block, or what is sealed in one."""
    if not data:
        return
    block = data[1:]
    if data[0] & 1:
        sealed = records.seal(b"journal", block)
        block = len(sealed).to_bytes(4, "little") + sealed
    try:
        found = journal.unpack_header(block)
    except DamagedRecord:
        return
    if len(data) < 2_000:  # what is read may be longer when it is written: "é" takes six bytes
        assert journal.unpack_header(journal.pack_header(found)) == found, "a header is written as it was read"


def header_examples() -> list[bytes]:
    """A header, and what is in it."""
    block = journal.pack_header(journal.JournalHeader(_ID, 3, {_ID: "x"}))
    length = int.from_bytes(block[:4], "little")
    return [b"\0" + block[:200], b"\1" + block[4:length]]


def label(data: bytes) -> None:
    """The first byte: whether the rest gets a checksum that fits."""
    content = _summed(data[1:]) if data[:1] >= b"\x80" else data[1:]
    try:
        found = labels.decode_label(content, Path("/device/label"))
    except DeviceFault:
        return
    assert labels.decode_label(labels.encode_label(found), Path("/device/label")) == found, "a label is what was read"


def _summed(content: bytes) -> bytes:
    try:
        values = json.loads(content)
        if isinstance(values, dict):
            values.pop("checksum", None)
            values["checksum"] = f"{crc32c(labels._canonical(values)):08x}"
            return json.dumps(values).encode()
    except (ValueError, RecursionError):
        pass
    return content


def label_examples() -> list[bytes]:
    """A label; and what a disk may have made of one."""
    whole = labels.encode_label(labels.DeviceLabel(_ID, _ID, 1.5))
    return [b"\0" + whole, b"\x80" + whole, b"\0" + b"[" * 3_000]
