# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Names that the plugin, the launcher and the messages share. Imports nothing."""

BACKEND = "ascend_direct"
FLAG = "--enable-hierarchical-cache-direct"
CONFIG_FLAG = "--hierarchical-cache-direct-config"
LINKER_MODULE = "ascend_direct.integration.cache_controller"
LINKER_CLASS = "CacheControllerDirect"
# Set for the child processes of a server that uses the cache: only these register the backend,
# which imports torch. "cli" or "engine": who asked, and so how a mistake is told.
ACTIVE_ENV = "ASCEND_DIRECT_ACTIVE"
