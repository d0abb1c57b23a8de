"""Snapshots drawn as a tree: what led to the head is one column."""

from typing import Any

from blockvirt.cli.snapshot_tree import HEAD, tree_rows


def drawn(history: str, head_parent: str) -> list[str]:
    """The tree of a history written as 'child<parent' words, oldest first."""
    snapshots: list[dict[str, Any]] = []
    for word in history.split():
        name, _, parent = word.partition("<")
        snapshots.append({"id": f"id-{name}", "name": name} | ({"parent_id": f"id-{parent}"} if parent else {}))
    return [row["drawn"] for row in tree_rows("v", snapshots, f"id-{head_parent}" if head_parent else "")]


def test_a_line_of_descent_is_one_column() -> None:
    assert drawn("a b<a c<b", "c") == ["v", "|-- a", "|-- b", "|-- c", "`-- (head)"]
    assert drawn("", "") == ["v", "`-- (head)"]


def test_what_a_revert_left_behind_hangs_aside() -> None:
    assert drawn("a b<a c<b", "a") == ["v", "|-- a", "|   |-- b", "|   `-- c", "`-- (head)"]
    assert drawn("a b<a c<a", "b") == ["v", "|-- a", "|   `-- c", "|-- b", "`-- (head)"], "the line aside is the newer"
    assert drawn("a b<a safety<b c<a", "c") == ["v", "|-- a", "|   |-- b", "|   `-- safety", "|-- c", "`-- (head)"]


def test_several_lines_aside_each_end() -> None:
    assert drawn("a x<a y<a z<y", "a") == ["v", "|-- a", "|   `-- x", "|   |-- y", "|   `-- z", "`-- (head)"]


def test_a_line_aside_may_have_one_aside() -> None:
    assert drawn("a b<a c<b d<b", "a") == ["v", "|-- a", "|   |-- b", "|   |   `-- c", "|   `-- d", "`-- (head)"]


def test_lines_whose_beginning_is_gone_come_from_a_gap() -> None:
    """Their first snapshot was deleted, or is filtered away: none of them hangs under nothing."""
    assert drawn("b<gone c<gone", "c") == ["v", "|-- ...", "|   `-- b", "|-- c", "`-- (head)"]
    assert drawn("b", "gone") == ["v", "|-- ...", "|   `-- b", "`-- (head)"]
    assert drawn("b<gone c<b d<gone e<lost", "d") == [
        *("v", "|-- ...", "|   |-- b", "|   `-- c", "|   `-- e", "|-- d", "`-- (head)")
    ]


def test_one_line_whose_beginning_is_gone_needs_no_gap() -> None:
    assert drawn("b<gone c<b d<b", "d") == ["v", "|-- b", "|   `-- c", "|-- d", "`-- (head)"]


def test_rows_keep_what_is_known_of_a_snapshot() -> None:
    snapshot = {"id": "1", "name": "a", "size_bytes": 512}
    rows = list(tree_rows("v", [snapshot], "1"))
    assert rows[0] == {"drawn": "v"}
    assert rows[1] == snapshot | {"drawn": "|-- a"}
    assert rows[2]["name"] == HEAD


def test_a_history_may_be_long() -> None:
    """As long as a volume may have snapshots: no recursion, and one column wide."""
    count = 20_000
    long = [{"id": str(number), "name": f"s{number}", "parent_id": str(number - 1)} for number in range(count)]
    rows = list(tree_rows("v", long, str(count - 1)))
    assert [row["drawn"] for row in rows[1:-1]] == [f"|-- s{number}" for number in range(count)]
