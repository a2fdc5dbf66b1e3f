"""One engine process: it starts, answers, dies, comes back, and never outlives its owner. Nobody waits in vain."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from running_service import stand_in_command

from steelyard.errors import EngineUnavailableError, RequestError
from steelyard.infer.request import EngineStats, Output, Request, Sampling
from steelyard.serve import engine_client
from steelyard.serve.engine_client import EngineClient


@pytest.fixture
def folder(make_checkpoint: Callable[[str], Path]) -> Path:
    return make_checkpoint("tiny")


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[EngineClient]:
    client = EngineClient("tiny", folder, command=stand_in_command)
    await client.start()
    try:
        await asyncio.wait_for(client.wait_ready(), 20)
        yield client
    finally:
        await client.stop()


def with_engine(folder: Path, use: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(folder) as client:
            await use(client)

    asyncio.run(main())


def request(name: str = "r", tokens: int = 5, milliseconds: int = 0, **fields: object) -> Request:
    sampling = Sampling(max_tokens=tokens, seed=milliseconds)
    return Request(**{"id": name, "prompt": [5, 6], "sampling": sampling, **fields})


async def collect(client: EngineClient, *requests: Request) -> list[Output]:
    return [output async for together in client.submit(*requests) for output in together]


def aborts(folder: Path) -> list[str]:
    return [line for line in (folder / "received").read_text().splitlines() if '"abort"' in line]


async def eventually(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_requests_run_to_their_end(folder: Path) -> None:
    async def use(client: EngineClient) -> None:
        outputs = await collect(client, request("a", n=2), request("b", tokens=7))
        assert sorted((o.id, o.choice, o.completion_tokens) for o in outputs if o.finish_reason) == [
            ("a", 0, 5),
            ("a", 1, 5),
            ("b", 0, 7),
        ]
        assert client.ready is not None
        assert client.ready.model == "tiny"

    with_engine(folder, use)
    assert aborts(folder) == []


def test_the_engine_does_not_learn_the_api_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEELYARD_API_KEY", "secret")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    monkeypatch.setenv("STEELYARD_OTHER", "seen")

    async def use(client: EngineClient) -> None:
        names = (folder / "environment").read_text().splitlines()
        assert "STEELYARD_OTHER" in names
        assert not {"STEELYARD_API_KEY", "OTEL_EXPORTER_OTLP_HEADERS"} & set(names)

    with_engine(folder, use)


def test_what_the_engine_refuses_is_the_clients_fault(folder: Path) -> None:
    async def use(client: EngineClient) -> None:
        with pytest.raises(RequestError, match="sevens") as caught:
            await collect(client, request(prompt=[7, 7, 7]))
        assert caught.value.param == "prompt"
        assert len(await collect(client, request())) == 5

    with_engine(folder, use)


def test_what_the_engine_cannot_finish_is_not(folder: Path) -> None:
    async def use(client: EngineClient) -> None:
        with pytest.raises(EngineUnavailableError, match="not finite"):
            await collect(client, request(prompt=[8, 8, 8]), request("slow", 100, 50))
        await eventually(lambda: len(aborts(folder)) == 1)  # the other one, which nobody waits for any more

    with_engine(folder, use)


@pytest.mark.parametrize("how", ["close", "cancel", "abort"])
def test_leaving_early_aborts(folder: Path, how: str) -> None:
    async def use(client: EngineClient) -> None:
        outputs = client.submit(request(tokens=200, milliseconds=20))
        assert (await anext(outputs))[0].completion_tokens == 1
        if how == "close":
            await outputs.aclose()
        elif how == "cancel":
            waiting = asyncio.ensure_future(anext(outputs))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        else:
            client.abort("r")
            assert [one async for together in outputs for one in together if one.completion_tokens > 3] == []
        await eventually(lambda: len(aborts(folder)) == 1)
        assert client._inboxes == {}

    with_engine(folder, use)


def test_a_killed_engine_fails_its_requests_at_once_and_comes_back(folder: Path) -> None:
    async def use(client: EngineClient) -> None:
        first = client.pid
        assert first is not None
        waiting = [asyncio.create_task(collect(client, request(f"r{n}", 200, 20))) for n in range(8)]
        await asyncio.sleep(0.2)
        os.kill(first, signal.SIGKILL)
        began = time.monotonic()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert time.monotonic() - began < 2
        assert all(isinstance(result, EngineUnavailableError) for result in results)
        assert client.status == "restarting"
        with pytest.raises(EngineUnavailableError, match="restarting"):
            await collect(client, request())
        await asyncio.wait_for(client.wait_ready(), 10)
        assert client.pid != first
        assert len(await collect(client, request())) == 5

    with_engine(folder, use)


def test_an_engine_that_keeps_dying_is_restarted_ever_more_slowly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []

    def command(*_: object) -> list[str]:
        starts.append(time.monotonic())
        return ["false"]

    async def main() -> None:
        client = EngineClient("tiny", tmp_path, command=command)
        await client.start()
        await asyncio.sleep(1.2)
        await client.stop()

    asyncio.run(main())
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert 2 <= len(gaps) <= 4
    assert all(later > earlier * 1.3 for earlier, later in itertools.pairwise(gaps))


def test_a_command_that_does_not_exist_is_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        client = EngineClient("tiny", tmp_path, command=lambda *_: [str(tmp_path / "nothing")])
        await client.start()
        await asyncio.sleep(0.3)
        assert client.status == "restarting"
        await client.stop()
        assert client.status == "stopped"

    asyncio.run(main())


def test_bytes_that_are_no_frame_end_the_engine(tmp_path: Path) -> None:
    script = "import os, sys, time; os.write(int(sys.argv[1]), b'\\x05\\0\\0\\0hello'); time.sleep(60)"

    async def main() -> None:
        client = EngineClient("tiny", tmp_path, command=lambda *a: ["python3", "-c", script, str(a[3])])
        await client.start()
        await eventually(lambda: client.pid)
        process = psutil.Process(client.pid)
        await eventually(lambda: not process.is_running())
        await client.stop()

    asyncio.run(main())


def test_fatal_is_final(folder: Path) -> None:
    (folder / "fatal").touch()

    async def main() -> None:
        client = EngineClient("tiny", folder, command=stand_in_command)
        await client.start()
        with pytest.raises(EngineUnavailableError, match="the weights do not fit"):
            await asyncio.wait_for(client.wait_ready(), 20)
        assert (client.status, client.pid) == ("failed", None)
        with pytest.raises(EngineUnavailableError, match="cannot start"):
            await collect(client, request())
        await client.stop()

    asyncio.run(main())


@pytest.mark.parametrize("stubborn", [False, True])
def test_stopping_leaves_no_process_and_no_request_behind(
    folder: Path, stubborn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "GRACE", 0.5)
    if stubborn:
        (folder / "stubborn").touch()

    async def main() -> None:
        async with running(folder) as client:
            process = psutil.Process(client.pid)
            waiting = asyncio.create_task(collect(client, request("r", 200, 50)))
            await asyncio.sleep(0.1)
            await asyncio.wait_for(client.stop(), 3)
            with pytest.raises(EngineUnavailableError):
                await waiting
            assert not process.is_running()

    asyncio.run(main())


def test_its_draft_is_named_to_the_process_and_its_work_is_known(folder: Path) -> None:
    async def main() -> None:
        client = EngineClient("tiny", folder, draft=Path("small"), command=stand_in_command)
        await client.start()
        try:
            await asyncio.wait_for(client.wait_ready(), 20)
            assert (folder / "draft").read_text() == "small"
            assert client.stats == EngineStats()
            await collect(client, request(tokens=7))
            await eventually(lambda: client.stats.running == 0)
            assert client.stats.generated_tokens == 7
            os.kill(client.pid or 0, signal.SIGKILL)
            await eventually(lambda: client.stats == EngineStats())
        finally:
            await client.stop()

    asyncio.run(main())
