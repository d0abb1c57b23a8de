"""What ``serve`` prints when it is ready: where it listens, and the next commands to paste."""

import os
import shlex
import shutil
import sys
from urllib.parse import quote

from blockvirt import __version__
from blockvirt.volumes.ports import Endpoints


def greeting(endpoints: Endpoints, state_dir: str, program: str) -> str:
    """Return the text; ``state_dir`` and ``program`` as the user typed them, so that the lines work where he is."""
    http = [f"http://{_host(endpoints.http_host)}:{endpoints.http_port}"] if endpoints.http_host else []
    nbd = [f"nbd://{_host(endpoints.nbd_host)}:{endpoints.nbd_port}"] if endpoints.nbd_host else []
    command = f"{program} -s {shlex.quote(state_dir)}"
    uri = shlex.quote(f"nbd+unix:///v?socket={quote(endpoints.nbd_socket)}")
    return "\n".join(
        [
            f"blockvirt {__version__} is ready.",
            "",
            f"  HTTP API  {'  '.join([*http, endpoints.http_socket])}",
            f"  NBD       {'  '.join([*nbd, endpoints.nbd_socket])}",
            "",
            "Next, in another terminal:",
            "",
            f"  {command} volume create v --size 1GiB",
            f"  {command} lun attach-info v",
            f"  nbdinfo {uri}",
            f"  {command} status",
            "",
        ]
    )


def _host(host: str | None) -> str:
    return f"[{host}]" if host and ":" in host else str(host)


def program_name(argv0: str) -> str:
    """Return how to call this program again: as it was called, or by its bare name where the search path has it."""
    if os.path.basename(argv0) != "blockvirt":
        return f"{shlex.quote(sys.executable)} -m blockvirt"
    found = shutil.which("blockvirt")
    return "blockvirt" if found and os.path.realpath(found) == os.path.realpath(argv0) else shlex.quote(argv0)
