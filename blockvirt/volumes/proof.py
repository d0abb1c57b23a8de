"""The offline proof of the map: every live address once, inside its file, counted right; nothing else takes space.

Read-only. A journal that was left behind is replayed in memory, so that a pool can be proved as a dead daemon left it.
Findings are of two kinds: corruption, which must never happen, and leaks, which a crash may leave and ``repair`` frees.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.lun.address import ADDRESS_MASK, FRESH, chunk_of, file_of
from blockvirt.lun.leaf import Leaf, decode
from blockvirt.meta.findings import Finding, Severity, corrupt, leak
from blockvirt.meta.keys import Table, number_key, split_leaf, split_pair
from blockvirt.meta.records import BranchRecord, FileRecord, punch_count, unseal
from blockvirt.pool.backing import backing_path, unlink_files
from blockvirt.syscalls import punch_hole
from blockvirt.volumes.context import VolumeContext, files_of
from blockvirt.volumes.journal import journal_paths, read_journal
from blockvirt.volumes.recovery import Replay, replay_in_memory

_LIVE, _FREED = 1, 2


@dataclass(slots=True)
class FileProof:
    """What the walk found in one backing file."""

    record: FileRecord
    live: bytearray
    """One byte per handed-out chunk: 0 (nobody's), _LIVE (some entry names it) or _FREED (waits for its punch)."""


@dataclass(slots=True)
class MapProof:
    """The walk over all branches of a pool that no daemon holds."""

    context: VolumeContext
    findings: list[Finding] = field(default_factory=list)
    _files: dict[int, FileProof] = field(default_factory=dict)

    def run(self) -> list[Finding]:
        """Walk everything; returns the findings. Blocks."""
        with self.context.store.read() as reader:
            numbers = [int.from_bytes(key, "big") for key, _ in reader.scan(Table.BRANCHES)]
        for number in numbers:
            try:
                self._branch(number)
            except BlockvirtError as error:
                self._corrupt("branch-unreadable", f"branch {number}", error.message)
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
            live = replay.live[record.number] if replay else record.live_chunks
            record = replace(record, used_chunks=used, live_chunks=live)
            self._files[record.number] = FileProof(record, bytearray(used))
            self._check_size(record)
        for entry in replay.freed if replay else ():
            self._files[file_of(entry)].live[chunk_of(entry)] = _FREED
        mapped = self._walk(branch, replay)
        expected = replay.mapped_chunks if replay else branch.mapped_chunks
        if mapped != expected:
            self._corrupt(
                "mapped-count", f"branch {number}", f"{expected} chunks are recorded, the walk finds {mapped}"
            )
        for record in files_of(self.context.store, number):
            proof = self._files[record.number]
            found = proof.live.count(_LIVE)
            if found != proof.record.live_chunks:
                message = f"{proof.record.live_chunks} live chunks are recorded, the walk finds {found}"
                self._corrupt("live-count", f"backing file {record.number}", message)

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

    def _walk(self, branch: BranchRecord, replay: Replay | None) -> int:
        """Check every entry of the head; returns how many are mapped."""
        mapped = 0
        for leaf, birth, entries in self._head_leaves(branch, replay):
            for slot, entry in enumerate(entries):
                if not entry:
                    continue
                mapped += 1
                what = f"branch {branch.number} leaf {leaf} slot {slot}"
                if entry >= FRESH and birth != branch.head_epoch:
                    entry &= ADDRESS_MASK  # an older version's flag: it has no meaning any more
                self._address(entry & ADDRESS_MASK, what)
        return mapped

    def _head_leaves(self, branch: BranchRecord, replay: Replay | None) -> Iterator[tuple[int, int, list[int]]]:
        """Yield (leaf number, birth, entries) of the newest version of each leaf, a replayed journal included."""
        replayed = dict(replay.map.dirty) if replay else {}
        newest: tuple[int, int, bytes, bytes] | None = None
        with self.context.store.read() as reader:
            for key, stored in reader.scan(Table.LEAVES, prefix=number_key(branch.number)):
                _, leaf, birth = split_leaf(key)
                if newest is not None and newest[0] != leaf:
                    yield self._decoded(branch, newest, replayed)
                newest = (leaf, birth, key, stored)
            if newest is not None:
                yield self._decoded(branch, newest, replayed)
        for leaf, found in sorted(replayed.items()):
            yield leaf, branch.head_epoch, list(found.entries)

    def _decoded(
        self, branch: BranchRecord, newest: tuple[int, int, bytes, bytes], replayed: dict[int, Leaf]
    ) -> tuple[int, int, list[int]]:
        leaf, birth, key, stored = newest
        if leaf in replayed:
            return leaf, birth, []  # comes from the journal instead
        what = f"leaf {leaf} of branch {branch.number}"
        try:
            return leaf, birth, list(decode(unseal(key, stored, what=what)))
        except BlockvirtError as error:
            self._corrupt("leaf-damaged", what, error.message)
            return leaf, birth, []

    def _address(self, entry: int, what: str) -> None:
        proof, chunk = self._files.get(file_of(entry)), chunk_of(entry)
        if proof is None:
            self._corrupt("address-unknown", what, f"names backing file {file_of(entry)}, which it may not")
        elif chunk >= len(proof.live):
            message = f"names chunk {chunk} of backing file {file_of(entry)}, which has handed out {len(proof.live)}"
            self._corrupt("address-beyond", what, message)
        elif proof.live[chunk] == _FREED:
            self._corrupt(
                "address-freed", what, f"names chunk {chunk} of backing file {file_of(entry)}, which was freed"
            )
        elif proof.live[chunk]:
            self._corrupt("address-twice", what, f"chunk {chunk} of backing file {file_of(entry)} is named twice")
        else:
            proof.live[chunk] = _LIVE

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
        return len(leaks)


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
