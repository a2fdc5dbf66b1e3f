"""Taggers by the stages that users call: tagged sentences in, a tag for every word out."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from interrupted import ends_the_same
from steelyard.data import tagged
from steelyard.data.chat import FormatConfig
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.models import classifiers
from steelyard.models.inputs import shape
from steelyard.stages.evaluate import evaluate
from steelyard.stages.export_onnx import onnx as export_onnx
from steelyard.stages.labelling import Classification
from steelyard.stages.predict import predict
from steelyard.stages.train import train
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.optimizers import OptimizerConfig

WORDS = {"the": "at", "a": "at", "dog": "nn", "house": "nn", "Rome": "np", "rome": "nn", "fell": "vbd", "12": "cd"}


def write_rows(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            words = [draw.choice(list(WORDS)) for _ in range(draw.randint(1, 9))]
            file.write(json.dumps({"tokens": words, "tags": [WORDS[word] for word in words]}) + "\n")
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=512, num_attention_heads=2, max_position_embeddings=48, **sizes)
    folder = tmp_path_factory.mktemp("encoder") / "tiny-bert"
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_tokenizer_folder / name, folder / name)
    return folder


def configuration(folder: Path, encoder: Path, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "task": "tagging",
        "model": str(encoder),
        "output": str(folder / "run"),
        "data": DataConfig(train=str(write_rows(folder / "rows.jsonl", 150, 0)), holdout=30),
        "epochs": 10,
        "dtype": "float32",
        "optimizer": OptimizerConfig(learning_rate=5e-3),
    }
    return TrainConfig(**{**settings, **fields})


def test_from_an_encoder_to_tags(encoder: Path, tmp_path: Path) -> None:
    done = train(configuration(tmp_path, encoder))
    assert done.metrics["validation_accuracy"] > 0.95
    held = write_rows(tmp_path / "held.jsonl", 50, 1)
    words = sum(len(json.loads(line)["tokens"]) for line in held.read_text().splitlines())
    found = evaluate(Path(str(done.path)), held, FormatConfig())
    assert isinstance(found, Classification)
    assert found.rows == words
    assert found.accuracy > 0.95
    assert predict(Path(str(done.path)), held, tmp_path / "out.jsonl", FormatConfig()) == 50
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    pairs = [pair for row in rows for pair in zip(row["tags"], row["prediction"], strict=True)]
    assert sum(truth == said for truth, said in pairs) == round(found.accuracy * words)


def test_a_words_tag_depends_on_no_other_row(encoder: Path) -> None:
    tagger = classifiers.on_encoder(encoder, ["a", "b"], torch.Generator(), classifiers.EncoderTagger)
    tagger.network.eval()
    rows = [tagger.words.sentence(words) for words in (["the", "Rome"], ["a"], ["dog", "fell", "12", "house"])]
    together = classifiers.log_probabilities(tagger, rows)
    assert together.shape == (7, 2)
    alone = torch.cat([classifiers.log_probabilities(tagger, [row]) for row in rows])
    torch.testing.assert_close(together, alone)


def test_both_forms_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"tokens": ["The", "dog"], "tags": ["at", "nn"]}\n{"tokens": ["a"], "tags": ["at"]}\n'
    )
    (tmp_path / "a.tsv").write_text("The\tat\ndog\tnn\n\n\na\tat\n")
    first, second = (tagged.read(tmp_path / name, FormatConfig()) for name in ("a.jsonl", "a.tsv"))
    assert [(row.words, row.tags) for row in first] == [(row.words, row.tags) for row in second]
    assert [row.line for row in second] == [1, 5]
    (tmp_path / "b.tsv").write_text("The\ndog\n")
    assert tagged.read(tmp_path / "b.tsv", FormatConfig(), tagged=False)[0].tags is None


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"tokens": ["a"]}', "field 'tags': must be a list"),
        ("a.jsonl", '{"tokens": "a", "tags": ["b"]}', "field 'tokens': must be a list"),
        ("a.jsonl", '{"tokens": ["a", ""], "tags": ["b", "c"]}', "none of them empty"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["b"]}', "1 tags for 2 words"),
        ("a.jsonl", json.dumps({"tokens": ["a" * 2000], "tags": ["b"]}), "at most"),
        ("a.tsv", "the\tat\ndog\n", r"a.tsv:2: a word and its tag"),
        ("a.tsv", "the\tat\tx\n", "one tab"),
        ("a.tsv", "the\t \n", "is empty"),
        ("a.tsv", "\n\n", "no rows"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=complaint):
        tagged.read(tmp_path / name, FormatConfig())


def test_what_a_tagger_cannot_do_is_said(encoder: Path, tmp_path: Path) -> None:
    done = train(configuration(tmp_path, encoder, epochs=1))
    path = Path(str(done.path))
    (tmp_path / "new.jsonl").write_text('{"tokens": ["a"], "tags": ["zz"]}\n')
    with pytest.raises(DataError, match=r"new.jsonl:1: the tag 'zz' is none of at, "):
        evaluate(path, tmp_path / "new.jsonl", FormatConfig())
    (tmp_path / "long.jsonl").write_text(json.dumps({"tokens": ["house"] * 100, "tags": ["nn"] * 100}) + "\n")
    with pytest.raises(DataError, match="48 fit: part the sentence"):
        evaluate(path, tmp_path / "long.jsonl", FormatConfig())
    with pytest.raises(CheckpointError, match="reads no texts"):
        classifiers.load(path).text  # noqa: B018
    config = configuration(tmp_path, encoder, data=DataConfig(train="rows.jsonl", max_length=9))
    with pytest.raises(ConfigError, match="max_length means nothing"):
        train(config)


def test_shapes() -> None:
    words = ["house", "Rome", "NATO", "McAdam", "1961", "well-known", "A", ",", "3rd", "x-Ray"]
    assert [shape(word) for word in words] == [1, 2, 3, 4, 5, 6, 7, 0, 1, 4]


def test_the_same_sentence_is_not_validated_on(encoder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 20, 0)
    config = configuration(tmp_path, encoder, data=DataConfig(train=str(rows), validation=str(rows)))
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: the same is in the training data, line \d+"):
        train(config)


def test_two_files_of_one_name_are_told_apart(encoder: Path, tmp_path: Path) -> None:
    places = []
    for seed, name in enumerate(("train", "valid")):
        (tmp_path / name).mkdir()
        line = {"tokens": [f"word{seed}", "the"], "tags": ["nn", "at"]}
        places.append(tmp_path / name / "rows.jsonl")
        places[-1].write_text(json.dumps(line) + "\n")
    data = DataConfig(train=str(places[0]), validation=str(places[1]))
    done = train(configuration(tmp_path, encoder, data=data, epochs=1))
    said = json.loads((Path(str(done.path)) / "steelyard.json").read_text())
    assert set(said["data"]) == {"train: rows.jsonl", "validation: rows.jsonl"}


def write_turns(path: Path, count: int, seed: int) -> Path:
    """Rows in which a tag says nothing of its word alone: every other word is a 'b', after a first that is drawn."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            first, length = draw.random() < 0.5, draw.randint(1, 12)
            words = ["dog" if first else "house", *(draw.choice(["the", "a"]) for _ in range(length))]
            tags = [("a", "b")[(place + first) % 2] for place in range(length + 1)]
            file.write(json.dumps({"tokens": words, "tags": tags}) + "\n")
    return path


def test_tags_in_a_chain(encoder: Path, tmp_path: Path) -> None:
    """A chain reads rows that no single word tells of, says the k likeliest sequences, and is saved and opened."""
    data = DataConfig(train=str(write_turns(tmp_path / "turns.jsonl", 150, 0)), holdout=30)
    done = train(configuration(tmp_path, encoder, data=data, chain=True, epochs=6))
    assert done.metrics["validation_accuracy"] > 0.99
    path, held = Path(str(done.path)), write_turns(tmp_path / "held.jsonl", 40, 1)
    found = evaluate(path, held, FormatConfig())
    assert isinstance(found, Classification)
    assert found.accuracy > 0.99
    predict(path, held, tmp_path / "out.jsonl", FormatConfig())
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(row["prediction"] == row["tags"] for row in rows)
    tagger = classifiers.load(path)
    example = tagger.words.sentence(["dog", "the", "a"])
    (paths,) = classifiers.tagged(tagger, [example], k=100)
    assert len(paths) == 8
    weights = [math.exp(one.score) for one in paths]
    assert sum(weights) == pytest.approx(1, abs=1e-4)
    assert weights == sorted(weights, reverse=True)
    marginals = classifiers.log_probabilities(tagger, [example]).exp()
    for place in range(3):
        expected = sum(weight for one, weight in zip(paths, weights, strict=True) if one.labels[place] == 1)
        assert float(marginals[place, 1]) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigError, match="finds a sentence's tags together"):
        export_onnx(path, tmp_path / "tagger.onnx")
    other = classifiers.swap_head(path, ["x", "y", "z"], torch.Generator(), chain=True)
    assert classifiers.log_probabilities(other, [example]).shape == (3, 3)
    with pytest.raises(ConfigError, match="label_smoothing means nothing to a chain"):
        train(configuration(tmp_path, encoder, chain=True, label_smoothing=0.1))


def test_what_goes_on_has_begun(encoder: Path) -> None:
    """Begin-inside-outside labels, without a chain that was learnt."""
    labels = ["B-name", "I-name", "O"]
    kind, draw_ = classifiers.EncoderTagger, torch.Generator().manual_seed(1)
    tagger = classifiers.on_encoder(encoder, labels, draw_, kind, bio=True)
    tagger.network.eval()
    tagger.network.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(2))  # type: ignore[union-attr,operator]
    draw = random.Random(0)
    rows = [tagger.words.sentence(draw.choices(list(WORDS), k=6)) for _ in range(30)]
    alone = [path.labels for path in (row[0] for row in classifiers.tagged(tagger, rows))]
    assert any(1 in row for row in alone)
    assert all(row[0] != 1 and (2, 1) not in set(itertools.pairwise(row)) for row in alone)


@pytest.mark.parametrize("chain", [False, True])
def test_an_interrupted_run_ends_the_same(encoder: Path, tmp_path: Path, chain: bool) -> None:
    settings: dict[str, Any] = {"checkpoint_every": 4, "epochs": 2, "chain": chain}
    ends_the_same(tmp_path, lambda folder: configuration(folder, encoder, **settings), (5, 21))
