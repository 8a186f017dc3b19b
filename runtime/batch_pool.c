/* Threads that prepare requests ahead of the engine: decoding and resizing images is the work. */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "runtime/batch_internal.h"

enum { MAX_THREADS = 16 };

struct queue {
    struct batch_item *first, **end;
};

struct batch_pool {
    const struct prompt_builder *builder;
    pthread_t thread[MAX_THREADS];
    int n_threads;
    pthread_mutex_t mutex;
    pthread_cond_t work, done;
    struct queue waiting, ready; /* under mutex, like all below */
    int n_under_way;             /* given and not taken */
    bool stop;
};

static void queue_init(struct queue *q)
{
    q->first = NULL;
    q->end = &q->first;
}

static void queue_put(struct queue *q, struct batch_item *item)
{
    item->next = NULL;
    *q->end = item;
    q->end = &item->next;
}

static struct batch_item *queue_take(struct queue *q)
{
    struct batch_item *item = q->first;
    if (!item) return NULL;
    q->first = item->next;
    if (!q->first) q->end = &q->first;
    return item;
}

static void *work(void *argument)
{
    struct batch_pool *pool = argument;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (!pool->stop && !pool->waiting.first) pthread_cond_wait(&pool->work, &pool->mutex);
        if (pool->stop) break;
        struct batch_item *item = queue_take(&pool->waiting);
        pthread_mutex_unlock(&pool->mutex);
        batch__item_prepare(pool->builder, item);
        pthread_mutex_lock(&pool->mutex);
        queue_put(&pool->ready, item);
        pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

int batch__pool_open(const struct prompt_builder *builder, int n_threads, struct batch_pool **out)
{
    struct batch_pool *pool = calloc(1, sizeof *pool);
    if (!pool) FAIL(ERR_NOMEM, "no memory for the threads that prepare requests");
    pool->builder = builder;
    queue_init(&pool->waiting);
    queue_init(&pool->ready);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    *out = pool;
    if (n_threads > MAX_THREADS) n_threads = MAX_THREADS;
    for (; pool->n_threads < n_threads; pool->n_threads++)
        if (pthread_create(&pool->thread[pool->n_threads], NULL, work, pool)) break; /* fewer threads do as well */
    return OK;
}

void batch__pool_give(struct batch_pool *pool, struct batch_item *item)
{
    if (!pool->n_threads) batch__item_prepare(pool->builder, item);
    pthread_mutex_lock(&pool->mutex);
    queue_put(pool->n_threads ? &pool->waiting : &pool->ready, item);
    pool->n_under_way++;
    pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
}

struct batch_item *batch__pool_take(struct batch_pool *pool, double wait_seconds)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += (long)(wait_seconds * 1e9);
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&pool->mutex);
    while (wait_seconds > 0 && pool->n_under_way && !pool->ready.first)
        if (pthread_cond_timedwait(&pool->done, &pool->mutex, &until) == ETIMEDOUT) break;
    struct batch_item *item = queue_take(&pool->ready);
    pool->n_under_way -= item != NULL;
    pthread_mutex_unlock(&pool->mutex);
    return item;
}

void batch__pool_close(struct batch_pool *pool)
{
    struct batch_item *item;
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->n_threads; i++) pthread_join(pool->thread[i], NULL);
    while ((item = queue_take(&pool->waiting))) batch__item_free(item);
    while ((item = queue_take(&pool->ready))) batch__item_free(item);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->done);
    free(pool);
}
