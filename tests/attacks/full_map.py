"""LMDB's map, full: which transaction finds it so. Each kind of transaction is tried, one after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lmdb
import pytest

from blockvirt.meta import group_commit
from blockvirt.meta.store import Store

_PRODUCT = ("api.", "lun.presentation.", "meta.", "snapshots.", "volumes.")


@dataclass(frozen=True, slots=True)
class Place:
    """A transaction of a scenario."""

    kind: str
    """The function that makes its change."""
    nth: int
    """Of those of its kind."""
    is_of_requests: bool
    """In the scenario ``Requests``; else in that of guests."""

    def __str__(self) -> str:
        return f"{self.kind} number {self.nth}"


_OF_GUESTS: Mapping[str, int] = {
    "volumes.engine.pool_record": 1,
    "volumes.storage.PoolStorage._add": 2,
    "volumes.reclaim.adopt_rows": 3,
    "volumes.catalogue.Catalogue.create": 2,
    "volumes.tail.BranchFiles.create.change": 3,
    "volumes.checkpoint._commit.write": 6,
    "snapshots.sealing._put": 1,
    "snapshots.sealing._forget": 1,
    "volumes.recovery._commit.change": 2,
    "snapshots.catalogue.Snapshots._delete": 1,
    "volumes.jobs.JobBoard._commit_move.change": 4,
    "volumes.reclaim._step": 1,
    "volumes.reclaim._end": 2,
    "volumes.punch.Puncher._punch.forget": 1,
    "volumes.catalogue.Catalogue.delete": 1,
    "volumes.deletion._remove_snapshots": 1,
    "volumes.deletion._remove_volume": 1,
    "volumes.reclaim._delete_rows": 7,
    "volumes.reclaim._forget_branch": 1,
}
"""How many transactions of each kind a run has at least, whatever the dice choose."""

_OF_REQUESTS: Mapping[str, int] = {
    "volumes.catalogue.Catalogue.change": 2,
    "volumes.catalogue.Catalogue.set_policy.apply": 1,
    "volumes.catalogue.Catalogue.delete": 4,
    "volumes.catalogue.Catalogue.create": 4,
    "volumes.checkpoint._commit.write": 7,
    "snapshots.catalogue.Snapshots._set_hold": 2,
    "snapshots.revert.Reverts._revert": 1,
    "snapshots.scrub.Scrubbing.start": 1,
    "snapshots.scrub_run.ScrubRun._save.note": 1,
    "api.idempotency.Idempotency.keep_alone": 1,
    "lun.presentation.Presentation.create_host": 1,
    "lun.presentation.Presentation.map.change": 1,
    "lun.presentation.Presentation.unmap": 2,
    "lun.presentation.Presentation.delete_host": 2,
    "lun.presentation.Presentation.finish_deletions": 2,
    "snapshots.schedules.Schedules.create": 1,
    "snapshots.schedules.Schedules.change.apply": 1,
    "snapshots.schedule_worker._note": 1,
    "snapshots.schedules.Schedules.delete": 1,
    "snapshots.importing._Import._go_on": 1,
    "snapshots.import_transactions.take_back": 1,
    "snapshots.flatten.Flattening.start": 1,
    "snapshots.flatten.Flattening._finish": 1,
    "volumes.storage.PoolStorage._remove": 1,
    "volumes.volume.Volume.note_stop": 1,
    "volumes.leftovers.Leftovers.settle": 1,
    "volumes.trash._restore": 1,
    "volumes.trash._purge": 1,
    "meta.store.Store.check_reserve": 1,
}
"""As above; some of them are of guests, too, and other verbs lead to them here."""

_OF_LONG_JOBS = "volumes.jobs.JobBoard._save"
"""How far a job has come: nobody's request fails of it, and it comes again."""

PLACES: tuple[Place, ...] = tuple(
    Place(kind, nth, is_of_requests)
    for kinds, is_of_requests in ((_OF_GUESTS, False), (_OF_REQUESTS, True))
    for kind, most in kinds.items()
    for nth in range(1, most + 1)
)
AT_A_TIME = 3
"""Places that one trial tries, each in a pool of its own: so a prove comes to all of them."""
_MOST = (1, 2, 1000)
"""So many transactions in a row find no room."""


def places_of(trial: int) -> list[tuple[Place, int]]:
    """Return the places that a trial tries, and how many transactions find no room in each: all in turn."""
    numbers = [divmod(AT_A_TIME * trial + number, len(PLACES)) for number in range(AT_A_TIME)]
    return [(PLACES[place], _MOST[(place + turn) % len(_MOST)]) for turn, place in numbers]


class FullMap:
    """Transactions that find the map full from some place on, and no way to make it larger."""

    def __init__(self, place: Place, most: int) -> None:
        self.place = place
        self.most = most
        """So many in a row."""
        self.hits = 0
        self.met: dict[str, int] = {}
        """How many transactions of each kind there were."""
        self._left = 0
        self._is_past = False
        self._real: Callable[..., Any] = group_commit.run_group

    def put_in(self, patch: pytest.MonkeyPatch) -> None:
        """Stand in for the store's transactions."""
        patch.setattr("blockvirt.meta.store.run_group", self._run_group)
        patch.setattr(Store, "_grow", lambda store, *, wait: False)

    def make_room(self) -> None:
        """No transaction finds the map full any more, or not before its place comes."""
        self._left = 0

    def end(self) -> None:
        """None will."""
        self.make_room()
        self._is_past = True

    def demand(self) -> None:
        """Raise RuntimeError where its place never came, or a transaction is of no kind that is tried."""
        if not self.hits:
            raise RuntimeError(f"the attack proves nothing: no transaction is {self.place}")
        known = {*_OF_GUESTS, *_OF_REQUESTS, _OF_LONG_JOBS}
        if unknown := [kind for kind in self.met if kind not in known and kind.startswith(_PRODUCT)]:
            raise RuntimeError(f"the attack never tries {', '.join(unknown)}: add what is missing to its places")

    def _run_group(self, env: Any, tables: Any, changes: Sequence[Any]) -> Any:
        for change in changes:
            kind = kind_of(change)
            self.met[kind] = self.met.get(kind, 0) + 1
            if not self._is_past and kind == self.place.kind and self.met[kind] == self.place.nth:
                self._is_past, self._left = True, self.most
        if self._left:
            self._left -= 1
            self.hits += 1
            raise lmdb.MapFullError("planted")
        return self._real(env, tables, changes)


def kind_of(change: Any) -> str:
    """Name what changes the metadata, by its function: "volumes.checkpoint._commit"."""
    while isinstance(change, partial):
        change = change.func
    within = change.__qualname__.replace(".<locals>", "").replace(".<lambda>", "")
    return f"{change.__module__.removeprefix('blockvirt.')}.{within}"
