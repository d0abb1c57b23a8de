"""Hosts and logical units over a real store, and a random history against a dictionary."""

import asyncio
import json
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockvirt.errors import BeingDeleted, BlockvirtError, Exists, InUse, InvalidName, InvalidRequest, NotFound
from blockvirt.limits import MAX_UNITS_PER_HOST
from blockvirt.lun.attach import attach_info, nbd_uris
from blockvirt.lun.presentation import Presentation
from blockvirt.lun.units import flag_host, flag_units
from blockvirt.meta.keys import Table, unit_key
from blockvirt.meta.records import VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.units import GIB
from blockvirt.volumes.requests import NewVolume
from tests.control.conftest import Control
from tests.control.ports import Sessions, new_store


async def volumes(control: Control, count: int) -> list[str]:
    return [(await control.catalogue.create(NewVolume(512))).volume.id for _ in range(count)]


async def test_the_next_free_number_fills_gaps(control: Control) -> None:
    ids = await volumes(control, 5)
    host, created = await control.presentation.create_host("web1", {})
    assert created
    units = [(await control.presentation.map("web1", volume_id))[0] for volume_id in ids[:3]]
    assert [unit.export for unit in units] == ["web1/lun0", "web1/lun1", "web1/lun2"]
    await control.presentation.unmap("web1", 1)
    assert (await control.presentation.map(host.id, ids[3]))[0].number == 1
    assert (await control.presentation.map("web1", ids[4], 7))[0].number == 7
    assert [unit.number for unit in control.presentation.host("web1").units] == [0, 1, 2, 7]
    assert control.catalogue.get(ids[4]).units == ("web1/lun7",)


async def test_what_a_mapping_may_not_do(control: Control) -> None:
    first, second = await volumes(control, 2)
    presentation = control.presentation
    await presentation.create_host("web1", {})
    unit, created = await presentation.map("web1", first, 3)
    assert created
    with pytest.raises(Exists, match="in use"):
        await presentation.map("web1", second, 3)
    for number in (None, 4):
        with pytest.raises(Exists, match="mapped to host"):
            await presentation.map("web1", first, number)
    assert await presentation.map("web1", first, 3) == (unit, False), "the same mapping again is the mapping"
    for bad in (-1, MAX_UNITS_PER_HOST):
        with pytest.raises(InvalidRequest):
            await presentation.map("web1", second, bad)
    with pytest.raises(NotFound):
        await presentation.map("web2", second)
    await control.catalogue.delete(second)
    with pytest.raises(NotFound):
        await presentation.map("web1", second)


async def test_hosts_are_idempotent_by_name(control: Control) -> None:
    first, created = await control.presentation.create_host("web1", {"a": "b"})
    again, created_again = await control.presentation.create_host("web1", {"a": "b"})
    assert (created, created_again, first) == (True, False, again)
    with pytest.raises(Exists):
        await control.presentation.create_host("web1", {})
    with pytest.raises(InvalidName):
        await control.presentation.create_host("Web", {})


async def test_a_unit_in_use_is_not_pulled_away(control: Control) -> None:
    (volume_id,) = await volumes(control, 1)
    await control.presentation.create_host("web1", {})
    await control.presentation.map("web1", volume_id)
    control.sessions.add("web1/lun0", volume_id)
    other = control.sessions.add("elsewhere", volume_id)
    with pytest.raises(InUse):
        await control.presentation.unmap("web1", 0)
    with pytest.raises(InUse):
        await control.presentation.delete_host("web1")
    await control.presentation.unmap("web1", 0, force=True)
    assert control.sessions.open == [other], "only the sessions of the unit are dropped"
    await control.presentation.delete_host("web1")
    with pytest.raises(NotFound):
        control.presentation.host("web1")


async def test_force_deletes_a_host_with_its_units(control: Control) -> None:
    ids = await volumes(control, 2)
    await control.presentation.create_host("web1", {})
    for volume_id in ids:
        await control.presentation.map("web1", volume_id)
    control.sessions.add("web1/lun1", ids[1])
    await control.presentation.delete_host("web1", force=True)
    assert control.sessions.open == []
    with control.store.read() as reader:
        for table in (Table.HOSTS, Table.HOST_NAMES, Table.UNITS, Table.VOLUME_UNITS):
            assert reader.count(table) == 0


async def test_what_is_being_deleted_takes_nothing_new(control: Control) -> None:
    first, second = await volumes(control, 2)
    host, _ = await control.presentation.create_host("web1", {})
    await control.presentation.map("web1", first)
    await control.presentation.create_host("web2", {})
    await control.presentation.map("web2", first)
    web2 = control.presentation.host("web2").id
    await control.store.commit(lambda writer: flag_host(writer, host.id, with_units=True))
    await control.store.commit(lambda writer: flag_units(writer, [unit_key(web2, 0)]))
    with pytest.raises(BeingDeleted):
        await control.presentation.map("web1", second)
    with pytest.raises(BeingDeleted):
        await control.presentation.create_host("web1", {})
    for export in ("web1/lun0", "web2/lun0"):
        with pytest.raises(BeingDeleted):
            control.presentation.resolve(export)
    # A restart finishes what was interrupted.
    assert await Presentation(control.store, control.sessions).finish_deletions() == 3
    assert [host.name for host in (await control.presentation.hosts()).hosts] == ["web2"]
    assert control.presentation.host("web2").units == ()
    assert control.catalogue.get(first).units == ()


async def test_exports_resolve_to_volumes(control: Control) -> None:
    (volume_id,) = await volumes(control, 1)
    await control.presentation.create_host("web1", {})
    await control.presentation.map("web1", volume_id, 12)
    assert control.presentation.exports() == ("web1/lun12",)
    assert control.presentation.resolve("web1/lun12") == volume_id
    host_id = control.presentation.host("web1").id
    assert control.presentation.unit(f"{host_id}/lun12").export == "web1/lun12"
    with pytest.raises(NotFound):
        control.presentation.resolve(f"{host_id}/lun12")
    for bad in (
        "web1",
        "web1/lun",
        "web1/lun012",
        "web1/lun13",
        "web2/lun12",
        "/lun12",
        "web1/lun12/",
        "\0/lun1",
        "é/lun1",
    ):
        with pytest.raises(NotFound):
            control.presentation.resolve(bad)


async def test_hosts_come_in_pages(control: Control) -> None:
    names = [f"h{number:03}" for number in range(230)]
    await asyncio.gather(*(control.presentation.create_host(name, {}) for name in names))
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = await control.presentation.hosts(after=after, limit=103)
        assert len(page.hosts) <= 103
        seen += [host.name for host in page.hosts]
        after = page.next_after
    assert seen == names


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("map"), st.integers(0, 2), st.integers(0, 3), st.none() | st.integers(0, 3)),
        st.tuples(st.just("unmap"), st.integers(0, 2), st.integers(0, 3)),
        st.tuples(st.just("delete"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("create"), st.integers(0, 2)),
    ),
    max_size=25,
)


def apply(model: dict[str, dict[int, str]], step: tuple[object, ...], ids: list[str]) -> bool:
    """Do a step to the model: host -> number -> volume; False where it must be refused."""
    name = f"h{step[1]}"
    if step[0] == "create":
        model.setdefault(name, {})
        return True
    units = model.get(name)
    if units is None:
        return False
    if step[0] == "delete":
        if units and not step[2]:
            return False
        del model[name]
        return True
    if step[0] == "unmap":
        return units.pop(step[2], None) is not None  # type: ignore[call-overload]
    volume_id, number = ids[step[2]], step[3]  # type: ignore[call-overload]
    if volume_id in units.values():
        return number is not None and units.get(number) == volume_id  # type: ignore[call-overload]
    if number is None:
        number = next(free for free in range(99) if free not in units)
    if number in units:
        return False
    units[number] = volume_id  # type: ignore[index]
    return True


async def replay(presentation: Presentation, step: tuple[object, ...], ids: list[str]) -> bool:
    name = f"h{step[1]}"
    try:
        if step[0] == "create":
            await presentation.create_host(name, {})
        elif step[0] == "delete":
            await presentation.delete_host(name, force=bool(step[2]))
        elif step[0] == "unmap":
            await presentation.unmap(name, step[2])  # type: ignore[arg-type]
        else:
            await presentation.map(name, ids[step[2]], step[3])  # type: ignore[call-overload, arg-type]
    except BlockvirtError:
        return False
    return True


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_random_histories_match_a_dictionary(steps: list[tuple[object, ...]]) -> None:
    async def history() -> None:
        with tempfile.TemporaryDirectory() as directory:
            store = new_store(Path(directory))
            ids = [f"volume-{number}" for number in range(4)]
            for number, volume_id in enumerate(ids):
                record = VolumeRecord(volume_id, f"v{number}", 512, number, 1.0)
                store.commit_now(lambda writer, r=record: writer.put_record(Table.VOLUMES, r.id.encode(), r))  # type: ignore[misc]
            presentation = Presentation(store, Sessions())
            model: dict[str, dict[int, str]] = {}
            for step in steps:
                assert await replay(presentation, step, ids) == apply(model, step, ids), step
                found = {
                    host.name: {unit.number: unit.volume_id for unit in host.units}
                    for host in (await presentation.hosts()).hosts
                }
                assert found == model
                with store.read() as reader:
                    assert reader.count(Table.VOLUME_UNITS) == sum(len(units) for units in model.values())
            store.close()

    asyncio.run(history())


# --- how to attach ---------------------------------------------------------------------------------------------------


def test_uris_are_escaped() -> None:
    assert nbd_uris("web1/lun0", "/a b/?&.sock", "::1", 10809) == (
        "nbd+unix:///web1/lun0?socket=/a%20b/%3F%26.sock",
        "nbd://[::1]:10809/web1/lun0",
    )
    assert len(nbd_uris("v", "/s", None, 0)) == 1


def test_attach_lines_parse() -> None:
    info = attach_info("web1/lun0", "9d9c0b2c-73a5-4f5d-9d0c-3f2b7d0e4a11", "/run/x & 'y'/nbd.sock", "127.0.0.1", 10809)
    blockdev = json.loads(info.qemu_blockdev)
    assert blockdev["export"] == "web1/lun0"
    assert blockdev["server"] == {"type": "unix", "path": "/run/x & 'y'/nbd.sock"}
    assert blockdev["reconnect-delay"] >= 10
    assert f"drive={blockdev['node-name']}," in info.qemu_device
    disk = ElementTree.fromstring(info.libvirt_xml)
    source = disk.find("source")
    assert source is not None
    assert source.get("name") == "web1/lun0"
    host = source.find("host")
    assert host is not None
    assert host.get("socket") == "/run/x & 'y'/nbd.sock"
    assert info.nbdcopy_in.startswith("nbdcopy disk.img ")


@pytest.mark.requires("qemu-system-x86_64")
def test_qemu_takes_the_line(tmp_path: Path) -> None:
    """QEMU parses the options before it fails to connect: an option it did not know would be said instead."""
    info = attach_info("v", "9d9c0b2c-73a5-4f5d-9d0c-3f2b7d0e4a11", str(tmp_path / "none.sock"), None, 0)
    done = subprocess.run(
        f"{shutil.which('qemu-system-x86_64')} -machine q35 -display none -nodefaults {info.qemu}",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "No such file or directory" in done.stderr
    assert "Invalid parameter" not in done.stderr


@pytest.mark.parametrize(
    ("change", "refusal"),
    [({"importing": "new"}, "a snapshot stream is being imported"), ({"trashed_s": 1.0}, "there is no volume")],
)
async def test_what_nobody_may_use_is_not_mapped(control: Control, change: dict[str, Any], refusal: str) -> None:
    host, _ = await control.presentation.create_host("web1", {})
    made = (await control.catalogue.create(NewVolume(GIB, name="v"))).volume

    def mark(writer: Writer) -> None:
        record = writer.record(VolumeRecord, Table.VOLUMES, made.id.encode())
        assert record is not None
        writer.put_record(Table.VOLUMES, made.id.encode(), replace(record, **change))

    control.store.commit_now(mark)
    with pytest.raises(BlockvirtError, match=refusal):
        await control.presentation.map(host.id, made.id)
