"""Plain counters of an open volume: integers in the data path, read by the metrics."""

from dataclasses import dataclass


@dataclass(slots=True)
class VolumeStats:
    """What an open volume has done since it was opened. Durations are sums of seconds."""

    journal_appends: int = 0
    flushes: int = 0
    flush_s: float = 0.0
    embedded_flushes: int = 0
    """Of the flushes: those whose data went into the journal, for one sync instead of two."""
    checkpoints: int = 0
    checkpoint_s: float = 0.0
    syncs: int = 0
    sync_s: float = 0.0
    slow_reads: int = 0
    slow_writes: int = 0
    copied_chunks: int = 0
    punched_chunks: int = 0
