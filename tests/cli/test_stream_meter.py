"""The line of progress: what it reads off a stream that goes by in pieces of any size, and off what is none."""

import pytest

from blockvirt.cli.stream_meter import Progress, StreamMeter
from blockvirt.snapshots.stream_reader import StreamData, StreamZeros
from tests.snapshots.streams import KIB, RANGES, Range, header_for, length_of, stream_of

STREAM = stream_of(header_for(RANGES), RANGES)
COVERED = sum(length_of(part) for part in RANGES)


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, len(STREAM) * 2])
def test_it_follows_streams_that_lie_one_behind_the_other(piece_bytes: int) -> None:
    second: list[Range] = [StreamZeros(0, 5 * KIB), StreamData(8 * KIB, b"x" * 999)]
    both = STREAM + stream_of(header_for(second), second)
    meter, seen = StreamMeter(), set()
    for at in range(0, len(both), piece_bytes):
        meter.feed(both[at : at + piece_bytes])
        seen.add((meter.name, meter.changed_bytes, meter.covered_bytes))
    assert ("debian@tuesday", 5 * KIB + 999, 5 * KIB + 999) in seen
    assert ("debian@tuesday", COVERED, COVERED) in seen or piece_bytes > len(STREAM)
    assert meter.covered_bytes == 5 * KIB + 999


@pytest.mark.parametrize("noise", [b"", b"\0" * 1000, b"\xff" * 1000, STREAM[:200] + b"\xff" * 1000, STREAM[16:]])
def test_what_is_no_stream_is_no_concern_of_its(noise: bytes) -> None:
    progress = Progress()
    for at in range(0, len(noise), 11):
        progress.meter.feed(noise[at : at + 11])
    assert len(progress.line(1.0, 79)) <= 79


def test_the_line_has_percent_rate_and_time_left() -> None:
    progress = Progress()
    zeros: list[Range] = [StreamZeros(0, 16 * KIB), StreamZeros(16 * KIB, 16 * KIB)]
    stream = stream_of(header_for(zeros), zeros)
    frame = len(stream) - len(stream_of(header_for(zeros[:1]), zeros[:1]))
    trailer = 9 + 56
    assert progress.line(0.0, 79) == ""
    progress.meter.feed(stream[: -trailer - 2 * frame])
    assert progress.line(10.0, 79) == f"debian@tuesday  [{'.' * 24}]   0.0%"
    progress.meter.feed(stream[-trailer - 2 * frame : -trailer - frame])
    assert progress.line(12.0, 79) == f"debian@tuesday  [{'#' * 12}{'.' * 12}]  50.0%  8KiB/s  2s left"
    assert progress.line(12.0, 30) == "debian@tuesday  [############."
    progress.meter.feed(stream[-trailer - frame :])
    assert "100.0%" in progress.line(13.0, 79)
    assert progress.line(13.0, 79).endswith("0s left")
