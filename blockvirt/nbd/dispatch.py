"""The requests of one session: parse all that have arrived, answer them, start what cannot be answered at once."""

import logging
from collections.abc import Callable
from enum import Enum, auto

from blockvirt.device import VolumeHandle
from blockvirt.errors import BlockvirtError, ShuttingDown
from blockvirt.limits import NBD_MAX_PAYLOAD_BYTES
from blockvirt.nbd import constants as c
from blockvirt.nbd.buffers import SMALL_BYTES
from blockvirt.nbd.incoming import Incoming
from blockvirt.nbd.messages import REQUEST, REQUEST_HEAD, request_head
from blockvirt.nbd.outgoing import Outgoing, Part
from blockvirt.nbd.slow import SlowLane
from blockvirt.nbd.stats import ServerStats, Traffic
from blockvirt.nbd.transmission import (
    DATA,
    DATA_HEAD,
    SUCCESS,
    SUCCESS_HEAD,
    ExportView,
    Replies,
    all_done,
    done,
    explain,
    judge,
)

log = logging.getLogger("blockvirt.nbd")

_HEADER_BYTES = REQUEST.size
_TYPE_MASK = 0xFFFF
_ALIGNED_BYTES = 64
_READ_MARGIN_BYTES = DATA.size + _ALIGNED_BYTES
"""The most that a read takes in an arena beside its data."""
_SMALL_READ_BYTES = SMALL_BYTES - _READ_MARGIN_BYTES
_NO_HEAD = -1
_FLUSH_HEAD = request_head(0, c.CMD_FLUSH)
"""No request begins with it, whatever a client sends."""


class _Step(Enum):
    NEXT = auto()
    AGAIN = auto()
    STOP = auto()


class Dispatcher:
    """Works on what ``incoming`` holds. ``backlog`` and ``starved`` say why it stopped, if not for lack of bytes."""

    def __init__(
        self,
        name: str,
        handle: VolumeHandle,
        view: ExportView,
        replies: Replies,
        incoming: Incoming,
        outgoing: Outgoing,
        slow: SlowLane,
        stats: ServerStats,
        *,
        finish: Callable[[str], None],
        abandon: Callable[[str], None],
    ) -> None:
        self._name = name
        self._handle = handle
        self._view = view
        self._replies = replies
        self._incoming = incoming
        self._outgoing = outgoing
        self._slow = slow
        self._stats = stats
        self._finish = finish
        self._abandon = abandon
        # For _fast, which looks them up in each turn:
        self._read_now, self._write_now = handle.read_now, handle.write_now
        self._size_bytes, self._structured = view.size_bytes, view.structured
        self._data_header_bytes = DATA.size if view.structured else SUCCESS.size
        harmless = [0, c.CMD_FLAG_FUA] + [c.CMD_FLAG_DF, c.CMD_FLAG_FUA | c.CMD_FLAG_DF] * view.structured
        self._read_heads = frozenset(request_head(flags, c.CMD_READ) for flags in harmless)
        self._write_head = _NO_HEAD if view.read_only else request_head(0, c.CMD_WRITE)
        self._out: list[Part] = []
        self._wrote: list[bytes] = []
        """Cookies of this batch's writes."""
        self._refused: tuple[int, int, str] | None = None
        self._fast_reads = 0
        self._fast_writes = 0
        self._read_latency, self._write_latency = stats.latency[c.CMD_READ], stats.latency[c.CMD_WRITE]
        self._closed = False
        self.traffic = Traffic()
        """What this session has carried; a slow request is in it from its start."""
        self.backlog = False
        """Complete requests may be left in the buffer."""
        self.starved = False
        """The next request waits for budget or for a slow one to end."""
        self.refused = False
        """The last ``serve`` ended with a request that there was no room for."""
        self.replied = False
        """The last ``serve`` had something to send."""

    def serve(self, most: int) -> int:
        """Work through the requests in the buffer, at most ``most``; settle, reply; return how many there were."""
        incoming = self._incoming
        self.refused = False
        if self.backlog:
            self.backlog = False
            incoming.unpark()  # where nothing was received since it was parked
        if not self._outgoing.arena:
            self._outgoing.open_arena()
        served = 0
        if not incoming.skip_bytes or self._skip():
            while True:
                served += self._fast(most - served)
                held = incoming.high - incoming.low
                if held < _HEADER_BYTES:
                    if held:
                        incoming.expect(_HEADER_BYTES)
                    break
                if served >= most:
                    self.backlog = True
                    break
                step = self._other()
                if step is _Step.STOP:
                    break
                served += step is _Step.NEXT
        if self._slow.added:
            self._slow.start_reads()
        self.replied = bool(self._out or self._wrote)
        if self.replied:
            self._answer()
        return served

    def _fast(self, most: int) -> int:
        """Answer requests on the spot until one is not so simple; return how many were answered."""
        incoming, outgoing = self._incoming, self._outgoing
        view, low, high, used = incoming.view, incoming.low, incoming.high, outgoing.used
        arena, ready, last = outgoing.arena, used, high - _HEADER_BYTES
        room = len(arena) if len(arena) <= SMALL_BYTES else 0  # a large one is filled by _read
        size, structured, head, cookie = self._size_bytes, self._structured, _NO_HEAD, b""
        read_heads, write_head = self._read_heads, self._write_head
        read_now, write_now, unpack, wrote = self._read_now, self._write_now, REQUEST_HEAD.unpack_from, self._wrote
        put_data, put_success, header_bytes = DATA.pack_into, SUCCESS.pack_into, self._data_header_bytes
        reads = cold = writes = flushes = bytes_read = bytes_written = length = 0
        try:
            for _ in range(most):
                if low > last:
                    break
                head, cookie, offset, length = unpack(view, low)
                if offset + length > size or not length:
                    if head == _FLUSH_HEAD and self._slow.start_flush(int.from_bytes(cookie)):
                        flushes, low = flushes + 1, low + _HEADER_BYTES
                        continue
                    break
                if head in read_heads:
                    start = used + header_bytes
                    end = start + length
                    if end > room:
                        break
                    if read_now(offset, arena[start:end]):
                        if structured:
                            put_data(arena, used, DATA_HEAD, cookie, length + 8, offset)
                        else:
                            put_success(arena, used, SUCCESS_HEAD, cookie)
                        used = end
                        reads += 1
                    elif self._slow.add_read(int.from_bytes(cookie), offset, length):
                        cold += 1
                    else:
                        break
                    low += _HEADER_BYTES
                    bytes_read += length
                elif head == write_head:
                    start = low + _HEADER_BYTES
                    end = start + length
                    if end > high or length > NBD_MAX_PAYLOAD_BYTES or not write_now(offset, view[start:end]):
                        break
                    wrote.append(cookie)
                    low = end
                    writes += 1
                    bytes_written += length
                else:
                    break
        except Exception as error:
            command = head & _TYPE_MASK
            self._count(command)
            self._failed(command, int.from_bytes(cookie), error)
            low += _HEADER_BYTES + (length if head == write_head else 0)
        if not self._closed:
            incoming.low, outgoing.used = low, used
            if ready < used:
                self._out.append(arena[ready:used])
        traffic, requests = self.traffic, self.traffic.requests
        if reads or cold:
            requests[c.CMD_READ] += reads + cold
            traffic.bytes_read += bytes_read
            self._fast_reads += reads
        if writes:
            requests[c.CMD_WRITE] += writes
            traffic.bytes_written += bytes_written
            self._fast_writes += writes
        requests[c.CMD_FLUSH] += flushes
        return reads + writes + cold + flushes

    def observe(self, duration_s: float) -> None:
        """Note that the requests answered on the spot since the last call took ``duration_s``."""
        if self._fast_reads:
            self._read_latency.observe(duration_s, self._fast_reads)
            self._fast_reads = 0
        if self._fast_writes:
            self._write_latency.observe(duration_s, self._fast_writes)
            self._fast_writes = 0

    def _other(self) -> _Step:
        """Deal with the request at ``low``, whose header is complete and which ``_fast`` left."""
        incoming = self._incoming
        magic, flags, command, cookie, offset, length = REQUEST.unpack_from(incoming.view, incoming.low)
        if magic != c.REQUEST_MAGIC:
            log.warning("nbd %s: a request with magic %#x: framing is lost", self._name, magic)
            self._finish("framing lost")
            return _Step.STOP
        if command == c.CMD_DISC:  # "The server MUST handle all outstanding requests"
            self._count(command)
            self._finish("the client disconnected")
            return _Step.STOP
        code, text = judge(self._view, flags, command, offset, length)
        if code:
            return self._refuse(command, cookie, length, code, text)
        if command == c.CMD_READ and length:
            step = self._read(cookie, offset, length)
        elif command == c.CMD_WRITE and length:
            step = self._write(flags, cookie, offset, length)
        elif command == c.CMD_FLUSH or (length and command != c.CMD_CACHE):
            step = self._started(self._slow.start_other(flags, command, cookie, offset, length), _HEADER_BYTES)
        else:  # CACHE: "MAY use this information"; the page cache does it better. Or a request about nothing.
            self._out.append(self._replies.no_data(cookie) if command == c.CMD_READ else done(cookie))
            incoming.low += _HEADER_BYTES
            step = _Step.NEXT
        if step is _Step.NEXT:
            self._count(command, length)
        return step

    def _read(self, cookie: int, offset: int, length: int) -> _Step:
        outgoing = self._outgoing
        if length > len(outgoing.arena) - outgoing.used - _READ_MARGIN_BYTES:
            if self._out:
                self.backlog = True  # send first: that empties the arena
                return _Step.STOP
            if self._slow.full:  # asked before the arena is opened: _make_room gives that back, and would go in circles
                return self._make_room()
            if not outgoing.open_arena(length + _READ_MARGIN_BYTES):
                return self._make_room()
        if len(outgoing.arena) > SMALL_BYTES and self._large_read(cookie, offset, length):
            return _Step.STOP if self._closed else self._started(True, _HEADER_BYTES)
        if self._slow.full:
            return self._make_room()
        if not outgoing.used and outgoing.charged and length > _SMALL_READ_BYTES:
            # The volume cannot answer at once: the task takes the arena along. To give it back and take another would
            # let two connections wait for each other in turns, for ever.
            self._slow.start_read(cookie, offset, length, outgoing.detach_arena())
            outgoing.open_arena()
            return self._started(True, _HEADER_BYTES)
        return self._started(self._slow.add_read(cookie, offset, length), _HEADER_BYTES)

    def _large_read(self, cookie: int, offset: int, length: int) -> bool:
        """Answer a read on the spot, data and header in two pieces: what lies askew is slower to copy in such sizes."""
        outgoing = self._outgoing
        start = -(-outgoing.used // _ALIGNED_BYTES) * _ALIGNED_BYTES
        into = outgoing.arena[start : start + length]
        try:
            if not self._read_now(offset, into):
                return False
        except Exception as error:
            self._failed(c.CMD_READ, cookie, error)
            return True
        self._out += (self._replies.data(cookie, offset, length), into)
        outgoing.used = start + length
        self._fast_reads += 1
        return True

    def _write(self, flags: int, cookie: int, offset: int, length: int) -> _Step:
        incoming, slow = self._incoming, self._slow
        need = _HEADER_BYTES + length
        if incoming.high - incoming.low < need:
            return _Step.STOP if incoming.expect(need) else self._make_room()
        if slow.full:
            return self._make_room()
        start = incoming.low + _HEADER_BYTES
        data, fua = incoming.view[start : start + length], bool(flags & c.CMD_FLAG_FUA)
        buffer = incoming.detach(need)
        if buffer is not None:
            slow.start_write(cookie, offset, data, buffer, fua=fua)
            return _Step.NEXT
        return self._started(slow.start_copied_write(cookie, offset, data, fua=fua), need)

    def _started(self, started: bool, consumed_bytes: int) -> _Step:
        if not started:
            return self._make_room()
        self._incoming.low += consumed_bytes
        return _Step.NEXT

    def _make_room(self) -> _Step:
        """There is no budget or slot for a request: give back what is not needed and try again, else wait."""
        self.backlog = True
        outgoing = self._outgoing
        if not self._out and not self._wrote:  # else sending may free more
            if outgoing.charged:
                outgoing.rest()
                outgoing.open_arena()
                return _Step.AGAIN
            if self._incoming.shrink():
                return _Step.AGAIN
            self.starved = True
        self.refused = True
        return _Step.STOP

    def _refuse(self, command: int, cookie: int, length: int, code: int, text: str) -> _Step:
        incoming = self._incoming
        self._count(command)
        incoming.low += _HEADER_BYTES
        if command == c.CMD_WRITE:  # the reply goes out when the payload has gone by: framing stays intact
            incoming.skip_bytes = length
            self._refused = (cookie, code, text)
            return _Step.NEXT if self._skip() else _Step.STOP
        self._error(cookie, code, text)
        return _Step.NEXT

    def _skip(self) -> bool:
        """Throw away payload of a refused write; True and the reply is ready if all of it has gone by."""
        incoming = self._incoming
        step = min(incoming.skip_bytes, incoming.high - incoming.low)
        incoming.low += step
        incoming.skip_bytes -= step
        if incoming.skip_bytes:
            return False
        assert self._refused is not None
        self._error(*self._refused)
        self._refused = None
        return True

    def _error(self, cookie: int, code: int, text: str) -> None:
        self._stats.error(code)
        self._out.append(self._replies.error(cookie, code, text))

    def _failed(self, command: int, cookie: int, error: Exception) -> None:
        """A ``*_now`` verb raised: that request fails, the others go on."""
        if isinstance(error, ShuttingDown):
            self._abandon("the volume is shutting down")
            return
        if not isinstance(error, BlockvirtError | OSError):
            log.exception("nbd %s: %s failed unexpectedly", self._name, c.COMMAND_NAMES[command], exc_info=error)
        self._error(cookie, *explain(error))

    def _answer(self) -> None:
        """Settle what was written in this batch, then send all replies of it."""
        out, self._out = self._out, []
        wrote, self._wrote = self._wrote, []
        if wrote:
            try:
                self._handle.settle()
            except ShuttingDown:
                self._abandon("the volume is shutting down")
                return
            except Exception as error:
                # None of these writes is known to survive: not one of them may be acknowledged (I3b, I7)
                log.warning("nbd %s: %d writes not acknowledged: %s", self._name, len(wrote), error)
                code, text = explain(error)
                for cookie in wrote:
                    self._stats.error(code)
                    out.append(self._replies.error(int.from_bytes(cookie), code, text))
            else:
                out.append(all_done(wrote))
        self._outgoing.send(out)

    def _count(self, command: int, length: int = 0) -> None:
        if command < len(c.COMMAND_NAMES):
            self.traffic.requests[command] += 1
            if command == c.CMD_READ:
                self.traffic.bytes_read += length
            elif command == c.CMD_WRITE:
                self.traffic.bytes_written += length

    def close(self) -> None:
        """Send nothing more. What ``write_now`` took is settled even so: the volume relies on that."""
        if self._closed:
            return
        self._closed = True
        self.backlog = False
        self._out.clear()
        if self._wrote:
            self._wrote.clear()
            try:
                self._handle.settle()
            except Exception as error:
                log.warning("nbd %s: settling at the end of the session failed: %s", self._name, error)
