"""`POST /v1/audio/transcriptions`: a recording in, what is said in it out, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import BinaryIO

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from steelyard.errors import PayloadTooLargeError, RequestError
from steelyard.infer.sound import SOUND_RATE, TOKEN_SAMPLES, Hears, check
from steelyard.serve.billing.prices import NANO
from steelyard.serve.connection import DONE, EventStream, event, while_connected
from steelyard.serve.endpoint import Form
from steelyard.serve.hearing import Listening, listen
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.transcriptions import (
    FORM,
    SEVERAL,
    AudioTokens,
    DurationUsage,
    TextDelta,
    TextDone,
    TokensUsage,
    Transcription,
    TranscriptionRequest,
    parse_form,
)
from steelyard.serve.protocol.uploads import Upload, together
from steelyard.serve.reading import demand
from steelyard.serve.service import Service
from steelyard.serve.sounds import MOST_BYTES, writing
from steelyard.serve.transcript import Transcript

TAKES = Form(FORM)
MEDIA = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
UNKNOWN = "unknown"
"""The language of a model that knows one, and not which."""


async def create(service: Service, request: Request) -> Response:
    """Say what is said in a recording."""
    held = contextlib.ExitStack()  # until the last of a stream is sent
    request.state.at_end = [held.close]
    held.enter_context(service.sounds.held(request.state.caller.project))
    recording = held.enter_context(await asyncio.to_thread(service.sounds.file))
    body = await _take(request, recording)
    served, payer = await service.ask(request, body.model)
    ready = demand(served, "transcribe")
    assert ready.hears is not None, "who transcribes hears"
    hears, hearing = ready.hears, body.hearing(ready.hears.words)
    check(hears, hearing, f"'{served.id}'")
    samples = await while_connected(request.receive, service.sounds.decode(recording, payer.project))
    held.enter_context(samples.file)
    listening = listen(served, hears, payer, samples, hearing)
    if body.stream:
        return EventStream(_events(listening), request.state.request_id)
    transcript = await while_connected(request.receive, _gather(listening))
    return _answer(body, hears, listening, transcript)


async def _take(request: Request, recording: BinaryIO) -> TranscriptionRequest:
    """Write the form's file into `recording`; its other fields."""
    upload = Upload(request.headers.get("content-type", ""), recording.write, SEVERAL)
    size = 0
    with writing():
        async for piece in together(request.stream()):
            await asyncio.to_thread(upload.feed, piece)
            if recording.tell() > MOST_BYTES:
                raise PayloadTooLargeError(f"a recording of over {MOST_BYTES >> 20} MB: part it", param="file")
        upload.close()
        recording.flush()
        size = recording.tell()
    body = parse_form(upload.fields, upload.lists)
    if size == 0:
        raise RequestError("the file is empty", param="file", code="invalid_audio")
    return body


async def _gather(listening: Listening) -> Transcript:
    transcript = Transcript()
    async with contextlib.aclosing(listening.pieces()) as pieces:
        async for piece in pieces:
            transcript.add(piece.output, piece.first, piece.samples)
    return transcript


async def _events(listening: Listening) -> AsyncGenerator[bytes, None]:
    transcript = Transcript()
    async with contextlib.aclosing(listening.pieces()) as pieces:
        async for piece in pieces:
            if delta := transcript.add(piece.output, piece.first, piece.samples):
                yield event(TextDelta(delta))
    yield event(TextDone(transcript.text, _tokens(listening)))
    yield DONE


def _answer(body: TranscriptionRequest, hears: Hears, listening: Listening, transcript: Transcript) -> Response:
    match body.response_format:
        case "text":
            return _text("text", transcript.text + "\n")
        case "srt":
            return _text("srt", transcript.srt())
        case "vtt":
            return _text("vtt", transcript.vtt())
        case "verbose_json":
            counts = listening.bill.counts
            seconds = counts.input_tokens * TOKEN_SAMPLES / SOUND_RATE
            return json_response(
                Transcription(
                    text=transcript.text,
                    usage=DurationUsage(seconds, listening.bill.cost / NANO),
                    task="transcribe",
                    language=body.language or (hears.languages[0] if hears.languages else UNKNOWN),
                    duration=listening.samples.count / SOUND_RATE,
                    segments=transcript.segments if "segment" in body.granularities else msgspec.UNSET,
                    words=transcript.words if "word" in body.granularities else msgspec.UNSET,
                )
            )
    return json_response(Transcription(text=transcript.text, usage=_tokens(listening)))


def _tokens(listening: Listening) -> TokensUsage:
    """What was paid for, once it is settled."""
    counts = listening.bill.counts
    whole = counts.input_tokens + counts.output_tokens
    details = AudioTokens(counts.input_tokens)
    return TokensUsage(counts.input_tokens, counts.output_tokens, whole, details, listening.bill.cost / NANO)


def _text(kind: str, content: str) -> Response:
    return PlainTextResponse(content, media_type=MEDIA[kind])
