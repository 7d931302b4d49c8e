# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The only folder that imports SGLang: seams, mode checks, cache class, controller."""
