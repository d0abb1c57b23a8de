"""Clients in a crowd: random requests, budgets and manners. All are answered, and then nothing is held by anyone."""

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import uvloop

from blockvirt.nbd import constants as c
from blockvirt.nbd.buffers import SMALL_BYTES
from blockvirt.nbd.client import NbdClient, Reply
from blockvirt.nbd.messages import REQUEST
from blockvirt.nbd.server import NbdServer
from blockvirt.nbd.shared import SessionLimits, SharedResources
from blockvirt.nbd.turns import Turns
from blockvirt.testing.memory_volume import MemoryDisk, MemoryExports
from blockvirt.units import KIB, MIB
from tests.nbd.conftest import PATIENCE_S

REGION_BYTES = 12 * MIB
"""Each client's own: zeros in the first half, and three places to write to in the second."""
PLACE_BYTES = 2 * MIB
SIZES_BYTES = [1, 28, 512, 4 * KIB, 4 * KIB, 4 * KIB, 16 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, MIB, 3 * MIB, 4 * MIB]
SIZES_BYTES += [SMALL_BYTES + near for near in (-93, -92, -64, -28, -16, 0, 1)]


def random_resources(dice: random.Random) -> SharedResources:
    """Budgets from hardly any to plenty, turns from one request to many."""
    shared = SharedResources(
        limits=SessionLimits(
            connection_budget_bytes=dice.choice([64 * KIB, MIB, 5 * MIB, 64 * MIB]),
            inflight_requests=dice.choice([1, 2, 5, 256]),
            batch_requests=dice.choice([1, 2, 8, 64]),
            batch_s=dice.choice([0.0, 200e-6, 1.0]),
            spins=dice.choice([0, 3, 40]),
        ),
        turns=Turns(pass_s=dice.choice([-1.0, 0.0, 4e-3])),
    )
    shared.budget.limit_bytes = dice.choice([MIB, 5 * MIB, 8 * MIB, 40 * MIB, 256 * MIB])
    return shared


@dataclass
class Guest:
    """One client, and what it has asked for."""

    client: NbdClient
    base: int
    dice: random.Random
    sent: list[tuple[str, int, "asyncio.Future[Reply]"]] = field(default_factory=list)
    """(kind, length, reply)"""
    written: list[tuple[int, bytes]] = field(default_factory=list)
    gone: bool = False

    async def live(self) -> None:
        """Ask, perhaps read nothing for a while, and look at what came; perhaps hang up in the midst of it."""
        transport = self.client._writer.transport
        for _round in range(self.dice.randint(1, 5)):
            if self.dice.random() < 0.3:
                transport.pause_reading()  # type: ignore[attr-defined]
            places = self.dice.sample(range(3), 3)
            for _ in range(self.dice.randint(1, 40)):
                self._ask(places)
                if self.dice.random() < 0.1:
                    await asyncio.sleep(0)
            transport.resume_reading()  # type: ignore[attr-defined]
            if self.dice.random() < 0.06:
                await self._hang_up()
                return
            await self._check()

    def _ask(self, places: list[int]) -> None:
        kind = self.dice.choices("rwftex", (55, 20, 10, 7, 5, 3))[0]
        size, half, end = self.dice.choice(SIZES_BYTES), self.base + REGION_BYTES // 2, 1 << 40
        start = self.client.start
        if kind == "w" and places:
            offset, size = half + places.pop() * PLACE_BYTES, min(size, PLACE_BYTES)
            data = self.dice.randbytes(size)
            flags = self.dice.choice([0, 0, c.CMD_FLAG_FUA])
            self.written.append((offset, data))
            self.sent.append((kind, 0, start(c.CMD_WRITE, offset, size, data, flags)))
        elif kind == "f":
            self.sent.append((kind, 0, start(c.CMD_FLUSH)))
        elif kind == "t":
            self.sent.append((kind, 0, start(c.CMD_TRIM, half - 64 * KIB, 64 * KIB)))
        elif kind == "e":
            self.sent.append((kind, 0, start(c.CMD_READ, end, size)))
        elif kind == "x":
            self.sent.append(("e", 0, start(c.CMD_WRITE, end, 5000, bytes(5000))))
        else:
            offset = self.base + self.dice.randrange(REGION_BYTES // 2 - SIZES_BYTES[-1])
            size = min(size, half - offset)
            self.sent.append(("r", size, start(c.CMD_READ, offset, size)))

    async def _hang_up(self) -> None:
        self.gone = True
        if self.dice.random() < 0.5:  # in the midst of a payload
            self.client.send_raw(REQUEST.pack(c.REQUEST_MAGIC, 0, c.CMD_WRITE, 0, self.base, 100_000) + bytes(50))
        self.client._writer.transport.abort()
        await asyncio.gather(*(reply for _, _, reply in self.sent), return_exceptions=True)

    async def _check(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            for kind, length, reply in self.sent:
                got = await reply
                assert bool(got.error) == (kind == "e"), kind
                assert got.data == bytes(length)
            for offset, data in self.written:
                assert await self.client.read(offset, len(data)) == data
        self.sent.clear()
        self.written.clear()


async def at_rest(shared: SharedResources) -> None:
    """Return when nobody holds or waits for anything, while all who are left are still connected."""
    async with asyncio.timeout(PATIENCE_S):
        while shared.budget.used_bytes or len(shared.budget) or shared.stats.in_flight or shared.pool.lent:
            await asyncio.sleep(0)
            if shared.pool.lent <= 2 and shared.turns.last is not None:
                shared.turns.last.give_back()  # as when somebody else has a turn


async def history(seed: int, directory: Path) -> int:
    """Let some clients loose; return how many requests the server has counted."""
    dice = random.Random(seed)
    shared, guests = random_resources(dice), dice.randint(1, 5)
    disk = MemoryDisk(guests * REGION_BYTES)
    server = NbdServer(MemoryExports({"v": disk}), shared=shared)
    path = str(directory / "nbd.sock")
    await server.listen_unix(path)

    async def live(number: int) -> Guest:
        client = await NbdClient.connect_unix(path)
        own = random.Random(f"{seed}.{number}")
        if own.random() < 0.5:
            await client.ask_structured()
        await client.go("v")
        guest = Guest(client, number * REGION_BYTES, own)
        await guest.live()
        return guest

    async def change_its_mind() -> None:
        while True:  # what was cold and refused room may be cached the next time
            disk.now = dice.random() < 0.5
            await asyncio.sleep(0)

    mind = asyncio.create_task(change_its_mind())
    try:
        async with asyncio.TaskGroup() as group:
            crowd = [group.create_task(live(number)) for number in range(guests)]
    finally:
        mind.cancel()
    await at_rest(shared)
    for guest in crowd:
        guest.result().client._writer.transport.abort()
    await server.stop()
    assert (disk.open_handles, disk.unsettled_handles) == (0, 0)
    return sum(server.stats().total.requests)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("first", range(0, 60, 10))
def test_everybody_is_answered_and_nothing_is_held(first: int, loop: str, short_tmp_path: Path) -> None:
    for seed in range(first, first + 10):
        run = asyncio.run if loop == "asyncio" else uvloop.run
        try:
            assert run(history(seed, short_tmp_path)) > 0
        except BaseException as error:
            error.add_note(f"history({seed}, directory)")
            raise
