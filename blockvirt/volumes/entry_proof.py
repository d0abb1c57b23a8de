"""What the offline proof finds wrong with a branch's versions and their entries, in words that users know."""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from blockvirt.errors import BlockvirtError
from blockvirt.lun.address import chunk_of, file_of
from blockvirt.meta.findings import Finding, corrupt, leak
from blockvirt.meta.records import FileRecord
from blockvirt.meta.store import Reader
from blockvirt.volumes.branch_proof import Place
from blockvirt.volumes.concerned import holders, told, viewers

LIVE, FREED = 1, 2


@dataclass(slots=True)
class FileProof:
    """What the walk found in one backing file."""

    record: FileRecord
    live: bytearray
    """One byte per handed-out chunk: 0 (nobody's), LIVE (some entry names it) or FREED (waits for its punch)."""
    where: "array[int]"
    """Per handed-out chunk: which chunk of the volume it holds, if it is live."""
    is_whole: bool
    """All that may name a chunk of it was seen: what nobody names is nobody's."""


class EntryProof:
    """Hears what a walk over one branch finds, enters live chunks into its files, and says what is wrong."""

    def __init__(
        self,
        reader: Reader,
        branch: int,
        files: Mapping[int, FileProof],
        owners: Mapping[int, int],
        chunk_shift: int,
    ) -> None:
        """``files`` are the branch's own by number, ``owners`` the branches of all files there are."""
        self.findings: list[Finding] = []
        self.dead_births: list[int] = []
        """Epochs in which a version was born that nobody sees."""
        self._reader = reader
        self._branch = branch
        self._files = files
        self._owners = owners
        self._chunk_shift = chunk_shift

    def new(self, place: Place, address: int) -> None:
        """Enter an address of the branch's own, which nothing may have named so far."""
        number, at = file_of(address), chunk_of(address)
        proof = self._files[number]
        if at >= len(proof.live):
            message = f"names chunk {at} of backing file {number}, which has handed out {len(proof.live)}"
            self._corrupt("address-beyond", place, address, message)
        elif proof.live[at] == FREED:
            message = f"names chunk {at} of backing file {number}, which was freed"
            self._corrupt("address-freed", place, address, message)
        elif proof.live[at] and proof.where[at] != place.chunk:
            other = f"from byte {proof.where[at] << self._chunk_shift} on (chunk {proof.where[at]})"
            message = f"chunk {at} of backing file {number} is named twice, {other} too"
            self._corrupt("address-twice", place, address, message)
        elif proof.live[at]:
            message = f"names chunk {at} of backing file {number} again, which a version in between had dropped"
            self._corrupt("address-twice", place, address, message)
        else:
            proof.live[at] = LIVE
            proof.where[at] = place.chunk

    def foreign(self, place: Place, address: int, *, is_kept: bool) -> None:
        """Say what is wrong with an address of another branch, if anything is."""
        number, at = file_of(address), chunk_of(address)
        if number not in self._owners:
            self._corrupt("address-unknown", place, address, f"names backing file {number}, which does not exist")
        elif not is_kept:
            message = (
                f"names chunk {at} of backing file {number}, which branch {self._owners[number]} does not keep for it"
            )
            self._corrupt("address-foreign", place, address, message)

    def shared(self, place: Place, address: int) -> None:
        """Say that the next write would change what others see."""
        message = f"chunk {chunk_of(address)} of backing file {file_of(address)} is shared and marked as overwritable"
        self._corrupt("address-shared", place, address, message)

    def damaged(self, leaf: int, birth: int, error: BlockvirtError) -> None:
        """Say that a version cannot be read."""
        message = error.message + told(viewers(self._reader, self._branch, leaf, birth))
        self.findings.append(corrupt("leaf-damaged", f"leaf {leaf} of branch {self._branch}", message))

    def dead(self, leaf: int, birth: int) -> None:
        """Say that a version is left over."""
        message = f"nobody sees its version born in epoch {birth}"
        self.findings.append(leak("version-dead", f"leaf {leaf} of branch {self._branch}", message))
        self.dead_births.append(birth)

    def _corrupt(self, code: str, place: Place, address: int, message: str) -> None:
        names = holders(self._reader, place.branch, place.leaf, place.birth, place.slot, address)
        at = f"byte {place.chunk << self._chunk_shift}: "
        what = f"branch {place.branch} chunk {place.chunk}"
        self.findings.append(corrupt(code, what, at + message + told(names)))


def dead_runs(live: bytearray) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of the runs of chunks that are nobody's."""
    at = live.find(0)
    while at >= 0:
        end = at
        while end < len(live) and not live[end]:
            end += 1
        yield at, end - at
        at = live.find(0, end)
