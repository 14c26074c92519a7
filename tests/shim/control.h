/* What the parent tells the shim, and what the shim tells the parent: one page, shared, so that the parent can watch a
 * running program and change its mind. tests/src/crash/shim.rs has the same offsets. */
#ifndef CONTROL_H
#define CONTROL_H

#include <stdint.h>

enum action { ACTION_NONE, ACTION_KILL_BEFORE, ACTION_KILL_AFTER, ACTION_POWER_CUT };

enum kind { KIND_CREATE = 1, KIND_WRITE, KIND_TRUNCATE, KIND_RENAME, KIND_UNLINK, KIND_SYNC, KIND_SYNC_DIRECTORY };

/* Bits of fired_dirty: what was not on disk yet when the program died. */
enum { DIRTY_WAL = 1, DIRTY_FILE = 2, DIRTY_DIRECTORY = 4 };

struct control {
    uint64_t count;        /*   0: watched operations so far */
    uint64_t action;       /*   8: enum action */
    uint64_t action_at;    /*  16: the operation it is for, from 1 */
    uint64_t seed;         /*  24: 0 undoes all that is not synced, else a subset */
    uint64_t error;        /*  32: errno, or 0 */
    uint64_t error_from;   /*  40: first operation that fails */
    uint64_t error_to;     /*  48: last one; 0 for no end */
    uint64_t only_syncs;   /*  56: only fsync and fdatasync fail */
    uint64_t errors_given; /*  64: operations that failed so far */
    uint64_t fired_at;     /*  72: the operation at which it died; 0 while it lives */
    uint64_t fired_kind;   /*  80: enum kind */
    uint64_t fired_dirty;  /*  88: DIRTY_ bits */
    uint64_t undone;       /*  96: changes that the power cut undid */
    char fired_path[408];  /* 104 */
    char lie[128];         /* 512: syncs of paths with this in them do nothing; empty for none */
    char only[128];        /* 640: only paths with this in them fail; empty for all */
};

#endif
