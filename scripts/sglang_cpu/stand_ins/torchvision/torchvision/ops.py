# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Importable, not usable: boxes and masks."""

from ._placeholder import placeholders

__getattr__ = placeholders(__name__)
