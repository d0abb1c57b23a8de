"""Plants for the attack "simulation": what goes wrong with data in the journal, and with what a turn copies."""

import os

import pytest

from blockvirt.meta.records import BranchRecord, FileRecord
from blockvirt.pool import backing
from blockvirt.volumes import flush, journal, recovery
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.journal import FoundJournal, Journal
from blockvirt.volumes.journal_frames import Frame, Kind
from blockvirt.volumes.volume import Volume


def embedded_is_synced(patch: pytest.MonkeyPatch) -> None:
    """A mark without data speaks for files whose data went into the journal only."""
    embed = flush._embed

    def wrong(volume: Volume, journal: Journal, upto: int, changes: list[flush.Changes]) -> bool:
        done = embed(volume, journal, upto, changes)
        for file, _ in changes if done else ():
            file.unsynced_bytes = 0
        return done

    patch.setattr(flush, "_embed", wrong)


def never_void(branch: BranchRecord, found: FoundJournal) -> list[Frame]:
    """Give data frames to recovery that a later sync has made void."""
    return [frame for frame in recovery._oldest_frames(branch, found) if frame.kind is Kind.DATA]


def bring_home_always(patch: pytest.MonkeyPatch) -> None:
    """Have recovery write data of the journal home after SIGKILL, too."""
    replay = recovery._replay

    def wrong(
        context: VolumeContext, branch: BranchRecord, records: list[FileRecord], frames: list[Frame]
    ) -> recovery.Replay:
        done = replay(context, branch, records, frames)
        if (found := _found(context, branch)) is not None:
            for number, position, data in (
                part for frame in recovery._embedded(branch, found) for part in frame.data()
            ):
                path = backing.backing_path(
                    context.storage.path_of(next(each.device_id for each in records if each.number == number)),
                    branch.number,
                    number,
                )
                with path.open("r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), data, position)
        return done

    patch.setattr(recovery, "_replay", wrong)


def _found(context: VolumeContext, branch: BranchRecord) -> FoundJournal | None:
    for device_id, folder in context.storage.paths().items():
        if (found := journal.read_journal(folder, device_id, branch.number)) is not None:
            return found
    return None


def data_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Have flushes believe that the journal holds no data."""
    embed = Journal.embed

    def wrong(self: Journal, upto: int, parts: list[tuple[int, int, bytes]]) -> bool:
        done = embed(self, upto, parts)
        self.holds_data = False
        return done

    patch.setattr(Journal, "embed", wrong)


def copy_anew(patch: pytest.MonkeyPatch) -> None:
    """Have every write of a turn to a chunk copy what it was before the turn."""
    write = Volume._write_new_chunk

    def wrong(self: Volume, chunk: int, within: int, old: int, data: memoryview) -> bool:
        held = self._copies.held.get(chunk)
        return (held is None or self._fill_old(old, held)) and write(self, chunk, within, old, data)

    patch.setattr(Volume, "_write_new_chunk", wrong)
