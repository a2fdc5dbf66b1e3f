"""Explanations over HTTP: of classes and of answers, by themselves and beside them; what they cost; what is refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_service import Service, serving

from steelyard.serve.engine_client import worker_command

TEXT = "Where is München? <|im_end|>"
CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def decoder(tiny_model: Path) -> Iterator[Service]:
    with serving(tiny_model, command=worker_command, seconds=60) as service:
        yield service


@pytest.fixture(scope="module")
def classifier_folder(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from steelyard.models.classifiers import Classifier, save
    from steelyard.models.inputs import TextInputs
    from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
    from steelyard.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("explained") / "labels"
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"embedding_size": 8, "hidden_size": 8, "dense_size": 8, "classes": 3}
        network = RecurrentClassifier(RecurrentConfig(vocab_size=512, **sizes))
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.7)
    inputs = TextInputs(Tokenizer.load(tiny_tokenizer_folder), None)
    save(Classifier(network.eval(), inputs, ("cold", "mild", "warm"), tiny_tokenizer_folder), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_tokenizer_folder / name, folder)
    return folder


@pytest.fixture(scope="module")
def classifier(classifier_folder: Path) -> Iterator[Service]:
    with serving(classifier_folder, command=worker_command, seconds=60) as service:
        yield service


def post(service: Service, path: str, **body: Any) -> Any:
    with service.http() as client:
        return client.post(path, json={"model": service.checkpoint.name, **body})


def refused(service: Service, path: str, param: str, **body: Any) -> str:
    answer = post(service, path, **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
    message: str = answer.json()["error"]["message"]
    return message


def test_a_class_is_explained_by_its_tokens(classifier: Service, classifier_folder: Path) -> None:
    """As the method does it in this process: shares, offsets, target, and how far they can be believed."""
    from steelyard.explain.explainer import open_classifier
    from steelyard.explain.methods import METHODS
    from steelyard.explain.subject import at_once
    from steelyard.explain.texts import TextSubject

    opened = open_classifier(classifier_folder)
    for method in ("lrp", "occlusion", "integrated_gradients", "gradient_x_input"):
        answer = post(classifier, "/v1/explain", input=TEXT, target="mild", method=method)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        subject = TextSubject(opened, opened.text.all_tokens(TEXT), 1)
        expected = at_once(METHODS[method](subject))  # type: ignore[index]
        shares = [token["share"] for token in told["tokens"]]
        assert shares == pytest.approx(expected.units.tolist(), abs=1e-5)
        assert told["residual"] == pytest.approx(told["value"] - told["base"] - told["rest"] - sum(shares), abs=1e-9)
        assert (told["object"], told["method"], told["target"]) == ("explanation", method, {"text": "mild"})
        assert told["text"] == TEXT
        assert all(TEXT[one["start"] : one["end"]] == one["token"] for one in told["tokens"] if one["end"])
        believed = told["faithfulness"]
        assert believed["found"].keys() == believed["random"].keys()
        assert told["usage"]["computed_tokens"] > len(shares)


def test_the_likeliest_class_is_explained_and_stands_beside_it(classifier: Service) -> None:
    plain = post(classifier, "/v1/classify", input=[TEXT, "cold"]).json()
    both = post(classifier, "/v1/classify", input=[TEXT, "cold"], explain={"faithfulness": False}).json()
    told = []
    for row, other in zip(plain["data"], both["data"], strict=True):
        told.append(explanation := other.pop("explanation"))
        assert row == other
        assert explanation["target"]["text"] == row["label"]
        assert explanation["faithfulness"] is None
    alone = post(classifier, "/v1/explain", input=TEXT, faithfulness=False).json()
    assert alone["target"]["text"] == plain["data"][0]["label"]
    assert alone["tokens"] == told[0]["tokens"]


def test_what_a_classifier_refuses(classifier: Service) -> None:
    assert "cold, mild, warm" in refused(classifier, "/v1/explain", "target", input="x", target="hot")
    refused(classifier, "/v1/explain", "lens", input="x", lens=2)
    refused(classifier, "/v1/explain", "messages", messages=CHAT)
    refused(classifier, "/v1/explain", "input")
    refused(classifier, "/v1/explain", "quality", input="x", quality="high", method="lrp")
    refused(classifier, "/v1/explain", "method", input="x", method="guessing")
    refused(classifier, "/v1/classify", "explain", input=["x"] * 17, explain=True)
    assert "shorten" in refused(classifier, "/v1/explain", "input", input="a b " * 2000, quality="high")


def test_an_answer_is_explained_by_what_was_said(decoder: Service) -> None:
    """Offsets are those of the conversation as the template writes it; only what messages say has shares."""
    told = post(decoder, "/v1/explain", messages=CHAT, target=" weighs", lens=3).json()
    text = told["text"]
    assert text.endswith("<|im_start|>assistant\n")
    assert TEXT in text
    shared = [one for one in told["tokens"] if one["share"] is not None]
    covered = "".join(text[one["start"] : one["end"]] for one in shared).replace(" ", "")
    assert covered.startswith("Beshort.")
    assert "München" in covered
    assert all(one["token"] not in ("system", "user", "assistant") for one in shared)
    assert told["target"]["text"] == " weighs"
    assert "".join(told["target"]["tokens"]) == " weighs"
    assert len(told["lens"]) == 3  # the embedding and two layers
    assert [len(layer) for layer in told["lens"]] == [3, 3, 3]
    plain = post(decoder, "/v1/explain", input="The steelyard", lens=1, faithfulness=False).json()
    completion = post(decoder, "/v1/completions", prompt="The steelyard", max_tokens=1, temperature=0).json()
    assert plain["target"]["text"] == plain["lens"][-1][0]["token"] == completion["choices"][0]["text"]


def test_of_a_conversation_its_likeliest_answer_is_explained(decoder: Service) -> None:
    """What it would have said to it, token by token, and not only the first; then as if that had been named."""
    import torch

    from steelyard.explain.explainer import open_decoder
    from steelyard.models.attention import PackedAttention
    from steelyard.text.chat_template import ChatTemplate
    from steelyard.text.prompt import prompt_tokens
    from steelyard.text.tokenizer import Tokenizer

    opened, tokenizer = open_decoder(decoder.checkpoint), Tokenizer.load(decoder.checkpoint)
    template = ChatTemplate.load(decoder.checkpoint)
    assert template is not None
    for text in ("Where is München?", "so on", "The user asks"):
        messages = [{"role": "user", "content": text}]
        (ids,) = prompt_tokens(tokenizer, template, [messages])
        answer: list[int] = []
        while len(answer) < 32:
            row = [*ids, *answer]
            with torch.no_grad():
                states = opened(torch.tensor(row), torch.arange(len(row)), PackedAttention([len(row)]))
                following = int(opened.logits(states[-1:]).argmax())
            if answer and following in tokenizer.eos_ids:
                break
            answer.append(following)
        told = post(decoder, "/v1/explain", messages=messages, faithfulness=False).json()
        assert told["target"]["tokens"] == [tokenizer.token_text(token) for token in answer]
        assert told["usage"]["computed_tokens"] > len(ids) * len(answer)


def test_a_chat_brings_its_explanation(decoder: Service) -> None:
    """Whole and as a stream; what is said is the same, and the explanation is that of exactly this answer."""
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 6, "temperature": 0}
    plain = post(decoder, "/v1/chat/completions", **asked).json()
    both = post(decoder, "/v1/chat/completions", **asked, explain=True).json()
    assert both["choices"] == plain["choices"]
    assert both["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    explanation = both["explanation"]
    content = plain["choices"][0]["message"]["content"]
    assert explanation["target"]["text"].startswith(content)
    assert "explanation" not in plain
    with decoder.http() as client:
        lines = client.post(
            "/v1/chat/completions",
            json={"model": decoder.checkpoint.name, **asked, "explain": {"method": "lrp"}, "stream": True},
        ).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    (streamed,) = [event["explanation"] for event in events if "explanation" in event]
    for one, other in zip(streamed["tokens"], explanation["tokens"], strict=True):
        assert one["share"] == pytest.approx(other["share"], abs=1e-5)
    client = decoder.sdk()  # whoever does not know the field reads on
    answer = client.chat.completions.create(model=decoder.checkpoint.name, **asked, extra_body={"explain": True})
    assert answer.choices[0].message.content == content
    assert answer.model_extra is not None
    assert answer.model_extra["explanation"]["method"] == "lrp"


def test_what_a_decoder_refuses(decoder: Service) -> None:
    refused(decoder, "/v1/chat/completions", "explain", messages=CHAT, explain=True, n=2)
    refused(decoder, "/v1/chat/completions", "explain.method", messages=CHAT, explain={"method": "x"})
    refused(decoder, "/v1/explain", "input", input="x" * 4000)
    embedded = post(decoder, "/v1/classify", input="x", explain=True)
    assert embedded.status_code == 400


def test_explanations_are_paid_by_their_own_price(decoder: Service) -> None:
    """An entry of their own, of what was computed; the usage report knows them."""
    with decoder.admin_http() as admin:
        prices = {"*": {"input": 10, "cached_input": 10, "output": 20, "explanation": 3}}
        assert admin.post("/v1/organization/prices", json={"prices": prices}).status_code == 200
    alone = post(decoder, "/v1/explain", input="The steelyard weighs").json()
    computed = alone["usage"]["computed_tokens"]
    assert alone["usage"]["cost"] == pytest.approx(3 * computed / 1e9)
    both = post(decoder, "/v1/chat/completions", messages=CHAT, max_tokens=3, explain=True).json()
    usage = both["usage"]
    assert usage["cost"] == pytest.approx((10 * usage["prompt_tokens"] + 20 * usage["completion_tokens"]) / 1e9)
    explained = both["explanation"]["usage"]
    with decoder.admin_http() as admin:
        entries = admin.get("/v1/organization/ledger", params={"limit": 100}).json()["data"]
        used = admin.get(
            "/v1/organization/usage/explanations", params={"start_time": int(time.time()) - 86400, "limit": 31}
        ).json()
    own = [entry for entry in entries if entry["service"] == "explanations" and entry["kind"] == "settle"]
    assert {entry["input_tokens"] for entry in own[:2]} == {computed, explained["computed_tokens"]}
    rows = [row for bucket in used["data"] for row in bucket["results"]]
    assert sum(row["computed_tokens"] for row in rows) >= computed


def test_what_is_said_is_known_though_the_template_says_the_same(decoder: Service) -> None:
    """The system's words hold the user's: only his own have shares."""
    messages = [{"role": "user", "content": " helpful "}]
    told = post(decoder, "/v1/explain", messages=messages, target="x", faithfulness=False).json()
    text = told["text"]
    assert text.count("helpful") == 2, "the template's system message, and his"
    shared = [one for one in told["tokens"] if one["share"] is not None]
    assert all(one["start"] >= text.rindex("helpful") - 1 for one in shared)
    assert shared
    nothing = post(decoder, "/v1/explain", messages=[{"role": "user", "content": " "}], target="x")
    assert nothing.status_code == 400
    assert "nothing to explain" in nothing.json()["error"]["message"]


def test_a_text_is_read_as_completions_read_it(decoder: Service) -> None:
    """Control tokens that are spelled out are control tokens, which have no share."""
    prompt = "<|im_start|>user\nhi<|im_end|>\n"
    told = post(decoder, "/v1/explain", input=prompt, faithfulness=False).json()
    completed = post(decoder, "/v1/completions", prompt=prompt, max_tokens=1, temperature=0).json()
    assert len(told["tokens"]) == completed["usage"]["prompt_tokens"]
    assert told["target"]["text"] == completed["choices"][0]["text"] or told["target"]["tokens"]
    assert told["tokens"][0]["share"] is None


def test_what_a_stop_string_cut_off_is_not_explained(decoder: Service) -> None:
    """The answer that is explained is the one that was told."""
    asked: dict[str, Any] = {"messages": CHAT, "max_tokens": 8, "temperature": 0}
    whole = post(decoder, "/v1/chat/completions", **asked).json()["choices"][0]["message"]["content"]
    for stop in (whole[:2], whole[len(whole) // 2 :], whole[-1]):
        told = post(decoder, "/v1/chat/completions", **asked, stop=[stop], explain={"faithfulness": False}).json()
        content = told["choices"][0]["message"]["content"]
        if "explanation" in told:
            assert content.startswith(told["explanation"]["target"]["text"])
        else:
            assert (content, told["explanation_error"]) == ("", "the answer has no token")


def test_an_answer_without_its_explanation_is_an_answer(decoder: Service) -> None:
    """What cannot be explained after it was said and paid for: the answer comes, and says why there is none."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": " "}], "max_tokens": 3, "explain": True}
    told = post(decoder, "/v1/chat/completions", **body)
    assert told.status_code == 200
    assert told.json()["choices"][0]["message"]
    assert "nothing to explain" in told.json()["explanation_error"]
    with decoder.http() as client:
        lines = client.post(
            "/v1/chat/completions", json={"model": decoder.checkpoint.name, **body, "stream": True}
        ).text
    assert lines.rstrip().endswith("[DONE]")


def test_too_much_is_refused_before_it_is_computed(decoder: Service, classifier: Service) -> None:
    long = refused(decoder, "/v1/explain", "target", input="x", target="a b " * 100)
    assert "256 are explained" in long
    assert "1024 are explained" in refused(classifier, "/v1/explain", "input", input="a b " * 1000)


def test_a_label_is_explained_against_the_others(decoder: Service) -> None:
    """As the method does it in this process: the likeliest, or the one that is named; beside a chat's answer, too."""
    from steelyard.explain.decoders import LabelSubject
    from steelyard.explain.explainer import open_decoder
    from steelyard.explain.methods import relevance
    from steelyard.explain.subject import at_once
    from steelyard.text.chat_template import ChatTemplate
    from steelyard.text.prompt import answer_tokens, prompt_tokens
    from steelyard.text.tokenizer import Tokenizer

    opened, tokenizer = open_decoder(decoder.checkpoint), Tokenizer.load(decoder.checkpoint)
    template = ChatTemplate.load(decoder.checkpoint)
    assert template is not None
    labels = ["cold", "colder", "warm"]
    (prompt,) = prompt_tokens(tokenizer, template, [CHAT])
    tokens = answer_tokens(tokenizer, template, CHAT, labels).whole
    likeliest = post(decoder, "/v1/explain", messages=CHAT, against=labels).json()["target"]["text"]
    assert likeliest in labels
    for number, label in enumerate(labels):
        told = post(decoder, "/v1/explain", messages=CHAT, target=label, against=labels, faithfulness=False).json()
        assert told["target"]["text"] == label
        shared = [(place, one["share"]) for place, one in enumerate(told["tokens"]) if one["share"] is not None]
        subject = LabelSubject(opened, None, prompt, tokens, number, [place for place, _ in shared])
        expected = at_once(relevance(subject))
        assert [share for _, share in shared] == pytest.approx(expected.units.tolist(), abs=1e-5)
        assert told["value"] == pytest.approx(expected.value, abs=1e-5)
    asked: dict[str, Any] = {"messages": CHAT, "structured_outputs": {"choice": labels}, "max_tokens": 20, "seed": 1}
    said = post(decoder, "/v1/chat/completions", **asked, explain={"against": labels}).json()
    content = said["choices"][0]["message"]["content"]
    assert said["explanation"]["target"]["text"] == content
    alone = post(decoder, "/v1/explain", messages=CHAT, target=content, against=labels).json()
    assert said["explanation"]["value"] == pytest.approx(alone["value"], abs=1e-5)
    text = post(decoder, "/v1/explain", input="It is", target=" cold", against=[" colder"], faithfulness=False).json()
    assert text["target"]["text"] == " cold"
    plain = [*tokenizer.encode_plain(" cold"), 2], [*tokenizer.encode_plain(" colder"), 2]
    subject = LabelSubject(opened, None, tokenizer.encode("It is"), plain, 0, range(len(tokenizer.encode("It is"))))
    assert text["value"] == pytest.approx(at_once(relevance(subject)).value, abs=1e-5)


def test_what_an_answer_is_compared_with_is_checked(decoder: Service, classifier: Service) -> None:
    refused(decoder, "/v1/explain", "against", messages=CHAT, target="a", against=["a"])
    refused(decoder, "/v1/explain", "against", messages=CHAT, against=["a", "a"])
    refused(decoder, "/v1/explain", "against", messages=CHAT, target="a", against=["b " * 140])
    assert "classes" in refused(classifier, "/v1/explain", "against", input="x", against=["cold"])
    refused(classifier, "/v1/classify", "explain.against", input="x", explain={"against": ["cold"]})
    same: dict[str, Any] = {"messages": CHAT, "structured_outputs": {"choice": ["cold"]}, "max_tokens": 20}
    answer = post(decoder, "/v1/chat/completions", **same, explain={"against": ["cold"]}).json()
    assert "none of 'against'" in answer["explanation_error"]


@pytest.fixture(scope="module")
def thinker(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A model with Qwen 3's template: thoughts that are none before each answer, and none in earlier turns."""
    folder = tmp_path_factory.mktemp("thinks") / "thinker"
    shutil.copytree(tiny_model, folder)
    shutil.copy(Path(__file__).parents[1] / "text" / "templates" / "qwen3.jinja", folder / "chat_template.jinja")
    with serving(folder, command=worker_command, seconds=60) as service:
        yield service


def test_a_label_is_one_whether_or_not_the_template_thinks_before(thinker: Service) -> None:
    """What was said is compared as it was said; what is named, as the model learnt to say it. In long talks, too."""
    from steelyard.explain.decoders import LabelSubject
    from steelyard.explain.explainer import open_decoder
    from steelyard.explain.methods import relevance
    from steelyard.explain.subject import at_once
    from steelyard.text.tokenizer import Tokenizer

    opened, tokenizer = open_decoder(thinker.checkpoint), Tokenizer.load(thinker.checkpoint)
    talk = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": "warm"}]
    talk += [{"role": "user", "content": "And now?"}]
    labels = ["cold", "warm", "think"]
    asked: dict[str, Any] = {"messages": talk, "structured_outputs": {"choice": labels}, "max_tokens": 20, "seed": 2}
    said = post(thinker, "/v1/chat/completions", **asked, explain={"against": labels, "faithfulness": False}).json()
    named = said["choices"][0]["message"]["content"]
    told = [said["explanation"], post(thinker, "/v1/explain", messages=talk, target=named, against=labels).json()]
    for explanation, before in zip(told, ("", "<think>\n\n</think>\n\n"), strict=True):
        assert explanation["target"]["text"] == named
        prompt = tokenizer.encode_rendered(explanation["text"])
        places = [place for place, one in enumerate(explanation["tokens"]) if one["share"] is not None]
        written = [tokenizer.encode(f"{before}{label}<|im_end|>") for label in labels]
        subject = LabelSubject(opened, None, prompt, written, labels.index(named), places)
        assert explanation["value"] == pytest.approx(at_once(relevance(subject)).value, abs=1e-5)


def test_what_is_reserved_covers_what_is_compared(decoder: Service) -> None:
    """An engine never computes more than was reserved; many long labels are compared at once."""
    from steelyard.infer import effort
    from steelyard.infer.request import Explain

    many = [f"{'the weight ' * 20}{number}" for number in range(64)]
    for more in ({}, {"target": "other"}, {"lens": 2}, {"faithfulness": False, "method": "occlusion"}):
        told = post(decoder, "/v1/explain", messages=CHAT[1:], against=many[:9], **more).json()
        from steelyard.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(decoder.checkpoint)
        answers = [[*tokenizer.encode_plain(one), 2] for one in many[:9]]
        explain = Explain(
            method=more.get("method", "lrp"),  # type: ignore[arg-type]
            answer=answers[0] if "target" in more else [],
            against=answers,
            faithfulness=more.get("faithfulness") is not False,
            lens=more.get("lens", 0),  # type: ignore[arg-type]
        )
        assert told["usage"]["computed_tokens"] <= effort.most(explain, len(told["tokens"]) + max(map(len, answers)))
    answer = post(decoder, "/v1/explain", messages=CHAT[1:], target="x", against=many, faithfulness=False)
    assert answer.status_code == 200


def test_what_no_context_holds_is_refused_before_it_becomes_tokens(
    decoder: Service, classifier: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megabytes of text cost nobody anything."""
    from steelyard.text.tokenizer import Tokenizer

    long = "a" * 3_000_000
    asked: tuple[tuple[Service, str, dict[str, Any], str], ...] = (
        (decoder, "/v1/completions", {"prompt": long}, "prompt"),
        (decoder, "/v1/completions", {"prompt": ["a", long]}, "prompt"),
        (decoder, "/v1/explain", {"input": long}, "input"),
        (classifier, "/v1/explain", {"input": long}, "input"),
        (classifier, "/v1/classify", {"input": ["a", long]}, "input"),
    )
    with monkeypatch.context() as patch:
        for name in ("encode", "encode_plain", "spans"):
            patch.setattr(Tokenizer, name, lambda *_, **__: pytest.fail("it was read"))
        for service, path, body, param in asked:
            assert "3,000,000 characters" in refused(service, path, param, **body)
    assert post(classifier, "/v1/classify", input="a").status_code == 200
