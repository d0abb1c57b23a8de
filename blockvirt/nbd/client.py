"""A small NBD client for tests, measurements and tools: any number of requests in flight, replies in any order."""

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from blockvirt.device import BASE_ALLOCATION, Extent, ExtentState
from blockvirt.nbd import constants as c
from blockvirt.nbd.messages import (
    CHUNK,
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    SIMPLE_REPLY,
    pack_context_request,
    pack_info_request,
)
from blockvirt.tasks import TaskSet

_LATEST_REPLY_BYTES = 64 << 20
"""A chunk that claims more than this is no NBD server's."""


class NbdClientError(Exception):
    """The server did not behave, or the connection ended."""


class RefusedOption(NbdClientError):
    """The server answered an option with an error reply."""

    def __init__(self, option: int, reply_type: int, text: str) -> None:
        super().__init__(f"option {option} refused with {reply_type:#x}: {text}")
        self.option = option
        self.reply_type = reply_type
        self.text = text


class RequestFailed(NbdClientError):
    """The server answered a request with an error."""

    def __init__(self, error: int, text: str = "") -> None:
        super().__init__(f"NBD error {error}" + (f": {text}" if text else ""))
        self.error = error
        self.text = text


@dataclass(frozen=True, slots=True)
class OptionReply:
    """One reply to an option."""

    option: int
    kind: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """The whole reply to a request. ``chunks`` are (type, payload) of a structured one."""

    error: int
    data: bytes
    text: str
    chunks: tuple[tuple[int, bytes], ...]


class NbdClient:
    """One connection. ``connect_*``, options, ``go``, requests, ``disconnect``; or use it as a context manager."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._tasks = TaskSet("nbd client")
        self._cookies = 0
        self._waiting: dict[int, tuple[asyncio.Future[Reply], int]] = {}
        self._ended: NbdClientError | None = None
        self.structured = False
        self.contexts: dict[int, str] = {}
        """The metadata contexts that were selected last, by their ids."""
        self.size_bytes = 0
        self.flags = 0

    @classmethod
    async def connect_unix(cls, path: str) -> "NbdClient":
        """Connect and exchange flags."""
        return await cls._greeted(*await asyncio.open_unix_connection(path))

    @classmethod
    async def connect_tcp(cls, host: str, port: int) -> "NbdClient":
        """Connect and exchange flags."""
        return await cls._greeted(*await asyncio.open_connection(host, port))

    @classmethod
    async def _greeted(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> "NbdClient":
        client = cls(reader, writer)
        try:
            magic, options, _flags = GREETING.unpack(await client._exactly(GREETING.size))
            if (magic, options) != (c.INIT_MAGIC, c.OPTION_MAGIC):
                raise NbdClientError(f"no newstyle NBD server: {magic:#x} {options:#x}")
        except BaseException:
            await client.close()
            raise
        writer.write(CLIENT_FLAGS.pack(c.CLIENT_FIXED_NEWSTYLE | c.CLIENT_NO_ZEROES))
        return client

    async def __aenter__(self) -> "NbdClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _exactly(self, size: int) -> bytes:
        try:
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise NbdClientError("the server closed the connection") from error

    # --- handshake -------------------------------------------------------------------------------------------------

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are: for tests of what a server makes of them."""
        self._writer.write(data)

    async def option(self, option: int, payload: bytes = b"") -> list[OptionReply]:
        """Send an option and return its replies up to the final one; raises RefusedOption."""
        self.send_raw(OPTION.pack(c.OPTION_MAGIC, option, len(payload)) + payload)
        replies: list[OptionReply] = []
        while True:
            reply = await self.option_reply()
            if reply.option != option:
                raise NbdClientError(f"a reply to option {reply.option} instead of {option}")
            if reply.kind & c.REP_ERROR_BIT:
                raise RefusedOption(option, reply.kind, reply.payload.decode())
            if reply.kind == c.REP_ACK:
                return replies
            replies.append(reply)

    async def option_reply(self) -> OptionReply:
        """Receive one option reply."""
        magic, option, kind, length = OPTION_REPLY.unpack(await self._exactly(OPTION_REPLY.size))
        if magic != c.OPTION_REPLY_MAGIC or length > _LATEST_REPLY_BYTES:
            raise NbdClientError(f"no option reply: magic {magic:#x}, {length} bytes")
        return OptionReply(option, kind, await self._exactly(length))

    async def list_exports(self) -> list[str]:
        """Return the names of NBD_OPT_LIST."""
        names = []
        for reply in await self.option(c.OPT_LIST):
            (length,) = struct.unpack_from(">I", reply.payload)
            names.append(reply.payload[4 : 4 + length].decode())
        return names

    async def ask_structured(self) -> None:
        """Negotiate structured replies."""
        await self.option(c.OPT_STRUCTURED_REPLY)
        self.structured = True

    async def ask_allocation(self, name: str) -> bool:
        """Select base:allocation for an export; True if the server has it."""
        return bool(await self.set_contexts(name, [BASE_ALLOCATION]))

    async def list_contexts(self, name: str, queries: Sequence[str] = ()) -> list[str]:
        """Return the metadata contexts of an export that match the queries, or all of them."""
        replies = await self.option(c.OPT_LIST_META_CONTEXT, pack_context_request(name, queries))
        return [reply.payload[4:].decode() for reply in replies]

    async def set_contexts(self, name: str, contexts: Sequence[str]) -> list[str]:
        """Select metadata contexts for an export; returns those that the server has."""
        self.contexts.clear()
        for reply in await self.option(c.OPT_SET_META_CONTEXT, pack_context_request(name, contexts)):
            (number,) = struct.unpack_from(">I", reply.payload)
            self.contexts[number] = reply.payload[4:].decode()
        return list(self.contexts.values())

    async def info(self, name: str, requests: Sequence[int] = (), *, option: int = c.OPT_INFO) -> dict[int, bytes]:
        """Return the information replies of NBD_OPT_INFO by type, and note size and flags."""
        found = {}
        for reply in await self.option(option, pack_info_request(name, requests)):
            found[struct.unpack_from(">H", reply.payload)[0]] = reply.payload[2:]
        self.size_bytes, self.flags = struct.unpack(">QH", found[c.INFO_EXPORT])
        return found

    async def go(self, name: str, requests: Sequence[int] = ()) -> dict[int, bytes]:
        """Enter transmission; returns the information replies."""
        found = await self.info(name, requests, option=c.OPT_GO)
        self.begin()
        return found

    async def export_name(self, name: str) -> None:
        """Enter transmission with NBD_OPT_EXPORT_NAME."""
        self.send_raw(OPTION.pack(c.OPTION_MAGIC, c.OPT_EXPORT_NAME, len(name.encode())) + name.encode())
        self.size_bytes, self.flags = EXPORT_NAME_REPLY.unpack(await self._exactly(EXPORT_NAME_REPLY.size))
        self.begin()

    def begin(self) -> None:
        """Start to receive replies to requests."""
        self._tasks.start(self._receive_replies(), "replies")

    # --- transmission ----------------------------------------------------------------------------------------------

    def start(
        self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
    ) -> "asyncio.Future[Reply]":
        """Send a request and return the future of its reply: raises NbdClientError if the connection ends first."""
        self._cookies += 1
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        if self._ended is not None:
            future.set_exception(self._ended)
            return future
        self._waiting[self._cookies] = future, length if command == c.CMD_READ else 0
        self.send_raw(REQUEST.pack(c.REQUEST_MAGIC, flags, command, self._cookies, offset, length) + payload)
        return future

    async def _call(
        self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"", flags: int = 0
    ) -> Reply:
        future = self.start(command, offset, length, payload, flags)
        try:
            await self._writer.drain()
        except OSError:  # the connection is gone: the future says so, unless the reply came before
            pass
        reply = await future
        if reply.error:
            raise RequestFailed(reply.error, reply.text)
        return reply

    async def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        """Read bytes; raises RequestFailed."""
        return (await self._call(c.CMD_READ, offset, length, flags=flags)).data

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        """Write bytes; raises RequestFailed."""
        await self._call(c.CMD_WRITE, offset, len(data), data, flags)

    async def flush(self) -> None:
        """Flush; raises RequestFailed."""
        await self._call(c.CMD_FLUSH)

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        """Trim a range; raises RequestFailed."""
        await self._call(c.CMD_TRIM, offset, length, flags=flags)

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Write zeroes; raises RequestFailed."""
        await self._call(c.CMD_WRITE_ZEROES, offset, length, flags=flags)

    async def block_status(self, offset: int, length: int, flags: int = 0) -> list[Extent]:
        """Return the base:allocation extents from ``offset`` on; raises RequestFailed."""
        statuses = await self.statuses(offset, length, flags)
        return [Extent(size, ExtentState(state)) for size, state in statuses[BASE_ALLOCATION]]

    async def statuses(self, offset: int, length: int, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
        """Return (length in bytes, status) from ``offset`` on in every selected context; raises RequestFailed."""
        reply = await self._call(c.CMD_BLOCK_STATUS, offset, length, flags=flags)
        found: dict[str, list[tuple[int, int]]] = {}
        for kind, payload in reply.chunks:
            (number,) = struct.unpack_from(">I", payload)
            context = self.contexts.get(number, "")
            if kind != c.REPLY_BLOCK_STATUS or not context or context in found:
                raise NbdClientError(f"a chunk of type {kind} with context id {number} in a block status reply")
            found[context] = list(struct.iter_unpack(">II", payload[4:]))
        return found

    async def _receive_replies(self) -> None:
        try:
            while True:
                await self._receive_reply()
        except NbdClientError as error:
            self._ended = error
            for future, _length in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # nobody has to ask
            self._waiting.clear()

    async def _receive_reply(self) -> None:
        (magic,) = struct.unpack(">I", await self._exactly(4))
        if magic == c.SIMPLE_REPLY_MAGIC:
            error, cookie = struct.unpack(">IQ", await self._exactly(SIMPLE_REPLY.size - 4))
            future, length = self._expected(cookie)
            data = b"" if error or self.structured else await self._exactly(length)
            self._answered(cookie, future, Reply(error, data, "", ()))
        elif magic == c.STRUCTURED_REPLY_MAGIC:
            await self._receive_chunks()
        else:
            raise NbdClientError(f"no reply: magic {magic:#x}")

    async def _receive_chunks(self) -> None:
        """Receive one chunk, and the others of its reply: this server sends them together."""
        chunks: list[tuple[int, bytes]] = []
        while True:
            flags, kind, cookie, length = struct.unpack(">HHQI", await self._exactly(CHUNK.size - 4))
            if length > _LATEST_REPLY_BYTES:
                raise NbdClientError(f"a chunk of {length} bytes")
            chunks.append((kind, await self._exactly(length)))
            if flags & c.REPLY_FLAG_DONE:
                break
            await self._exactly(4)
        future, _length = self._expected(cookie)
        error, text, data = 0, "", b""
        for kind, payload in chunks:
            if kind & c.REPLY_ERROR_BIT:
                error, size = struct.unpack_from(">IH", payload)
                text = payload[6 : 6 + size].decode()
            elif kind == c.REPLY_OFFSET_DATA:
                data += payload[8:]
        self._answered(cookie, future, Reply(error, data, text, tuple(chunks)))

    def _expected(self, cookie: int) -> "tuple[asyncio.Future[Reply], int]":
        try:
            return self._waiting[cookie]
        except KeyError:
            raise NbdClientError(f"a reply to nothing: cookie {cookie}") from None

    def _answered(self, cookie: int, future: "asyncio.Future[Reply]", reply: Reply) -> None:
        del self._waiting[cookie]
        if not future.done():
            future.set_result(reply)

    # --- the end ---------------------------------------------------------------------------------------------------

    async def disconnect(self) -> None:
        """Send NBD_CMD_DISC, wait for outstanding replies and the server's end of the connection, and close."""
        self.send_raw(REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_DISC, 0, 0, 0))
        await self.closed()
        await self.close()

    async def closed(self) -> None:
        """Return when the server has closed the connection."""
        await self._tasks.wait()

    def abort(self) -> None:
        """Drop the connection at once."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close the connection without a word."""
        await self._tasks.close()
        for future, _length in self._waiting.values():
            future.cancel()
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:  # the server was quicker
            pass
