# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""`ascend-direct plan` against two real servers: costs (calibrate), a trace (replay), compare."""
