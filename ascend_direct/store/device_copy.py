# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Reading pages in Ascend device memory from the host, for `verify`.

Owns one call of the Ascend runtime, which MemCache loads too; the counterpart of host_copy.
"""

from __future__ import annotations

import ctypes

from ascend_direct.errors import ConfigError, StoreUnavailable
from ascend_direct.store.base import PageBatch

_LIBRARY = "libascendcl.so"
_DEVICE_TO_HOST = 2  # aclrtMemcpyKind ACL_MEMCPY_DEVICE_TO_HOST


class DeviceReader:
    """Copies spans of device memory into host buffers, one after the other.

    Args:
        device_id: made current for the threads that read.

    Raises:
        ConfigError: the Ascend runtime cannot be loaded.
    """

    def __init__(self, device_id: int) -> None:
        self._device_id = device_id
        try:
            library = ctypes.CDLL(_LIBRARY)
            self._set_device, self._copy = library.aclrtSetDevice, library.aclrtMemcpy
        except (OSError, AttributeError) as error:
            raise ConfigError(
                [f"verify cannot read this device's memory ({error}): set it to off."]
            ) from error
        address, size = ctypes.c_void_p, ctypes.c_size_t
        self._copy.argtypes = (address, size, address, size, ctypes.c_int)

    def gather(self, pages: PageBatch, row: int, target: bytearray) -> None:
        """Fill `target`, as large as a page, from the spans of page `row`.

        Raises:
            StoreUnavailable: the runtime refused a copy.
        """
        code = self._set_device(self._device_id)
        base = ctypes.addressof(ctypes.c_char.from_buffer(target))
        for address, length in zip(pages.addresses[row].tolist(), pages.lengths_bytes, strict=True):
            code = code or self._copy(base, length, address, length, _DEVICE_TO_HOST)
            base += length
        if code:
            raise StoreUnavailable("verify", "a page cannot be copied to the host", int(code))
