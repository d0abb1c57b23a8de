"""``blockvirt check``: the offline proof of a pool, and bringing back its metadata from a copy."""

import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from blockvirt.errors import BlockvirtError, DamagedRecord, InUse, MetadataFault
from blockvirt.lun.leaf import decode
from blockvirt.meta.copies import newest_intact, remembered_folders, restore
from blockvirt.meta.datafile import DATA_FILE
from blockvirt.meta.findings import Finding, Severity, corrupt, unchecked
from blockvirt.meta.keys import POOL_KEY, Table, number_key, split_pair
from blockvirt.meta.orphans import remove_orphans
from blockvirt.meta.records import FileRecord, PoolRecord
from blockvirt.meta.store import Store, Writer
from blockvirt.meta.verify import verify_pages, verify_records
from blockvirt.pool.backing import backing_path
from blockvirt.pool.devices import COPIES, FILES, claim_all
from blockvirt.pool.lock import lock_pool
from blockvirt.volumes.data_proof import DataProof, Progress
from blockvirt.volumes.deletion import queue_purge
from blockvirt.volumes.engine import EngineSettings, members_of, pool_record, volume_context
from blockvirt.volumes.io_threads import IoThreads
from blockvirt.volumes.ports import DeviceStatus
from blockvirt.volumes.proof import MapProof
from blockvirt.volumes.storage import PoolStorage

_FILE_NAME = re.compile(r"([0-9a-f]{8})-([0-9a-f]{7})", re.ASCII)

_DAMAGED = ("damaged", "damaged-label")  # states of a device that is there, and not as it was left

CLEAN, COULD_NOT_RUN, CORRUPT, LEAKS = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found."""

    findings: tuple[Finding, ...]
    summary: str

    @property
    def exit_code(self) -> int:
        """0 clean, 1 not all could be looked at, 2 corrupt, 3 leaks only. (1 is also any error raised.)"""
        kinds = {finding.severity for finding in self.findings}
        if Severity.CORRUPT in kinds:
            return CORRUPT
        if Severity.UNCHECKED in kinds:
            return COULD_NOT_RUN
        return LEAKS if kinds else CLEAN


def run(
    state_dir: Path,
    *,
    repair: bool,
    restore_metadata: bool,
    devices: Sequence[Path] = (),
    data: bool = False,
    progress: Progress = lambda done_bytes, total_bytes: None,
) -> Report:
    """Check the pool in ``state_dir``, which no daemon may hold.

    ``data`` also reads every chunk that a snapshot has sealed, and compares it with its checksum; ``progress`` is told.
    ``repair`` frees leaks, if nothing else was found: what seems to be nobody's may belong to what was not seen.
    ``restore_metadata`` first puts the newest intact copy of the metadata in place; it is looked for on ``devices`` and
    where the daemon noted its devices last; intact metadata is never replaced.
    Raises PoolLocked, MetadataFault, DeviceFault.
    """
    if not state_dir.is_dir():
        raise MetadataFault(
            f"there is no pool in {state_dir}: the directory does not exist", correction="name its state directory (-s)"
        )
    with ExitStack() as stack:
        stack.callback(lock_pool(state_dir).release)
        restored = ""
        if restore_metadata:
            _refuse_intact(state_dir / "metadata")
            folders = [device / COPIES for device in devices] + remembered_folders(state_dir)
            restored = _restore(state_dir, folders)
        metadata = state_dir / "metadata"
        pages = list(verify_pages(metadata))
        if pages:
            return _report(pages, "the rest was not looked at: with damaged pages nothing can be trusted")
        store = Store.open(metadata, reserve_bytes=0)
        stack.callback(store.close)
        return _check_store(store, stack, repair=repair, note=restored, progress=progress if data else None)


def _check_store(store: Store, stack: ExitStack, *, repair: bool, note: str, progress: Progress | None) -> Report:
    with store.read() as reader:
        findings = list(verify_records(reader, _decoded_later))
        try:
            members = members_of(reader)
            if reader.record(PoolRecord, Table.POOL, POOL_KEY) is None:
                raise DamagedRecord("there is no pool record")
        except DamagedRecord:  # which has been found above
            return _report(findings, "the rest was not looked at: it needs the records of the pool and its devices")
    pool = pool_record(store, EngineSettings())
    threads = IoThreads(1)
    stack.callback(threads.close)
    storage = PoolStorage(store, threads, *claim_all(members, pool.id))
    stack.callback(storage.release)
    out_of_use = {status.id: status for status in storage.list() if status.state != "online"}
    findings += [_of_device(status) for status in out_of_use.values()]
    context = volume_context(EngineSettings(), pool, storage, store, threads)
    proof = MapProof(context)
    unseen = {status.id for status in out_of_use.values() if status.state not in _DAMAGED}
    try:
        findings += _believable(proof.run(), _half_seen(store, storage.paths(), unseen))
        if progress is not None:
            findings += DataProof(context, proof.volume_chunk, progress).run()
    except (ArithmeticError, AssertionError, LookupError, ValueError, struct.error) as error:
        # The proofs of map and data take the records' relations for granted. Where those hold, this is a fault of ours.
        if all(finding.severity is not Severity.CORRUPT for finding in findings):
            raise
        findings.append(_ended(error))
    if repair and all(finding.severity is Severity.LEAK for finding in findings):
        store.commit_now(lambda writer: remove_orphans(writer, queue_purge))
        proof.repair()
        freed = len(findings)
        return _report([], f"{freed} leaks repaired" if freed else note)
    if repair:
        note = "; ".join(filter(None, (note, "nothing was repaired, as there is more than leaks")))
    return _report(findings, note)


def _ended(error: Exception) -> Finding:
    message = f"it could not go on with records that are damaged ({type(error).__name__}: {error})"
    return unchecked("proof-ended", "the proof of the map", message)


def _decoded_later(payload: bytes) -> None:
    """Leave what a leaf holds to the proof of the map, which reads it anyway: twice would take twice as long."""


def _of_device(status: DeviceStatus) -> Finding:
    finding = corrupt if status.state in _DAMAGED else unchecked
    return finding("device-unusable", f"device {status.name}", status.problem)


def _half_seen(store: Store, paths: Mapping[str, Path], unseen: AbstractSet[str]) -> set[str]:
    """Return, by what the proof calls them, the branches with a file on an unseen device, and all files of these."""
    files: dict[int, list[FileRecord]] = {}
    with store.read() as reader:
        for key, _ in reader.scan(Table.BRANCH_FILES):
            branch, number = split_pair(key)
            try:
                file = reader.record(FileRecord, Table.FILES, number_key(number))
            except DamagedRecord:
                continue  # found by the walk over the records
            if file is not None:
                files.setdefault(branch, []).append(file)
    names = set()
    for branch, records in files.items():
        if unseen & {record.device_id for record in records}:
            names |= {f"branch {branch}", *(f"backing file {record.number}" for record in records)}
            here = [record for record in records if record.device_id in paths]
            names |= {str(backing_path(paths[record.device_id], branch, record.number)) for record in here}
    return names


def _believable(findings: Iterable[Finding], half_seen: AbstractSet[str]) -> Iterator[Finding]:
    """Yield what the proof found, without verdicts on what it could see one half of only."""
    for finding in findings:
        if finding.what not in half_seen:
            yield finding
        elif finding.code in ("device-missing", "branch-unreadable"):
            yield unchecked(finding.code, finding.what, finding.message)
        elif finding.severity is not Severity.LEAK:  # what seems to be nobody's may be the unseen half's
            yield finding


def _report(findings: Iterable[Finding], note: str) -> Report:
    found = tuple(findings)
    corruptions = sum(1 for finding in found if finding.severity is Severity.CORRUPT)
    leaks = sum(1 for finding in found if finding.severity is Severity.LEAK)
    words = "clean" if not found else f"{corruptions} corruptions, {leaks} leaks"
    if corruptions + leaks < len(found):
        words += f", {len(found) - corruptions - leaks} parts could not be looked at"
    return Report(found, f"{words}; {note}" if note else words)


def _refuse_intact(metadata: Path) -> None:
    if list(verify_pages(metadata)):
        return
    try:
        store = Store.open(metadata, reserve_bytes=0)
    except MetadataFault:
        return
    try:
        with store.read() as reader:
            if any(finding.severity is Severity.CORRUPT for finding in verify_records(reader, decode)):
                return
    except BlockvirtError:
        return
    finally:
        store.close()
    raise InUse(
        f"the metadata in {metadata} is intact: nothing was restored",
        cause="a copy is older, whatever was mapped since it was made would be lost",
        correction=f"to insist, move {metadata / DATA_FILE} away first",
    )


def _restore(state_dir: Path, folders: Sequence[Path]) -> str:
    copy = newest_intact(folders)
    if copy is None:
        raise MetadataFault(
            "no intact copy of the metadata was found",
            cause="looked in " + (", ".join(map(str, folders)) or "no folder: the state directory names no device"),
            correction="mount the pool's devices, and name them with --device",
        )
    aside = restore(copy, state_dir / "metadata")
    store = Store.open(state_dir / "metadata", reserve_bytes=0)
    try:
        with store.read() as reader:
            paths = {record.id: Path(record.path) for record in members_of(reader)}
        store.commit_now(lambda writer: _step_over(writer, paths))
    finally:
        store.close()
    kept = f"; what was there is kept as {aside}" if aside is not None else ""
    return f"metadata of {copy.made} restored from {copy.path}{kept}"


def _step_over(writer: Writer, paths: dict[str, Path]) -> None:
    """Make sure that nothing handed out after the copy was made is ever handed out again (I2).

    What lies there belongs to nobody now: a leak that ``--repair`` frees, once nobody wants to look at it any more.
    """
    pool = writer.record(PoolRecord, Table.POOL, POOL_KEY)
    assert pool is not None
    branches, numbers = [pool.next_branch - 1], [pool.next_file - 1]
    for path in paths.values():
        for name in (entry.name for entry in (path / FILES).iterdir()):
            if match := _FILE_NAME.fullmatch(name):
                branches.append(int(match[1], 16))
                numbers.append(int(match[2], 16))
    writer.put_record(
        Table.POOL,
        POOL_KEY,
        replace(pool, next_branch=max(branches) + 1, next_file=max(numbers) + 1, epoch=pool.epoch + (1 << 20)),
    )
    for key, _ in writer.scan(Table.FILES):
        file = writer.record(FileRecord, Table.FILES, key)
        if file is None or file.device_id not in paths:
            continue
        path = backing_path(paths[file.device_id], file.branch, file.number)
        chunks = -(-path.stat().st_size // pool.chunk_bytes) if path.exists() else 0
        if chunks > file.used_chunks:
            writer.put_record(Table.FILES, number_key(file.number), replace(file, used_chunks=chunks))
