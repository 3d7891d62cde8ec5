/* Preloaded: the n-th write, fsync or rename below one folder fails. Armed by ctypes in a process that test_faults.py forks.

   It sees what Python, safetensors, Arrow and C++ streams call by name; not what the C library calls inside itself (the flush of a
   FILE buffer by fclose), and not memory maps. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

static char under[4096];
static atomic_long calls;
static long at;
static int error_number, from_there_on;

/* Count calls below `folder` from zero; fail number `n` (0: none) with `error`, and all later ones too if `on` is set. */
void fault_arm(const char *folder, long n, int error, int on) {
    strncpy(under, folder, sizeof under - 1);
    calls = 0, at = n, error_number = error, from_there_on = on;
}

long fault_calls(void) { return calls; }

static int fails(const char *path) {
    if (!*under || strncmp(path, under, strlen(under))) return 0;
    long i = ++calls;
    if (!at || (from_there_on ? i < at : i != at)) return 0;
    errno = error_number;
    return 1;
}

static int fails_on(int file) {
    char link[64], path[4096];
    if (!*under) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return fails(path);
}

#define PLAIN(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t n) { return fails_on(file) ? -1 : PLAIN(write)(file, data, n); }
ssize_t writev(int file, const struct iovec *parts, int n) { return fails_on(file) ? -1 : PLAIN(writev)(file, parts, n); }
ssize_t pwrite(int file, const void *data, size_t n, off_t to) { return fails_on(file) ? -1 : PLAIN(pwrite)(file, data, n, to); }
ssize_t sendfile(int to, int from, off_t *at_, size_t n) { return fails_on(to) ? -1 : PLAIN(sendfile)(to, from, at_, n); }
size_t fwrite(const void *data, size_t size, size_t n, FILE *file) { return fails_on(fileno(file)) ? 0 : PLAIN(fwrite)(data, size, n, file); }
int fsync(int file) { return fails_on(file) ? -1 : PLAIN(fsync)(file); }
int fdatasync(int file) { return fails_on(file) ? -1 : PLAIN(fdatasync)(file); }
int rename(const char *from, const char *to) { return fails(to) ? -1 : PLAIN(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { return fails(to) ? -1 : PLAIN(renameat)(a, from, b, to); }
int ftruncate(int file, off_t size) { return fails_on(file) ? -1 : PLAIN(ftruncate)(file, size); }
