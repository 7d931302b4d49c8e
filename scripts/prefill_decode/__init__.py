# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Prefill and decode nodes behind SGLang's router: bring-up (nodes), conversations, report."""
