"""What an attack is: a harness that tries to make the storage break a promise, over and over, each time from a seed."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

_MEMORY = Path("/dev/shm")


class Level(StrEnum):
    """How long an attack goes on."""

    SAMPLE = "sample"  # a part of every `make test`
    PROVE = "prove"  # `python -m tests.attacks`, at most 45 minutes for all
    SOAK = "soak"  # `python -m tests.attacks.soak`, days


@dataclass(frozen=True, slots=True)
class Failure:
    """A broken promise."""

    seed: int
    """Of the trial, or of the first of those that broke it together."""
    what: str
    """What was promised, and what was found."""
    count: int = 1
    """With ``--seed`` and ``--count`` so many trials it comes again."""
    within: range | None = None
    """Seeds of all trials on the same daemon up to there: what came before or beside them may matter, too."""

    def again(self, attack: str) -> list[str]:
        """Return what brings it again: the fewest trials first, then those that leave nothing out."""
        fewest = range(self.seed, self.seed + self.count)
        ways = {"again: ": fewest}
        if self.within is not None and self.within != fewest:
            ways["or, if what its daemon did before or beside that matters: "] = self.within
        return [
            f"{line}python -m tests.attacks {attack} --seed {seeds.start} --count {len(seeds)}"
            for line, seeds in ways.items()
        ]


@dataclass(slots=True)
class Outcome:
    """What an attack came to."""

    tried: int = 0
    """Trials, in the attack's unit."""
    failures: list[Failure] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    """More to show, by name: what was lost, how many crashes, of which kind."""

    def add(self, figure: str, more: int = 1) -> None:
        """Count something."""
        self.figures[figure] = self.figures.get(figure, 0) + more

    def include(self, other: "Outcome") -> None:
        """Count what another one counted, too."""
        self.tried += other.tried
        self.failures += other.failures
        for figure, value in other.figures.items():
            self.add(figure, value)

    def told(self) -> str:
        """The figures in words. What was looked for and "found" is told together: "files cut short found: 7 of 7"."""
        words = []
        for name, value in self.figures.items():
            if name.endswith(" found") and name.removesuffix(" found") in self.figures:
                continue
            found = f"{name} found"
            words.append(
                f"{found}: {self.figures[found]:,} of {value:,}" if found in self.figures else f"{name}: {value:,}"
            )
        return ", ".join(words)

    def fail(self, seed: int, what: str, *, count: int = 1, within: range | None = None) -> None:
        """Note a broken promise; see Failure."""
        self.failures.append(Failure(seed, what, count, within))


@dataclass(frozen=True, slots=True)
class Budget:
    """How much an attack is to do."""

    count: int
    """Trials."""
    seed: int
    """Of the first trial; each further one has the next number."""
    scratch: Path
    """An empty directory of its own, short enough for unix sockets; removed afterwards."""
    say: Callable[[str], None]
    """Shows progress: one line, now and then."""
    stop_early: bool = False
    """The first failure is enough: a planted bug is looked for."""
    planted: str = ""
    """The planted bug that servers in processes of their own must be started with (``planted.command``)."""

    def seeds(self, outcome: Outcome) -> Iterator[int]:
        """Give the seeds of the trials one by one, counting them; ends with the first failure where that is enough."""
        for seed in range(self.seed, self.seed + self.count):
            if self.stop_early and outcome.failures:
                return
            yield seed
            outcome.tried += 1


@dataclass(frozen=True, slots=True)
class Attack:
    """One harness."""

    name: str
    unit: str
    """What it counts as one trial: "crash states", "power cuts"."""
    promises: tuple[str, ...]
    """The invariants that it attacks: "I1" to "I10"."""
    trials: Mapping[Level, int]
    """How many at each level."""
    run: Callable[[Budget], Outcome]
    slices: int = 4
    """A prove is done in so many pieces, beside those of other attacks; 1: it keeps all processors busy by itself."""
    in_memory: bool = False
    """Its files may lie in memory: the disk that it attacks is a simulated one."""
    requires: tuple[str, ...] = ()
    """Programs and capabilities, as ``@pytest.mark.requires`` knows them."""


def carry_out(
    attack: Attack, count: int, seed: int, say: Callable[[str], None], *, stop_early: bool = False, planted: str = ""
) -> Outcome:
    """Run an attack in a directory of its own."""
    folder = _MEMORY if attack.in_memory and _MEMORY.is_mount() else None
    with tempfile.TemporaryDirectory(prefix="bv-", dir=folder) as scratch:
        return attack.run(Budget(count, seed, Path(scratch), say, stop_early, planted))
