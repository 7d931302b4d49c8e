# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Page keys: `ad1:{namespace}:{rank part}:{page hash}`.

Owns the key's form and the namespace: a digest over everything that changes a page's bytes and that
the page hash does not know (SGLang hashes tokens only). Does not decide which facts those are:
model_identity, page_layout and the factory name them. Pure.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ascend_direct.errors import DirectError

# Version of key and framing. Raise it when either changes: old pages then become misses.
KEY_VERSION = "ad1"
# Rank part where all ranks hold the same bytes.
REPLICATED = "-"

# What a namespace field may be; nesting is free.
FieldValue = None | bool | int | str | Sequence["FieldValue"] | Mapping[str, "FieldValue"]

# ":" is the separator, so no part may hold one. 200 leaves room for the rest below 256 bytes.
_PAGE_HASH = re.compile(r"[0-9A-Za-z_.\-]{1,200}")
_NAMESPACE = re.compile(r"[0-9a-f]{16}")
_RANK_PART = re.compile(r"-|r[0-9]{1,5}of[0-9]{1,5}|h[0-9]{1,5}-[0-9]{1,5}")


@dataclass(frozen=True)
class Namespace:
    """Everything that changes a page's bytes, besides the tokens before it.

    Two namespaces share pages when, and only when, their fields are equal: names, values and the
    types of the values.

    Attributes:
        fields: name → value; groups are nested mappings.
    """

    fields: Mapping[str, FieldValue]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over version and fields, in hexadecimal."""
        return hashlib.sha256(_frame([KEY_VERSION, self.fields])).hexdigest()

    @property
    def digest16(self) -> str:
        """The part of the digest that keys carry: 64 bits."""
        return self.digest[:16]


def rank_part(rank: int, size: int, replicated: bool) -> str:
    """Rank part of an attention-TP rank: its own where heads are split, else `REPLICATED`.

    Raises:
        DirectError: no such rank.
    """
    if not 0 <= rank < size:
        raise DirectError(f"no rank {rank} among {size}")
    return REPLICATED if replicated else f"r{rank}of{size}"


def head_part(first: int, last: int) -> str:
    """Rank part of KV heads `first` … `last`, both included, whatever the TP size.

    Raises:
        DirectError: not a range.
    """
    if not 0 <= first <= last:
        raise DirectError(f"no head range {first} … {last}")
    return f"h{first}-{last}"


class PageKeys:
    """Keys of the objects that one rank's pages are stored as.

    Args:
        namespace_digest: `Namespace.digest16`.
        rank_parts: which share of a page each object holds; see `rank_part` and `head_part`.

    Raises:
        DirectError: a part is malformed.
    """

    def __init__(self, namespace_digest: str, *rank_parts: str) -> None:
        if not _NAMESPACE.fullmatch(namespace_digest):
            raise DirectError(f"{namespace_digest!r} is not 16 hexadecimal digits")
        for part in rank_parts:
            if not _RANK_PART.fullmatch(part):
                raise DirectError(f"{part!r} is not a rank part such as '-', 'r0of2' or 'h0-3'")
        self.prefixes = tuple(
            f"{KEY_VERSION}:{namespace_digest}:{part}:" for part in rank_parts or (REPLICATED,)
        )

    @property
    def per_page(self) -> int:
        """Objects, and so keys, of one page."""
        return len(self.prefixes)

    def key(self, page_hash: str) -> str:
        """The key of a page that is one object.

        Raises:
            DirectError: the hash would break the key's form.
        """
        (key,) = self.keys((page_hash,))
        return key

    def keys(self, page_hashes: Sequence[str]) -> list[str]:
        """The keys of many pages, page by page.

        Raises:
            DirectError: a hash would break the key's form.
        """
        prefixes, valid = self.prefixes, _PAGE_HASH.fullmatch
        for page_hash in page_hashes:
            if not valid(page_hash):
                raise DirectError(f"not a page hash: {page_hash!r}")
        return [prefix + page_hash for page_hash in page_hashes for prefix in prefixes]


def _frame(value: FieldValue) -> bytes:
    """Encode so that different values never give the same bytes: type, length, content."""
    if value is None:
        kind, body = b"n", b""
    elif isinstance(value, bool):  # before int, which bool is a kind of
        kind, body = b"b", b"1" if value else b"0"
    elif isinstance(value, int):
        kind, body = b"i", b"%d" % value
    elif isinstance(value, str):
        kind, body = b"s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise DirectError(f"namespace field names must be text: {list(value)}")
        kind = b"m"
        body = b"".join(_frame(name) + _frame(value[name]) for name in sorted(value))
    elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        kind, body = b"l", b"".join(_frame(item) for item in value)
    else:
        raise DirectError(f"a namespace field cannot be a {type(value).__name__}: {value!r}")
    return b"%s%d:%s" % (kind, len(body), body)
