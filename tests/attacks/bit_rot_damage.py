"""What rots: damage to the files of a pool, chosen by a seed. Nothing is written here but what a trial applies."""

import random
from collections import defaultdict
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from blockvirt.pool.labels import LABEL_FILE
from blockvirt.volumes.journal import FRAMES_AT_BYTES
from tests.attacks.bit_rot_pages import DataFile, Part, Span
from tests.attacks.bit_rot_pool import CHUNK_BYTES


class Kind(StrEnum):
    """What is damaged, and so who must find it."""

    METADATA = "flips in live metadata"
    EXCHANGED = "values exchanged"
    FREE = "flips in free pages"
    CHUNK = "flips in sealed chunks"
    JOURNAL = "flips in journals"
    LABEL = "flips in labels"
    CUT = "files cut short"
    SERVED = "flips under a daemon"
    JOURNAL_CUT = "journals cut short"
    COPIED = "flips in chunks that writes copy"
    SERVED_CUT = "files cut short under a daemon"
    METADATA_CUT = "metadata cut short under a daemon"


@dataclass(frozen=True, slots=True)
class Damage:
    """One piece of damage."""

    kind: Kind
    path: Path
    edits: tuple[tuple[int, bytes], ...] = ()
    """Offsets, and what stands there afterwards."""
    cut_at: int | None = None
    """The file's new size."""
    what: str = ""
    """For people."""
    table: str = ""
    number: int = 0
    """Of the branch or the file whose row it is, where one is damaged that belongs to one; of the volume's chunk."""
    volume: str = ""
    """Who sees the chunk."""

    def apply(self) -> "Damage":
        """Do it; returns what undoes the edits."""
        old = []
        with self.path.open("r+b") as file:
            for offset, content in self.edits:
                file.seek(offset)
                old.append((offset, file.read(len(content))))
                file.seek(offset)
                file.write(content)
            if self.cut_at is not None:
                file.truncate(self.cut_at)
        return Damage(self.kind, self.path, tuple(old))


_WEIGHTS = {
    Kind.METADATA: 78,
    Kind.EXCHANGED: 4,
    Kind.FREE: 3,
    Kind.CHUNK: 4,
    Kind.JOURNAL: 4,
    Kind.LABEL: 2,
    Kind.CUT: 2,
    Kind.SERVED: 3,
}
_FURTHER = {Kind.JOURNAL_CUT: 0.015, Kind.COPIED: 0.015, Kind.SERVED_CUT: 0.01, Kind.METADATA_CUT: 0.005}
_PARTS = {
    Part.VALUE: 36,
    Part.KEY: 24,
    Part.NODE: 12,
    Part.HEADER: 12,
    Part.TABLE: 8,
    Part.META: 4,
    Part.FREE_LIST: 4,
}
_TRANSACTION_AT = 144  # of a meta page: its transaction's number
_SERVED_TABLES = frozenset({"leaves", "branches", "files", "checksums"})


@dataclass(slots=True)
class Rot:
    """Everything that can rot in a pool at rest, and in one whose daemon was killed."""

    data_file: Path
    label: Path
    sealed: list[tuple[Path, int, int]]
    """Chunks that have a checksum and are seen: file, offset, length."""
    frames: list[tuple[Path, int, int]]
    """Journal frames that recovery needs, with others behind them: file, offset, length."""
    seen: list[tuple[Path, int, str, int]]
    """Sealed chunks that a volume sees: file, offset, volume, chunk of the volume."""
    _content: bytes = b""
    _free: list[int] = field(default_factory=list)
    _page_bytes: int = 0
    _parts: dict[Part, dict[str, list[Span]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._content = self.data_file.read_bytes()
        walked = DataFile(self._content)
        self._free, self._page_bytes = walked.free_pages(), walked.page_bytes
        for span in walked.spans:
            self._parts.setdefault(span.part, defaultdict(list))[span.table].append(span)

    def is_whole(self) -> bool:
        """Tell whether the metadata are as they were."""
        return self.data_file.read_bytes() == self._content

    def damage(self, seed: int) -> Damage:
        """Return the damage of a trial."""
        chance = random.Random(seed)
        kind = chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        further = random.Random(f"further {seed}")  # dice of their own: the others are as without these kinds
        kind = further.choices([kind, *_FURTHER], [1 - sum(_FURTHER.values()), *_FURTHER.values()])[0]
        return {
            Kind.METADATA: self._metadata,
            Kind.EXCHANGED: self._exchanged,
            Kind.FREE: self._in_free_page,
            Kind.CHUNK: self._chunk,
            Kind.JOURNAL: self._journal,
            Kind.LABEL: self._label,
            Kind.CUT: self._cut,
            Kind.SERVED: self._served,
            Kind.JOURNAL_CUT: self._journal_cut,
            Kind.COPIED: self._copied,
            Kind.SERVED_CUT: self._served_cut,
            Kind.METADATA_CUT: self._metadata_cut,
        }[kind](chance)

    def _metadata(self, chance: random.Random) -> Damage:
        while True:
            part = chance.choices(list(_PARTS), list(_PARTS.values()))[0]
            tables = self._parts[part]
            span = chance.choice(tables[chance.choice(sorted(tables))])
            found = self._flip(chance, Kind.METADATA, span)
            looks_sound = (
                self._looks_committed(found) or self._looks_freed(span, found) or self._still_parts(span, found)
            )
            if not looks_sound:
                return found

    def _looks_committed(self, damage: Damage) -> bool:
        """Tell whether a flip makes the number of the older state one more than that of the newer.

        A commit leaves the same: no check can tell. It is one bit of the file at most.
        """
        at, content = damage.edits[0]
        page, within = divmod(at, self._page_bytes)
        if page > 1 or not _TRANSACTION_AT <= within < _TRANSACTION_AT + 8:
            return False
        changed = self._content[:at] + content + self._content[at + 1 :]
        numbers = self._numbers(changed)
        return abs(numbers[0] - numbers[1]) == 1

    def _looks_freed(self, span: Span, damage: Damage) -> bool:
        """Tell whether a flip makes free pages seem free since another transaction, in the same order of all of them.

        A commit leaves the same, and the next one takes the pages as before: no check can tell.
        """
        if span.part is not Part.FREE_LIST or span.key:  # not a key, but what it is the key of
            return False
        at, content = damage.edits[0]
        since = sorted(
            int.from_bytes(self._bytes(each), "little") for each in self._parts[Part.FREE_LIST][""] if not each.key
        )
        changed = bytearray(self._bytes(span))
        old = int.from_bytes(changed, "little")
        changed[at - span.start] = content[0]
        place = since.index(old)
        before, after = [0, *since][place], [*since[1:], max(self._numbers(self._content))][place]
        return before < int.from_bytes(changed, "little") <= after

    def _still_parts(self, span: Span, damage: Damage) -> bool:
        """Tell whether a flip leaves a branch page's key where it leads every row to its page.

        So does a key whose row was deleted: no check can tell.
        """
        if span.between is None or span.part is Part.FREE_LIST:
            return False
        at, content = damage.edits[0]
        changed = bytearray(self._bytes(span))
        changed[at - span.start] = content[0]
        return span.between[0] < changed <= span.between[1]

    def _numbers(self, content: bytes) -> list[int]:
        return [int.from_bytes(content[start : start + 8], "little") for start in self._transactions()]

    def _transactions(self) -> tuple[int, int]:
        return _TRANSACTION_AT, self._page_bytes + _TRANSACTION_AT

    def _flip(self, chance: random.Random, kind: Kind, span: Span) -> Damage:
        bit = chance.randrange(8 * span.length)
        at = span.start + bit // 8
        where = f"{span.part}{f' of {span.table}' if span.table else ''}"
        what = f"bit {bit % 8} of byte {bit // 8} of {span.length} of a {where} (page {at // self._page_bytes})"
        edits = ((at, bytes([self._content[at] ^ 1 << bit % 8])),)
        return Damage(kind, self.data_file, edits, None, what, span.table, int.from_bytes(span.key[:8], "big"))

    def _exchanged(self, chance: random.Random) -> Damage:
        """Two rows of a table get each other's value: what a misdirected write leaves."""
        alike: dict[tuple[str, int], list[Span]] = defaultdict(list)
        for table, spans in self._parts[Part.VALUE].items():
            for span in spans:
                alike[table, span.length].append(span)
        groups = [spans for spans in alike.values() if len({self._bytes(span) for span in spans}) > 1]
        spans = chance.choice(groups)
        one = chance.choice(spans)
        other = chance.choice([span for span in spans if self._bytes(span) != self._bytes(one)])
        edits = ((one.start, self._bytes(other)), (other.start, self._bytes(one)))
        what = f"the values of {one.key.hex()} and {other.key.hex()} in {one.table}, exchanged"
        return Damage(Kind.EXCHANGED, self.data_file, edits, None, what)

    def _bytes(self, span: Span) -> bytes:
        return self._content[span.start : span.start + span.length]

    def _in_free_page(self, chance: random.Random) -> Damage:
        span = Span(Part.VALUE, chance.choice(self._free) * self._page_bytes, self._page_bytes)
        return self._flip(chance, Kind.FREE, span)

    def _chunk(self, chance: random.Random) -> Damage:
        return _flip_in(chance, Kind.CHUNK, *chance.choice(self.sealed))

    def _journal(self, chance: random.Random) -> Damage:
        return _flip_in(chance, Kind.JOURNAL, *chance.choice(self.frames))

    def _label(self, chance: random.Random) -> Damage:
        return _flip_in(chance, Kind.LABEL, self.label, 0, self.label.stat().st_size)

    def _cut(self, chance: random.Random) -> Damage:
        files = [self.data_file, self.label, *sorted({path for path, _, _ in self.sealed})]
        path = chance.choice(files)
        needed = path.stat().st_size
        if path not in (self.data_file, self.label):
            needed = self._end_of_sealed(path)
        elif path == self.label:
            needed -= 1  # without its line feed it says the same
        return _cut(Kind.CUT, path, chance.randrange(needed))

    def _end_of_sealed(self, path: Path) -> int:
        return max(offset + length for each, offset, length in self.sealed if each == path)

    def _journal_cut(self, chance: random.Random) -> Damage:
        path = chance.choice(sorted(self.frames[0][0].parent.iterdir()))
        size_bytes = chance.choice((path.stat().st_size, 2 * FRAMES_AT_BYTES))  # and often before the first frame
        return _cut(Kind.JOURNAL_CUT, path, chance.randrange(size_bytes))

    def _copied(self, chance: random.Random) -> Damage:
        path, offset, volume, chunk = chance.choice(self.seen)
        flip = _flip_in(chance, Kind.COPIED, path, offset, CHUNK_BYTES)
        return replace(flip, what=f"{flip.what}, chunk {chunk} of {volume}", number=chunk, volume=volume)

    def _served_cut(self, chance: random.Random) -> Damage:
        path = chance.choice(sorted({path for path, _, _ in self.sealed}))
        return _cut(Kind.SERVED_CUT, path, chance.randrange(self._end_of_sealed(path)))

    def _metadata_cut(self, chance: random.Random) -> Damage:
        return _cut(Kind.METADATA_CUT, self.data_file, chance.randrange(len(self._content)))

    def _served(self, chance: random.Random) -> Damage:
        table = chance.choice(sorted(_SERVED_TABLES))
        return self._flip(chance, Kind.SERVED, chance.choice(self._parts[Part.VALUE][table]))


def _cut(kind: Kind, path: Path, cut_at: int) -> Damage:
    return Damage(kind, path, (), cut_at, f"{path.name} cut from {path.stat().st_size} bytes to {cut_at}")


def _flip_in(chance: random.Random, kind: Kind, path: Path, offset: int, length: int) -> Damage:
    bit = chance.randrange(8 * length)
    at = offset + bit // 8
    with path.open("rb") as file:
        file.seek(at)
        old = file.read(1)[0]
    what = f"bit {bit % 8} of byte {at} of {path.name}"
    return Damage(kind, path, ((at, bytes([old ^ 1 << bit % 8])),), None, what)


def label_of(device: Path) -> Path:
    """Return where a device's label is."""
    return device / LABEL_FILE
