"""Random histories of the catalogue against a dictionary, with a restart now and then."""

import asyncio
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockvirt.errors import BlockvirtError
from blockvirt.meta.keys import Table
from blockvirt.volumes.catalogue import Catalogue
from blockvirt.volumes.requests import NewVolume, VolumeChange
from tests.control.ports import OpenVolumes, Sessions, Space, new_store

CAPACITY = 512 * 10
RATIO = 2.0
NAMES = st.sampled_from(["a", "b", "c"])
SIZES = st.integers(1, 12).map(lambda sectors: sectors * 512)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), NAMES, SIZES),
        st.tuples(st.just("grow"), NAMES, SIZES),
        st.tuples(st.just("rename"), NAMES, NAMES),
        st.tuples(st.just("delete"), NAMES, st.just(0)),
        st.tuples(st.just("restart"), NAMES, st.just(0)),
    ),
    max_size=30,
)
Step = tuple[str, str, int | str]


def expected(model: dict[str, int], step: Step) -> bool:
    """Do a step to the model (name -> size); False where it must be refused."""
    verb, name, value = step
    room = int(CAPACITY * RATIO) - sum(model.values())
    if verb == "restart":
        return True
    if verb == "create":
        assert isinstance(value, int)
        if name in model:
            return model[name] == value
        if value > room:
            return False
        model[name] = value
        return True
    if name not in model:
        return False
    if verb == "delete":
        del model[name]
        return True
    if verb == "rename":
        assert isinstance(value, str)
        if value in model and value != name:
            return False
        model[value] = model.pop(name)
        return True
    assert isinstance(value, int)
    if value < model[name] or value - model[name] > room:
        return False
    model[name] = value
    return True


async def done(catalogue: Catalogue, step: Step) -> bool:
    verb, name, value = step
    try:
        if verb == "create":
            await catalogue.create(NewVolume(int(value), name))
        elif verb == "grow":
            await catalogue.change(name, VolumeChange(size_bytes=int(value)))
        elif verb == "rename":
            await catalogue.change(name, VolumeChange(name=str(value)))
        elif verb == "delete":
            await catalogue.delete(name)
    except BlockvirtError:
        return False
    return True


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_random_histories_match_a_dictionary(steps: list[Step]) -> None:
    async def history() -> None:
        with tempfile.TemporaryDirectory() as directory:
            store = new_store(Path(directory), overcommit_ratio=RATIO)
            open_volumes, space = OpenVolumes(Sessions()), Space(store, capacity_bytes=CAPACITY)
            catalogue = Catalogue(store, open_volumes, space)
            model: dict[str, int] = {}
            branches: set[int] = set()
            for step in steps:
                if step[0] == "restart":
                    catalogue = Catalogue(store, open_volumes, space)
                assert await done(catalogue, step) == expected(model, step), step
                found = {volume.name: volume.size_bytes for volume in (await catalogue.list()).volumes}
                assert found == model
                assert catalogue.promised_bytes == sum(model.values())
                assert catalogue.count() == len(model)
                with store.read() as reader:
                    numbers = {int.from_bytes(key) for key, _ in reader.scan(Table.BRANCHES)}
                assert branches <= numbers, "no branch is handed out twice"
                branches = numbers
            store.close()

    asyncio.run(history())
