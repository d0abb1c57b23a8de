"""What is done in a full pool, and what must come of it (I10)."""

import errno
from collections.abc import Awaitable, Callable
from dataclasses import replace

from blockvirt.errors import BlockvirtError, VolumeStopped
from blockvirt.meta.keys import POOL_KEY, Table
from blockvirt.meta.records import PoolRecord
from blockvirt.meta.store import Writer
from blockvirt.units import MIB
from blockvirt.volumes.handle import Handle
from blockvirt.volumes.requests import NewVolume
from tests.attacks.faults_attempts import BLOCKS
from tests.attacks.faults_model import BLOCK_BYTES, ZEROS, Expected
from tests.attacks.faults_pool import CHUNK_BYTES, AttackedPool
from tests.attacks.faults_scenario import A_CHUNK, Scenario
from tests.attacks.full_places import Place
from tests.volumes.conftest import write

_BIG_BYTES = 64 * MIB
_PIECE_BYTES = 64 * CHUNK_BYTES


class FullPool(Scenario):
    """A volume ``v`` that is compared, one ``f`` that takes all the space, and one ``d`` that is deleted."""

    def __init__(self, pool: AttackedPool, seed: int, place: Place) -> None:
        super().__init__(pool, seed, Expected())
        self.place = place
        self.done = 0
        """Steps that must succeed in a full pool, and did."""
        self.refused_for_space = 0
        self._trimmed = False
        """What is there was used, and some of it trimmed."""
        self._trims = 0
        self._filled_bytes = 0
        self._filler: Handle

    async def run(self) -> None:
        """Fill, use, free, use."""
        await self._begin()
        await self.place.fill(self.pool)
        await self._fill()
        for _ in range(2):
            await self._use_what_is_there()
            await self._must("closing and opening v", lambda: self.reconnect("v"))
            await self._fill()  # what that gave back
        await self._free()
        await self._must("deleting rows", lambda: self.place.tidy_up(self.pool))
        if not self.place.is_of_the_device:
            self.place.make_space()
            await self._must("looking at the metadata reserve", self.pool.engine.store.check_reserve)
        await self._must("a new chunk after space was made", lambda: self._write_new(CHUNK_BYTES))
        await self.read("v")
        if self.stops:
            self.problems.append("a volume stopped for lack of space")

    async def _begin(self) -> None:
        await self.pool.start()
        await self.place.begin(self.pool)
        await self.pool.engine.store.commit(_promise_much)
        self.pool.engine.storage.policy_changed()
        await self.create("v")
        await self._write("v", 0, 20 * A_CHUNK)
        await self.snapshot("v@s")
        await self._write("v", 0, 32 * A_CHUNK)
        await self.flush("v")
        await self._make_to_delete("d")
        made = await self.pool.catalogue.create(NewVolume(size_bytes=_BIG_BYTES, name="f"))
        self._filler = await self.pool.open(made.volume.id)
        if self.refused:
            self.problems.append(f"nothing is full yet, and something was refused: {self.last_error!r}")

    # --- filling -------------------------------------------------------------------------------------------------

    async def _fill(self) -> None:
        for piece_bytes in (_PIECE_BYTES, CHUNK_BYTES):
            while await self._grow_filler(piece_bytes):
                if self._filled_bytes > _BIG_BYTES // 2:
                    self.problems.append("the pool never gets full")
                    return

    async def _grow_filler(self, length: int) -> bool:
        """Write new chunks; False where they are refused for lack of space."""
        try:
            await write(self._filler, self._filled_bytes, b"f" * length)
        except (BlockvirtError, OSError) as error:
            number = error.nbd_errno if isinstance(error, BlockvirtError) else error.errno
            if number != errno.ENOSPC or isinstance(error, VolumeStopped):
                self.problems.append(f"a new chunk was refused with {error!r}, which is not for lack of space")
            self.refused_for_space += 1
            return False
        self._filled_bytes += length
        return True

    async def _must_refuse_for_space(self, when: str) -> None:
        if await self._grow_filler(CHUNK_BYTES):
            self.problems.append(f"a new chunk was given {when}")

    async def _write_new(self, length: int) -> None:
        await write(self._filler, self._filled_bytes, b"g" * length)
        self._filled_bytes += length

    # --- what must go on -----------------------------------------------------------------------------------------

    async def _must(self, what: str, call: Callable[[], Awaitable[object]]) -> None:
        """Do what a full pool must do."""
        refused = self.refused
        try:
            done, _ = await self._try(what, call)
        except VolumeStopped:
            done = False
        if done and self.refused == refused:
            self.done += 1
        else:
            self.problems.append(f"{what} was refused in a full pool: {self.last_error!r}")

    async def _use_what_is_there(self) -> None:
        """Read, overwrite in place, trim, flush, checkpoint."""
        await self._use_in_place()
        if not self._trimmed:
            await self._must_refuse_for_space("before anything was freed")
        self._trimmed = True
        await self._must("a trim", self._trim)
        await self._must("a flush after a trim", lambda: self.flush("v"))
        await self._must("a checkpoint", lambda: self.checkpoint("v"))
        await self._must("an overwrite after a checkpoint", lambda: self._write("v", 30 * A_CHUNK, A_CHUNK))
        await self._must("a flush of the full volume", self._filler.flush)

    async def _use_in_place(self) -> None:
        """Do what changes no map."""
        await self._must("a read", lambda: self.read("v"))
        for _ in range(3):
            first, count = self._range(6 * A_CHUNK, 16 * A_CHUNK, 32 * A_CHUNK)
            await self._must("an overwrite", lambda place=(first, count): self._write("v", *place))  # type: ignore[misc]
        await self._must("a flush", lambda: self.flush("v"))

    async def _trim(self) -> None:
        first, self._trims = self._trims * A_CHUNK, self._trims + 1  # each time something that is mapped
        where = first * BLOCK_BYTES
        await self._noted(
            "v", "a trim", first, A_CHUNK, ZEROS, lambda handle: handle.zero(where, CHUNK_BYTES, punch=True)
        )

    async def _free(self) -> None:
        """Delete and trim: that needs no space, and gives some back."""
        await self._must("deleting a snapshot", lambda: self.delete_snapshot("v@s"))
        await self._must("a trim of two MiB", lambda: self._filler.zero(0, 2 * MIB, punch=True))
        await self._must("a checkpoint of that", lambda: self._filler._opened.checkpointer.run())
        await self._must("giving space back", self.pool.punch)
        if self.place.is_of_the_device:
            for _ in range(6):  # less than was trimmed, and more than anything else gave back
                await self._must("new chunks after a trim", lambda: self._write_new(_PIECE_BYTES))
            await self._fill()
        await self._must_refuse_for_space("though what a trim gave back is used, or nothing was given back")
        await self._delete_a_volume()
        if self.place.is_of_the_device:
            for _ in range(3):  # three quarters of what it had
                await self._must("new chunks after a volume was deleted", lambda: self._write_new(16 * CHUNK_BYTES))
        else:
            await self._must_refuse_for_space("though a deletion makes no space there")
        await self.read("v")

    async def _make_to_delete(self, name: str) -> None:
        """Make a volume that is full, and closed."""
        await self.create(name)
        await self._write(name, 0, BLOCKS)
        await self._handles.pop(name).close()

    async def _delete_a_volume(self, name: str = "d") -> None:
        await self._must("deleting a volume", lambda: self.delete_volume(name))
        await self._must("giving its space back", self.pool.punch)
        if failed := self.pool.engine.jobs.list(state="failed"):
            self.problems.append(f"a {failed[0].kind} failed in a full pool: {failed[0].error}")


def _promise_much(writer: Writer) -> None:
    pool = writer.record(PoolRecord, Table.POOL, POOL_KEY)
    assert pool is not None
    writer.put_record(Table.POOL, POOL_KEY, replace(pool, overcommit_ratio=1000.0))
