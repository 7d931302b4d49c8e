/* SPDX-License-Identifier: Apache-2.0 */
/* SPDX-FileCopyrightText: The ascend_direct authors */
/*
 * sdma.c owns the copy queues behind device_sdma. The library writes 64-byte descriptors into a
 * submission queue and polls the queue's head; here a descriptor is carried out with memcpy()
 * before the submitting call returns, so the head is always up to date and no report ever comes.
 *
 * It does not own the memory that is copied (memory.c). A descriptor with a wrong address ends the
 * process with SIGSEGV where hardware would report an error.
 */
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include "emulation.h"

/* ---- queues -------------------------------------------------------------------------------- */

enum { kQueues = 4096 };

struct queue {
    bool taken;
    uint32_t depth;
    uint32_t head;
};

static struct queue queues[kQueues];
static pthread_mutex_t queues_lock = PTHREAD_MUTEX_INITIALIZER;

/* The structs below are the driver's; fields that the emulation ignores are left out at the end. */
enum { kLogicQueue = 2 }; /* a completion queue without a submission queue */

struct queue_request {
    uint32_t type, scheduler, entry_bytes, report_bytes, depth, report_depth;
};

struct queue_ids {
    uint32_t submission, completion;
};

struct queue_release {
    uint32_t type, scheduler, submission, completion;
};

EXPORT int halSqCqAllocate(uint32_t device, const struct queue_request* request,
                           struct queue_ids* ids) {
    TRACE();
    (void)device;
    int result = kFailed;
    pthread_mutex_lock(&queues_lock);
    for (uint32_t id = 0; id < kQueues && result != kOk; id++) {
        if (queues[id].taken) continue;
        queues[id] = (struct queue){true, request->depth > 0 ? request->depth : 1, 0};
        ids->submission = ids->completion = id;
        result = kOk;
    }
    pthread_mutex_unlock(&queues_lock);
    if (result != kOk) say("all %d queues of the device are taken", kQueues);
    return result;
}

EXPORT int halSqCqFree(uint32_t device, const struct queue_release* release) {
    TRACE();
    (void)device;
    uint32_t id = release->type == kLogicQueue ? release->completion : release->submission;
    if (id >= kQueues) {
        say("halSqCqFree: there is no queue %u", id);
        return kFailed;
    }
    pthread_mutex_lock(&queues_lock);
    queues[id].taken = false;
    pthread_mutex_unlock(&queues_lock);
    return kOk;
}

EXPORT int halResourceIdAlloc(uint32_t device, const void* request, uint32_t* id) {
    static uint32_t next;
    TRACE();
    (void)device, (void)request;
    *id = __atomic_fetch_add(&next, 1, __ATOMIC_SEQ_CST) & 0x7fff; /* a label, never looked up */
    return kOk;
}

EXPORT int halResourceIdFree(void) {
    TRACE();
    return kOk;
}

EXPORT int halResourceConfig(void) {
    TRACE();
    return kOk;
}

/* ---- copies -------------------------------------------------------------------------------- */

enum { kDescriptorWords = 16, kSdmaType = 11 };

struct submission {
    uint32_t type, scheduler, queue, timeout_ms;
    const uint32_t (*descriptors)[kDescriptorWords];
    uint32_t count, position;
};

static void* address_of(uint32_t low, uint32_t high) {
    return (void*)((uintptr_t)high << 32 | low);
}

static int carry_out(const uint32_t words[kDescriptorWords]) {
    uint32_t type = words[0] & 0x3f;
    uint32_t is_indirect = words[3] >> 24 & 1;
    uint32_t operation = words[4] & 0xff; /* 0 copies, anything else computes on the way */
    if (type != kSdmaType || is_indirect || operation != 0) {
        say("refused a descriptor of type %u (indirect %u, operation %u): only plain copies are "
            "emulated",
            type, is_indirect, operation);
        return kFailed;
    }
    memcpy(address_of(words[10], words[11]), address_of(words[8], words[9]), words[7]);
    return kOk;
}

/* A queue belongs to one thread at a time, as on the device: only its head is read by others. */
EXPORT int halSqTaskSend(uint32_t device, struct submission* submission) {
    TRACE();
    (void)device;
    if (submission->queue >= kQueues || !queues[submission->queue].taken) {
        say("halSqTaskSend: there is no queue %u", submission->queue);
        return kFailed;
    }
    struct queue* queue = &queues[submission->queue];
    submission->position = queue->head;
    for (uint32_t i = 0; i < submission->count; i++) {
        if (carry_out(submission->descriptors[i]) != kOk) return kFailed;
        __atomic_store_n(&queue->head, (queue->head + 1) % queue->depth, __ATOMIC_RELEASE);
    }
    return kOk;
}

struct queue_query {
    uint32_t type, scheduler, submission, completion, property, value;
};

EXPORT int halSqCqQuery(uint32_t device, struct queue_query* query) {
    enum { kHead = 1 };
    TRACE();
    (void)device;
    bool asks_head = query->property == kHead && query->submission < kQueues;
    query->value =
        asks_head ? __atomic_load_n(&queues[query->submission].head, __ATOMIC_ACQUIRE) : 0;
    return kOk;
}

struct reports {
    uint32_t type, scheduler, queue, timeout_ms;
    void* entries;
    uint32_t room, count;
};

EXPORT int halCqReportRecv(uint32_t device, struct reports* reports) {
    TRACE();
    (void)device;
    reports->count = 0; /* only errors are reported, and a copy that returned had none */
    return kOk;
}
