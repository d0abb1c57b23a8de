"""nbdinfo, nbdcopy, qemu-img and qemu-io against a running server."""

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.real.clients import ClientFailed, qemu_io, run
from tests.real.conftest import GIB
from tests.real.process import ServerProcess

KIB = 1 << 10
MIB = 1 << 20


pytestmark = pytest.mark.requires("nbdinfo", "nbdcopy", "qemu-img", "qemu-io")


def sparse_image(path: Path, seed: int) -> int:
    """A 1 GiB file with random data in some places, zeros written in others and holes elsewhere; its data bytes."""
    generator = random.Random(seed)
    data_bytes = 0
    with path.open("wb") as image:
        image.truncate(GIB)
        for _ in range(40):
            length = generator.choice([512, 4 * KIB, 65 * KIB, 1 * MIB + 512])
            image.seek(generator.randrange(0, (GIB - length) // 512) * 512)
            image.write(generator.randbytes(length))
            data_bytes += length
        image.seek(700 * MIB)
        image.write(bytes(MIB))
    return data_bytes


def extents(uri: str) -> list[dict[str, object]]:
    """What `qemu-img map` makes of base:allocation."""
    listed = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", uri))
    assert isinstance(listed, list)
    return listed


def data_bytes(uri: str) -> int:
    """Bytes that the server reports as data."""
    return sum(int(str(extent["length"])) for extent in extents(uri) if extent["data"])


def test_nbdinfo_says_what_the_volume_is(server: ServerProcess) -> None:
    described = json.loads(run("nbdinfo", "--json", server.uri))
    assert described["protocol"] == "newstyle-fixed"
    (export,) = described["exports"]
    assert export["export-size"] == GIB
    assert export["is_read_only"] is False
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_multi_conn", "can_cache"):
        assert export[ability] is True, ability
    assert export["contexts"][0] == "base:allocation"
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 * MIB]


def test_a_volume_nobody_has_is_refused_and_the_next_client_served(server: ServerProcess) -> None:
    with pytest.raises(ClientFailed):
        run("nbdinfo", server.uri.replace("/v?", "/nobody?"))
    run("nbdinfo", server.uri)


def test_nbdcopy_both_ways_keeps_bytes_and_holes(server: ServerProcess, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    sparse_image(source, seed=1)
    run("nbdcopy", "--flush", source, server.uri)
    run("nbdcopy", server.uri, back)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, back)
    assert back.stat().st_blocks * 512 < 64 * MIB, "holes became data on the way back"


def test_nbdcopy_survives_a_crash_after_its_flush(server: ServerProcess, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    sparse_image(source, seed=2)
    run("nbdcopy", "--flush", source, server.uri)
    server.crash_and_restart()
    run("nbdcopy", server.uri, back)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, back)


def test_qemu_img_converts_compares_and_maps(server: ServerProcess, tmp_path: Path) -> None:
    source, qcow2 = tmp_path / "source", tmp_path / "copy.qcow2"
    written_bytes = sparse_image(source, seed=3)
    assert data_bytes(server.uri) == 0, "a fresh volume is one hole"
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, server.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, server.uri)
    # Every write is rounded to chunks at both ends, and zeros written on purpose may count as data or not.
    assert written_bytes <= data_bytes(server.uri) <= written_bytes + 40 * 128 * KIB + MIB
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri, qcow2)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", server.uri, qcow2)


def test_qemu_img_compare_sees_one_changed_byte(server: ServerProcess, tmp_path: Path) -> None:
    source = tmp_path / "source"
    sparse_image(source, seed=4)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, server.uri)
    qemu_io(server, "write -P 0x5a 536870913 1")
    with pytest.raises(ClientFailed, match="mismatch"):
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, server.uri)


def test_unaligned_writes_leave_their_neighbours_alone(server: ServerProcess) -> None:
    qemu_io(
        server,
        "write -P 1 0 192k",
        "write -P 2 65535 2",  # over a chunk's edge
        "write -P 3 100001 3071",
        "write -P 4 131000 70000",  # the rest of a chunk, all of none, and into fresh chunks
    )
    qemu_io(
        server,
        "read -P 1 0 65535",
        "read -P 2 65535 2",
        f"read -P 1 65537 {100001 - 65537}",
        "read -P 3 100001 3071",
        f"read -P 1 103072 {131000 - 103072}",
        "read -P 4 131000 70000",
        "read -P 0 201000 1M",
    )


def test_zeroes_and_discards_read_as_zeros(server: ServerProcess) -> None:
    qemu_io(
        server,
        "write -P 7 0 8M",
        "write -z 1M 1M",
        "write -z -u 2M 1M",
        "discard 3M 1M",
        "write -z 4194305 65537",  # neither end on a chunk
        "write -z -u 5000001 200003",
        "discard 6000128 300032",
        "flush",
    )
    expected = (
        "read -P 7 0 1M",
        "read -P 0 1M 3M",
        "read -P 7 4M 1",
        "read -P 0 4194305 65537",
        f"read -P 7 {4194305 + 65537} {5000001 - 4194305 - 65537}",
        "read -P 0 5000001 200003",
        f"read -P 7 5200004 {6000128 - 5200004}",
        "read -P 0 6000128 300032",
        f"read -P 7 6300160 {8 * MIB - 6300160}",
    )
    qemu_io(server, *expected)
    server.crash_and_restart()
    qemu_io(server, *expected)


def test_a_pattern_that_was_not_written_is_noticed(server: ServerProcess) -> None:
    qemu_io(server, "write -P 1 0 4k")
    with pytest.raises(ClientFailed, match="Pattern verification failed"):
        qemu_io(server, "read -P 2 0 4k")


def test_discard_gives_space_back(server: ServerProcess) -> None:
    qemu_io(server, "write -P 9 0 16M", "flush")
    assert data_bytes(server.uri) == 16 * MIB
    qemu_io(server, "discard 0 16M", "flush")
    assert data_bytes(server.uri) == 0


def test_requests_past_the_end_fail_and_harm_nothing(server: ServerProcess) -> None:
    qemu_io(server, f"write -P 1 {GIB - 4096} 4k", f"read -P 1 {GIB - 4096} 4k")
    with pytest.raises(ClientFailed):
        qemu_io(server, f"write -P 2 {GIB - 2048} 4k")
    qemu_io(server, f"read -P 1 {GIB - 4096} 4k")


class OpenQemuIo:
    """A qemu-io that stays connected and takes commands one at a time."""

    def __init__(self, server: ServerProcess) -> None:
        self._process = subprocess.Popen(
            ["qemu-io", "-f", "raw", server.uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )

    def ask(self, command: str) -> None:
        """Run one command on the open connection; raises ClientFailed when it fails."""
        commands, answers = self._pipes()
        commands.write(f"{command}\n")
        commands.flush()
        said = ""
        while " ops;" not in said:  # the last words of a read or write that ended, well or not
            line = answers.readline()
            said += line
            if not line or "failed" in line.lower() or "error" in line.lower():
                raise ClientFailed(f"{command}: {said}")

    def close(self) -> None:
        """Disconnect."""
        commands, answers = self._pipes()
        commands.close()
        self._process.wait(30)
        answers.close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout


@pytest.fixture
def connect() -> Iterator[Callable[[ServerProcess], OpenQemuIo]]:
    opened: list[OpenQemuIo] = []

    def start(server: ServerProcess) -> OpenQemuIo:
        opened.append(OpenQemuIo(server))
        return opened[-1]

    yield start
    for client in opened:
        client.close()


def test_two_connections_read_each_others_writes(
    server: ServerProcess, connect: Callable[[ServerProcess], OpenQemuIo]
) -> None:
    one, two = connect(server), connect(server)
    generator = random.Random(5)
    for turn in range(1, 200):
        writer, reader = (one, two) if turn % 2 else (two, one)
        # Few places, so that most writes land on what the other wrote; no flush in between.
        offset = generator.randrange(16) * 32 * KIB + generator.choice([0, 1, 511, 4096])
        length = generator.choice([1, 512, 4096, 40_000, 200_000])
        writer.ask(f"write -P {turn} {offset} {length}")
        reader.ask(f"read -P {turn} {offset} {length}")


def test_the_two_connections_notice_a_wrong_byte(
    server: ServerProcess, connect: Callable[[ServerProcess], OpenQemuIo]
) -> None:
    one, two = connect(server), connect(server)
    one.ask("write -P 1 0 4k")
    with pytest.raises(ClientFailed, match="Pattern verification failed"):
        two.ask("read -P 2 0 4k")
