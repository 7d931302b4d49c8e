# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Two SGLang servers that share one pool: bring-up (cluster), measurement (run), report."""
