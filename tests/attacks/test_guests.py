"""The pure parts of the attack on guests: what their scripts print, and what must be there."""

from tests.attacks.guests_scripts import differences, lasting, number_of, remembered, seen

A, B = "a" * 32, "b" * 32


def test_what_the_writers_remember_is_read_from_their_files() -> None:
    said = f"file.1:{A}  -\nring.3:4096 {B}  -\ndirect.2:\ngrep: file.9: No such file or directory\n"
    assert remembered(said) == {"file.1": A, "ring.3": B}


def test_what_the_guest_sees_is_read_from_its_sums() -> None:
    assert seen(f"{A}  ./file.1\n{B}  - slot.3\nmd5sum: ./x: Input/output error\n") == {"file.1": A, "slot.3": B}


def test_what_was_remembered_must_be_there_and_more_may_be() -> None:
    assert differences({"file.1": A}, {"file.1": A, "file.2": B}) == []
    assert differences({"file.1": A, "file.2": B}, {"file.1": B}) == [
        "file.1 is not what was written",
        "file.2 is gone",
        "2 of 2 in all",
    ]


def test_files_that_are_about_to_be_removed_need_not_be_in_a_snapshot() -> None:
    assert lasting({f"file.{number}": A for number in range(1, 9)}).keys() == {f"file.{n}" for n in (1, 3, 4, 5, 7, 8)}
    assert number_of("file.17") == 17
