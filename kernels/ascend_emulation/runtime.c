/* SPDX-License-Identifier: Apache-2.0 */
/* SPDX-FileCopyrightText: The ascend_direct authors */
/*
 * runtime.c owns the part of libascendcl.so that MemCache calls under every protocol: devices,
 * streams, device and host memory, copies. Device memory is host memory and a copy is memcpy(),
 * finished when the call returns; so a stream is an empty token.
 *
 * It does not own memory that processes share (memory.c) nor the copy queues of device_sdma
 * (sdma.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "emulation.h"

_Static_assert(sizeof(void*) == 8, "the wheel and its device addresses are 64-bit");

static const char* soc_name(void) {
    const char* name = getenv("ASCEND_EMULATION_SOC");
    return name != NULL && name[0] != '\0' ? name : "Ascend910B3";
}

__attribute__((constructor)) static void announce(void) {
    refuse_unless_allowed();
    say("host memory poses as %s, this is not an NPU; no result from here is an NPU result",
        soc_name());
}

/* ---- devices ------------------------------------------------------------------------------- */

static __thread int32_t current_device;

EXPORT int aclrtSetDevice(int32_t device) {
    TRACE();
    current_device = device;
    return kOk;
}

EXPORT int aclrtGetDevice(int32_t* device) {
    TRACE();
    *device = current_device;
    return kOk;
}

/* The SoC decides how the library tells device memory from host memory: see is_device_memory(). */
EXPORT const char* aclrtGetSocName(void) {
    TRACE();
    return soc_name();
}

EXPORT int rtGetLogicDevIdByUserDevId(int32_t user, int32_t* logic) {
    TRACE();
    *logic = user;
    return kOk;
}

EXPORT int aclrtGetPhyDevIdByLogicDevId(int32_t logic, int32_t* physical) {
    TRACE();
    *physical = logic;
    return kOk;
}

EXPORT int rtDeviceGetBareTgid(uint32_t* process) {
    TRACE();
    *process = (uint32_t)getpid();
    return kOk;
}

/* Zero for every question: one server, no super pod. */
EXPORT int rtGetDeviceInfo(uint32_t device, int32_t module, int32_t question, int64_t* value) {
    TRACE();
    (void)device, (void)module, (void)question;
    *value = 0;
    return kOk;
}

EXPORT int aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) {
    TRACE();
    (void)peer, (void)flags;
    return kOk;
}

EXPORT int rtEnableP2P(uint32_t target, uint32_t source, uint32_t flags) {
    TRACE();
    (void)target, (void)source, (void)flags;
    return kOk;
}

EXPORT int rtDisableP2P(uint32_t target, uint32_t source) {
    TRACE();
    (void)target, (void)source;
    return kOk;
}

/* ---- streams ------------------------------------------------------------------------------- */

EXPORT int aclrtCreateStream(void** stream) {
    TRACE();
    *stream = malloc(1);
    return *stream != NULL ? kOk : fail_with_errno("cannot create", "a stream");
}

EXPORT int aclrtCreateStreamWithConfig(void** stream, int32_t priority, uint32_t flags) {
    (void)priority, (void)flags;
    return aclrtCreateStream(stream);
}

EXPORT int aclrtDestroyStream(void* stream) {
    TRACE();
    free(stream);
    return kOk;
}

EXPORT int aclrtSynchronizeStream(void* stream) {
    TRACE();
    (void)stream;
    return kOk;
}

/* ---- memory -------------------------------------------------------------------------------- */

/*
 * On an Ascend910B the library takes every address in this window for device memory and every
 * other address for host memory. So "device" blocks are ordinary pages mapped inside the window.
 */
#define DEVICE_BEGIN ((uintptr_t)0x100000000000)
#define DEVICE_END ((uintptr_t)0x180000000000)

/* The page in front of a block says what to give back; its mark betrays a foreign pointer. */
enum { kPage = 4096 };
static const uint64_t kBlockMark = 0x617363656e64626cUL;
struct block {
    uint64_t mark;
    size_t length;
};

/* Takes `length` bytes of the window for good: 8 TiB outlast any process, so none are reused. */
static uintptr_t take_addresses(size_t length) {
    static uintptr_t next = DEVICE_BEGIN;
    uintptr_t begin = __atomic_load_n(&next, __ATOMIC_SEQ_CST);
    do {
        if (length > DEVICE_END - begin) return 0;
    } while (!__atomic_compare_exchange_n(&next, &begin, begin + length, false, __ATOMIC_SEQ_CST,
                                          __ATOMIC_SEQ_CST));
    return begin;
}

EXPORT int aclrtMalloc(void** pointer, size_t size, uint32_t policy) {
    TRACE();
    (void)policy;
    if (size > DEVICE_END - DEVICE_BEGIN - 2 * kPage) {
        say("aclrtMalloc: %zu bytes are more than a device has", size);
        return kFailed;
    }
    size_t length = (size + kPage - 1) / kPage * kPage + kPage;
    uintptr_t address = take_addresses(length);
    if (address == 0) {
        say("aclrtMalloc: the device address window is used up");
        return kFailed;
    }
    void* mapping = mmap((void*)address, length, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (mapping == MAP_FAILED) return fail_with_errno("cannot map", "device memory");
    *(struct block*)mapping = (struct block){kBlockMark, length};
    *pointer = (char*)mapping + kPage;
    return kOk;
}

EXPORT int aclrtFree(void* pointer) {
    TRACE();
    if (pointer == NULL) return kOk;
    struct block* block = (struct block*)((char*)pointer - kPage);
    uintptr_t address = (uintptr_t)pointer;
    if (address < DEVICE_BEGIN || address >= DEVICE_END || block->mark != kBlockMark) {
        say("aclrtFree: %p does not come from aclrtMalloc", pointer);
        return kFailed;
    }
    if (munmap(block, block->length) != 0) return fail_with_errno("cannot unmap", "device memory");
    return kOk;
}

EXPORT int aclrtMallocHost(void** pointer, size_t size) {
    TRACE();
    errno = posix_memalign(pointer, kPage, size > 0 ? size : 1);
    return errno == 0 ? kOk : fail_with_errno("cannot allocate", "host memory");
}

EXPORT int aclrtFreeHost(void* pointer) {
    TRACE();
    free(pointer);
    return kOk;
}

static bool is_device_memory(uint64_t address) {
    static int all = -1; /* threads that race here find the same answer */
    if (all < 0) all = switched_on("ASCEND_EMULATION_ALL_DEVICE");
    return all || (address >= DEVICE_BEGIN && address < DEVICE_END);
}

/*
 * On an A3 (Ascend910_93xx) the library asks the driver instead of looking at the address. With
 * ASCEND_EMULATION_ALL_DEVICE=1 the answer is always "device", so that plain CPU tensors take the
 * code path of NPU tensors. The answer is the first word of a larger struct.
 */
EXPORT int drvMemGetAttribute(uint64_t address, uint32_t* memory_type) {
    enum { kLockedDeviceMemory = 0x10, kHostMemory = 0 };
    TRACE();
    *memory_type = is_device_memory(address) ? kLockedDeviceMemory : kHostMemory;
    return kOk;
}

/* ---- copies -------------------------------------------------------------------------------- */

static int copy(void* to, size_t room, const void* from, size_t size) {
    if (size > room || ((to == NULL || from == NULL) && size > 0)) {
        say("refused a copy of %zu bytes from %p to %p with room for %zu", size, from, to, room);
        return kFailed;
    }
    if (size > 0) memcpy(to, from, size);
    return kOk;
}

EXPORT int aclrtMemcpy(void* to, size_t room, const void* from, size_t size, uint32_t kind) {
    TRACE();
    (void)kind;
    return copy(to, room, from, size);
}

EXPORT int aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t size, uint32_t kind,
                            void* stream) {
    TRACE();
    (void)kind, (void)stream;
    return copy(to, room, from, size);
}

EXPORT int rtMemcpyAsyncWithoutCheckKind(void* to, size_t room, const void* from, size_t size,
                                         uint32_t kind, void* stream) {
    TRACE();
    (void)kind, (void)stream;
    return copy(to, room, from, size);
}

/* On failure *failed names the first copy that was not made, as the real one does. */
EXPORT int aclrtMemcpyBatch(void** to, size_t* rooms, void** from, size_t* sizes, size_t count,
                            void* attributes, size_t* attribute_indices, size_t attribute_count,
                            size_t* failed) {
    TRACE();
    (void)attributes, (void)attribute_indices, (void)attribute_count;
    for (size_t i = 0; i < count; i++) {
        if (copy(to[i], rooms[i], from[i], sizes[i]) == kOk) continue;
        if (failed != NULL) *failed = i;
        return kFailed;
    }
    return kOk;
}

EXPORT int aclrtMemcpy2d(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                         size_t width, size_t rows, uint32_t kind) {
    TRACE();
    (void)kind;
    if (width > from_pitch) {
        say("refused a copy of rows of %zu bytes that lie %zu apart", width, from_pitch);
        return kFailed;
    }
    for (size_t row = 0; row < rows; row++) {
        char* target = (char*)to + row * to_pitch;
        const char* source = (const char*)from + row * from_pitch;
        if (copy(target, to_pitch, source, width) != kOk) return kFailed;
    }
    return kOk;
}

EXPORT int aclrtMemcpy2dAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t rows, uint32_t kind, void* stream) {
    (void)stream;
    return aclrtMemcpy2d(to, to_pitch, from, from_pitch, width, rows, kind);
}

EXPORT int aclrtMemset(void* to, size_t room, int32_t value, size_t size) {
    TRACE();
    if (size > room) {
        say("refused to set %zu bytes where there is room for %zu", size, room);
        return kFailed;
    }
    memset(to, value, size);
    return kOk;
}
