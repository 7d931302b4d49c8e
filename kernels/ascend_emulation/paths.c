/* SPDX-License-Identifier: Apache-2.0 */
/* SPDX-FileCopyrightText: The ascend_direct authors */
/*
 * paths.c is a library for LD_PRELOAD. It owns where the few absolute paths lead that the
 * libraries have built in, so that no root is needed, nothing outside the run directory is
 * written, and pools live side by side:
 *
 *   /etc/ascend_install.info      the file that ASCEND_EMULATION_INSTALL_INFO names
 *   /tmp/mmc_meta_service.lock    into the run directory: one MetaService per run directory
 *   /dev/shm/memfabric_hybrid_*   into the run directory: the memory of host_shm members
 *   /var/log/memfabric_hybrid     into the run directory: trace files of each process
 *
 * Every other path, and every other way to open a file, is left as it is. It emulates nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sysexits.h>
#include <unistd.h>

#include "emulation.h"

__attribute__((constructor)) static void check(void) { refuse_unless_allowed(); }

static bool starts_with(const char* text, const char* prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

/* The part of the path that continues in the run directory, NULL when it stays where it is. */
static const char* part_in_run_directory(const char* path) {
    if (strcmp(path, "/tmp/mmc_meta_service.lock") == 0) return path + strlen("/tmp");
    if (starts_with(path, "/dev/shm/memfabric_hybrid_")) return path + strlen("/dev/shm");
    const char* logs = "/var/log/memfabric_hybrid";
    if (strcmp(path, logs) == 0 || starts_with(path, "/var/log/memfabric_hybrid/"))
        return path + strlen("/var/log");
    return NULL;
}

/* Where `path` really leads; NULL with errno set when the answer does not fit into `room`. */
static const char* redirect(const char* path, char room[PATH_MAX]) {
    if (path == NULL) return path;
    const char* install_info = getenv("ASCEND_EMULATION_INSTALL_INFO");
    if (install_info != NULL && strcmp(path, "/etc/ascend_install.info") == 0) return install_info;
    const char* part = part_in_run_directory(path);
    const char* directory = run_directory();
    if (part == NULL || directory == NULL) return path;
    int length = snprintf(room, PATH_MAX, "%s%s", directory, part);
    return length > 0 && length < PATH_MAX ? room : "";
}

/* The function of this name in the next library; POSIX, not ISO C, lets a void* carry it. */
static void* next_function(const char* name) {
    void* function = dlsym(RTLD_NEXT, name);
    if (function == NULL) {
        say("the C library has no %s()", name);
        _exit(EX_SOFTWARE);
    }
    return function;
}

EXPORT char* realpath(const char* path, char* resolved) {
    static char* (*next)(const char*, char*);
    if (next == NULL) next = next_function("realpath");
    char room[PATH_MAX];
    return next(redirect(path, room), resolved);
}

EXPORT char* __realpath_chk(const char* path, char* resolved, size_t resolved_length) {
    static char* (*next)(const char*, char*, size_t);
    if (next == NULL) next = next_function("__realpath_chk");
    char room[PATH_MAX];
    return next(redirect(path, room), resolved, resolved_length);
}

EXPORT int open(const char* path, int flags, ...) {
    static int (*next)(const char*, int, ...);
    if (next == NULL) next = next_function("open");
    mode_t mode = 0;
    if ((flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE) {
        va_list arguments;
        va_start(arguments, flags);
        mode = va_arg(arguments, mode_t);
        va_end(arguments);
    }
    char room[PATH_MAX];
    return next(redirect(path, room), flags, mode);
}

EXPORT int mkdir(const char* path, mode_t mode) {
    static int (*next)(const char*, mode_t);
    if (next == NULL) next = next_function("mkdir");
    char room[PATH_MAX];
    return next(redirect(path, room), mode);
}

EXPORT int unlink(const char* path) {
    static int (*next)(const char*);
    if (next == NULL) next = next_function("unlink");
    char room[PATH_MAX];
    return next(redirect(path, room));
}
