# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Benchmarks a user can run. Each compares within one run, since machines differ and are noisy."""
