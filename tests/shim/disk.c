/* A disk that stops: preloaded into a program, it lets the files below one directory fail, lose the power, or take the
 * program down at an exact operation.
 *
 *   cc -O2 -shared -fPIC -o disk.so disk.c -ldl -lpthread
 *   LD_PRELOAD=disk.so DISK_SHIM='watch=/dir;control=/file;power-cut-at=17;seed=3' program
 *
 *   watch=DIR            only regular files and directories below DIR count (absolute, no links in it)
 *   ignore=SUFFIX        but not those whose name ends so; `-shm` never counts (the WAL's index, made anew after a crash)
 *   control=FILE         one page that is shared with the parent (control.h); it can change everything below while the
 *                        program runs, and reads from it how many operations there were and where the program died
 *   kill-at=N            SIGKILL instead of operation N;  kill-after=N: right after it
 *   power-cut-at=N       undo what was not synced when operation N was under way, then SIGKILL
 *   seed=S               undo a pseudo-random subset instead of all; writes may be torn at 512 bytes
 *   enospc-at=N[..[M]]   operation N (to M, or for ever) finds the disk full; the first write still fits half
 *   eio-at=, erofs-at=   the same with EIO, EROFS
 *   only-syncs=1         errors hit fsync and fdatasync only;  only=TEXT: only paths with TEXT in them
 *   lie-about-fsync=TEXT syncs of paths with TEXT in them say 0 and do nothing
 *
 * An operation is: a create or truncating open, a write, a truncation, a rename, an unlink, a sync of a file or of a
 * directory, in the order in which they happen in all threads of the process; one lock orders them.
 *
 * What is modelled (model.h). Per file (inode): what it held at its last successful fsync, and every write and
 * truncation since. Per directory: every creation, rename and removal since its last fsync; an fsync of a file does
 * not make its name durable. A rename is atomic. After a failed fsync the writes before it are never written by a
 * later fsync, though the program still reads them, as on Linux since 4.13. What was there before the program started
 * is durable.
 *
 * What is not. The whole file system is one disk that keeps its promises: no write reaches it late after an fsync, no
 * sector goes bad by itself. Modes, owners, times, mkdir, links and memory maps are not watched. Reads never fail.
 * A program that calls the kernel without libc (rustix) passes unseen: durable files go through std and SQLite. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "control.h"
#include "model.h"

static struct control *control;
static char watch[PATH_MAX], ignored[64];
static int cut_at_exit;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int (*real_open)(const char *, int, ...);
static int (*real_openat)(int, const char *, int, ...);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static ssize_t (*real_writev)(int, const struct iovec *, int);
static int (*real_ftruncate)(int, off_t);
static int (*real_rename)(const char *, const char *);
static int (*real_unlink)(const char *);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);

static void span(const char *value, uint64_t error) {
    char *end;
    control->error = error;
    control->error_from = strtoull(value, &end, 10);
    control->error_to = strncmp(end, "..", 2) ? control->error_from : strtoull(end + 2, NULL, 10);
}

static void act(const char *value, uint64_t action) {
    control->action = action;
    control->action_at = strtoull(value, NULL, 10);
}

static void option(const char *name, const char *value) {
    if (!strcmp(name, "watch")) snprintf(watch, sizeof watch, "%s", value);
    else if (!strcmp(name, "ignore")) snprintf(ignored, sizeof ignored, "%s", value);
    else if (!strcmp(name, "control")) {
        int fd = real_open(value, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (fd < 0 || real_ftruncate(fd, 4096)) abort();
        struct control *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (shared == MAP_FAILED) abort();
        control = shared;
    }
    else if (!strcmp(name, "kill-at")) act(value, ACTION_KILL_BEFORE);
    else if (!strcmp(name, "kill-after")) act(value, ACTION_KILL_AFTER);
    else if (!strcmp(name, "power-cut-at")) act(value, ACTION_POWER_CUT);
    else if (!strcmp(name, "cut-at-exit")) cut_at_exit = 1;
    else if (!strcmp(name, "seed")) control->seed = strtoull(value, NULL, 10);
    else if (!strcmp(name, "enospc-at")) span(value, ENOSPC);
    else if (!strcmp(name, "eio-at")) span(value, EIO);
    else if (!strcmp(name, "erofs-at")) span(value, EROFS);
    else if (!strcmp(name, "only-syncs")) control->only_syncs = 1;
    else if (!strcmp(name, "only")) snprintf(control->only, sizeof control->only, "%s", value);
    else if (!strcmp(name, "lie-about-fsync")) snprintf(control->lie, sizeof control->lie, "%s", value);
    else { fprintf(stderr, "disk.so: no option %s\n", name); abort(); }
}

__attribute__((constructor)) static void start(void) {
    static struct control own;
    control = &own;
    real_open = dlsym(RTLD_NEXT, "open");
    real_openat = dlsym(RTLD_NEXT, "openat");
    real_write = dlsym(RTLD_NEXT, "write");
    real_pwrite = dlsym(RTLD_NEXT, "pwrite");
    real_writev = dlsym(RTLD_NEXT, "writev");
    real_ftruncate = dlsym(RTLD_NEXT, "ftruncate");
    real_rename = dlsym(RTLD_NEXT, "rename");
    real_unlink = dlsym(RTLD_NEXT, "unlink");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    const char *given = getenv("DISK_SHIM");
    if (!given) return;
    char *text = strdup(given), *rest = text;
    for (char *item; (item = strsep(&rest, ";"));) {
        char *value = strchr(item, '=');
        if (!value) continue;
        *value++ = 0;
        option(item, value);
    }
    free(text);
    random_state = control->seed;
}

static int ends_with(const char *path, const char *end) {
    size_t have = strlen(path), want = strlen(end);
    return want && have >= want && !strcmp(path + have - want, end);
}

static int is_watched(const char *path) {
    size_t length = strlen(watch);
    if (!length || strncmp(path, watch, length) || (path[length] && path[length] != '/')) return 0;
    return !ends_with(path, "-shm") && !ends_with(path, ignored);
}

static void die(enum kind kind, const char *path) {
    for (struct node *node = nodes; node; node = node->next)
        if (node->first) control->fired_dirty |= ends_with(node->path, "-wal") ? DIRTY_WAL : DIRTY_FILE;
    if (entries) control->fired_dirty |= DIRTY_DIRECTORY;
    control->fired_kind = kind;
    snprintf(control->fired_path, sizeof control->fired_path, "%s", path);
    if (control->action == ACTION_POWER_CUT)
        control->undone =
            cut_power(control->seed != 0, real_open, real_unlink, real_ftruncate, real_pwrite);
    control->fired_at = control->count;
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* The power goes once the program has done its work: what it did not make durable is gone. */
__attribute__((destructor)) static void finish(void) {
    if (!cut_at_exit) return;
    pthread_mutex_lock(&lock);
    control->undone = cut_power(control->seed != 0, real_open, real_unlink, real_ftruncate, real_pwrite);
    pthread_mutex_unlock(&lock);
}

static int fires(enum action action) { return control->action == action && control->action_at == control->count; }

/* Counts one operation. Returns 0, or the error that it shall fail with. */
static int before(enum kind kind, const char *path) {
    control->count++;
    int is_sync = kind == KIND_SYNC || kind == KIND_SYNC_DIRECTORY;
    if (fires(ACTION_KILL_BEFORE) || (is_sync && fires(ACTION_POWER_CUT))) die(kind, path);
    if (!control->error || control->count < control->error_from) return 0;
    if (control->error_to && control->count > control->error_to) return 0;
    if ((control->only_syncs && !is_sync) || !strstr(path, control->only)) return 0;
    int error = (int)control->error;
    if (error == ENOSPC && kind != KIND_WRITE) return 0; /* a name finds room where data does not */
    control->errors_given++;
    return error;
}

static void after(enum kind kind, const char *path) {
    if (fires(ACTION_KILL_AFTER) || fires(ACTION_POWER_CUT)) die(kind, path);
}

static int failed(int error) {
    errno = error;
    return -1;
}

/* The file behind a descriptor, if it counts. */
static struct node *watched(int fd) {
    struct stat about;
    if (!*watch || fd < 0 || fstat(fd, &about) || !S_ISREG(about.st_mode)) return NULL;
    return node_of(&about);
}

static int open_locked(const char *path, int flags, mode_t mode) {
    struct stat about;
    int there = !lstat(path, &about), writes = (flags & O_ACCMODE) != O_RDONLY;
    int creates = (flags & O_CREAT) && !there, truncates = there && (flags & O_TRUNC) && writes;
    enum kind kind = creates ? KIND_CREATE : KIND_TRUNCATE;
    if (there && S_ISREG(about.st_mode)) meet(path, real_open);
    if (creates || truncates) {
        int error = before(kind, path);
        if (error) return failed(error);
    } else if (writes && control->error == EROFS && control->count + 1 >= control->error_from &&
               (!control->error_to || control->count < control->error_to)) {
        return failed(EROFS);
    }
    int fd = real_open(path, flags, mode);
    if (fd < 0) return fd;
    struct node *node = creates || truncates ? meet(path, real_open) : NULL;
    if (creates && node) note_entry(ENTRY_CREATE, path, NULL, node, NULL);
    if (truncates && node) note_change(node, 0, 0, NULL);
    if (creates || truncates) after(kind, path);
    return fd;
}

static int watched_open(const char *path, int flags, mode_t mode) {
    if (!is_watched(path)) return real_open(path, flags, mode);
    pthread_mutex_lock(&lock);
    int fd = open_locked(path, flags, mode), error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define MODE_FROM(flags, mode)                                    \
    mode_t mode = 0;                                              \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                      \
        va_list list;                                             \
        va_start(list, flags);                                    \
        mode = va_arg(list, mode_t);                              \
        va_end(list);                                             \
    }

int open(const char *path, int flags, ...) { MODE_FROM(flags, mode) return watched_open(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE_FROM(flags, mode) return watched_open(path, flags | O_LARGEFILE, mode); }
int creat(const char *path, mode_t mode) { return watched_open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }
int openat(int directory, const char *path, int flags, ...) {
    MODE_FROM(flags, mode)
    return *path == '/' ? watched_open(path, flags, mode) : real_openat(directory, path, flags, mode);
}
int openat64(int directory, const char *path, int flags, ...) {
    MODE_FROM(flags, mode)
    return *path == '/' ? watched_open(path, flags, mode) : real_openat(directory, path, flags, mode);
}

/* All writes end here. `at` is -1 for the descriptor's own position. */
static ssize_t write_locked(struct node *node, int fd, const void *bytes, size_t length, off_t at) {
    int append = fcntl(fd, F_GETFL) & O_APPEND;
    off_t offset = append ? lseek(node->fd, 0, SEEK_END) : at >= 0 ? at : lseek(fd, 0, SEEK_CUR);
    uint64_t errors = control->errors_given;
    int error = before(KIND_WRITE, node->path);
    /* The first write to a full disk is cut short, as real ones are. */
    if (error == ENOSPC && errors == 0 && length > 1) length /= 2; else if (error) return failed(error);
    ssize_t wrote = at >= 0 ? real_pwrite(fd, bytes, length, at) : real_write(fd, bytes, length);
    if (wrote > 0) note_change(node, offset, (size_t)wrote, bytes);
    after(KIND_WRITE, node->path);
    return wrote;
}

static ssize_t watched_write(int fd, const void *bytes, size_t length, off_t at) {
    pthread_mutex_lock(&lock);
    struct node *node = watched(fd);
    ssize_t wrote = 0;
    if (node) wrote = write_locked(node, fd, bytes, length, at);
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    if (node) return wrote;
    return at >= 0 ? real_pwrite(fd, bytes, length, at) : real_write(fd, bytes, length);
}

ssize_t write(int fd, const void *bytes, size_t length) { return watched_write(fd, bytes, length, -1); }
ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) { return watched_write(fd, bytes, length, at); }
ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) { return watched_write(fd, bytes, length, at); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    struct stat about;
    if (!*watch || fstat(fd, &about) || !S_ISREG(about.st_mode)) return real_writev(fd, parts, count);
    /* To a file a short write is as good: the first part that is not empty. */
    for (int part = 0; part < count; part++)
        if (parts[part].iov_len) return write(fd, parts[part].iov_base, parts[part].iov_len);
    return 0;
}

/* std copies files by these where it can; without them it reads and writes. */
ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t length, unsigned flags) {
    (void)in, (void)in_at, (void)out, (void)out_at, (void)length, (void)flags;
    return failed(ENOSYS);
}
ssize_t sendfile(int out, int in, off_t *at, size_t length) {
    (void)out, (void)in, (void)at, (void)length;
    return failed(ENOSYS);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t length) { return sendfile(out, in, at, length); }

int ftruncate(int fd, off_t length) {
    pthread_mutex_lock(&lock);
    struct node *node = watched(fd);
    int error = node ? before(KIND_TRUNCATE, node->path) : 0;
    int result = error ? failed(error) : real_ftruncate(fd, length);
    if (node && !result) note_change(node, length, 0, NULL);
    if (node && !error) after(KIND_TRUNCATE, node->path);
    error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

int rename(const char *from, const char *to) {
    if (!is_watched(to)) return real_rename(from, to);
    pthread_mutex_lock(&lock);
    struct node *node = meet(from, real_open), *replaced = meet(to, real_open);
    int error = before(KIND_RENAME, to);
    int result = error ? failed(error) : real_rename(from, to);
    if (node && !result) {
        note_entry(ENTRY_RENAME, from, to, node, replaced);
        snprintf(node->path, sizeof node->path, "%s", to);
    }
    if (!error) after(KIND_RENAME, to);
    error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int unlink(const char *path) {
    struct stat about;
    if (!is_watched(path) || lstat(path, &about)) return real_unlink(path);
    pthread_mutex_lock(&lock);
    struct node *node = meet(path, real_open);
    int error = before(KIND_UNLINK, path);
    int result = error ? failed(error) : real_unlink(path);
    if (node && !result) note_entry(ENTRY_UNLINK, path, NULL, node, NULL);
    if (!error) after(KIND_UNLINK, path);
    error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

static int sync_file(struct node *node, int fd, int (*real)(int)) {
    int error = before(KIND_SYNC, node->path);
    if (error) file_sync_failed(node);
    if (error) return failed(error);
    if (*control->lie && strstr(node->path, control->lie)) return 0;
    int result = real(fd);
    if (!result) file_synced(node, control->seed != 0); else file_sync_failed(node);
    after(KIND_SYNC, node->path);
    return result;
}

static int sync_directory(int fd, int (*real)(int)) {
    char link[64], path[PATH_MAX] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) < 0 || !is_watched(path)) return real(fd);
    int error = before(KIND_SYNC_DIRECTORY, path);
    if (error) return failed(error);
    int result = real(fd);
    if (!result) directory_synced(path);
    after(KIND_SYNC_DIRECTORY, path);
    return result;
}

static int watched_sync(int fd, int (*real)(int)) {
    struct stat about;
    pthread_mutex_lock(&lock);
    struct node *node = watched(fd);
    int result;
    if (node) result = sync_file(node, fd, real);
    else if (*watch && !fstat(fd, &about) && S_ISDIR(about.st_mode)) result = sync_directory(fd, real);
    else result = real(fd);
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int fsync(int fd) { return watched_sync(fd, real_fsync); }
int fdatasync(int fd) { return watched_sync(fd, real_fdatasync); }
