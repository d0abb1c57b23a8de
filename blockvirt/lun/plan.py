"""What a read or a write of a byte range means for the chunks under it. Pure: entries in, steps out.

The write rule (copy-on-write): a chunk may be overwritten in place only if the head allocated it since the last
snapshot. Otherwise a new chunk is allocated, what the write does not cover is copied, and the new entry is staged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from blockvirt.lun.address import ADDRESS_MASK, FRESH


class Action(Enum):
    """What a write step does to its chunks."""

    OVERWRITE = "overwrite"
    ALLOCATE = "allocate"
    COPY = "copy"


@dataclass(frozen=True, slots=True)
class ReadStep:
    """``length`` bytes, for the buffer from ``start`` on: from ``within`` behind ``entry``'s chunk, or zeros (0)."""

    entry: int
    within: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class WriteStep:
    """``length`` bytes of the data from ``start`` on, to ``count`` consecutive chunks from ``chunk`` on.

    ``within`` is the offset in the first chunk. OVERWRITE goes to the consecutive addresses from ``entry`` on;
    ALLOCATE takes ``count`` new addresses and needs nothing of what was there; COPY takes one new address and keeps
    what the write does not cover of ``entry``.
    """

    action: Action
    chunk: int
    count: int
    entry: int
    within: int
    start: int
    length: int


def plan_read(entry_of: Callable[[int], int], offset: int, length: int, chunk_shift: int) -> list[ReadStep]:
    """Return the steps of a read in order, neighbours merged. ``entry_of`` gives the entry of a chunk."""
    steps: list[ReadStep] = []
    chunk_bytes = 1 << chunk_shift
    mask = chunk_bytes - 1
    at, end = offset, offset + length
    while at < end:
        first = entry_of(at >> chunk_shift) & ADDRESS_MASK
        start, within, expected = at, at & mask, first
        while True:
            at = min(end, (at | mask) + 1)
            if first:
                expected += 1
            if at >= end or entry_of(at >> chunk_shift) & ADDRESS_MASK != expected:
                break
        steps.append(ReadStep(first, within, start - offset, at - start))
    return steps


def plan_write(
    entry_of: Callable[[int], int], offset: int, length: int, chunk_shift: int, volume_bytes: int
) -> list[WriteStep]:
    """Return the steps of a write in order, neighbours merged.

    ``entry_of`` gives the entry of a chunk, FRESH only where the head may overwrite it. The chunk in which the volume
    ends is written whole by whoever writes it up to there.
    """
    steps: list[WriteStep] = []
    chunk_bytes = 1 << chunk_shift
    mask = chunk_bytes - 1
    at, end = offset, offset + length
    while at < end:
        chunk, within, start = at >> chunk_shift, at & mask, at
        entry = entry_of(chunk)
        at = min(end, (at | mask) + 1)
        action = _action(entry, not within and at in (start + chunk_bytes, volume_bytes))
        count = 1
        while at < end and action is not Action.COPY:
            following, stop = entry_of(at >> chunk_shift), min(end, at + chunk_bytes)
            if _action(following, stop in (at + chunk_bytes, volume_bytes)) is not action:
                break
            if action is Action.OVERWRITE and following != entry + count:
                break
            count, at = count + 1, stop
        steps.append(WriteStep(action, chunk, count, entry, within, start - offset, at - start))
    return steps


def _action(entry: int, whole: bool) -> Action:
    if entry >= FRESH:
        return Action.OVERWRITE
    return Action.ALLOCATE if whole or not entry else Action.COPY
