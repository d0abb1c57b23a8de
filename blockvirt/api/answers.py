"""From the rooms' views to the models of the wire."""

from blockvirt.api import job_models, models, schedule_models, snapshot_models
from blockvirt.api.wire import timestamp
from blockvirt.lun.attach import AttachInfo, nbd_uris
from blockvirt.lun.presentation import Host
from blockvirt.lun.units import Unit
from blockvirt.snapshots.histories import History, Holdings
from blockvirt.snapshots.schedules import Preview, Schedule
from blockvirt.snapshots.views import Snapshot
from blockvirt.volumes.jobs import Job
from blockvirt.volumes.ports import DeviceStatus, Endpoints
from blockvirt.volumes.trash import Trashed
from blockvirt.volumes.views import DeviceShare, Volume

_NO_HISTORY = History()


def uris(export: str, endpoints: Endpoints) -> list[str]:
    """Return the URIs of an export of this daemon."""
    return list(nbd_uris(export, endpoints.nbd_socket, endpoints.nbd_host, endpoints.nbd_port))


def volume(
    view: Volume,
    endpoints: Endpoints,
    history: History = _NO_HISTORY,
    *,
    holdings: Holdings | None = None,
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
        created_at=timestamp(view.created_s),
        requested_size_bytes=requested_bytes if requested_bytes != view.size_bytes else None,
        located=None if shares is None else [device_share(share) for share in shares],
        damage=view.damage or None,
        snapshots=history.snapshots,
        origin=history.origin or None,
        exclusive_bytes=holdings.exclusive_bytes if holdings is not None else None,
        snapshot_bytes=holdings.snapshot_bytes if holdings is not None else None,
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
        created_at=timestamp(view.created_s),
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
        created_at=timestamp(view.created_s),
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


def trashed(view: Trashed) -> models.TrashedVolume:
    """Return a volume in the trash for the wire."""
    return models.TrashedVolume(
        id=view.id,
        name=view.name,
        size_bytes=view.size_bytes,
        snapshots=view.snapshots,
        trashed_at=timestamp(view.trashed_s),
        purge_at=timestamp(view.purge_at_s),
    )


def snapshot(view: Snapshot, endpoints: Endpoints) -> snapshot_models.Snapshot:
    """Return a snapshot for the wire; its export name is 'VOLUME@SNAPSHOT'."""
    return snapshot_models.Snapshot(
        id=view.id,
        volume_id=view.volume_id,
        volume=view.volume,
        name=view.name,
        created_at=timestamp(view.created_s),
        size_bytes=view.size_bytes,
        mapped_bytes=view.mapped_bytes,
        exclusive_bytes=view.exclusive_bytes,
        revision=view.revision,
        parent_id=view.parent_id or None,
        labels=dict(view.labels),
        holds=list(view.holds),
        clones=list(view.clones),
        sessions=view.sessions,
        group_id=view.group_id or None,
        schedule_id=view.schedule_id or None,
        nbd_uris=uris(f"{view.volume}@{view.name}", endpoints),
    )


def job(view: Job) -> job_models.Job:
    """Return a job for the wire."""
    return job_models.Job(
        id=view.id,
        kind=view.kind,
        state=view.state,
        subject=view.subject,
        volume_id=view.volume_id or None,
        created_at=timestamp(view.created_s),
        started_at=None if view.started_s is None else timestamp(view.started_s),
        finished_at=None if view.finished_s is None else timestamp(view.finished_s),
        done_units=view.done_units,
        total_units=view.total_units,
        percent=view.percent,
        rate_per_s=view.rate_per_s,
        eta_s=view.eta_s,
        error=view.error or None,
        detail=view.detail or None,
    )


def schedule(view: Schedule) -> schedule_models.Schedule:
    """Return a schedule for the wire."""
    return schedule_models.Schedule(
        id=view.id,
        name=view.name,
        cron=view.cron,
        volume_id=view.volume_id or None,
        labels=view.labels,
        volumes=[schedule_models.ScheduledVolume(id=volume_id, name=name) for volume_id, name in view.volumes],
        keep=view.keep,
        state=view.state,
        problem=view.problem or None,
        next_run_at=None if view.next_run_s is None else timestamp(view.next_run_s),
        last_run_at=None if view.last_run_s is None else timestamp(view.last_run_s),
        last_error=view.last_error or None,
        missed_runs=view.missed_runs,
        revision=view.revision,
        created_at=timestamp(view.created_s),
    )


def preview(view: Preview) -> schedule_models.SchedulePreview:
    """Return what a schedule would do, for the wire."""
    return schedule_models.SchedulePreview(
        next_runs=[timestamp(each) for each in view.next_runs_s],
        volumes=[
            schedule_models.VolumeRetention(
                volume_id=volume_id,
                volume=name,
                decisions=[
                    schedule_models.RetentionDecision(
                        snapshot_id=each.snapshot.id,
                        name=each.snapshot.name,
                        created_at=timestamp(each.snapshot.created_s),
                        keep=each.keep,
                        reasons=list(each.reasons),
                    )
                    for each in decisions
                ],
            )
            for volume_id, name, decisions in view.decisions
        ],
    )
