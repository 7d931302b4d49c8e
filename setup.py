# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Build script; metadata and tool settings live in pyproject.toml."""

from setuptools import setup

setup()
