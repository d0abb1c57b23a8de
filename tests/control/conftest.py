"""A catalogue and a presentation over a real store, with the rooms around them as stand-ins."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockvirt.lun.presentation import Presentation
from blockvirt.meta.store import Store
from blockvirt.volumes.catalogue import Catalogue
from tests.control.ports import Clock, OpenVolumes, Sessions, Space, new_store


@dataclass
class Control:
    """Everything a test of the control plane touches."""

    store: Store
    sessions: Sessions
    open_volumes: OpenVolumes
    space: Space
    clock: Clock
    catalogue: Catalogue
    presentation: Presentation

    def reload(self) -> Catalogue:
        """A catalogue as after a restart."""
        return Catalogue(self.store, self.open_volumes, self.space, clock=self.clock)


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    """An empty pool of 100 GiB."""
    store = new_store(tmp_path / "meta")
    sessions = Sessions()
    open_volumes = OpenVolumes(sessions)
    space = Space(store)
    clock = Clock()
    yield Control(
        store,
        sessions,
        open_volumes,
        space,
        clock,
        Catalogue(store, open_volumes, space, clock=clock),
        Presentation(store, sessions, clock=clock),
    )
    store.close()
