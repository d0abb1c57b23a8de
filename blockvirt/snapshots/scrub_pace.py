"""How fast a scrub may go: so many bytes per second, and never more than a share of the disk's time. Pure."""

from blockvirt.limits import SCRUB_REST_RATIO


class Pace:
    """Tells how long to rest after each piece of work. Times are seconds of a clock that is not set."""

    __slots__ = ("_free_at_s", "_rate_bytes")

    def __init__(self, rate_bytes: int) -> None:
        """``rate_bytes`` per second may be read, from the first piece on."""
        self._rate_bytes = rate_bytes
        self._free_at_s = 0.0

    def rest_s(self, began_s: float, ended_s: float, read_bytes: int) -> float:
        """Return how long to rest after ``read_bytes`` were read between two moments.

        What one piece took too long is not made up for by the next ones: no burst ever goes beyond the rate.
        """
        self._free_at_s = max(self._free_at_s, began_s) + read_bytes / self._rate_bytes
        # What is slow now is what guests wait for: the slower it was, the longer the rest.
        return max(self._free_at_s - ended_s, SCRUB_REST_RATIO * (ended_s - began_s))
