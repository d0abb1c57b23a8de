"""Bugs for the attack "bit_rot": checksums that are not compared, and what else lets damage pass."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockvirt import check
from blockvirt.checksum import crc32c
from blockvirt.meta import copies, datafile, page_order, records, verify_map
from blockvirt.pool import backing, labels
from blockvirt.snapshots import scrub_chunks
from blockvirt.volumes import checksums, data_proof, leftovers, proof, recovery, transfer, volume
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

    class Fitting(str):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    def loads(content: bytes) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads(content)
        return fields | {"checksum": Fitting(fields["checksum"])}

    patch.setattr(labels, "json", SimpleNamespace(loads=loads, dumps=json.dumps))


def _no_crc(patch: pytest.MonkeyPatch) -> None:
    """Take every sealed chunk for what it was."""

    class Anything(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    patch.setattr(data_proof, "crc32c", lambda content: Anything())


def _copy_anything(patch: pytest.MonkeyPatch) -> None:
    for module in (volume, transfer):
        patch.setattr(module, "check_content", lambda *_: None)


def _fill_up_with_zeros(self: backing.BackingFile, into: memoryview, position: int) -> None:
    got = os.preadv(self.fd, (into,), position)
    into[got:] = bytes(len(into) - got)


def _cut_or_lengthen(self: backing.BackingFile) -> None:
    if self.reserved_chunks >= self.used_chunks:
        os.ftruncate(self.fd, self.used_chunks * self.chunk_bytes)
        self.reserved_chunks = self.used_chunks


def _oldest_intact(folders: Iterable[Path]) -> copies.MetadataCopy | None:
    return next((copy for copy in reversed(copies.find_copies(folders)) if not copies.problems_of(copy)), None)


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
    Bug(
        "pages-not-packed",
        "where the rows of a metadata page begin and end is not looked at",
        ("I4",),
        "bit_rot",
        replacing(page_order, "_is_packed", lambda *_, **__: True),
        seed=67,  # the page says that its rows begin where they do not
        is_quick=False,
    ),
    Bug(
        "cut-journals-not-looked-for",
        "a check takes a journal that was cut short for one that was being made",
        ("I3b",),
        "bit_rot",
        replacing(proof, "refuse_to_drop", lambda *_: None),
        seed=55,
        is_quick=False,
    ),
    Bug(
        "cut-journals-dropped",
        "a volume opens without what its journal held, where that was cut short",
        ("I3b",),
        "bit_rot",
        replacing(leftovers, "refuse_to_drop", lambda *_: None),
        seed=158,
        is_quick=False,
    ),
    Bug(
        "rotten-chunks-copied",
        "a copy for a write is not compared with the checksum of what it copies",
        ("I5",),
        "bit_rot",
        _copy_anything,
        seed=13,
    ),
    Bug(
        "lost-ends-read-as-zeros",
        "what lies behind the end of a backing file is read as zeros",
        ("I4", "I5"),
        "bit_rot",
        replacing(backing.BackingFile, "read", _fill_up_with_zeros),
        seed=75,
        is_quick=False,
    ),
    Bug(
        "lost-ends-made-whole-by-a-close",
        "a close makes a backing file that was cut short as long as it was",
        ("I4", "I5"),
        "bit_rot",
        replacing(backing.BackingFile, "cut", _cut_or_lengthen),
        seed=259,
    ),
    Bug(
        "oldest-copy-restored",
        "the oldest copy of the metadata is put in place, not the newest",
        ("I3b",),
        "bit_rot",
        replacing(check, "newest_intact", _oldest_intact),
        seed=263,
        is_quick=False,
    ),
)
