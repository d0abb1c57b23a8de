"""The one tree of errors that users can meet.

Every leaf has a stable ``code`` (the HTTP API shows it), an NBD errno and an HTTP status. The edges translate with one
table each: ``nbd`` reads ``nbd_errno``, ``api`` reads ``http_status``. A message says what happened and to what;
``correction`` says what to do about it; ``cause`` says why, where the message alone does not.
"""

import errno
from typing import Any, ClassVar


class BlockvirtError(Exception):
    """Root of the tree. ``details`` are JSON-able facts for programs (sizes in bytes, names, ids)."""

    code: ClassVar[str] = "internal"
    nbd_errno: ClassVar[int] = errno.EIO
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, cause: str = "", correction: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.correction = correction
        self.details = details


class InvalidRequest(BlockvirtError):
    """What was asked for cannot be understood or is not allowed by its form."""

    code, nbd_errno, http_status = "invalid-argument", errno.EINVAL, 422


class InvalidSize(InvalidRequest):
    """A size that is not a size, is ambiguous, or lies outside what a volume may have."""

    code = "invalid-size"


class InvalidName(InvalidRequest):
    """A name that breaks the rules for names."""

    code = "invalid-name"


class NotFound(BlockvirtError):
    """The named thing does not exist."""

    code, nbd_errno, http_status = "not-found", errno.ENOENT, 404


class Exists(BlockvirtError):
    """The name or number is taken by something that differs from what was asked for."""

    code, nbd_errno, http_status = "exists-incompatible", errno.EEXIST, 409


class InUse(BlockvirtError):
    """Something still uses the thing: a session, a mapping, data on a device."""

    code, nbd_errno, http_status = "in-use", errno.EBUSY, 409


class BeingDeleted(BlockvirtError):
    """The thing is on its way out; nothing new may refer to it."""

    code, nbd_errno, http_status = "being-deleted", errno.EBUSY, 409


class DataDamaged(BlockvirtError):
    """A sealed chunk does not hold what it held when it was sealed."""

    code, nbd_errno, http_status = "data-damaged", errno.EIO, 500


class WrongJobState(BlockvirtError):
    """A job cannot be cancelled, paused or resumed in the state that it is in."""

    code, nbd_errno, http_status = "job-state", errno.EBUSY, 409


class PreconditionFailed(BlockvirtError):
    """If-Match named another revision than the current one."""

    code, nbd_errno, http_status = "precondition-failed", errno.EBUSY, 412


class ReadOnly(BlockvirtError):
    """A write reached something that may only be read."""

    code, nbd_errno, http_status = "read-only", errno.EPERM, 403


class OutOfRange(BlockvirtError):
    """An access past the end of a volume."""

    code, nbd_errno, http_status = "out-of-range", errno.EINVAL, 422


class PoolFull(BlockvirtError):
    """No device has room for another chunk, or metadata has none for another change. Reads and overwrites go on."""

    code, nbd_errno, http_status, retryable = "pool-full", errno.ENOSPC, 507, True


class OvercommitLimit(BlockvirtError):
    """Granting the size would promise more than the policy allows."""

    code, nbd_errno, http_status = "overcommit-limit", errno.ENOSPC, 507


class LimitReached(BlockvirtError):
    """A fixed bound of ``blockvirt.limits`` would be passed."""

    code, nbd_errno, http_status = "limit-reached", errno.ENOSPC, 409


class VolumeStopped(BlockvirtError):
    """A sync or a metadata commit of this volume failed: nothing more is acknowledged until it is reopened (I7)."""

    code, nbd_errno, http_status = "volume-stopped", errno.EIO, 503

    @classmethod
    def because(cls, volume: str, reason: str) -> "VolumeStopped":
        """Return the error of a volume that acknowledges nothing until an administrator reopens it."""
        return cls(
            f"volume {volume} has stopped",
            cause=reason,
            correction="mend the disk, or after a revert power off the guests that had it open; then run "
            f"'blockvirt volume reopen {volume}': after a failure it comes back as after a power cut, with everything "
            "that was flushed",
        )


class DeviceFault(BlockvirtError):
    """A device is missing, foreign, doubly mounted, read-only, of a newer format, or fails."""

    code, nbd_errno, http_status = "device-fault", errno.EIO, 503


class DamagedRecord(BlockvirtError):
    """A metadata record failed its checksum; what it describes is quarantined, the rest goes on."""

    code, nbd_errno, http_status = "damaged-record", errno.EIO, 503


class MetadataFault(BlockvirtError):
    """The metadata store cannot be opened or written."""

    code, nbd_errno, http_status = "metadata-fault", errno.EIO, 503


class PoolLocked(BlockvirtError):
    """Another process holds the pool."""

    code, nbd_errno, http_status = "pool-locked", errno.EBUSY, 409


class StreamDamaged(BlockvirtError):
    """A snapshot stream was cut, altered, or is none; ``at_byte`` in the details says where."""

    code, nbd_errno, http_status = "stream-damaged", errno.EINVAL, 422


class StreamVersion(BlockvirtError):
    """A snapshot stream was made by a newer blockvirt, in a format that this one cannot read."""

    code, nbd_errno, http_status = "stream-version", errno.EINVAL, 422


class WrongBase(BlockvirtError):
    """A snapshot stream goes on from something else than what the volume holds."""

    code, nbd_errno, http_status = "wrong-base", errno.EINVAL, 409


class ShuttingDown(BlockvirtError):
    """The daemon is stopping; what has started finishes, nothing new begins."""

    code, nbd_errno, http_status, retryable = "shutting-down", errno.ESHUTDOWN, 503, True


class NotSupported(BlockvirtError):
    """The operation cannot be done here, or not as fast as was demanded (NBD FAST_ZERO)."""

    code, nbd_errno, http_status = "not-supported", errno.ENOTSUP, 501


class MalformedRequest(BlockvirtError):
    """Bytes that are not HTTP, or JSON that can be read in two ways."""

    code, nbd_errno, http_status = "malformed-request", errno.EINVAL, 400


class BodyTooLarge(BlockvirtError):
    """An HTTP body beyond ``limits.API_MAX_BODY_BYTES``."""

    code, nbd_errno, http_status = "body-too-large", errno.EINVAL, 413


class WrongMediaType(BlockvirtError):
    """An HTTP body that is not declared as JSON; browsers can send such ones without asking."""

    code, nbd_errno, http_status = "unsupported-media-type", errno.EINVAL, 415


class ForeignOrigin(BlockvirtError):
    """An HTTP request that a browser sent on behalf of some other site."""

    code, nbd_errno, http_status = "foreign-origin", errno.EPERM, 403


class MethodNotAllowed(BlockvirtError):
    """The HTTP resource exists, but not with this method."""

    code, nbd_errno, http_status = "method-not-allowed", errno.EINVAL, 405


class OperationPending(BlockvirtError):
    """The same request, under the same Idempotency-Key, is still running."""

    code, nbd_errno, http_status, retryable = "operation-pending", errno.EBUSY, 409, True


class Overloaded(BlockvirtError):
    """More HTTP requests at once than ``limits.API_MAX_REQUESTS``."""

    code, nbd_errno, http_status, retryable = "overloaded", errno.EBUSY, 503, True
