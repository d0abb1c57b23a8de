"""The offline proof of the map: every live address in one slot, inside its file, counted; nothing else takes space.

Every version of every leaf is walked, seen by a point or not: an address may be named by versions of one leaf that
follow one another, and by branches that come from there, always for the same chunk of the volume. Read-only. A journal
that was left behind is replayed in memory, so that a pool can be proved as a dead daemon left it. Findings are of two
kinds: corruption, which must never happen, and leaks, which a crash may leave and ``repair`` frees.
"""

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.lun.address import chunk_of, file_of
from blockvirt.meta.findings import Finding, corrupt, leak
from blockvirt.meta.keys import Table, pair_key, split_pair
from blockvirt.meta.records import BranchRecord, FileRecord, SnapshotRecord, punch_count
from blockvirt.meta.store import Reader, Writer
from blockvirt.pool.backing import backing_path, unlink_files
from blockvirt.syscalls import punch_hole
from blockvirt.volumes.branch_proof import BranchWalk, Seen
from blockvirt.volumes.concerned import snapshot_name, told, users, volume_name
from blockvirt.volumes.context import VolumeContext, files_of
from blockvirt.volumes.entry_proof import FREED, LIVE, EntryProof, FileProof, dead_runs
from blockvirt.volumes.journal import journal_paths, read_journal, refuse_to_drop
from blockvirt.volumes.recovery import Replay, replay_in_memory
from blockvirt.volumes.versions import branch_record, is_pinned, points_of


@dataclass(slots=True)
class MapProof:
    """The walk over all branches of a pool that no daemon holds."""

    context: VolumeContext
    findings: list[Finding] = field(default_factory=list)
    _files: dict[int, FileProof] = field(default_factory=dict)
    _owners: dict[int, int] = field(default_factory=dict)
    """Branch by number of backing file."""
    _known_paths: set[Path] = field(default_factory=set)
    _seen_at: dict[tuple[int, int], int] = field(default_factory=dict)
    """Mapped chunks by (branch, epoch) of a point, for what comes from there."""
    _dead: set[tuple[int, int]] = field(default_factory=set)
    """(branch, birth) of the versions that nobody sees."""

    def run(self) -> list[Finding]:
        """Walk everything; returns the findings. Blocks."""
        with self.context.store.read() as reader:
            numbers = [int.from_bytes(key, "big") for key, _ in reader.scan(Table.BRANCHES)]
            for key, _ in reader.scan(Table.BRANCH_FILES):
                branch, number = split_pair(key)
                self._owners[number] = branch
        for number in numbers:  # what others come from is older, so it comes first
            with self.context.store.read() as reader:
                try:
                    self._branch(reader, branch_record(reader, number))
                except BlockvirtError as error:
                    self._unreadable(reader, number, error)
        self._leaks()
        self._strangers()
        return self.findings

    def volume_chunk(self, number: int, chunk: int) -> int | None:
        """Return which chunk of its volume lies at a place of a backing file, after ``run``; None: nobody's."""
        proof = self._files.get(number)
        is_live = proof is not None and chunk < len(proof.live) and proof.live[chunk] == LIVE
        return proof.where[chunk] if proof is not None and is_live else None

    def _corrupt(self, code: str, what: str, message: str) -> None:
        self.findings.append(corrupt(code, what, message))

    def _leak(self, code: str, what: str, message: str) -> None:
        self.findings.append(leak(code, what, message))

    def _unreadable(self, reader: Reader, branch: int, error: BlockvirtError) -> None:
        self._corrupt("branch-unreadable", f"branch {branch}", error.message + told(users(reader, branch)))

    # --- branches ------------------------------------------------------------------------------------------------

    def _branch(self, reader: Reader, branch: BranchRecord) -> None:
        number, records = branch.number, files_of(self.context.store, branch.number)
        self._know_paths(records)
        if not branch.head_epoch and not is_pinned(reader, number):
            return  # its files, then its rows are being removed: anything may be gone
        own: dict[int, FileProof] = {}
        heard = EntryProof(reader, number, own, self._owners, self.context.chunk_shift)
        walk = BranchWalk(reader, branch, self._owners.get, heard)
        replay, is_whole = None, True
        try:
            replay = self._replay(branch)
        except BlockvirtError as error:  # the map is proved as of the last checkpoint, its figures are not
            self._unreadable(reader, number, error)
            is_whole = False
        own.update((record.number, _file_proof(record, replay, is_whole=is_whole)) for record in records)
        self._files |= own
        for entry in replay.freed if replay else ():
            own[file_of(entry)].live[chunk_of(entry)] = FREED
        if is_whole:
            for proof in own.values():
                self._check_size(reader, proof.record)
        origin = (branch.origin_branch, branch.origin_epoch)
        seen = walk.run(replay.map.dirty if replay else {}, self._seen_at.get(origin) if branch.origin_branch else 0)
        self.findings += heard.findings
        self._dead |= {(number, birth) for birth in heard.dead_births}
        if replay:
            self._free_dropped(replay)
        if not seen.is_whole:
            for proof in own.values():
                proof.is_whole = False
            return
        self._check_points(reader, branch, seen)
        if is_whole:
            self._check_head(reader, branch, seen, replay)
            self._check_live(reader, own.values())

    def _replay(self, branch: BranchRecord) -> Replay | None:
        if not branch.head_epoch:  # it speaks of a head that is gone, and goes with what else is left of that
            return None
        for device_id, folder in self.context.storage.paths().items():
            found = read_journal(folder, device_id, branch.number)
            if found is not None:
                return replay_in_memory(self.context, branch, found)
            refuse_to_drop(folder, branch)
        return None

    def _free_dropped(self, replay: Replay) -> None:
        """Do what recovery will do with what the journal dropped: free it where no version holds it any more."""
        for _, entry in replay.dropped:
            proof = self._files[file_of(entry)]
            if not proof.live[chunk_of(entry)]:
                proof.live[chunk_of(entry)] = FREED
                proof.record = replace(proof.record, live_chunks=proof.record.live_chunks - 1)

    def _know_paths(self, records: Iterable[FileRecord]) -> None:
        for record in records:
            try:
                self._known_paths.add(self._path(record))
            except BlockvirtError:
                continue

    def _path(self, record: FileRecord) -> Path:
        return backing_path(self.context.storage.path_of(record.device_id), record.branch, record.number)

    def _check_size(self, reader: Reader, record: FileRecord) -> None:
        try:
            path = self._path(record)
        except BlockvirtError as error:
            code, message = "device-missing", error.message
        else:
            needed = record.used_chunks << self.context.chunk_shift
            size = path.stat().st_size if path.exists() else -1
            if size >= needed or (size < 0 and not record.used_chunks):
                return
            code, message = "file-short", f"{path} has {size} bytes, its chunks reach to {needed}"
            if size < 0:
                code, message = "file-missing", f"{path} is missing, {record.used_chunks} chunks were handed out in it"
        self._corrupt(code, _file(record), message + told(users(reader, record.branch)))

    # --- figures -------------------------------------------------------------------------------------------------

    def _check_live(self, reader: Reader, proofs: Iterable[FileProof]) -> None:
        for proof in proofs:
            found = proof.live.count(LIVE)
            if found != proof.record.live_chunks:
                message = f"{proof.record.live_chunks} live chunks are recorded, the walk finds {found}"
                self._corrupt("live-count", _file(proof.record), message + told(users(reader, proof.record.branch)))

    def _check_points(self, reader: Reader, branch: BranchRecord, seen: Seen) -> None:
        """Compare the count of each snapshot with what it sees: where they differ, versions of it are missing."""
        for epoch, who in points_of(reader, branch.number):
            self._seen_at[branch.number, epoch] = seen.mapped_chunks[epoch]
            if not isinstance(who, str):
                continue
            try:
                record = reader.record(SnapshotRecord, Table.SNAPSHOTS, who.encode())
            except BlockvirtError:
                continue  # the records are proved elsewhere
            if record is not None and record.mapped_chunks != seen.mapped_chunks[epoch]:
                message = (
                    f"{record.mapped_chunks} mapped chunks are recorded, the walk finds {seen.mapped_chunks[epoch]}"
                )
                self._corrupt("mapped-count", f"snapshot {snapshot_name(reader, who)}", message)

    def _check_head(self, reader: Reader, branch: BranchRecord, seen: Seen, replay: Replay | None) -> None:
        if not branch.head_epoch:
            return
        recorded = replay if replay is not None else branch
        expected = (recorded.mapped_chunks, recorded.inherited_chunks)
        found = (seen.mapped_chunks[branch.head_epoch], seen.inherited_chunks)
        if found != expected:
            message = f"{expected} mapped and inherited chunks are recorded, the walk finds {found}"
            self._corrupt("mapped-count", f"volume {volume_name(reader, branch.volume_id)}", message)

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
                    waiting = proof.live[chunk : chunk + count]
                    if len(waiting) < count:
                        message = (
                            f"chunks {chunk} to {chunk + count - 1} are to be freed, {len(proof.live)} were handed out"
                        )
                        self._corrupt("punch-beyond", f"backing file {number}", message)
                    if LIVE in waiting:
                        message = f"chunk {chunk + waiting.index(LIVE)} is to be freed and is live"
                        whom = told(users(reader, proof.record.branch))
                        self._corrupt("punch-live", f"backing file {number}", message + whom)
                    proof.live[chunk : chunk + count] = bytes([FREED]) * len(waiting)
        for proof in self._files.values():
            for start, count in dead_runs(proof.live) if proof.is_whole else ():
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
        known = set(self._known_paths)
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

    def repair(self) -> None:
        """Free what leaks, after ``run``. Corruption is never touched."""
        shift = self.context.chunk_shift
        for proof in self._files.values():
            runs = [run for run in dead_runs(proof.live) if proof.is_whole and self._allocated(proof.record, *run)]
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

    def _queue_dead(self, writer: Writer) -> None:
        for branch, birth in self._dead:
            writer.put(Table.RECLAIM, pair_key(branch, birth), b"")


def _file(record: FileRecord) -> str:
    return f"backing file {record.number}"


def _file_proof(record: FileRecord, replay: Replay | None, *, is_whole: bool) -> FileProof:
    """Return the proof of a file before anything is found in it; with the marks that the journal gives it."""
    if replay is not None:
        live = record.live_chunks + replay.live_change[record.number]
        record = replace(record, used_chunks=replay.used[record.number], live_chunks=live)
    return FileProof(record, bytearray(record.used_chunks), array("I", bytes(4 * record.used_chunks)), is_whole)


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
