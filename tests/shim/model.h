/* What a disk would hold after a power cut: see the comment at the top of disk.c.
 *
 * Plain bookkeeping, called with the one lock held. It makes system calls only to read a file when it first meets it,
 * and to rewrite files when the power goes. */
#ifndef MODEL_H
#define MODEL_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SECTOR 512

/* One write or truncation that no fsync has made durable. */
struct change {
    struct change *next;
    off_t offset; /* of a write; the new length of a truncation */
    size_t length;
    unsigned char *bytes; /* NULL for a truncation */
    int lost;             /* an fsync failed over it: the kernel has dropped it and a later fsync does not write it */
};

struct bytes {
    unsigned char *data;
    size_t length;
};

/* A file, by inode; it stays known, and open, for as long as the program runs, so that its number is not used again. */
struct node {
    struct node *next;
    dev_t device;
    ino_t inode;
    mode_t mode;
    int fd;
    char path[PATH_MAX];
    struct bytes durable;
    struct change *first, *last;
};

/* One change of a directory that no fsync of it has made durable. */
struct entry {
    struct entry *next;
    enum { ENTRY_CREATE, ENTRY_UNLINK, ENTRY_RENAME } what;
    char directory[PATH_MAX], name[PATH_MAX], to[PATH_MAX];
    struct node *node, *replaced;
};

static struct node *nodes;
static struct entry *entries;
static uint64_t random_state;

static uint64_t random_next(void) { /* SplitMix64 */
    uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int coin(void) { return (int)(random_next() >> 63); }

static void *room(size_t size) {
    void *memory = calloc(1, size ? size : 1);
    if (!memory) abort();
    return memory;
}

static void resize(struct bytes *bytes, size_t length) {
    bytes->data = realloc(bytes->data, length ? length : 1);
    if (!bytes->data) abort();
    if (length > bytes->length) memset(bytes->data + bytes->length, 0, length - bytes->length);
    bytes->length = length;
}

static void put(struct bytes *bytes, off_t offset, const unsigned char *data, size_t length) {
    if (bytes->length < (size_t)offset + length) resize(bytes, (size_t)offset + length);
    memcpy(bytes->data + offset, data, length);
}

static void load(struct bytes *bytes, int fd) {
    struct stat about;
    if (fstat(fd, &about)) return;
    resize(bytes, (size_t)about.st_size);
    for (size_t have = 0; have < bytes->length;) {
        ssize_t got = pread(fd, bytes->data + have, bytes->length - have, (off_t)have);
        if (got <= 0) break;
        have += (size_t)got;
    }
}

static struct node *node_of(const struct stat *about) {
    for (struct node *node = nodes; node; node = node->next)
        if (node->device == about->st_dev && node->inode == about->st_ino) return node;
    return NULL;
}

/* Knows a file from now on. What it holds is durable, unless the program has just created it. */
static struct node *meet(const char *path, int (*open_file)(const char *, int, ...)) {
    struct stat about;
    if (lstat(path, &about) || !S_ISREG(about.st_mode)) return NULL;
    struct node *node = node_of(&about);
    if (!node) {
        node = room(sizeof *node);
        *node = (struct node){.next = nodes, .device = about.st_dev, .inode = about.st_ino, .mode = about.st_mode & 0777};
        node->fd = open_file(path, O_RDWR | O_CLOEXEC);
        if (node->fd < 0) node->fd = open_file(path, O_RDONLY | O_CLOEXEC);
        load(&node->durable, node->fd);
        nodes = node;
    }
    strncpy(node->path, path, PATH_MAX - 1);
    return node;
}

static void note_change(struct node *node, off_t offset, size_t length, const void *bytes) {
    struct change *change = room(sizeof *change);
    *change = (struct change){.offset = offset, .length = length};
    if (bytes) change->bytes = memcpy(room(length), bytes, length);
    if (node->last) node->last->next = change; else node->first = change;
    node->last = change;
}

static void parent_of(char *directory, const char *path) {
    strncpy(directory, path, PATH_MAX - 1);
    char *slash = strrchr(directory, '/');
    if (slash) *slash = 0;
}

static void note_entry(int what, const char *name, const char *to, struct node *node, struct node *replaced) {
    struct entry *entry = room(sizeof *entry), **end = &entries;
    entry->what = what, entry->node = node, entry->replaced = replaced;
    strncpy(entry->name, name, PATH_MAX - 1);
    strncpy(entry->to, to ? to : "", PATH_MAX - 1);
    parent_of(entry->directory, to ? to : name);
    while (*end) end = &(*end)->next;
    *end = entry;
}

static void apply(struct bytes *to, const struct change *change, int torn) {
    if (!change->bytes) { resize(to, (size_t)change->offset); return; }
    for (size_t done = 0; done < change->length;) {
        size_t part = SECTOR - ((size_t)change->offset + done) % SECTOR;
        if (part > change->length - done) part = change->length - done;
        if (!torn || coin()) put(to, change->offset + (off_t)done, change->bytes + done, part);
        done += part;
    }
}

static void forget_changes(struct node *node) {
    for (struct change *change = node->first, *next; change; change = next) {
        next = change->next;
        free(change->bytes);
        free(change);
    }
    node->first = node->last = NULL;
}

/* An fsync of the file has succeeded. */
static void file_synced(struct node *node, int subset) {
    for (struct change *change = node->first; change; change = change->next)
        if (!change->lost || (subset && coin())) apply(&node->durable, change, 0);
    forget_changes(node);
}

static void file_sync_failed(struct node *node) {
    for (struct change *change = node->first; change; change = change->next) change->lost = 1;
}

static void directory_synced(const char *path) {
    for (struct entry **at = &entries; *at;) {
        struct entry *entry = *at;
        if (strcmp(entry->directory, path)) { at = &entry->next; continue; }
        *at = entry->next;
        free(entry);
    }
}

/* The names that pending entries speak of, and what each leads to after the cut. */
struct name { struct name *next; const char *path; struct node *node; };

static struct name *name_in(struct name **names, const char *path, struct node *before) {
    for (struct name *name = *names; name; name = name->next)
        if (!strcmp(name->path, path)) return name;
    struct name *name = room(sizeof *name);
    *name = (struct name){.next = *names, .path = path, .node = before};
    return *names = name;
}

static int entry_survives(const struct entry *entry, struct name **names, int survives) {
    struct node *before = entry->what == ENTRY_CREATE ? NULL : entry->node;
    struct name *from = name_in(names, entry->name, before), *to = NULL;
    if (entry->what == ENTRY_RENAME) to = name_in(names, entry->to, entry->replaced);
    /* What an operation needs may itself be gone. */
    if (!survives || from->node != before) return 0;
    if (entry->what == ENTRY_CREATE) from->node = entry->node; else from->node = NULL;
    if (to) to->node = entry->node;
    return 1;
}

static void write_out(int fd, const struct bytes *bytes, int (*truncate_file)(int, off_t),
                      ssize_t (*write_file)(int, const void *, size_t, off_t)) {
    for (size_t done = 0; done < bytes->length;) {
        ssize_t wrote = write_file(fd, bytes->data + done, bytes->length - done, (off_t)done);
        if (wrote <= 0) abort();
        done += (size_t)wrote;
    }
    if (truncate_file(fd, (off_t)bytes->length)) abort();
}

/* Directories first decide what is there, then files what is in them. Returns how many changes were undone. */
static uint64_t cut_power(int subset, int (*open_file)(const char *, int, ...), int (*unlink_file)(const char *),
                          int (*truncate_file)(int, off_t), ssize_t (*write_file)(int, const void *, size_t, off_t)) {
    uint64_t undone = 0;
    struct name *names = NULL;
    /* A journal keeps a prefix of what was done to a directory; POSIX promises not even that. */
    int journal = subset && coin(), alive = subset;
    for (struct entry *entry = entries; entry; entry = entry->next) {
        if (subset) alive = journal ? alive && (random_next() % 4) : coin();
        undone += !entry_survives(entry, &names, alive);
    }
    for (struct node *node = nodes; node; node = node->next) {
        if (!node->first) continue;
        for (struct change *change = node->first; change; change = change->next) {
            int fate = subset ? (int)(random_next() % 8) : 0;
            if (fate >= 3) apply(&node->durable, change, fate == 7 && change->bytes); else undone++;
        }
        write_out(node->fd, &node->durable, truncate_file, write_file);
    }
    for (struct name *name = names; name; name = name->next) {
        struct stat about;
        int there = !lstat(name->path, &about);
        if (there && name->node && node_of(&about) == name->node) continue;
        if (there) unlink_file(name->path);
        if (!name->node) continue;
        int fd = open_file(name->path, O_RDWR | O_CREAT | O_CLOEXEC, name->node->mode);
        if (fd < 0) abort();
        (void)!fchmod(fd, name->node->mode);
        write_out(fd, &name->node->durable, truncate_file, write_file);
    }
    return undone;
}

#endif
