/* Let the n-th operation that changes files below a folder fail. Loaded before the C library (LD_PRELOAD); a test sets
 * the folder and n through disk_faults_arm, and reads how many operations there were through disk_faults_count. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096];
static long first, seen;
static int code, sticky, shorten;

/* n: the operation that fails, from 1; 0 only counts. error: errno; 0 makes a write short. on: all later ones fail. */
void disk_faults_arm(const char *folder, long n, int error, int on) {
    snprintf(root, sizeof root, "%s", folder);
    first = n, seen = 0, code = error, sticky = on, shorten = error == 0;
}
long disk_faults_count(void) { return seen; }

static int below(const char *path) {
    size_t length = strlen(root);
    return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}
static int below_at(int folder, const char *path) {
    char link[64], full[8192];
    if (path[0] == '/') return below(path);
    if (!root[0]) return 0;
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t size = readlink(link, full, 4096);
    if (size < 0) return 0;
    snprintf(full + size, sizeof full - size, "/%s", path);
    return below(full);
}
static int below_fd(int file) {
    char link[64], full[4096];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, full, sizeof full - 1);
    if (size < 0) return 0;
    full[size] = 0;
    return below(full);
}
static int writes(int file) {
    int flags = fcntl(file, F_GETFL);
    return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY;
}
/* Count an operation; return whether it fails. */
static int fails(void) {
    long now = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (shorten || !first || now < first || (now > first && !sticky)) return 0;
    errno = code;
    return 1;
}
static size_t allowed(size_t size) { return shorten && size > 1 && (seen == first || (sticky && seen > first)) ? size / 2 : size; }

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define MODE(flags, mode) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); \
    mode = va_arg(rest, mode_t); va_end(rest); }
#define MAKES(flags) ((flags) & (O_CREAT | O_TRUNC))

int open(const char *path, int flags, ...) {
    REAL(open); MODE(flags, mode)
    return MAKES(flags) && below_at(AT_FDCWD, path) && fails() ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(open64); MODE(flags, mode)
    return MAKES(flags) && below_at(AT_FDCWD, path) && fails() ? -1 : real(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    REAL(openat); MODE(flags, mode)
    return MAKES(flags) && below_at(at, path) && fails() ? -1 : real(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    REAL(openat64); MODE(flags, mode)
    return MAKES(flags) && below_at(at, path) && fails() ? -1 : real(at, path, flags, mode);
}
ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    if (!below_fd(file)) return real(file, data, size);
    return fails() ? -1 : real(file, data, allowed(size));
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    if (!below_fd(file)) return real(file, data, size, at);
    return fails() ? -1 : real(file, data, allowed(size), at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    return below_fd(file) && fails() ? -1 : real(file, parts, count);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    extern ssize_t sendfile64(int, int, off64_t *, size_t);
    REAL(sendfile64);
    if (!below_fd(out)) return real(out, in, at, size);
    return fails() ? -1 : real(out, in, at, allowed(size));
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range);
    if (!below_fd(out)) return real(in, from, out, to, size, flags);
    return fails() ? -1 : real(in, from, out, to, allowed(size), flags);
}
int ftruncate64(int file, off64_t size) { REAL(ftruncate64); return below_fd(file) && fails() ? -1 : real(file, size); }
int fsync(int file) { REAL(fsync); return below_fd(file) && fails() ? -1 : real(file); }
int fdatasync(int file) { REAL(fdatasync); return below_fd(file) && fails() ? -1 : real(file); }
int close(int file) {
    REAL(close);
    int failed = root[0] && writes(file) && below_fd(file) && fails(), error = errno, done = real(file);
    if (failed) errno = error; /* The file is closed all the same, as Linux does. */
    return failed ? -1 : done;
}
int rename(const char *from, const char *to) {
    REAL(rename);
    return below_at(AT_FDCWD, to) && fails() ? -1 : real(from, to);
}
int renameat(int at, const char *from, int at_to, const char *to) {
    REAL(renameat);
    return below_at(at_to, to) && fails() ? -1 : real(at, from, at_to, to);
}
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return below_at(AT_FDCWD, path) && fails() ? -1 : real(path, mode); }
int symlink(const char *to, const char *path) {
    REAL(symlink);
    return below_at(AT_FDCWD, path) && fails() ? -1 : real(to, path);
}
