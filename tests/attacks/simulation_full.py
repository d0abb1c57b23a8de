"""What a full pool may refuse in the simulation (I10)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from blockvirt.errors import PoolFull
from blockvirt.lun.address import FRESH
from tests.attacks.simulation_model import CELL, Broken
from tests.attacks.simulation_world import CHUNK_CELLS

MAY_NEED_SPACE = frozenset({"write", "zero", "log", "create", "clone", "grow"})
"""What clients and administrators do; all else works in a full pool."""


class _Own:
    """What an open volume surely has for itself, so that it is overwritten in place: known here, not asked of it."""

    def __init__(self) -> None:
        self.epochs: dict[int, int] = {}
        """Of chunks that a write has ended in: the epoch that it began and ended in."""
        self.zeroings = 0
        """That have begun: beside one nothing is sure."""
        self.under_way = 0
        """Of them."""

    def has(self, chunks: range, epoch: int) -> bool:
        """Tell whether all of these are there, written since the last snapshot."""
        return all(self.epochs.get(chunk) == epoch for chunk in chunks)


_OWN: WeakKeyDictionary[Any, _Own] = WeakKeyDictionary()


@contextmanager
def only_what_needs_space(
    handle: Any, cells: range, *, punch: bool | None = None, is_awaited: bool = False
) -> Iterator[None]:
    """Raise Broken where a write of these cells is refused although it needs no new chunk.

    Or a zeroing, where ``punch`` is not None; True: a trim. What ``is_awaited`` is done when this ends.
    """
    volume, chunks = handle._opened.volume, range(cells.start // CHUNK_CELLS, -(-cells.stop // CHUNK_CELLS))
    own, epoch = _OWN.setdefault(volume, _Own()), volume.map.epoch
    is_alone, is_zeroing = not own.under_way, punch is not None
    is_own = is_alone and own.has(chunks, epoch)
    own.zeroings += is_zeroing
    own.under_way += is_zeroing
    zeroings = own.zeroings
    try:
        yield
    except PoolFull as error:
        is_whole = not cells.start % CHUNK_CELLS and cells.stop in (
            chunks.stop * CHUNK_CELLS,
            handle.size_bytes // CELL,
        )
        is_own = is_own and volume.map.epoch == epoch and own.zeroings == zeroings  # all the while
        in_place = is_own or all(volume.map.writable(chunk) >= FRESH for chunk in chunks)
        if volume.failure is None and (in_place or (punch and is_whole)):
            raise Broken(f"a full pool refuses {volume.record.name} what needs no space, cells {cells}") from error
        raise
    finally:
        own.under_way -= is_zeroing
        if is_zeroing:
            for chunk in chunks:
                own.epochs.pop(chunk, None)
    if is_awaited and volume.map.epoch == epoch and own.zeroings == zeroings and is_alone:
        own.epochs.update(dict.fromkeys(chunks, epoch))
