# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The smoke test of scripts/npu_smoke: on NPUs, or the same steps emulated on a CPU."""
