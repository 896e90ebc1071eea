/* Faults at the n-th system call on files below one folder. Preloaded (LD_PRELOAD) into a process that arms it:
 * faults_arm() says which calls count and what happens at the n-th, faults_count() how many there were.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, SIGNAL, FAIL_ONCE, FAIL_FROM, SHORT, SHRINK, GROW, CHANGE };
enum { READS = 1, WRITES = 2, REMOVES = 4 };

static int mode, argument, classes;
static long nth;
static volatile long calls;
static volatile int armed, done;
static char prefix[4096], victim[4096];
static __thread int inside;

void faults_arm(const char *below, int which, int what, long at, int value, const char *file)
{
    snprintf(prefix, sizeof prefix, "%s", below);
    snprintf(victim, sizeof victim, "%s", file ? file : "");
    classes = which, mode = what, nth = at, argument = value, calls = 0, done = 0, armed = 1;
}

long faults_count(void) { return calls; }

void faults_disarm(void) { armed = 0; }

/* Changes the victim by system calls of our own, which do not count. */
static void spoil(void)
{
    struct stat status;
    int handle = syscall(SYS_openat, AT_FDCWD, victim, O_RDWR, 0);
    if (handle < 0 || fstat(handle, &status))
        return;
    if (mode == SHRINK)
        syscall(SYS_ftruncate, handle, status.st_size / 2);
    if (mode == GROW)
        syscall(SYS_pwrite64, handle, "more", 4, status.st_size);
    if (mode == CHANGE) {
        char byte = 0;
        syscall(SYS_pread64, handle, &byte, 1, status.st_size / 2);
        byte ^= 1;
        syscall(SYS_pwrite64, handle, &byte, 1, status.st_size / 2);
    }
    syscall(SYS_close, handle);
}

/* What happens at this call: 0 nothing, an error number, or -1 for half of what was asked. */
static int decide(const char *path, int which)
{
    if (!(classes & which) || strncmp(path, prefix, strlen(prefix)))
        return 0;
    long now = __sync_add_and_fetch(&calls, 1);
    if (mode == COUNT || now < nth || (now > nth && mode != FAIL_FROM))
        return 0;
    if (mode == SIGNAL) {
        kill(getpid(), argument);
        return 0;
    }
    if (mode >= SHRINK) {
        if (!__sync_lock_test_and_set(&done, 1))
            spoil();
        return 0;
    }
    return mode == SHORT ? -1 : argument;
}

static int of_handle(int handle, int which)
{
    char name[64], path[4096];
    if (!armed || inside)
        return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", handle);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, name, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return decide(path, which);
}

static int of_path(int folder, const char *path, int which)
{
    char name[64], whole[8192];
    if (!armed || inside || !path)
        return 0;
    if (path[0] == '/')
        return decide(path, which);
    if (folder == AT_FDCWD)
        snprintf(name, sizeof name, "/proc/self/cwd");
    else
        snprintf(name, sizeof name, "/proc/self/fd/%d", folder);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, name, whole, 4000);
    if (length <= 0)
        return 0;
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return decide(whole, which);
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name)
{
    inside++;
    void *found = dlsym(RTLD_NEXT, name);
    inside--;
    return found;
}

#define FAIL_IF(fault) do { int f_ = (fault); if (f_ > 0) { errno = f_; return -1; } } while (0)
#define ON_PATH(result, name, parameters, folder, path, arguments) \
    result name parameters { FAIL_IF(of_path(folder, path, WRITES)); return REAL(name) arguments; }
#define ON_REMOVAL(result, name, parameters, folder, path, arguments) \
    result name parameters { FAIL_IF(of_path(folder, path, REMOVES)); return REAL(name) arguments; }
#define ON_HANDLE(result, name, parameters, handle, arguments) \
    result name parameters { FAIL_IF(of_handle(handle, WRITES)); return REAL(name) arguments; }

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
        FAIL_IF(of_path(AT_FDCWD, path, flags & (O_WRONLY | O_RDWR | O_CREAT) ? WRITES : READS)); \
        return ((int (*)(const char *, int, mode_t))real(#name))(path, flags, bits); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) \
    { \
        va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
        FAIL_IF(of_path(folder, path, flags & (O_WRONLY | O_RDWR | O_CREAT) ? WRITES : READS)); \
        return ((int (*)(int, const char *, int, mode_t))real(#name))(folder, path, flags, bits); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int handle, const void *data, size_t count)
{
    int fault = of_handle(handle, WRITES);
    FAIL_IF(fault);
    return REAL(write)(handle, data, fault < 0 && count > 1 ? count / 2 : count);
}

#define PWRITE(name, offset) \
    ssize_t name(int handle, const void *data, size_t count, offset at) \
    { \
        int fault = of_handle(handle, WRITES); \
        FAIL_IF(fault); \
        return REAL(name)(handle, data, fault < 0 && count > 1 ? count / 2 : count, at); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

/* Half of a vector is its first part. */
ssize_t writev(int handle, const struct iovec *parts, int count)
{
    int fault = of_handle(handle, WRITES);
    FAIL_IF(fault);
    return REAL(writev)(handle, parts, fault < 0 && count > 1 ? 1 : count);
}

#define PREAD(name, offset) \
    ssize_t name(int handle, void *data, size_t count, offset at) \
    { \
        int fault = of_handle(handle, READS); \
        FAIL_IF(fault); \
        return REAL(name)(handle, data, fault < 0 && count > 1 ? count / 2 : count, at); \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

ssize_t read(int handle, void *data, size_t count)
{
    int fault = of_handle(handle, READS);
    FAIL_IF(fault);
    return REAL(read)(handle, data, fault < 0 && count > 1 ? count / 2 : count);
}

#define PREADV(name, offset) \
    ssize_t name(int handle, const struct iovec *parts, int count, offset at) \
    { \
        int fault = of_handle(handle, READS); \
        FAIL_IF(fault); \
        if (fault < 0 && count == 1 && parts[0].iov_len > 1) { \
            struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2}; \
            return REAL(name)(handle, &half, 1, at); \
        } \
        return REAL(name)(handle, parts, count, at); \
    }
PREADV(preadv, off_t)
PREADV(preadv64, off64_t)

#define COPY(name, offset) \
    ssize_t name(int target, int source, offset *at, size_t count) \
    { \
        int fault = of_handle(target, WRITES); \
        FAIL_IF(fault); \
        return REAL(name)(target, source, at, fault < 0 && count > 1 ? count / 2 : count); \
    }
COPY(sendfile, off_t)
COPY(sendfile64, off64_t)

ssize_t copy_file_range(int source, off64_t *from, int target, off64_t *to, size_t count, unsigned flags)
{
    int fault = of_handle(target, WRITES);
    FAIL_IF(fault);
    return REAL(copy_file_range)(source, from, target, to, fault < 0 && count > 1 ? count / 2 : count, flags);
}

ON_HANDLE(int, fsync, (int handle), handle, (handle))
ON_HANDLE(int, fdatasync, (int handle), handle, (handle))
ON_HANDLE(int, ftruncate, (int handle, off_t length), handle, (handle, length))
ON_HANDLE(int, ftruncate64, (int handle, off64_t length), handle, (handle, length))
ON_HANDLE(int, fchmod, (int handle, mode_t bits), handle, (handle, bits))
ON_PATH(int, rename, (const char *old, const char *new), AT_FDCWD, new, (old, new))
ON_PATH(int, renameat, (int from, const char *old, int to, const char *new), to, new, (from, old, to, new))
ON_PATH(int, renameat2, (int from, const char *old, int to, const char *new, unsigned flags), to, new,
        (from, old, to, new, flags))
ON_PATH(int, link, (const char *old, const char *new), AT_FDCWD, new, (old, new))
ON_PATH(int, linkat, (int from, const char *old, int to, const char *new, int flags), to, new,
        (from, old, to, new, flags))
ON_PATH(int, symlink, (const char *old, const char *new), AT_FDCWD, new, (old, new))
ON_REMOVAL(int, unlink, (const char *path), AT_FDCWD, path, (path))
ON_REMOVAL(int, unlinkat, (int folder, const char *path, int flags), folder, path, (folder, path, flags))
ON_PATH(int, mkdir, (const char *path, mode_t bits), AT_FDCWD, path, (path, bits))
ON_PATH(int, mkdirat, (int folder, const char *path, mode_t bits), folder, path, (folder, path, bits))
ON_REMOVAL(int, rmdir, (const char *path), AT_FDCWD, path, (path))
ON_PATH(int, chmod, (const char *path, mode_t bits), AT_FDCWD, path, (path, bits))
ON_PATH(int, fchmodat, (int folder, const char *path, mode_t bits, int flags), folder, path,
        (folder, path, bits, flags))
ON_PATH(int, utimensat, (int folder, const char *path, const struct timespec times[2], int flags), folder, path,
        (folder, path, times, flags))
