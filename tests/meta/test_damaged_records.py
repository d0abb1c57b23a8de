"""What a damaged record is called: by its id as people know it, by hex digits where the key is no text."""

import pytest

from blockvirt.errors import DamagedRecord
from blockvirt.ids import new_id
from blockvirt.meta.keys import number_key
from blockvirt.meta.records import RECORD_VERSION, BranchRecord, SnapshotRecord, decode, punch_count, seal


def test_a_record_is_named_by_its_id() -> None:
    snapshot_id = new_id()
    with pytest.raises(DamagedRecord) as caught:
        decode(SnapshotRecord, snapshot_id.encode(), b"something else")
    assert caught.value.message == f"the metadata record of snapshot {snapshot_id} is damaged"
    assert caught.value.details["what"] == f"snapshot {snapshot_id}"


@pytest.mark.parametrize("key", [number_key(7), number_key(0x41_42_43_44), b"\x7f", "ü".encode(), b"a b\n", b""])
def test_a_key_that_is_no_text_is_shown_in_hex(key: bytes) -> None:
    with pytest.raises(DamagedRecord) as caught:
        decode(BranchRecord, key, b"something else")
    assert caught.value.message == f"the metadata record of branch {key.hex()} is damaged"


def test_a_row_that_its_name_does_not_tell_is_named_by_its_key() -> None:
    with pytest.raises(DamagedRecord, match=r"of a punch row is damaged \(key 0000000000000007\)$"):
        punch_count(number_key(7), seal(b"another", b"1"))


@pytest.mark.parametrize(
    "body",
    [b"", b"no JSON", b"\xff", b"[1]", b'{"id":"x"}', b"[" * 4000, b"1" * 5000],
    ids=lambda body: repr(body[:10]),
)
def test_what_is_no_record_behind_a_checksum_that_fits_is_damaged_too(body: bytes) -> None:
    with pytest.raises(DamagedRecord, match="of snapshot k is damaged") as caught:
        decode(SnapshotRecord, b"k", seal(b"k", bytes([RECORD_VERSION]) + body))
    assert "its fields cannot be understood" in caught.value.cause
    assert caught.value.correction
