"""/v1/trash: deleted volumes that can be had back."""

import asyncio
from functools import partial

from blockvirt.api import answers, models
from blockvirt.api.job_models import Job
from blockvirt.api.operations import Call, Operations, Reply, etag
from blockvirt.api.paging import place_after, place_token
from blockvirt.api.volumes import shown
from blockvirt.api.wire import DryRunQuery, ListQuery

operations = Operations("trash")


@operations.add("GET", "/v1/trash", {200: models.TrashList})
async def list_trash(call: Call, query: ListQuery) -> Reply:
    """List the volumes in the trash, those that go first first, a page at a time."""
    after = place_after(query.page_token, "trash")
    page = await asyncio.to_thread(partial(call.services.catalogue.trash.page, after=after, limit=query.limit))
    token = place_token("trash", page.next_after) if page.next_after is not None else None
    return Reply(models.TrashList(volumes=[answers.trashed(each) for each in page.volumes], next_page_token=token))


@operations.add("POST", "/v1/trash/{volume}/restore", {200: models.Volume}, errors=(404, 409))
async def restore_volume(call: Call, volume: str, body: models.TrashRestore) -> Reply:
    """Take a volume out of the trash, with its snapshots. By its id, or by its name where only one was called so."""
    catalogue = call.services.catalogue
    restored = catalogue.get(await catalogue.trash.restore(volume, body.name))
    return Reply(await shown(call, restored), headers=etag(restored.revision))


@operations.add("DELETE", "/v1/trash/{volume}", {202: Job, 200: models.TrashPurge}, errors=(404, 409))
async def purge_volume(call: Call, volume: str, query: DryRunQuery) -> Reply:
    """Delete a volume in the trash for good, as a job, or say what that would free."""
    services = call.services
    trash = services.catalogue.trash
    if query.dry_run:
        found = await trash.get(volume)
        holdings = await services.histories.holdings(found.id)
        freed_bytes = holdings.exclusive_bytes if holdings is not None else 0
        return Reply(models.TrashPurge(volume=answers.trashed(found), freed_bytes=freed_bytes))
    job_id = await trash.purge(volume)
    return Reply(answers.job(services.jobs.get(job_id)), 202, {"Location": f"/v1/jobs/{job_id}"})
