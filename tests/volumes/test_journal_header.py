"""The header block of a journal's files: what is none is damage, never a surprise."""

import pytest

from blockvirt.errors import DamagedRecord
from blockvirt.meta.records import seal
from blockvirt.volumes.journal import JournalHeader, pack_header, unpack_header


def block(body: bytes) -> bytes:
    """A header block whose checksum fits."""
    sealed = seal(b"journal", body)
    return len(sealed).to_bytes(4, "little") + sealed


def test_a_header_comes_back() -> None:
    header = JournalHeader("pool", 3, {"device": "identity"})
    assert unpack_header(pack_header(header)) == header


@pytest.mark.parametrize(
    "content",
    [
        bytes(4096),
        b"\xff" * 4096,
        pack_header(JournalHeader("pool", 3))[:60],
        block(b"no JSON"),
        block(b"[1]"),
        block(b'{"branch":3}'),
        block(b'{"branch":3,"pool_id":"x","more":1}'),
        block(b'{"branch":3,"pool_id":"x","format_version":2}'),
        block(b"[" * 3000),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_header_is_damaged(content: bytes) -> None:
    with pytest.raises(DamagedRecord) as caught:
        unpack_header(content)
    assert caught.value.correction
