"""Map entries: where one chunk of a volume lies, in 56 bits. Pure.

    bit  55      FRESH: allocated by the head since the last snapshot, so it may be overwritten in place
    bit  54      kept for "remote: still in the archive"
    bits 28..53  backing file number (from 1 on, so that no mapped entry is 0)
    bits  0..27  chunk number in that file

0 is unmapped and reads as zeros. An address (file, chunk) is handed out once and never again (I2).
"""

CHUNK_BITS = 28
FILE_BITS = 26
CHUNK_MASK = (1 << CHUNK_BITS) - 1
FILE_MASK = (1 << FILE_BITS) - 1
ADDRESS_MASK = (1 << (CHUNK_BITS + FILE_BITS)) - 1
FRESH = 1 << 55
ENTRY_BYTES = 7
MAX_FILE_NUMBER = FILE_MASK
UNMAPPED = 0


def address(file: int, chunk: int) -> int:
    """Return the entry, without flags, of ``chunk`` in backing file ``file``."""
    assert 0 < file <= FILE_MASK
    assert 0 <= chunk <= CHUNK_MASK
    return (file << CHUNK_BITS) | chunk


def file_of(entry: int) -> int:
    """Return the backing file's number in ``entry``."""
    return (entry >> CHUNK_BITS) & FILE_MASK


def chunk_of(entry: int) -> int:
    """Return the chunk number in its file."""
    return entry & CHUNK_MASK
