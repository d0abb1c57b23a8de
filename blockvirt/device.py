"""The seam between protocols and volumes: what an NBD session may ask of a volume, and nothing else.

The embedded engine answers the ``*_now`` verbs on the event loop, without a task, a future, a thread or a lock; a
distributed engine answers False there and implements the async verbs. Offsets and lengths are bytes; callers
have checked them against ``size_bytes``.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Protocol

BASE_ALLOCATION = "base:allocation"
"""The metadata context that every export has; ``extents`` answers for it."""
ALLOCATION_DEPTH = "qemu:allocation-depth"
"""A status is a number: 0 unallocated, 1 allocated in the top layer, 2 in the one below it, and so on."""
DIRTY_SINCE = "qemu:dirty-bitmap:since-"
"""With the name of a snapshot behind it: a status is STATE_DIRTY or 0."""
STATE_DIRTY = 1
"""The range may differ from the snapshot; without it the range is the same."""


def context_matches(context: str, query: str) -> bool:
    """Whether ``query`` asks for a metadata context: "" for all, "base:" and the like for what is inside, or its name.

    QEMU, docs/interop/nbd: "qemu:" and "qemu:dirty-bitmap:" are the wildcards of its namespace.
    """
    return not query or context == query or (query.endswith(":") and context.startswith(query))


Read = tuple[int, memoryview]
"""An offset, and the buffer that is to be filled from there."""


class ExtentState(IntFlag):
    """What ``extents`` says of a range; the values are those of NBD's ``base:allocation`` context."""

    DATA = 0
    HOLE = 1
    ZERO = 2


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of ``length_bytes`` in one state."""

    length_bytes: int
    state: ExtentState


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a volume handle offers. ``multi_conn`` promises that a flush on one connection covers all of them."""

    read_only: bool = False
    multi_conn: bool = True
    fast_zero: bool = True


class VolumeHandle(Protocol):
    """One client's open handle on a volume."""

    size_bytes: int
    block_bytes: int
    """Preferred I/O size: the chunk size."""
    capabilities: Capabilities
    lost: "asyncio.Future[None]"
    """Done when the volume was fenced, moved or dropped: close the connection, send no reply."""

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill ``into`` from ``offset`` if that cannot block; False means: use ``read``."""

    def write_now(self, offset: int, data: memoryview) -> bool:
        """Write ``data`` at ``offset`` if that cannot block; False means: use ``write``.

        True obliges the caller to call ``settle`` before it sends any reply and before it lets the loop run.
        """

    def settle(self) -> None:
        """Make everything written by ``write_now`` since the last call survive the death of this process.

        One journal append for a whole batch; nothing at all where no map entry changed. Raises VolumeStopped, OSError:
        none of the batch may be acknowledged then.
        """

    async def read(self, reads: Sequence[Read]) -> Sequence[Exception | None]:
        """Fill each buffer from its offset; return what became of each: None, or why it could not be read.

        What ``read_now`` could not answer in one turn comes in one call. Raises what concerns all of it: VolumeStopped.
        """

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset``. When it returns the write survives SIGKILL; with ``fua`` also power loss."""

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool = False, fua: bool = False) -> None:
        """Make a range read as zeros. ``punch`` lets it become unmapped; without it space is allocated for all of it.

        With ``fast`` raises NotSupported at once where zeroing would be no faster than writing.
        """

    def start_flush(self, then: Callable[[BaseException | None], None]) -> None:
        """Have ``then`` called when every write that was replied to before the call survives power loss (I3).

        On any connection. It is told None, or what failed, on the loop and never within this call. No future: each pass
        of the loop that an answer waits for shows in a flush's latency. Raises VolumeStopped.
        """

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        """Describe the range in order, from ``offset`` on: at least one extent, neighbours merged, never beyond it."""

    async def block_status(self, context: str, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """Describe the range as ``context`` sees it: (length in bytes, status of 32 bits), else like ``extents``.

        ``context`` is one that the handle was opened with, and not BASE_ALLOCATION. What cannot be told is an error,
        never a status: a client that copies by a bitmap would leave out what it was told nothing of.
        """

    async def close(self) -> None:
        """Let go of the volume after what is in flight. Idempotent."""


class Readable(Protocol):
    """What can be read."""

    async def read(self, reads: Sequence[Read]) -> Sequence[Exception | None]:
        """See VolumeHandle."""


async def read_one(what: Readable, offset: int, into: memoryview) -> None:
    """Fill ``into`` from ``offset``; raises what hinders it."""
    for error in await what.read([(offset, into)]):
        if error is not None:
            raise error


class ExportDirectory(Protocol):
    """Where a server finds what a client names."""

    def names(self) -> Sequence[str]:
        """Return the names that NBD_OPT_LIST shows."""

    async def describe(self, name: str) -> "ExportInfo":
        """Return what NBD_OPT_INFO says of an export; raises NotFound."""

    def contexts(self, name: str, query: str) -> Sequence[str]:
        """Return the metadata contexts of an export that match ``query`` (``context_matches``); raises NotFound.

        At most ``limits.NBD_MAX_LISTED_CONTEXTS``, BASE_ALLOCATION first. A full name finds its context even where the
        list of all would not reach it.
        """

    async def open(self, name: str, session_id: str, contexts: Sequence[str] = ()) -> VolumeHandle:
        """Open an export for one session; raises NotFound, VolumeStopped, ShuttingDown and others of the tree.

        The session may ask for the status in ``contexts``, and no others: what they need must stay while it is open. A
        context that is gone since ``contexts`` named it is an error.
        """


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client may know of an export before it opens it."""

    name: str
    description: str
    size_bytes: int
    block_bytes: int
    capabilities: Capabilities
