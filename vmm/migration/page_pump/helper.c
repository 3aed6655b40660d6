/* A second thread for work that one thread of the page path can share or have done ahead of itself.
 *
 * It takes one job at a time, from the one thread that owns it, and sleeps in between. It starts with the first
 * job and ends in pp_helper_free. Whoever gives it work must be right without it too: it may be busy, and a
 * machine may have no thread to give.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>

#include "page_pump.h"

enum { PATIENCE_NS = 50000 /* to look again is cheaper than to be woken, while little is left to be done */ };

struct helper {
    pthread_t thread;
    pthread_mutex_t lock;  /* guards all but `thread` */
    pthread_cond_t changed;
    void (*work)(void *);  /* NULL = nothing to do */
    void *argument;
    int ending;
};

static void *serve(void *argument)
{
    struct helper *h = argument;

    pthread_mutex_lock(&h->lock);
    while (!h->ending) {
        if (!h->work) {
            pthread_cond_wait(&h->changed, &h->lock);
            continue;
        }
        pthread_mutex_unlock(&h->lock);
        h->work(h->argument);
        pthread_mutex_lock(&h->lock);
        __atomic_store_n(&h->work, NULL, __ATOMIC_RELEASE);
        pthread_cond_broadcast(&h->changed);
    }
    pthread_mutex_unlock(&h->lock);
    return NULL;
}

static struct helper *start(const char *name)
{
    struct helper *h = calloc(1, sizeof(*h));
    sigset_t all, before;
    int error;

    if (!h)
        return NULL;
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->changed, NULL);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for threads that Python knows */
    error = pthread_create(&h->thread, NULL, serve, h);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error) {
        free(h);
        return NULL;
    }
    pthread_setname_np(h->thread, name);
    return h;
}

/* work(argument) by the helper `*helper`, which is made if there is none: 1 = it is at it, 0 = it cannot now. */
int pp_helper_begin(void **helper, const char *name, void (*work)(void *), void *argument)
{
    struct helper *h = *helper;
    int free_to_begin;

    if (!h)
        *helper = h = start(name);
    if (!h)
        return 0;
    pthread_mutex_lock(&h->lock);
    free_to_begin = !h->work;
    if (free_to_begin) {
        h->argument = argument;
        h->work = work;
        pthread_cond_signal(&h->changed);
    }
    pthread_mutex_unlock(&h->lock);
    return free_to_begin;
}

/* Until it has done its job, if it has one. */
void pp_helper_wait(void *helper)
{
    struct helper *h = helper;
    uint64_t end = pp_now_ns() + PATIENCE_NS;

    if (!h)
        return;
    while (__atomic_load_n(&h->work, __ATOMIC_ACQUIRE) && pp_now_ns() < end)
        ;
    pthread_mutex_lock(&h->lock);
    while (h->work)
        pthread_cond_wait(&h->changed, &h->lock);
    pthread_mutex_unlock(&h->lock);
}

void pp_helper_free(void **helper)
{
    struct helper *h = *helper;

    if (!h)
        return;
    pthread_mutex_lock(&h->lock);
    h->ending = 1;
    pthread_cond_signal(&h->changed);
    pthread_mutex_unlock(&h->lock);
    pthread_join(h->thread, NULL);
    pthread_mutex_destroy(&h->lock);
    pthread_cond_destroy(&h->changed);
    free(h);
    *helper = NULL;
}
