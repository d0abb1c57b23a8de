"""The targets of the fuzzing: what goes well is taken, and each target can fail."""

import pytest

from blockvirt.api import guards
from blockvirt.lun import leaf
from blockvirt.meta import records
from blockvirt.nbd.incoming import Incoming
from blockvirt.pool import labels
from blockvirt.snapshots import cron, stream_reader
from blockvirt.volumes import journal, journal_frames
from tests.attacks.codecs import shares
from tests.attacks.codecs_targets import TARGETS
from tests.attacks.codecs_wire_targets import in_pieces


def check_all(name: str) -> None:
    """Give a target all of its examples."""
    for example in TARGETS[name].examples():
        TARGETS[name].check(example)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_examples_and_what_is_cut_out_of_them(name: str) -> None:
    target = TARGETS[name]
    for example in target.examples():
        for length in (0, 1, 2, len(example) // 2, len(example) - 1, len(example)):
            target.check(example[:length])


def test_pieces_are_the_whole() -> None:
    content = bytes(range(100))
    for seed in range(20):
        assert b"".join(in_pieces(content, seed)) == content
    assert len({tuple(in_pieces(content, seed)) for seed in range(20)}) > 10


def test_executions_are_shared_by_all_targets() -> None:
    assert shares(len(TARGETS) * 5) == dict.fromkeys(TARGETS, 5)
    assert sum(shares(100).values()) == 100
    assert len(shares(1)) == 1


@pytest.mark.parametrize(
    ("name", "owner", "attribute"),
    [
        ("record", records, "decode"),
        ("leaf", leaf, "decode"),
        ("frames", journal_frames, "read_frames"),
        ("header", journal, "unpack_header"),
        ("label", labels, "decode_label"),
        ("stream", stream_reader, "decode_header"),
        ("body", guards, "json_depth"),
        ("cron", cron, "check_cron"),
    ],
)
def test_an_error_that_nobody_promised_is_a_failure(
    name: str, owner: object, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(owner, attribute, fail)
    with pytest.raises(ZeroDivisionError):
        check_all(name)


def test_a_record_that_is_believed_without_its_checksum_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "unseal", lambda key, stored, *, what: stored[:-4])
    example = TARGETS["record"].examples()[0]
    with pytest.raises(AssertionError, match="believed"):
        TARGETS["record"].check(example[:-1] + b"x")


def test_requests_that_depend_on_pieces_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    park = Incoming.park

    def forget(self: Incoming) -> None:
        park(self)
        self._parked = b""

    monkeypatch.setattr(Incoming, "park", forget)
    with pytest.raises(AssertionError):
        check_all("requests")
