"""The I/O of a planned write: where each part of the data goes. Runs inline or in a thread, and stages nothing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from blockvirt.lun.address import chunk_of, file_of
from blockvirt.lun.plan import Action, WriteStep
from blockvirt.pool.backing import BackingFile
from blockvirt.volumes.checksums import check_content
from blockvirt.volumes.tail import BranchFiles, Tail


@dataclass(slots=True)
class Transfer:
    """One write to consecutive chunks of one backing file."""

    file: BackingFile
    position: int
    data: memoryview
    chunk: int
    count: int
    first_entry: int
    """The new addresses from here on, to be staged when the data is written; 0 for an overwrite in place."""
    old: tuple[BackingFile, int] | None = None
    """COPY: where the chunk's content lies so far; ``within`` says where the data goes in it."""
    content: bytearray | None = None
    """COPY: that content, where it has been read already."""
    within: int = 0
    checksum: int | None = None
    """COPY: what that content must have, if it is sealed."""

    def run(self) -> None:
        """Write the data; for a copy-on-write first read what it does not cover.

        Raises OSError, DeviceFault, DataDamaged (what would be copied is not what was sealed).
        """
        if self.old is None:
            self.file.write(self.data, self.position)
            return
        if self.content is None:
            old, old_position = self.old
            self.content = bytearray(old.chunk_bytes)
            old.read(memoryview(self.content), old_position)
            check_content(self.content, self.checksum, f"the chunk at {old_position} of {old.path}")
        self.content[self.within : self.within + len(self.data)] = self.data
        self.file.write(memoryview(self.content), self.position)


def assign(
    files: BranchFiles,
    tail: Tail,
    chunk_shift: int,
    steps: list[WriteStep],
    data: memoryview,
    copies: Iterable[bytearray | None] | None = None,
    checksum_of: Callable[[int], int | None] = lambda _: None,
) -> list[Transfer]:
    """Hand out addresses for ``steps`` and return their transfers, in order.

    The caller has made sure of room. Addresses are handed out even if the I/O fails later: what a failed write left
    in them must never show up in another chunk (I8). ``checksum_of`` an address is asked where a copy is still to be
    read; in ``copies`` everything is read and compared already.
    """
    contents = iter(copies) if copies is not None else None
    transfers = []
    for step in steps:
        part = data[step.start : step.start + step.length]
        if step.action is Action.OVERWRITE:
            file = files.get(file_of(step.entry))
            position = (chunk_of(step.entry) << chunk_shift) + step.within
            transfers.append(Transfer(file, position, part, step.chunk, step.count, 0))
            continue
        file, entry = tail.take(step.count)
        position = chunk_of(entry) << chunk_shift
        if step.action is Action.ALLOCATE:
            transfers.append(Transfer(file, position + step.within, part, step.chunk, step.count, entry))
            continue
        old = (files.get(file_of(step.entry)), chunk_of(step.entry) << chunk_shift)
        content = next(contents) if contents is not None else None
        copy = Transfer(file, position, part, step.chunk, 1, entry, old=old, content=content, within=step.within)
        if content is None:
            copy.checksum = checksum_of(step.entry)
        transfers.append(copy)
    return transfers
