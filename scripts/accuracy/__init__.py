# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Are answers right with the cache? Repeat test (repeat), GSM8K (gsm8k), what both share."""
