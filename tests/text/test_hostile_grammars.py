"""Hostile schemas, patterns and grammars are refused in a line, or read, within their limits; the next one is read."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from hostile_grammars import Read, payloads
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from steelyard.errors import EngineUnavailableError, RequestError
from steelyard.text import grammar
from steelyard.text.grammar_worker import LIMITS
from steelyard.text.tokenizer import Tokenizer

HOSTILE = dict(payloads())
TICKS = os.sysconf("SC_CLK_TCK")
PLAIN = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer_folder: Path) -> LLTokenizer:
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)
    return LLTokenizer(tokenizer.serialized, n_vocab=tokenizer.vocabulary, eos_token=sorted(tokenizer.eos_ids))


@pytest.fixture(autouse=True)
def unknown() -> None:
    """Nothing is known from before."""
    grammar._known.cache_clear()


def outcome(read: Read) -> str | RequestError:
    """What was read, or why not."""
    try:
        return read()
    except RequestError as error:
        return error


def spent() -> float:
    """Seconds of the worker, and of those before it."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    fields = Path(f"/proc/{grammar._WORKER.start().pid}/stat").read_text().rsplit(")", 1)[1].split()
    return ended.ru_utime + ended.ru_stime + (int(fields[11]) + int(fields[12])) / TICKS


def test_there_are_a_hundred() -> None:
    assert len(HOSTILE) >= 100


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_bounded(name: str, vocabulary: LLTokenizer) -> None:
    """Its check, and what an engine does of what passes: compile it, and say what may come first."""
    before = spent()
    found = outcome(HOSTILE[name])
    assert spent() - before < 1.5  # a worker that was ended has a successor, which starts
    assert grammar.of_schema(PLAIN, "plain")
    if isinstance(found, RequestError):
        assert found.param == "given"
        assert "\n" not in str(found)
        assert len(str(found)) < 400
    else:
        matcher = LLMatcher(vocabulary, found, log_level=0, limits=LIMITS)
        mask = allocate_token_bitmask(1, vocabulary.vocab_size)
        with suppress(ValueError):
            fill_next_token_bitmask(matcher, mask)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rules: 1000 terminals within", "is too much: what checks it took over 100 ms; make it simpler"),
        ("rules: 3000 after each other", "is too much: what checks it ended its worker"),
        ("schema: items 20000 deep", "is nested too deeply"),
        ("pattern: half open", "is nothing that an answer can be held to"),
    ],
)
def test_each_is_told_what_it_did(name: str, reason: str) -> None:
    found = outcome(HOSTILE[name])
    assert isinstance(found, RequestError)
    assert reason in str(found)


def test_most_that_is_only_large_is_read() -> None:
    """A limit that refuses everything would be none."""
    read = [name for name in HOSTILE if isinstance(outcome(HOSTILE[name]), str)]
    assert len(read) > 50
    assert {"schema: 1000 properties", "schema: enum of 1000", "pattern: 100 parentheses"} <= {*read}


def test_what_this_machine_did_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed from outside, late for want of a processor, not there at all: to be tried again."""
    grammar.of_schema(PLAIN, "plain")
    worker = grammar._WORKER.start()
    os.kill(worker.pid, signal.SIGSTOP)
    monkeypatch.setattr("steelyard.text.worker_process.WALL_SECONDS", 0.2)
    with pytest.raises(EngineUnavailableError, match="what checks 'given' did not answer in time: try again"):
        grammar.of_pattern("a", "given")
    monkeypatch.undo()
    grammar.of_pattern("ab", "given")
    monkeypatch.setattr(grammar._WORKER, "_module", "steelyard.text.nothing")
    grammar._WORKER.stop()
    with pytest.raises(EngineUnavailableError, match="does not start"):
        grammar.of_pattern("abc", "given")
    monkeypatch.undo()
    assert grammar.of_pattern("abc", "given")


def test_what_passed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same again asks nobody; what is refused is asked again."""
    first = grammar.of_schema(PLAIN, "plain")
    exchange, asked = grammar._WORKER.exchange, []

    def counted(content: bytes, count: int = 1) -> object:
        asked.append(content)
        return exchange(content, count)

    monkeypatch.setattr(grammar._WORKER, "exchange", counted)
    assert grammar.of_schema(PLAIN, "plain") == first
    assert not asked
    for _ in range(2):
        with pytest.raises(RequestError):
            grammar.of_pattern("(", "pattern")
    assert len(asked) == 2


def test_the_worker_is_confined() -> None:
    grammar.of_schema(PLAIN, "plain")
    process = Path(f"/proc/{grammar._WORKER.start().pid}")
    limits = {line[:25].strip(): line[26:].split()[0] for line in (process / "limits").read_text().splitlines()}
    names = ("Max open files", "Max processes", "Max file size", "Max stack size")
    assert [limits[name] for name in names] == ["3", "0", "0", str(1 << 20)]
    size = int((process / "statm").read_text().split()[0]) * resource.getpagesize()
    assert int(limits["Max address space"]) <= size + grammar.MEMORY
    assert len(list((process / "task").iterdir())) == 1
