"""What the parts share: a scratch directory, the options, and the large pool, which is made once."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.snapshots.daemon import Daemon
from benchmarks.snapshots.history import History, write_checksums, write_histories
from blockvirt.limits import DEFAULT_CHUNK_BYTES, LEAF_CHUNKS
from blockvirt.testing.fixtures import write_mapped_pool

MIB = 1 << 20
CHUNK_BYTES = DEFAULT_CHUNK_BYTES
LEAF_BYTES = LEAF_CHUNKS * CHUNK_BYTES
VOLUME = "v00000"  # the one volume of a written pool


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    rounds: int
    runtime_s: float
    size_bytes: int
    first_writes_bytes: int
    samples: int
    large_bytes: int
    small_bytes: int
    snapshots: int
    rate_minutes: float
    qcow2_s: float


class MappedPool:
    """A pool with one volume, mapped from end to end over a sparse file; its daemon runs in `running` only."""

    def __init__(self, directory: Path, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.leaves = size_bytes // LEAF_BYTES
        self.has_history = self.is_sealed = False
        self.daemon = Daemon(directory)
        self._state = directory / "state"
        for made in (directory, self._state, directory / "device"):
            made.mkdir(mode=0o700)
        asyncio.run(write_mapped_pool(self._state, directory / "device", 1, size_bytes // CHUNK_BYTES))

    @contextmanager
    def running(self) -> Iterator[Daemon]:
        """Its daemon."""
        self.daemon.start()
        try:
            self.daemon.trust_sparse_files()
            yield self.daemon
        finally:
            self.daemon.stop()

    def seal(self) -> None:
        """Give every chunk its checksum, as after days of service, and let one snapshot be there, which saw them."""
        if not self.is_sealed:
            with self.running() as daemon:
                daemon.snapshot(VOLUME)  # what the head holds is sealed from now on
                daemon.clear(VOLUME)
            asyncio.run(write_checksums(self._state, VOLUME, self.size_bytes // CHUNK_BYTES))
            asyncio.run(write_histories(self._state, [History(VOLUME, 1, 0, "first")]))
            self.is_sealed = True

    def age(self, snapshots: int) -> None:
        """Give the volume a history: so many snapshots, then one before which every leaf changed; no others."""
        if not self.has_history:
            self.seal()
            with self.running() as daemon:
                daemon.clear(VOLUME)
            histories = [History(VOLUME, snapshots), History(VOLUME, 1, self.leaves, "wide")]
            asyncio.run(write_histories(self._state, histories))
            self.has_history = True


class Ground:
    """Where all parts work."""

    def __init__(self, directory: Path, options: Options) -> None:
        self.directory = directory
        self.options = options
        self._pools: dict[int, MappedPool] = {}

    def pool(self, size_bytes: int) -> MappedPool:
        """The pool with a mapped volume of a size, made at the first call."""
        if size_bytes not in self._pools:
            say(f"writing the records of a volume of {size_bytes / 2**30:,.0f} GiB")
            self._pools[size_bytes] = MappedPool(self.directory / f"mapped-{size_bytes // MIB}", size_bytes)
        return self._pools[size_bytes]


def say(line: str) -> None:
    """Progress, to standard error: standard output is the report."""
    print(line, file=sys.stderr, flush=True)


def size_of(size_bytes: int) -> str:
    """A size in the largest unit that it is a whole number of."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30)):
        if size_bytes % factor == 0:
            return f"{size_bytes // factor} {unit}"
    return f"{size_bytes // MIB} MiB"
