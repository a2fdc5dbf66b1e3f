"""The engine's promises at full size; tests/infer has them small.

    python benchmarks/engine_reliability.py --json engine_reliability.json
    python benchmarks/engine_reliability.py --quick --only leak,churn

crowd     200 requests, greedy and sampled: tokens alone, without guesses, against beside 63 others, with chunks,
          preemptions, cached beginnings, adapters and speculation (SmolLM2 in int8)
churn     10,000 requests of 100 adapters, which are loaded, swapped and dropped meanwhile, against each alone (tiny)
leak      10,000 aborts at random moments: every block comes back, those of the aborted at once (tiny)
wire      an abort through the engine's socket: milliseconds until its blocks are free, beyond the step under way
          (SmolLM2)
fairness  one project floods beside three polite ones, against four polite ones (SmolLM2)
memory    what an engine process holds besides weights and cache (SmolLM2)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import random
import re
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import checkpoints
from steelyard.infer import wire
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.plan import PlanCache
from steelyard.infer.request import Abort, Output, Request, Sampling
from steelyard.infer.wire import EngineSocket
from steelyard.infer.worker import Inbox, receive, serve
from steelyard.kernels.reference import BLOCK
from steelyard.serve.engine_client import EngineClient

MOST_MEMORY = 400 << 20
JAIN, PATIENCE = 0.95, 1.5
MOST_LATE_MS = 50
PROJECTS = ("a", "b", "c", "d")


@dataclass
class Sizes:
    """What is measured, in full or quickly."""

    folder: Path
    quick: bool

    def of(self, full: int, quick: int) -> int:
        """One of two numbers."""
        return quick if self.quick else full

    @property
    def smollm2(self) -> Path:
        """The real model, made when it is first asked for."""
        made = self.folder / "smollm2"
        return made if made.is_dir() else checkpoints.smollm2(self.folder)

    @property
    def tiny(self) -> Path:
        """The tiny one."""
        made = self.folder / "tiny"
        return made if made.is_dir() else checkpoints.tiny(self.folder)


def blocks_of(engine: Engine, blocks: int) -> EngineConfig:
    """Sizes with a cache of so many blocks."""
    return EngineConfig(kv_bytes=blocks * BLOCK * PlanCache.bytes_per_token(engine.decoder))


def drive(engine: Engine, requests: Iterable[Request], under_way: int) -> Iterator[Output]:
    """Keep so many requests under way until all have ended."""
    waiting = iter(requests)
    more = True
    while more or engine.busy:
        while more and len(engine.sequences) < under_way:
            request = next(waiting, None)
            more = request is not None
            if request is not None:
                engine.add(request)
        for output in engine.step():
            if not isinstance(output, Output):
                raise SystemExit(f"the engine failed a request: {output}")
            yield output


def tokens_of(outputs: Iterable[Output]) -> dict[str, list[int]]:
    """Tokens by request."""
    found: dict[str, list[int]] = {}
    for output in outputs:
        found.setdefault(output.id, []).extend(output.tokens)
    return found


def alone(engine: Engine, request: Request) -> list[int]:
    """The tokens of one request with the engine to itself."""
    return tokens_of(drive(engine, [request], 1))[request.id]


def sampling(draw: random.Random, most: int, least: int = 1) -> Sampling:
    """Greedy or sampled."""
    temperature = draw.choice([0.0, 0.8, 1.3])
    top_k, top_p = draw.choice([0, 20]), draw.choice([1.0, 0.9])
    return Sampling(
        max_tokens=draw.randint(least, most),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=draw.randrange(1 << 40),
        ignore_eos=True,
    )


def prompt(draw: random.Random, vocabulary: int, least: int, most: int) -> list[int]:
    """Random tokens."""
    return [draw.randrange(3, vocabulary) for _ in range(draw.randint(least, most))]


def crowd(sizes: Sizes) -> dict[str, Any]:
    """Figure 32: the same tokens alone and beside 63 others."""
    count, draw = sizes.of(200, 24), random.Random(32)
    folders = checkpoints.adapters(sizes.smollm2, sizes.folder, (4, 8, 16, 64), 0.05)
    adapters = {str(number): path for number, path in enumerate(folders)}
    single = Engine.load(sizes.smollm2, adapters, EngineConfig(kv_bytes=1 << 28, reuse=False, speculate="off"))
    vocabulary = single.decoder.config.vocabulary
    shared = prompt(draw, vocabulary, 100, 100)
    requests = [
        Request(
            id=str(number),
            prompt=shared[: draw.choice([0, 33, 96])] + prompt(draw, vocabulary, 1, 120),
            sampling=sampling(draw, 160, least=32),
            adapter=draw.choice([None, None, *adapters]),
            project=draw.choice("ab"),
        )
        for number in range(count)
    ]
    expected = {request.id: alone(single, request) for request in requests}
    small = blocks_of(single, sizes.of(300, 100)).kv_bytes
    engine = Engine.load(sizes.smollm2, adapters, EngineConfig(kv_bytes=small, token_budget=160))
    wrong, running, cached = 0, [], 0
    for _ in range(2):  # the second time much is found in the cache
        draw.shuffle(requests)
        found: dict[str, list[int]] = {}
        for output in drive(engine, requests, 90):
            running.append(len(engine.scheduler.running))
            cached += output.cached_tokens if output.finish_reason else 0
            found.setdefault(output.id, []).extend(output.tokens)
        wrong += sum(found[id] != tokens for id, tokens in expected.items())
        engine.check_integrity()
    preempted, accepted = engine.scheduler.preemptions, engine.stats().accepted_tokens
    figures = {"requests": 2 * count, "wrong": wrong, "preemptions": preempted, "cached_tokens": cached}
    figures["accepted_guesses"] = accepted
    figures["beside"] = round(statistics.mean(running) - 1)
    missed = short("crowd wrong", wrong, "0", wrong == 0)
    missed += short("crowd preemptions", preempted, "some", preempted > 0 or sizes.quick)
    return {**figures, "short": missed}


def churn(sizes: Sizes) -> dict[str, Any]:
    """Figure 26: every row wears what its name meant when it came."""
    count, draw = sizes.of(10_000, 400), random.Random(26)
    ranks = [draw.randint(4, 64) for _ in range(100)]
    sources = checkpoints.adapters(sizes.tiny, sizes.folder, ranks, 0.3)
    engine = Engine.load(sizes.tiny, config=EngineConfig(kv_bytes=1 << 22, token_budget=128))
    single = Engine.load(sizes.tiny, config=EngineConfig(kv_bytes=1 << 22, speculate="off"))
    for number, path in enumerate(sources):
        single.load_adapter(str(number), path)
    names = {f"name-{number}": number for number in range(80)}
    for name, number in names.items():
        engine.load_adapter(name, sources[number])
    prompts = [prompt(draw, 259, 1, 90) for _ in range(50)]
    wanted: dict[str, tuple[Request, int | None]] = {}
    changes: Counter[str] = Counter()

    def arrivals() -> Iterator[Request]:
        for number in range(count):
            change = draw.random()
            if change < 0.1:
                name, source = f"name-{draw.randrange(90)}", draw.randrange(len(sources))
                changes["swapped" if name in names else "loaded"] += 1
                engine.load_adapter(name, sources[source])
                names[name] = source
            elif change < 0.13:
                name = draw.choice(list(names))
                changes["dropped"] += 1
                engine.drop_adapter(name)
                del names[name]
            worn = draw.choice([None, *names])
            request = Request(
                id=str(number),
                prompt=draw.choice(prompts),
                sampling=sampling(draw, 16),
                adapter=worn,
                project=draw.choice("ab"),
            )
            wanted[request.id] = request, None if worn is None else names[worn]
            yield request

    found = tokens_of(drive(engine, arrivals(), 100))
    engine.check_integrity()
    wrong = 0
    for id, (request, source) in wanted.items():
        solo = Request(
            id=id, prompt=request.prompt, sampling=request.sampling, adapter=None if source is None else str(source)
        )
        wrong += alone(single, solo) != found[id]
    return {"requests": count, "wrong": wrong, **changes, "short": short("churn wrong", wrong, "0", wrong == 0)}


def leak(sizes: Sizes) -> dict[str, Any]:
    """Figures 10 and 11: aborts lose no block, and give those that nobody else holds back at once."""
    count, draw = sizes.of(10_000, 500), random.Random(11)
    folders = checkpoints.adapters(sizes.tiny, sizes.folder, (4, 16), 0.3)
    adapters = dict(zip("xy", folders, strict=True))
    probe = Engine.load(sizes.tiny)
    kv_bytes = blocks_of(probe, 30).kv_bytes
    engine = Engine.load(sizes.tiny, adapters, EngineConfig(kv_bytes=kv_bytes, token_budget=64, max_running=32))
    shared = prompt(draw, 259, 70, 70)
    moments: Counter[str] = Counter()
    late = begun = 0
    while sum(moments.values()) < count:
        while len(engine.sequences) < 48:
            begun += 1
            own = shared[: draw.choice([0, 40, 70])] + prompt(draw, 259, 1, 100)
            adapter, project = draw.choice([None, "x", "y"]), draw.choice("ab")
            asked = Request(
                id=str(begun),
                prompt=own,
                sampling=sampling(draw, 40),
                n=draw.choice([1, 1, 3]),
                adapter=adapter,
                project=project,
            )
            engine.add(asked)
        engine.step()
        for _ in range(min(draw.choice([0, 0, 0, 0, 1, 8]), len(engine.sequences))):
            by_moment: dict[str, list[str]] = {}
            for id, choices in engine.sequences.items():
                by_moment.setdefault(_moment(engine, choices), []).append(id)
            moment = draw.choice(list(by_moment))
            id = draw.choice(by_moment[moment])
            every = [choice for choice in engine.sequences[id] if choice.finish_reason is None]
            moments[moment] += 1
            held = Counter(block for choice in every for block in choice.block_table)
            ours = sum(engine.pool.references[block] == times for block, times in held.items())
            before = engine.pool.available
            engine.abort(id)
            late += engine.pool.available != before + ours
        engine.check_integrity()
    for id in list(engine.sequences):
        engine.abort(id)
    engine.check_integrity()
    lost = engine.pool.blocks - engine.pool.available
    figures = {
        "aborts": dict(moments),
        "blocks_lost": lost,
        "freed_late": late,
        "preemptions": engine.scheduler.preemptions,
    }
    return {**figures, "short": short("blocks lost or late", lost + late, "0", lost + late == 0)}


def _moment(engine: Engine, choices: list[Any]) -> str:
    running = [choice for choice in choices if choice in engine.scheduler.running]
    if not running:
        return "waiting"
    return "decode" if any(choice.generated for choice in running) else "prefill"


def aborted_by_wire(sizes: Sizes) -> dict[str, Any]:
    """Figure 10 up to the engine: from the abort's frame to free blocks, beside 31 streams."""
    count, draw = sizes.of(200, 20), random.Random(10)
    engine = Engine.load(sizes.smollm2, config=EngineConfig(kv_bytes=1 << 28))
    ours, theirs = socket.socketpair()
    inbox: Inbox = queue.SimpleQueue()
    end = EngineSocket(theirs.detach())
    steps: list[float] = []
    step = engine.step

    def timed() -> Any:
        began = time.perf_counter()
        outputs = step()
        steps.append(time.perf_counter() - began)
        return outputs

    engine.step = timed  # type: ignore[method-assign]

    threads = [threading.Thread(target=receive, args=(end, inbox))]
    threads.append(threading.Thread(target=serve, args=(engine, inbox, end)))
    threads.append(threading.Thread(target=lambda: [None for _ in iter(lambda: ours.recv(1 << 16), b"")]))
    for thread in threads:
        thread.start()
    times: list[float] = []
    beyond: list[float] = []
    alive: list[str] = []
    begun = 0
    while len(times) < count:
        while len(alive) < 32:
            begun += 1
            asked = Request(
                id=str(begun),
                prompt=prompt(draw, 40_000, 60, 120),
                sampling=Sampling(max_tokens=4000, temperature=0, ignore_eos=True),
            )
            ours.sendall(wire.frame(asked))
            alive.append(str(begun))
        time.sleep(draw.uniform(0.05, 0.15))
        id = alive.pop(draw.randrange(len(alive)))
        if id not in engine.sequences:
            continue  # it has not come yet, or its context is full
        began, done = time.perf_counter(), len(steps)
        ours.sendall(wire.frame(Abort(id)))
        while id in engine.sequences:
            time.sleep(0.0005)
        times.append(time.perf_counter() - began)
        under_way = steps[done] if len(steps) > done else 0.0  # the step that the abort had to wait for
        beyond.append(times[-1] - under_way)
    ours.shutdown(socket.SHUT_WR)
    for thread in threads[:2]:
        thread.join()
    end.close()
    threads[2].join()
    ours.close()
    late = quantile(beyond, 0.99) * 1e3
    figures: dict[str, Any] = {"aborts": count, "step_ms_p99": quantile(steps, 0.99) * 1e3}
    figures |= {f"freed_ms_p{share}": quantile(times, share / 100) * 1e3 for share in (50, 99)}
    figures["ms_beyond_its_step_p99"] = late
    return {**figures, "short": short("freed ms beyond its step", late, f"<= {MOST_LATE_MS}", late <= MOST_LATE_MS)}


def fairness(sizes: Sizes) -> dict[str, Any]:
    """Shares and waiting of three polite projects beside a flood, against beside a fourth polite one."""
    steps = sizes.of(1500, 150)
    flooded, polite = (_share(sizes, steps, flood) for flood in (True, False))
    figures: dict[str, Any] = {
        "jain": jain(list(flooded["service"].values())),
        "jain_polite": jain(list(polite["service"].values())),
        "service": flooded["service"],
    }
    missed = short("jain", figures["jain"], f">= {JAIN}", figures["jain"] >= JAIN)
    for unit in ("steps", "seconds"):
        pair = [quantile(run[unit], 0.99) for run in (flooded, polite)]
        figures[f"p99_{unit}"], ratio = pair, pair[0] / pair[1]
        figures[f"p99_{unit}_ratio"] = ratio
        missed += short(f"p99_{unit}_ratio", ratio, f"<= {PATIENCE}", ratio <= PATIENCE)
    return {**figures, "requests": len(flooded["steps"]), "short": missed}


def _share(sizes: Sizes, steps: int, flood: bool) -> dict[str, Any]:
    """Tokens served by project, and how long each request of a, b and c took, in steps and seconds."""
    draw = random.Random(4)
    engine = Engine.load(sizes.smollm2, config=EngineConfig(kv_bytes=1 << 28, max_running=8))
    service = dict.fromkeys(PROJECTS, 0)
    since: dict[str, tuple[int, float]] = {}
    took: dict[str, list[float]] = {"steps": [], "seconds": []}
    begun = 0
    for number in range(steps):
        under_way = Counter(choices[0].request.project for choices in engine.sequences.values())
        for project in PROJECTS:
            wanted = 200 if flood and project == "d" else 4
            for _ in range(wanted - under_way[project]):
                begun += 1
                id = f"{project}-{begun}"
                since[id] = number, time.perf_counter()
                asked = Sampling(max_tokens=draw.randint(8, 32), temperature=0, ignore_eos=True)
                engine.add(Request(id=id, prompt=prompt(draw, 40_000, 30, 120), sampling=asked, project=project))
        for output in engine.step():
            assert isinstance(output, Output)
            project = output.id.partition("-")[0]
            first = output.completion_tokens == len(output.tokens)
            service[project] += 2 * len(output.tokens) + (output.prompt_tokens if first else 0)
            if output.finish_reason is not None and project != "d":
                came, at = since.pop(output.id)
                took["steps"].append(number + 1 - came)
                took["seconds"].append(time.perf_counter() - at)
    return {"service": service, **took}


def jain(shares: list[int]) -> float:
    """Jain's index: 1 if all are equal, 1 / n if one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def memory(sizes: Sizes) -> dict[str, Any]:
    """Resident bytes of an engine process after 64 requests of 128 tokens in and out, less weights and cache."""
    checkpoint = sizes.smollm2
    found = asyncio.run(_resident_after_load(checkpoint, sizes.of(64, 8)))
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    rest = sum(found.values()) - found["cache"] - weights
    figures = {"resident": found, "weights": weights, "rest": rest}
    return {**figures, "short": short("memory", rest >> 20, f"<= {MOST_MEMORY >> 20} MB", rest <= MOST_MEMORY)}


async def _resident_after_load(checkpoint: Path, requests: int) -> dict[str, int]:
    draw = random.Random(6)
    client = EngineClient("smollm2", checkpoint)
    await client.start()
    await client.wait_ready()

    async def ask(number: int) -> None:
        asked = Sampling(max_tokens=128, temperature=0, ignore_eos=True)
        async for _ in client.submit(Request(id=str(number), prompt=prompt(draw, 40_000, 128, 128), sampling=asked)):
            pass

    await asyncio.gather(*(ask(number) for number in range(requests)))
    assert client.pid is not None
    found = resident(client.pid)
    await client.stop()
    return found


def resident(process: int) -> dict[str, int]:
    """Resident bytes by kind: the cache is what is anonymous and larger than 200 MB."""
    found = dict.fromkeys(("cache", "checkpoint files", "libraries", "heap", "other"), 0)
    kind = "other"
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line):
            size, name = int(head[2], 16) - int(head[1], 16), head[3]
            if name.endswith(".safetensors"):
                kind = "checkpoint files"
            elif ".so" in name or "/bin/" in name:
                kind = "libraries"
            elif size > 200 << 20 and name in ("", "/dev/zero (deleted)"):
                kind = "cache"
            else:
                kind = "heap" if name in ("", "[heap]", "/dev/zero (deleted)") else "other"
        elif line.startswith("Rss:"):
            found[kind] += int(line.split()[1]) << 10
    return found


def quantile(values: list[float], share: float) -> float:
    """Of some values; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def short(name: str, measured: float, target: str, met: bool) -> list[dict[str, Any]]:
    """An entry for what misses its target."""
    return [] if met else [{"name": name, "measured": measured, "target": target}]


PARTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "crowd": crowd,
    "churn": churn,
    "leak": leak,
    "wire": aborted_by_wire,
    "fairness": fairness,
    "memory": memory,
}


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--quick", action="store_true", help="a few percent of each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.only.split(","):
        if name not in PARTS:
            parser.error(f"no part '{name}'; known: {', '.join(PARTS)}")
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            found[name] = PARTS[name](Sizes(Path(folder), options.quick))
            found[name]["minutes"] = round((time.perf_counter() - began) / 60, 2)
        print(f"{name:9} {json.dumps(found[name])}", flush=True)
    missed = [entry for figures in found.values() for entry in figures.pop("short")]
    print(f"short of target: {[entry['name'] for entry in missed] or 'nothing'}")
    if options.json is not None:
        options.json.write_text(json.dumps({"quick": options.quick, **found, "short": missed}, indent=2) + "\n")


if __name__ == "__main__":
    main()
