# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Progress lines, as the end-to-end tests write them."""

from tests.e2e.conftest import say

__all__ = ["say"]
