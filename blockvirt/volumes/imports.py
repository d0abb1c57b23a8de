"""Volumes that take in a snapshot stream: half of something until it is whole, so nobody else may use them meanwhile.

The mark lies in the volume's record (``VolumeRecord.importing``). It outlives the daemon: what a dead one left half
imported is taken back when the next one starts, before anybody is served.
"""

from blockvirt.errors import InUse
from blockvirt.meta.records import VolumeRecord

NEW = "new"
"""Marks a volume that the import itself made; otherwise the mark is the id of the snapshot that it goes on from."""


def check_not_importing(volume: VolumeRecord) -> None:
    """Return if no snapshot stream is being imported into a volume; raises InUse."""
    if volume.importing:
        goes_on = "" if volume.importing == NEW else f", which goes on from snapshot {volume.importing}"
        raise InUse(
            f"a snapshot stream is being imported into volume {volume.name!r}{goes_on}",
            cause="until the stream is whole the volume holds a part of it",
            correction="wait for the import, or end it: then the volume is as it was before; where none is at work any "
            "more the daemon's log says what keeps it from being taken back",
        )
