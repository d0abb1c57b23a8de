"""How far a snapshot stream has come: read off its frames as they go by (``docs/stream-format.md``).

Only lengths are looked at: whether a stream is whole and unaltered is for the daemon that imports it.
"""

import json
import struct
from collections import deque

from blockvirt.cli.output import duration
from blockvirt.limits import STREAM_MAX_HEADER_BYTES
from blockvirt.units import format_size

_PREAMBLE_BYTES = 16
_FRAME_HEAD = struct.Struct("<4xBI")
_RANGES = {2: struct.Struct("<8xI"), 3: struct.Struct("<8xI"), 4: struct.Struct("<8xQ")}
_HEADER, _TRAILER = 1, 5
_RATE_WINDOW_S = 10.0
_BAR_CELLS = 24


class StreamMeter:
    """Follows streams that lie one behind the other; says nothing any more of what it does not understand."""

    def __init__(self) -> None:
        self.name = ""
        """VOLUME@SNAPSHOT of the stream that goes by, as its sender calls it."""
        self.changed_bytes = 0
        """What all ranges of it cover; 0: not known, or nothing."""
        self.covered_bytes = 0
        """What those that went by cover."""
        self._held = bytearray()
        self._wanted_bytes = _PREAMBLE_BYTES
        self._skip_bytes = 0
        self._kind = 0
        self._body_bytes = 0
        self._in_head = False
        self._lost = False

    def feed(self, block: bytes) -> None:
        """Take the next block of the input."""
        left = memoryview(block)
        while left and not self._lost:
            if self._skip_bytes:
                skipped = min(self._skip_bytes, len(left))
                self._skip_bytes -= skipped
                left = left[skipped:]
                continue
            missing = self._wanted_bytes - len(self._held)
            self._held += left[:missing]
            left = left[missing:]
            if len(self._held) == self._wanted_bytes:
                self._take(bytes(self._held))
                self._held.clear()

    def _take(self, held: bytes) -> None:
        """Take what was wanted: a preamble, a frame's head, or the beginning of its body that is of interest."""
        if self._in_head:
            self._kind, body_bytes = _FRAME_HEAD.unpack(held)
            self._in_head = False
            if self._kind == _HEADER and body_bytes <= STREAM_MAX_HEADER_BYTES:
                self._wanted_bytes = body_bytes
            elif self._kind in _RANGES and body_bytes >= _RANGES[self._kind].size:
                self._wanted_bytes, self._body_bytes = _RANGES[self._kind].size, body_bytes
            elif self._kind == _TRAILER:
                self._skip_bytes, self._wanted_bytes = body_bytes, _PREAMBLE_BYTES
            else:
                self._lost = True
            return
        if self._kind == _HEADER:
            self._begin(held)
        elif self._kind in _RANGES:
            self.covered_bytes += _RANGES[self._kind].unpack(held)[0]
            self._skip_bytes = self._body_bytes - len(held)
        self._kind, self._in_head, self._wanted_bytes = 0, True, _FRAME_HEAD.size

    def _begin(self, body: bytes) -> None:
        try:
            header = json.loads(body)
            self.name = f"{header['volume_name']}@{header['snapshot']['name']}"
            self.changed_bytes, self.covered_bytes = int(header["changed_bytes"]), 0
        except (ValueError, TypeError, KeyError, RecursionError):
            self._lost = True


class Progress:
    """The line that a terminal shows meanwhile: percent, rate and time left. Times are those of a monotonic clock."""

    def __init__(self) -> None:
        self.meter = StreamMeter()
        self._seen: deque[tuple[float, int]] = deque()
        self._name = ""

    def line(self, now_s: float, width: int) -> str:
        """Return the line for ``now_s``, in at most ``width`` cells."""
        meter = self.meter
        if meter.name != self._name:
            self._name = meter.name
            self._seen.clear()
        self._seen.append((now_s, meter.covered_bytes))
        while now_s - self._seen[0][0] > _RATE_WINDOW_S:
            self._seen.popleft()
        parts = [meter.name]
        if meter.changed_bytes:
            share = min(1.0, meter.covered_bytes / meter.changed_bytes)
            filled = int(_BAR_CELLS * share)
            parts.append(f"[{'#' * filled}{'.' * (_BAR_CELLS - filled)}] {100 * share:5.1f}%")
        first_s, first_bytes = self._seen[0]
        if now_s > first_s and meter.covered_bytes > first_bytes:
            rate = (meter.covered_bytes - first_bytes) / (now_s - first_s)
            parts.append(f"{format_size(int(rate))}/s")
            parts.append(f"{duration((meter.changed_bytes - meter.covered_bytes) / rate)} left")
        return "  ".join(parts)[: max(width, 0)]
