# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The unmodified memcache_hybrid wheel on the driver emulation: real services, real processes.

Evidence rung E2. What holds here holds for the wheel's own code; nothing here is an NPU result.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kernels.pool_member import (
    FRAGMENT_BYTES,
    G2H,
    G2L,
    H2G,
    L2G,
    SLOTS,
    Member,
    Pool,
    digest,
    page_bytes,
)

import ascend_emulation  # isort: skip  (pool_member puts scripts/ on the path)
import memcache_pool  # isort: skip

NO_SUCH_KEY, OTHER_SIZE, INVALID, WRONG_MEMORY = -3007, -3012, -3000, -2

pytestmark = [
    pytest.mark.memcache,
    pytest.mark.multi,
    pytest.mark.skipif(
        ascend_emulation.real_driver_present() is not None,
        reason="the emulation refuses to start where an Ascend driver is present",
    ),
]


@pytest.fixture(scope="module")
def tree() -> Path:
    return ascend_emulation.build()


@pytest.fixture(scope="module")
def host_pool() -> Iterator[Pool]:
    with Pool(2, "host_shm") as pool:
        yield pool


def load_driver(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Load the driver library in a fresh process, without the shim that guards the way to it."""
    environment = {**os.environ, **variables}
    library = f"{environment['ASCEND_HOME_PATH']}/lib64/libascendcl.so"
    return subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({library!r}); print('loaded')"],
        env={name: value for name, value in environment.items() if name != "LD_PRELOAD"},
        capture_output=True,
        text=True,
        check=False,
    )


def assert_announced_once(member: Member) -> None:
    """And nothing else was said: no call reached a function that needs hardware."""
    log = member.log_file.read_text(errors="replace")
    said = [line for line in log.splitlines() if line.startswith("ASCEND EMULATION:")]
    assert len(said) == 1, said
    assert "not an NPU" in said[0]


# ---- pools -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "memories"),
    [
        ("host_shm", {"cpu": (H2G, G2H), "device": (L2G, G2L)}),
        ("host_tcp", {"cpu": (H2G, G2H), "device": (L2G, G2L)}),
        ("device_sdma", {"cpu": (L2G, G2L), "device": (L2G, G2L)}),
    ],
)
def test_three_members_announce_themselves_and_read_each_others_pages_bit_for_bit(
    protocol: str, memories: dict[str, tuple[int, int]]
) -> None:
    pages = SLOTS // 2
    put_slots, get_slots = list(range(pages)), [(7 * i + 5) % SLOTS for i in range(pages)]
    with Pool(3, protocol) as pool:
        for memory, (put, get) in memories.items():
            for writer_number, writer in enumerate(pool.members):
                keys = [f"{memory}/{writer_number}/{page}" for page in range(pages)]
                seed = 1000 * writer_number
                stored = writer.call("put", keys, seed, put_slots, direction=put, memory=memory)
                assert stored == [0] * pages
                expected = [digest(page_bytes(seed + page)) for page in range(pages)]
                for reader in pool.members:
                    assert reader.call("exists", [*keys, "absent"]) == [1] * pages + [0]
                    loaded = reader.call("get", keys, get_slots, direction=get, memory=memory)
                    assert loaded == ([0] * pages, expected, True)
        for member in pool.members:
            assert_announced_once(member)
        assert len(pool.meta.keys()) == 3 * pages * len(memories)
        assert pool.meta.capacity()["cpu"]["used_bytes"] > 0


def test_two_pools_side_by_side_do_not_see_each_other() -> None:
    with ExitStack() as stack:
        pools = [stack.enter_context(Pool(2, "host_shm")) for _ in range(2)]
        for seed, pool in enumerate(pools):
            own = ["same", f"only-{seed}"]
            put = pool.members[0].call("put", own, seed, [0, 1], direction=H2G, memory="cpu")
            assert put == [0, 0]
        for seed, pool in enumerate(pools):
            loaded = pool.members[1].call("get", ["same"], [4], direction=G2H, memory="cpu")
            assert loaded == ([0], [digest(page_bytes(seed))], True)
            assert pool.meta.keys() == [f"only-{seed}", "same"]


def test_a_put_of_a_stored_key_reports_success_and_keeps_the_first_value(host_pool: Pool) -> None:
    first, second = host_pool.members
    assert first.call("put", ["twice"], 1, [0], direction=H2G, memory="cpu") == [0]
    assert second.call("put", ["twice"], 2, [0], direction=H2G, memory="cpu") == [0]
    loaded = second.call("get", ["twice"], [3], direction=G2H, memory="cpu")
    assert loaded == ([0], [digest(page_bytes(1))], True)


def test_a_missing_key_fails_alone_and_leaves_its_slot_alone(host_pool: Pool) -> None:
    first, second = host_pool.members
    assert first.call("put", ["here"], 5, [0], direction=H2G, memory="cpu") == [0]
    codes, digests, others_untouched = second.call(
        "get", ["here", "not here"], [2, 1], direction=G2H, memory="cpu"
    )
    assert codes == [0, NO_SUCH_KEY]
    assert digests[0] == digest(page_bytes(5))
    assert digests[1] == digest(page_bytes(0) * 0 + 0xA5)
    assert others_untouched


def test_a_get_of_another_size_than_was_stored_is_refused(host_pool: Pool) -> None:
    first, second = host_pool.members
    assert first.call("put", ["sized"], 5, [0], direction=H2G, memory="cpu") == [0]
    half = FRAGMENT_BYTES // 2
    assert second.call("get_bytes", "sized", half, direction=G2H, memory="cpu") == [OTHER_SIZE]


def test_the_direction_must_fit_the_kind_of_memory(host_pool: Pool) -> None:
    member = host_pool.members[0]
    for memory, wrong in (("cpu", L2G), ("device", H2G)):
        codes = member.call("put", ["wrong"], 1, [0], direction=wrong, memory=memory)
        assert codes == [WRONG_MEMORY], memory
    assert member.call("put", ["wrong"], 1, [0], direction=4, memory="cpu") == [INVALID]
    assert member.call("exists", ["wrong"]) == [0]


def test_under_device_sdma_cpu_memory_counts_as_device_memory_only() -> None:
    with Pool(1, "device_sdma") as pool:
        [member] = pool.members
        assert member.call("put", ["k"], 1, [0], direction=H2G, memory="cpu") == [WRONG_MEMORY]
        assert member.call("put", ["k"], 1, [0], direction=L2G, memory="cpu") == [0]
        codes, _, _ = member.call("get", ["k"], [1], direction=G2H, memory="cpu")
        assert codes == [WRONG_MEMORY]


def test_a_protocol_that_needs_hardware_fails_and_says_at_which_call(tree: Path) -> None:
    with pytest.raises(ascend_emulation.EmulationError, match=r"device_rdma.*is not emulated"):
        ascend_emulation.environment(tree, Path("."), protocol="device_rdma")
    with memcache_pool.MetaServiceProcess(protocol="device_sdma", stop_grace_s=0.2) as meta:
        member = Member("member", meta)
        try:
            urls = meta.meta_service_url, meta.config_store_url
            assert member.call("join", "device_rdma", *urls, *memcache_pool.free_ports(1)) == (
                0,
                -1,
            )
            assert "RaRdevGetHandle() needs an NPU" in member.log_file.read_text()
        finally:
            member.end()


NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
READ_ANYTHING = [f"--{set}-caps=-all,+dac_read_search" for set in ("inh", "ambient")]
PROBE = (
    "import subprocess, sys, memcache_hybrid as _; subprocess.check_call([sys.executable, '-V'])"
)


def as_nobody() -> list[str]:
    """How to run this Python as a user who can read it and do nothing else."""
    for prefix in (NOBODY, [*NOBODY, *READ_ANYTHING]):
        command = [*prefix, sys.executable, "-B"]
        if (
            subprocess.run([*command, "-c", PROBE], capture_output=True, check=False).returncode
            == 0
        ):
            return command
    pytest.skip("an unprivileged user cannot read this Python installation")


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run without root here")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv to drop root with")
@pytest.mark.parametrize("protocol", ascend_emulation.PROTOCOLS)
def test_no_root_is_needed(tree: Path, protocol: str) -> None:
    member = Path(__file__).with_name("pool_member.py")
    done = subprocess.run(
        [*as_nobody(), str(member), "round_trip", protocol],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- the guard -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trace",
    ["dev/davinci0", "dev/davinci_manager", "usr/local/Ascend/driver/version.info",
     "etc/ascend_install.info"],
)  # fmt: skip
def test_it_refuses_where_a_driver_is_present(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trace: str
) -> None:
    variables = ascend_emulation.environment(tree, tmp_path, protocol="host_shm")
    (tmp_path / trace).parent.mkdir(parents=True)
    (tmp_path / trace).touch()
    monkeypatch.setenv("ASCEND_EMULATION_DRIVER_ROOT", str(tmp_path))
    refused = load_driver(variables)
    assert refused.returncode == os.EX_CONFIG
    assert "loaded" not in refused.stdout
    assert f"refused: this machine has an Ascend driver ({tmp_path / trace})" in refused.stderr
    assert ascend_emulation.real_driver_present() == str(tmp_path / trace)
    with pytest.raises(ascend_emulation.EmulationError, match="run without the emulation"):
        ascend_emulation.build()
    with pytest.raises(ascend_emulation.EmulationError, match="run without the emulation"):
        ascend_emulation.environment(tree, tmp_path, protocol="host_shm")


@pytest.mark.parametrize("value", [None, "", "0"])
@pytest.mark.parametrize("library", ["libascendcl.so", "libhcomm.so", ascend_emulation.PATH_SHIM])
def test_no_library_loads_without_the_switch(
    tree: Path, tmp_path: Path, library: str, value: str | None
) -> None:
    variables = ascend_emulation.environment(tree, tmp_path, protocol="host_shm")
    environment = {**os.environ, **variables, "LD_PRELOAD": str(tree / "lib64" / library)}
    del environment["ASCEND_EMULATION"]
    if value is not None:
        environment["ASCEND_EMULATION"] = value
    refused = subprocess.run(
        ["/bin/true"], env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == os.EX_CONFIG
    assert "ASCEND_EMULATION=1 is not set" in refused.stderr


def test_it_refuses_without_a_run_directory(tree: Path, tmp_path: Path) -> None:
    variables = ascend_emulation.environment(tree, tmp_path, protocol="host_shm")
    assert load_driver(variables).returncode == 0
    refused = load_driver({**variables, "ASCEND_EMULATION_RUN_DIR": ""})
    assert refused.returncode == os.EX_CONFIG
    assert "ASCEND_EMULATION_RUN_DIR is not set" in refused.stderr


# ---- the harness -----------------------------------------------------------------------------


def test_building_again_changes_nothing(tree: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    ascend_emulation.build(tree)
    assert before == {path: path.stat().st_mtime_ns for path in tree.rglob("*")}


def test_a_tree_whose_path_cannot_be_preloaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ascend_emulation.EmulationError, match="choose another"):
        ascend_emulation.build(tmp_path / "a b")


def test_a_compiler_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ascend_emulation.EmulationError, match="no C compiler 'no-such-compiler'"):
        ascend_emulation.build(tmp_path)


def test_the_environment_keeps_what_the_user_preloads(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_PRELOAD", "theirs.so")
    once = ascend_emulation.environment(tree, tmp_path, protocol="host_tcp")
    monkeypatch.setenv("LD_PRELOAD", once["LD_PRELOAD"])
    monkeypatch.setenv("LD_LIBRARY_PATH", once["LD_LIBRARY_PATH"])
    assert once["LD_PRELOAD"].endswith("libascend_paths.so:theirs.so")
    assert ascend_emulation.environment(tree, tmp_path, protocol="host_tcp") == once


def test_run_gives_a_command_the_emulation_and_returns_its_status() -> None:
    script = Path(ascend_emulation.__file__)
    command = "import os, sys; print(os.environ['ASCEND_EMULATION_RUN_DIR']); sys.exit(7)"
    done = subprocess.run(
        [sys.executable, str(script), "run", "--", sys.executable, "-c", command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7
    assert not Path(done.stdout.strip()).exists()
