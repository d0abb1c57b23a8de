"""Logical units: the address map of a volume (pure), and how hosts see volumes (hosts, numbers)."""
