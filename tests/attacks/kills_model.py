"""What a pool must hold after its daemon was killed: plain bytes, what was answered, and what was not. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

CHUNK_BYTES = 4096
"""Of the pools that are attacked, and a page: what lies within one is written whole or not at all."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that somebody asked to have at an offset: a write, a trim or zeroes."""

    volume: str
    offset: int
    data: bytes

    def parts(self) -> Iterator[tuple[int, bytes]]:
        """Yield what lies in each chunk: only that much is promised to happen as a whole."""
        start, end = self.offset, self.offset + len(self.data)
        while start < end:
            stop = min(end, (start // CHUNK_BYTES + 1) * CHUNK_BYTES)
            yield start, self.data[start - self.offset : stop - self.offset]
            start = stop


@dataclass(slots=True)
class Snapshot:
    """What a snapshot holds."""

    content: bytes
    loose: tuple[Write, ...] = ()
    """Writes that were under way when it was taken: it may have them or not, until it has been read once."""


@dataclass(slots=True)
class Volume:
    """What a volume and its snapshots hold."""

    content: bytearray
    snapshots: dict[str, Snapshot] = field(default_factory=dict)

    def apply(self, write: Write) -> None:
        """Have the bytes of a write."""
        self.content[write.offset : write.offset + len(write.data)] = write.data


@dataclass(slots=True)
class World:
    """A pool: its volumes by their names, and the names of its devices."""

    volumes: dict[str, Volume] = field(default_factory=dict)
    devices: set[str] = field(default_factory=set)

    def copy(self) -> World:
        """Return one that can be changed by itself."""
        return deepcopy(self)


@dataclass(slots=True)
class Expected:
    """What may be found."""

    answered: World
    """With everything that was answered."""
    writes: list[Write] = field(default_factory=list)
    """Asked for and not answered: each chunk of each may be there or not. They do not overlap."""
    instead: World | None = None
    """With what was asked for beside, and not answered: a snapshot, a deletion ... All of it is there, or nothing."""
    may_leak: bool = False
    """A flatten was under way: copies that it had not brought into the map may be left over."""

    def broken(self, found: World) -> list[str]:
        """Say how what was found differs from everything that it may be; nothing: it does not."""
        first = differences(self.answered, found, self.writes)
        if not first or self.instead is None:
            return first
        second = differences(self.instead, found, self.writes)
        if not second:
            return []
        return [f"neither as before it ({'; '.join(first[:3])})", f"nor as after it ({'; '.join(second[:3])})"]

    def is_done(self, found: World) -> bool:
        """Tell whether what was asked for beside, and not answered, was found to be done."""
        return self.instead is not None and bool(differences(self.answered, found, self.writes))


def differences(wanted: World, found: World, writes: Sequence[Write] = ()) -> list[str]:
    """Say how a pool differs from what it must be, where each chunk of ``writes`` may be there or not."""
    said = _other_names("device", wanted.devices, found.devices)
    said += _other_names("volume", set(wanted.volumes), set(found.volumes))
    for name in sorted(wanted.volumes.keys() & found.volumes.keys()):
        volume, other = wanted.volumes[name], found.volumes[name]
        mine = [write for write in writes if write.volume == name]
        said += _other_bytes(name, bytes(volume.content), bytes(other.content), mine)
        said += _other_names(f"snapshot of {name}", set(volume.snapshots), set(other.snapshots))
        for each in sorted(volume.snapshots.keys() & other.snapshots.keys()):
            snapshot = volume.snapshots[each]
            said += _other_bytes(f"{name}@{each}", snapshot.content, other.snapshots[each].content, snapshot.loose)
    return said


def _other_names(kind: str, wanted: set[str], found: set[str]) -> list[str]:
    said = [f"{kind} {name!r} is missing" for name in sorted(wanted - found)]
    return said + [f"{kind} {name!r} is there" for name in sorted(found - wanted)]


def _other_bytes(name: str, wanted: bytes, found: bytes, writes: Sequence[Write]) -> list[str]:
    if wanted == found:
        return []
    if len(wanted) != len(found):
        return [f"{name} has {len(found)} bytes instead of {len(wanted)}"]
    either = bytearray(wanted)
    for write in writes:
        for offset, part in write.parts():
            if found[offset : offset + len(part)] == part:
                either[offset : offset + len(part)] = part
    wrong = [
        offset
        for offset in range(0, len(wanted), CHUNK_BYTES)
        if either[offset : offset + CHUNK_BYTES] != found[offset : offset + CHUNK_BYTES]
    ]
    if not wrong:
        return []
    first = next(at for at in range(wrong[0], len(wanted)) if either[at] != found[at])
    count = f"{len(wrong)} chunks of {name} are wrong" if len(wrong) > 1 else f"a chunk of {name} is wrong"
    zeros = " (zeros)" if not any(found[first : first + 16]) else ""
    return [f"{count}, the first at {wrong[0]:#x}: from {first:#x} on {found[first : first + 8].hex()}{zeros}"]
