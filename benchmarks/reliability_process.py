"""A server that ends, stalls, loses its engine or its disk, and what it leaves in files: parts of `reliability.py`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai

from reliability_server import NAME, QUICK, Found, Part, Server, Target, at_most, books, none, quantile, running


def disk(kind: str, count: int, seeded: random.Random) -> Found:
    """5: a small file system fills up: 507, nothing corrupt, all well once there is room."""
    with tempfile.TemporaryDirectory() as name:
        mounted = Path(name)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", name], check=True)
        try:
            server = Server(mounted, f"sqlite:///{mounted}/home/steelyard.db")
            server.log = Path(tempfile.mkdtemp()) / "log"
            (mounted / "home").mkdir(mode=0o700)
            server.start()
            try:
                kept: dict[str, bytes] = {}
                statuses: dict[int, int] = {}
                with server.http(server.key) as http:
                    for _ in range(60):
                        content = os.urandom(100_000)
                        answer = http.post("/files", data={"purpose": "user_data"}, files={"file": ("x.bin", content)})
                        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                        if answer.status_code == 200:
                            kept[answer.json()["id"]] = content
                    asked = http.post("/completions", json={"model": NAME, "prompt": "x", "max_tokens": 1})
                    statuses[asked.status_code] = statuses.get(asked.status_code, 0) + 1
                    contents = {file: http.get(f"/files/{file}/content").content for file in kept}
                    intact = sum(contents[file] == content for file, content in kept.items())
                    subprocess.run(["mount", "-o", "remount,size=8m", name], check=True)
                    after = http.post("/files", data={"purpose": "user_data"}, files={"file": ("y.bin", b"y" * 1000)})
                    again = http.post("/completions", json={"model": NAME, "prompt": "x", "max_tokens": 1})
                time.sleep(3)  # what could not be settled is tried again
                server.stop()
                wrong = books(server)
            finally:
                server.stop()
        finally:
            subprocess.run(["umount", "-l", name], check=True)
    return {
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "kept": len(kept),
        "intact": intact,
        "after_room_was_made": [after.status_code, again.status_code],
        "faults": len(wrong["chain"]) + wrong["twice"] + wrong["never_settled"] + wrong["open"],
    }


def engine(kind: str, count: int, seeded: random.Random) -> Found:
    """12: the engine process is killed: clients learn it, it comes again."""
    told: list[float] = []
    back: list[float] = []
    with running(kind) as server:
        for _ in range(max(2, count // 10)):
            victim = server.engine_process
            errors: list[float] = []

            def ask(errors: list[float] = errors) -> None:
                with contextlib.suppress(openai.OpenAIError):
                    list(server.sdk().completions.create(model=NAME, prompt="x", max_tokens=500, seed=50, stream=True))
                errors.append(time.monotonic())

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            killed = time.monotonic()
            victim.kill()
            for thread in threads:
                thread.join(30)
            assert len(errors) == 8, "a client hangs"
            told.append(max(errors) - killed)
            while httpx.get(server.url.removesuffix("/v1") + "/ready").status_code != 200:
                time.sleep(0.02)
            back.append(time.monotonic() - killed)
    return {"kills": len(told), "told_after_s_max": max(told), "ready_after_s_max": max(back)}


def secret(kind: str, count: int, seeded: random.Random) -> Found:
    """28: no key and no prompt in a log, a database or a file."""
    word = f"codeword{secrets.token_hex(8)}"
    with running(kind) as server:
        with server.http() as http:
            made = http.post("/organization/admin_api_keys", json={"name": "x"}).json()["value"]
            project = http.post("/organization/projects", json={"name": "x"}).json()["id"]
            given = http.post(f"/organization/projects/{project}/service_accounts", json={"name": "x"}).json()
        keys = [server.key, server.admin, made, given["api_key"]["value"]]
        client = server.sdk(default_headers={"Idempotency-Key": "once"})
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": word}], max_tokens=2)
        with contextlib.suppress(openai.OpenAIError):
            server.sdk(api_key=f"{server.key}x").models.list()
        with contextlib.suppress(openai.OpenAIError):
            server.sdk().completions.create(model="none", prompt=word)
        row = {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}]}
        server.sdk().files.create(file=("x.jsonl", json.dumps(row).encode()), purpose="fine-tune")
        server.kill()
        found = []
        for file in [path for path in server.folder.rglob("*") if path.is_file()]:
            content = file.read_bytes()
            found += [file.name for needle in [*keys, word] if needle.encode() in content]
    return {"files_with_secrets": found}


ENDED_AFTER = 32
"""Seconds: `DRAIN_SECONDS`, and what ending engines and settlements may take."""
PROBE_SECONDS = 0.02
PROMPT = "the steelyard weighs exactly with one moving weight and tells what it has weighed to everybody who asks. "


def probes(kind: str, count: int, seeded: random.Random) -> Found:
    """13: what probes wait for while the real engine reads long prompts, and what they say while it is stopped."""
    prompts, stops = (3, 1) if count < QUICK else (12, 5)
    with running(kind, engine=True) as server:
        quiet = asyncio.run(_probe(server, seeded, 0))
        reading = asyncio.run(_probe(server, seeded, prompts))
        noticed, back, live = [], [], set()
        for _ in range(stops):
            stopped, began = server.engine_process, time.monotonic()
            stopped.suspend()
            while _status(server, "ready") == 200:
                assert time.monotonic() - began < 60, "it does not notice"
                live.add(_status(server, "live"))
                time.sleep(0.02)
            noticed.append(time.monotonic() - began)
            live.add(_status(server, "live"))
            stopped.resume()
            began = time.monotonic()
            while _status(server, "ready") != 200:
                assert time.monotonic() - began < 60, "it does not come back"
                time.sleep(0.02)
            back.append(time.monotonic() - began)
    return {
        **{f"quiet_{name}": value for name, value in quiet.items() if name.endswith("p99")},
        **reading,
        "stops": stops,
        "stall_told_after_s_max": max(noticed),
        "ready_again_after_s_max": max(back),
        "live_meanwhile": sorted(live),
    }


def _status(server: Server, path: str) -> int:
    return httpx.get(f"http://127.0.0.1:{server.port}/{path}").status_code


async def _probe(server: Server, seeded: random.Random, prompts: int) -> Found:
    """Both paths in turns, each when it is due whatever the one before waits for; until the prompts are read."""
    times: dict[str, list[float]] = {"live": [], "ready": []}
    statuses: set[int] = set()
    sizes: list[int] = []

    async def ask() -> float:
        began = time.monotonic()
        for _ in range(prompts):
            content = f"{seeded.random()} {PROMPT * 240}"
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "stream": False}
            status, answer = await _exchange(server, server.request(body))
            assert status == 200, answer
            sizes.append(json.loads(answer)["usage"]["prompt_tokens"])
        return time.monotonic() - began

    async def probe(path: str) -> None:
        began = time.perf_counter()
        status, _ = await _exchange(server, f"GET /{path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        times[path].append(time.perf_counter() - began)
        statuses.add(status)

    asking = asyncio.create_task(ask() if prompts else asyncio.sleep(2, 2.0))
    probing = set[asyncio.Task[None]]()
    due = time.monotonic()
    while not asking.done():
        for path in times:
            probing.add(asyncio.create_task(probe(path)))
            due += PROBE_SECONDS
            await asyncio.sleep(max(0.0, due - time.monotonic()))
    await asyncio.gather(*probing)
    seconds = await asking
    return {
        "prompts": prompts,
        "prompt_tokens": [min(sizes, default=0), max(sizes, default=0)],
        "tokens_per_second": sum(sizes) / seconds,
        "probes": sum(map(len, times.values())),
        **{
            f"{path}_ms_p{share}": quantile(found, share / 100) * 1e3
            for path, found in times.items()
            for share in (50, 99)
        },
        "ms_max": max(map(max, times.values())) * 1e3,
        "false_alarms": len(statuses - {200}),
    }


async def _exchange(server: Server, request: bytes) -> tuple[int, bytes]:
    """A request on a connection of its own: the status and the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
    writer.close()
    return (int(head.split()[1]) if head else 0), body


def sigterm(kind: str, count: int, seeded: random.Random) -> Found:
    """17: SIGTERM while streams run, answers are computed, bodies and readers stall: who was let in gets everything."""
    rounds = 1 if count < QUICK else 5
    dropped: list[str] = []
    took: list[float] = []
    faults = admitted = 0
    for _ in range(rounds):
        with running(kind) as server:
            answers = asyncio.run(_end(server, seeded))
            took.append(answers.pop("ended"))
            admitted += len(answers)
            dropped += [name for name, whole in answers.items() if not whole]
            wrong = books(server)
            faults += len(wrong["chain"]) + wrong["twice"] + wrong["never_settled"] + wrong["open"]
            faults += server.process is None or server.process.returncode != 0
    return {
        "rounds": rounds,
        "admitted": admitted,
        "dropped": len(dropped),
        "which": sorted(set(dropped)),
        "ended_after_s": took,
        "ended_after_s_max": max(took),
        "faults": faults,
    }


async def _end(server: Server, seeded: random.Random) -> dict[str, Any]:
    """Who was let in and whether each got everything; and `ended`, the seconds from the signal to the end."""
    slow = {"max_tokens": 100, "seed": 120}
    long = {"max_tokens": 8000, "seed": 1, "stream": True}
    whole: dict[str, Any] = {}

    async def ask(name: str, body: dict[str, Any], pause: float = 0) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 12)
        whole[name] = False
        writer.write(server.request(body))
        await asyncio.sleep(pause)
        with contextlib.suppress(ConnectionError):
            content = await reader.read(-1)
            end = b"data: [DONE]" if body["stream"] else b'"completion_tokens":%d' % body["max_tokens"]
            whole[name] = content.startswith(b"HTTP/1.1 200") and end in content
        writer.close()

    clients = [ask(f"stream {number}", {**slow, "stream": True}) for number in range(20)]
    clients += [ask(f"answer {number}", {**slow, "stream": False}) for number in range(20)]
    clients += [ask(f"pausing reader {number}", long, 12) for number in range(5)]
    asking = [asyncio.create_task(client) for client in clients]
    stalled = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for body in stalled[:10]:
        body.sendall(server.request({})[:-10])
    for reader in stalled[10:]:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.sendall(server.request(long))
    while await asyncio.to_thread(server.open_reservations) < len(asking) + 10:
        await asyncio.sleep(0.05)
    await asyncio.sleep(seeded.uniform(0, 3))
    assert server.process is not None
    server.process.terminate()
    began = time.monotonic()
    await asyncio.to_thread(server.process.wait, 90)
    ended = time.monotonic() - began
    for connection in stalled:
        connection.close()
    await asyncio.gather(*asking)
    return {**whole, "ended": ended}


PARTS = {
    "probes": Part(
        probes,
        targets=(
            at_most("live_ms_p99", 50),
            at_most("ready_ms_p99", 50),
            *none("false_alarms"),
            at_most("stall_told_after_s_max", 10),
            at_most("ready_again_after_s_max", 10),
        ),
    ),
    "sigterm": Part(sigterm, True, (*none("dropped", "faults"), at_most("ended_after_s_max", ENDED_AFTER))),
    "disk": Part(
        disk,
        targets=(
            Target(
                "507", lambda found: sorted(found["statuses"]), "200 and 507", lambda value: value == ["200", "507"]
            ),
            Target("intact", lambda found: found["kept"] - found["intact"], "== 0", lambda value: value == 0),
            Target(
                "recovers", lambda found: found["after_room_was_made"], "[200, 200]", lambda value: value == [200, 200]
            ),
            *none("faults"),
        ),
    ),
    "engine": Part(engine, targets=(at_most("told_after_s_max", 2), at_most("ready_after_s_max", 10))),
    "secrets": Part(
        secret,
        True,
        (Target("files", lambda found: len(found["files_with_secrets"]), "== 0", lambda value: value == 0),),
    ),
}
