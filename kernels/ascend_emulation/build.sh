#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors
# build.sh OUT - makes OUT look like an Ascend installation to memcache_hybrid.
# Needs a C compiler only ($CC, else cc). Does nothing when OUT is up to date; several may run at
# once, because each file appears in one step and the stamp last.
set -eu

[ $# -eq 1 ] || { echo "usage: build.sh OUT" >&2; exit 64; }
here=$(cd "$(dirname "$0")" && pwd)
cc=${CC:-cc}
command -v "$cc" >/dev/null || {
    echo "build.sh: no C compiler '$cc': install gcc or clang, or set CC" >&2
    exit 69
}
mkdir -p "$1/lib64" "$1/driver"
out=$(cd "$1" && pwd)

stamp=$({ echo "$out"; "$cc" --version; cat "$here"/*.c "$here"/*.h "$here/build.sh"; } | cksum)
if [ -f "$out/stamp" ] && [ "$(cat "$out/stamp")" = "$stamp" ]; then
    exit 0
fi

work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
flags="-std=gnu11 -O2 -g -Wall -Wextra -shared -fPIC -fvisibility=hidden -pthread"
# paths.c defines functions that headers declare "never NULL", and that hardened headers redefine.
flags="$flags -fno-delete-null-pointer-checks -U_FORTIFY_SOURCE"

# library NAME ARGUMENTS...: compiles lib64/libNAME.so. It stays loaded until the process ends, so
# that each process announces the emulation once.
library() {
    name=$1
    shift
    # shellcheck disable=SC2086
    "$cc" $flags -o "$work/lib$name.so" "-Wl,-soname,lib$name.so" -Wl,-z,nodelete "$@"
}

cd "$here"
library ascendcl guard.c runtime.c memory.c sdma.c needs_hardware.c
library ascend_paths guard.c paths.c -ldl
# The symbols are looked up in five libraries. dlsym() also searches what a library depends on, so
# four of them are empty shells around the first.
for name in ascend_hal ra tsdclient hcomm; do
    library "$name" -x c /dev/null -x none -Wl,--no-as-needed "-L$work" -lascendcl \
        '-Wl,-rpath,$ORIGIN'
done
for built in "$work"/lib*.so; do
    mv -f "$built" "$out/lib64/"
done

# The library compares this version with the oldest driver that it supports.
echo "Innerversion=V100R001C23SPC005B219" >"$work/version.info"
mv -f "$work/version.info" "$out/driver/version.info"
echo "Driver_Install_Path_Param=$out" >"$work/ascend_install.info"
mv -f "$work/ascend_install.info" "$out/ascend_install.info"
echo "$stamp" >"$work/stamp"
mv -f "$work/stamp" "$out/stamp"
