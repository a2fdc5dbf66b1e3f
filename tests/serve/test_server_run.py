"""`run` as a process of its own: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import psutil
import pytest
from running_service import eventually, stand_in_command
from sqlalchemy import func, select

from steelyard.app import run
from steelyard.errors import CheckpointError, ConfigError, EngineUnavailableError
from steelyard.store import tables
from steelyard.store.database import opened, sqlite_url

HERE = Path(__file__).parent
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from running_service import stand_in_command
from steelyard import app
from steelyard.app import run
app.DRAIN_SECONDS = float(sys.argv[2])
def announce(url, models):
    print(f"Steelyard serves {', '.join(models)} on {url}", flush=True)

run([Path(path) for path in sys.argv[3:]], port=0, announce=announce, command=stand_in_command)
assert not {"torch", "opentelemetry"} & sys.modules.keys()
print("ended well")
"""
HELLO = [{"role": "user", "content": "Hello"}]


class Process:
    def __init__(self, home: Path, *checkpoints: Path, drain: float = 30) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("STEELYARD_")}
        self.popen = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(HERE), str(drain), *map(str, checkpoints)],
            env={**environment, "STEELYARD_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        assert self.popen.stdout is not None
        while not (self.lines and self.lines[-1].startswith("Steelyard serves")):
            self.lines.append(self.popen.stdout.readline().rstrip("\n"))
            assert self.lines[-1], self.popen.stderr and self.popen.stderr.read()
        self.url = self.lines[-1].rpartition(" ")[2]
        self.children = psutil.Process(self.popen.pid).children(recursive=True)

    def end(self, *signals: int) -> tuple[str, str]:
        for number in signals:
            self.popen.send_signal(number)
            time.sleep(0.3)
        output, log = self.popen.communicate(timeout=20)
        eventually(lambda: not any(child.is_running() for child in self.children))
        return output, log


@pytest.fixture
def process(make_checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path, make_checkpoint("tiny"), make_checkpoint("other"))
    yield process
    if process.popen.poll() is None:
        process.popen.kill()
        process.popen.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_and_ends_without_dropping_a_request(process: Process, tmp_path: Path, number: int) -> None:
    _, shown, administration, ready = process.lines
    key = re.fullmatch(r"  (sk-sy-\w{36})  for requests \(project 'default'\)", shown)
    assert key
    assert re.fullmatch(r"  sk-sy-\w{36}  for administration", administration)
    assert re.fullmatch(r"Steelyard serves tiny, other on http://127\.0\.0\.1:\d+/v1", ready)
    client = openai.OpenAI(base_url=process.url, api_key=key[1], max_retries=0)
    begun = threading.Event()
    texts: list[str] = []

    def stream() -> None:
        for chunk in client.chat.completions.create(model="other", messages=HELLO, max_tokens=50, seed=20, stream=True):
            texts.append(chunk.choices[0].delta.content or "")
            begun.set()

    def whole() -> None:
        texts.append(client.completions.create(model="tiny", prompt="a", max_tokens=50, seed=20).choices[0].text)

    threads = [threading.Thread(target=stream), threading.Thread(target=whole)]
    for thread in threads:
        thread.start()
    assert begun.wait(5)
    output, log = process.end(number)
    for thread in threads:
        thread.join(5)
    assert "".join(texts).count("steelyard") >= 2
    assert process.popen.returncode == 0
    assert output == "ended well\n"
    assert key[1] not in log
    assert "Traceback" not in log
    assert log.count("POST /v1/chat/completions 200") == 1
    assert key[1].encode() not in (tmp_path / "steelyard.db").read_bytes()


def test_who_was_let_in_gets_everything_while_others_stall(
    make_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """SIGTERM while streams run, answers are computed, bodies and readers stall; the large form is a benchmark."""
    process = Process(tmp_path, make_checkpoint("tiny"), drain=8)
    key = process.lines[1].split()[0]
    client = openai.OpenAI(base_url=process.url, api_key=key, max_retries=0)
    port = int(process.url.split(":")[2].split("/")[0])
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 60, "seed": 25}
    ended: list[int] = []

    def stream() -> None:
        options = {"include_usage": True}
        for chunk in client.chat.completions.create(**asked, stream=True, stream_options=options):
            if chunk.usage is not None:
                ended.append(chunk.usage.completion_tokens)

    def whole() -> None:
        ended.append(client.chat.completions.create(**asked).usage.completion_tokens)

    def stalled(body: dict[str, object], short_by: int) -> socket.socket:
        content = json.dumps({**asked, **body}).encode()
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            f"content-length: {len(content)}\r\n\r\n".encode()
            + content[: len(content) - short_by]
        )
        return connection

    stalls = [stalled({}, 5), stalled({}, 5), stalled({"n": 8, "max_tokens": 230, "seed": 5, "stream": True}, 0)]
    threads = [threading.Thread(target=work) for work in [stream] * 4 + [whole] * 4]
    for thread in threads:
        thread.start()
    with opened(sqlite_url(tmp_path / "steelyard.db")) as database:
        count = select(func.count()).select_from(tables.reservations)
        eventually(lambda: database.read_now(lambda connection: connection.execute(count).scalar_one()) == 9)
    process.popen.send_signal(signal.SIGTERM)
    began = time.monotonic()
    for thread in threads:
        thread.join(20)
    assert ended == [60] * 8
    assert process.popen.poll() is None, "stalled ones have their time"
    process.popen.wait(40)
    assert 6 < time.monotonic() - began < 15
    process.end()
    assert process.popen.returncode == 0
    for connection in stalls:
        connection.close()
    with opened(sqlite_url(tmp_path / "steelyard.db")) as database:
        assert database.read_now(lambda connection: connection.execute(count).scalar_one()) == 0


def test_the_second_start_knows_the_key_and_does_not_show_it(
    process: Process, make_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    key = process.lines[1].split()[0]
    process.end(signal.SIGTERM)
    again = Process(tmp_path, make_checkpoint("tiny"))
    assert len(again.lines) == 1
    assert [model.id for model in openai.OpenAI(base_url=again.url, api_key=key).models.list()] == ["tiny"]
    again.end(signal.SIGTERM)


def test_a_second_signal_does_not_wait(process: Process) -> None:
    key = process.lines[1].split()[0]
    client = openai.OpenAI(base_url=process.url, api_key=key, max_retries=0)
    stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, seed=1000, stream=True)
    next(stream)
    began = time.monotonic()
    _, log = process.end(signal.SIGINT, signal.SIGINT)
    assert time.monotonic() - began < 8
    assert process.popen.returncode == 0
    assert "Traceback" not in log


def test_a_killed_server_leaves_no_engine(process: Process) -> None:
    process.end(signal.SIGKILL)


def test_errors_before_anything_starts(make_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    def start(*_: object) -> list[str]:
        raise AssertionError("nothing may be started")

    environment = {"STEELYARD_API_KEY": "key", "STEELYARD_HOME": str(tmp_path / "unused")}
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        run([tmp_path / "missing"], command=start, environment=environment)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        home = {"STEELYARD_HOME": str(tmp_path / "home")}
        with pytest.raises(ConfigError, match="choose another --port"):
            run([make_checkpoint("tiny")], port=taken.getsockname()[1], command=start, environment=home)
        assert not (tmp_path / "home").exists(), "a key that nobody was shown was kept"
    with pytest.raises(ConfigError, match="cannot listen"):
        run([make_checkpoint("tiny")], host="no.such.host.invalid", command=start, environment=environment)


def test_an_engine_that_cannot_start_ends_the_server(
    make_checkpoint: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_checkpoint("broken")
    (folder / "fatal").touch()
    with pytest.raises(EngineUnavailableError, match="'broken' cannot start: the weights do not fit"):
        run(
            [folder],
            port=0,
            command=stand_in_command,
            environment={"STEELYARD_API_KEY": "key", "STEELYARD_HOME": str(folder / "home")},
        )
    assert "Steelyard serves" not in capfd.readouterr().out
