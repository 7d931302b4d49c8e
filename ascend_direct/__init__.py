# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Link SGLang's device KV cache on Ascend NPUs directly with a shared MemCache pool."""

from ascend_direct.plugin import engine_args

__all__ = ["__version__", "engine_args"]
__version__ = "0.1.0"
