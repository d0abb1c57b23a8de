"""Reading sealed chunks and comparing them with their checksums, while their volumes live. All verbs block.

A chunk that differs may have been given up meanwhile, and punched: each is judged once more, in a transaction that
begins after the read. What is freed is in no version of a leaf that a point or a head sees, and only what somebody sees
is damage.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from blockvirt.checksum import crc32c
from blockvirt.errors import BlockvirtError, DamagedRecord, DeviceFault
from blockvirt.limits import SCRUB_BATCH_ROWS
from blockvirt.lun.address import ADDRESS_MASK, address, chunk_of
from blockvirt.lun.leaf import SLOT_BITS, SLOT_MASK
from blockvirt.meta.keys import Table, number_key, pair_key, split_leaf, split_pair
from blockvirt.meta.records import FileRecord, ScrubFinding
from blockvirt.pool.backing import BackingFile, backing_path
from blockvirt.snapshots.scrub_records import is_live
from blockvirt.volumes.checksums import GROUP_BITS, GROUP_CHUNKS, read_group
from blockvirt.volumes.concerned import first_names, holders, users
from blockvirt.volumes.context import VolumeContext
from blockvirt.volumes.versions import decoded

log = logging.getLogger("blockvirt.scrub")


@dataclass(frozen=True, slots=True)
class Group:
    """Sealed chunks that lie beside one another in a backing file."""

    file: int
    checksums: Mapping[int, int]
    """By address, in order."""
    next_key: bytes | None
    """Where the next group is looked for; None: there is none."""


@dataclass(slots=True)
class Reading:
    """What became of some chunks of a file."""

    read_bytes: int = 0
    differing: dict[int, str] = field(default_factory=dict)
    """What is wrong, by address."""
    missing: str = ""
    """Why the whole file cannot be read, where that is damage."""
    away: str = ""
    """Why it cannot be read now, where that is none: its device is away, or it has just been deleted."""


class ChunkProof:
    """Proves chunks of some backing files, or of all."""

    def __init__(self, context: VolumeContext, files: Collection[int] | None) -> None:
        """``files`` are numbers of backing files; None: all."""
        self._context = context
        self._store = context.store
        self._files = files
        self._content = memoryview(bytearray(1 << context.chunk_shift))

    def count(self, start: bytes) -> tuple[int, bytes | None]:
        """Return how many chunks are sealed in some rows from a key on, and where the next ones begin (None: end)."""
        chunks = 0
        with self._store.read() as reader:
            for looked, (key, stored) in enumerate(reader.scan(Table.CHECKSUMS, start=start)):
                if looked == SCRUB_BATCH_ROWS:
                    return chunks, key
                number = split_pair(key)[0]
                if self._files is None or number in self._files:
                    bits = int.from_bytes(stored[: GROUP_CHUNKS // 8], "little")
                    chunks += bits.bit_count()
        return chunks, None

    def group(self, start: bytes) -> Group:
        """Return the first sealed chunks at or after ``start``, the key of (file, chunk); there may be none yet.

        Looks at a bounded number of rows.
        """
        number, first = split_pair(start) if start else (0, 0)
        with self._store.read() as reader:
            rows = reader.scan(Table.CHECKSUMS, start=pair_key(number, first >> GROUP_BITS))
            for looked, (key, stored) in enumerate(rows):
                file, group = split_pair(key)
                if looked == SCRUB_BATCH_ROWS:
                    return Group(file, {}, pair_key(file, group << GROUP_BITS))
                if self._files is not None and file not in self._files:
                    continue
                try:
                    places = read_group(key, stored)
                except DamagedRecord:
                    continue  # named by the walk over the records
                least = first if (file, group) == (number, first >> GROUP_BITS) else 0
                base = group << GROUP_BITS
                found = {address(file, base + at): crc for at, crc in places.items() if base + at >= least}
                if found:
                    return Group(file, found, pair_key(file, base + GROUP_CHUNKS))
        return Group(0, {}, None)

    def read(self, number: int, checksums: Mapping[int, int]) -> Reading:
        """Read some chunks of a file from the disk, as far as it has them, and compare."""
        reading = Reading()
        file = self._opened(number, reading)
        if file is None:
            return reading
        shift = self._context.chunk_shift
        first, last = (chunk_of(each) << shift for each in (min(checksums), max(checksums)))
        try:
            file.read_no_further()
            file.forget_cached(first, last - first + (1 << shift))
            for each, checksum in checksums.items():
                try:
                    file.read(self._content, chunk_of(each) << shift)
                    reading.read_bytes += len(self._content)
                    if not matches(self._content, checksum):
                        reading.differing[each] = "it does not hold what it was sealed with"
                except (BlockvirtError, OSError) as error:
                    reading.differing[each] = f"it cannot be read: {error}"
            file.forget_cached(first, last - first + (1 << shift))
        except OSError as error:
            log.warning("the page cache keeps what was read of %s: %s", file.path, error)
        finally:
            file.close()
        if reading.differing and (fault := self._device_fault(file.device_id)):
            return Reading(reading.read_bytes, away=fault)
        return reading

    def _opened(self, number: int, reading: Reading) -> BackingFile | None:
        """Return an open file, or None with the reason in ``reading``."""
        try:
            with self._store.read() as reader:
                record = reader.record(FileRecord, Table.FILES, number_key(number))
            if record is None:
                reading.away = "it has just been deleted"
                return None
            if fault := self._device_fault(record.device_id):
                reading.away = fault
                return None
            path = backing_path(self._context.storage.path_of(record.device_id), record.branch, number)
            file = BackingFile(record, path, self._context.chunk_shift)
        except BlockvirtError as error:  # its record is named by the walk over the records
            reading.away = error.message
            return None
        try:
            file.open(read_only=True)
        except (DeviceFault, OSError) as error:
            reading.missing = str(error)
            return None
        return file

    def _device_fault(self, device_id: str) -> str:
        try:
            self._context.storage.path_of(device_id)
        except DeviceFault as fault:
            return fault.message
        return ""

    # --- whom it concerns --------------------------------------------------------------------------------------------

    def missing_file(self, number: int, problem: str) -> list[ScrubFinding]:
        """Return what is to be said of a file that cannot be opened; nothing where its branch has gone meanwhile."""
        with self._store.read() as reader:
            record = reader.record(FileRecord, Table.FILES, number_key(number))
            concerns = first_names(users(reader, record.branch)) if record is not None else ()
        if record is None or not concerns:
            return []
        return [ScrubFinding("file", problem, concerns, self._path(record), address=number)]

    def damaged(self, number: int, checksums: Mapping[int, int], differing: Mapping[int, str]) -> list[ScrubFinding]:
        """Return what is to be said of chunks of a file that differ; nothing of those that nobody sees any more."""
        with self._store.read() as reader:
            live = [each for each in differing if is_live(reader, each, checksums[each])]
            record = reader.record(FileRecord, Table.FILES, number_key(number))
        if not live or record is None:
            return []
        found = []
        for each, (birth, place) in sorted(self._places(record.branch, live).items()):
            with self._store.read() as reader:
                seen_by = holders(reader, record.branch, place >> SLOT_BITS, birth, place & SLOT_MASK, each)
                concerns = first_names(seen_by)
            if concerns:
                found.append(self._of_chunk(record, each, place, differing[each], concerns))
        return found

    def _of_chunk(
        self, record: FileRecord, chunk: int, place: int, problem: str, concerns: tuple[str, ...]
    ) -> ScrubFinding:
        shift = self._context.chunk_shift
        return ScrubFinding(
            kind="chunk",
            problem=problem,
            concerns=concerns,
            path=self._path(record),
            offset_bytes=chunk_of(chunk) << shift,
            length_bytes=1 << shift,
            volume_offset_bytes=place << shift,
            address=chunk,
        )

    def _places(self, branch: int, addresses: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Return for each address the epoch in which its branch first named it, and which chunk of a volume it is.

        Without those that no version names any more. Looks through the whole map of the branch, a few leaves at a time.
        """
        found: dict[int, tuple[int, int]] = {}
        left, start = set(addresses), number_key(branch)
        while left:
            looked = 0
            with self._store.read() as reader:
                for key, stored in reader.scan(Table.LEAVES, start=start, prefix=number_key(branch)):
                    start, looked = key + b"\0", looked + 1
                    left -= _find(key, stored, left, found)
                    if looked == SCRUB_BATCH_ROWS:
                        break
            if looked < SCRUB_BATCH_ROWS:
                break
        return found

    def _path(self, record: FileRecord) -> str:
        paths = self._context.storage.paths()
        folder = paths.get(record.device_id)
        return str(backing_path(folder, record.branch, record.number)) if folder is not None else ""


def _find(key: bytes, stored: bytes, wanted: set[int], found: dict[int, tuple[int, int]]) -> set[int]:
    """Look for addresses in one version of a leaf; returns those that are there."""
    try:
        entries = decoded(key, stored)
    except DamagedRecord:  # named by the walk over the records
        return set()
    _, leaf, birth = split_leaf(key)
    here = wanted.intersection(entry & ADDRESS_MASK for entry in entries if entry)
    for slot, entry in enumerate(entries) if here else ():
        if entry & ADDRESS_MASK in here:
            found[entry & ADDRESS_MASK] = (birth, leaf << SLOT_BITS | slot)
    return here


def matches(content: memoryview, checksum: int) -> bool:
    """Tell whether a chunk holds what it was sealed with."""
    return crc32c(bytes(content)) == checksum
