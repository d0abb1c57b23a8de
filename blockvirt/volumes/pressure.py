"""When inline writes would be throttled by the kernel, they go to threads instead: the loop never sleeps in a write.

The kernel makes writers sleep once dirty and write-back pages pass the middle between its two thresholds
(``balance_dirty_pages``). Its counters are asked once per ``step_bytes`` written, which costs nothing per request.
"""

from collections.abc import Callable
from pathlib import Path

_VMSTAT = Path("/proc/vmstat")
_SHARE = 0.8  # of the point where throttling starts: what other writers add until the next look


def kernel_dirty_ratio() -> float:
    """Return dirty plus write-back pages over the point where the kernel starts to throttle writers."""
    try:
        figures = dict(line.split() for line in _VMSTAT.read_text().splitlines())
        dirty = int(figures["nr_dirty"]) + int(figures["nr_writeback"])
        start = (int(figures["nr_dirty_threshold"]) + int(figures["nr_dirty_background_threshold"])) / 2
    except (OSError, ValueError, KeyError):  # a sandbox without it: writes then sleep on the loop when throttled
        return 0.0
    return dirty / start if start else 0.0


class WritePressure:
    """Tells the data path whether a write to the page cache may sleep."""

    __slots__ = ("_left_bytes", "_ratio", "_step_bytes", "high")

    def __init__(self, step_bytes: int, ratio: Callable[[], float] = kernel_dirty_ratio) -> None:
        self._step_bytes = step_bytes
        self._left_bytes = step_bytes
        self._ratio = ratio
        self.high = False
        """Writes must go to threads now."""

    def wrote(self, length: int) -> None:
        """Count bytes written, and look at the kernel's counters once per step."""
        self._left_bytes -= length
        if self._left_bytes < 0:
            self.look()

    def look(self) -> None:
        """Ask the kernel now."""
        # Under pressure look more often: each write is in a thread, so a look is cheap beside it.
        self.high = self._ratio() > _SHARE
        self._left_bytes = self._step_bytes // 16 if self.high else self._step_bytes
