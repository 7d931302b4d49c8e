# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What `ascend-direct plan` computes with; plan.py owns the options and the looks.

model_shape, hardware → costs ┐
traces, synthetic → workload ─┴→ simulation (with lru, routing) → forecast → text, picture
"""
