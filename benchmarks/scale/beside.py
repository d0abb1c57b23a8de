"""One fio run while another is under way: the longer one begins first and ends last."""

import threading
from concurrent.futures import ThreadPoolExecutor

from benchmarks import measure
from benchmarks.jobs import Cell
from benchmarks.measure import Sample
from benchmarks.servers import Volume

LEAD_S = 1.0  # for fio to start, to connect and to get going


def run_beside(
    cell: Cell, volume: Volume, size_bytes: int, runtime_s: float, other: Cell, other_volume: Volume, other_bytes: int
) -> tuple[Sample, Sample]:
    """Measure a cell while the other one runs; returns both samples. Raises MeasurementFailed."""
    with ThreadPoolExecutor(1) as threads:
        longer = threads.submit(measure.run, other, other_volume, other_bytes, runtime_s + 2 * LEAD_S)
        threading.Event().wait(LEAD_S)
        sample = measure.run(cell, volume, size_bytes, runtime_s)
        return sample, longer.result()
