"""What an answer says of its prompt: `echo`, and log-probabilities of its tokens in both shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from running_service import Service
from stand_in_engine import SENTENCE

from steelyard.text.tokenizer import Tokenizer

PROMPT = "Grüße 😀 to the assistant"


@pytest.fixture
def tokenizer(service: Service) -> Tokenizer:
    return service.models["tiny"].tokenizer


def complete(service: Service, **fields: Any) -> list[dict[str, Any]]:
    with service.http() as http:
        response = http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def stream(service: Service, **fields: Any) -> list[dict[str, Any]]:
    """The choices that the parts of a stream add up to."""
    body = {"model": "tiny", "prompt": PROMPT, "stream": True, **fields}
    whole: dict[int, dict[str, Any]] = {}
    with service.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            for part in json.loads(line.removeprefix("data: "))["choices"]:
                if part["index"] not in whole:
                    whole[part["index"]] = part
                    continue
                choice = whole[part["index"]]
                choice["text"] += part["text"]
                choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
                for name, values in (part["logprobs"] or {}).items():
                    choice["logprobs"][name] += values
    return [whole[number] for number in sorted(whole)]


@pytest.mark.parametrize("read", [complete, stream])
def test_echo_repeats_the_prompt_in_every_choice(service: Service, read: Any) -> None:
    plain = read(service, n=2, max_tokens=9)
    echoed = read(service, n=2, max_tokens=9, echo=True)
    assert [choice["text"] for choice in echoed] == [PROMPT + choice["text"] for choice in plain]
    assert all(choice["logprobs"] is None for choice in echoed)
    assert service.received()[-1]["sampling"]["prompt_logprobs"] is None, "nothing is scored that nobody asked for"
    (only,) = read(service, max_tokens=0, echo=True)
    assert (only["text"], only["finish_reason"]) == (PROMPT, "length")


@pytest.mark.parametrize("read", [complete, stream])
def test_echo_with_logprobs_has_those_of_the_prompt(service: Service, tokenizer: Tokenizer, read: Any) -> None:
    ids = tokenizer.encode(PROMPT)
    for choice in read(service, n=3, max_tokens=12, echo=True, logprobs=2):
        logprobs = choice["logprobs"]
        assert len({len(values) for values in logprobs.values()}) == 1
        count = len(ids)
        assert logprobs["token_logprobs"][:count] == [None, *(-float(place) for place in range(1, count))]
        assert logprobs["token_logprobs"][count:] == [-0.25] * 12
        assert logprobs["top_logprobs"][0] is None
        assert all(len(top) <= 2 for top in logprobs["top_logprobs"][1:])
        assert logprobs["tokens"][:count] == [tokenizer.token_text(id) for id in ids]
        begins = [*logprobs["text_offset"], len(choice["text"])]
        assert begins == sorted(begins)
        assert begins[count] == len(PROMPT)
        for token, begin, end in zip(logprobs["tokens"], begins, begins[1:], strict=False):
            if "\ufffd" not in token:  # no part of a character
                assert choice["text"][begin:end] == token
        assert choice["text"][len(PROMPT) :] in SENTENCE * 3


def test_offsets_count_characters_and_not_their_pieces(service: Service) -> None:
    (choice,) = complete(service, prompt="a", max_tokens=40, logprobs=0)
    begins = choice["logprobs"]["text_offset"]
    assert "\ufffd" in "".join(choice["logprobs"]["tokens"]), "a character of several tokens"
    assert begins[-1] < len(choice["text"])


def test_reading_only_takes_zero_or_one_token(service: Service, tokenizer: Tokenizer) -> None:
    """As the lm-evaluation-harness asks, with token ids, several prompts at once."""
    prompts = [[5, 6, 7], tokenizer.encode("<|im_start|>the user"), [9]]
    for most in (0, 1):
        choices = complete(service, prompt=prompts, max_tokens=most, logprobs=1, echo=True, temperature=0, seed=1234)
        for ids, choice in zip(prompts, choices, strict=True):
            assert choice["text"].startswith(tokenizer.decode(ids, skip_special_tokens=False))
            assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + most
            assert choice["logprobs"]["text_offset"][len(ids) :] == [len(tokenizer.decode(ids, False))] * most
    assert choices[1]["text"].startswith("<|im_start|>the user"), (
        "control tokens of a prompt are part of what is repeated"
    )


def test_prompt_logprobs_in_the_shape_of_vllm(service: Service, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    first, second = complete(service, n=2, max_tokens=1, prompt_logprobs=2)
    assert first["prompt_logprobs"] == second["prompt_logprobs"]
    found = first["prompt_logprobs"]
    assert found[0] is None
    assert len(found) == len(ids)
    for place, (id, entry) in enumerate(zip(ids[1:], found[1:], strict=True), start=1):
        assert list(entry) == [str(id), str(id + 1), str(id + 2)]
        assert entry[str(id)] == {"logprob": -float(place), "rank": 3, "decoded_token": tokenizer.token_text(id)}
        assert entry[str(id + 1)] == {"logprob": -1.5, "rank": 1, "decoded_token": tokenizer.token_text(id + 1)}
    (both,) = complete(service, max_tokens=1, prompt_logprobs=0, echo=True, logprobs=3)
    assert [len(entry or {}) for entry in both["prompt_logprobs"]] == [0] + [1] * (len(ids) - 1)
    assert "prompt_logprobs" not in complete(service, max_tokens=1)[0]


def test_chat_has_them_beside_its_choices(service: Service) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "n": 2}
    with service.http() as http:
        plain = http.post("/v1/chat/completions", json=body).json()
        answer = http.post("/v1/chat/completions", json={**body, "prompt_logprobs": 1}).json()
    assert "prompt_logprobs" not in plain
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None
    assert all(len(entry) == 2 for entry in answer["prompt_logprobs"][1:])
