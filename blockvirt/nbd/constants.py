"""Numbers of the NBD protocol, named as in proto.md ("Values") without the ``NBD_`` prefix.

Plain integers, not enums: the hot loop compares them for every request.
"""

import errno

# --- magic numbers ("Handshake", "Request message", "Simple reply message", "Structured reply chunk message") --------
INIT_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

# --- "Handshake flags", "Client flags" ---------------------------------------------------------------------------
FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1
CLIENT_FIXED_NEWSTYLE = 1 << 0
CLIENT_NO_ZEROES = 1 << 1

# --- "Transmission flags" ----------------------------------------------------------------------------------------
FLAG_HAS_FLAGS = 1 << 0
FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_FUA = 1 << 3
FLAG_SEND_TRIM = 1 << 5
FLAG_SEND_WRITE_ZEROES = 1 << 6
FLAG_SEND_DF = 1 << 7
FLAG_CAN_MULTI_CONN = 1 << 8
FLAG_SEND_CACHE = 1 << 10
FLAG_SEND_FAST_ZERO = 1 << 11

# --- "Option types" ----------------------------------------------------------------------------------------------
OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_EXTENDED_HEADERS = 11

# --- "Option reply types" ----------------------------------------------------------------------------------------
REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR_BIT = 1 << 31
REP_ERR_UNSUP = REP_ERROR_BIT + 1
REP_ERR_POLICY = REP_ERROR_BIT + 2
REP_ERR_INVALID = REP_ERROR_BIT + 3
REP_ERR_UNKNOWN = REP_ERROR_BIT + 6
REP_ERR_SHUTDOWN = REP_ERROR_BIT + 7
REP_ERR_TOO_BIG = REP_ERROR_BIT + 9

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

# --- "Request types", "Command flags" ----------------------------------------------------------------------------
CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

COMMAND_NAMES = ("read", "write", "disconnect", "flush", "trim", "cache", "write_zeroes", "block_status")
"""By request type; for metrics and logs."""

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3
CMD_FLAG_FAST_ZERO = 1 << 4

# --- "Structured reply flags", "Structured reply types" ----------------------------------------------------------
REPLY_FLAG_DONE = 1 << 0
REPLY_NONE = 0
REPLY_OFFSET_DATA = 1
REPLY_OFFSET_HOLE = 2
REPLY_BLOCK_STATUS = 5
REPLY_ERROR_BIT = 1 << 15
REPLY_ERROR = REPLY_ERROR_BIT + 1
REPLY_ERROR_OFFSET = REPLY_ERROR_BIT + 2

# --- "Error values" ----------------------------------------------------------------------------------------------
WIRE_ERRORS = {
    errno.EPERM: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EOVERFLOW: 75,
    errno.ENOTSUP: 95,
    errno.ESHUTDOWN: 108,
    errno.EDQUOT: 28,  # "It also SHOULD map the EDQUOT and EFBIG errors to NBD_ENOSPC"
    errno.EFBIG: 28,
    errno.EACCES: 1,
    errno.EROFS: 1,
    errno.ENOENT: 22,
    errno.EEXIST: 22,
    errno.EBUSY: 5,
}
"""What each errno becomes on the wire; what is not listed becomes ``EIO``."""

FIRST_CONTEXT_ID = 1
"""Metadata contexts are numbered from here, in the order in which they were selected; 0 stands in lists."""
