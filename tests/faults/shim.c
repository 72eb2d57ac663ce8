/* Makes one system call of a process go wrong, by preloading: the calls of libc are counted, and one of them is struck.

   The environment says which; it is read at each call, so that a process may set it for itself.
     FAULT_PATHS   folders, with ':' between: a call counts where its path, or what its descriptor leads to, is in one
     FAULT_OPS     operations, with ',' around each, that count (",open,read,"); all where it is missing
     FAULT_AT      the how-manieth such call is struck (1: the first); 0: none
     FAULT_KEEP    "1": each call from that one on is struck, too
     FAULT_LOG     a file that gets a line "operation errno path" for the call that is struck; for each call, with FAULT_AT=0
     FAULT_READS   a file that gets a line "bytes path" for each call that read from a path of FAULT_PATHS
   and what happens to it, the first of these that is set:
     FAULT_RUN     a command of the shell is run before the call, which then goes on
     FAULT_SIGNAL  this signal is sent before the call, which then goes on; 1000 + n: after it
     FAULT_ERRNO   the call fails with it; without it with an error that the operation is known for, FAULT_AT choosing

   An operation is what several calls do alike: `open` is open(2), openat(2) and opendir(3). A close that fails has closed
   the descriptor all the same, as on Linux, and was opened to write: others have nothing to lose. What libc calls within
   itself passes by. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define CLONE_RANGE 0x4020940DUL /* linux/fs.h: FICLONERANGE */

static long seen;

/* What each operation fails with in life; 0 ends a row. No EINTR where the caller may not simply ask again. */
static const struct { const char *op; int codes[4]; } KNOWN[] = {
    {"open", {EIO, EACCES, EMFILE}}, {"create", {ENOSPC, EIO, EACCES, EROFS}}, {"stat", {EIO, EACCES}},
    {"read", {EIO, EINTR}}, {"write", {ENOSPC, EIO, EDQUOT, EINTR}}, {"copy", {ENOSPC, EIO}}, {"sync", {EIO, ENOSPC}},
    {"rename", {EIO, EACCES, ENOSPC}}, {"unlink", {EIO, EACCES}}, {"mkdir", {ENOSPC, EIO, EACCES}},
    {"rmdir", {EIO, EACCES}}, {"truncate", {ENOSPC, EIO}}, {"close", {EIO}}, {"map", {ENOMEM, EACCES}},
    {"link", {EIO, EACCES}}, {"chmod", {EIO, EPERM}}, {"list", {EIO}}, {"lock", {ENOLCK, EIO}},
    {"statfs", {EIO}}, {"clone", {EIO, ENOSPC}}, {"hint", {EIO}},
};

static int inside(const char *path) {
    for (const char *at = getenv("FAULT_PATHS"); at && *at;) {
        size_t size = strcspn(at, ":");
        if (!strncmp(path, at, size) && (path[size] == '/' || !path[size])) return 1;
        at += size + (at[size] == ':');
    }
    return 0;
}

static void led(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1L);
    path[size < 0 ? 0 : size] = 0;
}

static void write_log(const char *op, int code, const char *path) {
    char line[PATH_MAX + 64];
    const char *log = getenv("FAULT_LOG");
    long fd = log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
    if (fd < 0) return;
    int size = snprintf(line, sizeof line, "%s %d %s\n", op, code, path);
    if (syscall(SYS_write, fd, line, (long)size) < 0) _exit(99);
    syscall(SYS_close, fd);
}

static int chosen(const char *op, long at) {
    const char *asked = getenv("FAULT_ERRNO");
    if (asked && *asked) return atoi(asked);
    for (size_t row = 0; row < sizeof KNOWN / sizeof *KNOWN; row++)
        if (!strcmp(KNOWN[row].op, op)) {
            int count = 0;
            while (count < 4 && KNOWN[row].codes[count]) count++;
            return KNOWN[row].codes[at % count];
        }
    return EIO;
}

/* What to do about a call: 0 nothing, an errno to fail with, or minus a signal to send after it. */
static int fate(const char *op, const char *path) {
    if (!getenv("FAULT_PATHS") || !inside(path)) return 0;
    const char *ops = getenv("FAULT_OPS"), *at = getenv("FAULT_AT"), *keep = getenv("FAULT_KEEP");
    char wanted[32];
    snprintf(wanted, sizeof wanted, ",%s,", op);
    if (ops && *ops && !strstr(ops, wanted)) return 0;
    long turn = at ? atol(at) : 0, now = __sync_add_and_fetch(&seen, 1);
    int struck = turn && (now == turn || (keep && *keep == '1' && now > turn));
    const char *run = getenv("FAULT_RUN"), *sent = getenv("FAULT_SIGNAL");
    int number = sent ? atoi(sent) : 0;
    int fails = !(run && *run) && !number;
    int code = struck && fails ? chosen(op, turn) : 0;
    if (struck || !turn) write_log(op, code, path);
    if (!struck) return 0;
    if (run && *run) {
        unsetenv("FAULT_PATHS"); /* or the command would be struck as well */
        if (system(run) != 0) _exit(98);
        return 0;
    }
    if (number > 1000) return 1000 - number;
    if (number) kill(getpid(), number);
    return code;
}

static int of_path(const char *op, int folder, const char *given) {
    char path[2 * PATH_MAX + 2];
    if (!getenv("FAULT_PATHS")) return 0;
    if (!given || !*given) { led(folder, path); return fate(op, path); }
    if (*given == '/') return fate(op, given);
    if (folder != AT_FDCWD) led(folder, path);
    else if (!getcwd(path, PATH_MAX)) return 0;
    size_t size = strlen(path);
    snprintf(path + size, sizeof path - size, "/%s", given);
    return fate(op, path);
}

static int of_fd(const char *op, int fd) {
    char path[PATH_MAX];
    if (!getenv("FAULT_PATHS")) return 0;
    led(fd, path);
    return fate(op, path);
}

/* The body of a wrapper: `verdict` decides, `call` is the real one. */
#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define DO(type, verdict, failed, call) do { \
    int what = (verdict); \
    if (what > 0) { errno = what; return (failed); } \
    type answer = (call); \
    if (what < 0) { int kept = errno; kill(getpid(), -what); errno = kept; } \
    return answer; } while (0)

static const char *opened(int flags) { return flags & O_CREAT ? "create" : "open"; }

#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; va_end(more); \
    REAL(int, name, const char *, int, ...); \
    DO(int, of_path(opened(flags), AT_FDCWD, path), -1, real(path, flags, mode)); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
    va_list more; va_start(more, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; va_end(more); \
    REAL(int, name, int, const char *, int, ...); \
    DO(int, of_path(opened(flags), folder, path), -1, real(folder, path, flags, mode)); }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
DIR *opendir(const char *path) { REAL(DIR *, opendir, const char *); DO(DIR *, of_path("open", AT_FDCWD, path), NULL, real(path)); }
FILE *fopen64(const char *path, const char *mode) { REAL(FILE *, fopen64, const char *, const char *);
    DO(FILE *, of_path(*mode == 'r' ? "open" : "create", AT_FDCWD, path), NULL, real(path, mode)); }

#define STAT(name, kind) int name(const char *path, struct kind *info) { REAL(int, name, const char *, struct kind *); \
    DO(int, of_path("stat", AT_FDCWD, path), -1, real(path, info)); }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)
#define FSTAT(name, kind) int name(int fd, struct kind *info) { REAL(int, name, int, struct kind *); \
    DO(int, of_fd("stat", fd), -1, real(fd, info)); }
FSTAT(fstat, stat)
FSTAT(fstat64, stat64)
#define FSTATAT(name, kind) int name(int folder, const char *path, struct kind *info, int flags) { \
    REAL(int, name, int, const char *, struct kind *, int); \
    DO(int, of_path("stat", folder, path), -1, real(folder, path, info, flags)); }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)
int statx(int folder, const char *path, int flags, unsigned mask, struct statx *info) {
    REAL(int, statx, int, const char *, int, unsigned, struct statx *);
    DO(int, of_path("stat", folder, path), -1, real(folder, path, flags, mask, info)); }
int access(const char *path, int mode) { REAL(int, access, const char *, int); DO(int, of_path("stat", AT_FDCWD, path), -1, real(path, mode)); }
ssize_t readlink(const char *path, char *to, size_t size) { REAL(ssize_t, readlink, const char *, char *, size_t);
    DO(ssize_t, of_path("stat", AT_FDCWD, path), -1, real(path, to, size)); }
ssize_t readlinkat(int folder, const char *path, char *to, size_t size) { REAL(ssize_t, readlinkat, int, const char *, char *, size_t);
    DO(ssize_t, of_path("stat", folder, path), -1, real(folder, path, to, size)); }
int statvfs64(const char *path, struct statvfs64 *info) { REAL(int, statvfs64, const char *, struct statvfs64 *);
    DO(int, of_path("statfs", AT_FDCWD, path), -1, real(path, info)); }
int fstatvfs64(int fd, struct statvfs64 *info) { REAL(int, fstatvfs64, int, struct statvfs64 *); DO(int, of_fd("statfs", fd), -1, real(fd, info)); }
struct dirent64 *readdir64(DIR *folder) { REAL(struct dirent64 *, readdir64, DIR *); DO(struct dirent64 *, of_fd("list", dirfd(folder)), NULL, real(folder)); }

/* What a call read, noted. */
static ssize_t got(int fd, ssize_t size) {
    char path[PATH_MAX], line[PATH_MAX + 64];
    const char *log = size > 0 ? getenv("FAULT_READS") : NULL;
    int kept = errno;
    if (!log) return size;
    led(fd, path);
    if (!inside(path)) return size;
    long to = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    int length = snprintf(line, sizeof line, "%zd %s\n", size, path);
    if (to < 0 || syscall(SYS_write, to, line, (long)length) < 0) _exit(99);
    syscall(SYS_close, to);
    errno = kept;
    return size;
}

ssize_t read(int fd, void *to, size_t size) { REAL(ssize_t, read, int, void *, size_t); DO(ssize_t, of_fd("read", fd), -1, got(fd, real(fd, to, size))); }
ssize_t readv(int fd, const struct iovec *to, int count) { REAL(ssize_t, readv, int, const struct iovec *, int);
    DO(ssize_t, of_fd("read", fd), -1, got(fd, real(fd, to, count))); }
ssize_t pread64(int fd, void *to, size_t size, off64_t at) { REAL(ssize_t, pread64, int, void *, size_t, off64_t);
    DO(ssize_t, of_fd("read", fd), -1, got(fd, real(fd, to, size, at))); }
ssize_t preadv64(int fd, const struct iovec *to, int count, off64_t at) { REAL(ssize_t, preadv64, int, const struct iovec *, int, off64_t);
    DO(ssize_t, of_fd("read", fd), -1, got(fd, real(fd, to, count, at))); }
ssize_t preadv64v2(int fd, const struct iovec *to, int count, off64_t at, int flags) {
    REAL(ssize_t, preadv64v2, int, const struct iovec *, int, off64_t, int);
    DO(ssize_t, of_fd("read", fd), -1, got(fd, real(fd, to, count, at, flags))); }

ssize_t write(int fd, const void *of, size_t size) { REAL(ssize_t, write, int, const void *, size_t); DO(ssize_t, of_fd("write", fd), -1, real(fd, of, size)); }
ssize_t writev(int fd, const struct iovec *of, int count) { REAL(ssize_t, writev, int, const struct iovec *, int);
    DO(ssize_t, of_fd("write", fd), -1, real(fd, of, count)); }
ssize_t pwrite64(int fd, const void *of, size_t size, off64_t at) { REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    DO(ssize_t, of_fd("write", fd), -1, real(fd, of, size, at)); }
ssize_t pwritev64v2(int fd, const struct iovec *of, int count, off64_t at, int flags) {
    REAL(ssize_t, pwritev64v2, int, const struct iovec *, int, off64_t, int);
    DO(ssize_t, of_fd("write", fd), -1, real(fd, of, count, at, flags)); }
ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *at, size_t size, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    DO(ssize_t, of_fd("copy", to), -1, got(from, real(from, start, to, at, size, flags))); }
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) { REAL(ssize_t, sendfile64, int, int, off64_t *, size_t);
    DO(ssize_t, of_fd("copy", to), -1, got(from, real(to, from, at, size))); }
int ioctl(int fd, unsigned long request, ...) {
    va_list more; va_start(more, request); void *argument = va_arg(more, void *); va_end(more);
    REAL(int, ioctl, int, unsigned long, ...);
    DO(int, request == CLONE_RANGE ? of_fd("clone", fd) : 0, -1, real(fd, request, argument)); }
int sync_file_range(int fd, off64_t at, off64_t size, unsigned flags) { REAL(int, sync_file_range, int, off64_t, off64_t, unsigned);
    DO(int, of_fd("hint", fd), -1, real(fd, at, size, flags)); }
int posix_fadvise64(int fd, off64_t at, off64_t size, int what) { REAL(int, posix_fadvise64, int, off64_t, off64_t, int);
    int code = of_fd("hint", fd); return code > 0 ? code : real(fd, at, size, what); }

int fsync(int fd) { REAL(int, fsync, int); DO(int, of_fd("sync", fd), -1, real(fd)); }
int fdatasync(int fd) { REAL(int, fdatasync, int); DO(int, of_fd("sync", fd), -1, real(fd)); }
int ftruncate64(int fd, off64_t size) { REAL(int, ftruncate64, int, off64_t); DO(int, of_fd("truncate", fd), -1, real(fd, size)); }
int posix_fallocate64(int fd, off64_t at, off64_t size) { REAL(int, posix_fallocate64, int, off64_t, off64_t);
    int code = of_fd("truncate", fd); return code > 0 ? code : real(fd, at, size); }
int close(int fd) { REAL(int, close, int);
    int writes = getenv("FAULT_PATHS") && (syscall(SYS_fcntl, fd, F_GETFL) & O_ACCMODE) != O_RDONLY;
    int what = writes ? of_fd("close", fd) : 0, answer = real(fd);
    if (what > 0) { errno = what; return -1; }
    if (what < 0) kill(getpid(), -what);
    return answer; }
void *mmap64(void *near, size_t size, int access, int flags, int fd, off64_t at) { REAL(void *, mmap64, void *, size_t, int, int, int, off64_t);
    DO(void *, fd < 0 ? 0 : of_fd("map", fd), MAP_FAILED, real(near, size, access, flags, fd, at)); }
int flock(int fd, int how) { REAL(int, flock, int, int); DO(int, of_fd("lock", fd), -1, real(fd, how)); }
int fchmod(int fd, mode_t mode) { REAL(int, fchmod, int, mode_t); DO(int, of_fd("chmod", fd), -1, real(fd, mode)); }
int chmod(const char *path, mode_t mode) { REAL(int, chmod, const char *, mode_t); DO(int, of_path("chmod", AT_FDCWD, path), -1, real(path, mode)); }

int rename(const char *old, const char *new) { REAL(int, rename, const char *, const char *); DO(int, of_path("rename", AT_FDCWD, new), -1, real(old, new)); }
int renameat(int from, const char *old, int to, const char *new) { REAL(int, renameat, int, const char *, int, const char *);
    DO(int, of_path("rename", to, new), -1, real(from, old, to, new)); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    DO(int, of_path("rename", to, new), -1, real(from, old, to, new, flags)); }
int unlink(const char *path) { REAL(int, unlink, const char *); DO(int, of_path("unlink", AT_FDCWD, path), -1, real(path)); }
int unlinkat(int folder, const char *path, int flags) { REAL(int, unlinkat, int, const char *, int);
    DO(int, of_path(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path), -1, real(folder, path, flags)); }
int mkdir(const char *path, mode_t mode) { REAL(int, mkdir, const char *, mode_t); DO(int, of_path("mkdir", AT_FDCWD, path), -1, real(path, mode)); }
int rmdir(const char *path) { REAL(int, rmdir, const char *); DO(int, of_path("rmdir", AT_FDCWD, path), -1, real(path)); }
int link(const char *old, const char *new) { REAL(int, link, const char *, const char *); DO(int, of_path("link", AT_FDCWD, new), -1, real(old, new)); }
int symlink(const char *to, const char *path) { REAL(int, symlink, const char *, const char *); DO(int, of_path("link", AT_FDCWD, path), -1, real(to, path)); }
