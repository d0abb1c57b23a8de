"""What a full pool may refuse in the simulation (I10)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blockvirt.errors import PoolFull
from blockvirt.lun.address import FRESH
from tests.attacks.simulation_model import CELL, Broken
from tests.attacks.simulation_world import CHUNK_CELLS

MAY_NEED_SPACE = frozenset({"write", "zero", "log", "create", "clone", "grow"})
"""What clients and administrators do; all else works in a full pool."""


@contextmanager
def only_what_needs_space(handle: Any, cells: range, *, punch: bool = False) -> Iterator[None]:
    """Raise Broken where a write, or a trim (``punch``), of these cells is refused although it needs no new chunk."""
    try:
        yield
    except PoolFull as error:
        volume, chunks = handle._opened.volume, range(cells.start // CHUNK_CELLS, -(-cells.stop // CHUNK_CELLS))
        is_whole = not cells.start % CHUNK_CELLS and cells.stop in (
            chunks.stop * CHUNK_CELLS,
            handle.size_bytes // CELL,
        )
        in_place = all(volume.map.writable(chunk) >= FRESH for chunk in chunks)
        if volume.failure is None and (in_place or (punch and is_whole)):
            raise Broken(f"a full pool refuses {volume.record.name} what needs no space, cells {cells}") from error
        raise
