"""Joins standard input and output, which slirp gives it as one socket, with a loopback port: one run a connection."""

import socket
import sys
import threading


def main() -> None:
    """`relay.py PORT`: copy both ways until either side closes."""
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as server, socket.socket(fileno=0) as guest:
        for end in (server, guest):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=copy, args=(server, guest))
        back.start()
        copy(guest, server)
        back.join()


def copy(source: socket.socket, target: socket.socket) -> None:
    """Everything from one to the other; the end of the one ends the other."""
    try:
        while data := source.recv(1 << 18):
            target.sendall(data)
    except OSError:
        pass
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        try:
            end.shutdown(how)
        except OSError:
            pass


if __name__ == "__main__":
    main()
