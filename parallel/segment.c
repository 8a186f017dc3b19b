#include "parallel/segment.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

static int map(int fd, size_t bytes, const char *what, void **out)
{
    int flags = fd < 0 ? MAP_SHARED | MAP_ANONYMOUS : MAP_SHARED;
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED) FAIL(ERR_IO, "cannot map %zu bytes shared by ranks for %s: %s", bytes, what, strerror(errno));
    *out = at;
    return OK;
}

/* create - the first local rank makes it; its memory is taken now, since a full /dev/shm met later, at the first
 * write, would be a SIGBUS. */
static int create(const char *name, size_t bytes, const char *what, void **out)
{
    int fd = shm_open(name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0) FAIL(ERR_IO, "cannot create %s in /dev/shm for %s: %s", name, what, strerror(errno));
    int error = posix_fallocate(fd, 0, (off_t)bytes);
    int rc = error ? status_set(ERR_IO, __FILE__, __LINE__,
                                "cannot take %zu bytes of /dev/shm for %s: %s; make /dev/shm larger", bytes, what,
                                strerror(error))
                   : map(fd, bytes, what, out);
    close(fd);
    return rc;
}

static int attach(const char *name, size_t bytes, const char *what, void **out)
{
    int fd = shm_open(name, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0)
        FAIL(ERR_IO, "cannot open %s in /dev/shm, made by the first rank of this host for %s: %s", name, what,
             strerror(errno));
    int rc = map(fd, bytes, what, out);
    close(fd);
    return rc;
}

int segment_open(struct comm *c, size_t bytes, const char *what, void **out)
{
    uint64_t id = 0;
    char name[40];
    *out = NULL;
    if (c->rank == 0 && getrandom(&id, sizeof id, 0) != sizeof id) id = (uint64_t)getpid();
    TRY(comm_broadcast(c, &id, sizeof id, 0));
    snprintf(name, sizeof name, "/vitrail-%016llx", (unsigned long long)id);
    bool first = c->local_rank == 0, alone = c->local_size == 1;
    int rc = OK;
    if (first) rc = alone ? map(-1, bytes, what, out) : create(name, bytes, what, out);
    rc = comm_agree(c, rc, c->phase);
    if (!rc) {
        if (!first) rc = attach(name, bytes, what, out);
        rc = comm_agree(c, rc, c->phase);
    }
    if (first && !alone) shm_unlink(name);
    return rc;
}
