/* What one thread has in flight with one UCX worker: messages by their tags, and the first bytes of each connection.
 *
 * UCX calls back inside `ucp_worker_progress`. All that its callbacks do here is to queue their operation with its
 * status; `flight_turn` hands over what is queued, in the order of the ends. So nothing has to be searched for what has
 * ended, and what nothing happened to costs nothing.
 *
 * An operation's index is its poster's: one that is free. The buffer belongs to UCX until that index is handed over.
 * UCX's headers are not needed: its functions come as pointers, and the one structure is that of `ucp/api/ucp.h` of
 * UCX 1.19 to 1.21.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define EXPORT __attribute__((visibility("default")))
#define BLOCK 64                /* operations in one piece of memory, which never moves: UCX points into it */
#define ENDS 64                 /* that one turn hands over, so that callbacks which post what ends at once cannot hold it */
#define TURN_NS 1000000LL       /* the longest turn while something moves that ends nothing; a call takes in 512 KiB */
#define IN_PROGRESS 1           /* UCS_INPROGRESS; 0 is a success, an error is negative: ucs/type/status.h */
#define NO_MEMORY (-4)          /* UCS_ERR_NO_MEMORY */
#define FIRST_ERROR (UINTPTR_MAX - 99) /* UCS_PTR_IS_ERR: a pointer from here on is a status */

/* enum ucp_op_attr_t */
#define WITH_CALLBACK (1u << 1)
#define WITH_USER_DATA (1u << 2)
#define WITH_FLAGS (1u << 4)
#define WITH_MEMORY_TYPE (1u << 6)
#define WHOLE (1u << 0) /* UCP_STREAM_RECV_FLAG_WAITALL */
#define ANY 0, 0        /* tag and mask that all messages match */

/* ucp_request_param_t */
struct parameters {
    uint32_t mask, flags;
    void *request;
    void *callback;
    uint64_t datatype;
    void *user_data, *reply_buffer;
    int memory_type; /* 0: of the host; not asked for, UCX looks it up */
    void *receive_info, *memory_handle;
};

/* In the order of `FUNCTIONS` in link/flight.py. */
struct ucp {
    void *(*tag_send)(void *endpoint, const void *buffer, size_t nbytes, uint64_t tag, const struct parameters *);
    void *(*tag_receive)(void *worker, void *buffer, size_t nbytes, uint64_t tag, uint64_t mask,
                         const struct parameters *);
    void *(*stream_send)(void *endpoint, const void *buffer, size_t nbytes, const struct parameters *);
    void *(*stream_receive)(void *endpoint, void *buffer, size_t nbytes, size_t *got, const struct parameters *);
    void *(*tag_probe)(void *worker, uint64_t tag, uint64_t mask, int removes, uint64_t info[2]);
    unsigned (*progress)(void *worker);
    void (*cancel)(void *worker, void *request);
    void (*free)(void *request);
};

struct operation {
    struct flight *flight;
    void *request; /* UCX's, while it is in progress */
    struct operation *next;
    uint32_t index;
    int status;
};

/* All of it is the caller's memory, zeros at first, with words of 64 bits: see link/flight.py. */
struct flight {
    void *worker;
    struct ucp ucp;
    /* the arguments of a call */
    uint64_t index; /* of an operation; all that is posted has the next ones, too */
    void *endpoint; /* not of a receive */
    void *buffer;
    size_t nbytes;
    uint64_t tag;     /* not of what goes by the stream */
    uint64_t handled; /* how many ends the caller has seen to, ever */
    int64_t spin_ns;
    /* what a call has found */
    uint64_t info[2]; /* ucp_tag_recv_info_t: tag, bytes */
    uint64_t ended;   /* how many ends there have been, ever */
    int64_t ends[ENDS];
    /* private */
    struct operation **blocks;
    uint64_t n_blocks;
    struct operation *first, *last; /* what has ended */
    uint64_t dropped;               /* so many ends are not queued any more */
};

EXPORT int flight_words(void) { return sizeof(struct flight) / 8; }

static void queue_end(struct operation *operation, int status) {
    struct flight *flight = operation->flight;
    operation->request = NULL;
    operation->status = status;
    operation->next = NULL;
    if (flight->first == NULL)
        flight->first = operation;
    else
        flight->last->next = operation;
    flight->last = operation;
    flight->ended++;
}

static void note_end(struct operation *operation, void *request, int status) {
    queue_end(operation, status);
    operation->flight->ucp.free(request);
}

/* ucs_status_t has one byte, whose extension callers and callees may see differently. */
static void sent(void *request, int status, void *operation) { note_end(operation, request, (int8_t)status); }

static void received(void *request, int status, const void *info, void *operation) {
    (void)info;
    note_end(operation, request, (int8_t)status);
}

static void streamed(void *request, int status, size_t nbytes, void *operation) {
    (void)nbytes;
    note_end(operation, request, (int8_t)status);
}

static struct operation *operation_of(struct flight *flight) {
    while (flight->index / BLOCK >= flight->n_blocks) {
        struct operation **blocks = realloc(flight->blocks, (flight->n_blocks + 1) * sizeof *blocks);
        if (blocks == NULL)
            return NULL;
        flight->blocks = blocks;
        struct operation *block = calloc(BLOCK, sizeof *block);
        if (block == NULL)
            return NULL;
        for (uint32_t i = 0; i < BLOCK; i++)
            block[i] = (struct operation){.flight = flight, .index = (uint32_t)flight->n_blocks * BLOCK + i};
        blocks[flight->n_blocks++] = block;
    }
    return &flight->blocks[flight->index / BLOCK][flight->index % BLOCK];
}

static struct parameters asked(struct operation *operation, void *callback) {
    return (struct parameters){
        .mask = WITH_CALLBACK | WITH_USER_DATA | WITH_MEMORY_TYPE, .callback = callback, .user_data = operation};
}

/* IN_PROGRESS, or how it ended at once: which is all that is heard of a send. */
static int begun(struct operation *operation, void *request) {
    if (request != NULL && (uintptr_t)request < FIRST_ERROR) {
        operation->request = request;
        return IN_PROGRESS;
    }
    return request == NULL ? 0 : (int)(intptr_t)request;
}

/* The same; the end of a receive is queued, behind what ended before. */
static int receiving(struct operation *operation, void *request) {
    int status = begun(operation, request);
    if (status != IN_PROGRESS)
        queue_end(operation, status);
    return status;
}

/* A send is of `bytes`, if there are any. */
EXPORT int flight_send(struct flight *flight, const void *bytes) {
    struct operation *operation = operation_of(flight);
    if (operation == NULL)
        return NO_MEMORY;
    struct parameters parameters = asked(operation, (void *)sent);
    const void *buffer = bytes != NULL ? bytes : flight->buffer;
    return begun(operation,
                 flight->ucp.tag_send(flight->endpoint, buffer, flight->nbytes, flight->tag, &parameters));
}

EXPORT int flight_receive(struct flight *flight) {
    struct operation *operation = operation_of(flight);
    if (operation == NULL)
        return NO_MEMORY;
    struct parameters parameters = asked(operation, (void *)received);
    return receiving(operation, flight->ucp.tag_receive(flight->worker, flight->buffer, flight->nbytes, flight->tag,
                                                        UINT64_MAX, &parameters));
}

EXPORT int flight_stream_send(struct flight *flight, const void *bytes) {
    struct operation *operation = operation_of(flight);
    if (operation == NULL)
        return NO_MEMORY;
    struct parameters parameters = asked(operation, (void *)sent);
    const void *buffer = bytes != NULL ? bytes : flight->buffer;
    return begun(operation, flight->ucp.stream_send(flight->endpoint, buffer, flight->nbytes, &parameters));
}

/* All of it, not the part that has come. */
EXPORT int flight_stream_receive(struct flight *flight) {
    struct operation *operation = operation_of(flight);
    if (operation == NULL)
        return NO_MEMORY;
    struct parameters parameters = asked(operation, (void *)streamed);
    parameters.mask |= WITH_FLAGS;
    parameters.flags = WHOLE;
    size_t got;
    return receiving(operation, flight->ucp.stream_receive(flight->endpoint, flight->buffer, flight->nbytes, &got,
                                                           &parameters));
}

/* It ends, cancelled or not, in a later turn, or never where UCX has it half. */
EXPORT void flight_cancel(struct flight *flight) {
    struct operation *operation = operation_of(flight);
    if (operation != NULL && operation->request != NULL)
        flight->ucp.cancel(flight->worker, operation->request);
}

/* Whether there is a message that nothing has been posted for: see `info`. */
EXPORT int flight_probe(struct flight *flight) {
    return flight->ucp.tag_probe(flight->worker, ANY, 0, flight->info) != NULL;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Whether ends wait beyond those that are handled. */
EXPORT int flight_has_ends(struct flight *flight) {
    for (; flight->first != NULL && flight->dropped < flight->handled; flight->dropped++)
        flight->first = flight->first->next;
    return flight->first != NULL;
}

/* Progress until something has ended, or nothing moves any more (for `spin_ns`, if nothing has yet).
 *
 * Returns how many `ends` there are now, each an index << 8 | status; -1: nothing moved. They are there again in the
 * next turn unless they are handled by then; an index is not free before.
 */
EXPORT int flight_turn(struct flight *flight) {
    int moved = 0;
    int64_t until = 0, spin_ns = flight_has_ends(flight) ? 0 : flight->spin_ns;
    for (;;) {
        if (flight->ucp.progress(flight->worker) != 0) {
            if (flight->first != NULL)
                break;
            if (!moved)
                until = now_ns() + TURN_NS;
            else if (now_ns() >= until)
                break;
            moved = 1;
            continue;
        }
        if (moved || flight->first != NULL || spin_ns <= 0)
            break;
        int64_t now = now_ns();
        if (until == 0)
            until = now + spin_ns;
        else if (now >= until)
            break;
        sched_yield(); /* on a full machine the peer waits for this very core: 4 KiB in 280 us, not 433 */
    }
    int found = 0;
    for (struct operation *one = flight->first; one != NULL && found < ENDS; one = one->next)
        flight->ends[found++] = (int64_t)one->index << 8 | (uint8_t)one->status;
    return found > 0 ? found : moved - 1;
}

/* Only when nothing is in flight. */
EXPORT void flight_close(struct flight *flight) {
    for (uint64_t i = 0; i < flight->n_blocks; i++)
        free(flight->blocks[i]);
    free(flight->blocks);
    flight->blocks = NULL;
    flight->first = NULL;
    flight->n_blocks = 0;
}
