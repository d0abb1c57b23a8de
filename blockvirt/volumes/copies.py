"""What a turn of the event loop copies on write, until it is written: neighbours at a file's end, so in one call.

A call of its own for each chunk of 16 KiB costs 2 us more on XFS, and 1 us on ext4.
"""

from blockvirt.limits import TURN_COPY_BYTES


class CopyBuffer:
    """Room for one turn's copies. It is free between turns, so one serves all volumes."""

    def __init__(self, chunk_bytes: int) -> None:
        self.content = memoryview(bytearray(max(TURN_COPY_BYTES, chunk_bytes)))
        self.slots = [self.content[at : at + chunk_bytes] for at in range(0, len(self.content), chunk_bytes)]
        self.user: Copies | None = None
        """Who used it last."""


class Copies:
    """Of one volume: chunks in ``held`` have a content that no file has yet, and keep their map entry until then."""

    __slots__ = ("_buffer", "content", "failure", "held", "slots")

    def __init__(self, buffer: CopyBuffer) -> None:
        self._buffer = buffer
        self.content = buffer.content
        self.slots = buffer.slots
        """Room for one chunk each, one behind the other in ``content``. When they are full it is time to write them."""
        self.held: dict[int, memoryview] = {}
        """By chunk, in the order that they will lie in."""
        self.failure: Exception | None = None
        """What kept some of this turn's from being written: none of its writes may be acknowledged."""

    def first_slot(self) -> memoryview:
        """Return ``slots[0]``, for a turn's first copy. Each is filled, and then put into ``held``."""
        user = self._buffer.user
        assert user is None or not user.held, "a turn left its copies: somebody did not settle"
        self._buffer.user = self
        return self.slots[0]
