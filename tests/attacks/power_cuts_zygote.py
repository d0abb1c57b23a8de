"""`python -m tests.attacks.power_cuts_zygote BUG`: has blockvirt imported, and becomes it in no time, again and again.

Each line on standard input is a JSON list: the log file, the environment, the command line. A child is forked for it
that is `blockvirt` with that command line; its process id is the answer, and once the child has ended, its exit code.
"""

import json
import os
import sys
from pathlib import Path

import pytest

import blockvirt.daemon  # noqa: F401 (what takes its time, and what every child needs)
from blockvirt.cli.main import main as blockvirt_main
from tests.attacks.planted.bugs import bug_named


def main() -> None:
    """Fork a daemon for each line, one at a time."""
    if name := sys.argv[1]:
        bug_named(name).plant(pytest.MonkeyPatch())
    for line in sys.stdin:
        log, environment, arguments = json.loads(line)
        child = os.fork()
        if not child:
            _become(Path(log), environment, arguments)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(log: Path, environment: dict[str, str], arguments: list[str]) -> None:
    os.setsid()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.update(environment)
    sys.argv = ["blockvirt", *arguments]
    blockvirt_main()
    os._exit(0)


if __name__ == "__main__":
    main()
