# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Requests and the prefixes they share: a trace's lines, checked, in pages.

Owns the format (that of Mooncake's published traces) and what is said about wrong lines. A line is
    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}
where each id stands for `block_tokens` tokens and all before them: equal ids, equal prefixes.
`answer_hash_ids`, which is ours, may list the blocks from the prompt's first incomplete one to the
end of the answer; without it an answer's pages are not counted as reusable.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ascend_direct.errors import ConfigError

MOST_REASONS = 10
# Published traces round timestamps to some seconds; requests of one tick did not come at once.
LONGEST_TICK_S = 10.0


class Request(NamedTuple):
    """A prompt in units, each a run of whole pages.

    Attributes:
        units: names of the prompt's units; a unit's name stands for all before it too.
        last_tokens: tokens in the last unit; all others have the trace's `unit_tokens`.
        answer_units: those that are complete once the answer is.
    """

    arrival_s: float
    prompt_tokens: int
    answer_tokens: int
    units: tuple[int, ...]
    last_tokens: int
    answer_units: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        shared_units: those that copies of the trace have in common, such as system prompts.
        notes: what was made of the file that its reader should know.
    """

    name: str
    requests: Sequence[Request]
    unit_tokens: int
    page_tokens: int
    shared_units: frozenset[int] = frozenset()
    notes: tuple[str, ...] = field(default=())

    @property
    def span_s(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(request.prompt_tokens for request in self.requests)

    def prompt_quantile(self, share: float) -> int:
        """Length of a prompt."""
        ordered = sorted(request.prompt_tokens for request in self.requests)
        return ordered[int(share * (len(ordered) - 1))]


def read_trace(path: Path, block_tokens: int, page_tokens: int, in_seconds: bool) -> Trace:
    """A trace from a file of JSON lines.

    Raises:
        ConfigError: the file cannot be read, or lines are wrong; each of the first is named.
    """
    if block_tokens % page_tokens and page_tokens % block_tokens:
        sizes = f"--block-tokens {block_tokens} and --page-size {page_tokens}"
        raise ConfigError([f"{sizes}: one must divide the other."])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError([f"--trace {path}: {error}; give a file of JSON lines."]) from None
    reasons: list[str] = []
    requests: list[Request] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            requests.append(_request(json.loads(line), block_tokens, page_tokens, in_seconds))
        except (ValueError, RecursionError) as error:
            reasons.append(f"--trace {path}, line {number}: {error}.")
    if len(reasons) > MOST_REASONS:
        more = len(reasons) - MOST_REASONS
        reasons[MOST_REASONS:] = [f"--trace {path}: {more} more lines are wrong."]
    if not reasons and not requests:
        reasons.append(f"--trace {path}: there is no request in it.")
    if reasons:
        raise ConfigError(reasons)
    requests.sort(key=lambda request: request.arrival_s)
    spread, moved = _spread(requests)
    notes = [f"{moved} requests shared a timestamp: spread up to the next one"] if moved else []
    return Trace(path.name, spread, max(block_tokens, page_tokens), page_tokens, notes=tuple(notes))


def _request(line: Any, block_tokens: int, page_tokens: int, in_seconds: bool) -> Request:
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    prompt, answer = _number(line, "input_length", 1), _number(line, "output_length", 0)
    arrival = line.get("timestamp")
    if not isinstance(arrival, int | float) or isinstance(arrival, bool) or not 0 <= arrival < 1e15:
        raise ValueError(f"timestamp is {arrival!r}, not a number of 0 or more")
    ids = _ids(line, "hash_ids")
    most = -(-prompt // block_tokens)
    if len(ids) not in (prompt // block_tokens, most):
        raise ValueError(
            f"{len(ids)} hash_ids for input_length {prompt}: with blocks of {block_tokens} tokens "
            f"there are {most} (--block-tokens)"
        )
    units, last_tokens = _units(ids, prompt, block_tokens, page_tokens)
    whole = units if last_tokens == max(block_tokens, page_tokens) else units[:-1]
    later = ids[: prompt // block_tokens] + _ids(line, "answer_hash_ids", ())
    complete = min(len(later), (prompt + answer) // block_tokens) * block_tokens
    after, _ = _units(later, complete, block_tokens, page_tokens)
    return Request(
        arrival if in_seconds else arrival / 1e3,
        prompt,
        answer,
        units,
        last_tokens,
        after[len(whole) :],
    )


def _number(line: dict[str, Any], name: str, least: int) -> int:
    value = line.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
        raise ValueError(f"{name} is {value!r}, not a whole number of {least} or more")
    return value


def _ids(
    line: dict[str, Any], name: str, default: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    ids = line.get(name, default)
    if not isinstance(ids, list | tuple) or not all(type(i) is int for i in ids):
        raise ValueError(f"{name} is not a list of whole numbers")
    return tuple(ids)


def _units(
    ids: tuple[int, ...], tokens: int, block_tokens: int, page_tokens: int
) -> tuple[tuple[int, ...], int]:
    """Blocks as runs of whole pages: (names, tokens of the last)."""
    if page_tokens > block_tokens:  # the last block of a page stands for the page
        blocks = page_tokens // block_tokens
        names = ids[blocks - 1 :: blocks][: tokens // page_tokens]
        return names, page_tokens
    tokens = min(tokens, len(ids) * block_tokens)
    rest = tokens % block_tokens // page_tokens * page_tokens
    whole = tokens // block_tokens
    return (ids[: whole + 1], rest) if rest else (ids[:whole], block_tokens)


def _spread(requests: Sequence[Request]) -> tuple[list[Request], int]:
    """Requests of one timestamp evenly up to the next one, if that is near; how many moved."""
    spread: list[Request] = []
    moved, first = 0, 0
    while first < len(requests):
        last = first
        at_s = requests[first].arrival_s
        while last < len(requests) and requests[last].arrival_s == at_s:
            last += 1
        tick_s = requests[last].arrival_s - at_s if last < len(requests) else 0.0
        step_s = tick_s / (last - first) if 0 < tick_s <= LONGEST_TICK_S else 0.0
        for place, request in enumerate(requests[first:last]):
            spread.append(request._replace(arrival_s=at_s + place * step_s))
        moved += last - first if step_s and last - first > 1 else 0
        first = last
    return spread, moved


def copies(trace: Trace, count: int, most_requests: int) -> Trace:
    """The traffic of `count` fleets like the trace's, as long as `most_requests` allow.

    Each copy begins at another place of the trace and goes round; what it asks is its own but for
    `shared_units`. All copies together begin at 0.
    """
    if count == 1 or not trace.requests:
        return trace
    size = len(trace.requests)
    each = max(1, min(size, most_requests // count))
    start_s, period_s = trace.requests[0].arrival_s, trace.span_s * (1 + 1 / size)
    made: list[Request] = []
    for copy in range(count):
        first = copy * size // count
        zero_s = trace.requests[first].arrival_s
        for place in range(first, first + each):
            request = trace.requests[place % size]
            round_s = period_s * (place // size)
            made.append(
                request._replace(
                    arrival_s=start_s + request.arrival_s - zero_s + round_s,
                    units=_renamed(request.units, trace.shared_units, count, copy),
                    answer_units=_renamed(request.answer_units, trace.shared_units, count, copy),
                )
            )
    # The copies' windows differ in length; after the shortest the rate would fall.
    end_s = min(made[(copy + 1) * each - 1].arrival_s for copy in range(count))
    kept = sorted((r for r in made if r.arrival_s <= end_s), key=lambda r: r.arrival_s)
    return Trace(
        trace.name, kept, trace.unit_tokens, trace.page_tokens, trace.shared_units, trace.notes
    )


def _renamed(
    units: Iterable[int], shared: frozenset[int], count: int, copy: int
) -> tuple[int, ...]:
    return tuple((unit * count if unit in shared else unit * count + copy) for unit in units)
