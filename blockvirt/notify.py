"""Telling systemd how the service is (the protocol of sd_notify(3)); without systemd nothing happens."""

import os
import socket


def notify(state: str) -> bool:
    """Send lines such as 'READY=1', 'STATUS=...' or 'STOPPING=1'; tell whether somebody was there to be told.

    A failure to tell is no reason to fail: systemd then takes its own measures.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]  # the abstract namespace
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError:
            return False
    return True
