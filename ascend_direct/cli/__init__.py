# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The `ascend-direct` command. Each file owns one group of subcommands; main.py joins them."""
