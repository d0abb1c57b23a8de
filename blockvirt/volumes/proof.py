"""The offline proof of the map: every live address in one slot, inside its file, counted; nothing else takes space.

Every version of every leaf is walked, seen by a point or not: an address may be named by several versions of one leaf,
and by branches that come from it, always for the same chunk of the volume. Read-only. A journal that was left behind is
replayed in memory, so that a pool can be proved as a dead daemon left it. Findings are of two kinds: corruption, which
must never happen, and leaks, which a crash may leave and ``repair`` frees.
"""

import os
from array import array
from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.limits import LEAF_CHUNKS
from blockvirt.lun.address import ADDRESS_MASK, chunk_of, file_of
from blockvirt.lun.leaf import SLOT_BITS
from blockvirt.meta.findings import Finding, Severity, corrupt, leak
from blockvirt.meta.keys import Table, number_key, pair_key, split_leaf, split_pair
from blockvirt.meta.records import BranchRecord, FileRecord, SnapshotRecord, punch_count
from blockvirt.meta.store import Reader, Writer
from blockvirt.pool.backing import backing_path, unlink_files
from blockvirt.syscalls import punch_hole
from blockvirt.volumes.context import VolumeContext, files_of
from blockvirt.volumes.journal import journal_paths, read_journal
from blockvirt.volumes.recovery import Replay, replay_in_memory
from blockvirt.volumes.versions import branch_record, decoded, leaf_births, lineage, points_of, walk_visible

_LIVE, _FREED = 1, 2


@dataclass(slots=True)
class FileProof:
    """What the walk found in one backing file."""

    record: FileRecord
    live: bytearray
    """One byte per handed-out chunk: 0 (nobody's), _LIVE (some entry names it) or _FREED (waits for its punch)."""
    where: "array[int]"
    """Per handed-out chunk: which chunk of the volume it holds, if it is live."""


@dataclass(slots=True)
class MapProof:
    """The walk over all branches of a pool that no daemon holds."""

    context: VolumeContext
    findings: list[Finding] = field(default_factory=list)
    _files: dict[int, FileProof] = field(default_factory=dict)
    _dead: list[tuple[int, int, int]] = field(default_factory=list)

    def run(self) -> list[Finding]:
        """Walk everything; returns the findings. Blocks."""
        with self.context.store.read() as reader:
            numbers = [int.from_bytes(key, "big") for key, _ in reader.scan(Table.BRANCHES)]
        for number in numbers:
            try:
                self._branch(number)
            except BlockvirtError as error:
                self._corrupt("branch-unreadable", f"branch {number}", error.message)
        self._snapshots()
        self._dead_versions()
        self._leaks()
        self._strangers()
        return self.findings

    def _corrupt(self, code: str, what: str, message: str) -> None:
        self.findings.append(corrupt(code, what, message))

    def _leak(self, code: str, what: str, message: str) -> None:
        self.findings.append(leak(code, what, message))

    # --- branches ------------------------------------------------------------------------------------------------

    def _branch(self, number: int) -> None:
        with self.context.store.read() as reader:
            branch = reader.record(BranchRecord, Table.BRANCHES, number_key(number))
        assert branch is not None
        replay = self._replay(branch)
        for record in files_of(self.context.store, number):
            used = replay.used[record.number] if replay else record.used_chunks
            live = record.live_chunks + (replay.live_change[record.number] if replay else 0)
            record = replace(record, used_chunks=used, live_chunks=live)
            self._files[record.number] = FileProof(record, bytearray(used), array("I", bytes(4 * used)))
            self._check_size(record)
        for entry in replay.freed if replay else ():
            self._files[file_of(entry)].live[chunk_of(entry)] = _FREED
        for chunk, entries in self._walk(branch, replay):
            self._entries(branch.number, chunk, entries)
        for record in files_of(self.context.store, number):
            proof = self._files[record.number]
            found = proof.live.count(_LIVE)
            if found != proof.record.live_chunks:
                message = f"{proof.record.live_chunks} live chunks are recorded, the walk finds {found}"
                self._corrupt("live-count", f"backing file {record.number}", message)
        if branch.head_epoch:
            self._head(branch, replay)

    def _replay(self, branch: BranchRecord) -> Replay | None:
        for device_id, folder in self.context.storage.paths().items():
            found = read_journal(folder, device_id, branch.number)
            if found is not None:
                return replay_in_memory(self.context, branch, found)
        return None

    def _check_size(self, record: FileRecord) -> None:
        what = f"backing file {record.number}"
        try:
            path = self._path(record)
        except BlockvirtError as error:
            self._corrupt("device-missing", what, error.message)
            return
        if not path.exists():
            if record.used_chunks:
                self._corrupt(
                    "file-missing", what, f"{path} is missing, {record.used_chunks} chunks were handed out in it"
                )
            return
        size, needed = path.stat().st_size, record.used_chunks << self.context.chunk_shift
        if size < needed:
            self._corrupt("file-short", what, f"{path} has {size} bytes, its chunks reach to {needed}")

    def _path(self, record: FileRecord) -> Path:
        return backing_path(self.context.storage.path_of(record.device_id), record.branch, record.number)

    def _walk(self, branch: BranchRecord, replay: Replay | None) -> Iterator[tuple[int, "Iterable[int]"]]:
        """Yield (first chunk, entries) of every version of each leaf, with what the journal makes of the head's."""
        replayed = replay.map.dirty if replay else {}
        with self.context.store.read() as reader:
            for key, stored in reader.scan(Table.LEAVES, prefix=number_key(branch.number)):
                _, leaf, birth = split_leaf(key)
                if leaf in replayed and birth == branch.head_epoch:
                    continue
                try:
                    yield leaf << SLOT_BITS, decoded(key, stored)
                except BlockvirtError as error:
                    self._corrupt("leaf-damaged", f"leaf {leaf} of branch {branch.number}", error.message)
        for leaf, found in sorted(replayed.items()):
            yield leaf << SLOT_BITS, found.entries

    def _entries(self, branch: int, first_chunk: int, entries: "Iterable[int]") -> None:
        for chunk, entry in enumerate(entries, first_chunk):
            if entry:
                self._address(branch, chunk, entry & ADDRESS_MASK)

    def _address(self, branch: int, chunk: int, address: int) -> None:
        what = f"branch {branch} chunk {chunk}"
        number, at = file_of(address), chunk_of(address)
        proof = self._files.get(number)
        if proof is None:
            self._corrupt("address-unknown", what, f"names backing file {number}, which it may not")
        elif at >= len(proof.live):
            message = f"names chunk {at} of backing file {number}, which has handed out {len(proof.live)}"
            self._corrupt("address-beyond", what, message)
        elif proof.live[at] == _FREED:
            self._corrupt("address-freed", what, f"names chunk {at} of backing file {number}, which was freed")
        elif proof.live[at]:
            if proof.where[at] != chunk:
                message = f"chunk {at} of backing file {number} is named twice, by chunk {proof.where[at]} too"
                self._corrupt("address-twice", what, message)
        elif proof.record.branch != branch:
            self._corrupt(
                "address-foreign", what, f"names chunk {at} of backing file {number}, which its owner does not"
            )
        else:
            proof.live[at] = _LIVE
            proof.where[at] = chunk

    # --- points --------------------------------------------------------------------------------------------------

    def _head(self, branch: BranchRecord, replay: Replay | None) -> None:
        """Compare the head's counts with what it sees."""
        replayed = replay.map.dirty if replay else {}
        mapped, inherited = self._count(branch, branch.head_epoch, skip=replayed)
        for leaf in replayed.values():
            mapped += LEAF_CHUNKS - leaf.entries.count(0)
            inherited += sum(1 for entry in leaf.entries if entry and not self._owns(branch.number, entry))
        expected = (branch.mapped_chunks, branch.inherited_chunks)
        if replay:
            expected = (replay.mapped_chunks, replay.inherited_chunks)
        if (mapped, inherited) != expected:
            message = f"{expected} mapped and inherited chunks are recorded, the walk finds {(mapped, inherited)}"
            self._corrupt("mapped-count", f"branch {branch.number}", message)

    def _count(self, branch: BranchRecord, epoch: int, skip: Container[int] = ()) -> tuple[int, int]:
        mapped = inherited = 0
        try:
            with self.context.store.read() as reader:
                for leaf, _, entries in walk_visible(reader, lineage(reader, branch, epoch)):
                    if leaf not in skip:
                        mapped += LEAF_CHUNKS - entries.count(0)
                        inherited += sum(1 for entry in entries if entry and not self._owns(branch.number, entry))
        except DamagedRecord as error:
            self._corrupt("point-unreadable", f"branch {branch.number}, epoch {epoch}", error.message)
        return mapped, inherited

    def _owns(self, branch: int, entry: int) -> bool:
        proof = self._files.get(file_of(entry))
        return proof is not None and proof.record.branch == branch

    def _snapshots(self) -> None:
        """Compare each snapshot's count with what it sees; its versions must be there."""
        with self.context.store.read() as reader:
            keys = [key for key, _ in reader.scan(Table.SNAPSHOTS)]
        for key in keys:
            with self.context.store.read() as reader:
                try:
                    snapshot = reader.record(SnapshotRecord, Table.SNAPSHOTS, key)
                    branch = branch_record(reader, snapshot.branch) if snapshot is not None else None
                except DamagedRecord:
                    continue  # the records are proved elsewhere
            if snapshot is not None and branch is not None:
                mapped, _ = self._count(branch, snapshot.epoch)
                if mapped != snapshot.mapped_chunks:
                    message = f"{snapshot.mapped_chunks} mapped chunks are recorded, the walk finds {mapped}"
                    self._corrupt("mapped-count", f"snapshot {snapshot.name} ({snapshot.id})", message)

    def _dead_versions(self) -> None:
        """Find versions that no point sees, and that no pending reclaim will come by."""
        with self.context.store.read() as reader:
            pending = {split_pair(key)[0] for key, _ in reader.scan(Table.RECLAIM)}
            for key, _ in reader.scan(Table.BRANCHES):
                try:
                    branch = branch_record(reader, int.from_bytes(key, "big"))
                except DamagedRecord:
                    continue
                if branch.number not in pending:
                    self._dead += dead_versions(reader, branch)
        for number, leaf, birth in self._dead:
            what = f"leaf {leaf} of branch {number}"
            self._leak("version-dead", what, f"nobody sees its version born in epoch {birth}")

    # --- leaks ---------------------------------------------------------------------------------------------------

    def _leaks(self) -> None:
        with self.context.store.read() as reader:
            for key, stored in reader.scan(Table.PUNCH):
                number, chunk = split_pair(key)
                proof = self._files.get(number)
                if proof is not None:
                    try:
                        count = punch_count(key, stored)
                    except DamagedRecord as error:
                        self._corrupt("punch-damaged", f"backing file {number}", error.message)
                        continue
                    if _LIVE in proof.live[chunk : chunk + count]:
                        self._corrupt(
                            "punch-live", f"backing file {number}", f"chunk {chunk} is to be freed and is live"
                        )
                    proof.live[chunk : chunk + count] = bytes([_FREED]) * count
        for proof in self._files.values():
            for start, count in dead_runs(proof.live):
                leaked = self._allocated(proof.record, start, count)
                if leaked:
                    message = f"chunks {start} to {start + count - 1} belong to nobody and hold {leaked} bytes"
                    self._leak("chunks-leaked", f"backing file {proof.record.number}", message)

    def _allocated(self, record: FileRecord, start: int, count: int) -> int:
        shift = self.context.chunk_shift
        try:
            fd = os.open(self._path(record), os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, BlockvirtError):
            return 0  # reported already
        try:
            return data_bytes(fd, start << shift, (start + count) << shift)
        finally:
            os.close(fd)

    def _strangers(self) -> None:
        for path in self._stray_files():
            self._leak(
                "file-stray", str(path), f"{path} ({path.stat().st_size} bytes) belongs to nothing in the metadata"
            )

    def _stray_files(self) -> list[Path]:
        known = set()
        for proof in self._files.values():
            try:
                known.add(self._path(proof.record))
            except BlockvirtError:
                continue
        with self.context.store.read() as reader:
            branches = [int.from_bytes(key, "big") for key, _ in reader.scan(Table.BRANCHES)]
        for folder in self.context.storage.paths().values():
            known.update(path for number in branches for path in journal_paths(folder, number))
        return [
            path
            for folder in self.context.storage.paths().values()
            for kind in ("files", "journal")
            for path in sorted((folder / kind).iterdir())
            if path not in known
        ]

    # --- repair --------------------------------------------------------------------------------------------------

    def repair(self) -> int:
        """Free what leaks, after ``run``; returns how many findings that were. Corruption is never touched."""
        leaks = [finding for finding in self.findings if finding.severity is Severity.LEAK]
        shift = self.context.chunk_shift
        for proof in self._files.values():
            runs = [run for run in dead_runs(proof.live) if self._allocated(proof.record, *run)]
            if runs:
                fd = os.open(self._path(proof.record), os.O_RDWR | os.O_CLOEXEC)
                try:
                    for start, count in runs:
                        punch_hole(fd, start << shift, count << shift)
                    os.fdatasync(fd)
                finally:
                    os.close(fd)
        unlink_files(self._stray_files())
        if self._dead:
            self.context.store.commit_now(self._queue_dead)
        return len(leaks)

    def _queue_dead(self, writer: Writer) -> None:
        for branch, _, birth in self._dead:
            writer.put(Table.RECLAIM, pair_key(branch, birth), b"")


def dead_versions(reader: Reader, branch: BranchRecord) -> list[tuple[int, int, int]]:
    """Return (branch, leaf number, birth) of the versions that no point of the branch sees."""
    points = sorted({epoch for epoch, _ in points_of(reader, branch.number)} | {branch.head_epoch} - {0})
    dead = []
    births = list(leaf_births(reader, branch.number))
    for (leaf, birth), (next_leaf, next_birth) in zip(births, [*births[1:], (-1, 0)], strict=False):
        first_seen = bisect_left(points, birth)
        if first_seen == len(points) or (next_leaf == leaf and points[first_seen] >= next_birth):
            dead.append((branch.number, leaf, birth))
    return dead


def dead_runs(live: bytearray) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of the runs of zero bytes."""
    at = live.find(0)
    while at >= 0:
        end = at
        while end < len(live) and not live[end]:
            end += 1
        yield at, end - at
        at = live.find(0, end)


def data_bytes(fd: int, start: int, end: int) -> int:
    """Return how many bytes of a range of a file hold data and not holes."""
    total = 0
    end = min(end, os.fstat(fd).st_size)
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only holes follow
            break
        if at >= end:
            break
        stop = min(end, os.lseek(fd, at, os.SEEK_HOLE))
        total += stop - at
        at = stop
    return total
