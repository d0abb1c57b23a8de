"""Reading the metadata's file before it is mapped: where the disk cannot, that is an error and no signal."""

import subprocess
import sys
from pathlib import Path

import pytest

from blockvirt.errors import MetadataFault
from blockvirt.meta.datafile import DATA_FILE
from blockvirt.meta.keys import Table
from blockvirt.meta.preread import PIECE_BYTES, ThroughFile
from blockvirt.meta.store import Store, Writer
from blockvirt.units import KIB

OPEN = """
import sys
from pathlib import Path
from blockvirt.errors import MetadataFault
from blockvirt.meta.store import Store
try:
    Store.open(Path(sys.argv[1]), reserve_bytes=0).close()
    print("open")
except MetadataFault as fault:
    print(fault.message, fault.cause, fault.correction, sep="|")
"""


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """A folder with some MiB of metadata."""
    store = Store.open(tmp_path / "m", create=True, reserve_bytes=0)

    def fill(writer: Writer) -> None:
        for row in range(1_500):
            writer.put(Table.FILES, b"%d" % row, bytes(2000))

    store.commit_now(fill)
    store.close()
    return tmp_path / "m"


@pytest.mark.requires("strace")
def test_a_start_names_what_cannot_be_read(metadata: Path) -> None:
    pieces = -(-(metadata / DATA_FILE).stat().st_size // PIECE_BYTES)
    assert pieces > 2
    refused = 0
    for when in range(1, pieces + 1):
        strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(metadata / DATA_FILE), "-e", "trace=pread64"]
        done = subprocess.run(
            [*strace, "-e", f"inject=pread64:error=EIO:when={when}", sys.executable, "-c", OPEN, str(metadata)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        message, cause, correction = done.stdout.strip().split("|")
        assert message == f"the metadata file {metadata / DATA_FILE} cannot be read"
        assert cause == f"Input/output error between its bytes {(when - 1) * PIECE_BYTES} and {when * PIECE_BYTES}"
        assert "--restore-metadata" in correction
        refused += 1
    assert refused == pieces
    Store.open(metadata, reserve_bytes=0).close()


def test_unreadable_pages_are_named_and_whether_the_cache_has_them(
    metadata: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = metadata / DATA_FILE
    with ThroughFile(path) as file:
        assert not list(file.piece(0))
    lost, uncached = (8 * KIB, 40 * KIB), (40 * KIB,)
    real_disk, real_cache = ThroughFile._from_disk, ThroughFile._from_cache

    def broken(pages: tuple[int, ...], offset: int, length: int) -> bool:
        return any(offset <= page < offset + length for page in pages)

    def from_disk(self: ThroughFile, offset: int, length: int) -> str:
        return "Input/output error" if broken(lost, offset, length) else real_disk(self, offset, length)

    def from_cache(self: ThroughFile, offset: int, length: int) -> str:
        return "Input/output error" if broken(uncached, offset, length) else real_cache(self, offset, length)

    monkeypatch.setattr(ThroughFile, "_from_disk", from_disk)
    monkeypatch.setattr(ThroughFile, "_from_cache", from_cache)
    with ThroughFile(path) as file:
        found = list(file.piece(0))
        assert [(each.offset_bytes, each.is_cached) for each in found] == [(8 * KIB, True), (40 * KIB, False)]
        assert {each.problem for each in found} == {"Input/output error"}
        assert not list(file.piece(PIECE_BYTES))


def test_a_file_that_cannot_be_opened_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(MetadataFault):
        Store.open(tmp_path / "nothing", reserve_bytes=0)
