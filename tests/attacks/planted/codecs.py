"""Bugs for the attack "codecs": lengths that are believed, checksums that are not compared, pieces that matter."""

import struct

from blockvirt.api import wire
from blockvirt.nbd import handshake
from blockvirt.nbd.incoming import Incoming
from blockvirt.nbd.messages import parse_name
from blockvirt.snapshots import stream_reader
from tests.attacks.planted.bugs import Bug, replacing


def _believe_the_count(data: bytes) -> tuple[str, frozenset[int]]:
    (length,) = struct.unpack_from(">I", data)
    (count,) = struct.unpack_from(">H", data, 4 + length)
    requests = struct.unpack_from(f">{count}H", data, 6 + length)
    return parse_name(data[4 : 4 + length]), frozenset(requests)


_park = Incoming.park


def _park_too_little(self: Incoming) -> None:
    _park(self)
    self._parked = self._parked[:27]


class _AnyCrc(int):
    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


BUGS: tuple[Bug, ...] = (
    Bug(
        "counts-in-options-believed",
        "how many information requests an option has is taken from the option",
        ("I9",),
        "codecs",
        replacing(handshake, "parse_info_request", _believe_the_count),
        count=12_000,
        seed=1,
    ),
    Bug(
        "half-a-request-forgotten",
        "of a request that arrived in part only the header is kept while the connection rests",
        ("I4",),
        "codecs",
        replacing(Incoming, "park", _park_too_little),
        count=24_000,
        seed=1,
        is_quick=False,
    ),
    Bug(
        "stream-checksum-not-compared",
        "frames of a snapshot stream are believed whatever their checksum",
        ("I5",),
        "codecs",
        replacing(stream_reader, "frame_crc", lambda kind, body, chain: _AnyCrc(0)),
        count=24_000,
        seed=1,
        is_quick=False,
    ),
    Bug(
        "labels-cut-at-the-equals-sign",
        "a filter by labels is cut at its equals sign, which need not be there",
        (),
        "codecs",
        replacing(wire.LabelListQuery, "labels", lambda query: dict(each.split("=", 1) for each in query.label)),
        count=24_000,
        seed=1,
        is_quick=False,
    ),
)
