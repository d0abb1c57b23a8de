/*
 * The floor of the speed report: an NBD server that does nothing but NBD.
 *
 *     floor SOCKET SIZE_BYTES [FILE [thread]]
 *
 * It serves plain memory on a unix socket, one thread per connection. All complete requests of the receive buffer are
 * answered in one pass and their replies leave by one writev, as in the daemon it is compared with. There is no map,
 * no file and no promise: what it costs is what the protocol, the socket and one copy of the data cost in C.
 *
 * With a FILE of that size it keeps the one promise that a flush makes: writes are pwrites to it, and a flush is an
 * fdatasync in the thread that received it. Whoever sits behind a socket and syncs a file takes as long, or longer.
 * With the word `thread` another thread does that, as in every server whose loop has to go on while a disk hangs: what
 * it takes longer is two threads woken.
 *
 * It knows what fio's nbd engine asks for. A client that asks for anything else, or beyond the end, is hung up on.
 * Section names in the comments are those of the NBD protocol document.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

/* "Fixed newstyle negotiation" */
#define GREETING "NBDMAGICIHAVEOPT"
#define GREETING_BYTES 16
enum { FLAG_FIXED_NEWSTYLE = 1, FLAG_NO_ZEROES = 2 };
#define OPTION_REPLY_MAGIC 0x0003e889045565a9ull
enum { OPT_ABORT = 2, OPT_INFO = 6, OPT_GO = 7, OPT_STRUCTURED_REPLY = 8 };
enum { REP_ACK = 1, REP_INFO = 3 };
#define REP_ERR_UNSUP 0x80000001u
enum { INFO_EXPORT = 0 };
enum { HAS_FLAGS = 1 << 0, SEND_FLUSH = 1 << 2, SEND_FUA = 1 << 3, CAN_MULTI_CONN = 1 << 8 };

/* "Transmission" */
#define REQUEST_MAGIC 0x25609513u
#define SIMPLE_REPLY_MAGIC 0x67446698u
#define STRUCTURED_REPLY_MAGIC 0x668e33efu
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, CMD_FLUSH = 3 };
enum { REPLY_FLAG_DONE = 1, REPLY_TYPE_OFFSET_DATA = 1 };

#define PACKED __attribute__((packed))
struct PACKED option { uint64_t magic; uint32_t option, length; };
struct PACKED option_reply { uint64_t magic; uint32_t option, type, length; };
struct PACKED export_info { uint16_t type; uint64_t size; uint16_t flags; };
struct PACKED request { uint32_t magic; uint16_t flags, type; uint64_t cookie, offset; uint32_t length; };
struct PACKED simple_reply { uint32_t magic, error; uint64_t cookie; };
struct PACKED data_chunk { uint32_t magic; uint16_t flags, type; uint64_t cookie; uint32_t length; uint64_t offset; };

#define OPTION_MAX_BYTES 65536
#define PAYLOAD_MAX_BYTES (4u << 20)
#define BUFFER_BYTES (16u << 20)
#define BATCH_MAX 512 /* two vectors each: one writev takes IOV_MAX of them */
_Static_assert(2 * BATCH_MAX <= IOV_MAX, "a batch must fit one writev");

static char *memory;
static uint64_t memory_bytes;
static int file = -1;
static bool sync_in_thread;

struct connection {
    int socket;
    bool structured;
    char *buffer;       /* of BUFFER_BYTES; what was received and not answered lies in begin..end */
    size_t begin, end;
    union { struct simple_reply simple; struct data_chunk chunk; } replies[BATCH_MAX];
    int reply_count;
    struct iovec vectors[2 * BATCH_MAX];
    int vector_count;
    pthread_t syncer;
    sem_t sync_asked, sync_done;
    bool sync_failed, ends;
};

static bool read_all(int socket, void *to, size_t length) {
    for (char *at = to; length > 0;) {
        ssize_t got = read(socket, at, length);
        if (got <= 0) return false;
        at += got;
        length -= got;
    }
    return true;
}

static bool write_all(int socket, struct iovec *vectors, int count) {
    while (count > 0) {
        ssize_t sent = writev(socket, vectors, count);
        if (sent <= 0) return false;
        for (; count > 0 && (size_t)sent >= vectors->iov_len; vectors++, count--) sent -= vectors->iov_len;
        if (count > 0) {
            vectors->iov_base = (char *)vectors->iov_base + sent;
            vectors->iov_len -= sent;
        }
    }
    return true;
}

/* --- handshake ---------------------------------------------------------------------------------------------------- */

static bool reply_to_option(int socket, uint32_t option, uint32_t type, void *data, uint32_t length) {
    struct option_reply header = {htobe64(OPTION_REPLY_MAGIC), htobe32(option), htobe32(type), htobe32(length)};
    struct iovec vectors[] = {{&header, sizeof header}, {data, length}};
    return write_all(socket, vectors, length > 0 ? 2 : 1);
}

static bool describe_export(int socket, uint32_t option) {
    uint16_t flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | CAN_MULTI_CONN;
    struct export_info info = {htobe16(INFO_EXPORT), htobe64(memory_bytes), htobe16(flags)};
    return reply_to_option(socket, option, REP_INFO, &info, sizeof info) &&
           reply_to_option(socket, option, REP_ACK, NULL, 0);
}

/* True when the client has chosen the export: there is one, under every name. */
static bool negotiate(struct connection *connection) {
    int socket = connection->socket;
    uint16_t flags = htobe16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    struct iovec greeting[] = {{GREETING, GREETING_BYTES}, {&flags, sizeof flags}};
    uint32_t client_flags;
    if (!write_all(socket, greeting, 2) || !read_all(socket, &client_flags, sizeof client_flags)) return false;
    for (;;) {
        static _Thread_local char ignored[OPTION_MAX_BYTES]; /* names and wishes: there is nothing to choose from */
        struct option header;
        if (!read_all(socket, &header, sizeof header)) return false;
        uint32_t option = be32toh(header.option), length = be32toh(header.length);
        if (length > sizeof ignored || !read_all(socket, ignored, length)) return false;
        if (option == OPT_GO) return describe_export(socket, option);
        bool said;
        if (option == OPT_INFO) {
            said = describe_export(socket, option);
        } else if (option == OPT_STRUCTURED_REPLY) {
            connection->structured = true;
            said = reply_to_option(socket, option, REP_ACK, NULL, 0);
        } else {
            said = reply_to_option(socket, option, option == OPT_ABORT ? REP_ACK : REP_ERR_UNSUP, NULL, 0);
        }
        if (!said || option == OPT_ABORT) return false;
    }
}

/* --- transmission ------------------------------------------------------------------------------------------------- */

static void add_vector(struct connection *connection, void *base, size_t length) {
    connection->vectors[connection->vector_count++] = (struct iovec){base, length};
}

static void add_simple_reply(struct connection *connection, uint64_t cookie) {
    struct simple_reply *reply = &connection->replies[connection->reply_count++].simple;
    *reply = (struct simple_reply){htobe32(SIMPLE_REPLY_MAGIC), 0, cookie};
    add_vector(connection, reply, sizeof *reply);
}

/* The data goes out of the memory as it is when the batch is sent: a read is not ordered against writes beside it. */
static void add_read_reply(struct connection *connection, uint64_t cookie, uint64_t offset, uint32_t length) {
    if (connection->structured) { /* "Structured replies": a read is answered by chunks */
        struct data_chunk *chunk = &connection->replies[connection->reply_count++].chunk;
        *chunk = (struct data_chunk){htobe32(STRUCTURED_REPLY_MAGIC), htobe16(REPLY_FLAG_DONE),
                                     htobe16(REPLY_TYPE_OFFSET_DATA), cookie,
                                     htobe32(length + sizeof chunk->offset), htobe64(offset)};
        add_vector(connection, chunk, sizeof *chunk);
    } else {
        add_simple_reply(connection, cookie);
    }
    add_vector(connection, memory + offset, length);
}

static bool store(const char *data, size_t length, uint64_t offset) {
    if (file >= 0) return pwrite(file, data, length, offset) == (ssize_t)length;
    memcpy(memory + offset, data, length);
    return true;
}

static void *sync_when_asked(void *argument) {
    struct connection *connection = argument;
    while (!sem_wait(&connection->sync_asked) && !connection->ends) {
        connection->sync_failed = fdatasync(file);
        sem_post(&connection->sync_done);
    }
    return NULL;
}

static bool flush(struct connection *connection) {
    if (file < 0) return true;
    if (!sync_in_thread) return !fdatasync(file);
    sem_post(&connection->sync_asked);
    return !sem_wait(&connection->sync_done) && !connection->sync_failed;
}

enum outcome { ANSWERED, INCOMPLETE, HANG_UP };

/* The request at the beginning of the buffer, if all of it is there. */
static enum outcome answer(struct connection *connection) {
    struct request request;
    size_t received = connection->end - connection->begin;
    if (received < sizeof request) return INCOMPLETE;
    memcpy(&request, connection->buffer + connection->begin, sizeof request);
    uint16_t type = be16toh(request.type);
    uint64_t offset = be64toh(request.offset);
    uint32_t length = be32toh(request.length);
    if (be32toh(request.magic) != REQUEST_MAGIC || length > PAYLOAD_MAX_BYTES) return HANG_UP;
    if (offset > memory_bytes || length > memory_bytes - offset) return HANG_UP;
    size_t payload = type == CMD_WRITE ? length : 0;
    if (received < sizeof request + payload) return INCOMPLETE;
    if (type == CMD_READ) {
        add_read_reply(connection, request.cookie, offset, length);
    } else if (type == CMD_WRITE) {
        if (!store(connection->buffer + connection->begin + sizeof request, length, offset)) return HANG_UP;
        add_simple_reply(connection, request.cookie);
    } else if (type == CMD_FLUSH) {
        if (!flush(connection)) return HANG_UP;
        add_simple_reply(connection, request.cookie);
    } else {
        return HANG_UP; /* CMD_DISC, and what we never advertised */
    }
    connection->begin += sizeof request + payload;
    return ANSWERED;
}

/* Receive what there is; room for a whole request is always left, because what is incomplete moves to the front. */
static bool receive(struct connection *connection) {
    size_t rest = connection->end - connection->begin;
    if (rest == 0) {
        connection->begin = connection->end = 0;
    } else if (BUFFER_BYTES - connection->begin < PAYLOAD_MAX_BYTES + sizeof(struct request)) {
        memmove(connection->buffer, connection->buffer + connection->begin, rest);
        connection->begin = 0;
        connection->end = rest;
    }
    ssize_t got = recv(connection->socket, connection->buffer + connection->end, BUFFER_BYTES - connection->end, 0);
    if (got > 0) connection->end += got;
    return got > 0;
}

static void transmit(struct connection *connection) {
    enum outcome outcome = INCOMPLETE;
    while (outcome != HANG_UP) {
        if (outcome == INCOMPLETE && !receive(connection)) return;
        connection->reply_count = connection->vector_count = 0;
        while ((outcome = answer(connection)) == ANSWERED && connection->reply_count < BATCH_MAX) continue;
        if (!write_all(connection->socket, connection->vectors, connection->vector_count)) return;
    }
}

static void *serve(void *argument) {
    struct connection *connection = argument;
    bool syncer = sync_in_thread && !pthread_create(&connection->syncer, NULL, sync_when_asked, connection);
    if (syncer == sync_in_thread && negotiate(connection)) transmit(connection);
    if (syncer) {
        connection->ends = true;
        sem_post(&connection->sync_asked);
        pthread_join(connection->syncer, NULL);
    }
    close(connection->socket);
    free(connection->buffer);
    free(connection);
    return NULL;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

int main(int count, char **arguments) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    sync_in_thread = count == 5 && !strcmp(arguments[4], "thread");
    if (count < 3 || count > 4 + sync_in_thread || strlen(arguments[1]) >= sizeof address.sun_path) {
        fprintf(stderr, "usage: floor SOCKET SIZE_BYTES [FILE [thread]]\n");
        return 2;
    }
    strcpy(address.sun_path, arguments[1]);
    memory_bytes = strtoull(arguments[2], NULL, 10);
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (count > 3) {
        if ((file = open(arguments[3], O_RDWR)) < 0) fail(arguments[3]);
        kind = MAP_SHARED; /* reads come from the page cache, which the pwrites go to */
    }
    memory = mmap(NULL, memory_bytes, PROT_READ | PROT_WRITE, kind, file, 0);
    if (memory == MAP_FAILED) fail("mmap");
    signal(SIGPIPE, SIG_IGN);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, SOMAXCONN))
        fail(arguments[1]);
    for (;;) {
        struct connection *connection = calloc(1, sizeof *connection);
        if (connection == NULL || (connection->buffer = malloc(BUFFER_BYTES)) == NULL) fail("malloc");
        if (sem_init(&connection->sync_asked, 0, 0) || sem_init(&connection->sync_done, 0, 0)) fail("sem_init");
        if ((connection->socket = accept(listener, NULL, NULL)) < 0) fail("accept");
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, connection)) fail("pthread_create");
        pthread_detach(thread);
    }
}
