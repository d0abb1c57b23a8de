"""A pool at rest with snapshots and clones, for the tests of the offline proof, and ways to damage it."""

from array import array
from collections.abc import Callable
from pathlib import Path

from blockvirt.check import run
from blockvirt.lun.leaf import decode, encode
from blockvirt.meta.findings import Finding
from blockvirt.meta.keys import Table, leaf_key
from blockvirt.meta.records import seal, unseal
from blockvirt.meta.store import Store, Writer
from blockvirt.volumes.requests import NewVolume
from tests.snapshots.conftest import SnapshotPool
from tests.volumes.conftest import until_punched, write

CHUNK = 4096
SIZE = 600 * CHUNK
WEB, COPY = 1, 2  # branches


def check(pool: SnapshotPool, *, repair: bool = False) -> list[Finding]:
    return list(run(pool.state_dir, repair=repair, restore_metadata=False).findings)


def messages(pool: SnapshotPool) -> dict[tuple[str, str], str]:
    return {(finding.code, finding.what): finding.message for finding in check(pool)}


async def fill(pool: SnapshotPool, volume_id: str, chunks: list[int], content: int) -> None:
    handle = await pool.open(volume_id)
    for chunk in chunks:
        await write(handle, chunk * CHUNK, bytes([content]) * CHUNK)
    await handle.close()


async def at_rest(tmp_path: Path) -> SnapshotPool:
    """A pool at rest: web with monday (chunks 0 to 3), tuesday (0 is new, 520 too), itself (0 and 1 are new).

    Two clones of monday: copy has a chunk of its own, bare has none.
    """
    pool = await SnapshotPool(tmp_path).start()
    web = await pool.volume(SIZE, "web")
    await fill(pool, web, [0, 1, 2, 3], 1)
    await pool.snapshots.create({web: "monday"})
    await fill(pool, web, [0, 520], 2)
    await pool.snapshots.create({web: "tuesday"})
    await fill(pool, web, [0, 1], 3)
    origin = pool.snapshots.find("web@monday")
    copy = (await pool.catalogue.create(NewVolume(size_bytes=SIZE, name="copy"), origin=origin)).volume.id
    await pool.catalogue.create(NewVolume(size_bytes=SIZE, name="bare"), origin=origin)
    await fill(pool, copy, [2], 4)
    await until_punched(pool)
    await pool.close()
    return pool


def alter(pool: SnapshotPool, change: Callable[[Writer], object]) -> None:
    store = Store.open(pool.state_dir / "metadata", reserve_bytes=0)
    store.commit_now(change)
    store.close()


def versions(writer: Writer, branch: int, leaf: int) -> list[tuple[bytes, "array[int]"]]:
    """The versions of a leaf, oldest first: (key, entries)."""
    rows = writer.scan(Table.LEAVES, prefix=leaf_key(branch, leaf, 0)[:12])
    return [(key, decode(unseal(key, stored, what="leaf"))) for key, stored in rows]


def put(writer: Writer, key: bytes, entries: "array[int]") -> None:
    writer.put(Table.LEAVES, key, seal(key, encode(entries)))
