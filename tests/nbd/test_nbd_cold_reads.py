"""Reads that the volume cannot answer at once."""

import random
from collections.abc import Sequence

import pytest

from blockvirt.device import Read
from blockvirt.errors import DeviceFault
from blockvirt.nbd import constants as c
from blockvirt.testing.memory_volume import MemoryVolume
from blockvirt.units import KIB
from tests.nbd.conftest import Bench

COUNT = 20


async def test_those_that_come_together_go_together(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few calls of the volume for the cold reads of a turn, and each is answered by itself."""
    content = random.Random(1).randbytes(COUNT * KIB)
    bench.disk.now = False
    bench.disk.store(0, memoryview(content))
    calls: list[int] = []
    read = MemoryVolume.read

    async def noted(self: MemoryVolume, reads: Sequence[Read]) -> Sequence[Exception | None]:
        calls.append(len(reads))
        outcomes = await read(self, reads)
        return [
            DeviceFault("gone") if offset == 4 * KIB else outcome
            for (offset, _), outcome in zip(reads, outcomes, strict=True)
        ]

    monkeypatch.setattr(MemoryVolume, "read", noted)
    client = await bench.enter()
    replies = [client.start(c.CMD_READ, number * KIB, KIB) for number in range(COUNT)]
    answers = [await reply for reply in replies]
    assert [answer.error for answer in answers] == [5 if number == 4 else 0 for number in range(COUNT)]
    expected = [content[number * KIB : (number + 1) * KIB] for number in range(COUNT)]
    expected[4] = b""
    assert [bytes(answer.data) for answer in answers] == expected
    assert calls == [16, 4]
