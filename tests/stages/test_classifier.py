"""Classifiers by the stages that users call: trained from nothing and on an encoder, resumed, evaluated, asked."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel

from interrupted import ends_the_same
from steelyard.data.chat import FormatConfig
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.models import classifiers
from steelyard.models.inputs import TextInputs, around
from steelyard.stages.evaluate import evaluate
from steelyard.stages.labelling import Classification
from steelyard.stages.predict import predict
from steelyard.stages.train import train
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.networks import LstmNetwork
from steelyard.train.optimizers import OptimizerConfig

WORDS = {"cat": ["meow", "purr", "whiskers", "tail", "milk"], "dog": ["woof", "bark", "leash", "bone", "tail"]}


def write_rows(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            label = draw.choice(sorted(WORDS))
            words = [draw.choice(WORDS[label]) for _ in range(draw.randint(2, 9))]
            file.write(json.dumps({"text": f"{' '.join(words)} {draw.randrange(10**6)}", "label": label}) + "\n")
    return path


def configuration(folder: Path, **fields: Any) -> TrainConfig:
    train_rows = write_rows(folder / "rows.jsonl", 160, 0)
    settings: dict[str, Any] = {
        "task": "classification",
        "output": str(folder / "run"),
        "data": DataConfig(train=str(train_rows), holdout=40),
        "epochs": 6,
        "batch_size": 16,
        "optimizer": OptimizerConfig(name="auto"),
        **fields,
    }
    if "model" not in settings:
        settings.setdefault("network", LstmNetwork(vocabulary=400, embedding=16, hidden=16, dense=8))
    return TrainConfig(**settings)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=512, num_attention_heads=2, max_position_embeddings=64, **sizes)
    folder = tmp_path_factory.mktemp("encoder") / "tiny-bert"
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_tokenizer_folder / name, folder / name)
    return folder


def test_from_nothing_to_a_prediction(tmp_path: Path) -> None:
    done = train(configuration(tmp_path, optimizer=OptimizerConfig(name="auto", learning_rate=1e-2), epochs=20))
    assert done.finished
    assert done.path is not None
    assert done.metrics["validation_accuracy"] > 0.9
    assert "adamw: from scratch" in (tmp_path / "run" / "log.txt").read_text()
    assert "classification by a new lstm" in Path(done.report).read_text()
    held = write_rows(tmp_path / "held.jsonl", 60, 1)
    found = evaluate(Path(done.path), held, FormatConfig())
    assert isinstance(found, Classification)
    assert found.labels == ("cat", "dog")
    assert found.accuracy > 0.9
    low, high = found.accuracy_interval
    assert 0 <= low < found.accuracy <= high <= 1
    assert predict(Path(done.path), held, tmp_path / "out.jsonl", FormatConfig()) == 60
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sum(row["prediction"] == row["label"] for row in rows) == round(found.accuracy * 60)
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)


def test_an_interrupted_run_ends_the_same(tmp_path: Path) -> None:
    ends_the_same(tmp_path, lambda folder: configuration(folder, checkpoint_every=3), (7, 31))


def test_on_a_trained_encoder(encoder: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=2e-3, layer_decay=0.9)
    done = train(configuration(tmp_path, model=str(encoder), optimizer=optimizer))
    assert done.metrics["validation_accuracy"] > 0.9
    opened = classifiers.load(Path(str(done.path)))
    assert opened.labels == ("cat", "dog")
    before = classifiers.load_encoder(encoder)
    assert not torch.equal(opened.network.encoder.embeddings.LayerNorm.weight, before.embeddings.LayerNorm.weight)  # type: ignore[union-attr]


def test_features_alone(encoder: Path, tmp_path: Path) -> None:
    """With everything below the head frozen it is feature extraction."""
    from steelyard.train.optimizers.groups import GroupConfig

    optimizer = OptimizerConfig(learning_rate=1e-2, groups=(GroupConfig(match="^encoder", scale=0.0),))
    done = train(configuration(tmp_path, model=str(encoder), optimizer=optimizer, epochs=2, dtype="float32"))
    opened, before = classifiers.load(Path(str(done.path))), classifiers.load_encoder(encoder)
    kept = opened.network.encoder.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"network": None}, "name one of them"),
        ({"model": "somewhere", "network": LstmNetwork()}, "name one of them"),
        ({"network": LstmNetwork(hidden=0)}, "network.hidden"),
        ({"network": LstmNetwork(dropout=1.0)}, "network.dropout"),
        ({"task": "generation"}, "network.kind lstm is none for task generation"),
        ({"task": "preference"}, "leave .network. out"),
        ({"method": "full"}, "method means nothing to task classification"),
        ({"beta": 0.2}, "beta means nothing"),
        ({"data": DataConfig(train="x", bad_files=2)}, "data.bad_files means nothing to a classifier of texts"),
    ],
)
def test_a_configuration_that_cannot_be_run(tmp_path: Path, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(msgspec.structs.replace(configuration(tmp_path), **fields))


def test_rows_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some text\n\nand more\n")
    with pytest.raises(DataError, match="labelled rows"):
        train(msgspec.structs.replace(configuration(tmp_path), data=DataConfig(train=str(path))))


def test_a_label_that_the_classifier_does_not_know(tmp_path: Path) -> None:
    done = train(configuration(tmp_path, epochs=1))
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": "x", "label": label}) + "\n" for label in ("cat", "bird")))
    with pytest.raises(DataError, match=r"other\.jsonl:2: .*'bird'; this classifier knows cat, dog"):
        evaluate(Path(str(done.path)), other, FormatConfig())


@pytest.mark.parametrize(("too_long", "rows"), [("error", 0), ("truncate", 160), ("drop", 159)])
def test_rows_that_are_too_long(tmp_path: Path, too_long: str, rows: int) -> None:
    config = configuration(tmp_path, epochs=1)
    path = Path(config.data.train)
    lines = path.read_text().splitlines()
    lines[3] = json.dumps({"text": "meow " * 300, "label": "cat"})
    path.write_text("\n".join(lines) + "\n")
    data = msgspec.structs.replace(config.data, too_long=too_long, max_length=64, holdout=0, validation=None)
    config = msgspec.structs.replace(config, data=data)
    if too_long == "error":
        with pytest.raises(DataError, match=r"rows\.jsonl:4: \d+ tokens, at most 64 fit"):
            train(config)
        return
    begun: list[Any] = []
    train(config, begun=lambda trainer, counts: begun.append(trainer.task.rows))
    assert begun == [rows]
    with pytest.raises(ConfigError, match="too_long 'never' is not known"):
        train(msgspec.structs.replace(config, data=msgspec.structs.replace(data, too_long="never")))


def test_a_long_text_is_read_in_windows(tmp_path: Path) -> None:
    """What tells the classes apart stands behind all that a cut row would have; the checkpoint knows how it is read."""
    draw = random.Random(5)

    def rows(path: Path, count: int) -> Path:
        with path.open("w") as file:
            for _ in range(count):
                label = draw.choice(sorted(WORDS))
                words = [draw.choice(WORDS[label][:3]) for _ in range(12)]
                file.write(json.dumps({"text": "so it was said " * 8 + " ".join(words), "label": label}) + "\n")
        return path

    learnt, held = rows(tmp_path / "long.jsonl", 200), rows(tmp_path / "held.jsonl", 60)
    found = {}
    for too_long in ("truncate", "windows"):
        data = DataConfig(train=str(learnt), max_length=24, too_long=too_long, deduplicate=False)
        done = train(configuration(tmp_path, output=str(tmp_path / too_long), data=data, epochs=16))
        path = Path(str(done.path))
        classifier = classifiers.load(path)
        assert classifier.text.window == (24 if too_long == "windows" else None)
        found[too_long] = evaluate(path, held, FormatConfig())
    assert isinstance(found["windows"], Classification)
    assert found["windows"].accuracy > 0.9
    predict(path, held, tmp_path / "said.jsonl", FormatConfig())
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    share = sum(row["prediction"] == row["label"] for row in said) / len(said)
    assert share == pytest.approx(found["windows"].accuracy)
    text = json.loads(held.read_text().splitlines()[0])["text"]
    parts = classifier.text.windows(classifier.text.all_tokens(text))
    assert len(parts) > 1
    scores = classifiers.log_probabilities(classifier, parts)
    sizes = torch.tensor([[float(len(part))] for part in parts])
    mean = ((scores * sizes).sum(0) / sizes.sum()).log_softmax(-1)
    torch.testing.assert_close(classifiers.of_texts(classifier, [text])[0][0], mean, rtol=1e-5, atol=1e-5)
    config = json.loads((path / "config.json").read_text())
    for window in (3, 10**9 if classifier.text.context else -1, "x"):
        (path / "config.json").write_text(json.dumps({**config, "window": window}))
        with pytest.raises(CheckpointError, match="window must be"):
            classifiers.load(path)


def test_a_row_without_a_label_is_named(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"text": "purr"}) + "\n")
    data = msgspec.structs.replace(config.data, holdout=0, validation=str(bare))
    with pytest.raises(DataError, match=r"bare\.jsonl:1: field 'label': has no label"):
        train(msgspec.structs.replace(config, data=data))
    data = DataConfig(train=str(bare), labels=("cat", "dog"))
    with pytest.raises(DataError, match=r"bare\.jsonl:1: field 'label': has no label"):
        train(msgspec.structs.replace(config, data=data))


def test_a_long_text_counts_for_no_more_than_some_windows(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    texts = [" ".join(f"w{number}" for number in range(size)) for size in (2, 300, 3)]
    path.write_text("".join(json.dumps({"text": text, "label": "ab"[len(text) > 20]}) + "\n" for text in texts))
    held = tmp_path / "other.jsonl"
    held.write_text(path.read_text().replace("w", "v"))
    counts: list[tuple[int, list[int], int]] = []

    def begun(trainer: Any, _: Any) -> None:
        learnt = [len(row) for row in trainer.task._learnt.examples]
        counts.append((trainer.task.rows, learnt, len(trainer.task._held.labels)))

    for most in (1, 3, 10_000):
        data = DataConfig(train=str(path), validation=str(held), max_length=24, too_long="windows", max_windows=most)
        train(configuration(tmp_path, output=str(tmp_path / str(most)), data=data, epochs=1), begun=begun)
    assert [rows for rows, _, _ in counts[:2]] == [3, 5]
    assert counts[2][0] > 20
    assert len({held for _, _, held in counts}) == 1, "how far it is is told by all that there is"
    assert counts[1][1].count(24) == 3, "the last one of all is shorter"
    with pytest.raises(ConfigError, match=r"data\.max_windows must be at least 1, not 0"):
        train(configuration(tmp_path, data=msgspec.structs.replace(data, max_windows=0)))


@given(st.integers(0, 90), st.integers(8, 40))
def test_windows_lose_nothing(encoder: Path, length: int, window: int) -> None:
    inputs = TextInputs(Tokenizer.load(encoder), 64, window)
    before, after = around(inputs.tokenizer)
    text = list(range(100, 100 + length))
    parts = inputs.windows([*before, *text, *after])
    assert max(map(len, parts)) <= window
    assert [token for part in parts for token in part[len(before) : len(part) - len(after)]] == text
