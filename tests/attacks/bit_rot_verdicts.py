"""What a daemon must have done over a pool that rots: the verdicts on trials with one."""

import pickle
from pathlib import Path
from typing import Any

from tests.attacks.attack import Outcome
from tests.attacks.bit_rot_damage import Damage, Kind
from tests.attacks.bit_rot_pool import CHUNK_BYTES
from tests.attacks.bit_rot_served import USED_CHUNKS
from tests.attacks.bit_rot_watch import Bench

_SIGBUS = 7
_REFUSED = "NBD error 5"


def judge_scrub(damage: Damage, answer: dict[str, Any], outcome: Outcome) -> str:
    """Tell what a scrub should have found and did not: the chunk where it lies, or that a row is damaged."""
    outcome.add("scrubs")
    if answer.get("state") != "done" or answer["ready"] != 200:
        return f"a scrub must come to its end: {answer}"
    if damage.kind is Kind.SERVED:
        if any(each["kind"] == "record" for each in answer["findings"]):
            outcome.add("found by a scrub")
            return ""
        return "a scrub finds nothing"
    at = damage.edits[0][0] // CHUNK_BYTES * CHUNK_BYTES
    if answer["findings"] != [{"kind": "chunk", "where": at}]:
        return f"a scrub finds {answer['findings']}, and the chunk at {at} is damaged"
    outcome.add("found by a scrub")
    return ""


def judge_served(bench: Bench, damage: Damage, answer: dict[str, Any], outcome: Outcome) -> str:
    if "exports" not in answer or answer["listed"] != 200:
        return f"a daemon must serve what is not damaged: {answer}"
    branch = damage.number
    if damage.table in ("files", "checksums"):
        branch = bench.files[branch][0]
    concerned = bench.users[branch]
    for export, state in answer["exports"].items():
        if state.startswith("differs"):
            return f"{export} is read with other bytes than were written"
        if state != "same":
            outcome.add("exports refused")
            if export.partition("@")[0] not in concerned:
                return f"{export} is not concerned: {state}"
    outcome.add("exports the same", sum(state == "same" for state in answer["exports"].values()))
    return ""


def judge_journal(answer: dict[str, Any], outcome: Outcome) -> str:
    """The volume whose journal is damaged must be refused, the other one must be served."""
    states = answer.get("exports")
    if states is None or answer["listed"] != 200 or answer["ready"] != 200:
        return f"a daemon must serve what is not damaged: {answer}"
    if states["other"] != "same":
        return f"another volume is not concerned: {states['other']}"
    if not states["v"].startswith("error"):
        return f"the volume is served without what its journal held: {states['v']}"
    outcome.add("volumes refused for their journal")
    return ""


def copied(bench: Bench, seed: int, damage: Damage, outcome: Outcome) -> str:
    """Have a damaged chunk written to: its parts are refused, since a copy would make it sound; all of it is not."""
    cold = str(damage.path) if seed % 2 else ""
    answer = bench.rest.watcher.ask("copy", volume=damage.volume, chunk=damage.number, cold=cold)
    if "parts" not in answer:
        return f"a daemon must serve what is not damaged: {answer}"
    if taken := [each for each in answer["parts"] if each != _REFUSED]:
        return f"parts of a damaged chunk are written: {taken}"
    if answer["rest"] != ["done"] * len(answer["rest"]) or not answer["is_new"] or answer["ready"] != 200:
        return f"what needs no copy of a damaged chunk must be done: {answer}"
    at = damage.number * CHUNK_BYTES
    rotten = bench.rest.pool.contents[damage.volume][at : at + CHUNK_BYTES]
    beside = damage.number + (1 if damage.number % 2 else -1)
    for export, found in answer["differing"].items():
        content = bench.rest.pool.contents[export]
        others = [
            each
            for each in found["others"]
            if content[each * CHUNK_BYTES : (each + 1) * CHUNK_BYTES] != rotten
            and (export, each) != (damage.volume, beside)
        ]
        if others or found["refused"]:
            return f"more than the damaged chunk is read otherwise in {export}: {others}, or not: {found['refused']}"
    outcome.add("copies of damage refused", len(answer["parts"]))
    return ""


def cut_while_served(bench: Bench, damage: Damage, outcome: Outcome) -> str:
    """Cut a backing file short under a daemon: what it lost is refused, all else is there, and a check finds it."""
    assert damage.cut_at is not None
    content = damage.path.read_bytes()
    first = damage.cut_at // CHUNK_BYTES * CHUNK_BYTES
    lost = {content[at : at + CHUNK_BYTES] for at in range(first, len(content), CHUNK_BYTES)} - {bytes(CHUNK_BYTES)}
    untouched = [volume for volume, files in bench.own_files.items() if damage.path not in files]
    answer = bench.rest.watcher.ask("cut-file", path=str(damage.path), cut_at=damage.cut_at, untouched=untouched)
    if "differing" not in answer or answer["listed"] != 200 or answer["ready"] != 200:
        return f"a daemon must serve what is not damaged: {answer}"
    for export, found in answer["differing"].items():
        content = bench.rest.pool.contents[export]
        is_lost = [content[at : at + CHUNK_BYTES] in lost for at in range(0, len(content), CHUNK_BYTES)]
        written = () if "@" in export else USED_CHUNKS  # their copies may lie in the file's end, or elsewhere
        gone = [number for number, each in enumerate(is_lost) if each and number not in written]
        if found["others"]:
            return f"{export} is read with other bytes than were written"
        if [each for each in found["refused"] if each not in written] != gone:
            return f"of {export} not just what was lost is refused: {found['refused']}"
        outcome.add("exports that lost something", bool(found["refused"]))
        outcome.add("chunks refused", len(found["refused"]))
    if stopped := {volume: each for volume, each in answer["uses"].items() if each != "done"}:
        return f"volumes with files of their own must go on: {stopped}"
    outcome.add("volumes that went on", len(untouched))
    found = bench.rest.watcher.ask("check")
    if found.get("found"):
        outcome.add(f"{damage.kind} found")
        return ""
    return f"a check finds nothing: {found}"


def metadata_cut_while_served(bench: Bench, damage: Damage, acknowledged: Path, outcome: Outcome) -> str:
    """Cut ``data.mdb`` short under a daemon: it may end as by SIGKILL, and then nothing that was answered is lost."""
    side = bench.rest
    answer = side.watcher.ask("cut-metadata", cut_at=damage.cut_at, acknowledged=str(acknowledged))
    if answer.get("signal") == _SIGBUS:
        outcome.add("daemons ended by SIGBUS")
    elif "differing" not in answer:
        return f"a daemon must go on, or end as by SIGKILL: {answer}"
    else:
        side.watcher.renew()
        if wrong := [export for export, found in answer["differing"].items() if found["others"]]:
            return f"{wrong} are read with other bytes than were written"
    found = side.watcher.ask("check")
    if found.get("found"):
        outcome.add(f"{damage.kind} found")
        restored = side.watcher.ask("restore")
        if restored.get("found") != []:
            return f"the newest copy of the metadata, put in place: {restored}"
    elif answer.get("signal"):
        return f"a check finds nothing in what has ended the daemon: {found}"
    served = side.watcher.ask("serve", contents=str(acknowledged))
    kept = set(pickle.loads(acknowledged.read_bytes()))
    if set(served.get("exports", ())) != kept or any(each != "same" for each in served["exports"].values()):
        return f"what was answered before is lost: {served}"
    return ""
