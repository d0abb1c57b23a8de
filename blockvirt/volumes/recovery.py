"""Recovery of one volume from the journal that a dead daemon left.

Same page cache as the journal was written through (only the daemon died): every uncovered frame is replayed, nothing
that was answered is lost, flushed or not (I3b). Another one (a reboot, a filesystem mounted anew), or the volume had
stopped for I7: the oldest uncovered generation is replayed up to the last durable mark, and data that flushes left in
the journal goes home. A sync of recovery that fails
stops the volume as any other does: what answered writes left in the page cache may be gone, and whoever relies on it
must be told.

Both end alike: files are cut back to the high-water mark that this gives and synced, freed addresses are queued for
punching, one metadata commit covers it all, and only then is the journal removed. Twice gives the same as once.
"""

import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace

from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.limits import RECLAIM_BATCH_VERSIONS
from blockvirt.lun.address import ADDRESS_MASK, FRESH, chunk_of, file_of
from blockvirt.meta.keys import Table, number_key
from blockvirt.meta.records import BranchRecord, FileRecord
from blockvirt.meta.store import Writer
from blockvirt.pool.backing import BackingFile, backing_path, unlink_files
from blockvirt.volumes.commit import FileChange, MapChange, leaf_rows, write_map
from blockvirt.volumes.context import VolumeContext, files_of
from blockvirt.volumes.journal import FoundJournal, leave_stop_note
from blockvirt.volumes.journal_frames import Change, Frame, Kind, frame_bytes, is_followed, read_frames
from blockvirt.volumes.leaf_map import LeafCache, LeafMap
from blockvirt.volumes.versions import note_stopped

log = logging.getLogger("blockvirt.recovery")

_UNBOUNDED_BYTES = 1 << 40  # the journal bounds how many leaves a replay can touch


@dataclass(frozen=True, slots=True)
class Recovery:
    """What recovery did, for the log and for tests."""

    branch: int
    complete: bool
    """Every answered change was replayed; False: only what was flushed."""
    frames: int
    changes: int


class Replay:
    """The map and the files of a branch while frames are applied to them."""

    def __init__(self, context: VolumeContext, branch: BranchRecord, records: Iterable[FileRecord]) -> None:
        self.map = LeafMap(context.store, branch, LeafCache(_UNBOUNDED_BYTES))
        self.freed: list[int] = []
        self.dropped: list[tuple[int, int]] = []
        self.used = {record.number: record.used_chunks for record in records}
        self.live_change = dict.fromkeys(self.used, 0)
        self.mapped_chunks = branch.mapped_chunks
        self.inherited_chunks = branch.inherited_chunks
        self.changes = 0

    def apply(self, change: Change) -> None:
        """Apply one run of map changes; raises DamagedRecord where they name a file that the branch does not have."""
        self.changes += 1
        for index in range(change.count):
            entry = change.entry + index if change.entry else 0
            old = self.map.put(change.chunk + index, entry)
            if old == entry:
                continue
            if old:
                self._dropped(change.chunk + index, old)
            if entry:
                number = file_of(entry)
                if number not in self.used:
                    raise DamagedRecord(
                        f"a journal names backing file {number}, which branch {self.map.branch} does not have",
                        cause="the metadata is damaged, or older than the journal",
                        correction="run 'blockvirt check'; the journal is kept",
                    )
                self.mapped_chunks += 1
                self.live_change[number] += 1
                self.used[number] = max(self.used[number], chunk_of(entry) + 1)

    def _dropped(self, chunk: int, old: int) -> None:
        self.mapped_chunks -= 1
        if old >= FRESH:
            self.freed.append(old & ADDRESS_MASK)
            self.live_change[file_of(old)] -= 1
        elif file_of(old) in self.used:
            self.dropped.append((chunk, old))
        else:
            self.inherited_chunks -= 1


def recover(context: VolumeContext, branch: BranchRecord, found: FoundJournal) -> Recovery:
    """Bring a branch's map up to what the journal says, durably, and remove the journal. Blocks; run in a thread.

    Raises DeviceFault where a device or a file is missing (the journal stays), DamagedRecord, MetadataFault, OSError:
    where a sync failed, the volume waits for ``volume reopen`` from then on.
    """
    records = files_of(context.store, branch.number)
    complete = _is_complete(context, branch, found, records)
    frames = _frames(branch, found, complete=complete)
    replay = _replay(context, branch, records, frames)
    files = _open(context, branch, records, replay)
    try:
        for file in files:
            file.cut()
        if not complete:  # else what is at home is newer
            _bring_home(files, _embedded(branch, found))
        try:
            _sync(files, forget=not complete)
        except OSError as error:
            _note_stop(context, branch, found, f"its data cannot be synced in recovery: {error}")
            raise
        _commit(context, branch, records, replay)
    finally:
        for file in files:
            file.close()
    unlink_files(found.paths)
    return Recovery(branch.number, complete, len(frames), replay.changes)


def go_back_to_disk(context: VolumeContext, branch: BranchRecord) -> None:
    """Recover a branch that stopped without a journal: its map is whole, its files may not be what the cache says.

    Blocks; run in a thread. Raises DeviceFault, OSError.
    """
    records = files_of(context.store, branch.number)
    files = _open(context, branch, records, Replay(context, branch, records))
    try:
        for file in files:
            file.cut()
        _sync(files, forget=True)
    finally:
        for file in files:
            file.close()


def sync_overwrites(context: VolumeContext, branch: BranchRecord) -> None:
    """Sync the files of a branch that has no journal: overwrites in place need none, and their daemon may have died.

    A file that is missing holds no write. Blocks; run in a thread. Raises DeviceFault, OSError: where a sync failed,
    the volume waits for ``volume reopen`` from then on.
    """
    for record in files_of(context.store, branch.number):
        path = backing_path(context.storage.path_of(record.device_id), branch.number, record.number)
        if not record.used_chunks or not path.exists():
            continue
        file = BackingFile(record, path, context.chunk_shift)
        file.open(read_only=True)
        try:
            file.sync()
        except OSError as error:
            _note_stop(context, branch, None, f"its data cannot be synced before it opens: {error}")
            raise
        finally:
            file.close()


def replay_in_memory(context: VolumeContext, branch: BranchRecord, found: FoundJournal) -> Replay:
    """Return the map as recovery would make it, without changing anything: for the offline check."""
    records = files_of(context.store, branch.number)
    complete = _is_complete(context, branch, found, records)
    return _replay(context, branch, records, _frames(branch, found, complete=complete))


def _is_complete(context: VolumeContext, branch: BranchRecord, found: FoundJournal, records: list[FileRecord]) -> bool:
    """Tell whether every frame counts: the page cache is whole, and nobody has noted that the volume stopped.

    The metadata alone may say so: the journal may have been what could not be written.
    """
    return not (branch.stopped or found.stop_reason) and _same_page_cache(context, found, records)


def _same_page_cache(context: VolumeContext, found: FoundJournal, records: list[FileRecord]) -> bool:
    devices = {record.device_id for record in records} | {found.device_id}
    identities = found.header.identities
    return all(identities.get(device) == context.storage.identity_of(device) for device in devices)


def _frames(branch: BranchRecord, found: FoundJournal, *, complete: bool) -> list[Frame]:
    """Return the MAP frames to replay, in order."""
    oldest = branch.covered_generation + 1
    frames = _oldest_frames(branch, found)
    if not complete:
        upto = max((frame.marked() for frame in frames if frame.kind is not Kind.MAP), default=0)
        return [frame for frame in frames if frame.kind is Kind.MAP and frame.sequence <= upto]
    last = frames[-1] if frames else None
    sequence = last.sequence if last else branch.covered_sequence
    chain = last.crc if last else branch.journal_chain
    # The next generation is open while a checkpoint of the oldest runs; its chain goes on from there.
    later = list(read_frames(found.logs[(oldest + 1) & 1], oldest + 1, sequence + 1, chain))
    _refuse_damaged(branch, found, frames, later)
    return [frame for frame in frames + later if frame.kind is Kind.MAP]


def _oldest_frames(branch: BranchRecord, found: FoundJournal) -> list[Frame]:
    oldest = branch.covered_generation + 1
    return list(read_frames(found.logs[oldest & 1], oldest, branch.covered_sequence + 1, branch.journal_chain))


def _embedded(branch: BranchRecord, found: FoundJournal) -> list[Frame]:
    """Return the DATA frames that count: behind the last mark without data, which says that all before it is home."""
    embedded: list[Frame] = []
    for frame in _oldest_frames(branch, found):
        if frame.kind is Kind.MARK:
            embedded.clear()
        elif frame.kind is Kind.DATA:
            embedded.append(frame)
    return embedded


def _bring_home(files: list[BackingFile], embedded: list[Frame]) -> None:
    """Write what flushes left in the journal where it belongs, but nothing behind the files' ends.

    That is where no flushed change has a chunk; or the file was cut short from outside, and must not become longer
    again: what it lost would read as zeros.
    """
    by_number = {file.number: file for file in files}
    for frame in embedded:
        for number, position, data in frame.data():
            if number not in by_number:
                raise DamagedRecord(
                    f"a journal has data of backing file {number}, which is not there",
                    cause="the metadata is damaged, or older than the journal",
                    correction="run 'blockvirt check'; the journal is kept",
                )
            file = by_number[number]
            inside = memoryview(data)[: max(0, file.reserved_chunks * file.chunk_bytes - position)]
            if inside:
                file.write(inside, position)


def _refuse_damaged(branch: BranchRecord, found: FoundJournal, frames: list[Frame], later: list[Frame]) -> None:
    """Raise DamagedRecord if the frames end at one that was whole: what was answered must not go without a word.

    Only where the page cache is the same: a power cut may have kept a later frame, and not one that was synced with it.
    """
    generation = branch.covered_generation + (2 if later else 1)
    read = later if later else frames
    last = [*frames, *later][-1] if frames or later else None
    followed = is_followed(
        found.logs[generation & 1],
        sum(frame_bytes(0) + len(frame.body) for frame in read),
        generation,
        (last.sequence if last else branch.covered_sequence) + 1,
        last.crc if last else branch.journal_chain,
        b"" if later else found.logs[(generation + 1) & 1],
    )
    if followed:
        path = found.paths[generation & 1]
        raise DamagedRecord(
            f"the journal {path} is damaged: intact frames lie behind one that is not",
            cause="the disk changed what was written",
            correction=f"bring the file back; or move {found.paths[0]} and {found.paths[1].name} away: the volume is "
            "then as of its last checkpoint, and what was written since is lost",
        )


def _replay(context: VolumeContext, branch: BranchRecord, records: list[FileRecord], frames: list[Frame]) -> Replay:
    replay = Replay(context, branch, records)
    for frame in frames:
        for change in frame.changes():
            replay.apply(change)
    return replay


def _open(context: VolumeContext, branch: BranchRecord, records: list[FileRecord], replay: Replay) -> list[BackingFile]:
    files: list[BackingFile] = []
    try:
        for record in records:
            path = backing_path(context.storage.path_of(record.device_id), branch.number, record.number)
            if not replay.used[record.number] and not path.exists():
                continue  # its record was made, the file not yet
            file = BackingFile(replace(record, used_chunks=replay.used[record.number]), path, context.chunk_shift)
            file.open()
            files.append(file)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files


def _sync(files: list[BackingFile], *, forget: bool) -> None:
    for file in files:
        file.sync()
        if forget:
            file.forget_cached()


def _note_stop(context: VolumeContext, branch: BranchRecord, found: FoundJournal | None, reason: str) -> None:
    """Leave word that the page cache is not to be trusted any more: the next recovery must not take it for whole."""
    try:
        if found is not None:
            leave_stop_note(found.paths, reason)
    except OSError as error:
        log.error("branch %d: cannot leave word in its journal: %s", branch.number, error)

    try:
        context.store.commit_now(lambda writer: note_stopped(writer, branch.number, reason))
    except BlockvirtError as error:
        log.error("branch %d: cannot note in the metadata that it stopped: %s", branch.number, error)


def _commit(context: VolumeContext, branch: BranchRecord, records: list[FileRecord], replay: Replay) -> None:
    leaves = replay.map.freeze()
    recovered = MapChange(
        branch=branch.number,
        epoch=branch.head_epoch,
        head_epoch=branch.head_epoch,
        # Two generations can have been open; a fresh chain makes sure that nothing left of them ever fits again.
        covered_generation=branch.covered_generation + 2,
        covered_sequence=branch.covered_sequence,
        journal_chain=secrets.randbits(32),
        mapped_chunks=replay.mapped_chunks,
        inherited_chunks=replay.inherited_chunks,
        files=[
            FileChange(record.number, replay.used[record.number], record.sealed, replay.live_change[record.number])
            for record in records
        ],
        leaves=leaves,
        freed=replay.freed,
        dropped=replay.dropped,
    )
    rows = leaf_rows(recovered.branch, recovered.epoch, leaves)

    def change(writer: Writer) -> None:
        written = write_map(writer, recovered, rows, RECLAIM_BATCH_VERSIONS)
        writer.put_record(Table.BRANCHES, number_key(branch.number), replace(written.branch, stopped=""))

    context.store.commit_now(change)
