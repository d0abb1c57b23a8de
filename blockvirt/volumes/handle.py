"""A session's handle on an open volume: the seam of ``device.VolumeHandle``, bound to the volume's verbs."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from blockvirt.device import ALLOCATION_DEPTH, Capabilities, Extent, Read
from blockvirt.errors import NotSupported
from blockvirt.volumes.layers import Layers, runs
from blockvirt.volumes.opened import OpenVolume


class Handle:
    """What one session holds. The verbs of every pass are the volume's own, without a call in between."""

    __slots__ = (
        "_close",
        "_opened",
        "block_bytes",
        "capabilities",
        "flush",
        "lost",
        "read_now",
        "session_id",
        "settle",
        "size_bytes",
        "start_flush",
        "write_now",
    )

    def __init__(self, opened: OpenVolume, session_id: str, close: "Callable[[Handle], Awaitable[None]]") -> None:
        volume = opened.volume
        self._opened = opened
        self._close: Callable[[Handle], Awaitable[None]] | None = close
        self.session_id = session_id
        self.size_bytes = volume.size_bytes
        """As it was when the session began: a grown volume shows its new size to new sessions."""
        self.block_bytes = volume.chunk_bytes
        self.capabilities = Capabilities()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.read_now = volume.read_now
        self.write_now = volume.write_now
        self.settle = volume.settle
        self.flush = opened.flusher.flush
        self.start_flush = opened.flusher.start

    @property
    def volume_id(self) -> str:
        """Id of the volume behind the export."""
        return self._opened.volume.record.id

    async def read(self, reads: Sequence[Read]) -> Sequence[Exception | None]:
        """See VolumeHandle."""
        return await self._opened.slow.read(reads)

    async def write(self, offset: int, data: memoryview, *, fua: bool = False) -> None:
        """See VolumeHandle."""
        await self._opened.slow.write(offset, data, fua=fua)

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool = False, fua: bool = False) -> None:
        """See VolumeHandle."""
        await self._opened.slow.zero(offset, length, punch=punch, fast=fast, fua=fua)

    async def extents(self, offset: int, length: int) -> Sequence[Extent]:
        """See VolumeHandle."""
        return await self._opened.slow.extents(offset, length)

    async def block_status(self, context: str, offset: int, length: int) -> Sequence[tuple[int, int]]:
        """See VolumeHandle; raises NotSupported for what a volume does not know: what changed, above all."""
        if context != ALLOCATION_DEPTH:
            raise NotSupported(
                f"the volume has no metadata context {context!r}",
                correction="read a snapshot of it: VOLUME@SNAPSHOT knows what changed since older ones",
            )
        volume = self._opened.volume
        volume.check()
        layers = Layers(volume.context.store, volume.map.branch, volume.map.epoch)
        return runs(volume.map, layers.depth, offset, length, volume.chunk_shift)

    def lose(self) -> None:
        """Tell the session to close its connection without a reply."""
        if not self.lost.done():
            self.lost.set_result(None)

    async def close(self) -> None:
        """See VolumeHandle."""
        close, self._close = self._close, None
        if close is not None:
            await close(self)
