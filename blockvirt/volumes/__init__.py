"""Volume execution: the open volume, its journal, flush and checkpoint, recovery, life cycle and catalogue."""
