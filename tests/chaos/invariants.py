# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""What must hold whatever the pool does, apart from right answers: no leak, no stall, no alarm.

Owns the measurements and the bounds. Tokens and failed requests are traffic's; everything here
reads processes and logs from outside, except stalls, which stall_probe measures in the schedulers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sglang_cpu.server import SGLangServer

from tests.e2e.farm import ALARM, used_at_rest

# A call to a MetaService that is killed returns after 60 s, and what it read or wrote is withheld
# until then; one behind it may meet the same.
REST_TIMEOUT_S = 150.0
# Beyond its deadline a wait also needs the scheduler to be woken; on two cores that six processes
# fight for, that is not at once.
STALL_MARGIN_S = 0.5
# Threads and sockets that come with use and stay: SGLang's executors, MemCache's channels.
THREAD_ALLOWANCE = 4
FD_ALLOWANCE = 12
# A flush waits for native calls under way by design, and says so in the log.
UNBOUNDED = ("reset",)
INJECTED = "injected by a test"
STATUS = re.compile(r"ascend_direct: (pool: .*)$")
LINKED = "ascend_direct: rank"


@dataclass(frozen=True)
class Resources:
    """Threads and file descriptors of a server, by its processes' titles."""

    threads: dict[str, int]
    fds: dict[str, int]

    @classmethod
    def of(cls, server: SGLangServer) -> Resources:
        threads, fds = dict[str, int](), dict[str, int]()
        for number, process in enumerate(server.processes()):
            with_title = " ".join(process.cmdline()[:1]) or process.name()
            title = f"{number} {with_title.rsplit('/', 1)[-1]}"
            threads[title], fds[title] = process.num_threads(), process.num_fds()
        return cls(threads, fds)

    def grown(self, base: Resources) -> list[str]:
        """What is more than it was, by more than what comes with use."""
        found = []
        for what, mine, theirs, allowance in (
            ("threads", self.threads, base.threads, THREAD_ALLOWANCE),
            ("fds", self.fds, base.fds, FD_ALLOWANCE),
        ):
            more = sum(mine.values()) - sum(theirs.values())
            if more > allowance:
                found.append(f"{what} {theirs} → {mine}")
        return found


class AtRest:
    """Checks of servers that nobody asks: slots, threads, descriptors, logs."""

    def __init__(self, servers: Mapping[str, SGLangServer]) -> None:
        self._servers = servers
        self._base: dict[str, Resources] = {}
        self._log_from = dict.fromkeys(servers, 0)
        self.resources: list[dict[str, dict[str, int]]] = []

    def begin(self) -> None:
        """What is there now is what has to be there in the end; waits for rest."""
        for server in self._servers.values():
            used_at_rest(server, REST_TIMEOUT_S)
        self._base = {n: Resources.of(s) for n, s in self._servers.items()}
        self._note()

    def problems(self) -> list[str]:
        """Everything that leaks or was logged as wrong since the last call; waits for rest."""
        found = []
        for name, server in self._servers.items():
            stuck = used_at_rest(server, REST_TIMEOUT_S)
            if stuck:
                found.append(f"{name}: {stuck} tokens are still pinned or withheld")
                continue
            server.flush()
            used_at_rest(server, REST_TIMEOUT_S)
            found += [f"{name}: {g}" for g in Resources.of(server).grown(self._base[name])]
            found += [f"{name}: {line}" for line in self._alarms(name, server)]
        self._note()
        return found

    def _note(self) -> None:
        totals = {}
        for name, server in self._servers.items():
            now = Resources.of(server)
            totals[name] = {"threads": sum(now.threads.values()), "fds": sum(now.fds.values())}
        self.resources.append(totals)

    def _alarms(self, name: str, server: SGLangServer) -> list[str]:
        with server.log_path.open("rb") as log:
            log.seek(self._log_from[name])
            text = log.read()
        self._log_from[name] += len(text)
        return alarms(text.decode(errors="replace").splitlines())


def alarms(lines: Sequence[str]) -> list[str]:
    """Lines that no healthy server writes; tracebacks of exceptions that we threw are none."""
    found = []
    for number, line in enumerate(lines):
        if not ALARM.search(line):
            continue
        after = (text for text in lines[number + 1 :] if not text.startswith((" ", "\t")))
        cause = next(after, "")
        if not ("Traceback" in line and INJECTED in cause):
            found.append(f"{line} … {cause}"[:300])
    return found


@dataclass
class Stalls:
    """Time that the schedulers spent in the plugin's hands, by call."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    too_long: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, lines: Iterable[str], lookup_timeout_s: float, load_timeout_s: float) -> Stalls:
        """From stall_probe's lines; what the probe itself came late is the machine's fault."""
        stalls = cls()
        for line in lines:
            call, stall, late = line.split()
            own_s = max(0.0, float(stall) - float(late))
            stalls.seconds[call].append(own_s)
            limit_s = lookup_timeout_s if call == "lookup" else load_timeout_s
            if call not in UNBOUNDED and own_s > limit_s + STALL_MARGIN_S:
                stalls.too_long.append(
                    f"the scheduler stood still for {own_s:.2f} s in {call}, at most "
                    f"{limit_s:g} s are configured (seen {stall} s, the probe late by {late} s)"
                )
        return stalls


def plugin_totals(server: SGLangServer) -> list[str]:
    """The last status line of each process that this server has had."""
    last: list[str] = []
    for line in server.log_path.read_text(errors="replace").splitlines():
        if LINKED in line:
            last.append("no status line")
        status = STATUS.search(line)
        if status and last:
            last[-1] = status[1]
    return last
