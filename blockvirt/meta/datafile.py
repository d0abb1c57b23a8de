"""What can be told of ``data.mdb`` before LMDB maps it: a page beyond the end of a mapped file is a SIGBUS.

LMDB 0.9 (data version 1): two meta pages at the front, each ``page header (16 bytes) | MDB_meta``; the one with the
greater transaction id counts. Layout: liblmdb's mdb.c, struct MDB_meta and struct MDB_db; native byte order.
"""

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lmdb.verify

from blockvirt.errors import MetadataFault
from blockvirt.meta.page_order import page_order_problems
from blockvirt.meta.preread import read_ahead

DATA_FILE = "data.mdb"
_MAGIC = 0xBEEFC0DE
_DATA_VERSION = 1
_PAGE_HEADER_BYTES = 16
_META = struct.Struct("=IIQQ 48s 48s QQ")  # magic, version, address, map size, free db, main db, last page, txn id
_RESTORE = "restore the newest intact copy with 'blockvirt check --restore-metadata'"


@dataclass(frozen=True, slots=True)
class DataFileFacts:
    """What the meta page that counts says of a data file."""

    page_bytes: int
    used_bytes: int
    """End of the last page ever used."""
    transaction: int


def read_facts(data_file: Path) -> DataFileFacts:
    """Return what the newer meta page of ``data_file`` says; raises MetadataFault where there is none to read."""
    try:
        with data_file.open("rb") as file:
            head = file.read(_PAGE_HEADER_BYTES + _META.size)
            first = _meta(data_file, head)
            page_bytes = int.from_bytes(first[4][:4], "little" if struct.pack("=H", 1)[0] else "big")
            if page_bytes < 256 or page_bytes & (page_bytes - 1):
                raise _damaged(data_file, f"its page size is {page_bytes}")
            file.seek(page_bytes)
            second = _meta(data_file, file.read(_PAGE_HEADER_BYTES + _META.size))
    except OSError as error:
        raise MetadataFault(
            f"cannot read the metadata file {data_file}: {error.strerror}",
            correction="check that the state directory's disk is mounted and readable",
            path=str(data_file),
        ) from error
    newest = first if first[7] > second[7] else second
    return DataFileFacts(page_bytes=page_bytes, used_bytes=(newest[6] + 1) * page_bytes, transaction=newest[7])


def check_openable(data_file: Path) -> DataFileFacts:
    """Return the facts of ``data_file`` if mapping it cannot fault; raises MetadataFault if it is cut or unreadable.

    A free page at the very end need not be in the file. So a short file is walked page by page, without mapping it,
    before it is called damaged.
    """
    facts = read_facts(data_file)
    size_bytes = data_file.stat().st_size
    if size_bytes >= facts.used_bytes:
        read_ahead(data_file, facts.used_bytes)
        return facts
    problems = structural_problems(data_file)
    if problems:
        raise _damaged(data_file, f"it is {size_bytes} bytes long and must have {facts.used_bytes}: {problems[0]}")
    os.truncate(data_file, facts.used_bytes)
    return facts


def structural_problems(data_file: Path) -> list[str]:
    """Walk every page of ``data_file`` without mapping it and return what is wrong, in words; empty: nothing."""
    walk: Callable[..., list[str]] = lmdb.verify.verify
    try:
        problems = walk(str(data_file), subdir=False)
    except lmdb.verify.VerifyError as error:
        return [str(error)]
    return problems or page_order_problems(data_file, read_facts(data_file).page_bytes)


def _meta(data_file: Path, page: bytes) -> tuple[int, int, int, int, bytes, bytes, int, int]:
    if len(page) < _PAGE_HEADER_BYTES + _META.size:
        raise _damaged(data_file, "it ends inside its first two pages")
    fields = _META.unpack_from(page, _PAGE_HEADER_BYTES)
    magic, version = fields[:2]
    if magic != _MAGIC:
        raise _damaged(data_file, "it does not begin as an LMDB file does")
    if version != _DATA_VERSION:
        raise MetadataFault(
            f"the metadata file {data_file} has LMDB format {version}, this blockvirt reads {_DATA_VERSION}",
            correction="use the blockvirt version that wrote it, or a newer one",
            path=str(data_file),
        )
    return fields


def _damaged(data_file: Path, cause: str) -> MetadataFault:
    return MetadataFault(
        f"the metadata file {data_file} is damaged", cause=cause, correction=_RESTORE, path=str(data_file)
    )
