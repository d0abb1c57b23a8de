"""Idempotency-Key: a request that is sent again, because its answer was lost, gets the first one's answer.

Answers are kept for ``limits.IDEMPOTENCY_KEY_S``, at most ``limits.MAX_IDEMPOTENCY_KEYS`` of them; what failed is not
kept, since it changed nothing. A volume, a clone, a snapshot or a logical unit and the answer to its create are one
transaction. The answers about hosts, schedules and devices are kept right after: those are idempotent anyway, by their
name or their directory, so that whoever asks again after a crash in between gets what is there.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockvirt.errors import DamagedRecord, InvalidRequest, LimitReached, OperationPending
from blockvirt.limits import IDEMPOTENCY_KEY_S, MAX_IDEMPOTENCY_KEYS
from blockvirt.meta.keys import Table
from blockvirt.meta.records import IdempotencyRecord
from blockvirt.meta.store import Store, Writer

log = logging.getLogger("blockvirt.api")

_KEY = re.compile(r"[\x21-\x7e]{1,255}", re.ASCII)
SWEEP_ROWS = 16  # each answer kept looks at so many old ones: expired ones go faster than new ones come


class Idempotency:
    """The answers kept by key, and the keys whose requests are running."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._running: set[str] = set()
        self._sweep_from = b""

    def find(self, key: str, request_sha256: str) -> IdempotencyRecord | None:
        """Return the answer kept for a key; raises InvalidRequest where it was given to another request."""
        if _KEY.fullmatch(key) is None:
            raise InvalidRequest(
                "the Idempotency-Key cannot be used",
                correction="send 1 to 255 visible ASCII characters, such as a UUID",
            )
        with self._store.read() as reader:
            kept = reader.record(IdempotencyRecord, Table.IDEMPOTENCY, key.encode())
        if kept is None or self._expired(kept):
            return None
        if kept.request_sha256 != request_sha256:
            raise InvalidRequest(
                f"the Idempotency-Key {key[:80]!r} was used for another request",
                cause="a key stands for one request: method, path, query and body",
                correction="make a new key for each new request",
            )
        return kept

    @contextmanager
    def running(self, key: str) -> Iterator[None]:
        """Hold a key while its request runs; raises OperationPending where it runs already."""
        if key in self._running:
            raise OperationPending(
                f"the request with the Idempotency-Key {key[:80]!r} is still running",
                correction="ask again in a second",
            )
        self._running.add(key)
        try:
            yield
        finally:
            self._running.discard(key)

    def keep(self, writer: Writer, record: IdempotencyRecord) -> None:
        """Keep an answer, inside a transaction of the store; raises LimitReached where too many are kept."""
        self._sweep(writer)
        if writer.count(Table.IDEMPOTENCY) >= MAX_IDEMPOTENCY_KEYS:
            raise LimitReached(
                f"{MAX_IDEMPOTENCY_KEYS} answers are kept for Idempotency-Keys, which is the most",
                cause=f"each is kept for {IDEMPOTENCY_KEY_S // 3600} hours",
                correction="send the request without a key, under a name of your own: names are idempotent too",
            )
        writer.put_record(Table.IDEMPOTENCY, record.key.encode(), record)

    def answer(self, key: str, request_sha256: str, status: int, body: str, location: str) -> IdempotencyRecord:
        """Return the record of an answer given now."""
        return IdempotencyRecord(key, request_sha256, status, body, location, self._clock())

    async def keep_alone(self, record: IdempotencyRecord) -> None:
        """Keep an answer in a transaction of its own."""
        await self._store.commit(lambda writer: self.keep(writer, record))

    def _expired(self, record: IdempotencyRecord) -> bool:
        return self._clock() - record.created_s > IDEMPOTENCY_KEY_S

    def _sweep(self, writer: Writer) -> None:
        """Drop what has expired among the next few rows; where to go on is only a hint, so any thread may set it."""
        rows = []
        for key, _ in writer.scan(Table.IDEMPOTENCY, start=self._sweep_from):
            rows.append(key)
            if len(rows) == SWEEP_ROWS:
                break
        for key in rows:
            try:
                record = writer.record(IdempotencyRecord, Table.IDEMPOTENCY, key)
            except DamagedRecord as error:
                log.error("dropped: %s", error.message)
                writer.delete(Table.IDEMPOTENCY, key)
                continue
            if record is not None and self._expired(record):
                writer.delete(Table.IDEMPOTENCY, key)
        self._sweep_from = rows[-1] + b"\0" if len(rows) == SWEEP_ROWS else b""
