"""Bugs for the attack "bit_rot": checksums that are not compared, and what else lets damage pass."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from blockvirt.checksum import crc32c
from blockvirt.meta import datafile, records, verify_map
from blockvirt.pool import labels
from blockvirt.snapshots import scrub_chunks
from blockvirt.volumes import checksums, data_proof, recovery
from tests.attacks.planted.bugs import Bug, replacing

_USERS_OF_UNSEAL = (
    records,
    verify_map,
    checksums,
    *(__import__(f"blockvirt.volumes.{name}", fromlist=["unseal"]) for name in ("versions", "journal")),
)


def _unsealed_by(right: Any) -> Any:
    def plant(patch: pytest.MonkeyPatch) -> None:
        for module in _USERS_OF_UNSEAL:
            patch.setattr(module, "unseal", right)

    return plant


def _unseal_unread(key: bytes, stored: bytes, *, what: str) -> bytes:
    return stored[:-4]


def _read_any_label(patch: pytest.MonkeyPatch) -> None:
    """Have the checksum of a label fit its other fields, whatever they are."""

    def loads(content: bytes) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(content)
        canonical = labels._canonical({name: value for name, value in fields.items() if name != "checksum"})
        return fields | {"checksum": f"{crc32c(canonical):08x}"}

    patch.setattr(labels, "json", SimpleNamespace(loads=loads, dumps=json.dumps))


def _no_crc(patch: pytest.MonkeyPatch) -> None:
    """Take every sealed chunk for what it was."""

    class Anything(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    patch.setattr(data_proof, "crc32c", lambda content: Anything())


BUGS: tuple[Bug, ...] = (
    Bug(
        "record-checksum-not-compared",
        "the checksum of a record is read and not compared",
        ("I4", "I5"),
        "bit_rot",
        _unsealed_by(_unseal_unread),
        count=20,
    ),
    Bug(
        "checksum-without-the-key",
        "the checksum of a record does not cover its key",
        ("I4", "I5"),
        "bit_rot",
        replacing(records, "crc32c", lambda data, seed=0: crc32c(data)),
        count=1_000,  # nothing but this checksum tells of one flip in 130
        is_quick=False,
    ),
    Bug(
        "sealed-chunk-not-compared",
        "check --data reads sealed chunks and compares nothing",
        ("I5",),
        "bit_rot",
        _no_crc,
        count=60,
    ),
    Bug(
        "scrub-compares-nothing",
        "a scrub reads sealed chunks and compares nothing",
        ("I5",),
        "bit_rot",
        replacing(scrub_chunks, "matches", lambda content, checksum: True),
        seed=46,  # the first sealed chunk that is damaged under a scrub
    ),
    Bug(
        "label-checksum-not-compared",
        "the label of a device is taken as it is",
        ("I6",),
        "bit_rot",
        _read_any_label,
        seed=1140,  # a digit of a time becomes another one: nothing but the checksum can tell
        is_quick=False,
    ),
    Bug(
        "lookups-not-followed",
        "branch pages that lead lookups astray are not looked for",
        ("I4",),
        "bit_rot",
        replacing(datafile, "page_order_problems", lambda *_: []),
        seed=2203,  # a key of a branch page, with a row on the wrong side of it then
        is_quick=False,
    ),
    Bug(
        "damaged-frame-ends-the-journal",
        "a journal ends at a damaged frame as at a torn one",
        ("I3b",),
        "bit_rot",
        replacing(recovery, "is_followed", lambda *_: False),
        count=60,
    ),
)
