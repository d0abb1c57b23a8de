"""Hosts and units in the metadata store: lookups, and the transactions that change them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockvirt.errors import BeingDeleted, DamagedRecord, Exists, InUse, InvalidRequest, LimitReached, NotFound
from blockvirt.ids import is_id
from blockvirt.limits import MAX_HOSTS, MAX_UNITS_PER_HOST
from blockvirt.meta.keys import Table, unit_key, volume_unit_key
from blockvirt.meta.records import HostRecord, UnitRecord, VolumeRecord
from blockvirt.meta.store import Reader, Writer

_EXPORT = re.compile(r"([^/]{1,80})/lun(0|[1-9][0-9]{0,7})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Unit:
    """A logical unit as users see it."""

    id: str
    host_id: str
    host: str
    number: int
    volume_id: str
    volume: str
    """The volume's name; empty where its record is damaged."""
    size_bytes: int
    created_s: float
    state: str
    """'active' or 'deleting'."""

    @property
    def export(self) -> str:
        """The export name that a client opens."""
        return f"{self.host}/lun{self.number}"


def split_export(export: str) -> tuple[str, int]:
    """Return (host, number) of an export name 'HOST/lunN'; raises NotFound for anything else."""
    match = _EXPORT.fullmatch(export)
    if match is None:
        raise NotFound(f"{export[:80]!r} names no logical unit", correction="units are named HOST/lunN: 'web1/lun0'")
    return match[1], int(match[2])


def find_host(reader: Reader, name_or_id: str) -> HostRecord:
    """Return a host's record by name or id; raises NotFound, DamagedRecord."""
    host_id: bytes | None = name_or_id.encode(errors="replace")
    if not is_id(name_or_id):
        host_id = reader.get(Table.HOST_NAMES, name_or_id.encode(errors="replace")) if name_or_id else None
    record = reader.record(HostRecord, Table.HOSTS, host_id) if host_id is not None else None
    if record is None:
        raise NotFound(
            f"there is no host {name_or_id[:80]!r}",
            correction="'blockvirt host list' shows what there is; 'blockvirt host create NAME' makes one",
        )
    return record


def unit_view(reader: Reader, host_name: str, record: UnitRecord) -> Unit:
    """Return a unit as users see it."""
    try:
        volume = reader.record(VolumeRecord, Table.VOLUMES, record.volume_id.encode())
    except DamagedRecord:
        volume = None
    return Unit(
        id=record.id,
        host_id=record.host_id,
        host=host_name,
        number=record.number,
        volume_id=record.volume_id,
        volume=volume.name if volume else "",
        size_bytes=volume.size_bytes if volume else 0,
        created_s=record.created_s,
        state="deleting" if record.deleting else "active",
    )


def host_units(reader: Reader, host: HostRecord) -> tuple[Unit, ...]:
    """Return the units of a host in the order of their numbers."""
    units = []
    for key, _ in reader.scan(Table.UNITS, prefix=f"{host.id}/".encode()):
        record = reader.record(UnitRecord, Table.UNITS, key)
        if record is not None:
            units.append(unit_view(reader, host.name, record))
    return tuple(units)


def insert_host(writer: Writer, wanted: HostRecord) -> HostRecord:
    """Store a new host and return it, or return the one that has its name; raises LimitReached, BeingDeleted."""
    if (host_id := writer.get(Table.HOST_NAMES, wanted.name.encode())) is not None:
        existing = writer.record(HostRecord, Table.HOSTS, host_id)
        if existing is None or existing.deleting:
            raise BeingDeleted(f"host {wanted.name!r} is being deleted", correction="try again in a moment")
        return existing
    if writer.count(Table.HOSTS) >= MAX_HOSTS:
        raise LimitReached(f"there are {MAX_HOSTS} hosts, which is the most", correction="delete hosts nobody needs")
    writer.put_record(Table.HOSTS, wanted.id.encode(), wanted)
    writer.put(Table.HOST_NAMES, wanted.name.encode(), wanted.id.encode())
    return wanted


def flag_host(writer: Writer, host_id: str, *, with_units: bool) -> None:
    """Flag a host and its units for deletion; raises InUse where it has units and they may not go."""
    record = find_host(writer, host_id)
    keys = [key for key, _ in writer.scan(Table.UNITS, prefix=f"{host_id}/".encode())]
    if keys and not with_units:
        raise InUse(
            f"host {record.name!r} still has {len(keys)} logical unit{'s' if len(keys) > 1 else ''}",
            cause="deleting it would take volumes away from a running guest",
            correction=f"unmap them ('blockvirt lun list {record.name}' shows them), or use force",
            units=len(keys),
        )
    flag_units(writer, keys)
    writer.put_record(Table.HOSTS, host_id.encode(), replace(record, deleting=True, revision=record.revision + 1))


def remove_host(writer: Writer, host_id: str) -> None:
    """Remove a flagged host with its units. Nothing to do where it is gone."""
    record = writer.record(HostRecord, Table.HOSTS, host_id.encode())
    if record is None:
        return
    assert record.deleting, "only a flagged host may be removed"
    remove_units(writer, [key for key, _ in writer.scan(Table.UNITS, prefix=f"{host_id}/".encode())])
    writer.delete(Table.HOST_NAMES, record.name.encode())
    writer.delete(Table.HOSTS, host_id.encode())


def add_unit(
    writer: Writer, host_id: str, volume_id: str, number: int | None, *, unit_id: str, created_s: float
) -> UnitRecord:
    """Store a mapping and return it; the same one again returns what is there. Raises as ``Presentation.map`` does."""
    host = find_host(writer, host_id)
    if host.deleting:
        raise BeingDeleted(f"host {host.name!r} is being deleted", correction="map the volume to another host")
    volume = writer.record(VolumeRecord, Table.VOLUMES, volume_id.encode())
    if volume is None or volume.deleting or volume.trashed_s:
        raise NotFound(f"there is no volume {volume_id!r} any more", correction="map another volume")
    if volume.importing:  # if the stream breaks off the volume goes, and the mapping would go with it unheard
        raise InUse(f"a snapshot stream is being imported into volume {volume.name!r}", correction="wait for its end")
    mapped = [key for key, _ in writer.scan(Table.VOLUME_UNITS, prefix=f"{volume_id}/{host_id}/".encode())]
    if mapped:
        return _existing_unit(writer, host, volume, int(mapped[0].decode().rsplit("/", 1)[1]), number)
    if number is None:
        number = _next_number(writer, host)
    elif not 0 <= number < MAX_UNITS_PER_HOST:
        raise InvalidRequest(
            f"{number} cannot be the number of a logical unit",
            correction=f"use 0 to {MAX_UNITS_PER_HOST - 1}, or leave it out for the next free one",
        )
    elif (stored := writer.record(UnitRecord, Table.UNITS, unit_key(host_id, number))) is not None:
        raise Exists(
            f"{host.name}/lun{number} is in use for another volume",
            cause=f"it shows volume {stored.volume_id}",
            correction="choose another number, or leave it out for the next free one",
            volume_id=stored.volume_id,
        )
    record = UnitRecord(unit_id, host_id, number, volume_id, created_s)
    writer.put_record(Table.UNITS, unit_key(host_id, number), record)
    writer.put(Table.VOLUME_UNITS, volume_unit_key(volume_id, host_id, number), b"")
    return record


def _existing_unit(
    writer: Writer, host: HostRecord, volume: VolumeRecord, mapped_number: int, wanted_number: int | None
) -> UnitRecord:
    record = writer.record(UnitRecord, Table.UNITS, unit_key(host.id, mapped_number))
    if record is not None and not record.deleting and wanted_number == mapped_number:
        return record
    raise Exists(
        f"volume {volume.name!r} is mapped to host {host.name!r} already, as {host.name}/lun{mapped_number}",
        cause="two units of one host on one volume would each think they own it",
        correction="use that unit, or unmap it first",
        number=mapped_number,
    )


def _next_number(writer: Writer, host: HostRecord) -> int:
    number = 0
    for key, _ in writer.scan(Table.UNITS, prefix=f"{host.id}/".encode()):
        if int(key.decode().rsplit("/", 1)[1]) != number:
            break
        number += 1
    if number >= MAX_UNITS_PER_HOST:
        raise LimitReached(
            f"host {host.name!r} has {MAX_UNITS_PER_HOST} logical units, which is the most a host may have",
            correction="unmap some, or use a second host",
        )
    return number


def flag_units(writer: Writer, keys: Sequence[bytes]) -> None:
    """Flag units so that they open no session any more; those that are gone are passed over."""
    for key in keys:
        record = writer.record(UnitRecord, Table.UNITS, key)
        if record is not None:
            writer.put_record(Table.UNITS, key, replace(record, deleting=True))


def remove_units(writer: Writer, keys: Sequence[bytes]) -> None:
    """Remove flagged units; one that is gone, or mapped anew meanwhile, is passed over."""
    for key in keys:
        record = writer.record(UnitRecord, Table.UNITS, key)
        if record is not None and record.deleting:
            writer.delete(Table.UNITS, key)
            writer.delete(Table.VOLUME_UNITS, volume_unit_key(record.volume_id, record.host_id, record.number))
