/* Parts of work on several threads.
 *
 * torch's own threads where they can be had: a second set would fight for the processors with torch's, which wait for
 * their next work by spinning. Where torch runs on another OpenMP than GNU's, and in a process that was forked, which
 * GNU's threads do not survive, threads are started for the one call.
 */
#if !defined(_WIN32)
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#endif

#include <stdatomic.h>

#include "common.h"

enum { MOST_THREADS = 256 };

struct team {
    part_function *part;
    const void *work;
    int64_t count, align;
    int parts;
    atomic_int next;
};

/* Take parts until none is left: which thread takes which makes no difference. */
static void take_parts(void *argument) {
    struct team *team = argument;
    int64_t blocks = (team->count + team->align - 1) / team->align;
    for (;;) {
        int own = atomic_fetch_add(&team->next, 1);
        if (own >= team->parts) return;
        int64_t first = blocks * own / team->parts * team->align;
        int64_t last = blocks * (own + 1) / team->parts * team->align;
        if (first < last) team->part(team->work, first, least(last, team->count));
    }
}

#if !defined(_WIN32)
typedef void gomp_parallel(void (*)(void *), void *, unsigned, unsigned);

static gomp_parallel *torch_threads;
static pthread_once_t prepared = PTHREAD_ONCE_INIT;

static void forget_torch_threads(void) { torch_threads = NULL; }

static void prepare(void) {
    void *found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    memcpy(&torch_threads, &found, sizeof found); /* ISO C converts no data pointers to functions */
    pthread_atfork(NULL, NULL, forget_torch_threads);
}

static void *take_parts_in_thread(void *argument) {
    take_parts(argument);
    return NULL;
}

static void start_threads(struct team *team) {
    pthread_t started[MOST_THREADS];
    int others = 0;
    while (others + 1 < team->parts && pthread_create(&started[others], NULL, take_parts_in_thread, team) == 0) others++;
    take_parts(team);
    while (others > 0) pthread_join(started[--others], NULL);
}

static void run_team(struct team *team) {
    pthread_once(&prepared, prepare);
    if (torch_threads)
        torch_threads(take_parts, team, (unsigned)team->parts, 0);
    else
        start_threads(team);
}
#else
static void run_team(struct team *team) { take_parts(team); }
#endif

void run_parts(part_function *part, const void *work, int64_t count, int64_t align, int threads) {
    if (count <= 0) return;
    if (threads <= 1) {
        part(work, 0, count);
        return;
    }
    struct team team = {part, work, count, align, threads < MOST_THREADS ? threads : MOST_THREADS, 0};
    run_team(&team);
}
