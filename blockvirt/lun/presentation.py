"""Presentation: hosts, and the logical units they see volumes as.

A unit is (host, number) -> volume, exported as ``HOST/lunN``. Every change is one metadata transaction. Taking units
or hosts away goes flag, drop sessions, remove: what carries the flag opens no session and takes no new mapping, so
nothing slips in between, and ``finish_deletions`` at the start completes what a crash interrupted.
"""

import logging
import time
from asyncio import sleep
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from blockvirt.errors import BeingDeleted, DamagedRecord, Exists, InUse, NotFound
from blockvirt.ids import check_name, new_id
from blockvirt.lun.units import (
    Unit,
    add_unit,
    find_host,
    flag_host,
    flag_units,
    host_units,
    insert_host,
    remove_host,
    remove_units,
    split_export,
    unit_view,
)
from blockvirt.meta.keys import Table, unit_key
from blockvirt.meta.records import HostRecord, UnitRecord
from blockvirt.meta.store import Store, Writer

log = logging.getLogger("blockvirt.presentation")

READ_BATCH = 100  # records decoded before others run: about a millisecond


class UnitSession(Protocol):
    """What presentation needs to know of a session."""

    @property
    def id(self) -> str:
        """The session's id."""

    @property
    def export(self) -> str:
        """The export name that the client opened."""


class UnitSessions(Protocol):
    """The sessions there are, to see whether a unit is in use and to end them."""

    def sessions(self) -> Sequence[UnitSession]:
        """Return the sessions that are past the handshake."""

    async def drop(self, session_id: str) -> bool:
        """Close a session's connection without a reply; False: it is gone already."""


@dataclass(frozen=True, slots=True)
class Host:
    """A consumer of logical units, as users see it."""

    id: str
    name: str
    created_s: float
    revision: int
    labels: dict[str, str]
    units: tuple[Unit, ...]
    state: str
    """'active' or 'deleting'."""


@dataclass(frozen=True, slots=True)
class HostPage:
    """Some hosts in the order of their names, and the name to go on after (None: that was all)."""

    hosts: tuple[Host, ...]
    next_after: str | None


class Presentation:
    """All hosts and logical units of the pool. One per process; call it on the event loop."""

    def __init__(self, store: Store, sessions: UnitSessions, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._sessions = sessions
        self._clock = clock

    # --- hosts -----------------------------------------------------------------------------------------------------

    async def create_host(self, name: str, labels: Mapping[str, str]) -> tuple[Host, bool]:
        """Create a host; True with it if it is new. Raises InvalidName, LimitReached, Exists (other labels)."""
        check_name(name, what="host")
        record = HostRecord(id=new_id(), name=name, created_s=self._clock(), labels=dict(labels))
        stored = await self._store.commit(lambda writer: insert_host(writer, record))
        if stored.id != record.id and stored.labels != record.labels:
            raise Exists(
                f"a host {name!r} exists already with other labels",
                correction="choose another name, or ask for the same labels",
                host_id=stored.id,
            )
        return self.host(name), stored.id == record.id

    def host(self, name_or_id: str) -> Host:
        """Return a host with its units; raises NotFound, DamagedRecord."""
        with self._store.read() as reader:
            record = find_host(reader, name_or_id)
            units = host_units(reader, record)
        state = "deleting" if record.deleting else "active"
        return Host(record.id, record.name, record.created_s, record.revision, dict(record.labels), units, state)

    async def hosts(self, *, after: str = "", limit: int = 100) -> HostPage:
        """Return up to ``limit`` hosts named behind ``after``, in the order of names; damaged ones are left out."""
        found: list[Host] = []
        while True:
            with self._store.read() as reader:
                names = reader.scan(Table.HOST_NAMES, start=after.encode() + b"\0" if after else b"")
                batch = [key.decode() for (key, _), _ in zip(names, range(READ_BATCH), strict=False)]
            for name in batch:
                if len(found) == limit:
                    return HostPage(tuple(found), after)
                after = name
                try:
                    found.append(self.host(name))
                except (DamagedRecord, NotFound) as error:
                    log.error("host %s is left out: %s", name, error.message)
            if len(batch) < READ_BATCH:
                return HostPage(tuple(found), None)
            await sleep(0)

    async def delete_host(self, name_or_id: str, *, force: bool = False) -> Host:
        """Delete a host; refused with InUse while it has units, unless forced: then their sessions are dropped."""
        host = self.host(name_or_id)
        await self._store.commit(lambda writer: flag_host(writer, host.id, with_units=force))
        for unit in host.units:
            await self._drop_sessions(unit.export)
        await self._store.commit(lambda writer: remove_host(writer, host.id))
        return host

    # --- units -----------------------------------------------------------------------------------------------------

    async def map(
        self,
        host_name_or_id: str,
        volume_id: str,
        number: int | None = None,
        *,
        also: Callable[[Writer, Unit], None] | None = None,
    ) -> tuple[Unit, bool]:
        """Show a volume to a host under ``number``, by default the next free one from 0; True with it if it is new.

        The same mapping again returns it. ``also`` runs in the transaction that makes a new one; what it raises undoes
        the mapping. Raises NotFound, BeingDeleted, Exists (the number is taken, or the host has the volume already and
        this number was not asked for), InvalidRequest and LimitReached.
        """
        host = self.host(host_name_or_id)
        unit_id, created_s = new_id(), self._clock()

        def change(writer: Writer) -> Unit:
            record = add_unit(writer, host.id, volume_id, number, unit_id=unit_id, created_s=created_s)
            unit = unit_view(writer, host.name, record)
            if also is not None and unit.id == unit_id:
                also(writer, unit)
            return unit

        unit = await self._store.commit(change)
        return unit, unit.id == unit_id

    async def unmap(self, host_name_or_id: str, number: int, *, force: bool = False) -> Unit:
        """Take a unit away from a host; refused with InUse while a session is open on it, unless forced."""
        unit = self.unit(f"{self.host(host_name_or_id).name}/lun{number}")
        sessions = self._sessions_on(unit.export)
        if sessions and not force:
            raise InUse(
                f"{unit.export} is in use by {len(sessions)} session{'s' if len(sessions) > 1 else ''}",
                cause="unmapping it would pull the volume from under its user",
                correction="detach it in the guest first, or use force",
                sessions=sessions,
            )
        keys = [unit_key(unit.host_id, unit.number)]
        await self._store.commit(lambda writer: flag_units(writer, keys))
        await self._drop_sessions(unit.export)
        await self._store.commit(lambda writer: remove_units(writer, keys))
        return unit

    def unit(self, export: str) -> Unit:
        """Return the unit behind an export name such as 'web1/lun0' (the host by name or id); raises NotFound."""
        host_name, number = split_export(export)
        with self._store.read() as reader:
            host = find_host(reader, host_name)
            record = reader.record(UnitRecord, Table.UNITS, unit_key(host.id, number))
            if record is None:
                raise NotFound(
                    f"host {host.name!r} has no logical unit {number}",
                    correction=f"'blockvirt lun list {host.name}' shows what it has",
                )
            return unit_view(reader, host.name, record)

    def resolve(self, export: str) -> str:
        """Return the id of the volume that a client gets for an export name; raises NotFound, BeingDeleted.

        Hosts go by name only here: sessions are found again by the export name that they opened.
        """
        unit = self.unit(export)
        if unit.export != export:
            raise NotFound(f"{export[:80]!r} names no logical unit", correction=f"it is exported as {unit.export!r}")
        if unit.state != "active":
            raise BeingDeleted(f"{export} is being unmapped", correction="choose another export")
        return unit.volume_id

    def exports(self) -> tuple[str, ...]:
        """Return the export names of all units, for NBD_OPT_LIST."""
        with self._store.read() as reader:
            hosts = {value.decode(): key.decode() for key, value in reader.scan(Table.HOST_NAMES)}
            keys = [key.decode().split("/") for key, _ in reader.scan(Table.UNITS)]
        return tuple(f"{hosts[host_id]}/lun{int(number)}" for host_id, number in keys if host_id in hosts)

    async def finish_deletions(self) -> int:
        """Complete what a crash interrupted: remove flagged units and hosts. Call it at the start; returns how many."""
        hosts: list[str] = []
        units: list[bytes] = []
        with self._store.read() as reader:
            for key, _ in reader.scan(Table.HOSTS):
                try:
                    host = reader.record(HostRecord, Table.HOSTS, key)
                except DamagedRecord as error:
                    log.error("%s", error.message)
                    continue
                if host is not None and host.deleting:
                    hosts.append(host.id)
            for key, _ in reader.scan(Table.UNITS):
                try:
                    unit = reader.record(UnitRecord, Table.UNITS, key)
                except DamagedRecord as error:
                    log.error("%s", error.message)
                    continue
                if unit is not None and unit.deleting:
                    units.append(key)
        if units:
            await self._store.commit(lambda writer: remove_units(writer, units))
        for host_id in hosts:
            await self._store.commit(lambda writer, host_id=host_id: remove_host(writer, host_id))  # type: ignore[misc]
        return len(hosts) + len(units)

    def _sessions_on(self, export: str) -> list[str]:
        return [session.id for session in self._sessions.sessions() if session.export == export]

    async def _drop_sessions(self, export: str) -> None:
        for session_id in self._sessions_on(export):
            await self._sessions.drop(session_id)
