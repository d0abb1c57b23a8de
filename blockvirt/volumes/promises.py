"""Promised bytes: the sum of the sizes of all volumes, those in the trash included.

A running figure of the event loop: a grant is taken before its transaction starts and given back if that fails, so what
is on its way already counts and two requests cannot both get the last bytes.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from blockvirt.errors import DamagedRecord
from blockvirt.meta.keys import Table
from blockvirt.meta.records import VolumeRecord
from blockvirt.meta.store import Store
from blockvirt.volumes.allowance import Allowance, allowance, check_grant
from blockvirt.volumes.ports import PoolSpace

log = logging.getLogger("blockvirt.catalogue")


class Promises:
    """What the pool has promised. One per process."""

    def __init__(self, store: Store, space: PoolSpace) -> None:
        self._space = space
        self.promised_bytes = 0
        """Grants on their way included."""
        with store.read() as reader:
            for key, _ in reader.scan(Table.VOLUMES):
                try:
                    record = reader.record(VolumeRecord, Table.VOLUMES, key)
                except DamagedRecord as error:
                    log.error("volume %s is quarantined: %s", key.decode(errors="replace"), error.message)
                    continue
                if record is not None and not record.deleting:
                    self.promised_bytes += record.size_bytes

    def allowance(self) -> Allowance:
        """Return the largest volume one could get now, and what limits it."""
        return allowance(self._space.status(), self.promised_bytes)

    @contextmanager
    def grant(self, extra_bytes: int) -> Iterator[None]:
        """Promise ``extra_bytes`` more for the length of a transaction, for good if it succeeds.

        Raises PoolFull, OvercommitLimit. A negative number takes a promise back.
        """
        if extra_bytes > 0:
            check_grant(self._space.status(), self.promised_bytes, extra_bytes)
        self.promised_bytes += extra_bytes
        try:
            yield
        except Exception:  # not a cancellation: whether the transaction went through is unknown then, so it counts
            self.promised_bytes -= extra_bytes
            raise

    def release(self, size_bytes: int) -> None:
        """Take the promise of a volume back that is deleted for good."""
        self.promised_bytes -= size_bytes
