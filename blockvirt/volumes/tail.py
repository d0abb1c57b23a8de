"""Where new chunks come from: a branch's open files, the one it appends to, and space reserved ahead of need."""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from blockvirt.errors import BlockvirtError, DeviceFault, PoolFull
from blockvirt.limits import RESERVE_STEP_MAX_BYTES, RESERVE_STEP_MIN_BYTES
from blockvirt.lun.address import CHUNK_MASK, address
from blockvirt.meta.keys import POOL_KEY, Table, number_key, pair_key
from blockvirt.meta.records import FileRecord, PoolRecord, VolumeRecord
from blockvirt.meta.store import Writer
from blockvirt.pool.backing import BackingFile, backing_path
from blockvirt.tasks import TaskSet
from blockvirt.volumes.context import VolumeContext, files_of

log = logging.getLogger("blockvirt.volumes")

AdmitDevice = Callable[[str], Awaitable[None]]
"""Has a device's page-cache identity durable in the journal, if there is one, before a file on it is used."""


class BranchFiles:
    """The backing files of one branch that an open volume reads and writes; opened on first use."""

    def __init__(self, context: VolumeContext, branch: int) -> None:
        self._context = context
        self.branch = branch
        self.open_files: dict[int, BackingFile] = {}
        """By number; the data path looks here first."""
        self.records = {record.number: record for record in files_of(context.store, branch)}
        """As the store has them."""
        self.device_ids = {record.device_id for record in self.records.values()}
        """Where the files lie, and where one is about to: a journal that is made now must know all of these."""
        self._closed = False

    def get(self, number: int) -> BackingFile:
        """Return an open file; raises DeviceFault where its device or the file itself is not there."""
        file = self.open_files.get(number)
        if file is None:
            if self._closed:  # ``records`` may be out of date by now: opening by them could cut what is in use
                raise DeviceFault(f"backing file {number} is closed", cause="its volume has been closed")
            file = self._describe(number)
            file.open(read_only=number not in self.records)
            self._admit(file)
        return file

    def _describe(self, number: int) -> BackingFile:
        record = self.records.get(number)
        if record is None:  # an origin's file: read only
            with self._context.store.read() as reader:
                record = reader.record(FileRecord, Table.FILES, number_key(number))
            if record is None:
                raise DeviceFault(
                    f"backing file {number} has no record in the metadata", correction="run 'blockvirt check'"
                )
        folder = self._context.storage.path_of(record.device_id)
        return BackingFile(record, backing_path(folder, record.branch, number), self._context.chunk_shift)

    def _admit(self, file: BackingFile) -> None:
        self.open_files[file.number] = file
        self._note_reserved(file, file.reserved_chunks - file.used_chunks)

    def _note_reserved(self, file: BackingFile, chunks: int) -> None:
        if chunks and file.number in self.records:
            self._context.storage.reserved(file.device_id, chunks << self._context.chunk_shift)

    def own(self) -> list[BackingFile]:
        """Return the open files that belong to this branch, oldest first."""
        return [file for number, file in sorted(self.open_files.items()) if number in self.records]

    def marked(self, number: int, used_chunks: int, *, sealed: bool) -> None:
        """Note what the store has of a file now."""
        self.records[number] = replace(self.records[number], used_chunks=used_chunks, sealed=sealed)

    def unsynced(self, *, also_grown: bool = False) -> list[BackingFile]:
        """Return the files with writes that no sync covers yet; also those of which only the size is not durable."""
        files = self.open_files.values()
        return [file for file in files if file.unsynced_bytes or (also_grown and file.grown)]

    async def create(self, device_id: str, admit_device: AdmitDevice) -> BackingFile:
        """Add a backing file on a device; its record is durable before the file exists.

        And the journal knows the device before the record is there: recovery takes one that it does not know for
        another page cache, and trusts durable marks only.
        """
        self.device_ids.add(device_id)

        def change(writer: Writer) -> FileRecord:
            pool = writer.record(PoolRecord, Table.POOL, POOL_KEY)
            assert pool is not None
            if writer.get(Table.DEVICES, device_id.encode()) is None:
                raise DeviceFault(f"device {device_id} was removed from the pool meanwhile", correction="try again")
            record = FileRecord(pool.next_file, self.branch, device_id)
            writer.put_record(Table.POOL, POOL_KEY, replace(pool, next_file=pool.next_file + 1))
            writer.put_record(Table.FILES, number_key(record.number), record)
            writer.put(Table.BRANCH_FILES, pair_key(self.branch, record.number), b"")
            return record

        try:
            await admit_device(device_id)
            record = await self._context.store.commit(change)
        except BaseException:
            self.device_ids = {record.device_id for record in self.records.values()}
            raise
        self.records[record.number] = record
        file = self._describe(record.number)
        await self._context.threads.run(file.open)
        self._admit(file)
        return file

    def take_foreign(self) -> list[BackingFile]:
        """Give away the open files of other branches: to be closed when no operation uses them. ``get`` opens anew."""
        return [self.open_files.pop(number) for number in list(self.open_files) if number not in self.records]

    async def close(self, *, give_back: bool = True) -> None:
        """Close the descriptors, and give space reserved ahead back to the filesystem.

        Everything must be synced. Without ``give_back`` (the volume stopped) the files stay as they are for recovery.
        """
        self._closed = True
        files = list(self.open_files.values())
        self.open_files.clear()
        for file in files:
            self._note_reserved(file, file.used_chunks - file.reserved_chunks)

        def close_all() -> None:
            for file in files:
                try:
                    if give_back:
                        assert not file.unsynced_bytes, "closing a file with unsynced writes can lose their error"
                        if file.number in self.records and file.reserved_chunks > file.used_chunks:
                            file.cut()
                except OSError as error:
                    log.error("space reserved ahead in %s is not given back: %s", file.path, error)
                finally:
                    file.close()

        await self._context.threads.run(close_all)


class Tail:
    """The end of a branch: hands out addresses, never one twice, and keeps space reserved ahead of them."""

    def __init__(self, context: VolumeContext, files: BranchFiles, volume: VolumeRecord, tasks: TaskSet) -> None:
        self._context = context
        self._files = files
        self._volume = volume
        self._tasks = tasks
        self._extending: asyncio.Task[None] | None = None
        """The last that made room, for all who wait for some: they go on together when it ends."""
        self._extending_for = 0
        """Chunks that it was asked for; 0 where nobody has asked."""
        self._file: BackingFile | None = None
        self._resting: BackingFile | None = None
        """The one before it, that is being synced: used only where there is no room elsewhere."""
        self._enough_chunks = (RESERVE_STEP_MAX_BYTES >> context.chunk_shift) // 2
        """Where so much is left nobody looks ahead, however large the volume."""
        self.mapped_chunks = 0
        """Of the whole branch: what reservation steps grow with."""

    def room(self) -> int:
        """Return how many chunks ``take`` can hand out at once."""
        file = self._file
        if file is None:
            return 0
        reserved, most = file.reserved_chunks, self._context.file_chunks
        return (reserved if reserved < most else most) - file.used_chunks

    def take(self, count: int) -> tuple[BackingFile, int]:
        """Hand out ``count`` consecutive addresses: the file, and the first as a map entry without flags."""
        file = self._file
        assert file is not None
        assert count <= self.room()
        first = file.used_chunks
        assert first + count <= CHUNK_MASK
        file.used_chunks += count
        self._context.storage.reserved(file.device_id, -(count << self._context.chunk_shift))
        self._look_ahead(file)
        return file, address(file.number, first)

    def turn(self) -> None:
        """Append to another file from now on, since this one is about to be synced.

        A write to a file waits while a sync of it holds its lock in the kernel, for 100 ms where much is to be written.
        Two files in turns part them: what a snapshot has synced is not what its successors are written to. Both are
        on one device, as long as that has room: a volume is not to depend on two disks for it.
        """
        if self._file is None:
            return
        self._resting, self._file = self._file, None
        for file in reversed(self._files.own()):
            is_other = file is not self._resting and file.device_id == self._resting.device_id
            if is_other and self._fits(file, 1) and file.reserved_chunks > file.used_chunks:
                self._file = file
                self._look_ahead(file)
                return

    def _look_ahead(self, file: BackingFile) -> None:
        left = file.reserved_chunks - file.used_chunks
        if left < self._enough_chunks and left < self._step_chunks() // 2 and self._idle():
            self._extending, self._extending_for = self._tasks.start(self._reserve_ahead(), "reserve"), 0

    def _step_chunks(self) -> int:
        mapped_bytes = self.mapped_chunks << self._context.chunk_shift
        step = min(max(mapped_bytes // 8, RESERVE_STEP_MIN_BYTES), RESERVE_STEP_MAX_BYTES)
        return max(1, step >> self._context.chunk_shift)

    async def _reserve_ahead(self) -> None:
        try:
            if self._file is not None and self.room() < self._step_chunks():
                await self._extend(self._file, self._step_chunks())
        except (BlockvirtError, OSError):
            pass  # who really needs the space asks again and is told

    def _idle(self) -> bool:
        return self._extending is None or self._extending.done()

    async def make_room(self, count: int, admit_device: AdmitDevice) -> None:
        """Return when ``take(count)`` will succeed; raises PoolFull, DeviceFault or OSError."""
        assert 0 < count <= self._context.file_chunks
        while self.room() < count:
            if self._idle():
                work = self._make_room(count, admit_device)
                self._extending, self._extending_for = self._tasks.start(work, "room", awaited=True), count
            extending, asked = self._extending, self._extending_for
            assert extending is not None
            try:
                await asyncio.shield(extending)
            except (BlockvirtError, OSError):
                if count >= asked:  # for less there may be room
                    raise

    async def _make_room(self, count: int, admit_device: AdmitDevice) -> None:
        while self.room() < count:
            try:
                await self._go_on(count, admit_device)
            except PoolFull:
                file, self._resting = self._resting, None
                if file is None:
                    raise
                if self._fits(file, count) and file.reserved_chunks - file.used_chunks >= count:
                    self._file = file

    async def _go_on(self, count: int, admit_device: AdmitDevice) -> None:
        home = self._resting.device_id if self._resting is not None else None
        if home not in self._context.storage.paths():
            home = None
        file = self._newest(count, home) if self._file is None or not self._fits(self._file, count) else self._file
        if file is None:
            file = await self._files.create(home or self._place(count), admit_device)
        try:
            await self._use(file, count)
        except PoolFull:
            if self._resting is not None:  # its own reserve first, then other devices
                raise
            device_id = self._elsewhere(file, count)
            if device_id is None:
                raise
            other = self._newest(count, device_id) or await self._files.create(device_id, admit_device)
            await self._use(other, count)

    async def _use(self, file: BackingFile, count: int) -> None:
        """Append to ``file`` from now on, with room for ``count`` more."""
        if file.reserved_chunks - file.used_chunks < count:
            await self._extend_for(file, count)
        self._file = file
        if file is self._resting:
            self._resting = None

    def _place(self, count: int) -> str:
        return self._context.storage.place(self._volume, count << self._context.chunk_shift)

    def _elsewhere(self, file: BackingFile, count: int) -> str | None:
        """Return another device with room than the full one of ``file``: a volume may be larger than one disk."""
        try:
            device_id = self._place(count)
        except PoolFull:
            return None
        return device_id if device_id != file.device_id else None

    def _fits(self, file: BackingFile, count: int) -> bool:
        """Tell whether ``file`` has so many addresses left; seals it where it has not."""
        if not file.sealed and file.used_chunks + count > self._context.file_chunks:
            file.sealed = True
        return not file.sealed

    def _newest(self, count: int, device_id: str | None = None) -> BackingFile | None:
        """Return the newest file, on that device if one is given, that has ``count`` addresses left."""
        for number, record in sorted(self._files.records.items(), reverse=True):
            if record.sealed or device_id not in (None, record.device_id):
                continue
            file = self._files.get(number)
            if file is not self._resting and self._fits(file, count):
                return file
        return None

    async def _extend_for(self, file: BackingFile, count: int) -> None:
        step = self._step_chunks()
        if step > count:
            try:
                await self._extend(file, step)
                return
            except PoolFull:
                pass  # not a whole step ahead any more, but perhaps what is needed now
        await self._extend(file, count - (file.reserved_chunks - file.used_chunks))

    async def _extend(self, file: BackingFile, chunks: int) -> None:
        length = chunks << self._context.chunk_shift
        storage = self._context.storage
        storage.admit(file.device_id, length)
        try:
            await self._context.threads.run(lambda: file.reserve(chunks))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PoolFull(
                f"the filesystem of {file.path} has no room for {length} bytes more",
                cause="it is full, although the pool's own limits are not reached: something else fills it",
                correction="free space there, or add a device with 'blockvirt device add'",
            ) from error
        storage.reserved(file.device_id, length)
