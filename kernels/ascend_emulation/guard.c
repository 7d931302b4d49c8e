/* SPDX-License-Identifier: Apache-2.0 */
/* SPDX-FileCopyrightText: The ascend_direct authors */
/*
 * guard.c owns the promise that the emulation is never mistaken for an NPU: it decides whether a
 * process may run on it, and owns how the emulation speaks. It emulates nothing.
 *
 * It is linked into both libraries, the path shim and the driver, because either could reach a
 * production process alone, through a forgotten LD_PRELOAD or a forgotten ASCEND_HOME_PATH.
 */
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sysexits.h>
#include <unistd.h>

#include "emulation.h"

enum { kMessageBytes = 1024 };

/* Nothing is left to be told when stderr itself fails, so an error only ends the message. */
static void write_all(const char* text, size_t length) {
    while (length > 0) {
        ssize_t written = write(STDERR_FILENO, text, length);
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return;
        text += written;
        length -= (size_t)written;
    }
}

void say(const char* format, ...) {
    char line[kMessageBytes];
    int saved_errno = errno;
    int used = snprintf(line, sizeof line, "ASCEND EMULATION: pid %d: ", (int)getpid());
    va_list arguments;
    va_start(arguments, format);
    int more = vsnprintf(line + used, sizeof line - (size_t)used - 1, format, arguments);
    va_end(arguments);
    if (more < 0) return;
    size_t length = strlen(line);
    line[length] = '\n';
    write_all(line, length + 1);
    errno = saved_errno;
}

int fail_with_errno(const char* what, const char* subject) {
    say("%s %s: %s", what, subject, strerror(errno));
    return kFailed;
}

bool switched_on(const char* variable) {
    const char* value = getenv(variable);
    return value != NULL && value[0] != '\0' && strcmp(value, "0") != 0;
}

void trace_call(const char* function) {
    static int on = -1; /* threads that race here find the same answer */
    if (on < 0) on = switched_on("ASCEND_EMULATION_TRACE");
    if (on) say("%s()", function);
}

const char* run_directory(void) {
    const char* directory = getenv("ASCEND_EMULATION_RUN_DIR");
    return directory != NULL && directory[0] != '\0' ? directory : NULL;
}

static bool present(const char* root, const char* path, char found[PATH_MAX]) {
    int length = snprintf(found, PATH_MAX, "%s%s", root, path);
    return length > 0 && length < PATH_MAX && access(found, F_OK) == 0;
}

static bool has_device_node(const char* root, char found[PATH_MAX]) {
    if (!present(root, "/dev", found)) return false;
    DIR* directory = opendir(found);
    if (directory == NULL) return false;
    bool seen = false;
    const struct dirent* entry;
    while (!seen && (entry = readdir(directory)) != NULL) {
        seen = strncmp(entry->d_name, "davinci", strlen("davinci")) == 0;
        if (seen) (void)snprintf(found, PATH_MAX, "%.1024s/dev/%s", root, entry->d_name);
    }
    if (closedir(directory) != 0) say("closing %s/dev: %s", root, strerror(errno));
    return seen;
}

static bool has_driver(const char* root, char found[PATH_MAX]) {
    return has_device_node(root, found) ||
           present(root, "/usr/local/Ascend/driver/version.info", found) ||
           present(root, "/etc/ascend_install.info", found);
}

static void refuse(const char* reason, const char* evidence, const char* advice) {
    say("refused: %s (%s). %s", reason, evidence, advice);
    _exit(EX_CONFIG);
}

void refuse_unless_allowed(void) {
    if (!switched_on("ASCEND_EMULATION"))
        refuse("this is a stand-in for the Ascend driver", "ASCEND_EMULATION=1 is not set",
               "Remove its directory from LD_PRELOAD, LD_LIBRARY_PATH and ASCEND_HOME_PATH, or "
               "start the process with scripts/ascend_emulation.py");
    /* A second root can only add places to look at: a test can invent a driver, never hide one. */
    const char* extra_root = getenv("ASCEND_EMULATION_DRIVER_ROOT");
    char found[PATH_MAX];
    if (has_driver("", found) || (extra_root != NULL && has_driver(extra_root, found)))
        refuse("this machine has an Ascend driver", found, "Run without the emulation");
    if (run_directory() == NULL)
        refuse("there is no run directory", "ASCEND_EMULATION_RUN_DIR is not set",
               "Start the process with scripts/ascend_emulation.py");
}
