"""Labels: whatever happens to the file, it is the same label, or it is recognised as no label."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockvirt.checksum import crc32c
from blockvirt.errors import DeviceFault
from blockvirt.ids import new_id
from blockvirt.pool.labels import LABEL_FILE, DeviceLabel, decode_label, encode_label, read_label, write_label

LABEL = DeviceLabel("0f8fad5b-d9cb-469f-a165-70867728950e", "7c9e6679-7425-40de-944b-e07fc1f90ae7", 1790000005.1234567)
"""Its time has so many digits that another last one is the same number."""
HERE = Path("disk") / LABEL_FILE


def test_a_label_comes_back(tmp_path: Path) -> None:
    assert read_label(tmp_path) is None
    write_label(tmp_path, LABEL)
    assert read_label(tmp_path) == LABEL
    other = DeviceLabel(new_id(), LABEL.pool, 0.0)
    write_label(tmp_path, other)
    assert read_label(tmp_path) == other
    assert [entry.name for entry in tmp_path.iterdir()] == [LABEL_FILE]


def test_a_label_that_was_cut_short_is_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", lambda fd, data: real(fd, data[: len(data) // 2]))
        with pytest.raises(OSError, match="No space left"):
            write_label(tmp_path, LABEL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bit", range(8))
def test_one_flipped_bit_is_found(bit: int) -> None:
    for at in range(len(encode_label(LABEL))):
        content = bytearray(encode_label(LABEL))
        content[at] ^= 1 << bit
        with pytest.raises(DeviceFault, match=LABEL_FILE):
            decode_label(bytes(content), HERE)


@given(st.integers(0, len(encode_label(LABEL)) - 2))
def test_a_cut_label_is_found(length: int) -> None:
    with pytest.raises(DeviceFault, match="damaged"):
        decode_label(encode_label(LABEL)[:length], HERE)


def sealed(**fields: object) -> bytes:
    """A label with these fields and a checksum that fits."""
    body = json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()
    fields["checksum"] = f"{crc32c(body):08x}"
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "damaged"),
        (b"[1]", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 4000, "damaged"),
        (sealed(device=LABEL.device, pool=LABEL.pool, created_s=0.0, format=2, more=1), "device format 2"),
        (sealed(device=LABEL.device, pool=LABEL.pool, created_s=0.0, format=1, more=1), "damaged"),
        (sealed(device="disk", pool=LABEL.pool, created_s=0.0, format=1), "damaged"),
        (sealed(device=LABEL.device, format=1), "damaged"),
        (encode_label(LABEL).replace(b",", b", "), "damaged"),
    ],
)
def test_what_is_no_label_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / LABEL_FILE).write_bytes(content)
    with pytest.raises(DeviceFault, match=says) as caught:
        read_label(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert caught.value.correction


def test_a_label_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    os.symlink("elsewhere", tmp_path / LABEL_FILE)
    with pytest.raises(DeviceFault, match="cannot be read"):
        read_label(tmp_path)
