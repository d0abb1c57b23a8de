"""`python -m tests.attacks.codecs_child`: what feeds the targets of the attack "codecs", in a process of its own.

codecs_child FOLDER SEED BUG     libFuzzer, coverage-guided by atheris; one process after the other
codecs_child TARGET HEX          one input again

It reads a line TARGET=RUNS and answers with a line of JSON when that target is done: how many inputs it was given, and
the one that broke a promise. So whoever has seen enough says nothing more, and no fuzzer is left writing its corpus.
"""

import json
import mmap
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

INPUT_S = 5  # an input that takes longer hangs
MEMORY_MIB = 1_024
INPUT_BYTES = 8_192


def main() -> None:
    """Do what the command line asks for."""
    if len(sys.argv) == 3:
        from tests.attacks.codecs_targets import TARGETS

        TARGETS[sys.argv[1]].check(bytes.fromhex(sys.argv[2]))
        return
    folder, seed, bug = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    import atheris

    with atheris.instrument_imports(include=["blockvirt"]):
        from tests.attacks.codecs_targets import TARGETS
    if bug != "-":
        from tests.attacks.planted.bugs import bug_named

        bug_named(bug).plant(pytest.MonkeyPatch())
    for wanted in sys.stdin:
        name, _, runs = wanted.partition("=")
        print(
            json.dumps(fuzz(folder / name, TARGETS[name].check, TARGETS[name].examples(), seed, int(runs))), flush=True
        )


def fuzz(
    folder: Path, check: Callable[[bytes], None], examples: list[bytes], seed: int, runs: int
) -> dict[str, object]:
    """Have libFuzzer feed one target, in a child: it ends its process. Returns what came of it."""
    (folder / "corpus").mkdir(parents=True)
    for number, example in enumerate(examples):
        (folder / "corpus" / f"{number:03}").write_bytes(example)
    with mmap.mmap(-1, 8) as count:
        pid = os.fork()
        if not pid:
            _be_fuzzer(folder, check, seed, runs, count)
        _, status = os.waitpid(pid, 0)
        (done,) = struct.unpack("<Q", count[:])
    found = sorted(path for path in folder.iterdir() if path.name.startswith(("crash-", "timeout-", "oom-")))
    content = found[0].read_bytes() if found else b""
    is_broken = bool(found) or status != 0
    return {
        "target": folder.name,
        "done": done,
        "input": content.hex() if is_broken else None,
        "said": (folder / "log").read_text(errors="replace") if is_broken else "",
    }


def _be_fuzzer(folder: Path, check: Callable[[bytes], None], seed: int, runs: int, count: mmap.mmap) -> None:
    import atheris

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def counted(data: bytes) -> None:
        count[:] = struct.pack("<Q", struct.unpack("<Q", count[:])[0] + 1)
        check(data)

    options = {
        "seed": seed % (1 << 32 - 1) + 1,  # 0 is any
        "runs": runs,
        "max_len": INPUT_BYTES,
        "timeout": INPUT_S,
        "rss_limit_mb": MEMORY_MIB,
        "reload": 0,
        "detect_leaks": 0,
        "verbosity": 0,
        "artifact_prefix": f"{folder}/",
    }
    atheris.Setup([sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), f"{folder}/corpus"], counted)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
