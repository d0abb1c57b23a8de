"""/v1/schedules: snapshots that are taken by themselves, and how many of them stay."""

from asyncio import sleep

from blockvirt.api import answers
from blockvirt.api import schedule_models as models
from blockvirt.api.operations import Call, Operations, Reply, etag
from blockvirt.api.paging import page_after, page_token
from blockvirt.api.wire import ListQuery
from blockvirt.errors import DamagedRecord
from blockvirt.snapshots.schedules import NewSchedule, ScheduleChange
from blockvirt.volumes.views import READ_BATCH

operations = Operations("schedules")


@operations.add(
    "POST", "/v1/schedules", {201: models.Schedule, 200: models.Schedule}, errors=(404, 409), idempotent=True
)
async def create_schedule(call: Call, body: models.ScheduleCreate) -> Reply:
    """Create a schedule, for one volume or for those with certain labels.

    The same request again answers 200 with the schedule that is there; another one under that name is refused.
    """
    schedule, is_new = await call.services.schedules.create(_new(body))
    headers = etag(schedule.revision) | {"Location": f"/v1/schedules/{schedule.id}"}
    return Reply(answers.schedule(schedule), 201 if is_new else 200, headers)


def _new(body: models.ScheduleCreate) -> NewSchedule:
    return NewSchedule(
        name=body.name,
        cron=body.cron,
        volume=body.volume,
        labels=body.labels,
        keep={str(rule): count for rule, count in body.keep.items()},
        paused=body.paused,
    )


@operations.add("GET", "/v1/schedules", {200: models.ScheduleList})
async def list_schedules(call: Call, query: ListQuery) -> Reply:
    """List schedules in the order of their names, a page at a time."""
    page = await call.services.schedules.list(after=page_after(query.page_token, "schedules"), limit=query.limit)
    shown = []
    for number, view in enumerate(page.schedules):
        shown.append(answers.schedule(view))
        if number % READ_BATCH == READ_BATCH - 1:
            await sleep(0)  # others run between batches
    token = page_token("schedules", page.next_after) if page.next_after is not None else None
    return Reply(models.ScheduleList(schedules=shown, next_page_token=token))


@operations.add("GET", "/v1/schedules/{schedule}", {200: models.Schedule}, errors=(404,))
async def show_schedule(call: Call, schedule: str) -> Reply:
    """Show a schedule, by name or id: its next run, and what became of the last ones."""
    found = call.services.schedules.show(schedule)
    return Reply(answers.schedule(found), headers=etag(found.revision))


@operations.add(
    "PATCH",
    "/v1/schedules/{schedule}",
    {200: models.ScheduleOrPreview},
    errors=(404, 409, 412),
    conditional=True,
)
async def change_schedule(call: Call, schedule: str, body: models.SchedulePatch) -> Reply:
    """Change a schedule, or preview what it would do then. What was due while it was paused is not caught up."""
    schedules = call.services.schedules
    keep = None if body.keep is None else {str(rule): count for rule, count in body.keep.items()}
    change = ScheduleChange(cron=body.cron, keep=keep, paused=body.paused)
    if body.dry_run:
        return Reply(answers.preview(schedules.preview(schedule, change, runs=models.RUNS)))
    changed = await schedules.change(schedule, change, expected_revision=call.expected_revision)
    return Reply(answers.schedule(changed), headers=etag(changed.revision))


@operations.add(
    "DELETE", "/v1/schedules/{schedule}", {200: models.ScheduleDeletion}, errors=(404, 412), conditional=True
)
async def delete_schedule(call: Call, schedule: str) -> Reply:
    """Delete a schedule; the snapshots that it took stay."""
    schedules = call.services.schedules
    try:
        found = answers.schedule(schedules.show(schedule))
    except DamagedRecord:
        found = None  # it can be deleted all the same
    await schedules.delete(schedule, expected_revision=call.expected_revision)
    return Reply(models.ScheduleDeletion(deleted=True, schedule=found))


@operations.add("GET", "/v1/schedules/{schedule}/preview", {200: models.SchedulePreview}, errors=(404,))
async def preview_schedule(call: Call, schedule: str, query: models.PreviewQuery) -> Reply:
    """Say what a schedule will do: its next runs, and which snapshots retention keeps, and why."""
    return Reply(answers.preview(call.services.schedules.preview(schedule, runs=query.runs)))


@operations.add("POST", "/v1/schedules/preview", {200: models.SchedulePreview}, errors=(404,))
async def preview_new_schedule(call: Call, body: models.ScheduleCreate) -> Reply:
    """Say what a schedule would do, and store nothing."""
    return Reply(answers.preview(call.services.schedules.preview_new(_new(body), runs=models.RUNS)))
