"""The engine of models that hear: whose turn it is, what a canary waits for, aborts in the middle, failures alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spoken import tiny_whisper
from steelyard.errors import CheckpointError, RequestError
from steelyard.infer import transcription
from steelyard.infer.hearing import CharacterHearer, Transcript, WhisperHearer
from steelyard.infer.hearing_engine import HearingEngine
from steelyard.infer.request import Aborted, Failure, Output, Request
from steelyard.infer.sound import Heard, Hearing, Hears, most_written, sound_tokens
from steelyard.infer.transcription import Transcriber
from steelyard.models.seq2seq import WhisperConfig
from steelyard.models.speech import Recogniser, SpeechCTC

HEARS = Hears(piece=16_000, written=10, languages=["en"], prompts=True, words=True)


SIZES = WhisperConfig(
    vocab_size=5,
    d_model=8,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=1,
    decoder_attention_heads=1,
    encoder_ffn_dim=8,
    decoder_ffn_dim=8,
)


def sound(samples: int, value: float = 0.0) -> bytes:
    return np.full(samples, value, np.float32).tobytes()


class StandIn:
    """Hears a token at each of five steps; a piece whose first sample is 9 fails."""

    hears = HEARS

    def __init__(self) -> None:
        self.passes: list[int] = []
        self.sung = 0

    def size(self, samples: int) -> float:
        return 1 / 4

    def hear(self, sounds: Sequence[torch.Tensor], hearing: Hearing) -> Any:
        self.passes.append(len(sounds))
        for step in range(5):
            yield [step] * len(sounds)
            if step == 2 and any(float(one[0]) == 9 for one in sounds):
                raise IndexError("index out of range")
        heard = Heard(average_logprob=0.0, no_speech=0.0)
        for number, one in enumerate(sounds):
            yield number, Transcript(f" {len(one)}", [1] * 5, 5, 0, heard)

    def canary(self) -> None:
        self.sung += 1


def request(id: str, samples: int = 1600, value: float = 0.0, project: str = "", **hearing: Any) -> Request:
    return Request(id=id, prompt=[], sound=sound(samples, value), project=project, hearing=Hearing(**hearing))


def run(engine: HearingEngine) -> dict[str, Output | Failure]:
    found: dict[str, Output | Failure] = {}
    while engine.busy:
        found |= {one.id: one for one in engine.step()}
    engine.check_integrity()
    return found


def test_pieces_that_are_heard_alike_are_heard_together() -> None:
    hearer = StandIn()
    engine = HearingEngine(hearer)
    for number in range(6):
        engine.add(request(str(number), beam=2 if number == 3 else 1))
    found = run(engine)
    assert hearer.passes == [4, 1, 1]
    assert all(isinstance(one, Output) and one.completion_tokens == 5 for one in found.values())
    assert engine.stats().prompt_tokens == 6
    assert engine.stats().generated_tokens == 30


def test_projects_take_turns() -> None:
    hearer = StandIn()
    engine = HearingEngine(hearer)
    for number in range(12):
        engine.add(request(f"busy-{number}", 16_000, project="busy", language="en"))
    for _ in range(6):
        engine.step()
    engine.add(request("quiet-0", project="quiet"))
    order = list(run(engine))
    assert order.index("quiet-0") < order.index("busy-11")


def test_a_canary_waits_for_a_step_at_most() -> None:
    hearer = StandIn()
    engine = HearingEngine(hearer)
    engine.add(request("long"))
    assert engine.step() == []
    engine.add(Request(id="canary", prompt=[0], counted=False))
    (said,) = engine.step()
    assert (said.id, hearer.sung) == ("canary", 1)
    assert engine.stats().running == 1
    run(engine)


def test_an_abort_in_the_middle_says_what_it_came_to() -> None:
    hearer = StandIn()
    engine = HearingEngine(hearer)
    engine.add(request("a", 4000))
    engine.add(request("b"))
    engine.add(request("c", beam=3))
    for _ in range(3):
        engine.step()
    assert engine.abort("c") == Aborted(id="c", prompt_tokens=0, cached_tokens=0, completion_tokens=[])
    assert engine.abort("a") == Aborted(id="a", prompt_tokens=3, cached_tokens=0, completion_tokens=[2])
    assert engine.abort("a") is None
    assert list(run(engine)) == ["b"]
    engine.add(request("d"))
    engine.step()
    engine.abort("d")
    assert not engine.busy, "of a pass that nobody waits for nothing more is done"
    engine.check_integrity()


def test_one_that_cannot_be_heard_leaves_others_alone() -> None:
    engine = HearingEngine(StandIn())
    for number, value in enumerate((0.0, 9.0, 0.5)):
        engine.add(request(str(number), value=value))
    for _ in range(4):
        engine.step()
    engine.add(request("3"))  # while those before are heard again
    found = run(engine)
    assert isinstance(found["3"], Output)
    assert [type(found[id]) for id in "012"] == [Output, Failure, Output]
    assert found["1"].param == "file"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (Request(id="x", prompt=[1]), "model"),
        (Request(id="x", prompt=[], sound=sound(16_001)), "file"),
        (Request(id="x", prompt=[], sound=b"abc"), "file"),
        (Request(id="x", prompt=[], sound=sound(10, np.nan)), "file"),
        (Request(id="x", prompt=[], sound=sound(10), adapter="a"), "model"),
        (Request(id="x", prompt=[], sound=sound(10), hearing=Hearing(language="xx")), "language"),
        (Request(id="x", prompt=[], sound=sound(10), hearing=Hearing(beam=65)), "beam_width"),
    ],
)
def test_what_it_does_not_hear_is_refused(asked: Request, param: str) -> None:
    engine = HearingEngine(StandIn())
    with pytest.raises(RequestError) as refused:
        engine.add(asked)
    assert refused.value.param == param
    assert not engine.busy


def test_a_piece_that_is_done_does_not_wait_for_others(transcriber: Transcriber) -> None:
    """Of random weights: those that come to an end at different tokens."""
    sounds = [torch.randn(6000 * number, generator=torch.Generator().manual_seed(number)) for number in range(1, 7)]
    steps = list(transcription.hear(transcriber, sounds))
    ended = [(number, told[1].drawn) for number, told in enumerate(steps) if isinstance(told, tuple)]
    assert len(ended) == 6
    assert [drawn for _, drawn in ended] == sorted(drawn for _, drawn in ended)


def test_no_transcript_is_longer_than_what_is_reserved_for_it() -> None:
    """Of a recogniser: a character at every place, of pieces of any length."""
    recogniser = Recogniser(SpeechCTC(SIZES, 2), ("a", "b"))
    hearer = CharacterHearer(recogniser)
    for samples in (0, 1, 159, 160, 161, 640, 1599, 1600, 1601, 3200, 7999, 16_001, 480_000):
        places = (recogniser.features(torch.zeros(samples)).shape[-1] + 1) // 2
        assert places <= most_written(hearer.hears, samples)


def test_nothing_is_a_token_too() -> None:
    assert [sound_tokens(samples) for samples in (0, 1, 1600, 1601, 480_000)] == [1, 1, 1, 2, 300]


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Transcriber:
    return Transcriber.load(tiny_whisper(tmp_path_factory.mktemp("whisper") / "tiny", tiny_tokenizer_folder))


@pytest.mark.parametrize("beam", [1, 3])
def test_a_whisper_says_the_same_alone_and_beside_others(transcriber: Transcriber, beam: int) -> None:
    sounds = [torch.randn(4000 * number, generator=torch.Generator().manual_seed(number)) for number in (1, 2, 3)]
    engine = HearingEngine(WhisperHearer(transcriber))
    for number, one in enumerate(sounds):
        content = one.numpy().tobytes()
        engine.add(Request(id=str(number), prompt=[], sound=content, hearing=Hearing(beam=beam)))
    found = run(engine)
    alone = transcription.transcribe(transcriber, sounds, beam=beam)
    for number, text in enumerate(alone):
        one = found[str(number)]
        assert isinstance(one, Output)
        assert one.text.strip() == text
        assert one.heard is not None
        assert one.heard.average_logprob < 0
        most = transcriber.network.config.max_target_positions * beam
        assert 0 < one.completion_tokens + one.rejected_tokens <= most


def test_a_long_prompt_leaves_room_for_the_transcript(transcriber: Transcriber) -> None:
    start = transcriber.start_of(Hearing(prompt="weigh " * 100))
    assert len(start) == transcriber.network.config.max_target_positions // 2 + len(transcriber.start)
    assert transcriber.start_of(Hearing(language="de"))[1] != transcriber.start[1]


def test_broken_weights_are_found_by_the_canary(transcriber: Transcriber) -> None:
    hearer = WhisperHearer(transcriber)
    hearer.canary()
    weight = transcriber.network.model.decoder.layer_norm.weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(CheckpointError, match="not finite"):
            hearer.canary()
    finally:
        with torch.no_grad():
            weight.copy_(kept)
