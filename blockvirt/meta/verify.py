"""The offline proof of the metadata: its pages, each record by itself, and the records against one another.

Whether addresses are where they must be, and files on the devices as the records say, is proven elsewhere
(``volumes.proof``): here nothing but one environment is read.
"""

from collections.abc import Iterator
from pathlib import Path

from blockvirt.meta import verify_catalogue as catalogue
from blockvirt.meta import verify_map as leaves
from blockvirt.meta import verify_points as points
from blockvirt.meta.datafile import DATA_FILE, structural_problems
from blockvirt.meta.findings import Finding, corrupt
from blockvirt.meta.store import Reader
from blockvirt.meta.verify_map import DecodeLeaf
from blockvirt.meta.verify_rows import Rows, check_values


def verify_pages(metadata_dir: Path) -> Iterator[Finding]:
    """Walk every page of the environment without mapping it. Where this finds something, read no further."""
    try:
        problems = structural_problems(metadata_dir / DATA_FILE)
    except OSError as error:
        problems = [f"it cannot be read: {error.strerror}"]
    for problem in problems:
        yield corrupt("damaged-pages", f"metadata file {metadata_dir / DATA_FILE}", problem)


def verify_records(reader: Reader, decode_leaf: DecodeLeaf) -> Iterator[Finding]:
    """Prove every record and every index in one read transaction, table by table.

    ``decode_leaf`` raises DamagedRecord for what is no leaf. Catalogue records are kept (a few thousand); snapshots,
    leaves and indexes only pass by.
    """
    rows = Rows(reader)
    yield from catalogue.check_pool(rows)
    yield from catalogue.check_devices(rows)
    yield from catalogue.check_volumes(rows)
    yield from leaves.check_branches(rows)
    yield from leaves.check_volume_branches(rows)
    yield from points.check_snapshots(rows)
    yield from points.check_points(rows)
    yield from points.check_pending(rows)
    yield from leaves.check_files(rows)
    yield from leaves.check_leaves(rows, decode_leaf)
    yield from leaves.check_born(rows)
    yield from leaves.check_punches(rows)
    yield from leaves.check_checksums(rows)
    yield from catalogue.check_hosts(rows)
    yield from catalogue.check_units(rows)
    yield from catalogue.check_schedules(rows)
    yield from catalogue.check_jobs(rows)
    yield from catalogue.check_scrubs(rows)
    yield from catalogue.check_idempotency(rows)
    yield from check_values(rows)
