# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""Whatever a MetaService, or who sits in its place, sends: an answer or none, in bounded time."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_direct.errors import StoreUnavailable
from ascend_direct.store.meta_service import Links, MetaServiceHttp, Usage
from tests.fuzz.budget import FUZZ_SLOW

TIMEOUT_S = 0.5
# A question is asked twice at most; the rest is for a busy machine.
LONGEST_S = 2 * TIMEOUT_S + 5.0


class Server:
    """A TCP server that answers each request with the bytes it was given, whatever they are."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.answer: Iterable[bytes] = ()
        self.hang_up = True
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            connection, _ = self._socket.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while connection.recv(65536):
                    for part in self.answer:
                        connection.sendall(part)
                    if self.hang_up:
                        return
            except OSError:
                pass  # the client has left

    def close(self) -> None:
        self._over.set()
        socket.create_connection(self._socket.getsockname()).close()
        self._thread.join()
        self._socket.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def ask(url: str) -> tuple[Links | None, Usage | None, list[str] | None]:
    """All questions to a service; each must end in time, and with nothing but what is promised."""
    results = []
    client = MetaServiceHttp(url, TIMEOUT_S)
    for question in (client.links, client.usage):
        begin_s = time.monotonic()
        results.append(question())
        assert time.monotonic() - begin_s < LONGEST_S
    try:
        keys = client.keys("ad1:")
    except StoreUnavailable:
        keys = None
    client.close()
    return results[0], results[1], keys


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascend_direct.store.meta_service.LIST_TIMEOUT_S", TIMEOUT_S)


_NUMBERS = st.integers(-2, 2**70) | st.floats() | st.booleans() | st.text(max_size=3) | st.none()
_STATUS = st.builds(
    lambda a, b, c, d: {
        "mf_cluster": [
            {
                "server": {
                    "groupManager": {
                        "linkSummary": {"activeRanks": a, "connectedLinks": b, "expectedLinks": c}
                    },
                    "worldSize": d,
                }
            }
        ],
        "cpu": {"total_bytes": a, "used_bytes": b},
        "npu": {"total_bytes": c, "used_bytes": d},
    },
    _NUMBERS,
    _NUMBERS,
    _NUMBERS,
    _NUMBERS,
)
_BODIES = (
    _STATUS.map(lambda status: json.dumps(status).encode())
    | st.binary(max_size=64)
    | st.sampled_from([b"[" * 100_000, b"keys=" + b"9" * 100, b"{" * 9, b"ad1:\xff\nad1:x\n"])
)
_LINES = st.sampled_from(
    [b"HTTP/1.1 200 OK", b"HTTP/1.1 500 no", b"HTTP/9 200 x", b"HTTP/1.1 100 Continue", b"", b"\0"]
) | st.binary(max_size=12)
_LENGTHS = st.sampled_from(["{}", "-1", "9" * 30, "x", "٣", "0", "1"])
_HEADERS = st.lists(
    st.sampled_from([b"Transfer-Encoding: chunked", b"Connection: close", b"X: " + b"y" * 70_000])
    | st.binary(max_size=12),
    max_size=3,
)


@given(_LINES, _LENGTHS, _HEADERS, _BODIES, st.booleans())
@FUZZ_SLOW
def test_any_bytes_are_an_answer_or_none(
    server: Server, line: bytes, length: str, headers: list[bytes], body: bytes, hang_up: bool
) -> None:
    size = f"Content-Length: {length.format(len(body))}".encode()
    server.answer = [b"\r\n".join([line, size, *headers, b"", body])]
    # Where the client would wait for what never comes, now and then is enough: it takes its time.
    server.hang_up = hang_up or len(body) % 4 > 0
    links, usage, keys = ask(server.url)
    for counts in (links, usage):
        numbers = [n for n in vars(counts).values() if n is not None] if counts else []
        assert all(type(number) is int and number >= 0 for number in numbers)
    assert all(key.startswith("ad1:") for key in keys or ())


def _drip(line: bytes) -> Iterator[bytes]:
    yield line
    while True:
        time.sleep(TIMEOUT_S / 5)
        yield b"1"


def _flood(line: bytes, block: bytes) -> Iterator[bytes]:
    yield line
    while True:
        yield block


class _Endless:
    """Starts again for each request."""

    def __init__(self, make) -> None:
        self._make = make

    def __iter__(self) -> Iterator[bytes]:
        return self._make()


OK = b"HTTP/1.1 200 OK\r\n"
ENDLESS = {
    "a byte now and then": lambda: _drip(OK + b"Content-Length: 1000000\r\n\r\n"),
    "headers now and then": lambda: _drip(OK),
    "nothing": lambda: _drip(b""),
    "headers without end": lambda: _flood(OK, b"X: y\r\n" * 50),
    "chunks without end": lambda: _flood(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"
    ),
    "a body without end": lambda: _flood(OK + b"\r\n", b"x" * 65536),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_answer_that_never_ends_is_given_up_in_time(server: Server, name: str) -> None:
    server.answer, server.hang_up = _Endless(ENDLESS[name]), True
    links, usage, _ = ask(server.url)
    assert (links, usage) == (None, None)


def test_a_service_that_accepts_and_says_nothing_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert ask(f"http://127.0.0.1:{mute.getsockname()[1]}") == (None, None, None)
