"""`/v1/audio/transcriptions` over real recognisers: what `steelyard predict` says, in every shape, paid for."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import soundfile
from openai.types.audio import Transcription, TranscriptionVerbose
from openai.types.audio.transcription_create_params import TranscriptionCreateParamsBase
from running_service import Service, eventually, serving

from spoken import sound_file, spoken, tiny_whisper, write_clips
from steelyard.serve.billing.prices import Price, newest, publish
from steelyard.serve.engine_client import worker_command
from steelyard.serve.protocol.transcriptions import FORM, UNSUPPORTED, TranscriptionRequest

URL = "/v1/audio/transcriptions"
INPUT, OUTPUT = 7, 3
"""Nano-dollars of a tenth of a second, and of a character or token."""


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from steelyard.stages.train import train
    from steelyard.train.config import DataConfig, TrainConfig
    from steelyard.train.networks import SpeechNetwork
    from steelyard.train.optimizers import OptimizerConfig

    folder = tmp_path_factory.mktemp("recogniser")
    clips = write_clips(folder / "clips", 80, 0)
    lines = [json.loads(line) for line in clips.read_text().splitlines()]
    for number, words in enumerate(("ab ca", "c b", "bb a c", "a b", "cc ab")):  # and what a space is
        soundfile.write(folder / "clips" / f"words{number}.wav", spoken(words), 8000)
        lines.append({"audio": f"words{number}.wav", "text": words})
    clips.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainConfig(
        task="transcription",
        network=SpeechNetwork(hidden=32, layers=1, heads=2, dropout=0.0),
        output=str(folder / "run"),
        data=DataConfig(train=str(clips), holdout=15),
        epochs=25,
        optimizer=OptimizerConfig(name="adamw", learning_rate=5e-3),
    )
    shutil.copytree(str(train(config).path), folder / "tones")
    return folder / "tones"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    return tiny_whisper(tmp_path_factory.mktemp("whisper") / "whisper", tiny_tokenizer_folder)


@pytest.fixture(scope="module")
def tones(recogniser: Path) -> Iterator[Service]:
    with serving(recogniser, command=worker_command, seconds=60) as service:
        service.behind.database.write_now(
            lambda connection: publish(connection, {"*": Price(input=INPUT, output=OUTPUT)}, 1)
        )
        service.behind.prices = service.behind.database.read_now(newest)
        yield service


@pytest.fixture(scope="module")
def whispers(whisper: Path) -> Iterator[Service]:
    with serving(whisper, command=worker_command, seconds=60) as service:
        yield service


def predicted(model: Path, content: bytes, folder: Path, beam: int = 1) -> str:
    """What `steelyard predict` says of a recording."""
    from steelyard.data.chat import FormatConfig
    from steelyard.stages.predict import predict

    folder.mkdir(exist_ok=True)
    (folder / "a.wav").write_bytes(content)
    (folder / "list.jsonl").write_text('{"audio": "a.wav"}\n')
    predict(model, folder / "list.jsonl", folder / "out.jsonl", FormatConfig(), beam=beam)
    text: str = json.loads((folder / "out.jsonl").read_text())["prediction"]
    return text


def words(count: int, seed: int = 3) -> Any:
    draw = np.random.default_rng(seed)
    said = ["".join(draw.choice(list("abc"), draw.integers(1, 5))) for _ in range(count)]
    return np.concatenate([spoken(word) for word in said])


def aligned(model: Path, content: bytes, piece: int) -> list[tuple[str, float, float]]:
    """When each word of a piece is said, by the recogniser itself."""
    import torch

    from steelyard.data.sound import pieces
    from steelyard.infer import recognition
    from steelyard.models import speech

    loaded = speech.load(model)
    features = loaded.pieces(torch.from_numpy(np.concatenate(list(pieces(io.BytesIO(content))))))[piece]
    (logits,) = speech.logits_of(loaded, [features])
    found = recognition.words(loaded, logits, speech.greedy(logits, loaded.vocabulary), 30.0 * piece)
    return [(word.word, word.start, word.end) for word in found]


def send(service: Service, content: bytes, **fields: Any) -> httpx.Response:
    model = next(iter(service.models))
    with service.http() as http:
        return http.post(URL, data={"model": model, **fields}, files={"file": ("a.wav", content)}, timeout=60)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_the_text_is_what_predict_says(tones: Service, whispers: Service, kind: str, tmp_path: Path) -> None:
    content = sound_file(words(3), kind)
    for service in (tones, whispers):
        client = service.sdk(_strict_response_validation=True)
        expected = predicted(service.checkpoint, content, tmp_path / "out")
        made = client.audio.transcriptions.create(model=next(iter(service.models)), file=("a", content))
        assert made.text == expected
        assert isinstance(made, Transcription)
        assert expected


def test_what_is_heard_is_what_was_said(tones: Service) -> None:
    made = tones.sdk().audio.transcriptions.create(model="tones", file=("a.wav", sound_file(spoken("abca"))))
    assert made.text == "abca"


@pytest.mark.parametrize("beam", [None, 1, 8])
def test_beams_are_those_of_predict(tones: Service, whispers: Service, beam: int | None, tmp_path: Path) -> None:
    content = sound_file(words(2, seed=9))
    for service in (tones, whispers):
        expected = predicted(service.checkpoint, content, tmp_path / "out", beam or 4)
        fields = {"use_beam_search": "true", **({} if beam is None else {"beam_width": str(beam)})}
        made = service.sdk().audio.transcriptions.create(
            model=next(iter(service.models)), file=("a.wav", content), extra_body=fields
        )
        assert made.text == expected


def test_words_and_segments_have_their_times(tones: Service) -> None:
    """Of a recording of three pieces; words are where they were said."""
    quiet = np.zeros(8000 * 32)
    quiet[: len(spoken("ab"))] = spoken("ab")
    content = sound_file(np.concatenate([quiet, spoken("cab"), quiet]))
    client = tones.sdk(_strict_response_validation=True)
    made = client.audio.transcriptions.create(
        model="tones",
        file=("a.wav", content),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert isinstance(made, TranscriptionVerbose)
    assert made.text == "ab cab ab"
    assert made.words is not None
    assert made.segments is not None
    assert [word.word for word in made.words] == ["ab", "cab", "ab"]
    expected = [word for piece in range(3) for word in aligned(tones.checkpoint, content, piece)]
    assert [(word.word, word.start, word.end) for word in made.words] == expected
    assert made.words[0].start < made.words[1].start < made.words[2].start
    assert made.words[0].start < 1
    assert [segment.start for segment in made.segments] == [0, 30, 60]
    assert made.segments[-1].end == pytest.approx(made.duration, abs=1e-3)
    assert "".join(segment.text for segment in made.segments).strip() == made.text
    assert [segment.seek for segment in made.segments] == [0, 3000, 6000]
    assert all(segment.avg_logprob <= 0 <= segment.no_speech_prob <= 1 for segment in made.segments)
    assert made.usage is not None
    assert made.usage.seconds == pytest.approx(made.duration, abs=0.2)
    plain = client.audio.transcriptions.create(model="tones", file=("a.wav", content), response_format="verbose_json")
    assert plain.words is None
    assert plain.segments is not None
    for one, other in zip(plain.segments, made.segments, strict=True):
        assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-3)
        assert (one.text, one.tokens, one.start, one.end) == (other.text, other.tokens, other.start, other.end)
    alone = client.audio.transcriptions.create(
        model="tones", file=("a.wav", content), response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert alone.segments is None
    assert alone.words == made.words


def test_texts_and_subtitles(tones: Service, whispers: Service) -> None:
    content = sound_file(np.concatenate([spoken("ab"), np.zeros(8000), spoken("ca")]))
    client = tones.sdk()
    text: Any = client.audio.transcriptions.create(model="tones", file=("a.wav", content), response_format="text")
    srt: Any = client.audio.transcriptions.create(model="tones", file=("a.wav", content), response_format="srt")
    vtt: Any = client.audio.transcriptions.create(model="tones", file=("a.wav", content), response_format="vtt")
    assert text == "ab ca\n" or text == "abca\n"
    assert srt.startswith("1\n00:00:00,")
    assert " --> 00:00:00," in srt
    assert vtt.startswith("WEBVTT\n\n00:00:00.")
    assert [line for line in srt.splitlines() if line and set(line) <= set("abc ")] == [
        line for line in vtt.splitlines() if line and set(line) <= set("abc ")
    ]
    answer = send(whispers, content, response_format="vtt")
    assert answer.headers["content-type"].startswith("text/vtt")
    assert "00:00:00.000 --> 00:00:0" in answer.text


@pytest.mark.parametrize("kind", ["tones", "whispers"])
def test_a_stream_is_told_piece_by_piece(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """More pieces than are asked for at once."""
    service = request.getfixturevalue(kind)
    model = next(iter(service.models))
    content = sound_file(np.tile(np.concatenate([words(8), np.zeros(16_000)]), 60)[: 8000 * 275], "FLAC")
    client = service.sdk(_strict_response_validation=True)
    whole = client.audio.transcriptions.create(model=model, file=("a.flac", content))
    events = list(client.audio.transcriptions.create(model=model, file=("a.flac", content), stream=True))
    *deltas, done = events
    assert [event.type for event in deltas] == ["transcript.text.delta"] * 10
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text == whole.text
    assert done.text == predicted(service.checkpoint, content, tmp_path / "out")
    assert done.usage.to_dict() == whole.usage.to_dict()
    assert done.usage.input_tokens == 2750


def test_the_sdks_other_ways(tones: Service) -> None:
    content = sound_file(spoken("abc"))
    with tones.sdk().audio.transcriptions.with_streaming_response.create(
        model="tones", file=("a.wav", content), response_format="verbose_json"
    ) as response:
        assert response.parse().text == "abc"
    raw = tones.sdk().audio.transcriptions.with_raw_response.create(model="tones", file=io.BytesIO(content))
    assert raw.parse().text == "abc"
    assert raw.headers["x-request-id"].startswith("req_")


def test_what_is_billed_is_what_is_told(tones: Service) -> None:
    before, seconds = _spent(tones), _seconds(tones)
    content = sound_file(words(4))
    made: Any = tones.sdk().audio.transcriptions.create(model="tones", file=("a.wav", content))
    length = len(words(4)) / 8000
    assert made.usage.type == "tokens"
    assert made.usage.input_tokens == made.usage.input_token_details.audio_tokens == int(-(-length // 0.1))
    assert made.usage.output_tokens == len(made.text)
    cost = INPUT * made.usage.input_tokens + OUTPUT * made.usage.output_tokens
    assert made.usage.cost == pytest.approx(cost / 1e9)
    assert _spent(tones) - before == cost
    assert _seconds(tones) - seconds == pytest.approx(length, abs=1.1)


def test_who_leaves_pays_for_what_was_heard(tones: Service) -> None:
    before = _spent(tones)
    content = sound_file(np.tile(words(8), 60)[: 8000 * 600], "FLAC")
    with (
        tones.http() as http,
        http.stream("POST", URL, data={"model": "tones", "stream": "true"}, files={"file": ("a", content)}) as answer,
    ):
        assert "delta" in next(answer.iter_lines())
    eventually(lambda: tones.behind.metering.open == 0, 10)
    eventually(lambda: not tones.engine.stats.waiting and not tones.engine.stats.running, 10)
    assert INPUT * 300 <= _spent(tones) - before < INPUT * 6000
    eventually(lambda: not tones.behind.sounds._held)


def test_an_engine_that_dies_meanwhile(tones: Service) -> None:
    """Who waits is told, what was heard is settled, and the next one is heard."""
    import os
    import signal

    content = sound_file(np.tile(words(8), 60)[: 8000 * 600], "FLAC")
    with (
        tones.http() as http,
        http.stream("POST", URL, data={"model": "tones", "stream": "true"}, files={"file": ("a", content)}) as answer,
    ):
        lines = answer.iter_lines()
        assert "delta" in next(lines)
        os.kill(tones.engine.pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    eventually(lambda: tones.engine.ready, 60)  # before anything may fail: the other tests use it, too
    assert "engine_unavailable" in rest[-1]
    eventually(lambda: tones.behind.metering.open == 0, 10)
    assert send(tones, sound_file(spoken("ab"))).json()["text"] == "ab"


def test_a_budget_that_does_not_cover_it(tones: Service) -> None:
    with tones.admin_http() as admin:
        project = admin.get("/v1/organization/projects").json()["data"][0]["id"]
        path = f"/v1/organization/projects/{project}/spend_limit"
        limit = {"threshold_amount": 0, "currency": "USD", "interval": "month"}
        assert admin.post(path, json=limit).status_code == 200
        answer = send(tones, sound_file(spoken("ab")))
        assert admin.delete(path).status_code == 200
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
    assert send(tones, sound_file(spoken("ab"))).status_code == 200


def test_whisper_is_told_the_language_and_what_was_said_before(whispers: Service) -> None:
    """Each changes what random weights say; the language is told of."""
    import torch

    from steelyard.data.sound import pieces
    from steelyard.infer import transcription
    from steelyard.infer.sound import Hearing

    content = sound_file(words(2))
    sound = torch.from_numpy(np.concatenate(list(pieces(io.BytesIO(content)))))
    transcriber = transcription.Transcriber.load(whispers.checkpoint)
    found = set()
    for fields in ({}, {"language": "en"}, {"language": "de"}, {"prompt": "weights"}):
        (said,) = transcription.whole(transcription.hear(transcriber, [sound], Hearing(**fields)))
        told = send(whispers, content, response_format="verbose_json", **fields).json()
        assert told["text"] == transcriber.tokenizer.decode(said.tokens).strip()
        assert told["language"] == fields.get("language", "en")
        assert told["segments"][0]["tokens"] == said.tokens
        assert told["segments"][0]["no_speech_prob"] == pytest.approx(said.no_speech)
        assert told["segments"][0]["avg_logprob"] == pytest.approx(said.log_probability / said.drawn, abs=1e-5)
        found.add((told["text"], round(told["segments"][0]["avg_logprob"], 4)))
    assert len(found) == 3


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("tones", {"response_format": "diarized_json"}, "response_format"),
    ("tones", {"response_format": "xml"}, "response_format"),
    ("tones", {"temperature": "0.5"}, "temperature"),
    ("tones", {"temperature": "warm"}, "temperature"),
    ("tones", {"language": "en"}, "language"),
    ("tones", {"prompt": "what was said"}, "prompt"),
    ("tones", {"prompt": "a\0b", "stream": "false"}, "prompt"),
    ("tones", {"timestamp_granularities[]": "word"}, "timestamp_granularities"),
    ("tones", {"timestamp_granularities[]": "letter", "response_format": "verbose_json"}, "timestamp_granularities"),
    ("tones", {"stream": "yes"}, "stream"),
    ("tones", {"stream": "true", "response_format": "srt"}, "response_format"),
    ("tones", {"include[]": "logprobs"}, "include"),
    ("tones", {"chunking_strategy": "auto"}, "chunking_strategy"),
    ("tones", {"chunking_strategy[type]": "server_vad"}, "chunking_strategy"),
    ("tones", {"keywords[]": "steelyard"}, "keywords"),
    ("tones", {"languages[]": "en"}, "languages"),
    ("tones", {"known_speaker_names[]": "Ann"}, "known_speaker_names"),
    ("tones", {"known_speaker_references[]": "data:"}, "known_speaker_references"),
    ("tones", {"beam_width": "4"}, "beam_width"),
    ("tones", {"beam_width": "65", "use_beam_search": "true"}, "beam_width"),
    ("tones", {"beam_width": "four", "use_beam_search": "true"}, "beam_width"),
    ("tones", {"use_beam_search": "maybe"}, "use_beam_search"),
    ("tones", {"model": ""}, "model"),
    ("tones", {"nonsense": "1"}, "nonsense"),
    ("tones", {"user": "me"}, "user"),
    ("whispers", {"language": "fr"}, "language"),
    ("whispers", {"response_format": "verbose_json", "timestamp_granularities[]": "word"}, "timestamp_granularities"),
]


@pytest.mark.parametrize(("kind", "fields", "param"), REFUSED)
def test_what_is_not_done_is_refused_by_name(
    kind: str, fields: dict[str, Any], param: str, request: pytest.FixtureRequest
) -> None:
    answer = send(request.getfixturevalue(kind), sound_file(spoken("a")), **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].split("[")[0] == param


def test_every_field_of_the_sdk_is_honoured_or_refused() -> None:
    known = {*TranscriptionRequest.model_fields, *UNSUPPORTED, "file"}
    assert {*TranscriptionCreateParamsBase.__annotations__, "stream"} <= known
    assert not UNSUPPORTED.keys() & TranscriptionRequest.model_fields.keys()
    described = {name.removesuffix("[]") for name in FORM["properties"]}
    assert described == {*TranscriptionRequest.model_fields, "file"}


def test_neutral_values_are_taken(tones: Service) -> None:
    neutral = {
        "language": "",
        "prompt": "",
        "temperature": "0.0",
        "stream": "false",
        "response_format": "json",
        "use_beam_search": "false",
    }
    assert send(tones, sound_file(spoken("ab")), **neutral).json()["text"] == "ab"


def test_a_model_is_asked_for_what_it_does(tones: Service, whispers: Service) -> None:
    """Recognisers have no tokenizer: whoever wants texts read is told where to go."""
    asked = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/completions": {"prompt": "x"},
        "/v1/embeddings": {"input": "x"},
        "/v1/classify": {"input": "x"},
        "/v1/tag": {"input": "x"},
        "/v1/score": {"text_1": "x", "text_2": "y"},
    }
    for service, name in ((tones, "tones"), (whispers, "whisper")):
        with service.http() as http:
            for path, body in asked.items():
                answer = http.post(path, json={"model": name, **body})
                assert answer.status_code == 400, (path, answer.text)
                assert answer.json()["error"]["param"] == "model"
                assert URL in answer.json()["error"]["message"]
            assert http.get("/v1/models").json()["data"][0]["id"] == name
            for path, body in (
                ("/v1/fine_tuning/jobs", {"training_file": "file-x"}),
                ("/v1/compression/jobs", {}),
            ):
                answer = http.post(path, json={"model": name, **body})
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model"), answer.text
        with pytest.raises(openai.NotFoundError):
            service.sdk().audio.transcriptions.create(model="other", file=("a.wav", sound_file(spoken("a"))))


def hostile() -> Iterator[tuple[str, bytes, int, str]]:
    wav = sound_file(spoken("abc"))
    yield "nothing", b"", 400, "invalid_audio"
    yield "no sound", b"hello " * 50, 400, "invalid_audio"
    yield "a header alone", wav[:30], 400, "invalid_audio"
    yield "no samples", wav[:44], 400, "invalid_audio"
    made = io.BytesIO()
    soundfile.write(made, np.array([0.1, np.inf]), 16_000, format="WAV", subtype="FLOAT")
    yield "no numbers", made.getvalue(), 400, "invalid_audio"
    made = io.BytesIO()
    soundfile.write(made, np.zeros(8000 * 1600), 8000, format="FLAC")
    assert len(made.getvalue()) < 1 << 20
    yield "an hour of silence", made.getvalue(), 413, "audio_too_long"
    flac = bytearray(sound_file(spoken("abc"), "FLAC"))
    flac[21:26] = bytes([(flac[21] & 0xF0) | 0x0F, 255, 255, 255, 255])
    yield "a header that promises", bytes(flac), 413, "audio_too_long"


@pytest.mark.parametrize(("content", "status", "code"), [one[1:] for one in hostile()], ids=[o[0] for o in hostile()])
def test_hostile_recordings_are_refused(tones: Service, content: bytes, status: int, code: str) -> None:
    answer = send(tones, content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert answer.json()["error"]["param"] == "file"
    assert send(tones, sound_file(spoken("ab"))).json()["text"] == "ab"
    eventually(lambda: tones.behind.metering.open == 0, 10)


def test_a_wav_that_is_cut_off_is_heard_as_far_as_it_goes(tones: Service) -> None:
    whole = sound_file(np.concatenate([spoken("ab"), spoken("ca")]))
    assert send(tones, whole[: 44 + 2 * len(spoken("ab"))]).json()["text"] == "ab"


def test_a_wav_of_a_pipe_is_heard(tones: Service) -> None:
    """Whoever writes one as it comes says at its beginning that it is as long as can be."""
    content = bytearray(sound_file(spoken("abc")))
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    assert send(tones, bytes(content)).json()["text"] == "abc"


def test_a_form_that_is_none(tones: Service) -> None:
    with tones.http() as http:
        assert http.post(URL, json={"model": "tones"}).status_code == 400
        answer = http.post(URL, data={"model": "tones"}, files={"other": ("a", b"x")})
        assert answer.status_code == 400
        answer = http.post(URL, files={"model": (None, "tones")})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


def test_the_server_answers_while_a_recording_is_decoded(tones: Service) -> None:
    """Twenty minutes of noise, as small as it gets; meanwhile nothing waits for it."""
    import threading

    content = sound_file(np.random.default_rng(0).standard_normal(8000 * 1200) * 0.01, "OGG")
    answers: list[httpx.Response] = []
    sending = threading.Thread(target=lambda: answers.append(send(tones, content)))
    sending.start()
    slowest = 0.0
    with tones.http() as http:
        while sending.is_alive():
            began = time.monotonic()
            assert http.get("/live").status_code == 200
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.02)
    sending.join()
    assert answers[0].status_code == 200
    assert slowest < 1.0


def test_as_many_as_may_be_are_held(tones: Service) -> None:
    project = tones.behind.sounds
    owner = next(iter(tones.behind.database.read_now(_projects)))
    project._held[owner] += 16
    try:
        answer = send(tones, sound_file(spoken("ab")))
        assert answer.status_code == 429
    finally:
        project._held[owner] -= 16


def test_the_same_key_is_answered_again(tones: Service) -> None:
    content = sound_file(spoken("ab"))
    before = _spent(tones)
    with tones.http() as http:
        http.headers["idempotency-key"] = "once"
        texts = [
            http.post(URL, data={"model": "tones", "stream": "true"}, files={"file": ("a", content)}).text
            for _ in range(2)
        ]
    assert texts[0] == texts[1]
    assert _spent(tones) - before < 2 * INPUT * len(spoken("ab")) / 800


def _projects(connection: Any) -> list[str]:
    from sqlalchemy import select

    from steelyard.store import tables

    return list(connection.execute(select(tables.projects.c.id)).scalars())


def _spent(service: Service) -> int:
    with service.admin_http() as client:
        page = client.get(
            "/v1/organization/costs", params={"start_time": int(time.time()) - 86400, "bucket_width": "1d"}
        ).json()
    return sum(row["nano_dollars"] for bucket in page["data"] for row in bucket["results"])


def _seconds(service: Service) -> int:
    with service.admin_http() as client:
        page = client.get(
            "/v1/organization/usage/audio_transcriptions",
            params={"start_time": int(time.time()) - 86400, "bucket_width": "1d"},
        ).json()
    return sum(row["seconds"] for bucket in page["data"] for row in bucket["results"])
