"""What a daemon counts, as `/metrics` tells it."""

import re
from functools import partial
from pathlib import Path

from benchmarks.processes import COMMAND_DEADLINE_S
from blockvirt.cli.connection import Connection, connect_unix


def by_volume(state: Path, name: str) -> dict[str, float]:
    """The values of one metric of the daemon of a state directory, by open volumes' names."""
    connection = Connection(partial(connect_unix, str(state / "http.sock"), COMMAND_DEADLINE_S), "localhost")
    try:
        text = connection.request("GET", "/metrics", {}).read().decode()
    finally:
        connection.close()
    found = re.findall(rf'^{name}{{volume="([^"]+)"}} (\S+)$', text, re.MULTILINE)
    return {volume: float(value) for volume, value in found}
