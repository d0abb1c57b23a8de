"""Reads that the page cache cannot answer: where each piece lies, and many of them in one thread.

A hand-over to a thread and back costs several times what a read costs, so the cold reads of one turn share one. They
reach the disk together even so: a failed look into the page cache (``BackingFile.read_cached``) has the kernel begin to
read what it missed. The thread waits for the last one; then the loop finds most of the others in the page cache.
"""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from blockvirt.device import Read
from blockvirt.errors import BlockvirtError
from blockvirt.lun.address import chunk_of, file_of
from blockvirt.lun.plan import plan_read
from blockvirt.pool.backing import BackingFile

ZEROS = memoryview(bytes(1 << 20))
"""What unmapped ranges are filled from."""

_LOOKS = 3
"""So often the loop looks again; what is cold even then is left to a thread as a whole."""

Piece = tuple[BackingFile, int, memoryview]
"""A file, a position in it, and the part of a buffer that what lies there belongs into."""


def pieces(
    entry_of: Callable[[int], int], file: Callable[[int], BackingFile], chunk_shift: int, offset: int, into: memoryview
) -> list[Piece]:
    """Fill with zeros what is unmapped; return where the rest lies. Raises what ``file`` raises for a missing one."""
    found: list[Piece] = []
    for step in plan_read(entry_of, offset, len(into), chunk_shift):
        part = into[step.start : step.start + step.length]
        if step.entry:
            found.append((file(file_of(step.entry)), (chunk_of(step.entry) << chunk_shift) + step.within, part))
        else:
            fill_zeros(part)
    return found


async def read_cold(
    locate: Callable[[int, memoryview], list[Piece]],
    reads: Sequence[Read],
    in_thread: Callable[[Callable[[], None]], Awaitable[None]],
) -> list[Exception | None]:
    """Do ``reads``, which were all looked for in the page cache in vain; return what became of each.

    The caller keeps what they are about to read from being punched meanwhile. Raises what ``in_thread`` raises.
    """
    outcomes: list[Exception | None] = [None] * len(reads)

    def attempt(index: int, work: Callable[[], bool]) -> bool:
        try:
            return work()
        except (BlockvirtError, OSError) as error:
            outcomes[index] = error
            return True

    def wait_for(some: Sequence[tuple[int, list[Piece]]]) -> None:
        for index, parts in some:
            attempt(index, partial(_read, parts))

    left: list[tuple[int, list[Piece]]] = []
    for index, (offset, into) in enumerate(reads):
        try:
            left.append((index, locate(offset, into)))
        except (BlockvirtError, OSError) as error:
            outcomes[index] = error
    for _ in range(_LOOKS):
        if len(left) > 1:
            await in_thread(partial(wait_for, left[-1:]))
            left = [item for item in left[:-1] if not attempt(item[0], partial(_read_cached, item[1]))]
    if left:
        await in_thread(partial(wait_for, left))
    return outcomes


def _read(parts: Sequence[Piece]) -> bool:
    for file, position, part in parts:
        file.read(part, position)
    return True


def _read_cached(parts: Sequence[Piece]) -> bool:
    return all(file.read_cached(part, position) for file, position, part in parts)


def fill_zeros(into: memoryview) -> None:
    """Fill ``into`` with zeros."""
    for start in range(0, len(into), len(ZEROS)):
        part = into[start : start + len(ZEROS)]
        part[:] = ZEROS[: len(part)]
