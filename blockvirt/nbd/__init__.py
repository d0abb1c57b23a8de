"""The NBD server: it sees volumes only through ``blockvirt.device``.

``constants``, ``messages``, ``handshake`` and ``transmission`` are pure (bytes in, verdicts and bytes out); ``session``
owns a socket in the transmission phase, ``server`` the listeners. "proto.md" in comments and docstrings is the protocol
document, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, cited by section name.
"""
