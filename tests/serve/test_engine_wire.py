"""Frames: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.errors import ArtifactError
from steelyard.infer import wire
from steelyard.infer.request import (
    Abort,
    AdapterChanged,
    DropAdapter,
    EngineStats,
    Failure,
    Fatal,
    FromEngine,
    LoadAdapter,
    Output,
    PromptLogprob,
    Ready,
    Request,
    Sampling,
    Timeline,
    ToEngine,
    TokenLogprob,
)
from steelyard.infer.wire import EngineSocket

# Not st.from_type: the annotations of the structs are strings there.
text, token = st.text(max_size=20), st.integers(0, 2**31)
number = st.floats(-1e9, 1e9)
sampling = st.builds(
    Sampling,
    temperature=number,
    logit_bias=st.dictionaries(token, number, max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(text, max_size=3).map(tuple),
)
to_engine = st.one_of(
    st.builds(Request, id=text, prompt=st.lists(token, max_size=50), sampling=sampling, adapter=st.none() | text),
    st.builds(Abort, id=text),
    st.builds(LoadAdapter, id=text, name=text, path=text),
    st.builds(DropAdapter, id=text, name=text),
)
logprobs = st.builds(
    TokenLogprob, token=token, text=text, logprob=number, top=st.lists(st.tuples(token, text, number), max_size=3)
)
scored = st.builds(PromptLogprob, token=token, text=text, logprob=number, top=st.just([]), rank=token)
from_engine = st.one_of(
    st.builds(
        Output,
        id=text,
        choice=token,
        text=text,
        tokens=st.lists(token, max_size=3),
        logprobs=st.none() | st.lists(logprobs, max_size=3),
        prompt_logprobs=st.none() | st.lists(scored, max_size=3),
        finish_reason=st.sampled_from([None, "stop", "length"]),
        timeline=st.none()
        | st.builds(Timeline, arrived=number, scheduled=number, first_token=number, last_token=number),
    ),
    st.builds(Failure, id=text, message=text, param=st.none() | text),
    st.builds(AdapterChanged, id=text, digest=st.none() | text),
    st.builds(Ready, model=text, checkpoint_id=text, adapters=st.lists(text), context=token, vocabulary=token),
    st.builds(Fatal, message=text),
    st.builds(EngineStats, steps=token, generated_tokens=token, running=token),
)


@pytest.fixture
def pair() -> Iterator[tuple[EngineSocket, socket.socket]]:
    engine, server = socket.socketpair()
    with server:
        socket_ = EngineSocket(engine.detach())
        yield socket_, server
        socket_.close()


def read_all(content: bytes) -> list[FromEngine]:
    async def read() -> list[FromEngine]:
        reader = asyncio.StreamReader()
        reader.feed_data(content)
        reader.feed_eof()
        frames, messages = wire.FrameReader(reader), list[FromEngine]()
        while together := await frames.receive():
            messages += together
        return messages

    return asyncio.run(read())


@given(st.lists(to_engine, max_size=4))
def test_the_engine_reads_what_is_sent(messages: list[ToEngine]) -> None:
    engine, server = socket.socketpair()
    with server:
        end = EngineSocket(engine.detach())
        sending = threading.Thread(target=lambda: server.sendall(b"".join(map(wire.frame, messages))))
        sending.start()
        assert [end.receive() for _ in messages] == messages
        sending.join()
        server.shutdown(socket.SHUT_WR)
        assert end.receive() is None
        end.close()


@given(st.lists(from_engine, max_size=4))
def test_the_server_reads_what_the_engine_sends(messages: list[FromEngine]) -> None:
    assert read_all(b"".join(map(wire.frame, messages))) == messages


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_or_end(content: bytes) -> None:
    with contextlib.suppress(ArtifactError):
        read_all(content)


def test_a_broken_frame_ends_the_stream(pair: tuple[EngineSocket, socket.socket]) -> None:
    engine, server = pair
    server.sendall(wire.frame(Abort("a"))[:-1])
    server.shutdown(socket.SHUT_WR)
    assert engine.receive() is None


def test_a_length_over_the_limit_is_refused_before_it_is_read(pair: tuple[EngineSocket, socket.socket]) -> None:
    engine, server = pair
    server.sendall((wire.MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(ArtifactError, match="limit"):
        engine.receive()


def test_a_message_of_the_other_direction_is_refused(pair: tuple[EngineSocket, socket.socket]) -> None:
    engine, server = pair
    server.sendall(wire.frame(Fatal(message="no")))
    with pytest.raises(ArtifactError, match="does not parse"):
        engine.receive()


def test_closing_wakes_a_reader(pair: tuple[EngineSocket, socket.socket]) -> None:
    engine, _ = pair
    waiting = threading.Thread(target=engine.receive)
    waiting.start()
    engine.close()
    waiting.join(5)
    assert not waiting.is_alive()
