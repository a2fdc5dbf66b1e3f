"""Models that read and do not write, over HTTP with the SDK: embeddings, classes, tags, as the stages have them."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running_service import Service, eventually, serving

from steelyard.serve.engine_client import worker_command

WORDS = {"the": "O", "Rome": "B-place", "York": "I-place", "New": "B-place", "fell": "O", "house": "O"}
LABELS = ["cold", "warm"]
TEXTS = ["The steelyard weighs exactly.", "Grüße 😀", "a b c d e f g " * 4, "x"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=512, num_attention_heads=2, max_position_embeddings=96, **sizes)
    folder = tmp_path_factory.mktemp("reading") / "sentences"
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_tokenizer_folder / name, folder / name)
    return folder


def trained(folder: Path, encoder: Path, task: str, **fields: Any) -> Path:
    from steelyard.stages.train import train
    from steelyard.train.config import DataConfig, TrainConfig
    from steelyard.train.optimizers import OptimizerConfig

    rows = folder / "rows.jsonl"
    draw = random.Random(0)
    with rows.open("w") as file:
        for _ in range(120):
            words = draw.choices(list(WORDS), k=draw.randint(1, 8))
            label = LABELS["Rome" in words]
            tagged = {"tokens": words, "tags": [WORDS[word] for word in words]}
            file.write(json.dumps(tagged if task == "tagging" else {"text": " ".join(words), "label": label}) + "\n")
    config = TrainConfig(
        task=task,  # type: ignore[arg-type]
        model=str(encoder),
        output=str(folder / "run"),
        data=DataConfig(train=str(rows), deduplicate=False, **fields.pop("data", {})),
        epochs=6,
        dtype="float32",
        optimizer=OptimizerConfig(learning_rate=5e-3),
        **fields,
    )
    done = train(config)
    place = folder / f"tiny-{task}"
    shutil.copytree(str(done.path), place)
    return place


@pytest.fixture(scope="module")
def sentences(encoder: Path) -> Iterator[Service]:
    with serving(encoder, command=worker_command, seconds=60) as service:
        yield service


@pytest.fixture(scope="module")
def classifier(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data = {"max_length": 32, "too_long": "windows"}
    folder = trained(tmp_path_factory.mktemp("classifier"), encoder, "classification", data=data)
    with serving(folder, command=worker_command, seconds=60) as service:
        yield service


@pytest.fixture(scope="module")
def tagger(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = trained(tmp_path_factory.mktemp("tagger"), encoder, "tagging", chain=True)
    with serving(folder, command=worker_command, seconds=60) as service:
        yield service


def test_embeddings_are_the_encoders(sentences: Service, encoder: Path) -> None:
    """As floats, in base64 (which the SDK asks for by default), cut short, of tokens; and what they cost."""
    from steelyard.models import classifiers
    from steelyard.models.inputs import padded
    from steelyard.text.tokenizer import Tokenizer

    client, network = sentences.sdk(), classifiers.load_encoder(encoder)
    ids = [Tokenizer.load(encoder).encode_plain(text, add_special_tokens=True) for text in TEXTS]
    expected = network.embed(*padded(ids)).tolist()
    whole = client.embeddings.create(model="sentences", input=TEXTS, encoding_format="float")
    assert [one.index for one in whole.data] == [0, 1, 2, 3]
    for one, vector in zip(whole.data, expected, strict=True):
        assert one.embedding == pytest.approx(vector, abs=1e-5)
    assert whole.usage.prompt_tokens == whole.usage.total_tokens == sum(map(len, ids))
    coded = client.embeddings.create(model="sentences", input=TEXTS)
    of_tokens = client.embeddings.create(model="sentences", input=ids)
    for one, other, third in zip(coded.data, of_tokens.data, whole.data, strict=True):
        assert one.embedding == pytest.approx(third.embedding, abs=1e-6)
        assert other.embedding == pytest.approx(third.embedding, abs=1e-6)
    (short,) = client.embeddings.create(model="sentences", input="x", dimensions=8, encoding_format="float").data
    assert len(short.embedding) == 8
    assert sum(value * value for value in short.embedding) == pytest.approx(1, abs=1e-5)
    (single,) = client.embeddings.create(model="sentences", input=ids[0], encoding_format="float").data
    assert single.embedding == pytest.approx(expected[0], abs=1e-5)


def test_likeness_and_order(sentences: Service) -> None:
    with sentences.http() as client:
        body = {"model": "sentences", "text_1": TEXTS[0], "text_2": TEXTS}
        told = client.post("/v1/score", json=body).json()
        assert [row["index"] for row in told["data"]] == [0, 1, 2, 3]
        assert told["data"][0]["score"] == pytest.approx(1, abs=1e-5)
        assert told["usage"]["prompt_tokens"] > 0
        ranked = client.post("/v1/rerank", json={"model": "sentences", "query": TEXTS[0], "documents": TEXTS}).json()
        scores = [row["relevance_score"] for row in ranked["results"]]
        assert scores == sorted(scores, reverse=True)
        assert ranked["results"][0]["index"] == 0
        assert ranked["results"][0]["document"]["text"] == TEXTS[0]
        by_index = {row["index"]: row["relevance_score"] for row in ranked["results"]}
        for row in told["data"]:
            assert by_index[row["index"]] == pytest.approx(row["score"], abs=1e-6)
        body = {"model": "sentences", "query": "x", "documents": TEXTS, "top_n": 2}
        assert len(client.post("/v1/rerank", json=body).json()["results"]) == 2


def test_classes_are_those_of_evaluation(classifier: Service) -> None:
    """Of short texts, and of one that is read in windows."""
    from steelyard.models import classifiers

    texts = ["the house fell", "Rome fell", "the house " * 60, "Rome the " * 60]
    loaded = classifiers.load(classifier.checkpoint)
    expected, tokens = classifiers.of_texts(loaded, texts)
    with classifier.http() as client:
        told = client.post("/v1/classify", json={"model": "tiny-classification", "input": texts}).json()
    assert [row["label"] for row in told["data"]] == ["cold", "warm", "cold", "warm"]
    assert told["labels"] == ["cold", "warm"]
    for row, scores in zip(told["data"], expected.exp().tolist(), strict=True):
        assert row["probs"] == pytest.approx(scores, abs=1e-5)
        assert row["num_classes"] == 2
    assert 0 < told["usage"]["prompt_tokens"] <= tokens


def test_tags_have_offsets_and_the_k_best(tagger: Service) -> None:
    from steelyard.models import classifiers

    text = "the house, Rome and  New York fell"
    with tagger.http() as client:
        told = client.post("/v1/tag", json={"model": "tiny-tagging", "input": text, "n": 3}).json()["data"][0]
        words = [row["word"] for row in told["words"]]
        assert words == ["the", "house", ",", "Rome", "and", "New", "York", "fell"]
        assert all(text[row["start"] : row["end"]] == row["word"] for row in told["words"])
        loaded = classifiers.load(tagger.checkpoint)
        example = loaded.words.sentence(words)
        (expected,) = classifiers.tagged(loaded, [example], k=3)
        assert len(told["sequences"]) == 3
        for sequence, path in zip(told["sequences"], expected, strict=True):
            assert sequence["tags"] == [loaded.labels[label] for label in path.labels]
            assert sequence["logprob"] == pytest.approx(path.score, abs=1e-4)
        marginals = classifiers.log_probabilities(loaded, [example]).exp()
        for place, row in enumerate(told["words"]):
            assert row["tag"] == told["sequences"][0]["tags"][place]
            assert row["probability"] == pytest.approx(float(marginals[place, expected[0].labels[place]]), abs=1e-4)
        body = {"model": "tiny-tagging", "input": [["Rome", "fell"], ["New", "York"]]}
        given = client.post("/v1/tag", json=body).json()["data"]
        assert [[row["tag"] for row in one["words"]] for one in given] == [["B-place", "O"], ["B-place", "I-place"]]
        assert [(row["start"], row["end"]) for row in given[0]["words"]] == [(0, 4), (5, 9)]


def test_what_a_model_does_not_do_is_said(sentences: Service, tagger: Service) -> None:
    asked: list[tuple[Service, str, dict[str, Any], str]] = [
        (sentences, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "model"),
        (sentences, "/v1/completions", {"prompt": "x"}, "model"),
        (sentences, "/v1/classify", {"input": "x"}, "model"),
        (sentences, "/v1/embeddings", {"input": "x", "dimensions": 33}, "dimensions"),
        (sentences, "/v1/embeddings", {"input": [[600]]}, "input"),
        (sentences, "/v1/embeddings", {"input": ["x", "y " * 200]}, "input"),
        (sentences, "/v1/embeddings", {"input": []}, "input"),
        (sentences, "/v1/embeddings", {"input": "x", "truncate": True}, "truncate"),
        (sentences, "/v1/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        (tagger, "/v1/embeddings", {"input": "x"}, "model"),
        (tagger, "/v1/tag", {"input": "   "}, "input"),
        (tagger, "/v1/tag", {"input": "x", "n": 65}, "n"),
        (tagger, "/v1/tag", {"input": "word " * 200}, "input"),
    ]
    for service, path, body, param in asked:
        with service.http() as client:
            answer = client.post(path, json={"model": next(iter(service.models)), **body})
        assert answer.status_code == 400, path
        assert answer.json()["error"]["param"].startswith(param), (path, answer.json())


def test_many_at_once_are_told_apart(sentences: Service) -> None:
    """Rows of like length run together; every answer is its own text's, and all are paid."""
    draw = random.Random(1)
    texts = ["".join(draw.choices("abcdef ", k=draw.randint(1, 80))).strip() or "x" for _ in range(300)]
    client = sentences.sdk()
    together = client.embeddings.create(model="sentences", input=texts, encoding_format="float")
    for place in draw.sample(range(300), 10):
        (alone,) = client.embeddings.create(model="sentences", input=texts[place], encoding_format="float").data
        assert together.data[place].embedding == pytest.approx(alone.embedding, abs=1e-5)
    assert sentences.engine.stats.steps < 300


def test_usage_is_that_of_embeddings(sentences: Service) -> None:
    """Billed under their own name, and counted there by the administration's interface."""
    before = _counted(sentences)
    told = sentences.sdk().embeddings.create(model="sentences", input=TEXTS)
    assert _counted(sentences) == before + told.usage.prompt_tokens


def test_a_batch_of_embeddings(sentences: Service) -> None:
    client = sentences.sdk()
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "sentences", "input": text},
        }
        for number, text in enumerate(TEXTS)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("rows.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    done = eventually(lambda: (found := client.batches.retrieve(batch.id)).status == "completed" and found, 30)
    told = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    expected = client.embeddings.create(model="sentences", input=TEXTS, encoding_format="float").data
    assert len(told) == len(TEXTS)
    for line in told:
        (one,) = line["response"]["body"]["data"]
        assert one["embedding"] == pytest.approx(expected[int(line["custom_id"])].embedding, abs=1e-5)


def _counted(service: Service) -> int:
    with service.admin_http() as client:
        page = client.get(
            "/v1/organization/usage/embeddings", params={"start_time": int(time.time()) - 86400, "bucket_width": "1d"}
        ).json()
    return sum(row["input_tokens"] for bucket in page["data"] for row in bucket["results"])


def test_a_model_without_adapters(sentences: Service) -> None:
    with pytest.raises(openai.NotFoundError):
        sentences.sdk().embeddings.create(model="other", input="x")
    assert httpx.get(f"{sentences.url}/ready").status_code == 200


def test_made_of_what_is_no_model_that_is_served(
    tmp_path: Path, encoder: Path, make_checkpoint: Callable[[str], Path]
) -> None:
    from steelyard.errors import CheckpointError
    from steelyard.infer.worker import start

    with pytest.raises(CheckpointError, match="reads and does not write"):
        start(encoder, {"adapter": tmp_path})


def test_one_that_cannot_be_read_leaves_others_alone(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in a pass is run again by itself, and refused by name; the engine goes on."""
    from steelyard.infer.encoder_engine import EncoderEngine, open_reader
    from steelyard.infer.request import Failure, Output, Request

    reader = open_reader(encoder)
    assert reader is not None
    answer = reader.answer

    def failing(requests: list[Request], rows: list[Any]) -> Any:
        if any(request.prompt == [7, 7, 7] for request in requests):
            raise IndexError("index out of range")
        return answer(requests, rows)

    monkeypatch.setattr(reader, "answer", failing)
    engine = EncoderEngine(reader)
    for number, prompt in enumerate(([5, 6, 7], [7, 7, 7], [8, 9, 10])):
        engine.add(Request(id=str(number), prompt=prompt))
    told = {output.id: output for _ in range(3) for output in engine.step()}
    assert [type(told[id]) for id in "012"] == [Output, Failure, Output]
    assert told["1"].param == "input"  # type: ignore[union-attr]
    assert not engine.busy
    engine.check_integrity()
