"""How a client attaches an export: NBD URIs, and lines ready to paste for QEMU, libvirt, nbd-client and nbdcopy. Pure.

URIs follow the NBD project's doc/uri.md. Every QEMU line has a ``reconnect-delay``: with it a restart of the daemon is
a pause for the guest, without it an I/O error.
"""

import json
import shlex
from dataclasses import dataclass
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

RECONNECT_DELAY_S = 60  # how long QEMU waits for a restarted daemon before the guest sees an error


@dataclass(frozen=True, slots=True)
class AttachInfo:
    """Everything that somebody needs to attach one export."""

    export: str
    volume_id: str
    uris: tuple[str, ...]
    """The unix socket's first."""
    qemu_blockdev: str
    """The argument of QEMU's ``-blockdev`` (JSON)."""
    qemu_device: str
    """The argument of QEMU's ``-device``."""
    qemu: str
    """Both, as shell words."""
    libvirt_xml: str
    nbd_client: str
    nbdcopy_in: str
    nbdcopy_out: str


def nbd_uris(export: str, socket_path: str, host: str | None, port: int) -> tuple[str, ...]:
    """Return the URIs of an export: by the unix socket, and by TCP where the server listens on it."""
    name = quote(export, safe="/@")  # VOLUME@SNAPSHOT stays legible: RFC 3986, 3.3 allows it in a path
    uris = [f"nbd+unix:///{name}?socket={quote(socket_path, safe='/')}"]
    if host is not None:
        uris.append(f"nbd://{f'[{host}]' if ':' in host else host}:{port}/{name}")
    return tuple(uris)


def attach_info(export: str, volume_id: str, socket_path: str, host: str | None, port: int) -> AttachInfo:
    """Return how to attach ``export`` of a server that listens on a unix socket and perhaps on TCP."""
    uris = nbd_uris(export, socket_path, host, port)
    node = f"bv-{volume_id[:8]}"  # QEMU: a letter first, at most 31 characters
    blockdev = json.dumps(
        {
            "driver": "nbd",
            "node-name": node,
            "server": {"type": "unix", "path": socket_path},
            "export": export,
            "reconnect-delay": RECONNECT_DELAY_S,
            "discard": "unmap",
        },
        separators=(",", ":"),
    )
    # A guest finds its disk by this serial in /dev/disk/by-id; virtio has 20 characters for it.
    device = f"virtio-blk-pci,drive={node},serial={volume_id.replace('-', '')[:20]}"
    return AttachInfo(
        export=export,
        volume_id=volume_id,
        uris=uris,
        qemu_blockdev=blockdev,
        qemu_device=device,
        qemu=f"-blockdev {shlex.quote(blockdev)} -device {shlex.quote(device)}",
        libvirt_xml=_libvirt_xml(export, socket_path, volume_id),
        nbd_client=shlex.join(["nbd-client", "-unix", socket_path, "/dev/nbd0", "-N", export, "-persist"]),
        nbdcopy_in=shlex.join(["nbdcopy", "disk.img", uris[0]]),
        nbdcopy_out=shlex.join(["nbdcopy", uris[0], "disk.img"]),
    )


def _libvirt_xml(export: str, socket_path: str, volume_id: str) -> str:
    return (
        "<disk type='network' device='disk'>\n"
        "  <driver name='qemu' type='raw' discard='unmap'/>\n"
        f"  <source protocol='nbd' name={quoteattr(export)}>\n"
        f"    <host transport='unix' socket={quoteattr(socket_path)}/>\n"
        # The schema of libvirt 9.0 refuses the element, so it stays a comment.
        f"    <!-- where your libvirt knows it: <reconnect delay='{RECONNECT_DELAY_S}'/> -->\n"
        "  </source>\n"
        "  <target dev='vda' bus='virtio'/>\n"
        f"  <serial>{volume_id.replace('-', '')[:20]}</serial>\n"
        "</disk>"
    )
