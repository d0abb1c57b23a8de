"""What NBD clients find under a name: volumes, units and snapshots of a real pool, over a real socket."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockvirt.daemon import Sessions
from blockvirt.device import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_SINCE, STATE_DIRTY
from blockvirt.errors import InUse, NotFound
from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.presentation import Presentation
from blockvirt.meta.keys import Table
from blockvirt.nbd import constants as c
from blockvirt.nbd.client import NbdClient, NbdClientError, RefusedOption, RequestFailed
from blockvirt.nbd.server import NbdServer
from blockvirt.snapshots import exports as exports_module
from blockvirt.snapshots.exports import Exports
from blockvirt.volumes import layers
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import until

CHUNK = 4096
SIZE = 64 * CHUNK
PATIENCE_S = 20.0


@dataclass
class Served:
    """A pool behind an NBD server."""

    pool: SnapshotPool
    presentation: Presentation
    sessions: Sessions
    exports: Exports
    server: NbdServer
    path: str
    clients: list[NbdClient] = field(default_factory=list)

    async def enter(self, name: str, *contexts: str) -> NbdClient:
        """A client in transmission, with these contexts selected."""
        client = await NbdClient.connect_unix(self.path)
        self.clients.append(client)
        if contexts:
            await client.ask_structured()
            assert await client.set_contexts(name, contexts) == list(contexts)
        await client.go(name)
        return client

    async def volume(self, name: str = "v") -> str:
        """A volume; its id."""
        return (await self.pool.catalogue.create(NewVolume(SIZE, name=name))).volume.id

    async def put(self, name: str, chunk: int, letter: bytes, count: int = 1) -> None:
        """Fill chunks of an export with one letter."""
        client = await self.enter(name)
        await client.write(chunk * CHUNK, letter * CHUNK * count)
        await client.disconnect()

    async def snapshot(self, volume: str, name: str) -> None:
        """Take a snapshot."""
        await self.pool.snapshots.create({volume: name})

    async def close(self) -> None:
        """As the daemon closes it."""
        for client in self.clients:
            await client.close()
        await self.server.stop(PATIENCE_S)


@pytest.fixture
async def served(pool: SnapshotPool, short_tmp_path: Path) -> AsyncIterator[Served]:
    """A pool wired as the daemon wires it."""
    engine = pool.engine
    engine.registry.on_discard(pool.readers.drop_volume)
    sessions = Sessions(engine, pool.readers)
    presentation = Presentation(engine.store, sessions)
    exports = Exports(
        engine.store, pool.catalogue, engine.registry, pool.readers, presentation.resolve, presentation.exports
    )
    server = sessions.server = NbdServer(exports)
    path = str(short_tmp_path / "s")
    await server.listen_unix(path)
    made = Served(pool, presentation, sessions, exports, server, path)
    yield made
    await made.close()
    assert pool.readers.opened() == (), "a session left a snapshot open"


async def test_a_snapshot_is_served_as_it_was(served: Served) -> None:
    volume_id = await served.volume()
    await served.put("v", 0, b"a", 4)
    await served.snapshot("v", "one")
    await served.put("v", 2, b"b", 4)
    for name in ("v@one", f"{volume_id}@one"):
        client = await served.enter(name)
        assert client.size_bytes == SIZE
        assert client.flags & c.FLAG_READ_ONLY
        assert not client.flags & (c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES)
        assert client.flags & c.FLAG_CAN_MULTI_CONN
        assert await client.read(0, SIZE) == b"a" * 4 * CHUNK + bytes(SIZE - 4 * CHUNK)
        await client.flush()
        with pytest.raises(RequestFailed) as refused:
            await client.write(0, b"x")
        assert refused.value.error == 1  # EPERM
    head = await served.enter("v")
    assert await head.read(0, 7 * CHUNK) == b"a" * 2 * CHUNK + b"b" * 4 * CHUNK + bytes(CHUNK)


async def test_a_grown_volumes_snapshot_has_its_old_size(served: Served) -> None:
    volume_id = await served.volume()
    await served.snapshot("v", "one")
    await served.pool.engine.registry.resize(volume_id, SIZE)
    info = await served.exports.describe(f"{volume_id}@one")
    assert info.name == "v@one", "all sessions of one snapshot are known under one name, whoever named it how"
    assert info.size_bytes == SIZE
    assert info.block_bytes == CHUNK
    assert info.capabilities.read_only


@pytest.mark.parametrize("name", ["v@", "v@two", "@one", "w@one", "v@one@one", "web1/lun0@one", "v/@one"])
async def test_what_is_no_snapshot_is_refused(served: Served, name: str) -> None:
    await served.volume()
    await served.snapshot("v", "one")
    for option in (c.OPT_INFO, c.OPT_GO):
        client = await NbdClient.connect_unix(served.path)
        served.clients.append(client)
        with pytest.raises(RefusedOption) as refused:
            await client.info(name, option=option)
        assert refused.value.reply_type == c.REP_ERR_UNKNOWN
        assert await client.list_exports() == ["v"], "the connection lives, and snapshots are not listed"
    with pytest.raises(NotFound):
        served.exports.contexts(name, "")


async def test_a_units_name_finds_its_volume(served: Served) -> None:
    volume_id = await served.volume()
    host, _ = await served.presentation.create_host("web1", {})
    await served.presentation.map(host.id, volume_id)
    assert list(served.exports.names()) == ["v", "web1/lun0"]
    assert (await served.exports.describe("web1/lun0")).name == "v"


async def test_bitmaps_of_older_snapshots_are_listed_and_of_younger_ones_found(served: Served) -> None:
    await served.volume()
    await served.volume("w")
    for name in ("one", "two", "three", "four"):
        await served.snapshot("v", name)
    await served.snapshot("w", "other")
    fixed = [BASE_ALLOCATION, ALLOCATION_DEPTH]
    since_two, since_one = DIRTY_SINCE + "two", DIRTY_SINCE + "one"
    contexts = served.exports.contexts
    assert contexts("v@three", "") == [*fixed, since_two, since_one]
    assert contexts("v@three", "qemu:") == [ALLOCATION_DEPTH, since_two, since_one]
    assert contexts("v@three", "qemu:dirty-bitmap:") == [since_two, since_one]
    assert contexts("v@three", "base:") == [BASE_ALLOCATION]
    assert contexts("v@three", DIRTY_SINCE + "four") == [DIRTY_SINCE + "four"]
    for nothing in ("other", "three", "", "on", "w@other"):
        assert contexts("v@three", DIRTY_SINCE + nothing) == [], nothing
    assert contexts("v", "") == fixed
    assert contexts("v", since_one) == []


async def test_a_clone_can_be_compared_with_its_origin(served: Served) -> None:
    await served.volume()
    await served.put("v", 0, b"a", 3)
    await served.snapshot("v", "one")
    origin = served.pool.snapshots.find("v@one")
    await served.pool.catalogue.create(NewVolume(size_bytes=origin.size_bytes, name="clone"), origin=origin)
    await served.put("clone", 1, b"b", 1)
    await served.snapshot("clone", "changed")
    since = DIRTY_SINCE + "v@one"
    assert served.exports.contexts("clone@changed", since) == [since]
    reader = await served.exports.open("clone@changed", "reader", [since])
    assert await reader.block_status(since, 0, 3 * CHUNK) == [(CHUNK, 0), (CHUNK, STATE_DIRTY), (CHUNK, 0)]
    assert served.pool.readers.sessions_of(origin.id) == 1, "what it is compared with stays"
    await reader.close()


async def test_the_list_of_bitmaps_is_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports_module, "NBD_MAX_LISTED_CONTEXTS", 5)
    await served.volume()
    for number in range(6):
        await served.snapshot("v", f"s{number}")
    listed = served.exports.contexts("v@s5", "")
    assert listed == [BASE_ALLOCATION, ALLOCATION_DEPTH, *(f"{DIRTY_SINCE}s{number}" for number in (4, 3, 2))]
    assert served.exports.contexts("v@s5", DIRTY_SINCE + "s0") == [DIRTY_SINCE + "s0"]


async def test_ancestors_reach_across_a_revert_and_end_at_a_clones_origin(served: Served) -> None:
    await served.volume()
    for letter, name in ((b"a", "one"), (b"b", "two"), (b"c", "three")):
        await served.put("v", 0, letter)
        await served.snapshot("v", name)
    await served.pool.reverts.revert("v@two", safety=False)
    await served.put("v", 1, b"d")
    await served.snapshot("v", "four")
    listed = served.exports.contexts("v@four", "qemu:dirty-bitmap:")
    assert listed == [DIRTY_SINCE + "two", DIRTY_SINCE + "one"], "three is of the history that the revert left"
    client = await served.enter("v@four", DIRTY_SINCE + "three")
    statuses = await client.statuses(0, SIZE)
    assert statuses[DIRTY_SINCE + "three"] == [(2 * CHUNK, 1), (SIZE - 2 * CHUNK, 0)]
    origin = served.pool.snapshots.find("v@four")
    await served.pool.catalogue.create(NewVolume(SIZE, name="clone"), origin=origin)
    await served.snapshot("clone", "first")
    await served.snapshot("clone", "second")
    assert served.exports.contexts("clone@second", "qemu:dirty-bitmap:") == [DIRTY_SINCE + "first"]
    assert served.exports.contexts("clone@second", DIRTY_SINCE + "four") == []
    assert await (await served.enter("clone@second")).read(0, 2 * CHUNK) == b"b" * CHUNK + b"d" * CHUNK


async def test_depths_tell_a_clones_own_chunks_from_its_origins(served: Served) -> None:
    await served.volume()
    await served.put("v", 0, b"a", 4)
    await served.snapshot("v", "one")
    await served.pool.catalogue.create(NewVolume(SIZE, name="w"), origin=served.pool.snapshots.find("v@one"))
    await served.put("w", 2, b"b", 4)
    expected = [(2 * CHUNK, 2), (4 * CHUNK, 1), (SIZE - 6 * CHUNK, 0)]
    volume = await served.enter("w", BASE_ALLOCATION, ALLOCATION_DEPTH)
    assert await volume.statuses(0, SIZE) == {
        BASE_ALLOCATION: [(6 * CHUNK, 0), (SIZE - 6 * CHUNK, 3)],
        ALLOCATION_DEPTH: expected,
    }
    assert (await volume.statuses(CHUNK + 100, 2 * CHUNK))[ALLOCATION_DEPTH] == [(CHUNK - 100, 2), (CHUNK + 100, 1)]
    await served.snapshot("w", "two")
    snapshot = await served.enter("w@two", ALLOCATION_DEPTH, BASE_ALLOCATION)
    assert (await snapshot.statuses(0, SIZE))[ALLOCATION_DEPTH] == expected


async def test_a_long_status_is_told_in_several_answers(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "NBD_STATUS_CHUNKS", 600)
    leaves, leaf_bytes = 5, LEAF_CHUNKS * CHUNK
    await served.pool.catalogue.create(NewVolume(leaves * leaf_bytes, name="v"))
    writer = await served.enter("v")
    for leaf in (0, 1, 3, 4):
        await writer.write(leaf * leaf_bytes, b"x" * CHUNK)
    await served.snapshot("v", "one")
    hole = (leaf_bytes - CHUNK, 0)
    expected = [(CHUNK, 1), hole, (CHUNK, 1), (2 * leaf_bytes - CHUNK, 0), (CHUNK, 1), hole, (CHUNK, 1)]
    for name in ("v", "v@one"):
        client = await served.enter(name, ALLOCATION_DEPTH)
        first = (await client.statuses(0, leaves * leaf_bytes))[ALLOCATION_DEPTH]
        assert first == [*expected[:3], hole]
        at = sum(length for length, _ in first)
        assert at == 2 * leaf_bytes
        rest = (await client.statuses(at, (leaves - 2) * leaf_bytes))[ALLOCATION_DEPTH]
        assert rest == [(leaf_bytes, 0), *expected[4:], hole]


async def test_sessions_of_snapshots_are_listed_and_dropped(served: Served) -> None:
    volume_id = await served.volume()
    await served.snapshot("v", "one")
    reader, writer = await served.enter("v@one"), await served.enter("v")
    shown = {session.export: session for session in served.sessions.sessions()}
    assert {name: (each.volume_id, each.mode) for name, each in shown.items()} == {
        "v@one": (volume_id, "ro"),
        "v": (volume_id, "rw"),
    }
    assert await served.sessions.drop_volume(volume_id) == 1
    await writer.closed()
    assert len(await reader.read(0, CHUNK)) == CHUNK, "who reads a snapshot is not concerned"
    assert await served.sessions.drop(shown["v@one"].id)
    await reader.closed()
    await until(lambda: served.pool.readers.volume_of(shown["v@one"].id) is None)


async def test_deleting_a_snapshot_that_is_read_takes_force(served: Served) -> None:
    await served.volume()
    await served.put("v", 0, b"a")
    for name in ("one", "two"):
        await served.snapshot("v", name)
    reader = await served.enter("v@two", DIRTY_SINCE + "one")
    for name in ("v@one", "v@two"):
        with pytest.raises(InUse):
            await served.pool.snapshots.delete([name])
    assert await reader.read(0, 1) == b"a"
    await served.pool.snapshots.delete(["v@one"], force=True)
    with pytest.raises(NbdClientError):
        await reader.read(0, 1)
    await until(lambda: not served.sessions.sessions())
    assert (await served.pool.snapshots.delete(["v@two"])).deleted
    with pytest.raises(NotFound):
        await served.exports.describe("v@two")


async def test_a_snapshot_that_goes_before_its_session_begins_refuses_it(served: Served) -> None:
    await served.volume()
    for name in ("one", "two"):
        await served.snapshot("v", name)
    client = await NbdClient.connect_unix(served.path)
    served.clients.append(client)
    await client.ask_structured()
    assert await client.set_contexts("v@two", [DIRTY_SINCE + "one"])
    await served.pool.snapshots.delete(["v@one"])
    with pytest.raises(RefusedOption) as refused:
        await client.go("v@two")
    assert refused.value.reply_type == c.REP_ERR_UNKNOWN
    await client.set_contexts("v@two", [])
    await client.go("v@two")


async def test_purging_a_volume_ends_who_reads_its_snapshots(served: Served) -> None:
    """Its map goes row by row: a session that went on would read zeros."""
    volume_id = await served.volume()
    await served.put("v", 0, b"a", 8)
    await served.snapshot("v", "one")
    reader = await served.enter("v@one")
    await served.pool.catalogue.delete("v", force=True, purge=True)
    async with asyncio.timeout(PATIENCE_S):
        await reader.closed()

    def gone() -> bool:
        with served.pool.engine.store.read() as store:
            return store.get(Table.VOLUMES, volume_id.encode()) is None

    await until(gone)


async def test_a_volume_in_the_trash_keeps_its_readers_and_gets_no_new_ones(served: Served) -> None:
    served.pool.catalogue._trash_s = 3600.0
    volume_id = await served.volume()
    await served.put("v", 0, b"a")
    await served.snapshot("v", "one")
    reader = await served.enter("v@one")
    await served.pool.catalogue.delete("v")
    assert await reader.read(0, 1) == b"a"
    for name in ("v@one", f"{volume_id}@one"):
        with pytest.raises(NotFound):
            await served.exports.describe(name)


async def test_a_stop_closes_readers_after_their_sessions(served: Served) -> None:
    await served.volume()
    await served.put("v", 0, b"a")
    await served.snapshot("v", "one")
    reader = await served.enter("v@one")
    await served.server.stop(PATIENCE_S)
    await reader.closed()
    assert served.pool.readers.opened() == ()
