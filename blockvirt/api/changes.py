"""Changed blocks of a snapshot, or of a volume as it is now."""

from blockvirt.api.operations import Call, Operations, Reply
from blockvirt.api.snapshot_models import ChangedRange, Changes, ChangesQuery
from blockvirt.snapshots.changed_blocks import Page

operations = Operations("changes")


@operations.add("GET", "/v1/snapshots/{snapshot}/changes", {200: Changes}, errors=(404,))
async def list_snapshot_changes(call: Call, snapshot: str, query: ChangesQuery) -> Reply:
    """Say in which ranges a snapshot differs from another, of the same volume or not; without one, where its data is.

    What is not listed is the same in both. What is listed may be.
    """
    page = await call.services.changed_blocks.of_snapshot(snapshot, query.since, query.offset, query.limit)
    return _answer(call, page)


@operations.add("GET", "/v1/volumes/{volume}/changes", {200: Changes}, errors=(404,))
async def list_volume_changes(call: Call, volume: str, query: ChangesQuery) -> Reply:
    """Say in which ranges a volume differs from a snapshot by now; without one, where its data is.

    Pages are of different moments: for a list of one moment take a snapshot.
    """
    page = await call.services.changed_blocks.of_volume(volume, query.since, query.offset, query.limit)
    return _answer(call, page)


def _answer(call: Call, page: Page) -> Reply:
    return Reply(
        Changes(
            changes=[
                ChangedRange(offset_bytes=each.offset_bytes, length_bytes=each.length_bytes, zero=each.zero)
                for each in page.changes
            ],
            next_offset_bytes=page.next_offset_bytes,
            size_bytes=page.size_bytes,
            chunk_bytes=call.services.space.status().chunk_bytes,
        )
    )
