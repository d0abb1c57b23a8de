"""The offline proof of the catalogue: pool, devices, volumes and their trash, hosts and units, schedules, jobs."""

from collections.abc import Iterator

from blockvirt.errors import BlockvirtError
from blockvirt.limits import MAX_CHUNK_BYTES, MAX_VOLUME_BYTES, MIN_CHUNK_BYTES
from blockvirt.meta.findings import Finding, corrupt, leak
from blockvirt.meta.keys import POOL_KEY, Table, number_key, shown, split_deadline, unit_key, volume_unit_key
from blockvirt.meta.records import (
    DeviceRecord,
    HostRecord,
    IdempotencyRecord,
    JobRecord,
    PoolRecord,
    ScheduleRecord,
    ScrubRecord,
    UnitRecord,
    VolumeRecord,
)
from blockvirt.meta.verify_rows import Rows, fit_for_people, names_lead_back

JOB_STATES = frozenset({"queued", "running", "paused", "done", "failed", "cancelled"})


def check_pool(rows: Rows) -> Iterator[Finding]:
    """Prove the pool's record; ``rows.pool`` is it from then on."""
    for key, record, findings in rows.records(PoolRecord, Table.POOL):
        yield from findings
        if key != POOL_KEY:
            yield corrupt("unknown-row", f"pool {shown(key)}", "the pool has one record, under another key")
        else:
            rows.pool = record
    if not rows.has(Table.POOL, POOL_KEY):
        yield corrupt("missing-record", "pool", "there is no pool record")
    elif rows.pool is not None:
        chunk_bytes = rows.pool.chunk_bytes
        if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES or chunk_bytes & (chunk_bytes - 1):
            yield corrupt("bad-value", "pool", f"{chunk_bytes} bytes is no size of a chunk")


def check_devices(rows: Rows) -> Iterator[Finding]:
    """Prove the devices' records."""
    names: dict[str, str] = {}
    for key, record, findings in rows.records(DeviceRecord, Table.DEVICES):
        yield from findings
        if record is None:
            continue
        if record.id.encode() != key:
            yield corrupt("wrong-key", f"device {record.name}", f"it lies under the key {shown(key)}")
        if record.name in names:
            yield corrupt("double-name", f"device {record.name}", f"device {names[record.name]} has the name too")
        names[record.name] = record.id


def check_volumes(rows: Rows) -> Iterator[Finding]:
    """Prove volumes, the index of their names, and the trash; ``rows.volumes`` are they from then on."""
    for key, record, findings in rows.records(VolumeRecord, Table.VOLUMES):
        yield from findings
        if record is None:
            continue
        what = f"volume {record.name}"
        if record.id.encode() != key:
            yield corrupt("wrong-key", what, f"it lies under the key {shown(key)}")
        rows.volumes[record.id] = record
        if not 0 < record.size_bytes <= MAX_VOLUME_BYTES:
            yield corrupt("bad-value", what, f"{record.size_bytes} bytes is no size of a volume")
        if not rows.has(Table.BRANCHES, number_key(record.branch)):
            yield corrupt("missing-record", what, f"its branch {record.branch} does not exist")
        indexed = rows.reader.get(Table.VOLUME_NAMES, record.name.encode()) == key
        if not indexed and not record.deleting and not record.trashed_s:
            yield corrupt("name-index", what, "the index of names does not lead to it")
        yield from _check_trashed(rows, key, record, what)
        if record.importing not in ("", "new") and not rows.has(Table.SNAPSHOTS, record.importing.encode()):
            yield corrupt("wrong-link", what, f"the base {record.importing} of its import does not exist")
    nameless = frozenset(each.id.encode() for each in rows.volumes.values() if each.deleting or each.trashed_s)
    names = {each.id.encode(): each.name for each in rows.volumes.values()}
    yield from names_lead_back(rows, "volume", Table.VOLUME_NAMES, Table.VOLUMES, names, nameless)
    for key, _ in rows.reader.scan(Table.TRASH):
        if not rows.has(Table.VOLUMES, key):
            yield corrupt("trash-index", f"trash {shown(key)}", "there is no such volume")


def _check_trashed(rows: Rows, key: bytes, record: VolumeRecord, what: str) -> Iterator[Finding]:
    in_trash = bool(record.trashed_s) and not record.deleting
    if in_trash and not rows.has(Table.TRASH, key):
        yield corrupt("trash-index", what, "it was put into the trash, which does not list it")
    if not in_trash and rows.has(Table.TRASH, key):
        yield corrupt("trash-index", what, "the trash lists it, and it is not there")
    listed_s = split_deadline(rows.reader.get(Table.TRASH, key) or b"")
    if in_trash and listed_s is not None and listed_s != record.purge_at_s:
        yield corrupt("trash-index", what, f"the trash lists it until {listed_s}, its record says {record.purge_at_s}")
    if in_trash and record.purge_at_s <= 0:
        yield corrupt("bad-value", what, "it is in the trash without a deadline")


def check_hosts(rows: Rows) -> Iterator[Finding]:
    """Prove hosts and the index of their names."""
    names: dict[bytes, str] = {}
    for key, record, findings in rows.records(HostRecord, Table.HOSTS):
        yield from findings
        if record is None:
            continue
        what = f"host {record.name}"
        names[record.id.encode()] = record.name
        if record.id.encode() != key:
            yield corrupt("wrong-key", what, f"it lies under the key {shown(key)}")
        if rows.reader.get(Table.HOST_NAMES, record.name.encode()) != key:
            yield corrupt("name-index", what, "the index of names does not lead to it")
    yield from names_lead_back(rows, "host", Table.HOST_NAMES, Table.HOSTS, names)


def check_units(rows: Rows) -> Iterator[Finding]:
    """Prove logical units and the index of each volume's; after the volumes."""
    for key, record, findings in rows.records(UnitRecord, Table.UNITS):
        yield from findings
        if record is None:
            continue
        what = f"logical unit {shown(key)}"
        if unit_key(record.host_id, record.number) != key:
            yield corrupt("wrong-key", what, f"its record says host {record.host_id}, number {record.number}")
            continue
        if not rows.has(Table.HOSTS, record.host_id.encode()):
            yield corrupt("wrong-link", what, f"its host {record.host_id} does not exist")
        volume = rows.volumes.get(record.volume_id)
        if not rows.has(Table.VOLUMES, record.volume_id.encode()):
            yield corrupt("wrong-link", what, f"its volume {record.volume_id} does not exist")
        elif volume is not None and (volume.deleting or volume.trashed_s):
            yield corrupt("wrong-link", what, f"its volume {volume.name} ({volume.id}) was deleted")
        if not rows.has(Table.VOLUME_UNITS, volume_unit_key(record.volume_id, record.host_id, record.number)):
            yield corrupt("unit-index", what, "it is missing from the index of its volume's units")
    for key, _ in rows.reader.scan(Table.VOLUME_UNITS):
        what = f"index of units, {shown(key)}"
        volume_id, _, unit = key.decode(errors="replace").partition("/")
        try:
            stored = rows.reader.record(UnitRecord, Table.UNITS, unit.encode()) if unit else None
        except (BlockvirtError, ValueError, TypeError):
            continue  # named above
        if stored is None or stored.volume_id != volume_id:
            yield corrupt("unit-index", what, "there is no such logical unit of that volume")


def check_schedules(rows: Rows) -> Iterator[Finding]:
    """Prove schedules and the index of their names. The volume of one may be gone: it then waits to be deleted."""
    names: dict[bytes, str] = {}
    for key, record, findings in rows.records(ScheduleRecord, Table.SCHEDULES):
        yield from findings
        if record is None:
            continue
        what = f"schedule {record.name}"
        names[record.id.encode()] = record.name
        if record.id.encode() != key:
            yield corrupt("wrong-key", what, f"it lies under the key {shown(key)}")
        if rows.reader.get(Table.SCHEDULE_NAMES, record.name.encode()) != key:
            yield corrupt("name-index", what, "the index of names does not lead to it")
        if bool(record.volume_id) == bool(record.labels):
            yield corrupt("bad-value", what, "it is not for exactly one of a volume and the volumes with some labels")
        yield from fit_for_people(what, "schedule", record.name, record.labels)
    yield from names_lead_back(rows, "schedule", Table.SCHEDULE_NAMES, Table.SCHEDULES, names)


def check_jobs(rows: Rows) -> Iterator[Finding]:
    """Prove the jobs' records; after the volumes. What one worked on may be gone: jobs are kept when they are over."""
    purged = set()
    whole = True
    for key, record, findings in rows.records(JobRecord, Table.JOBS):
        yield from findings
        if record is None:
            whole = False
            continue
        what = f"job {record.id} ({record.kind} of {record.subject})"
        if record.id.encode() != key:
            yield corrupt("wrong-key", what, f"it lies under the key {shown(key)}")
        if record.state not in JOB_STATES:
            yield corrupt("bad-value", what, f"{record.state!r} is no state of a job")
        if is_unfinished_purge(record):
            purged.add(record.volume_id)
    for volume in rows.volumes.values():
        if volume.deleting and volume.id not in purged and whole:
            yield leak("orphan-deletion", f"volume {volume.name}", "it is being deleted, and no job does it")


def check_scrubs(rows: Rows) -> Iterator[Finding]:
    """Prove the scrubs' records. The job of one may be forgotten."""
    for key, record, findings in rows.records(ScrubRecord, Table.SCRUBS):
        yield from findings
        if record is not None and record.id.encode() != key:
            yield corrupt("wrong-key", f"scrub {record.id}", f"it lies under the key {shown(key)}")


def is_unfinished_purge(job: JobRecord) -> bool:
    """Tell whether a job deletes its volume, or is going to."""
    return job.kind == "purge" and job.state not in ("done", "cancelled")


def check_idempotency(rows: Rows) -> Iterator[Finding]:
    """Prove that the kept answers can be read."""
    for _, _, findings in rows.records(IdempotencyRecord, Table.IDEMPOTENCY):
        yield from findings
