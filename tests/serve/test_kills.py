"""The server's process is killed while it works: at the next start nothing acknowledged is missing, nothing is twice.

The large form of this is `benchmarks/reliability.py`.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import openai
from sqlalchemy import func, select
from test_server_run import HELLO, Process

from steelyard.store import chain, tables
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import open_secrets


def test_killed_at_random_moments(make_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    seeded, checkpoint = random.Random(11), make_checkpoint("tiny")
    answered: dict[str, tuple[int, int]] = {}
    replayed: list[bool] = []
    key = ""

    def busy(url: str, ending: threading.Event, number: int) -> None:
        own = random.Random(number)
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=10)
        while not ending.is_set():
            try:
                stream = client.chat.completions.create(
                    model="tiny",
                    messages=HELLO,
                    max_tokens=own.randint(1, 20),
                    seed=own.choice([0, 5, 20]),
                    stream=True,
                    stream_options={"include_usage": True},
                )
                with stream:
                    for chunk in stream:
                        if chunk.usage is not None:
                            answered[chunk.id] = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
            except openai.OpenAIError:
                time.sleep(0.02)

    def asking_again(url: str, ending: threading.Event, number: int) -> None:
        """Each question is sent under one key until it is answered, by another server maybe, and once more then."""
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=10)
        asked = 0
        while not ending.is_set():
            asked += 1
            once = {"Idempotency-Key": f"{number} {url} {asked}"}
            first = None
            while not ending.is_set():
                try:
                    answer = client.chat.completions.create(
                        model="tiny", messages=HELLO, max_tokens=5, seed=2, extra_headers=once
                    )
                except openai.OpenAIError:
                    time.sleep(0.02)
                    continue
                if first is not None:
                    replayed.append(answer.id == first)
                    break
                first = answer.id
                assert answer.usage is not None
                answered[first] = answer.usage.prompt_tokens, answer.usage.completion_tokens

    for _ in range(3):
        process = Process(tmp_path, checkpoint)
        key = key or process.lines[1].split()[0]
        ending = threading.Event()
        workers = [threading.Thread(target=busy, args=(process.url, ending, number)) for number in range(3)]
        workers += [threading.Thread(target=asking_again, args=(process.url, ending, number)) for number in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(seeded.uniform(0.5, 1.2))
        process.popen.kill()
        ending.set()
        for worker in workers:
            worker.join()
        process.popen.communicate()
    Process(tmp_path, checkpoint).end(signal.SIGTERM)
    assert len(answered) > 5
    assert replayed
    assert all(replayed)
    secrets = open_secrets({"STEELYARD_HOME": str(tmp_path)})
    entries = tables.ledger.c
    with opened(sqlite_url(tmp_path / "steelyard.db")) as database, database.engine.connect() as connection:
        assert chain.verify(connection, secrets.chain, tables.ledger) == []
        assert connection.execute(select(tables.reservations.c.id)).first() is None
        rows = connection.execute(select(tables.ledger).where(entries.kind == "settle")).all()
        settled = {row.reference: (row.input_tokens, row.output_tokens) for row in rows}
        reserved = connection.execute(select(func.count()).where(entries.kind == "reserve")).scalar_one()
        assert len(rows) == len(settled) == reserved
        assert {name: settled.get(name) for name in answered} == answered
