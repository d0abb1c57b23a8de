"""The offline proof of the data: every sealed chunk that somebody sees holds what it held when it was sealed.

Reads everything that has a checksum, so it takes as long as the disks do. Chunks without one are not sealed, or were
sealed a moment ago: nothing can be said of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from blockvirt.checksum import crc32c
from blockvirt.errors import BlockvirtError, DamagedRecord
from blockvirt.lun.address import ADDRESS_MASK, address
from blockvirt.lun.leaf import SLOT_BITS, SLOT_MASK
from blockvirt.meta.findings import Finding, corrupt
from blockvirt.meta.keys import Table, leaf_prefix, number_key, split_leaf, split_pair
from blockvirt.meta.records import FileRecord
from blockvirt.meta.store import Reader
from blockvirt.pool.backing import BackingFile, backing_path
from blockvirt.volumes.checksums import GROUP_BITS, read_group
from blockvirt.volumes.concerned import holders, told
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.versions import decoded

Progress = Callable[[int, int], None]
"""Is told (bytes read, bytes to read) every few MiB."""

_CHUNKS_A_REPORT = 64


@dataclass(slots=True)
class DataProof:
    """The reading of all sealed chunks of a pool that no daemon holds."""

    context: VolumeContext
    volume_chunk: Callable[[int, int], int | None]
    """Which chunk of its volume lies at (backing file, chunk number); None: nobody sees it any more."""
    progress: Progress = lambda done_bytes, total_bytes: None
    findings: list[Finding] = field(default_factory=list)
    _done_bytes: int = 0
    _total_bytes: int = 0

    def run(self) -> list[Finding]:
        """Read everything; returns what is damaged. Blocks."""
        with self.context.store.read() as reader:
            numbers = [int.from_bytes(key, "big") for key, _ in reader.scan(Table.FILES)]
            work = [(number, list(self._sealed(reader, number))) for number in numbers]
            self._total_bytes = sum(len(sealed) for _, sealed in work) << self.context.chunk_shift
            for number, sealed in work:
                if sealed:
                    self._file(reader, number, sealed)
        return self.findings

    def _sealed(self, reader: Reader, number: int) -> Iterator[tuple[int, int]]:
        """Yield (chunk number, checksum) of what is sealed in a file and seen by somebody."""
        for key, stored in reader.scan(Table.CHECKSUMS, prefix=number_key(number)):
            first = split_pair(key)[1] << GROUP_BITS
            try:
                group = read_group(key, stored)
            except DamagedRecord:
                continue  # the proof of the records names it
            for place, checksum in group.items():
                if self.volume_chunk(number, first + place) is not None:
                    yield first + place, checksum

    def _file(self, reader: Reader, number: int, sealed: list[tuple[int, int]]) -> None:
        shift = self.context.chunk_shift
        content = memoryview(bytearray(1 << shift))
        try:
            record = reader.record(FileRecord, Table.FILES, number_key(number))
            assert record is not None, "its key was just read"
            path = backing_path(self.context.storage.path_of(record.device_id), record.branch, number)
            file = BackingFile(record, path, shift)
            file.open(read_only=True)
        except BlockvirtError:
            return  # the proof of the map names what is missing
        try:
            for done, (chunk, checksum) in enumerate(sealed, 1):
                try:
                    file.read(content, chunk << shift)
                    damage = "" if crc32c(bytes(content)) == checksum else "does not hold what it was sealed with"
                except (BlockvirtError, OSError) as error:
                    damage = f"cannot be read: {error}"
                if damage:
                    self._damaged(reader, record, chunk, damage)
                if not done % _CHUNKS_A_REPORT or done == len(sealed):
                    self._done_bytes += ((done - 1) % _CHUNKS_A_REPORT + 1) << shift
                    self.progress(self._done_bytes, self._total_bytes)
        finally:
            file.close()

    def _damaged(self, reader: Reader, record: FileRecord, chunk: int, damage: str) -> None:
        place = self.volume_chunk(record.number, chunk)
        assert place is not None
        entry = address(record.number, chunk)
        offset = place << self.context.chunk_shift
        message = f"the chunk at byte {chunk << self.context.chunk_shift} of it, byte {offset} of its volume, {damage}"
        birth = _first_birth(reader, record.branch, place, entry)
        seen_by = holders(reader, record.branch, place >> SLOT_BITS, birth, place & SLOT_MASK, entry)
        self.findings.append(corrupt("data-damaged", f"backing file {record.number}", message + told(seen_by)))


def _first_birth(reader: Reader, branch: int, chunk: int, entry: int) -> int:
    """Return the epoch in which a branch first named an address."""
    for key, stored in reader.scan(Table.LEAVES, prefix=leaf_prefix(branch, chunk >> SLOT_BITS)):
        try:
            if decoded(key, stored)[chunk & SLOT_MASK] & ADDRESS_MASK == entry:
                return split_leaf(key)[2]
        except DamagedRecord:
            continue
    return 0
