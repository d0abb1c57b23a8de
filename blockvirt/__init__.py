"""blockvirt: thin copy-on-write volumes for virtual machines, served over NBD, allocated over HTTP."""

__version__ = "0.1.0.dev0"
