"""The snapshots of a volume drawn as a tree. Pure.

What led to the head is one column, however long: only what a revert left behind is indented, below the snapshot that it
went on from. Plain ASCII, so that every terminal and every pipe shows it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HEAD = "(head)"
"""Stands where the volume is now; no snapshot can be called so."""
GAP = "..."
"""Stands for what was deleted, flattened or not listed, and several lines go on from; no snapshot can be called so."""

Snapshot = Mapping[str, Any]


def tree_rows(volume: str, snapshots: Sequence[Snapshot], head_parent: str) -> Iterator[dict[str, Any]]:
    """Yield rows for a table: one for the volume, then each snapshot and the head, their ``drawn`` names with lines.

    ``snapshots`` are in order of creation. ``head_parent`` is the id of the snapshot that the head went on from, empty
    for none. Where several snapshots, or one and the head, have no parent among them, all of these come from a gap.
    """
    known = {each["id"] for each in snapshots}
    below: dict[str, list[Snapshot]] = {}
    parents: dict[str, str] = {}
    for each in snapshots:
        parent = each.get("parent_id") or ""
        parents[each["id"]] = parent if parent in known else ""
        below.setdefault(parents[each["id"]], []).append(each)
    head: Snapshot = {"id": HEAD, "name": HEAD}
    parents[HEAD] = head_parent if head_parent in known else ""
    below.setdefault(parents[HEAD], []).append(head)
    if len(below[""]) > 1:
        below[GAP] = below[""]
        below[""] = [{"id": GAP, "name": GAP}]
        parents |= {each["id"]: GAP for each in below[GAP]} | {GAP: ""}
    main = set()
    place = HEAD
    while place:
        main.add(place)
        place = parents[place]
    yield {"drawn": volume}
    for lines, is_last, each in _drawn(below, main):
        yield {**each, "drawn": f"{lines}{'`-- ' if is_last else '|-- '}{each['name']}"}


def _drawn(below: Mapping[str, Sequence[Snapshot]], main: set[str]) -> Iterator[tuple[str, bool, Snapshot]]:
    """Yield (the lines to the left, whether its column ends with it, snapshot), top to bottom.

    Without recursion: a history may be as long as there may be snapshots.
    """
    columns = _begun("", below[""], main)  # what is still to be drawn, the next one last
    while columns:
        lines, each = columns.pop()
        children = below.get(each["id"], ())
        yield lines, not children, each
        columns += _begun(lines, children, main)


def _begun(lines: str, children: Sequence[Snapshot], main: set[str]) -> list[tuple[str, Snapshot]]:
    """Return (the lines to its left, child), to be drawn last to first.

    One child goes on in the column of its parent: the one that leads to the head, else the newest.
    """
    if not children:
        return []
    onward = next((child for child in children if child["id"] in main), children[-1])
    aside = [(f"{lines}|   ", child) for child in children if child is not onward]
    return [(lines, onward), *reversed(aside)]
