"""The trash's worker: what is due goes, at a cost that grows with what is due."""

import asyncio

import pytest

from blockvirt.meta import transactions
from blockvirt.meta.keys import Table
from blockvirt.meta.records import Record, decode
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.requests import NewVolume
from tests.volumes.conftest import Pool, until


async def test_many_volumes_that_are_due_are_looked_at_once(pool: Pool) -> None:
    now_s = 1_000.0
    catalogue = Catalogue(
        pool.engine.store, pool.engine.registry, pool.engine.storage, trash_s=3_600.0, clock=lambda: now_s
    )
    for number in range(60):  # more than one batch of them
        await catalogue.create(NewVolume(size_bytes=4096, name=f"v{number}"))
        await catalogue.delete(f"v{number}")
    kept = catalogue.trash.list()[0].id
    await catalogue.trash.restore(kept)
    looked, scan = [], catalogue.trash._due

    async def counted():  # type: ignore[no-untyped-def]
        looked.append(now_s)
        return await scan()

    catalogue.trash._due = counted  # type: ignore[method-assign]
    worker = asyncio.create_task(catalogue.trash.run())
    await until(lambda: len(looked) == 1)
    assert len(catalogue.trash.list()) == 59
    await catalogue.delete(kept)  # due in an hour: no reason to look at all the others
    await asyncio.sleep(0)
    assert len(looked) == 1
    now_s += 3_601.0
    catalogue.trash.wake(0.0)

    def gone() -> bool:
        with pool.engine.store.read() as reader:
            return not reader.count(Table.TRASH)

    await until(gone)
    await until(lambda: len(looked) == 2 and not catalogue.promised_bytes)  # counted when the loop hears of the commit
    worker.cancel()


async def test_a_page_costs_its_own_length(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1_000.0
    catalogue = Catalogue(
        pool.engine.store, pool.engine.registry, pool.engine.storage, trash_s=3_600.0, clock=lambda: now_s
    )
    order = [7, 3, 9, 1, 0, 8, 2, 6, 4, 5] * 4
    for number, due in enumerate(order):
        now_s = 1_000.0 + due
        await catalogue.create(NewVolume(size_bytes=4096, name=f"v{number}"))
        await catalogue.delete(f"v{number}")
    looked: list[type] = []

    def counted(cls: type[Record], key: bytes, stored: bytes) -> Record:
        looked.append(cls)
        return decode(cls, key, stored)

    monkeypatch.setattr(transactions, "decode", counted)
    found = list(catalogue.trash.page(limit=3).volumes)
    assert len(looked) == 3
    after = catalogue.trash.page(limit=3).next_after
    while after is not None:
        page = catalogue.trash.page(after=after, limit=7)
        found += page.volumes
        after = page.next_after
    assert [each.purge_at_s for each in found] == sorted(4_600.0 + due for due in order)
    assert len({each.id for each in found}) == len(order)


async def test_rows_without_a_time_are_listed_all_the_same(pool: Pool) -> None:
    catalogue = Catalogue(pool.engine.store, pool.engine.registry, pool.engine.storage, trash_s=3_600.0)
    for name in ("a", "b", "c"):
        await catalogue.create(NewVolume(size_bytes=4096, name=name))
        await catalogue.delete(name)
    (first, *_) = catalogue.trash.list()
    await pool.engine.store.commit(lambda writer: writer.put(Table.TRASH, first.id.encode(), b""))
    assert [each.name for each in catalogue.trash.list()] == ["a", "b", "c"]
