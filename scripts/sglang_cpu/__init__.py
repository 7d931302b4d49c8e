# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The recipe that runs the real SGLang 0.5.23 on a CPU, for demos and tests.

Owns the environment (`install`), the local models (`models`) and the server processes (`server`).
Knows nothing of `ascend_direct`: a server gets the flags its caller passes.
"""
