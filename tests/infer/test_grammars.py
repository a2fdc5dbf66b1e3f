"""Answers that are what a grammar says, whatever is drawn: with guesses, beams, others, and where all is forced."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.errors import RequestError
from steelyard.infer.engine import Engine, EngineConfig
from steelyard.infer.grammars import Grammars, State
from steelyard.infer.request import Beam, Failure, Output, Request, Sampling
from steelyard.stages.compress import quantize
from steelyard.text import grammar
from steelyard.text.tokenizer import Tokenizer
from steelyard.text.tool_calls import Arguments, Begun, CallReader

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["ham", "spam"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 99},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
    },
    "required": ["kind", "score", "words"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def int8(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("constrained") / "int8"
    quantize(tiny_model, folder, QuantizeConfig(), accept=True)
    return folder


def asked(number: int, rules: str, **fields: Any) -> Request:
    n, beam = fields.pop("n", 1), fields.pop("beam", None)
    sampling = Sampling(**{"max_tokens": 120, "seed": number, **fields})
    return Request(id=str(number), prompt=[5, 6, 7 + number], grammar=rules, sampling=sampling, n=n, beam=beam)


def texts(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], tuple[str, str]]:
    """Of each choice its text and why it ended."""
    found: dict[tuple[str, int], tuple[str, str]] = {}
    for output in engine.run(requests):
        key = output.id, output.choice
        text, _ = found.get(key, ("", ""))
        found[key] = text + output.text, output.finish_reason or ""
    assert engine.pool.available == engine.pool.blocks
    engine.check_integrity()
    return found


def holds(text: str) -> bool:
    row = json.loads(text)
    short = all(isinstance(word, str) and len(word) <= 4 for word in row["words"])
    whole = list(row) == ["kind", "score", "words"] and row["kind"] in ("ham", "spam")
    return whole and 0 <= row["score"] <= 99 and short and len(row["words"]) <= 3


@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(token_budget=40, max_running=3, speculate="off")])
def test_json_of_a_schema(int8: Path, config: EngineConfig) -> None:
    """By a model that was never trained, drawn at random; alone and beside others, guessed ahead or not: the same."""
    rules = grammar.of_schema(SCHEMA, "response_format")
    engine = Engine.load(int8, config=config)
    found = texts(engine, [asked(number, rules, n=2) for number in range(12)])
    ended = [text for text, reason in found.values() if reason == "stop"]
    assert len(ended) >= 20
    assert all(map(holds, ended))
    assert len(set(ended)) > 15
    alone = texts(Engine.load(int8, config=EngineConfig(reuse=False)), [asked(3, rules, n=2)])
    assert all(found[key] == value for key, value in alone.items())


def test_what_is_forced_is_not_drawn(int8: Path) -> None:
    """Fewer steps than tokens, and the same text where each is drawn because log-probabilities are wanted."""
    rules = grammar.of_choice(["the steelyard weighs exactly what it is given", "nothing"], "choice")
    engine = Engine.load(int8, config=EngineConfig(speculate="off"))
    bias = dict.fromkeys(engine.tokenizer.encode_plain("the")[:1], 50.0)
    (text, reason) = texts(engine, [asked(0, rules, logit_bias=bias)])["0", 0]
    assert (text, reason) == ("the steelyard weighs exactly what it is given", "stop")
    stats = engine.stats()
    assert stats.steps <= 3 < stats.generated_tokens
    other = Engine.load(int8)
    outputs = list(other.run([asked(1, rules, logit_bias=bias, logprobs=2)]))
    assert "".join(output.text for output in outputs) == text
    logprobs = [one for output in outputs for one in output.logprobs or []]
    assert len(logprobs) == sum(len(output.tokens) for output in outputs)
    assert all(one.logprob < 0 for one in logprobs)  # the model's own, whatever was allowed


@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[0-9]{4}", r"(ab|cd)+e", r"[A-Z][a-z]{2,5}\.", r"\$\d{1,3}(,\d{3})*"])
def test_what_a_pattern_matches(int8: Path, pattern: str) -> None:
    rules = grammar.of_pattern(pattern, "regex")
    found = texts(Engine.load(int8), [asked(number, rules) for number in range(6)])
    ended = [text for text, reason in found.values() if reason == "stop"]
    assert ended
    assert all(re.fullmatch(pattern, text) for text in ended)


def test_choices_have_all_characters(int8: Path) -> None:
    choices = ['a"b', "line\nbreak", "Grüße 😀", r"\d", "{}", "<|im_end|>"]
    rules = grammar.of_choice(choices, "choice")
    found = {text for text, _ in texts(Engine.load(int8), [asked(number, rules) for number in range(40)]).values()}
    assert found <= set(choices)
    assert len(found) >= 4


def test_rules(int8: Path) -> None:
    rules = grammar.of_rules('start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]?/', "grammar")
    found = texts(Engine.load(int8), [asked(number, rules) for number in range(6)])
    ended = [text for text, reason in found.values() if reason == "stop"]
    assert ended
    assert all(re.fullmatch(r"[1-9]\d?(\+[1-9]\d?)*", text) for text in ended)


def test_beams_within_a_grammar(tiny_model: Path) -> None:
    """Against all that can be said: the likeliest choices by the sum of their tokens' log-probabilities."""
    engine = Engine.load(tiny_model, dtype=torch.float32)
    choices = ["yes", "no", "maybe so", "never", "I do not know"]
    rules = grammar.of_choice(choices, "choice")
    beam = Beam(width=40, length_penalty=0.0, early_stopping="never")
    outputs = list(engine.run([asked(0, rules, temperature=0, beam=beam, n=5)]))
    said = {output.text: output for output in reversed(outputs) if output.tokens}  # the best way to spell each
    assert set(said) == set(choices)
    for output in said.values():
        scored = list(
            engine.run(
                [
                    Request(
                        id="again",
                        prompt=[5, 6, 7, *output.tokens],
                        sampling=Sampling(max_tokens=0, prompt_logprobs=0),
                    )
                ]
            )
        )
        known = [one.logprob for each in scored for one in each.prompt_logprobs or []][2:]
        assert output.score == pytest.approx(sum(known), abs=1e-3)


def test_what_is_no_grammar_is_refused(tiny_model: Path) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(400):
        deep = {"items": deep}
    for make in (
        lambda: grammar.of_schema({"type": "string", "contentEncoding": "x", "not": {}}, "response_format"),
        lambda: grammar.of_pattern("(?=a)b", "response_format"),
        lambda: grammar.of_pattern("(", "response_format"),
        lambda: grammar.of_rules("start: nothing", "response_format"),
        lambda: grammar.of_pattern("a" * 100_000, "response_format"),
        lambda: grammar.of_schema(deep, "response_format"),
    ):
        with pytest.raises(RequestError, match="response_format"):
            make()
    with pytest.raises(RequestError, match='"not"'):
        grammar.of_schema({"not": {"type": "string"}}, "response_format")
    engine = Engine.load(tiny_model)
    with pytest.raises(RequestError, match="does not compile"):
        engine.add(asked(0, "start: nothing"))
    assert not engine.busy


def test_few_compiled_grammars_are_kept(tiny_model: Path) -> None:
    grammars = Grammars(Tokenizer.load(tiny_model), 512)
    first = grammar.of_choice(["first"], "choice")
    for number in range(100):
        grammars.begin(grammar.of_choice([str(number)], "choice"))
        grammars.begin(first)
    assert len(grammars._known) == 64
    assert first in grammars._known


def test_an_output_is_whole(int8: Path) -> None:
    """Tokens of outputs are those of the text, forced ones among them."""
    engine = Engine.load(int8)
    outputs: list[Output] = list(engine.run([asked(0, grammar.of_schema(SCHEMA, "x"))]))
    tokens = [token for output in outputs for token in output.tokens]
    assert engine.tokenizer.decode(tokens) == "".join(output.text for output in outputs)
    assert outputs[-1].completion_tokens == len(tokens)


def test_calls_of_tools(int8: Path) -> None:
    """At random, by a model that was never trained: text or calls, whose arguments are what their schemas say."""
    place = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    place["additionalProperties"] = False
    count = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 5}}, "required": ["n"]}
    count["additionalProperties"] = False
    tools = [("weather", place, "tools[0]"), ("count", count, "tools[1]")]
    engine = Engine.load(int8)
    either = grammar.of_calls(tools, text=False, several=True, param="tools")
    begins = engine.tokenizer.encode_plain("<")[0]
    found = texts(engine, [asked(number, either) for number in range(20)])
    auto = grammar.of_calls(tools, text=True, several=False, param="tools")
    found |= {
        (f"auto {id}", 0): value
        for (id, _), value in texts(
            engine, [asked(number, auto, logit_bias={begins: 3.0}) for number in range(30)]
        ).items()
    }
    called = 0
    for (id, _), (text, reason) in found.items():
        reader, calls = CallReader(), list[list[str]]()
        for piece in reader.push(text):
            if isinstance(piece, Begun):
                calls.append([piece.name, ""])
            elif isinstance(piece, Arguments):
                calls[piece.number][1] += piece.text
        if reason != "stop":
            continue
        assert reader.whole == len(calls), text
        assert calls or id.startswith("auto")
        for name, given in calls:
            called += 1
            row = json.loads(given)
            assert row in ({"city": "Rome"}, {"city": "Oslo"}) if name == "weather" else row["n"] in range(1, 6)
    assert called >= 10


def test_what_would_end_its_reader_is_refused() -> None:
    """The library follows rules by recursion: thousands in a row end the process, which is a worker."""
    chain = "start: a0\n" + "\n".join(f"a{n}: a{n + 1}" for n in range(4000)) + '\na4000: "x"'
    with pytest.raises(RequestError, match="is too much: what checks it ended its worker"):
        grammar.of_rules(chain, "structured_outputs.grammar")
    short = "start: a0\n" + "\n".join(f"a{n}: a{n + 1}" for n in range(250)) + '\na250: "x"'
    assert grammar.of_rules(short, "structured_outputs.grammar")


def test_choices_of_any_character(int8: Path) -> None:
    choices = ["".join(map(chr, range(first, first + 16))) for first in (0, 0x70, 0x2020, 0xFF00, 0x1F600)]
    rules = grammar.of_choice(choices, "choice")
    found = texts(Engine.load(int8), [asked(number, rules) for number in range(20)])
    assert {text for text, reason in found.values() if reason == "stop"} <= set(choices)


def test_fewer_ways_than_are_asked_for(tiny_model: Path) -> None:
    """Beams within a grammar of two texts: three are refused by name."""
    engine = Engine.load(tiny_model, dtype=torch.float32)
    rules = grammar.of_pattern("[xy]", "regex")
    request = asked(0, rules, temperature=0, beam=Beam(width=8, early_stopping="never"), n=8)
    with pytest.raises(RequestError, match="continuations are possible here") as caught:
        list(engine.run([request]))
    assert caught.value.param == "n"
    assert not engine.busy


def test_ceilings(tiny_model: Path) -> None:
    """Infinite where a token may come next; of more tokens than a tokenizer has none of the others."""
    tokenizer = Tokenizer.load(tiny_model)
    state = Grammars(tokenizer, 600).begin(grammar.of_pattern("ab?", "regex"))
    a, b, c = (tokenizer.encode_plain(text)[0] for text in "abc")
    first, second = state.after([a, c, b])  # c is not allowed after a: as far as that
    assert first.dtype == np.float32
    assert first.shape == (600,)
    assert first[a] == np.inf
    assert first[b] == first[599] == second[a] == np.float32(-1e9)
    assert second[b] == np.inf
    assert set(np.unique([first, second])) == {np.float32(-1e9), np.inf}
    assert np.array_equal(state.ceiling(), first)  # guesses leave no trace


def test_ceilings_are_found_while_the_model_computes(int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(int8)
    after, run, found, threads = State.after, engine.runner.run, threading.Event(), set[str]()

    def noticed(state: State, drafts: Any) -> Any:
        threads.add(threading.current_thread().name)
        try:
            return after(state, drafts)
        finally:
            found.set()

    def slow(batch: Any) -> torch.Tensor:
        assert found.wait(30)
        found.clear()
        return run(batch)

    monkeypatch.setattr(State, "after", noticed)
    monkeypatch.setattr(engine.runner, "run", slow)
    rules = grammar.of_schema(SCHEMA, "response_format")
    assert texts(engine, [asked(0, rules)])
    assert threading.current_thread().name not in threads


def test_a_grammar_that_is_too_long_to_follow(int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(int8)
    monkeypatch.setattr(State, "broken", True)
    request = asked(0, grammar.of_schema(SCHEMA, "tools"))
    engine.add(msgspec.structs.replace(request, grammar_field="tools"))
    (failure,) = engine.step()
    assert isinstance(failure, Failure)
    assert failure.param == "tools"
    assert not engine.busy


def test_beams_say_different_texts(tiny_model: Path) -> None:
    """Each text once, however many ways there are to spell it; the likeliest first."""
    engine = Engine.load(tiny_model, dtype=torch.float32)
    words = ["yes", "no", "maybe", "not now"]
    for groups in (1, 2):
        beam = Beam(width=8, groups=groups, early_stopping="never")
        request = asked(0, grammar.of_choice(words, "choice"), temperature=0, beam=beam, n=4)
        outputs = list(engine.run([request]))
        assert sorted(output.text for output in outputs) == sorted(words)
        scores = [output.score for output in outputs]
        assert scores == sorted(scores, key=lambda score: -(score or 0.0))
    narrow = asked(0, grammar.of_choice(words, "choice"), temperature=0, beam=Beam(width=3), n=3)
    assert len({output.text for output in engine.run([narrow])}) == 3


def test_too_few_texts_are_filled_up(tiny_model: Path) -> None:
    """Where a narrow search finds one text alone, other ways to spell it come after it: never fewer than before."""
    engine = Engine.load(tiny_model, dtype=torch.float32)
    rules, counts = grammar.of_choice(["alpha", "beta"], "choice"), []
    for number in range(8):
        request = asked(number, rules, temperature=0, beam=Beam(width=2), n=2)
        outputs = list(engine.run([request]))
        assert {output.text for output in outputs} <= {"alpha", "beta"}
        counts.append(len({output.text for output in outputs}))
        assert len({tuple(output.tokens) for output in outputs}) == 2
    assert 2 in counts
