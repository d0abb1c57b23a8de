"""Memory for requests and replies: taken when data moves, given back when the connection rests.

An idle connection holds no buffer at all, but for one that worked alone and was the last: it keeps two small ones until
another has a turn. Buffers come in a few sizes and are reused last in, first out, so the one in the processor's cache
is the next one used, and no page is zeroed again for every large read.
"""

import mmap

from blockvirt.limits import NBD_MAX_PAYLOAD_BYTES
from blockvirt.units import KIB, MIB

_HEADROOM_BYTES = 4 * KIB
SMALL_BYTES = 128 * KIB + _HEADROOM_BYTES
"""The buffer of ordinary traffic: 32 requests of 4 KiB with their headers, what many clients have on their way."""
SIZES_BYTES = (
    SMALL_BYTES,
    256 * KIB + _HEADROOM_BYTES,
    1 * MIB + _HEADROOM_BYTES,
    4 * MIB + _HEADROOM_BYTES,
    NBD_MAX_PAYLOAD_BYTES + _HEADROOM_BYTES,
)
_KEPT = (32, 8, 8, 2, 1)
"""How many unused buffers of each size are kept: at most 4, 2, 8, 8 and 32 MiB."""
_EXACT = -1


class Buffer:
    """One buffer of a pool. ``charge_bytes`` is what it counts in a budget: nothing for a small one."""

    __slots__ = ("capacity_bytes", "charge_bytes", "kind", "used", "view")

    def __init__(self, kind: int, exact_bytes: int = 0) -> None:
        self.kind = kind
        self.used = True
        """It was out since the last trim."""
        if exact_bytes:
            self.capacity_bytes = self.charge_bytes = exact_bytes
            self.view = memoryview(bytearray(exact_bytes))
            return
        self.capacity_bytes = SIZES_BYTES[kind]
        self.charge_bytes = charge_for(self.capacity_bytes)
        # Anonymous private pages go back to the system when the last view is dropped, which a heap may not do.
        self.view = memoryview(mmap.mmap(-1, self.capacity_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def kind_for(length_bytes: int) -> int:
    """Return the smallest size's number that holds ``length_bytes``."""
    for kind, size in enumerate(SIZES_BYTES):
        if length_bytes <= size:
            return kind
    raise AssertionError(f"no buffer holds {length_bytes} bytes: the payload limit was not checked")


def charge_for(length_bytes: int) -> int:
    """Return what a buffer for ``length_bytes`` counts in a budget."""
    kind = kind_for(length_bytes)
    return SIZES_BYTES[kind] if kind else 0


def charge_for_slow(length_bytes: int) -> int:
    """Return what ``take_for_slow`` of so many bytes counts: there may be hundreds of small ones on a connection."""
    return charge_for(length_bytes) or length_bytes


class BufferPool:
    """The buffers of one server."""

    def __init__(self) -> None:
        self._free: list[list[Buffer]] = [[] for _ in SIZES_BYTES]
        self._made = 0

    @property
    def lent(self) -> int:
        """How many buffers are out."""
        return self._made - sum(map(len, self._free))

    @property
    def kept_bytes(self) -> int:
        """Bytes in buffers that nobody uses."""
        return sum(len(free) * size for free, size in zip(self._free, SIZES_BYTES, strict=True))

    def take(self, length_bytes: int) -> Buffer:
        """Return a buffer for ``length_bytes``; its content is whatever was in it."""
        kind = 0 if length_bytes <= SMALL_BYTES else kind_for(length_bytes)
        free = self._free[kind]
        if free:
            buffer = free.pop()
            buffer.used = True
            return buffer
        buffer = Buffer(kind)  # there may be no memory: that is not counted
        self._made += 1
        return buffer

    def take_for_slow(self, length_bytes: int) -> Buffer:
        """Return a buffer for one slow request: of just its size if that is small."""
        if length_bytes > SMALL_BYTES:
            return self.take(length_bytes)
        buffer = Buffer(_EXACT, length_bytes)
        self._made += 1
        return buffer

    def give(self, buffer: Buffer) -> None:
        """Take back a buffer of which nobody has a view any more."""
        kind = buffer.kind
        if kind != _EXACT and len(self._free[kind]) < _KEPT[kind]:
            self._free[kind].append(buffer)
        else:
            self._made -= 1

    def write_off(self, _buffer: Buffer) -> None:
        """Let go of a buffer that somebody may still have a view of: its memory lives until they let go too."""
        self._made -= 1

    def trim(self) -> None:
        """Drop the buffers that were not needed since the last call; called every few seconds."""
        for free in self._free:
            self._made -= sum(not buffer.used for buffer in free)
            free[:] = [buffer for buffer in free if buffer.used]
            for buffer in free:
                buffer.used = False
