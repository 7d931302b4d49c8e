/* SPDX-License-Identifier: Apache-2.0 */
/* SPDX-FileCopyrightText: The ascend_direct authors */
/*
 * memory.c owns memory that the members of a device_sdma pool share: address ranges, physical
 * memory mapped into them, handles that carry physical memory to another process.
 *
 * Physical memory is a sparse file in the run directory, a handle is the file's name, importing a
 * handle opens the file. It does not own copies (runtime.c, sdma.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "emulation.h"

/* ---- address ranges ------------------------------------------------------------------------ */

struct span {
    struct span* next;
    char* begin;
    size_t length;
};

static struct span *reserved, *mapped; /* what is to be given back, found by its first address */
static pthread_mutex_t spans_lock = PTHREAD_MUTEX_INITIALIZER;

static int remember(struct span** list, void* begin, size_t length) {
    struct span* span = malloc(sizeof *span);
    if (span == NULL) return fail_with_errno("cannot remember", "an address range");
    pthread_mutex_lock(&spans_lock);
    *span = (struct span){*list, begin, length};
    *list = span;
    pthread_mutex_unlock(&spans_lock);
    return kOk;
}

/* The length that was remembered for this address, 0 when there is none. */
static size_t forget(struct span** list, const void* begin) {
    size_t length = 0;
    pthread_mutex_lock(&spans_lock);
    for (struct span** link = list; *link != NULL; link = &(*link)->next) {
        struct span* span = *link;
        if (span->begin != begin) continue;
        length = span->length;
        *link = span->next;
        free(span);
        break;
    }
    pthread_mutex_unlock(&spans_lock);
    return length;
}

static bool lies_in_reserved(const char* begin, size_t length) {
    bool inside = false;
    pthread_mutex_lock(&spans_lock);
    for (const struct span* span = reserved; span != NULL && !inside; span = span->next) {
        if (begin < span->begin || length > span->length) continue;
        inside = (size_t)(begin - span->begin) <= span->length - length;
    }
    pthread_mutex_unlock(&spans_lock);
    return inside;
}

enum { kEmpty = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE };

EXPORT int halMemAddressReserve(void** pointer, size_t size, size_t alignment, void* wanted,
                                uint64_t flags) {
    TRACE();
    (void)alignment, (void)flags;
    int placement = wanted != NULL ? MAP_FIXED_NOREPLACE : 0;
    void* range = mmap(wanted, size, PROT_NONE, kEmpty | placement, -1, 0);
    if (range == MAP_FAILED) return fail_with_errno("cannot reserve", "an address range");
    if (remember(&reserved, range, size) != kOk) {
        if (munmap(range, size) != 0) return fail_with_errno("cannot unmap", "an address range");
        return kFailed;
    }
    *pointer = range;
    return kOk;
}

EXPORT int halMemAddressFree(void* pointer) {
    TRACE();
    size_t length = forget(&reserved, pointer);
    if (length == 0) {
        say("halMemAddressFree: %p is not the begin of a reserved range", pointer);
        return kFailed;
    }
    if (munmap(pointer, length) != 0) return fail_with_errno("cannot unmap", "an address range");
    return kOk;
}

/* ---- physical memory ----------------------------------------------------------------------- */

/* What a handle carries between processes: the caller reserves 128 bytes for it. */
struct shared_memory {
    uint64_t size;
    char file[120];
};
_Static_assert(sizeof(struct shared_memory) <= 128, "the caller's handle has 128 bytes");

struct memory {
    struct memory* next; /* in `owned` */
    struct shared_memory shared;
    pid_t owner; /* the process that removes the file, 0 when it was imported */
    int descriptor;
};

static struct memory* owned;
static pthread_mutex_t owned_lock = PTHREAD_MUTEX_INITIALIZER;

static int path_of(const struct shared_memory* shared, char path[PATH_MAX]) {
    int length = snprintf(path, PATH_MAX, "%s/%s", run_directory(), shared->file);
    if (length > 0 && length < PATH_MAX) return kOk;
    errno = ENAMETOOLONG;
    return fail_with_errno("cannot name", shared->file);
}

/* A tmpfs that runs full kills the writer with SIGBUS: say it here, while there is a choice. */
static int check_room(int descriptor, size_t size, const char* path) {
    struct statvfs volume;
    if (fstatvfs(descriptor, &volume) != 0) return fail_with_errno("cannot measure", path);
    uint64_t room = (uint64_t)volume.f_bavail * volume.f_frsize;
    if (size <= room) return kOk;
    say("%s needs %zu bytes and %llu are free: make its volume larger, or choose another one with "
        "ASCEND_EMULATION_RUN_DIR",
        path, size, (unsigned long long)room);
    return kFailed;
}

static int create_file(struct memory* memory) {
    char path[PATH_MAX];
    if (path_of(&memory->shared, path) != kOk) return kFailed;
    memory->descriptor = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (memory->descriptor < 0) return fail_with_errno("cannot create", path);
    size_t size = memory->shared.size;
    int result = check_room(memory->descriptor, size, path);
    if (result == kOk && ftruncate(memory->descriptor, (off_t)size) != 0)
        result = fail_with_errno("cannot size", path);
    if (result == kOk) return kOk;
    if (close(memory->descriptor) != 0) (void)fail_with_errno("cannot close", path);
    if (unlink(path) != 0) (void)fail_with_errno("cannot remove", path);
    return kFailed;
}

EXPORT int halMemCreate(struct memory** result, size_t size, const void* properties,
                        uint64_t flags) {
    static unsigned sequence;
    TRACE();
    (void)properties, (void)flags;
    struct memory* memory = calloc(1, sizeof *memory);
    if (memory == NULL) return fail_with_errno("cannot describe", "device memory");
    memory->owner = getpid();
    memory->shared.size = size;
    (void)snprintf(memory->shared.file, sizeof memory->shared.file, "device_memory_%d_%u",
                   (int)memory->owner, __atomic_fetch_add(&sequence, 1, __ATOMIC_SEQ_CST));
    if (create_file(memory) != kOk) {
        free(memory);
        return kFailed;
    }
    pthread_mutex_lock(&owned_lock);
    memory->next = owned;
    owned = memory;
    pthread_mutex_unlock(&owned_lock);
    *result = memory;
    return kOk;
}

/* Removes the file if this process made it; a child of fork() must not. */
static int remove_file(const struct memory* memory) {
    char path[PATH_MAX];
    if (memory->owner != getpid()) return kOk;
    if (path_of(&memory->shared, path) != kOk) return kFailed;
    if (unlink(path) != 0 && errno != ENOENT) return fail_with_errno("cannot remove", path);
    return kOk;
}

static void disown(const struct memory* memory) {
    pthread_mutex_lock(&owned_lock);
    for (struct memory** link = &owned; *link != NULL; link = &(*link)->next) {
        if (*link != memory) continue;
        *link = memory->next;
        break;
    }
    pthread_mutex_unlock(&owned_lock);
}

EXPORT int halMemRelease(struct memory* memory) {
    TRACE();
    disown(memory);
    int result = remove_file(memory);
    if (close(memory->descriptor) != 0)
        result = fail_with_errno("cannot close", memory->shared.file);
    free(memory);
    return result;
}

/* A member's memory ends with the member, also when it does not say goodbye. */
__attribute__((destructor)) static void remove_what_is_left(void) {
    for (const struct memory* memory = owned; memory != NULL; memory = memory->next)
        (void)remove_file(memory);
}

EXPORT int halMemMap(void* pointer, size_t size, size_t offset, struct memory* memory,
                     uint64_t flags) {
    TRACE();
    (void)flags;
    if (!lies_in_reserved(pointer, size) || offset > memory->shared.size ||
        size > memory->shared.size - offset) {
        say("halMemMap: %zu bytes at %p do not lie in a reserved range, or in the memory", size,
            pointer);
        return kFailed;
    }
    void* mapping = mmap(pointer, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                         memory->descriptor, (off_t)offset);
    if (mapping == MAP_FAILED) return fail_with_errno("cannot map", memory->shared.file);
    return remember(&mapped, pointer, size);
}

EXPORT int halMemUnmap(void* pointer) {
    TRACE();
    size_t length = forget(&mapped, pointer);
    if (length == 0) {
        say("halMemUnmap: nothing is mapped at %p", pointer);
        return kFailed;
    }
    if (mmap(pointer, length, PROT_NONE, kEmpty | MAP_FIXED, -1, 0) == MAP_FAILED)
        return fail_with_errno("cannot unmap", "device memory");
    return kOk;
}

/* ---- handles ------------------------------------------------------------------------------- */

EXPORT int halMemExportToShareableHandleV2(struct memory* memory, int type, uint64_t flags,
                                           struct shared_memory* handle) {
    TRACE();
    (void)type, (void)flags;
    *handle = memory->shared;
    return kOk;
}

EXPORT int halMemImportFromShareableHandleV2(int type, const struct shared_memory* handle,
                                             uint32_t device, struct memory** result) {
    TRACE();
    (void)type, (void)device;
    char path[PATH_MAX];
    if (memchr(handle->file, '\0', sizeof handle->file) == NULL || strchr(handle->file, '/')) {
        say("refused a handle that no emulated device made");
        return kFailed;
    }
    struct memory* memory = calloc(1, sizeof *memory);
    if (memory == NULL) return fail_with_errno("cannot describe", "device memory");
    memory->shared = *handle;
    if (path_of(handle, path) == kOk) {
        memory->descriptor = open(path, O_RDWR | O_CLOEXEC);
        if (memory->descriptor >= 0) {
            *result = memory;
            return kOk;
        }
        (void)fail_with_errno("members of a pool share one run directory; cannot open", path);
    }
    free(memory);
    return kFailed;
}

/* The number only travels back into halMemShareHandleSetAttribute(). */
EXPORT int halMemTransShareableHandle(int type, const void* handle, uint32_t* server,
                                      uint64_t* number) {
    TRACE();
    (void)type, (void)handle;
    *server = 0;
    *number = 1;
    return kOk;
}

EXPORT int halMemGetAllocationGranularity(const void* properties, int option, size_t* bytes) {
    TRACE();
    (void)properties, (void)option;
    *bytes = 2UL << 20;
    return kOk;
}

/* The device sees host memory at the host's own address. */
EXPORT int halHostRegister(void* pointer, uint64_t size, uint32_t flags, uint32_t device,
                           void** device_pointer) {
    TRACE();
    (void)size, (void)flags, (void)device;
    if (device_pointer != NULL) *device_pointer = pointer;
    return kOk;
}

/*
 * The one call that is refused quietly: a host_tcp member asks for host memory here and, refused,
 * maps ordinary pages itself.
 */
EXPORT int halMemAlloc(void** pointer, uint64_t size, uint64_t flags) {
    enum { kSideShift = 10, kSideMask = 0xf, kHostSide = 2 };
    TRACE();
    (void)pointer;
    if ((flags >> kSideShift & kSideMask) != kHostSide)
        say("halMemAlloc() of %llu bytes needs an NPU and is not emulated: it fails",
            (unsigned long long)size);
    return kNeedsHardware;
}

/* Permissions: every member of a pool runs as one user, so there are none to give or take. */
#define NOTHING_TO_DO(function) \
    EXPORT int function(void) { \
        TRACE();                \
        return kOk;             \
    }

NOTHING_TO_DO(halMemSetAccess)
NOTHING_TO_DO(halMemShareHandleSetAttribute)
NOTHING_TO_DO(halHostUnregisterEx)
