"""Encoders trained themselves: hidden tokens found, sentences told apart; against transformers, and as bases."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM

from interrupted import ends_the_same
from steelyard.errors import CheckpointError, ConfigError, DataError
from steelyard.models import classifiers, encoders
from steelyard.models.inputs import padded
from steelyard.stages.train import train
from steelyard.train import masked
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.contrastive import SCALE, Contrastive
from steelyard.train.networks import EncoderNetwork
from steelyard.train.optimizers import OptimizerConfig

SMALL = EncoderNetwork(vocabulary=320, hidden=32, layers=1, heads=2, context=32, dropout=0.0)
NOISE = {"cat": "meows", "dog": "barks", "bird": "sings", "cow": "moos"}


def write_text(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            animal = draw.choice(list(NOISE))
            text = f"the {animal} {NOISE[animal]} and the {animal} {NOISE[animal]} {number}"
            file.write(json.dumps({"text": text}) + "\n")
    return path


def configuration(folder: Path, **fields: Any) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    data = DataConfig(train=str(write_text(folder / "rows.jsonl", 200, 0)), holdout=20, deduplicate=False)
    settings: dict[str, Any] = {
        "task": "masked",
        "network": SMALL,
        "output": str(folder / "run"),
        "data": data,
        "epochs": 12,
        "optimizer": OptimizerConfig(name="adamw", learning_rate=5e-3),
    }
    return TrainConfig(**{**settings, **fields})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    data = DataConfig(train=str(write_text(folder / "rows.jsonl", 200, 0)), validation=None, deduplicate=False)
    done = train(configuration(folder, data=data))
    return Path(str(done.path))


def test_hidden_tokens_are_found_and_the_head_is_hugging_faces(trained: Path) -> None:
    model = encoders.masked(classifiers.load_encoder(trained), trained, 0)
    model.network.eval()
    reference = BertForMaskedLM.from_pretrained(trained).eval()
    tokens = model.tokenizer.encode_plain("the cat meows and the cat meows 7")
    token_ids, lengths = padded([tokens])
    with torch.no_grad():
        expected = reference(token_ids).logits[0]
        found = model.network(token_ids, lengths, torch.arange(len(tokens)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    rows = [model.tokenizer.encode_plain(f"the dog barks and the dog barks {number}") for number in range(40)]
    with torch.no_grad():
        loss = masked.MaskedLanguage(model, rows, rows).evaluate()["validation_loss"]
    assert loss < 2.5, "5.8 from nothing; the numbers cannot be known"


def test_a_share_is_hidden_in_its_ways(trained: Path) -> None:
    model = encoders.masked(classifiers.load_encoder(trained), trained, 0)
    torch.manual_seed(0)
    token_ids = torch.randint(5, 300, (200, 40))
    lengths = torch.randint(4, 41, (200,))
    shown, wanted = masked.hide(token_ids, lengths, model, None)
    places = wanted != masked.IGNORED
    assert places.sum(1).tolist() == [masked.hidden_of(length) for length in lengths.tolist()]
    assert not places[torch.arange(40) >= lengths[:, None]].any()
    assert torch.equal(wanted[places], token_ids[places])
    assert torch.equal(shown[~places], token_ids[~places])
    share = float((shown[places] == model.mask).float().mean())
    assert 0.74 < share < 0.86
    kept = float((shown[places] == token_ids[places]).float().mean())
    assert 0.05 < kept < 0.15


def test_an_interrupted_run_ends_the_same(tmp_path: Path) -> None:
    ends_the_same(tmp_path, lambda folder: configuration(folder, checkpoint_every=4, epochs=2), (5, 21))


def test_it_is_a_base_of_classifiers_and_of_itself(trained: Path, tmp_path: Path) -> None:
    pairs = [(number, *pair) for number in range(15) for pair in NOISE.items()]
    rows = [{"text": f"the {animal} {noise} {number}", "label": animal} for number, animal, noise in pairs]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=str(tmp_path / "labelled.jsonl"), holdout=15)
    fields: dict[str, Any] = {"network": None, "model": str(trained), "dtype": "float32"}
    done = train(configuration(tmp_path, task="classification", data=data, **fields))
    assert done.metrics["validation_accuracy"] > 0.9
    again = train(configuration(tmp_path / "more", epochs=1, **fields))
    assert again.metrics["validation_loss"] < 3.0, "with the head that it had; from nothing it is 5.8"


def write_pairs(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            animal = draw.choice(list(NOISE))
            pair = {"anchor": f"which {animal} {number}", "positive": f"{NOISE[animal]} {number}"}
            file.write(json.dumps(pair) + "\n")
    return path


def test_sentences_that_belong_together_become_alike(trained: Path, tmp_path: Path) -> None:
    data = DataConfig(train=str(write_pairs(tmp_path / "pairs.jsonl", 120, 0)), holdout=24)
    fields: dict[str, Any] = {"task": "contrastive", "network": None, "model": str(trained), "data": data}
    config = configuration(tmp_path, dtype="float32", batch_size=24, **fields)
    done = train(config)
    assert done.metrics["validation_accuracy"] > 0.15, "one of 24 by chance is 0.04"
    encoder = classifiers.load_encoder(Path(str(done.path)))
    assert encoder.config.hidden_size == 32


def test_the_contrastive_loss_in_float64(trained: Path) -> None:
    model = encoders.sentence(trained)
    model.network.eval()
    rows = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13]), ([14, 15], [16])]
    task = Contrastive(model, rows, [])
    left, right = (model.network.embed(*padded([pair[side] for pair in rows])).double() for side in (0, 1))
    expected = torch.zeros((), dtype=torch.float64)
    for number in range(3):
        ahead = torch.tensor([SCALE * float(left[number] @ right[other]) for other in range(3)], dtype=torch.float64)
        back = torch.tensor([SCALE * float(left[other] @ right[number]) for other in range(3)], dtype=torch.float64)
        expected += ahead.logsumexp(0) - ahead[number] + back.logsumexp(0) - back[number]
    assert float(task.loss([0, 1, 2])) == pytest.approx(float(expected), rel=1e-4)
    assert task.targets([0, 1, 2]) == 6


@pytest.mark.parametrize(
    ("fields", "error", "complaint"),
    [
        ({"network": EncoderNetwork(hidden=30, heads=4)}, ConfigError, "must divide network.hidden"),
        ({"task": "contrastive"}, ConfigError, "task contrastive learns on a model"),
        ({"label_smoothing": 0.1}, ConfigError, "label_smoothing means nothing"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], error: Any, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=complaint):
        train(configuration(tmp_path, **fields))


def test_a_wrong_row_is_named(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"anchor": "a", "positive": ""}\n')
    fields: dict[str, Any] = {"task": "contrastive", "network": None, "model": str(trained)}
    with pytest.raises(DataError, match=r"pairs.jsonl:1: field 'positive'"):
        train(configuration(tmp_path, data=DataConfig(train=str(tmp_path / "pairs.jsonl")), **fields))


def test_a_tokenizer_that_hides_nothing_is_named(trained: Path, tmp_path: Path) -> None:
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text().replace(encoders.MASKS[-1], "<|other|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"has none of \[MASK\]"):
        encoders.masked(classifiers.load_encoder(tmp_path), tmp_path, 0)
