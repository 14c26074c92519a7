/* Preloaded into a test's child: while the file named by FSYNC_FAILS exists, nothing can be synced, and
 * after the first failed sync nothing can be written either: a disk that goes away at the worst moment. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int gone;

static int broken(void) {
    const char *switch_file = getenv("FSYNC_FAILS");
    return switch_file && access(switch_file, F_OK) == 0;
}

#define SYNC(name)                                                              \
    int name(int fd) {                                                          \
        int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, #name);               \
        if (broken()) { gone = 1; errno = EIO; return -1; }                     \
        return real(fd);                                                        \
    }

#define WRITE(name, offset_parameter, offset)                                   \
    ssize_t name(int fd, const void *bytes, size_t length offset_parameter) {   \
        ssize_t (*real)() = (ssize_t (*)())dlsym(RTLD_NEXT, #name);             \
        if (fd > 2 && gone && broken()) { errno = EIO; return -1; }             \
        return real(fd, bytes, length offset);                                  \
    }
#define COMMA ,

SYNC(fsync)
SYNC(fdatasync)
WRITE(write, , )
WRITE(pwrite, COMMA off_t at, COMMA at)
WRITE(pwrite64, COMMA off64_t at, COMMA at)
