/* The transitions of the slots of one segment, each a whole critical section: lock, look, store, unlock.
 *
 * `ring/states.py` and `ring/layout.py` are the specification; `ring_layout.h` is generated from them. What a transition
 * stores is ordered so that a process killed at any instruction leaves a slot either before or after it: a change commits
 * by one store of the slot's state word (within READING, of a read entry's first word). What is stored before that does
 * not count while the old state stands, and what is stored after it does not count under the new one:
 *
 *   FREE     nothing of the header counts
 *   WRITING  the writer
 *   READY    nbytes, sequence, checksum, required reads, envelope, message, entries of readers that have had the payload
 *   READING  the same, and the entries in flight
 *
 * The lock is a robust mutex: when its holder dies the kernel hands it on (EOWNERDEAD), and the next holder completes or
 * undoes the one transition that was cut off and links the lists of slots again. Nothing here calls back, allocates, or
 * trusts an index that it has not checked.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "ring_layout.h"

#define EXPORT __attribute__((visibility("default")))
#define SPINS 100           /* a critical section takes a fraction of a microsecond */
#define SLICE_NS 20000000LL /* the longest wait for the lock in one call, so that the caller sees its signals */
#define TAKE_ENTRIES 8192   /* read entries, about, that a take looks at before it leaves the lock to others: 0.1 ms */
#define HOLDS_SLOTS 2048    /* slots, likewise, that are listed */

/* Bits of TAKERS_WORD. */
#define ASLEEP 1ULL
#define WAKE 2ULL /* something has become READY since */

/* A build for tests: `cut` stands wherever another process sees a difference, before each store to the segment, before
 * the lock is released, and before each wake-up; `visit` wherever the words of a slot are looked for. */
#ifdef RING_CUT
static long stores_left = -1;
static uint64_t visits;
EXPORT void ring_cut_after(long stores) { stores_left = stores; }
EXPORT uint64_t ring_visits(void) { return visits; }
static void cut(void) {
    if (stores_left >= 0 && stores_left-- == 0)
        _exit(97);
}
static void visit(void) { visits++; }
#else
#define cut() ((void)0)
#define visit() ((void)0)
#endif

/* Where a segment lies in this process; the sizes are those that its attacher has checked. */
struct ring {
    uint64_t *words;
    uint64_t slots, slot_bytes, first_slot_word, slot_words, entries, max_attempts, first_payload, stride, envelope_bytes;
};

static inline uint64_t load(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

static inline void store(uint64_t *word, uint64_t value) {
    cut();
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* Words of waits, which are also stored to without the lock. */

static inline uint64_t look(uint64_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }

static inline uint64_t exchange(uint64_t *word, uint64_t value) {
    cut();
    return __atomic_exchange_n(word, value, __ATOMIC_SEQ_CST);
}

static inline void set(uint64_t *word, uint64_t bits) {
    cut();
    __atomic_or_fetch(word, bits, __ATOMIC_SEQ_CST);
}

static inline void advance_futex(uint64_t *word) {
    cut();
    __atomic_add_fetch((uint32_t *)word, 1, __ATOMIC_SEQ_CST);
}

static void wake(uint64_t *word) {
    cut();
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static inline void add(uint64_t *word, uint64_t amount) { store(word, *word + amount); }

static inline void count(const struct ring *ring, unsigned counter) { add(ring->words + COUNTER_WORD + counter, 1); }

static inline uint64_t *header(const struct ring *ring, uint64_t slot) {
    visit();
    return ring->words + ring->first_slot_word + slot * ring->slot_words;
}

static inline uint64_t *entry_of(uint64_t *slot, uint64_t index) { return slot + FIRST_ENTRY + index * ENTRY_WORDS; }

static inline const struct ring *ring_of(const uint64_t *hold) { return (const struct ring *)hold[HOLD_RING]; }

static inline unsigned state_of(uint64_t word) { return (unsigned)(word & STATE_MASK); }

static inline uint64_t generation_of(uint64_t word) { return word >> STATE_BITS; }

/* The only maker of state words; 0 (FREE, generation 0: no transition makes it) where the table has no such step. */
static inline uint64_t advance(uint64_t word, unsigned event) {
    unsigned state = state_of(word);
    if (state >= STATES || STEP[event][state] == NO_STEP)
        return 0;
    return word + (uint64_t)STEP[event][state];
}

static uint64_t now_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

/* ---- The lists of slots: FREE ones in the order in which they became so, READY and READING ones by age, and READY ones
 * by age. `links` is the first of a list's two words in a slot's header: the slot before, the slot behind. ---- */

static inline uint64_t first_word_of(unsigned state) { return state == FREE ? FREE_FIRST_WORD : HELD_FIRST_WORD; }

static inline int is_listed(const struct ring *ring, uint64_t number) { return number >= 1 && number <= ring->slots; }

static void insert(const struct ring *ring, uint64_t first, unsigned links, uint64_t before, uint64_t slot, uint64_t behind) {
    uint64_t *words = ring->words, *own = header(ring, slot);
    store(own + links, before);
    store(own + links + 1, behind);
    store(is_listed(ring, before) ? header(ring, before - 1) + links + 1 : words + first, slot + 1);
    store(is_listed(ring, behind) ? header(ring, behind - 1) + links : words + first + 1, slot + 1);
}

static void append(const struct ring *ring, uint64_t first, uint64_t slot) {
    insert(ring, first, PREVIOUS, ring->words[first + 1], slot, 0);
}

static void detach(const struct ring *ring, uint64_t first, unsigned links, uint64_t slot) {
    uint64_t *words = ring->words, *own = header(ring, slot);
    uint64_t before = own[links], behind = own[links + 1];
    store(is_listed(ring, before) ? header(ring, before - 1) + links + 1 : words + first, behind);
    store(is_listed(ring, behind) ? header(ring, behind - 1) + links : words + first + 1, before);
}

/* Put a slot that has become READY, and is in the list by age, where it belongs among the READY ones: next to the nearest
 * of them, either way. Those in between are READING; many that are given back one by one lie next to each other. */
static void append_ready(const struct ring *ring, uint64_t slot) {
    const uint64_t *own = header(ring, slot);
    uint64_t before = own[PREVIOUS], behind = own[NEXT];
    if (!ring->words[READY_FIRST_WORD])
        before = behind = 0;
    for (uint64_t turn = 0; turn < ring->slots; turn++) {
        if (!is_listed(ring, before)) {
            before = 0, behind = ring->words[READY_FIRST_WORD];
            break;
        }
        if (!is_listed(ring, behind)) {
            before = ring->words[READY_LAST_WORD], behind = 0;
            break;
        }
        const uint64_t *older = header(ring, before - 1), *newer = header(ring, behind - 1);
        if (state_of(older[STATE]) == READY) {
            behind = older[READY_NEXT];
            break;
        }
        if (state_of(newer[STATE]) == READY) {
            before = newer[READY_PREVIOUS];
            break;
        }
        before = older[PREVIOUS], behind = newer[NEXT];
    }
    insert(ring, READY_FIRST_WORD, READY_PREVIOUS, before, slot, behind);
}

/* Sort the list that begins at 1 + slot `list` by sequence, along NEXT: a merge sort that needs no memory. */
static uint64_t sorted(const struct ring *ring, uint64_t list) {
    for (uint64_t width = 1;; width *= 2) {
        uint64_t left = list, merges = 0, tail = 0;
        list = 0;
        while (left) {
            uint64_t right = left, lefts = 0, rights = width;
            merges++;
            while (lefts < width && right) {
                lefts++;
                right = header(ring, right - 1)[NEXT];
            }
            while (lefts || (rights && right)) {
                uint64_t next;
                if (!lefts || (rights && right && header(ring, right - 1)[SEQUENCE] < header(ring, left - 1)[SEQUENCE])) {
                    next = right;
                    right = header(ring, right - 1)[NEXT];
                    rights--;
                } else {
                    next = left;
                    left = header(ring, left - 1)[NEXT];
                    lefts--;
                }
                if (tail)
                    store(header(ring, tail - 1) + NEXT, next);
                else
                    list = next;
                tail = next;
            }
            left = right;
        }
        if (tail)
            store(header(ring, tail - 1) + NEXT, 0);
        if (merges <= 1)
            return list;
    }
}

/* Make the lists and the counts of states anew from the state words, which alone are the truth. */
static void relink(const struct ring *ring) {
    uint64_t *words = ring->words, held = 0, counts[STATES] = {0};
    store(words + FREE_FIRST_WORD, 0);
    store(words + FREE_LAST_WORD, 0);
    for (uint64_t slot = 0; slot < ring->slots; slot++) {
        uint64_t *own = header(ring, slot);
        unsigned state = state_of(own[STATE]);
        if (state >= STATES)
            continue; /* foreign words: a slot that nobody can use */
        counts[state]++;
        if (state == FREE) {
            append(ring, FREE_FIRST_WORD, slot);
        } else if (state != WRITING) {
            store(own + NEXT, held);
            held = slot + 1;
        }
    }
    held = sorted(ring, held);
    uint64_t before = 0;
    store(words + HELD_FIRST_WORD, held);
    store(words + READY_FIRST_WORD, 0);
    store(words + READY_LAST_WORD, 0);
    for (; held; held = header(ring, held - 1)[NEXT]) {
        uint64_t *own = header(ring, held - 1);
        store(own + PREVIOUS, before);
        if (state_of(own[STATE]) == READY)
            insert(ring, READY_FIRST_WORD, READY_PREVIOUS, words[READY_LAST_WORD], held - 1, 0);
        before = held;
    }
    store(words + HELD_LAST_WORD, before);
    for (unsigned state = 0; state < STATES; state++)
        store(words + STATE_COUNT_WORD + state, counts[state]);
}

/* Something can be taken that could not. */
static void readied(const struct ring *ring) {
    uint64_t *words = ring->words;
    advance_futex(words + READIED_WORD);
    if (look(words + TAKERS_WORD))
        set(words + TAKERS_WORD, WAKE);
}

/* Store a slot's new state; the lists and counts follow it. */
static void become(const struct ring *ring, uint64_t slot, uint64_t word) {
    uint64_t *words = ring->words, *own = header(ring, slot);
    unsigned old = state_of(own[STATE]), new = state_of(word);
    if (old == new) {
        store(own + STATE, word);
        return;
    }
    int was_held = old == READY || old == READING, is_held = new == READY || new == READING;
    store(own + STATE, word);
    if (old == READY)
        detach(ring, READY_FIRST_WORD, READY_PREVIOUS, slot);
    if (old != WRITING && !(was_held && is_held))
        detach(ring, first_word_of(old), PREVIOUS, slot);
    if (new != WRITING && !(was_held && is_held))
        append(ring, first_word_of(new), slot);
    add(words + STATE_COUNT_WORD + old, (uint64_t)-1);
    add(words + STATE_COUNT_WORD + new, 1);
    if (new == FREE) {
        advance_futex(words + FREED_WORD);
    } else if (new == READY) {
        append_ready(ring, slot);
        readied(ring);
    }
}

/* ---- Read entries. ---- */

struct survey {
    uint64_t *empty;    /* the first empty entry, NULL when all are taken */
    uint64_t in_flight; /* attempts in flight */
    uint64_t reads;     /* reads that count, each by another reader */
    uint64_t taken;     /* these, and the readers that have an attempt in flight */
    int had;            /* whether the reader asked about is among the reads */
    int enters_again;   /* whether it has an attempt in flight */
};

static int has_entry(uint64_t *slot, uint64_t before, uint64_t consumed, uint64_t reader) {
    for (uint64_t index = 0; index < before; index++) {
        const uint64_t *entry = entry_of(slot, index);
        if (entry[ENTRY_LEASE] && (entry[ENTRY_LEASE] & 1) == consumed && entry[ENTRY_READER] == reader)
            return 1;
    }
    return 0;
}

/* Count the entries of a slot, but `without` one of them. Reader 0 is nobody in particular: its attempts are one read. */
static struct survey survey(const struct ring *ring, uint64_t *slot, uint64_t reader, const uint64_t *without) {
    struct survey found = {0};
    for (uint64_t index = 0; index < ring->entries; index++) {
        uint64_t *entry = entry_of(slot, index);
        uint64_t lease = entry[ENTRY_LEASE], whose = entry[ENTRY_READER];
        if (!lease) {
            if (!found.empty)
                found.empty = entry;
        } else if (entry == without) {
            continue;
        } else if (lease & 1) {
            found.reads++;
            found.taken++;
            found.had |= reader && whose == reader;
        } else {
            found.in_flight++;
            found.enters_again |= whose == reader;
            if (!has_entry(slot, index, 0, whose) && !(whose && has_entry(slot, ring->entries, 1, whose)))
                found.taken++;
        }
    }
    return found;
}

static void clear_entries(const struct ring *ring, uint64_t *slot) {
    for (uint64_t index = 0; index < ring->entries; index++) {
        uint64_t *lease = entry_of(slot, index) + ENTRY_LEASE;
        if (*lease)
            store(lease, 0);
    }
}

/* Take a READING slot out of READING when nothing is in flight any more. */
static void leave_reading(const struct ring *ring, uint64_t slot, uint64_t in_flight, uint64_t reads) {
    uint64_t *own = header(ring, slot), word = own[STATE];
    if (in_flight) {
        become(ring, slot, advance(word, LEAVE));
        readied(ring); /* another reader may have it now */
    } else if (reads >= own[REQUIRED_READS]) {
        count(ring, COUNT_FREED);
        become(ring, slot, advance(word, CONSUME));
        clear_entries(ring, own);
    } else {
        become(ring, slot, advance(word, RELEASE));
    }
}

/* ---- The lock. ---- */

extern int pthread_mutex_clocklock(pthread_mutex_t *, clockid_t, const struct timespec *) __attribute__((weak));

static pthread_mutex_t *mutex(const struct ring *ring) {
    return (pthread_mutex_t *)((unsigned char *)ring->words + MUTEX_BYTE);
}

/* Complete or undo the transition that was cut off, if any was. Idempotent, as it may be cut off itself. */
static void repair(const struct ring *ring) {
    uint64_t marked = ring->words[IN_TRANSITION_WORD];
    if (marked >= 1 && marked <= ring->slots) {
        uint64_t slot = marked - 1, *own = header(ring, slot);
        unsigned state = state_of(own[STATE]);
        relink(ring); /* the transition taken below moves the slot between the lists */
        if (state != WRITING)
            store(own + WRITER, 0);
        if (state == FREE || state == WRITING) {
            clear_entries(ring, own);
        } else if (state == READY) {
            for (uint64_t index = 0; index < ring->entries; index++) {
                uint64_t *lease = entry_of(own, index) + ENTRY_LEASE;
                if (*lease && !(*lease & 1))
                    store(lease, 0);
            }
        } else if (state == READING) {
            struct survey found = survey(ring, own, 0, NULL);
            leave_reading(ring, slot, found.in_flight, found.reads);
        }
        count(ring, COUNT_REPAIRED_SLOTS);
    } else {
        relink(ring);
    }
    /* the wake-up of the dead may be missing */
    advance_futex(ring->words + FREED_WORD);
    set(ring->words + SLEEPERS_WORD, 1);
    advance_futex(ring->words + READIED_WORD);
    set(ring->words + TAKERS_WORD, ASLEEP | WAKE);
    store(ring->words + IN_TRANSITION_WORD, 0);
}

static int wait_for(pthread_mutex_t *lock, int64_t wait_ns) {
    clockid_t clock = pthread_mutex_clocklock ? CLOCK_MONOTONIC : CLOCK_REALTIME;
    struct timespec until;
    if (wait_ns > SLICE_NS)
        wait_ns = SLICE_NS;
    clock_gettime(clock, &until);
    until.tv_nsec += (long)wait_ns;
    until.tv_sec += until.tv_nsec / 1000000000L;
    until.tv_nsec %= 1000000000L;
    return pthread_mutex_clocklock ? pthread_mutex_clocklock(lock, clock, &until) : pthread_mutex_timedlock(lock, &until);
}

static int enter(const struct ring *ring, int64_t wait_ns) {
    pthread_mutex_t *lock = mutex(ring);
    int code = pthread_mutex_trylock(lock);
    for (int turn = 0; code == EBUSY && turn < SPINS; turn++) {
        if (turn >= SPINS / 2)
            sched_yield();
        code = pthread_mutex_trylock(lock);
    }
    if (code == EBUSY && wait_ns > 0)
        code = wait_for(lock, wait_ns);
    if (code == EOWNERDEAD) {
        cut();
        pthread_mutex_consistent(lock);
        count(ring, COUNT_LOCK_RECOVERIES);
        repair(ring);
        return DONE;
    }
    return code == 0 ? DONE : code == EBUSY || code == ETIMEDOUT ? LOCKED : DAMAGED;
}

/* Unlock, and wake the writes that sleep if there is a slot for one, and the takers if there is something new for them.
 * The words are looked at and cleared under the lock: who sets one after that has `seen` an older count than the one
 * stored here, and does not fall asleep. A process killed between the unlock and the wake-up owes it to those who sleep
 * already, who sleep for LOOK_EVERY_S of `transitions.py` at most. */
static int leave(const struct ring *ring, int outcome) {
    uint64_t *words = ring->words, *sleepers = words + SLEEPERS_WORD, *takers = words + TAKERS_WORD;
    int wakes = words[STATE_COUNT_WORD + FREE] && look(sleepers) && exchange(sleepers, 0);
    int wakes_takers = look(takers) & WAKE && exchange(takers, 0);
    cut();
    pthread_mutex_unlock(mutex(ring));
    if (wakes)
        wake(words + FREED_WORD);
    if (wakes_takers)
        wake(words + READIED_WORD);
    return outcome;
}

static inline void mark(const struct ring *ring, uint64_t slot) { store(ring->words + IN_TRANSITION_WORD, slot + 1); }

static inline void unmark(const struct ring *ring) { store(ring->words + IN_TRANSITION_WORD, 0); }

/* ---- What is called. Each returns an outcome; `wait_ns` bounds the wait for the lock, SLICE_NS at most. The calls of
 * every read and write have their hold as the only argument: ctypes takes 0.3 us for one and 1.4 for five. ---- */

/* Which source this was compiled from: `native/build.py` says so to the compiler, and who loads the library compares. */
EXPORT uint64_t ring_source(void) { return RING_SOURCE; }

/* Make the lock and the lists of a segment that nobody else uses yet; 0, or an errno. */
EXPORT int ring_initialise(const struct ring *ring) {
    pthread_mutexattr_t attributes;
    _Static_assert(sizeof(pthread_mutex_t) <= MUTEX_BYTES, "the segment has no room for the mutex");
    int code = pthread_mutexattr_init(&attributes);
    if (!code)
        code = pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    if (!code)
        code = pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    if (!code)
        code = pthread_mutex_init(mutex(ring), &attributes);
    pthread_mutexattr_destroy(&attributes);
    if (!code)
        relink(ring);
    return code;
}

/* Fetch the lines that commit writes round a small payload. In a ring larger than the caches they miss, by 0.5 us a write
 * measured, and the lock's next atomic waits for the stores; so they come while the writer copies its payload. Inline
 * always: gcc takes a function of nothing but prefetches for one without effect, and leaves its calls out. */
static inline __attribute__((always_inline)) void prefetch(const struct ring *ring, uint64_t slot) {
    const unsigned char *payload = (const unsigned char *)ring->words + ring->first_payload + slot * ring->stride;
    __builtin_prefetch(payload - HEADROOM_BYTES, 1);
    __builtin_prefetch(payload, 1);
    __builtin_prefetch(payload + 64, 1); /* a small one's trailer */
}

/* FREE → WRITING, or READY → WRITING of the oldest unread payload if the argument is not 0.
 * Takes lease and owner of the hold; gives slot, generation, and, when FULL, what `ring_wait` waits on. */
EXPORT int ring_reserve(uint64_t *hold) {
    const struct ring *ring = ring_of(hold);
    int code = enter(ring, (int64_t)hold[HOLD_WAIT_NS]);
    if (code != DONE)
        return code;
    uint64_t *words = ring->words, chosen = words[FREE_FIRST_WORD];
    unsigned event = RESERVE;
    if (!chosen && hold[HOLD_ARGUMENT] && words[STATE_COUNT_WORD + READY]) {
        event = OVERWRITE;
        chosen = words[READY_FIRST_WORD];
    }
    if (!chosen) {
        hold[HOLD_STATE] = (uint32_t)words[FREED_WORD];
        return leave(ring, FULL);
    }
    if (chosen > ring->slots)
        return leave(ring, DAMAGED);
    uint64_t slot = chosen - 1, *own = header(ring, slot), word = advance(own[STATE], event);
    if (!word)
        return leave(ring, DAMAGED);
    mark(ring, slot);
    if (event == OVERWRITE) /* counted before it happens: a kill in between counts one too many, never one too few */
        count(ring, COUNT_OVERWRITTEN);
    count(ring, COUNT_WRITTEN);
    store(own + WRITER_PID, hold[HOLD_PID]);
    store(own + WRITER_START, hold[HOLD_START]);
    store(own + WRITER, hold[HOLD_LEASE]);
    hold[HOLD_GENERATION] = generation_of(word);
    hold[HOLD_SLOT] = slot;
    become(ring, slot, word);
    if (event == OVERWRITE)
        clear_entries(ring, own);
    unmark(ring);
    leave(ring, DONE);
    prefetch(ring, slot);
    return DONE;
}

static int is_writer(const uint64_t *own, const uint64_t *hold) {
    return state_of(own[STATE]) == WRITING && generation_of(own[STATE]) == hold[HOLD_GENERATION] &&
           own[WRITER] == hold[HOLD_LEASE] && own[WRITER_PID] == hold[HOLD_PID] && own[WRITER_START] == hold[HOLD_START];
}

/* Make the slot's memory the message that a server sends: header | payload | zeros to 8 | trailer, as in wire/frames.py. */
static void write_message(const struct ring *ring, const uint64_t *hold) {
    _Static_assert(HEADROOM_BYTES == 64 && TAILROOM_BYTES >= 8 + TRAILER_BYTES, "the message does not fit round a payload");
    uint64_t slot = hold[HOLD_SLOT], generation = hold[HOLD_GENERATION], nbytes = hold[HOLD_NBYTES];
    uint64_t *payload = ring->words + (ring->first_payload + slot * ring->stride) / 8, *head = payload - 8;
    store(head, MESSAGE_WORD);
    store(head + 1, generation);
    store(head + 2, nbytes);
    store(head + 3, hold[HOLD_HAS_CHECKSUM] ? hold[HOLD_CHECKSUM] : 0);
    store(head + 4, ring->words[RING_ID_WORD]);
    store(head + 5, ring->words[RING_ID_WORD + 1]);
    store(head + 6, slot | (hold[HOLD_HAS_CHECKSUM] ? MESSAGE_CHECKSUM << 32 : 0));
    store(head + 7, ring->words[FINGERPRINT_WORD]);
    uint64_t *end = payload + nbytes / 8;
    if (nbytes % 8) {
        store(end, *end & ((1ULL << nbytes % 8 * 8) - 1));
        end++;
    }
    store(end, MESSAGE_TRAILER ^ generation);
    store(end + 1, nbytes);
}

/* WRITING → READY: the payload is complete. Takes the hold with nbytes, bytes of the envelope, which lies in its place,
 * checksum and whether it has one; the argument is how many reads free the payload. */
EXPORT int ring_commit(uint64_t *hold) {
    const struct ring *ring = ring_of(hold);
    if (hold[HOLD_SLOT] >= ring->slots || hold[HOLD_NBYTES] > ring->slot_bytes)
        return OUT_OF_RANGE;
    int code = enter(ring, (int64_t)hold[HOLD_WAIT_NS]);
    if (code != DONE)
        return code;
    uint64_t slot = hold[HOLD_SLOT], *own = header(ring, slot);
    if (!is_writer(own, hold)) {
        hold[HOLD_STATE] = own[STATE];
        count(ring, COUNT_LATE_FINALISE);
        return leave(ring, LATE);
    }
    uint64_t envelope = hold[HOLD_ENVELOPE_BYTES];
    mark(ring, slot);
    if (envelope > ring->envelope_bytes) {
        envelope = 0;
        count(ring, COUNT_ENVELOPES_LEFT_OUT);
    }
    write_message(ring, hold);
    uint64_t sequence = ring->words[SEQUENCE_WORD] + 1;
    store(ring->words + SEQUENCE_WORD, sequence);
    store(own + NBYTES, hold[HOLD_NBYTES]);
    store(own + SEQUENCE, sequence);
    store(own + CHECKSUM, hold[HOLD_CHECKSUM]);
    store(own + HAS_CHECKSUM, hold[HOLD_HAS_CHECKSUM]);
    store(own + REQUIRED_READS, hold[HOLD_ARGUMENT]);
    store(own + ENVELOPE_BYTES, envelope);
    store(own + COMMIT_TIME, now_ns(CLOCK_REALTIME));
    count(ring, COUNT_COMMITTED);
    add(ring->words + COUNTER_WORD + COUNT_COMMITTED_BYTES, hold[HOLD_NBYTES]);
    become(ring, slot, advance(own[STATE], COMMIT));
    store(own + WRITER, 0);
    unmark(ring);
    return leave(ring, DONE);
}

/* READY → FREE, if the slot holds that generation, unread; else LATE. */
EXPORT int ring_discard(const struct ring *ring, uint64_t slot, uint64_t generation, int64_t wait_ns) {
    if (slot >= ring->slots)
        return OUT_OF_RANGE;
    int code = enter(ring, wait_ns);
    if (code != DONE)
        return code;
    uint64_t *own = header(ring, slot), word = advance(own[STATE], DISCARD);
    if (!word || generation_of(word) != generation)
        return leave(ring, LATE);
    mark(ring, slot);
    count(ring, COUNT_DISCARDED);
    become(ring, slot, word);
    clear_entries(ring, own);
    unmark(ring);
    return leave(ring, DONE);
}

static int acquire(const struct ring *ring, uint64_t *hold) {
    if (hold[HOLD_SLOT] >= ring->slots) {
        count(ring, COUNT_OUT_OF_RANGE);
        return OUT_OF_RANGE;
    }
    uint64_t slot = hold[HOLD_SLOT], *own = header(ring, slot), word = own[STATE], reader = hold[HOLD_READER];
    unsigned state = state_of(word);
    hold[HOLD_STATE] = word;
    hold[HOLD_ATTEMPTS] = 0;
    if (generation_of(word) != hold[HOLD_GENERATION] || (state != READY && state != READING)) {
        count(ring, COUNT_STALE);
        return STALE;
    }
    if (own[NBYTES] > ring->slot_bytes) /* what a caller makes an array of must lie within the slot */
        return DAMAGED;
    uint64_t *entry = entry_of(own, 0); /* READY, and one reader: nobody has had it, so all entries are empty */
    if (state != READY || own[REQUIRED_READS] != 1) {
        struct survey found = survey(ring, own, reader, NULL);
        hold[HOLD_ATTEMPTS] = found.in_flight;
        if (found.had || found.reads >= own[REQUIRED_READS]) {
            count(ring, COUNT_STALE);
            return HAD;
        }
        if (found.in_flight >= ring->max_attempts || !found.empty) {
            count(ring, COUNT_BUSY);
            return CROWDED;
        }
        if (reader && !found.enters_again && found.taken >= own[REQUIRED_READS]) {
            count(ring, COUNT_BUSY);
            return TAKEN;
        }
        entry = found.empty;
    }
    mark(ring, slot);
    count(ring, COUNT_ACQUIRED);
    store(entry + ENTRY_PID, hold[HOLD_PID]);
    store(entry + ENTRY_START, hold[HOLD_START]);
    store(entry + ENTRY_READER, reader);
    store(entry + ENTRY_SINCE, now_ns(CLOCK_MONOTONIC));
    store(entry + ENTRY_LEASE, hold[HOLD_LEASE] << 1);
    become(ring, slot, advance(word, state == READY ? ACQUIRE : JOIN));
    unmark(ring);
    hold[HOLD_NBYTES] = own[NBYTES];
    hold[HOLD_CHECKSUM] = own[CHECKSUM];
    hold[HOLD_HAS_CHECKSUM] = own[HAS_CHECKSUM];
    hold[HOLD_ENVELOPE_BYTES] = own[ENVELOPE_BYTES] > ring->envelope_bytes ? 0 : own[ENVELOPE_BYTES];
    hold[HOLD_COMMIT_TIME] = own[COMMIT_TIME];
    return DONE;
}

/* READY → READING, or one attempt more within READING. Takes slot, generation, lease, owner and reader of the hold; gives
 * nbytes, checksum, envelope and time, or what was found instead. */
EXPORT int ring_acquire(uint64_t *hold) {
    const struct ring *ring = ring_of(hold);
    int code = enter(ring, (int64_t)hold[HOLD_WAIT_NS]);
    return code != DONE ? code : leave(ring, acquire(ring, hold));
}

enum chance { NEVER, LATER, NOW };

/* Whether a reader may take the payload of a slot that is READY or READING. For a named one NEVER is true until an attempt
 * ends unread. */
static enum chance chance_of(const struct ring *ring, uint64_t *own, uint64_t reader) {
    unsigned state = state_of(own[STATE]);
    if (own[NBYTES] > ring->slot_bytes || (state != READY && state != READING))
        return NEVER;
    if (own[REQUIRED_READS] == 1)
        return state == READY ? NOW : NEVER;
    struct survey found = survey(ring, own, reader, NULL);
    if (found.had || found.enters_again || found.taken >= own[REQUIRED_READS])
        return NEVER;
    return found.in_flight >= ring->max_attempts || !found.empty ? LATER : NOW;
}

/* Whether a slot is still in the list that a take walks, with the payload of that write. */
static int is_still_there(const struct ring *ring, uint64_t number, uint64_t sequence, int shared) {
    if (!is_listed(ring, number))
        return 0;
    const uint64_t *own = header(ring, number - 1);
    unsigned state = state_of(own[STATE]);
    return own[SEQUENCE] == sequence && (state == READY || (shared && state == READING));
}

/* Where the walk of a take begins, whose list does at 1 + slot `first`: behind what its reader had nothing left up to,
 * if that place is there. The newest first it begins at the end, and ends there. */
static uint64_t begin_take(const struct ring *ring, uint64_t *take, uint64_t first, int shared, uint64_t reader) {
    const uint64_t *words = ring->words, *counters = words + COUNTER_WORD;
    uint64_t returns = counters[COUNT_RELEASED] + counters[COUNT_RECLAIMED_READS] + counters[COUNT_LOCK_RECOVERIES];
    /* where one read frees a payload, none that is being read can be taken; an unnamed reader may again what it has had */
    take[TAKE_FOLLOWS] = shared && reader;
    int knows = take[TAKE_FOLLOWS] && take[TAKE_RETURNS] == returns && is_listed(ring, take[TAKE_SLOT]);
    if (!take[TAKE_NEWEST])
        knows = knows && is_still_there(ring, take[TAKE_SLOT], take[TAKE_SEQUENCE], shared);
    if (!knows)
        take[TAKE_SLOT] = take[TAKE_SEQUENCE] = 0;
    take[TAKE_RETURNS] = returns;
    take[TAKE_SEEN] = (uint32_t)words[READIED_WORD];
    take[TAKE_FIRST] = first;
    take[TAKE_FIRST_SEQUENCE] = is_listed(ring, first) ? header(ring, first - 1)[SEQUENCE] : 0;
    return knows && !take[TAKE_NEWEST] ? header(ring, take[TAKE_SLOT] - 1)[NEXT] : first;
}

/* Enter an attempt for each of the holds on a payload that their reader has neither had nor holds, the oldest or the
 * newest first, until one is larger than what is left of the bytes; `take` says what is asked for and what came of it.
 * A walk that is longer than TAKE_ENTRIES is to be continued: TAKE_NEXT says so, and the same call goes on there. */
EXPORT int ring_take(const struct ring *ring, uint64_t *const *holds, uint64_t *take, int64_t wait_ns) {
    int code = enter(ring, wait_ns);
    if (code != DONE)
        return code;
    int shared = ring->entries > ring->max_attempts + 1, newest = take[TAKE_NEWEST] != 0;
    unsigned list = shared ? HELD_FIRST_WORD : READY_FIRST_WORD, links = shared ? PREVIOUS : READY_PREVIOUS;
    uint64_t next = ring->words[newest ? list + 1 : list], steps = 0, most = 1 + TAKE_ENTRIES / ring->entries;
    if (!take[TAKE_NEXT])
        next = begin_take(ring, take, next, shared, holds[0][HOLD_READER]);
    else if (is_still_there(ring, take[TAKE_NEXT], take[TAKE_NEXT_SEQUENCE], shared))
        next = take[TAKE_NEXT];
    take[TAKE_NEXT] = 0;
    for (; is_listed(ring, next) && take[TAKE_NUMBER] < take[TAKE_ROOM]; steps++) {
        uint64_t slot = next - 1, *own = header(ring, slot), *hold = holds[take[TAKE_NUMBER]];
        if (newest && own[SEQUENCE] <= take[TAKE_SEQUENCE]) {
            next = 0;
            break;
        }
        if (steps == most) {
            take[TAKE_NEXT] = next;
            take[TAKE_NEXT_SEQUENCE] = own[SEQUENCE];
            break;
        }
        next = own[newest ? links : links + 1];
        enum chance chance = chance_of(ring, own, hold[HOLD_READER]);
        if (chance == NOW) {
            if (own[NBYTES] > take[TAKE_BYTES]) {
                take[TAKE_LARGE] = own[NBYTES] + 1;
                break;
            }
            hold[HOLD_SLOT] = slot;
            hold[HOLD_GENERATION] = generation_of(own[STATE]);
            if (acquire(ring, hold) == DONE) {
                take[TAKE_BYTES] -= own[NBYTES];
                take[TAKE_NUMBER]++;
            }
        }
        take[TAKE_FOLLOWS] &= chance != LATER;
        if (take[TAKE_FOLLOWS] && !newest) {
            take[TAKE_SLOT] = slot + 1;
            take[TAKE_SEQUENCE] = own[SEQUENCE];
        }
    }
    if (take[TAKE_FOLLOWS] && newest && !next && !take[TAKE_LARGE] && take[TAKE_FIRST]) {
        take[TAKE_SLOT] = take[TAKE_FIRST];
        take[TAKE_SEQUENCE] = take[TAKE_FIRST_SEQUENCE];
    }
    take[TAKE_STEPS] = steps;
    return leave(ring, DONE);
}

static uint64_t *in_flight_entry(const struct ring *ring, uint64_t *own, const uint64_t *hold) {
    for (uint64_t index = 0; index < ring->entries; index++) {
        uint64_t *entry = entry_of(own, index); /* lease ids are unique in a process only */
        if (entry[ENTRY_LEASE] == hold[HOLD_LEASE] << 1 && entry[ENTRY_PID] == hold[HOLD_PID] &&
            entry[ENTRY_START] == hold[HOLD_START])
            return entry;
    }
    return NULL;
}

static int end_write(const struct ring *ring, uint64_t *own, const uint64_t *hold) {
    if (!is_writer(own, hold))
        return LATE;
    uint64_t slot = hold[HOLD_SLOT];
    mark(ring, slot);
    count(ring, (unsigned)hold[HOLD_ARGUMENT]);
    become(ring, slot, advance(own[STATE], ABORT));
    store(own + WRITER, 0);
    unmark(ring);
    return DONE;
}

static int end_read(const struct ring *ring, uint64_t *own, const uint64_t *hold) {
    if (state_of(own[STATE]) != READING || generation_of(own[STATE]) != hold[HOLD_GENERATION])
        return LATE;
    uint64_t *entry = in_flight_entry(ring, own, hold);
    if (!entry)
        return LATE;
    uint64_t slot = hold[HOLD_SLOT], reason = hold[HOLD_ARGUMENT];
    struct survey others = survey(ring, own, entry[ENTRY_READER], entry);
    /* a second read by one reader, or one more than asked for, is no record worth keeping */
    uint64_t counts = reason == COUNT_CONSUMED && others.reads < own[REQUIRED_READS] && !others.had;
    mark(ring, slot);
    count(ring, (unsigned)reason);
    store(entry + ENTRY_LEASE, counts ? hold[HOLD_LEASE] << 1 | 1 : 0);
    leave_reading(ring, slot, others.in_flight, others.reads + counts);
    unmark(ring);
    return DONE;
}

/* WRITING → FREE: a write ends without a payload. READING: a read attempt ends, consumed or leaving the payload to be
 * read; the last one in flight takes its slot to FREE, or back to READY while a reader is missing. The argument is the
 * counter of the reason. LATE changes nothing. */
EXPORT int ring_finalise(uint64_t *hold) {
    const struct ring *ring = ring_of(hold);
    if (hold[HOLD_SLOT] >= ring->slots || !hold[HOLD_LEASE] || hold[HOLD_ARGUMENT] >= COUNTERS)
        return LATE;
    int code = enter(ring, (int64_t)hold[HOLD_WAIT_NS]);
    if (code != DONE)
        return code;
    uint64_t *own = header(ring, hold[HOLD_SLOT]);
    return leave(ring, state_of(own[STATE]) == WRITING ? end_write(ring, own, hold) : end_read(ring, own, hold));
}

static uint64_t *put_hold(const struct ring *ring, uint64_t *out, uint64_t slot, const uint64_t *own, const uint64_t *owner, uint64_t lease) {
    out[HOLD_SLOT] = slot;
    out[HOLD_GENERATION] = generation_of(own[STATE]);
    out[HOLD_STATE] = own[STATE];
    out[HOLD_LEASE] = lease;
    out[HOLD_PID] = owner[0];
    out[HOLD_START] = owner[1];
    out[HOLD_RING] = (uint64_t)(uintptr_t)ring;
    out[HOLD_NBYTES] = own[NBYTES];
    out[HOLD_CHECKSUM] = own[CHECKSUM];
    out[HOLD_HAS_CHECKSUM] = own[HAS_CHECKSUM];
    out[HOLD_SEQUENCE] = own[SEQUENCE];
    return out + HOLD_WORDS;
}

/* What is in the slots from `first` on that are in one of the states of a bit mask: the writes and read attempts in them,
 * and of a READY one its payload, under no lease. As many slots as fit `room`, HOLDS_SLOTS at most; gives how many holds
 * there are and the next slot to look at. What a caller then does with one is compared again. */
EXPORT int ring_holds(
    const struct ring *ring, unsigned states, uint64_t *first, uint64_t *holds, uint64_t room, uint64_t *number,
    int64_t wait_ns) {
    *number = 0;
    int code = enter(ring, wait_ns);
    if (code != DONE)
        return code;
    const uint64_t *counts = ring->words + STATE_COUNT_WORD;
    uint64_t slot = *first, last = slot + HOLDS_SLOTS, there = 0, *out = holds, *end = holds + room * HOLD_WORDS;
    for (unsigned state = 0; state < STATES; state++)
        there += states >> state & 1 ? counts[state] : 0;
    if (last > ring->slots)
        last = ring->slots;
    if (!there)
        slot = last = ring->slots;
    for (; slot < last && out + ring->entries * HOLD_WORDS <= end; slot++) {
        uint64_t *own = header(ring, slot);
        unsigned state = state_of(own[STATE]);
        if (state >= STATES || !(states >> state & 1))
            continue;
        if (state == READING) {
            for (uint64_t index = 0; index < ring->entries; index++) {
                const uint64_t *entry = entry_of(own, index);
                if (entry[ENTRY_LEASE] && !(entry[ENTRY_LEASE] & 1))
                    out = put_hold(ring, out, slot, own, entry + ENTRY_PID, entry[ENTRY_LEASE] >> 1);
            }
        } else {
            out = put_hold(ring, out, slot, own, own + WRITER_PID, state == WRITING ? own[WRITER] : 0);
        }
    }
    *first = slot;
    *number = (uint64_t)(out - holds) / HOLD_WORDS;
    return leave(ring, DONE);
}

/* Add one to a counter. */
EXPORT int ring_count(const struct ring *ring, unsigned counter, int64_t wait_ns) {
    if (counter >= COUNTERS)
        return OUT_OF_RANGE;
    int code = enter(ring, wait_ns);
    if (code != DONE)
        return code;
    count(ring, counter);
    return leave(ring, DONE);
}

/* The counters, then the number of slots in each state, all of one moment. */
EXPORT int ring_snapshot(const struct ring *ring, uint64_t *out, int64_t wait_ns) {
    int code = enter(ring, wait_ns);
    if (code != DONE)
        return code;
    for (unsigned counter = 0; counter < COUNTERS; counter++)
        *out++ = ring->words[COUNTER_WORD + counter];
    for (unsigned state = 0; state < STATES; state++)
        *out++ = ring->words[STATE_COUNT_WORD + state];
    return leave(ring, DONE);
}

/* Sleep until a slot has become FREE since `ring_reserve` said FULL and gave `seen`, or `wait_ns` are over. */
EXPORT void ring_wait(const struct ring *ring, uint32_t seen, int64_t wait_ns) {
    struct timespec limit = {wait_ns / 1000000000LL, (long)(wait_ns % 1000000000LL)};
    set(ring->words + SLEEPERS_WORD, 1);
    syscall(SYS_futex, ring->words + FREED_WORD, FUTEX_WAIT, seen, &limit, NULL, 0);
}

/* Sleep until a slot has become READY since `ring_take` gave `seen`, or `wait_ns` are over. */
EXPORT void ring_wait_ready(const struct ring *ring, uint32_t seen, int64_t wait_ns) {
    struct timespec limit = {wait_ns / 1000000000LL, (long)(wait_ns % 1000000000LL)};
    set(ring->words + TAKERS_WORD, ASLEEP);
    syscall(SYS_futex, ring->words + READIED_WORD, FUTEX_WAIT, seen, &limit, NULL, 0);
}

/* Store the published address, ADDRESS_BANK_WORDS words, into the bank that does not hold, and make that one hold. */
EXPORT int ring_publish(const struct ring *ring, const uint64_t *address, int64_t wait_ns) {
    int code = enter(ring, wait_ns);
    if (code != DONE)
        return code;
    uint64_t version = ring->words[ADDRESS_VERSION_WORD] + 1;
    uint64_t *bank = ring->words + ADDRESS_WORD + (version & 1) * ADDRESS_BANK_WORDS;
    for (unsigned index = 0; index < ADDRESS_BANK_WORDS; index++)
        store(bank + index, address[index]);
    store(ring->words + ADDRESS_VERSION_WORD, version);
    return leave(ring, DONE);
}
