/* SPDX-License-Identifier: Apache-2.0 */
/* SPDX-FileCopyrightText: The ascend_direct authors */
/*
 * What the files of the emulation share: results, messages, switches, the run directory and the
 * guard. Declares no driver function: each of those is defined by the file that owns its idea.
 */
#ifndef ASCEND_EMULATION_EMULATION_H_
#define ASCEND_EMULATION_EMULATION_H_

#include <stdbool.h>

/* Everything else is hidden, so that two libraries can hold a copy of the shared code. */
#define EXPORT __attribute__((visibility("default")))

enum {
    kOk = 0,
    kFailed = 0x7ffe,        /* the emulation could not do it: a message says why */
    kNeedsHardware = 0x7fff, /* only an NPU could do it */
};

/* One line on stderr, "ASCEND EMULATION: ...", written at once so that processes do not mix. */
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));

/* say() plus the reason in errno; returns kFailed so that callers end with one statement. */
int fail_with_errno(const char* what, const char* subject);

/* True when the variable is set to something other than "" and "0". */
bool switched_on(const char* variable);

/* With ASCEND_EMULATION_TRACE=1 one line per driver call. */
void trace_call(const char* function);
#define TRACE() trace_call(__func__)

/* ASCEND_EMULATION_RUN_DIR: the members of one pool share it, pools side by side do not. */
const char* run_directory(void);

/*
 * Ends the process unless ASCEND_EMULATION=1 is set, a run directory is named and the machine
 * shows no trace of an Ascend driver.
 */
void refuse_unless_allowed(void);

#endif /* ASCEND_EMULATION_EMULATION_H_ */
