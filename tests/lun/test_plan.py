"""Plans: every byte goes where the map says, once, and the write rule decides in place, new or copy."""

from hypothesis import given
from hypothesis import strategies as st

from blockvirt.lun.address import ADDRESS_MASK, FRESH, address
from blockvirt.lun.plan import Action, plan_read, plan_write

SHIFT = 3  # chunks of 8 bytes
CHUNK = 1 << SHIFT
CHUNKS = 12
SIZE = CHUNK * CHUNKS

entry = st.one_of(
    st.just(0), st.builds(lambda chunk, flag: address(1, chunk) | flag, st.integers(0, 20), st.sampled_from([0, FRESH]))
)
maps = st.lists(entry, min_size=CHUNKS, max_size=CHUNKS)
spans = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda span: (span[0], min(span[1], SIZE - span[0]))
)


@given(maps, spans)
def test_read_steps_cover_the_range_once_and_follow_the_map(table: list[int], span: tuple[int, int]) -> None:
    offset, length = span
    at = 0
    for step in plan_read(table.__getitem__, offset, length, SHIFT):
        assert step.start == at
        for index in range(step.length):
            byte = offset + at + index
            want = table[byte >> SHIFT] & ADDRESS_MASK
            if not step.entry:
                assert not want
            else:
                position = step.within + index
                assert (step.entry + (position >> SHIFT), position % CHUNK) == (want, byte % CHUNK)
        at += step.length
    assert at == length


@given(maps, spans, st.integers(SIZE - CHUNK + 1, SIZE))
def test_write_steps_cover_the_range_once_and_obey_the_write_rule(
    table: list[int], span: tuple[int, int], volume_bytes: int
) -> None:
    offset = min(span[0], volume_bytes - 1)
    length = min(span[1], volume_bytes - offset)
    at = 0
    for step in plan_write(table.__getitem__, offset, length, SHIFT, volume_bytes):
        assert step.start == at
        assert step.chunk == (offset + at) >> SHIFT
        assert step.within == (offset + at) % CHUNK
        for index in range(step.count):
            old = table[step.chunk + index]
            start = max(offset, (step.chunk + index) * CHUNK)
            end = min(volume_bytes, (step.chunk + index + 1) * CHUNK)
            is_whole = start == (step.chunk + index) * CHUNK and offset + length >= end
            if step.action is Action.OVERWRITE:
                assert old == step.entry + index
                assert old >= FRESH
            elif step.action is Action.COPY:
                assert step.count == 1
                assert 0 < old < FRESH
                assert not is_whole
                assert step.entry == old
            else:
                assert not old or (old < FRESH and is_whole)
        at += step.length
    assert at == length


def test_neighbours_are_merged() -> None:
    table = [address(1, 5 + chunk) | FRESH for chunk in range(CHUNKS)]
    assert len(plan_write(table.__getitem__, 3, SIZE - 3, SHIFT, SIZE)) == 1
    assert len(plan_read(table.__getitem__, 3, SIZE - 3, SHIFT)) == 1
    assert len(plan_write(([0] * CHUNKS).__getitem__, 3, SIZE - 3, SHIFT, SIZE)) == 1
