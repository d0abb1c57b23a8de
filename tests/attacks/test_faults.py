"""What the attack by faults tries, and what it reads from traces."""

from collections import Counter

from tests.attacks.attack import Level
from tests.attacks.faults import ATTACK, CELLS, ENDINGS, PLAN, cells_of
from tests.attacks.faults_traced import synced_again

FAILED = "7 fdatasync(9) = -1 EIO (Input/output error) (INJECTED)"


def test_each_cell_comes_once_in_a_prove_and_with_each_ending_in_a_soak() -> None:
    assert {cells_of(seed)[0] for seed in range(1, ATTACK.trials[Level.PROVE] + 1)} == set(CELLS)
    planned = Counter(each for each in PLAN if each is not None)
    assert planned == Counter((cell, ending) for cell in CELLS for ending in ENDINGS)
    assert len(PLAN) <= ATTACK.trials[Level.SOAK]


def test_a_second_try_of_a_failed_sync_is_seen() -> None:
    again = ["descriptor 9 was synced again after a failed sync"]
    assert synced_again(f"{FAILED}\n7 fdatasync(9) = 0") == again
    in_two = "7 fdatasync(9 <unfinished ...>\n8  fdatasync(3) = 0\n"
    in_two += "7 <... fdatasync resumed>) = -1 EIO (Input/output error) (INJECTED)\n"
    assert synced_again(f"{in_two}8  fdatasync(3) = 0") == []
    assert synced_again(f"{in_two}8  fdatasync(9 <unfinished ...>\n8 <... fdatasync resumed>) = 0") == again


def test_what_is_no_second_try() -> None:
    assert synced_again(FAILED) == []
    assert synced_again(f"{FAILED}\n7 fdatasync(10) = 0") == [], "of another descriptor"
    assert synced_again(f'{FAILED}\n7 openat(AT_FDCWD, "/x", O_RDWR) = 9\n7 fdatasync(9) = 0') == [], "opened anew"
    for error in ("EINTR (Interrupted system call)", "ENOSPC (No space left on device)"):
        assert synced_again(f"7 fdatasync(9) = -1 {error} (INJECTED)\n7 fdatasync(9) = 0") == []
