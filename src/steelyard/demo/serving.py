"""A real server on a free port, asked through the unmodified openai SDK."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from steelyard.data import chat
from steelyard.data.chat import FormatConfig
from steelyard.errors import ConfigError, EngineUnavailableError

ASKED = 20
QUESTION = "In one sentence: what is a steelyard balance?"


@contextlib.contextmanager
def serving(log: Path, *checkpoints: Path) -> Iterator[tuple[str, str]]:
    """Serve checkpoints while the block runs, logging to `log`; yields the base URL and the key.

    Raises:
        EngineUnavailableError: the server does not come up; its log says why.
    """
    key = f"sk-demo-{secrets.token_hex(8)}"
    command = [sys.executable, "-m", "steelyard", "serve", *map(str, checkpoints), "--port", "0", "--json"]
    state = log.parent / "state"  # not that of a server that this machine may run
    environment = {**os.environ, "STEELYARD_API_KEY": key, "STEELYARD_HOME": str(state)}
    with log.open("w") as errors:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    try:
        assert server.stdout is not None, "stdout is a pipe"
        line = server.stdout.readline()
        if not line.startswith("{"):
            raise EngineUnavailableError(f"the server did not start; '{log}' says why")
        yield json.loads(line)["url"], key
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)
        server.kill()


def serve_and_ask(
    tuned: Path, base: Path, held_out: Path, format_: FormatConfig, log: Path, asked: int = ASKED
) -> tuple[bool, list[tuple[str, str]]]:
    """Classify held-out messages with the tuned model, and stream one answer of the base model.

    Args:
        tuned: a checkpoint that answers with a label.
        base: a checkpoint that chats.
        held_out: labelled rows.
        format_: how they are read and asked.
        log: gets the server's log.
        asked: how many rows to ask.

    Returns:
        Whether everything was answered well (labels only, nine in ten right, a stream in several pieces with its
        usage), and the pairs of what was asked and answered.
    """
    try:
        import openai
    except ImportError:
        raise ConfigError("the demo asks through the openai SDK: pip install 'steelyard[demo]'") from None
    rows = chat.read(held_out, format_)[:asked]
    answers: list[tuple[str, str]] = []
    right = 0
    with serving(log, tuned, base) as (url, key), openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client:
        served = {model.id for model in client.models.list()}
        for row in rows:
            text = row.messages[-2].content
            completion = client.chat.completions.create(
                model=tuned.name,
                messages=[{"role": "system", "content": format_.system or ""}, {"role": "user", "content": text}],
                temperature=0,
                max_tokens=8,
            )
            answer = completion.choices[0].message.content or ""
            right += answer == row.label
            answers.append((text, answer))
        stream = client.chat.completions.create(
            model=base.name,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
        )
        pieces, counted = [], 0
        for chunk in stream:
            pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
            counted = chunk.usage.completion_tokens if chunk.usage else counted
    answers.append((QUESTION, "".join(pieces)))
    good = {answer for _, answer in answers[:-1]} <= set(format_.labels) and right >= 0.9 * len(rows)
    return good and len(pieces) > 3 and counted >= len(pieces) and {tuned.name, base.name} <= served, answers
