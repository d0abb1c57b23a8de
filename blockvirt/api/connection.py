"""One HTTP connection: what aiohttp would answer by itself, in plain text, leaves as a problem document instead.

Bytes that are no HTTP meet no middleware, since there is no request yet; neither does an ``Expect`` that nobody knows.
"""

import asyncio
import logging

from aiohttp import web

from blockvirt.api.problems import new_request_id, our_mistake, problem_answer, translated
from blockvirt.errors import MalformedRequest

log = logging.getLogger("blockvirt.api")


class Connection(web.RequestHandler):
    """aiohttp's side of a connection, with errors of our tree."""

    __slots__ = ()

    def __init__(self, server: web.Server) -> None:
        """Serve one client of ``server``; there is no access log.

        Nothing is decompressed: compressed bodies are refused, and what is left of one must only be read away.
        """
        loop = asyncio.get_running_loop()
        # What AppRunner hands over too, but for the last.
        super().__init__(server, loop=loop, access_log=None, auto_decompress=False)  # type: ignore[arg-type]

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is not HTTP (``status`` 400), or what a handler let slip; the connection ends with it."""
        request_id = new_request_id()
        if request.writer.output_size > 0:  # half an answer is out: only the end of the connection can say so
            raise ConnectionError("a part of the answer is sent already")
        if status < 500:
            answer = problem_answer(_not_http(message or "", request_id), None, request_id)
        else:
            log.error("request %s failed outside of its handler", request_id, exc_info=exc)
            answer = problem_answer(our_mistake(request_id), None, request_id)
        answer.force_close()
        return answer

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; one that aiohttp made of an exception of its own is put into our words before."""
        if isinstance(resp, web.HTTPException):
            resp = problem_answer(translated(request, resp), request.path, new_request_id())
        return await super().finish_response(request, resp, start_time)


def _not_http(message: str, request_id: str) -> MalformedRequest:
    # The lines behind the first show the bytes: a client that sent them knows them, and the log can do without.
    reason = message.partition("\n")[0].rstrip(": ")[:200]
    log.info("request %s is not HTTP: %s", request_id, reason)
    return MalformedRequest(
        "the request is not HTTP that can be understood",
        cause=reason,
        correction="send it by an HTTP client; no line of its head may have more than 8190 bytes, and 128 headers do",
    )
