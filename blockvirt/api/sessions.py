"""/v1/sessions: who uses what, and ending it."""

from asyncio import sleep

from blockvirt.api import models
from blockvirt.api.operations import Call, Operations, Reply
from blockvirt.api.wire import timestamp
from blockvirt.errors import BlockvirtError, NotFound
from blockvirt.volumes.ports import SessionInfo
from blockvirt.volumes.views import READ_BATCH

operations = Operations("sessions")


@operations.add("GET", "/v1/sessions", {200: models.SessionList}, errors=(404,))
async def list_sessions(call: Call, query: models.SessionQuery) -> Reply:
    """List the open NBD sessions, of one volume or of all."""
    services = call.services
    wanted = services.catalogue.get(query.volume).id if query.volume is not None else None
    found = [session for session in services.sessions.sessions() if wanted in (None, session.volume_id)]
    names: dict[str, str] = {}
    for number, session in enumerate(found):
        if session.volume_id not in names:
            names[session.volume_id] = _volume_name(call, session.volume_id)
        if number % READ_BATCH == READ_BATCH - 1:
            await sleep(0)  # others run between batches
    return Reply(models.SessionList(sessions=[_answer(session, names[session.volume_id]) for session in found]))


def _volume_name(call: Call, volume_id: str) -> str:
    try:
        return call.services.catalogue.get(volume_id).name
    except BlockvirtError:
        return ""  # deleted with force a moment ago


def _answer(session: SessionInfo, volume: str) -> models.Session:
    return models.Session(
        id=session.id,
        export=session.export,
        volume_id=session.volume_id,
        volume=volume,
        peer=session.peer,
        mode=session.mode,
        since=timestamp(session.since_s),
        bytes_read=session.bytes_read,
        bytes_written=session.bytes_written,
        requests=session.requests,
    )


@operations.add("DELETE", "/v1/sessions", {200: models.SessionsDropped}, errors=(404,))
async def drop_sessions(call: Call, query: models.SessionQuery) -> Reply:
    """Drop the sessions of one volume, or all. Clients with a reconnect-delay come back."""
    services = call.services
    if query.volume is not None:
        dropped = await services.sessions.drop_volume(services.catalogue.get(query.volume).id)
    else:
        dropped = 0
        for session in services.sessions.sessions():
            dropped += await services.sessions.drop(session.id)
    return Reply(models.SessionsDropped(dropped=dropped))


@operations.add("DELETE", "/v1/sessions/{session}", {200: models.SessionsDropped}, errors=(404,))
async def drop_session(call: Call, session: str) -> Reply:
    """Drop one session: its connection is closed without a reply to what is in flight."""
    if not await call.services.sessions.drop(session):
        raise NotFound(
            f"there is no session {session[:80]!r}", correction="'blockvirt session list' shows what there is"
        )
    return Reply(models.SessionsDropped(dropped=1))
