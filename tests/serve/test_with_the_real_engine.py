"""The whole way with a real, tiny, untrained model: SDK, server, wire, engine process, and the same tokens again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from running_service import Service, eventually, serving

from steelyard.serve.engine_client import worker_command

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def real(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = make_checkpoint("real")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for file in ("config.json", "model.safetensors"):
        shutil.move(folder / "model" / file, folder / file)
    shutil.rmtree(folder / "model")
    with serving(folder, command=worker_command, seconds=60) as service:
        yield service


def test_the_same_seed_gives_the_same_answer_whole_and_streamed(real: Service) -> None:
    client = real.sdk()
    options = {"model": "real", "messages": MESSAGES, "n": 3, "seed": 7, "max_tokens": 24, "logprobs": True}
    whole = client.chat.completions.create(**options)
    again = client.chat.completions.create(**options)
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert whole.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in whole.choices)


def test_stop_and_logprobs_of_a_real_model(real: Service) -> None:
    client = real.sdk()
    options = {"model": "real", "prompt": "The steelyard", "max_tokens": 12, "temperature": 0}
    full = client.completions.create(**options, logprobs=5, extra_body={"ignore_eos": True}).choices[0]
    assert full.finish_reason == "length"
    for value, top in zip(full.logprobs.token_logprobs, full.logprobs.top_logprobs, strict=True):
        assert value <= 0
        assert max(top.values()) == pytest.approx(value)  # greedy
    stop = full.text[len(full.text) // 2 :][:4]
    cut = client.completions.create(**options, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert (cut.text, cut.finish_reason) == (full.text[: full.text.index(stop)], "stop")
    assert client.completions.create(**{**options, "top_p": 0, "temperature": 1}).choices[0].text == full.text


def test_it_is_ready_again_after_a_kill(real: Service) -> None:
    def read_and_kill() -> None:
        stream = real.sdk().completions.create(
            model="real", prompt="a", max_tokens=250, n=16, stream=True, extra_body={"ignore_eos": True}
        )
        for number, _ in enumerate(stream):
            if number == 3:
                real.engine._process.kill()

    with pytest.raises(openai.APIError):
        read_and_kill()
    eventually(lambda: real.engine.ready, 30)
    assert real.sdk().completions.create(model="real", prompt="a", max_tokens=2).usage.completion_tokens == 2


def test_adapters_are_loaded_swapped_and_dropped_while_a_stream_runs(
    make_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    torch, lora = pytest.importorskip("torch"), pytest.importorskip("steelyard.models.lora")
    from families import make
    from steelyard.models import weights

    checkpoint = make_checkpoint("adapted")
    make(checkpoint, "smollm", vocab_size=512)
    decoder = weights.load(checkpoint)
    for number in (1, 2):
        generator = torch.Generator().manual_seed(number)
        adapter = lora.Adapter.create(decoder, rank=4, alpha=64, targets=("o_proj", "up_proj"), generator=generator)
        for _, b in adapter.pairs.values():
            b.normal_(0, 0.5, generator=generator)
        (tmp_path / str(number)).mkdir()
        adapter.save(tmp_path / str(number), str(checkpoint))
    with serving(checkpoint, command=worker_command, seconds=60, adapter_folder=tmp_path) as service:
        client, http = service.sdk(), service.http()
        options = {"prompt": "The steelyard", "max_tokens": 30, "temperature": 0, "extra_body": {"ignore_eos": True}}

        def load(number: int) -> None:
            http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(number)}).raise_for_status()

        def text() -> str:
            return client.completions.create(model="x", **options).choices[0].text

        load(1)
        old = text()
        stream = client.completions.create(model="x", stream=True, **options)
        begun = next(iter(stream)).choices[0].text
        load(2)
        new = text()
        assert begun + "".join(chunk.choices[0].text for chunk in stream) == old
        assert old != new
        service.engine._process.kill()
        eventually(lambda: service.engine.ready is None, 10)
        eventually(lambda: service.engine.ready, 60)
        assert text() == new, "the restarted engine has the current adapter"
        http.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).raise_for_status()
        with pytest.raises(openai.NotFoundError):
            text()
        with pytest.raises(httpx.HTTPStatusError):
            load(3)
