# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Build script: the native page packer. Metadata and tool settings live in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        # Loaded with ctypes. Optional: without a C++ compiler pages are not packed, all else works.
        Extension(
            "ascend_direct.store._page_packing",
            ["kernels/page_packing/pack.cpp"],
            extra_compile_args=["-std=c++17", "-O3", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
