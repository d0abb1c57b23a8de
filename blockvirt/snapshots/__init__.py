"""Snapshots: taking and releasing them, the tree they form, what changed between two, and their way elsewhere."""
