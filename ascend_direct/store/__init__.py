# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Page stores: one protocol (base), one file per backend. Imports nothing."""
