"""Changed blocks of a snapshot, or of a volume as it is now."""

import asyncio

from blockvirt.api.operations import Call, Operations, Reply
from blockvirt.api.snapshot_models import Changes, ChangesQuery
from blockvirt.snapshots.changed_blocks import Page

operations = Operations("changes")

_DATA = '{"offset_bytes":%d,"length_bytes":%d,"zero":false}'
_ZERO = '{"offset_bytes":%d,"length_bytes":%d,"zero":true}'


@operations.add("GET", "/v1/snapshots/{snapshot}/changes", {200: Changes}, errors=(404,))
async def list_snapshot_changes(call: Call, snapshot: str, query: ChangesQuery) -> Reply:
    """Say in which ranges a snapshot differs from another, of the same volume or not; without one, where its data is.

    What is not listed is the same in both. What is listed may be.
    """
    page = await call.services.changed_blocks.of_snapshot(snapshot, query.since, query.offset, query.limit)
    return await _answer(call, page)


@operations.add("GET", "/v1/volumes/{volume}/changes", {200: Changes}, errors=(404,))
async def list_volume_changes(call: Call, volume: str, query: ChangesQuery) -> Reply:
    """Say in which ranges a volume differs from a snapshot by now; without one, where its data is.

    Pages are of different moments: for a list of one moment take a snapshot.
    """
    page = await call.services.changed_blocks.of_volume(volume, query.since, query.offset, query.limit)
    return await _answer(call, page)


async def _answer(call: Call, page: Page) -> Reply:
    chunk_bytes = call.services.space.status().chunk_bytes
    return Reply(await asyncio.to_thread(written, page, chunk_bytes))  # a long page takes milliseconds


def written(page: Page, chunk_bytes: int) -> str:
    """Return the JSON of ``Changes`` as the model would write it, in a tenth of the time that its ranges would take."""
    ranges = ",".join(
        [_ZERO % (offset, length) if zero else _DATA % (offset, length) for offset, length, zero in page.ranges]
    )
    more = "" if page.next_offset_bytes is None else f'"next_offset_bytes":{page.next_offset_bytes},'
    return f'{{"changes":[{ranges}],{more}"size_bytes":{page.size_bytes},"chunk_bytes":{chunk_bytes}}}'
