"""Students by the stage that users call: small networks that learn from larger ones, and from texts without labels."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from interrupted import ends_the_same
from steelyard.checkpoint import manifest
from steelyard.data import chat
from steelyard.data.chat import FormatConfig
from steelyard.data.rows import Conversation
from steelyard.errors import ConfigError, DataError
from steelyard.stages.evaluate import evaluate
from steelyard.stages.labelling import Classification
from steelyard.stages.predict import predict
from steelyard.stages.tasks import teacher as teachers
from steelyard.stages.train import train
from steelyard.train.config import DataConfig, DistillConfig, TrainConfig
from steelyard.train.networks import ConvNetwork, LstmNetwork
from steelyard.train.optimizers import OptimizerConfig

WORDS = {name: [f"{name}{number}" for number in range(40)] for name in ("cat", "dog")}
SMALL = LstmNetwork(vocabulary=400, embedding=16, hidden=16, dense=8)


def write_rows(path: Path, count: int, seed: int, labels: bool = True) -> Path:
    """A label's words are many: few rows show few of them."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            label = draw.choice(sorted(WORDS))
            row = {"text": f"{draw.choice(WORDS[label])} {draw.choice(WORDS[label])} {draw.randrange(10**6)}"}
            file.write(json.dumps(row | ({"label": label} if labels else {})) + "\n")
    return path


def configuration(folder: Path, rows: Path, distill: DistillConfig, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "task": "classification",
        "network": SMALL,
        "output": str(folder / "run"),
        "data": DataConfig(train=str(rows)),
        "epochs": 12,
        "batch_size": 16,
        "distill": distill,
        "optimizer": OptimizerConfig(name="adamw", learning_rate=1e-2),
    }
    return TrainConfig(**{**settings, **fields})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    done = train(configuration(folder, write_rows(folder / "rows.jsonl", 600, 0), DistillConfig(), epochs=6))
    return Path(str(done.path))


def accuracy(checkpoint: str | None, held: Path) -> float:
    found = evaluate(Path(str(checkpoint)), held, FormatConfig())
    assert isinstance(found, Classification)
    return found.accuracy


def test_a_student_of_few_labels_and_many_texts(teacher: Path, tmp_path: Path) -> None:
    few, held = write_rows(tmp_path / "few.jsonl", 12, 1), write_rows(tmp_path / "held.jsonl", 200, 2)
    more = write_rows(tmp_path / "more.jsonl", 400, 3, labels=False)
    more.write_text(more.read_text() + few.read_text())  # these are there already
    alone = train(configuration(tmp_path, few, DistillConfig(), output=str(tmp_path / "alone")))
    distill = DistillConfig(teacher=str(teacher), texts=str(more))
    taught = train(configuration(tmp_path, few, distill, network=SMALL))
    assert taught.data == {"rows": 12, "validation_rows": 0, "labels": 2, "texts": 400}
    assert accuracy(taught.path, held) > 0.95 > accuracy(alone.path, held) + 0.05
    origin = manifest.read(Path(str(taught.path)))
    assert origin.data["teacher"] == manifest.read(teacher).id
    assert origin.data["texts: more.jsonl"] == manifest.sha256_file(more)


def test_an_interrupted_run_ends_the_same_and_asks_once(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = teachers.log_probabilities

    def counted(checkpoint: Path, rows: Sequence[Conversation], labels: Sequence[str]) -> torch.Tensor:
        asked.append(len(rows))
        return real(checkpoint, rows, labels)

    monkeypatch.setattr(teachers, "log_probabilities", counted)
    rows, more = write_rows(tmp_path / "rows.jsonl", 40, 1), write_rows(tmp_path / "more.jsonl", 20, 2)
    distill = DistillConfig(teacher=str(teacher), texts=str(more), divergence="jensen-shannon", temperature=3.0)
    config = {"epochs": 3, "checkpoint_every": 2}
    ends_the_same(tmp_path, lambda folder: configuration(folder, rows, distill, **config), (3, 7))
    assert asked == [60, 60], "once a run, however often it is cut off"
    train(configuration(tmp_path / "cut", rows, distill, **config))
    assert asked == [60, 60], "nor when it is finished"


def test_a_model_that_answers_with_a_label_teaches(tiny_model: Path, tmp_path: Path) -> None:
    """What it holds likely is what `predict` says of it."""
    rows = write_rows(tmp_path / "rows.jsonl", 20, 1)
    read = list(chat.texts(rows, FormatConfig()))
    found = teachers.log_probabilities(tiny_model, read, ("cat", "dog")).exp()
    predict(tiny_model, rows, tmp_path / "said.jsonl", FormatConfig(labels=("cat", "dog")))
    said = [json.loads(line)["probabilities"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    expected = torch.tensor([[row["cat"], row["dog"]] for row in said])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert train(configuration(tmp_path, rows, DistillConfig(teacher=str(tiny_model)), epochs=1)).finished


def test_a_model_is_asked_as_it_was_tuned(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its labels stand in its own order in the question; what it holds of them comes back in ours."""
    read = list(chat.texts(write_rows(tmp_path / "rows.jsonl", 20, 1), FormatConfig()))
    own = FormatConfig(labels=("dog", "cat"))
    monkeypatch.setattr(teachers, "trained_format", lambda checkpoint: own)
    found = teachers.log_probabilities(tiny_model, read, ("cat", "dog")).exp()
    predict(tiny_model, tmp_path / "rows.jsonl", tmp_path / "said.jsonl", own)
    said = [json.loads(line)["probabilities"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    expected = torch.tensor([[row["cat"], row["dog"]] for row in said])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="knows the labels dog, cat; the rows have cat, wolf"):
        teachers.log_probabilities(tiny_model, read, ("cat", "wolf"))


def test_of_a_long_text_every_part_has_the_teachers_word(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    texts = [(f"{label}{number} " * 30, label) for number in range(3) for label in ("cat", "dog")]
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts))
    parts: list[int] = []
    data = DataConfig(train=str(path), max_length=24, too_long="windows")
    config = configuration(tmp_path, path, DistillConfig(teacher=str(teacher)), data=data, epochs=1)

    def begun(trainer: Any, _: Any) -> None:
        parts.append(trainer.task.rows)
        assert len(trainer.task._teacher) == trainer.task.rows
        assert torch.equal(trainer.task._teacher[0], trainer.task._teacher[1])

    train(config, begun=begun)
    assert parts[0] > 12


@pytest.mark.parametrize(
    ("distill", "complaint"),
    [
        (DistillConfig(texts="more.jsonl"), "distill needs a teacher"),
        (DistillConfig(teacher="x", weight=0.0), "distill.weight must be above 0"),
        (DistillConfig(teacher="x", weight=1.5), "distill.weight must be above 0 and at most 1, not 1.5"),
        (DistillConfig(teacher="x", temperature=0.0), "distill.temperature must be above 0"),
    ],
)
def test_a_wrong_setting_is_named(distill: DistillConfig, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(configuration(tmp_path, write_rows(tmp_path / "rows.jsonl", 20, 1), distill))


def test_a_teacher_of_something_else(teacher: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"a {number}", "label": "xy"[number % 2]}) + "\n" for number in range(9))
    )
    with pytest.raises(ConfigError, match=r"distill\.teacher knows the labels cat, dog; the rows have x, y"):
        train(configuration(tmp_path, rows, DistillConfig(teacher=str(teacher))))
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"words": "none"}) + "\n")
    with pytest.raises(DataError, match=r"empty.jsonl:1: field 'text'"):
        train(configuration(tmp_path, rows, DistillConfig(teacher=str(teacher), texts=str(empty))))
    for content, complaint in (("", "the file has no rows"), (rows.read_text(), "texts come as rows here")):
        other = tmp_path / ("none.txt" if content else "none.jsonl")
        other.write_text(content)
        with pytest.raises(DataError, match=complaint):
            train(configuration(tmp_path, rows, DistillConfig(teacher=str(teacher), texts=str(other))))
    network = ConvNetwork(image_size=8, channels=1, widths=(8,))
    config = configuration(tmp_path, rows, DistillConfig(teacher=str(teacher)), network=network)
    with pytest.raises(ConfigError, match="distill means nothing to a classifier of images"):
        train(msgspec.structs.replace(config, data=DataConfig(train=str(tmp_path))))
