# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The ascend_direct authors

"""The demonstration of decode offload: conversations on prefill and decode nodes."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from sglang_cpu.models import KINDS, make_model
from sglang_cpu.server import SGLangServer
from two_instances.cluster import PATIENCE, MemcachePool
from two_instances.report import print_verdict, write_json

from prefill_decode import report
from prefill_decode.conversations import Conversation, Result, judge, stored_pages
from prefill_decode.nodes import Nodes

ROOT = Path(__file__).resolve().parents[2]
LINKED, PLAIN = "with offload", "without offload"


def parse() -> argparse.Namespace:
    """Options of scripts/demo --pd."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo --pd",
        description="Start a pool, a prefill node and two decode nodes behind SGLang's router, one "
        "of which offloads what it generates (--enable-hierarchical-cache-direct). Hold the same "
        "kind of conversations on both, then compare every answer with a whole server that caches "
        "nothing. Exits 0 only if all answers agree and generated tokens came back from the pool.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=KINDS, default="gqa", help="architecture, made on the spot")
    add("--size", choices=("tiny", "demo"), default="demo", help="size of the model")
    add("--conversations", type=int, default=8, help="conversations on each decode node")
    add("--turns", type=int, default=4, help="turns of each")
    add("--question-tokens", type=int, default=64, help="new tokens in each prompt")
    add("--answer-tokens", type=int, default=256, help="tokens generated in each turn")
    add("--page-size", type=int, default=16, help="SGLang's --page-size")
    add("--stride", type=int, default=128, help="decode_stride_tokens of the linked node")
    add("--out", type=Path, default=ROOT / ".demo" / "pd", help="where the files go")
    return parser.parse_args()


def converse(
    nodes: Nodes, options: argparse.Namespace, result: Result, tick: Callable[[str], None]
) -> None:
    """All turns, the two decode nodes in turns, so that the machine's noise hits both alike."""
    talks = {
        node: [Conversation(node, number, "demo") for number in range(options.conversations)]
        for node in nodes.routers
    }
    for node, router in nodes.routers.items():  # first requests pay for what later ones do not
        Conversation(node, -1, "warm up").ask(router, options.question_tokens, 8)
    before = nodes.pool.stored_pages()
    for number in range(1, options.turns + 1):
        for place in range(options.conversations):
            for node, router in nodes.routers.items():
                turn = talks[node][place].ask(
                    router, options.question_tokens, options.answer_tokens
                )
                result.turns.append(turn)
                tick(
                    f"turn {number}, conversation {place + 1}/{options.conversations}, {node:<15} "
                    f"TTFT {turn.ttft_s * 1e3:6.0f} ms  pool {turn.pool_tokens:4}  "
                    f"device {turn.device_tokens:4}  computed {turn.computed_tokens:4}"
                )
        # The client thinks; meanwhile the last pages arrive. The plain node's prompts count too.
        wanted = before + stored_pages(result.of(LINKED), options.page_size)
        nodes.pool.wait_stored(wanted, timeout_s=5.0)


def _show(result: Result, out: Path, console: Console) -> None:
    """Tables, verdict and files."""
    report.print_table(result, LINKED, PLAIN, console)
    print_verdict(result, len(result.turns), console)
    write_json(result, out / "result.json")
    report.write_picture(result, LINKED, PLAIN, out / "result.png")


def main() -> int:
    """Run it; 0 when everything was proved, 1 when not, 130 on Ctrl-C."""
    options = parse()
    console = Console()
    begin_s = time.monotonic()

    def tick(line: str) -> None:
        console.print(
            f"[dim]{time.monotonic() - begin_s:6.1f} s[/]  {line}", highlight=False, soft_wrap=True
        )

    folder = ROOT / ".demo" / "models" / f"{options.model}-{options.size}"
    model = make_model(folder, options.model, size=options.size)
    options.out.mkdir(parents=True, exist_ok=True)
    logs = options.out / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    result = Result()
    try:
        with Nodes(
            MemcachePool(),
            model,
            ["--page-size", str(options.page_size)],
            direct={**PATIENCE, "decode_stride_tokens": options.stride},
            decodes={LINKED: True, PLAIN: False},
            log_dir=logs,
            progress=tick,
        ) as nodes:
            converse(nodes, options, result, tick)
        whole = SGLangServer(
            model,
            ["--page-size", str(options.page_size), "--disable-radix-cache"],
            name="no cache",
            log_path=logs / "no_cache.log",
            progress=tick,
        )
        with whole:
            judge(result, whole, LINKED, options.answer_tokens, tick)
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been stopped")
        return 130
    _show(result, options.out, console)
    console.print(
        f"{options.out}/result.json, result.png, logs/   {time.monotonic() - begin_s:.0f} s"
    )
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
