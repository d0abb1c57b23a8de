"""Every bound in one place, each with its reason (I9). Units are in the names."""

from blockvirt.units import GIB, KIB, MIB, TIB

# --- volumes -------------------------------------------------------------------------------------------------------
MAX_VOLUME_BYTES = 64 * TIB  # 2^32 chunks of 16 KiB, whose numbers have 32 bits; of smaller ones less
MAX_VOLUMES = 10_000  # what start-up and listing are measured with
SECTOR_BYTES = 512  # sizes are multiples of it: the kernel client and guests count in sectors
DEFAULT_CHUNK_BYTES = 16 * KIB  # the smaller, the less a copy-on-write copies, and the more map there is
MIN_CHUNK_BYTES = 4 * KIB  # a block of every filesystem we know; less is never punched
MAX_CHUNK_BYTES = 1 * MIB  # a copy of more would hold a thread, and its volume's chunk, for milliseconds
LEAF_CHUNKS = 512  # a leaf maps 8 MiB of 16 KiB chunks, and its stored form stays inside one LMDB page
MAX_LABELS = 64  # per volume
MAX_LABEL_CHARS = 256  # key or value
MAX_HOSTS = 10_000  # a host for every volume
MAX_UNITS_PER_HOST = 16_384  # what a SCSI initiator can address with flat LUNs
MAX_DEVICES = 64  # a journal header names the page-cache identity of each, in one 4 KiB block

# --- backing files and space ---------------------------------------------------------------------------------------
MAX_BACKING_FILE_BYTES = 1 * TIB  # a rotated file can be moved in hours, not days, when a device is evacuated
RESERVE_STEP_MIN_BYTES = 1 * MIB  # space is reserved ahead in steps of clamp(mapped / 8, min, max)
RESERVE_STEP_MAX_BYTES = 64 * MIB  # what a crash may leave reserved for nothing, per volume
DEVICE_RESERVE_MIN_BYTES = 16 * MIB  # eight journals: volumes that must trim in a full pool open one each
DEVICE_RESERVE_MAX_BYTES = 1 * GIB  # a hundredth of a large disk would be more than anything there ever needs
PUNCHES_PER_BATCH = 64  # punches between two looks at other work: each stalls its file's writes for up to 8 ms on XFS
PUNCH_BATCH_ROWS = 4_096  # that they may come from: 20 ms of a transaction
PUNCH_PAUSE_S = 0.02  # between two batches
MAX_SNAPSHOTS = 1_000_000  # of the pool: a minute's snapshot of 100 volumes, kept for a week; 1 KiB of metadata each
MAX_GROUP_VOLUMES = 256  # snapshotted in one instant: frozen in one piece of the event loop, 100 us each
MAX_HOLDS = 64  # of one snapshot: each is a reason of somebody's
TRASH_S = 24 * 3_600.0  # how long a deleted volume can be had back, unless configured otherwise
MAX_TRASH_S = 3_650 * 86_400.0  # ten years: nobody waits longer, and every clock and calendar reaches as far
TRASH_LOOK_S = 60.0  # between two looks at the trash: the clock may be set meanwhile
PURGE_BATCH_SNAPSHOTS = 200  # snapshots that one step of a volume's purge removes: five small rows each
SEAL_BATCH_BYTES = 4 * MIB  # chunks that get their checksums in one go: read in a thread, one commit
SEAL_BATCH_LEAVES = 128  # leaves looked at for them in one go of a thread: 10 ms that it shares with the event loop
SEAL_PAUSE_S = 0.01  # between two looks at leaves, which take the GIL
SEAL_REST_RATIO = 4  # of rest to work, after each batch of chunks: a fifth of a thread and of the disk
SEAL_RETRY_S = 60.0  # what met a broken disk is tried again
FLATTEN_PIN_BYTES = 256 * MIB  # that a flatten copies before it lets a revert or a deletion of its volume in
CHANGED_LEAF_LISTS = 4  # lists of the leaves that differ between two snapshots, for the next page: 1 MiB for 1 TiB
COPY_BATCH_BYTES = 1 * MIB  # chunks that a flatten copies in one go of a thread: a few ms of the disk
TURN_COPY_BYTES = 512 * KIB  # chunks that one turn of the event loop copies on write before it writes them
RECLAIM_BATCH_ROWS = 2_000  # rows that one step of a branch's removal takes: bounds a transaction to a few MiB
RECLAIM_BATCH_LEAVES = 64  # leaves that one step of a reclaim judges: a few ms of the one writer that all commits share
RECLAIM_BATCH_VERSIONS = 128  # dead versions that it, or a checkpoint, removes: 10 ms; one leaf may have thousands
CHECKSUM_ROWS = 1_024  # of sealed chunks that are kept at hand for copies: 8 GiB of chunks in 2 MiB
PUNCH_COUNT_ROWS = 65_536  # that a job counts to tell how far it is: 0.2 s of a thread, and 50 s of punching
SPACE_FIGURES_S = 0.1  # of a thread for one scrape: the interpreter is shared with the guests' requests
SPACE_FIGURES_COST_RATIO = 0.02  # of the time may go into one volume's figures: with many snapshots they take seconds
PRESSURE_STEP_BYTES = 32 * MIB  # the kernel's dirty counters are asked once per so much written: 25 us each

# --- journal and checkpoint ----------------------------------------------------------------------------------------
JOURNAL_FILE_BYTES = 1 * MIB  # two per open, written volume; half of one is about 10,000 single-chunk allocations
FLUSH_EMBED_BYTES = 32 * KIB  # that a flush takes into the journal: 15 fill half of it. Copies of a file's last writes
FLUSH_EMBED_RANGES = 16  # of a file, likewise: what is noted of a file's last writes stays this short
CHECKPOINT_AGE_S = 30.0  # how old the oldest uncovered record gets
MAX_DIRTY_LEAVES = 4_096  # bounds a freeze to a few ms and a checkpoint to ~17 MiB of metadata
LEAF_CACHE_BYTES = 128 * MIB  # resident leaves of all volumes: the hot map of 220 GiB
METADATA_RESERVE_BYTES = 64 * MIB  # next checkpoint and deletions; preallocated behind LMDB's last page
METADATA_RESERVE_RETRY_S = 5.0  # while it is not whole nothing new is written; a try is one empty transaction
LMDB_MAP_START_BYTES = 1 * GIB  # address space only; grows by doubling
LMDB_MAP_MAX_BYTES = 8 * TIB  # address space; the leaves of 256 PiB of chunks in one version
STORE_GROUP_CHANGES = 64  # changes that share one synced transaction
STORE_WAITING_CHANGES = 1_024  # changes that wait for the writer thread; more callers wait before the queue
METADATA_COPY_INTERVAL_S = 3_600.0  # how much of the catalogue a lost state directory may cost
METADATA_COPY_RETRY_S = 300.0  # a full disk may have room by then; a try writes as much as there is room for
METADATA_COPIES_PER_DEVICE = 2  # the newest may be the one that was being written

# --- NBD -----------------------------------------------------------------------------------------------------------
NBD_HANDSHAKE_S = 10.0  # QEMU's value since CVE-2024-7409
NBD_MAX_OPTIONS = 64  # nbdkit's value
NBD_MAX_OPTION_BYTES = 64 * KIB  # the largest sensible option; more is a lost framing
NBD_MAX_NAME_BYTES = 4_096  # protocol document, "Values": strings SHOULD NOT exceed 4096 bytes
NBD_MAX_PAYLOAD_BYTES = 32 * MIB  # protocol document: a portable client never sends more
NBD_MIN_BLOCK_BYTES = 1  # guests with 512-byte sectors, and tools that read odd ranges
NBD_PREFERRED_BLOCK_BYTES = 4 * KIB  # a page: smaller requests read and write one anyway
NBD_MAX_CONNECTIONS = 4_096  # each is a descriptor; the largest hosts run hundreds of guests
NBD_CONNECTION_BUDGET_BYTES = 64 * MIB  # requests and replies in flight on one connection
NBD_GLOBAL_BUDGET_BYTES = 512 * MIB  # the same over all connections
NBD_SEND_BUFFER_BYTES = 1 * MIB  # of a connection's socket; measured: 15 % more for large reads than the default
NBD_MAX_INFLIGHT_REQUESTS = 256  # slow requests of one connection (fast ones are answered at once)
NBD_SLOW_READER_S = 60.0  # a client that takes no reply bytes for this long is dropped
NBD_BATCH_REQUESTS = 64  # one callback handles so many requests, then lets others run
NBD_BATCH_S = 200e-6  # the longest that one busy connection keeps the others waiting
NBD_PASS_S = 4e-3  # the longest that all of them together keep the rest of the daemon waiting
NBD_MAX_EXTENTS_PER_REPLY = 64 * KIB  # descriptors, shared by the contexts of a session; 512 KiB of reply
NBD_STATUS_CHUNKS = 8_192  # mapped chunks that one answer describes, give or take a leaf: 4 ms of the event loop
NBD_MAX_CONTEXT_QUERIES = 64  # in one option, so contexts of a session: each is looked up, pinned and asked every time
NBD_MAX_LISTED_CONTEXTS = 1_000  # in one answer: each is a reply of its own, and all of them are in memory at once
NBD_DRAIN_S = 10.0  # at shutdown

# --- API -----------------------------------------------------------------------------------------------------------
API_MAX_BODY_BYTES = 64 * KIB  # the largest legal body is a few KiB of labels
API_BODY_S = 30.0  # for a body to arrive: one that never ends must not hold a place among API_MAX_REQUESTS
API_MAX_REQUESTS = 1_024  # running at once: with the largest bodies they hold 64 MiB
API_MAX_JSON_DEPTH = 16  # our models nest a few levels; a deeper body only tries the parser
API_PAGE_ITEMS = 100  # a screen or two
API_MAX_PAGE_ITEMS = 1_000  # all volumes in ten pages; a larger one would hold the event loop for too long
API_MAX_PAGE_TOKEN_CHARS = 512  # ours have up to 200; what a longer one holds is no key of the metadata store
API_CHANGES = 1_000  # ranges of changed blocks in one answer, where nothing else is asked for: 70 KiB
API_MAX_CHANGES = 10_000  # at most: an answer of 700 KiB
API_MAX_WAIT_S = 60.0  # for a job, in one request: what proxies and clients keep an idle connection for
IDEMPOTENCY_KEY_S = 24 * 3_600  # a day: longer than any client's retries
MAX_IDEMPOTENCY_KEYS = 100_000  # more than one creation a second, all day long
UNIX_PATH_MAX_BYTES = 107  # sun_path is 108 with its NUL
CLI_MAX_HEAD_BYTES = 64 * KIB  # status line and headers of an answer: the daemon sends a few hundred bytes
CLI_MAX_ANSWER_BYTES = 256 * MIB  # a page of API_MAX_PAGE_ITEMS hosts with 500 units each

# --- schedules -----------------------------------------------------------------------------------------------------
MAX_SCHEDULES = 1_000  # one covers many volumes by their labels; all are looked through when the daemon starts
MAX_SCHEDULE_NAME_CHARS = 39  # with 'auto-' before it, the time and a number behind it, it fits a snapshot's name
MAX_CRON_CHARS = 256  # every second minute written out, with a list of hours; more is no schedule for people
MAX_KEPT_SNAPSHOTS = 10_000  # per rule: what reads and writes are measured with
MAX_MISSED_RUNS = 1_000  # counted after one downtime: up to 40 us of the event loop each
MAX_PREVIEW_RUNS = 100  # next runs that one request computes: a month of daily ones, thrice
SCHEDULE_LOOK_S = 60.0  # between two looks at the clock: it may be set, or the machine may have slept
SCHEDULE_LATE_S = 60.0  # a run that begins later than this is a missed one that is caught up
SCHEDULE_CLOCK_STEP_S = 3_600.0  # a clock that goes back by more is taken to have been wrong before

# --- snapshot streams ----------------------------------------------------------------------------------------------
STREAM_MAX_DATA_BYTES = 1 * MIB  # in one frame: a larger one compresses no better, and a reader holds one several times
STREAM_MAX_HEADER_BYTES = 256 * KIB  # MAX_LABELS of MAX_LABEL_CHARS that JSON escapes, all of them, take 192 KiB
STREAM_MAX_CREATED_S = 253_402_300_800.0  # the year 10000, the first that no calendar of ours can show
STREAM_BATCH_LEAVES = 64  # of the map that an export looks at in one go: 512 MiB of volume, a few ms of the store
STREAM_BATCH_EVENTS = 256  # decoded in one go of a thread, as long as they hold less than STREAM_MAX_DATA_BYTES
STREAM_ZERO_BYTES = 1 * GIB  # zeroed in one go: between two of them the end of an import is noticed
STREAM_IDLE_S = 600.0  # that a stream may rest: pipes wait for slow disks and for passwords, and volumes for streams
API_MAX_STREAMS = 8  # at once: each holds 10 MiB, and one of the IO_THREADS that guests need too

# --- jobs ----------------------------------------------------------------------------------------------------------
RUNNING_JOBS_PER_KIND = 2  # one goes on while the other waits for its disk; more would only take from the guests
FINISHED_JOBS_PER_KIND = 256  # four minutes of a reclaim a second: a client that polls every minute misses none
WAITING_JOBS_PER_KIND = 64  # that leave their place to others meanwhile: each keeps a task
JOB_PROGRESS_S = 5.0  # how much work a kill may repeat; progress stored more often costs a sync each time
JOB_RETRY_S = 60.0  # a reclaim that met a broken disk is tried again: its space would be lost until a restart
JOB_RATE_WINDOW_S = 30.0  # long enough to be steady beside guest I/O, short enough to show that a job got stuck
JOB_ERROR_CHARS = 1_000  # of a failure's message, kept with the job

# --- scrub ---------------------------------------------------------------------------------------------------------
SCRUB_RATE_BYTES = 64 * MIB  # per second, unless configured otherwise: 5 TiB a day, half of what a hard disk can do
SCRUB_MIN_RATE_BYTES = 1 * MIB  # per second; slower, a scrub of 1 TiB would take longer than two weeks
SCRUB_BATCH_BYTES = 1 * MIB  # read in one go of its thread: a few ms of the disk between two looks at guests
SCRUB_BATCH_ROWS = 512  # of the metadata in one transaction: a few ms
SCRUB_REST_RATIO = 1  # of rest to work: it takes half of the disk's time at most, less where guests make it slow
SCRUB_PAUSE_S = 1.0  # the longest rest in one piece: a scrub that is to stop looks up so often
KEPT_SCRUBS = 24  # results: two years of monthly ones
SCRUB_FINDINGS = 100  # told in detail for each: 30 KiB; of a disk that is gone, more would say no more
METADATA_PREREAD_BYTES = 1 * GIB  # at a start, which this delays by seconds; what lies behind it the scrub reads

# --- the interpreter -----------------------------------------------------------------------------------------------
GC_NEW_OBJECTS = 20_000  # that set off a collection of cycles: some MiB of garbage at most, where there is any
IO_THREADS = 16  # cold reads, syncs and copies; syncs of different files overlap in the kernel
