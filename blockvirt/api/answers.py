"""From the rooms' views to the models of the wire."""

from blockvirt.api import models
from blockvirt.lun.attach import AttachInfo, nbd_uris
from blockvirt.lun.presentation import Host
from blockvirt.lun.units import Unit
from blockvirt.volumes.ports import DeviceStatus, Endpoints
from blockvirt.volumes.views import DeviceShare, Volume


def uris(export: str, endpoints: Endpoints) -> list[str]:
    """Return the URIs of an export of this daemon."""
    return list(nbd_uris(export, endpoints.nbd_socket, endpoints.nbd_host, endpoints.nbd_port))


def volume(
    view: Volume,
    endpoints: Endpoints,
    *,
    requested_bytes: int | None = None,
    shares: tuple[DeviceShare, ...] | None = None,
) -> models.Volume:
    """Return a volume for the wire; its export name is its name."""
    return models.Volume(
        id=view.id,
        name=view.name,
        state=view.state,
        size_bytes=view.size_bytes,
        mapped_bytes=view.mapped_bytes,
        chunk_bytes=view.chunk_bytes,
        labels=view.labels,
        placement=models.Placement(devices=list(view.placement_devices), labels=view.placement_labels),
        nbd_uris=uris(view.name, endpoints),
        units=list(view.units),
        sessions=view.sessions,
        revision=view.revision,
        created_at=models.timestamp(view.created_s),
        requested_size_bytes=requested_bytes if requested_bytes != view.size_bytes else None,
        located=None if shares is None else [device_share(share) for share in shares],
        damage=view.damage or None,
    )


def device_share(share: DeviceShare) -> models.DeviceShare:
    """Return a volume's share of a device for the wire."""
    return models.DeviceShare(device=share.device, files=share.files, live_bytes=share.live_bytes)


def unit(view: Unit, endpoints: Endpoints) -> models.Unit:
    """Return a logical unit for the wire."""
    return models.Unit(
        id=view.id,
        export=view.export,
        host=view.host,
        number=view.number,
        volume=view.volume,
        volume_id=view.volume_id,
        size_bytes=view.size_bytes,
        state=view.state,
        nbd_uris=uris(view.export, endpoints),
        created_at=models.timestamp(view.created_s),
    )


def host(view: Host, endpoints: Endpoints) -> models.Host:
    """Return a host for the wire."""
    return models.Host(
        id=view.id,
        name=view.name,
        state=view.state,
        labels=view.labels,
        luns=[unit(each, endpoints) for each in view.units],
        revision=view.revision,
        created_at=models.timestamp(view.created_s),
    )


def attach(info: AttachInfo) -> models.AttachInfo:
    """Return how to attach an export, for the wire."""
    return models.AttachInfo(
        export=info.export,
        volume_id=info.volume_id,
        nbd_uris=list(info.uris),
        qemu=info.qemu,
        qemu_blockdev=info.qemu_blockdev,
        qemu_device=info.qemu_device,
        libvirt_xml=info.libvirt_xml,
        nbd_client=info.nbd_client,
        nbdcopy_in=info.nbdcopy_in,
        nbdcopy_out=info.nbdcopy_out,
    )


def device(status: DeviceStatus) -> models.Device:
    """Return a device for the wire."""
    return models.Device(
        id=status.id,
        name=status.name,
        path=status.path,
        state=status.state,
        capacity_bytes=status.capacity_bytes,
        used_bytes=status.used_bytes,
        reserved_bytes=status.reserved_bytes,
        free_bytes=status.free_bytes,
        limit_bytes=status.limit_bytes,
        reserve_bytes=status.reserve_bytes,
        labels=dict(status.labels),
        problem=status.problem or None,
    )
