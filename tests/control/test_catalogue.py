"""The catalogue over a real store: what it promises about names, sizes, space, use and damage."""

import asyncio
from dataclasses import replace

import pytest

from blockvirt.errors import (
    DamagedRecord,
    Exists,
    InUse,
    InvalidName,
    InvalidRequest,
    InvalidSize,
    LimitReached,
    NotFound,
    OvercommitLimit,
    PoolFull,
    PreconditionFailed,
)
from blockvirt.limits import DEFAULT_CHUNK_BYTES, MAX_VOLUME_BYTES, MIN_CHUNK_BYTES
from blockvirt.meta.keys import POOL_KEY, Table, number_key, pair_key
from blockvirt.meta.records import BranchRecord, DeviceRecord, FileRecord, PoolRecord, VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.units import GIB, TIB
from blockvirt.volumes import transactions
from blockvirt.volumes.allowance import allowance
from blockvirt.volumes.ports import PoolStatus
from blockvirt.volumes.requests import NewVolume, VolumeChange, round_size
from tests.control.conftest import Control
from tests.control.ports import CHUNK_BYTES


async def test_a_size_is_enough(control: Control) -> None:
    made = await control.catalogue.create(NewVolume(GIB))
    assert made.created
    assert made.volume.name.startswith("vol-")
    assert len(made.volume.name) == len("vol-") + 8
    assert (made.volume.size_bytes, made.volume.mapped_bytes, made.volume.state) == (GIB, 0, "available")
    assert control.catalogue.get(made.volume.id) == control.catalogue.get(made.volume.name) == made.volume
    assert control.catalogue.get(made.volume.id.replace("-", "")) == made.volume


async def test_branch_and_epoch_come_from_the_pool(control: Control) -> None:
    ids = [(await control.catalogue.create(NewVolume(GIB))).volume.id for _ in range(3)]
    sequences = set()
    with control.store.read() as reader:
        pool = reader.record(PoolRecord, Table.POOL, POOL_KEY)
        assert pool is not None
        assert (pool.next_branch, pool.epoch) == (4, 3)
        for number, volume_id in enumerate(ids, 1):
            record = reader.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
            assert record is not None
            assert record.branch == number
            branch = reader.record(BranchRecord, Table.BRANCHES, number_key(number))
            assert branch is not None
            expected = BranchRecord(number=number, volume_id=volume_id, head_epoch=number, first_epoch=number)
            assert replace(branch, covered_sequence=0) == expected
            sequences.add(branch.covered_sequence)
    assert len(sequences) == 3
    assert max(sequences) > 2**40  # nobody guesses it


@pytest.mark.parametrize(("asked", "given"), [(1, 512), (512, 512), (513, 1024), (GIB + 1, GIB + 512)])
async def test_sizes_are_rounded_up_to_sectors(control: Control, asked: int, given: int) -> None:
    assert (await control.catalogue.create(NewVolume(asked))).volume.size_bytes == given


@pytest.mark.parametrize("size", [0, -1, MAX_VOLUME_BYTES + 1, 1 << 64])
async def test_sizes_no_volume_can_have(control: Control, size: int) -> None:
    with pytest.raises(InvalidSize) as caught:
        await control.catalogue.create(NewVolume(size))
    assert caught.value.correction
    assert control.catalogue.count() == 0


def test_the_largest_volume_has_as_many_chunks_as_their_numbers() -> None:
    assert round_size(MAX_VOLUME_BYTES, DEFAULT_CHUNK_BYTES) == MAX_VOLUME_BYTES == DEFAULT_CHUNK_BYTES << 32
    assert round_size(MIN_CHUNK_BYTES << 32, MIN_CHUNK_BYTES) == 16 * TIB
    with pytest.raises(InvalidSize) as caught:
        round_size((MIN_CHUNK_BYTES << 32) + 1, MIN_CHUNK_BYTES)
    assert caught.value.details["would_fit_bytes"] == 16 * TIB
    roomy = PoolStatus("p", MIN_CHUNK_BYTES, 1 << 60, 0, 0, 1 << 60, "ok", 2.0, 0.8, 0.9)
    assert allowance(roomy, 0).largest_bytes == 16 * TIB


@pytest.mark.parametrize("name", ["", "A", "-a", "a/b", "a\0b", "a" * 64, "ä", "9d9c0b2c-73a5-4f5d-9d0c-3f2b7d0e4a11"])
async def test_names_no_volume_can_have(control: Control, name: str) -> None:
    with pytest.raises(InvalidName):
        await control.catalogue.create(NewVolume(GIB, name=name))
    made = (await control.catalogue.create(NewVolume(GIB, name="a"))).volume
    with pytest.raises(InvalidName):
        await control.catalogue.change(made.id, VolumeChange(name=name))


async def test_the_same_request_again_returns_the_same_volume(control: Control) -> None:
    wanted = NewVolume(GIB, name="v", labels={"team": "web"})
    first = await control.catalogue.create(wanted)
    again = await control.catalogue.create(wanted)
    assert (first.created, again.created) == (True, False)
    assert first.volume == again.volume
    assert control.catalogue.promised_bytes == GIB
    for other in (NewVolume(2 * GIB, "v", {"team": "web"}), NewVolume(GIB, "v")):
        with pytest.raises(Exists) as caught:
            await control.catalogue.create(other)
        assert "differs in" in caught.value.message


async def test_many_at_once_under_one_name_make_one_volume(control: Control) -> None:
    made = await asyncio.gather(*(control.catalogue.create(NewVolume(GIB, name="v")) for _ in range(20)))
    assert sum(each.created for each in made) == 1
    assert len({each.volume.id for each in made}) == 1
    assert control.catalogue.promised_bytes == GIB
    assert control.reload().promised_bytes == GIB


async def test_more_requests_wait_than_lmdb_has_readers(control: Control) -> None:
    """A request that read and now waits for its commit holds no reader's slot: there are 126 of them."""
    made = await asyncio.gather(*(control.catalogue.create(NewVolume(512, placement_labels={})) for _ in range(300)))
    assert len({each.volume.id for each in made}) == 300


async def test_two_cannot_both_get_the_last_bytes(control: Control) -> None:
    control.space.capacity_bytes = GIB  # x 10 may be promised
    made = await asyncio.gather(
        *(control.catalogue.create(NewVolume(4 * GIB)) for _ in range(5)), return_exceptions=True
    )
    assert sum(not isinstance(each, BaseException) for each in made) == 2
    refused = [each for each in made if isinstance(each, OvercommitLimit)]
    assert len(refused) == 3
    assert refused[0].details["would_fit_bytes"] == 2 * GIB
    assert control.catalogue.promised_bytes == 8 * GIB
    assert control.catalogue.allowance().largest_bytes == 2 * GIB
    await control.catalogue.create(NewVolume(2 * GIB))
    assert control.catalogue.allowance().largest_bytes == 0


@pytest.mark.parametrize("level", ["brake", "stop"])
async def test_a_full_pool_promises_nothing_new(control: Control, level: str) -> None:
    made = (await control.catalogue.create(NewVolume(GIB, name="v"))).volume
    control.space.level = level
    with pytest.raises(PoolFull):
        await control.catalogue.create(NewVolume(512))
    with pytest.raises(PoolFull):
        await control.catalogue.change("v", VolumeChange(size_bytes=2 * GIB))
    assert (await control.catalogue.change("v", VolumeChange(labels={"a": "b"}))).labels == {"a": "b"}
    assert (await control.catalogue.delete(made.id)).deleted
    assert control.catalogue.promised_bytes == 0


async def test_rename_relabel_and_grow_in_one_step(control: Control) -> None:
    made = (await control.catalogue.create(NewVolume(GIB, name="old"))).volume
    changed = await control.catalogue.change("old", VolumeChange(name="new", size_bytes=2 * GIB, labels={"k": "v"}))
    assert (changed.id, changed.name, changed.size_bytes, changed.labels) == (made.id, "new", 2 * GIB, {"k": "v"})
    assert changed.revision == made.revision + 1
    assert control.open_volumes.sizes == {made.id: 2 * GIB}
    assert control.catalogue.promised_bytes == control.reload().promised_bytes == 2 * GIB
    with pytest.raises(NotFound):
        control.catalogue.get("old")
    assert (await control.catalogue.change("new", VolumeChange(name="new"))).revision == changed.revision
    with pytest.raises(InvalidSize):
        await control.catalogue.change("new", VolumeChange(size_bytes=GIB))
    await control.catalogue.create(NewVolume(GIB, name="old"))
    with pytest.raises(Exists):
        await control.catalogue.change("new", VolumeChange(name="old"))
    assert control.catalogue.promised_bytes == control.reload().promised_bytes == 3 * GIB


async def test_many_growths_at_once_end_at_the_largest(control: Control) -> None:
    made = (await control.catalogue.create(NewVolume(GIB, name="v"))).volume
    sizes = [GIB * factor for factor in range(2, 7)]
    outcomes = await asyncio.gather(
        *(control.catalogue.change("v", VolumeChange(size_bytes=size)) for size in sizes), return_exceptions=True
    )
    assert all(not isinstance(each, BaseException) or isinstance(each, InvalidSize | InUse) for each in outcomes)
    size = control.catalogue.get("v").size_bytes
    assert control.catalogue.promised_bytes == size
    assert control.open_volumes.sizes[made.id] == size


async def test_a_change_meant_for_another_revision_is_refused(control: Control) -> None:
    made = (await control.catalogue.create(NewVolume(GIB, name="v"))).volume
    changed = await control.catalogue.change("v", VolumeChange(labels={"a": "1"}), expected_revision=made.revision)
    with pytest.raises(PreconditionFailed):
        await control.catalogue.change("v", VolumeChange(labels={"a": "2"}), expected_revision=made.revision)
    with pytest.raises(PreconditionFailed):
        await control.catalogue.delete("v", expected_revision=made.revision)
    assert control.catalogue.get("v") == changed


async def test_delete_frees_name_and_promise_and_flags_the_record(control: Control) -> None:
    made = (await control.catalogue.create(NewVolume(GIB, name="v"))).volume
    dry = await control.catalogue.delete("v", dry_run=True)
    assert not dry.deleted
    assert control.catalogue.get("v") == made
    assert control.open_volumes.woken == 0
    gone = await control.catalogue.delete("v")
    assert gone.deleted
    assert control.open_volumes.discarded == [made.id]
    assert control.open_volumes.woken == 1
    for key in ("v", made.id):
        with pytest.raises(NotFound):
            control.catalogue.get(key)
        with pytest.raises(NotFound):
            await control.catalogue.delete(key)
    with control.store.read() as reader:
        record = reader.record(VolumeRecord, Table.VOLUMES, made.id.encode())
    assert record is not None
    assert record.deleting
    assert control.catalogue.promised_bytes == control.reload().promised_bytes == 0
    assert (await control.catalogue.create(NewVolume(GIB, name="v"))).created


async def test_delete_is_refused_while_somebody_uses_it(control: Control) -> None:
    volume_id = (await control.catalogue.create(NewVolume(GIB, name="v"))).volume.id
    await control.presentation.create_host("web1", {})
    await control.presentation.map("web1", volume_id)
    control.sessions.add("web1/lun0", volume_id)
    assert control.catalogue.get("v").state == "in-use"
    with pytest.raises(InUse, match="web1/lun0"):
        await control.catalogue.delete("v")
    assert len((await control.catalogue.delete("v", dry_run=True)).obstacles) == 2
    await control.catalogue.delete("v", force=True)
    assert control.sessions.dropped == ["s0"]
    assert control.presentation.host("web1").units == ()
    assert control.presentation.exports() == ()


async def test_what_came_in_between_is_seen_by_the_transaction(control: Control) -> None:
    """A delete that was decided before a mapping or a change was committed does not go over it."""
    first, second = [(await control.catalogue.create(NewVolume(GIB, name=name))).volume for name in ("a", "b")]
    await control.presentation.create_host("web1", {})
    outcomes = await asyncio.gather(
        control.presentation.map("web1", first.id), control.catalogue.delete("a"), return_exceptions=True
    )
    assert isinstance(outcomes[1], InUse), outcomes
    assert control.catalogue.get("a").units == ("web1/lun0",)
    changes = await asyncio.gather(
        control.catalogue.change("b", VolumeChange(labels={"a": "b"})),
        control.catalogue.delete("b", expected_revision=second.revision),
        return_exceptions=True,
    )
    assert isinstance(changes[1], PreconditionFailed), changes
    assert control.catalogue.get("b").labels == {"a": "b"}
    assert control.catalogue.promised_bytes == 2 * GIB


async def test_pages_are_stable_while_volumes_come_and_go(control: Control) -> None:
    names = [f"v{number:03}" for number in range(120)]
    for name in names:
        await control.catalogue.create(NewVolume(512, name=name, labels={"even": str(int(name[1:]) % 2 == 0)}))
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = await control.catalogue.list(after=after, limit=7)
        assert len(page.volumes) <= 7
        seen += [volume.name for volume in page.volumes]
        after = page.next_after
        for gone in (seen[-1], f"v{int(seen[0][1:])}x"):
            if gone in names:
                await control.catalogue.delete(gone)
    assert seen == names
    assert control.catalogue.names(5) == tuple(name for name in names if name in control.catalogue.names(1000))[:5]
    even = await control.catalogue.list(labels={"even": "True"}, limit=1000)
    assert even.next_after is None
    assert all(int(volume.name[1:]) % 2 == 0 for volume in even.volumes)


async def test_where_the_data_lies(control: Control) -> None:
    volume = (await control.catalogue.create(NewVolume(GIB, name="v"))).volume
    device = DeviceRecord("d" * 8, "fast", "/fast", 1.0)
    files = [FileRecord(1, 1, device.id, 20, 16), FileRecord(2, 1, device.id, 8, 8), FileRecord(3, 2, device.id, 9, 9)]

    def write(writer: Writer) -> None:
        writer.put_record(Table.DEVICES, device.id.encode(), device)
        for file in files:
            writer.put_record(Table.FILES, number_key(file.number), file)
            writer.put(Table.BRANCH_FILES, pair_key(file.branch, file.number), b"")
        writer.put_record(Table.BRANCHES, number_key(1), BranchRecord(1, volume.id, 1, mapped_chunks=24))

    await control.store.commit(write)
    (share,) = control.catalogue.shares(volume.id)
    assert (share.device, share.files, share.live_bytes) == ("fast", 2, 24 * CHUNK_BYTES)
    assert control.catalogue.get("v").mapped_bytes == 24 * CHUNK_BYTES
    control.open_volumes.live_chunks[volume.id] = 1 << 40
    assert control.catalogue.get("v").mapped_bytes == GIB, "a volume cannot have mapped more than it is large"


async def test_placement_must_be_possible(control: Control) -> None:
    device = DeviceRecord("d" * 8, "fast", "/fast", 1.0, labels={"media": "nvme"})
    await control.store.commit(lambda writer: writer.put_record(Table.DEVICES, device.id.encode(), device))
    placed = NewVolume(GIB, name="v", placement_devices=("fast",), placement_labels={"media": "nvme"})
    volume = (await control.catalogue.create(placed)).volume
    assert (volume.placement_devices, volume.placement_labels) == (("fast",), {"media": "nvme"})
    assert not (await control.catalogue.create(placed)).created
    with pytest.raises(NotFound, match="slow"):
        await control.catalogue.create(NewVolume(GIB, placement_devices=("slow",)))
    with pytest.raises(InvalidRequest, match="media"):
        await control.catalogue.create(NewVolume(GIB, placement_labels={"media": "tape"}))


async def test_labels_are_bounded(control: Control) -> None:
    with pytest.raises(LimitReached):
        await control.catalogue.create(NewVolume(GIB, labels={f"k{number}": "" for number in range(65)}))
    for labels in ({"": "v"}, {"k": "v" * 257}, {"k" * 257: ""}):
        with pytest.raises(InvalidRequest):
            await control.catalogue.create(NewVolume(GIB, labels=labels))


async def test_the_number_of_volumes_is_bounded(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "MAX_VOLUMES", 2)
    for _ in range(2):
        await control.catalogue.create(NewVolume(GIB))
    with pytest.raises(LimitReached):
        await control.catalogue.create(NewVolume(GIB))
    assert control.catalogue.promised_bytes == 2 * GIB


@pytest.mark.parametrize("table", [Table.VOLUMES, Table.BRANCHES])
async def test_a_damaged_record_quarantines_one_volume(control: Control, table: Table) -> None:
    for name in ("a", "b", "c"):
        await control.catalogue.create(NewVolume(GIB, name=name))
    key = control.catalogue.get("b").id.encode() if table is Table.VOLUMES else number_key(2)

    def flip(writer: Writer) -> None:
        stored = writer.get(table, key)
        assert stored is not None
        writer.put(table, key, stored[:20] + bytes([stored[20] ^ 1]) + stored[21:])

    await control.store.commit(flip)
    catalogue = control.reload()
    page = await catalogue.list()
    assert [(volume.name, volume.state) for volume in page.volumes] == [
        ("a", "available"),
        ("b", "damaged"),
        ("c", "available"),
    ]
    assert catalogue.get("b").damage
    with pytest.raises(Exists, match="damaged"):
        await catalogue.create(NewVolume(GIB, name="b"))
    if table is Table.VOLUMES:
        for attempt in (catalogue.delete("b"), catalogue.change("b", VolumeChange(name="x"))):
            with pytest.raises(DamagedRecord):
                await attempt
    assert (await catalogue.delete("a")).deleted
    assert (await catalogue.create(NewVolume(GIB, name="d"))).created


async def test_a_policy_that_is_durable(control: Control) -> None:
    control.space.capacity_bytes = TIB
    assert control.catalogue.allowance().largest_bytes == 10 * TIB
    await control.catalogue.set_policy(overcommit_ratio=2.0)
    assert control.catalogue.allowance().largest_bytes == 2 * TIB
    await control.catalogue.set_policy(near_ratio=0.5, brake_ratio=0.6)
    status = control.space.status()
    assert (status.overcommit_ratio, status.near_ratio, status.brake_ratio) == (2.0, 0.5, 0.6)
    control.space.capacity_bytes = 1000 * TIB
    assert (control.catalogue.allowance().largest_bytes, control.catalogue.allowance().limited_by) == (
        MAX_VOLUME_BYTES,
        "volume-maximum",
    )
