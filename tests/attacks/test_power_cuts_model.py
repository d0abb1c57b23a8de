"""What a sector may hold after a power cut: the content of one write, or what the kernel made of two."""

from tests.attacks.power_cuts_model import Allowed, content, judge, sector_content, writers


def torn(first: int, then: int, sector: int, at: int = 192) -> bytes:
    return sector_content(first, sector)[:at] + sector_content(then, sector)[at:]


def test_what_was_written_may_be_there_and_nothing_else() -> None:
    data = content(7, 0, 2) + content(0, 2, 1)
    assert not judge("v", data, [(6, 7), (7,), (0,)])
    assert "sector 1 of v holds write 7, and may hold zeros" in judge("v", data, [(7,), (0,), (0,)])
    assert "bytes instead of" in judge("v", data, [(7,)])
    assert "write 7 of sector 1" in judge("v", content(7, 1, 1), [(7,)]), "somebody else's"


def test_a_sector_that_is_written_while_the_kernel_writes_it_back_may_be_torn() -> None:
    for data in (torn(7, 8, 0), torn(8, 7, 0), torn(0, 8, 0)):
        assert not judge("v", data, [(0, 7, 8)])
    for allowed in ((7,), (8,), (7, 9)):
        assert "is a mixture" in judge("v", torn(7, 8, 0), [allowed]), "of a write that nothing of may be left"
    assert "is a mixture" in judge("v", torn(7, 8, 1), [(7, 8)]), "of another sector"


def test_a_torn_sector_stays_as_it_was_found() -> None:
    data = torn(7, 8, 0) + content(7, 1, 1)
    found = writers(data)
    assert found[0] < 0
    assert found[1] == 7
    settled: Allowed = [(number,) for number in found]
    assert not judge("v", data, settled)
    assert "is a mixture" in judge("v", torn(7, 8, 0, 208) + content(7, 1, 1), settled)
    assert judge("v", content(8, 0, 1) + content(7, 1, 1), settled)
