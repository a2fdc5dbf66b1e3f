"""Recipes: steps in order, gone on with where they were cut off, the last certified against the first."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_students import configuration, write_rows

from families import make
from steelyard import config as configurations
from steelyard.checkpoint import manifest
from steelyard.compress.inputs import linears
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.data.chat import FormatConfig
from steelyard.errors import ConfigError, FidelityError
from steelyard.evaluate.answers import AnswersCertificate
from steelyard.evaluate.certificate import Certificate
from steelyard.models import classifiers, weights
from steelyard.models.linear import QuantizedLinear
from steelyard.stages.compress import prune
from steelyard.stages.evaluate import evaluate
from steelyard.stages.labelling import Classification
from steelyard.stages.recipe import Recipe, follow, steps
from steelyard.stages.train import train
from steelyard.train.config import DataConfig, DistillConfig, TrainConfig
from steelyard.train.trainer import Trainer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    done = train(configuration(folder, write_rows(folder / "rows.jsonl", 600, 0), DistillConfig(), epochs=6))
    return Path(str(done.path))


def test_the_classic_sequence(teacher: Path, tmp_path: Path) -> None:
    """An LSTM that a larger one teaches, pruned by half, trained on, in 8 bits; it still tells texts apart."""
    few, held = write_rows(tmp_path / "few.jsonl", 12, 1), write_rows(tmp_path / "held.jsonl", 200, 2)
    more = write_rows(tmp_path / "more.jsonl", 400, 3, labels=False)
    (tmp_path / "recipe.toml").write_text(f"""
output = "{tmp_path / "small"}"
data = "{more}"

[[step]]
kind = "train"
task = "classification"
epochs = 12
batch_size = 16
network = {{ kind = "lstm", vocabulary = 400, embedding = 16, hidden = 16, dense = 8 }}
data = {{ train = "{few}" }}
distill = {{ teacher = "{teacher}", texts = "{more}" }}
optimizer = {{ name = "adamw", learning_rate = 1e-2 }}

[[step]]
kind = "prune"
method = "magnitude"
rate = 0.5

[[step]]
kind = "train"
task = "classification"
epochs = 2
batch_size = 16
keep_zeros = true
data = {{ train = "{few}" }}
distill = {{ teacher = "{teacher}", texts = "{more}" }}
optimizer = {{ name = "adamw", learning_rate = 1e-3 }}

[[step]]
kind = "quantize"
""")
    done = follow(configurations.load(tmp_path / "recipe.toml", Recipe))
    assert isinstance(done.certificate, AnswersCertificate)
    assert [Path(path).name for path in done.steps] == ["best", "02-prune", "best", "04-quantize"]
    written = manifest.verify(tmp_path / "small")
    assert written.parent == manifest.read(Path(done.steps[0])).id
    assert written.certificate is not None
    assert written.certificate["agreement"] > 0.95
    assert done.certificate.bytes_after < 0.5 * done.certificate.bytes_before
    found = evaluate(tmp_path / "small", held, FormatConfig())
    assert isinstance(found, Classification)
    assert found.accuracy > 0.95
    network: Any = classifiers.load(tmp_path / "small").network
    hidden = [
        layer for name, layer in network.named_modules() if isinstance(layer, QuantizedLinear) and "class" not in name
    ]
    assert all(float((layer.values() == 0).float().mean()) > 0.45 for layer in hidden)


def recipe(model: Path, folder: Path, rows: Path, **fields: Any) -> Recipe:
    run = {"data": {"train": str(rows)}, "method": "full", "epochs": 1, "dtype": "float32", "distill": {"weight": 0.5}}
    wanted: list[dict[str, Any]] = [
        {"kind": "prune", "structure": "blocks", "rate": 0.5},
        {"kind": "train", **run},
        {"kind": "quantize", "bits": 4, "group": 16},
    ]
    settings: dict[str, Any] = {"model": str(model), "output": str(folder / "small"), "data": str(rows)}
    settings |= {"max_bits_per_byte": 100.0, "step": tuple(wanted), **fields}
    return Recipe(**settings)


def texts(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"The user asks {number} times."}) + "\n" for number in range(30)))
    return path


def test_a_decoder_goes_on_where_it_was_cut_off(tiny_model: Path, tmp_path: Path) -> None:
    rows = texts(tmp_path)
    asked = recipe(tiny_model, tmp_path, rows)

    def stop(trainer: Trainer) -> None:
        trainer.stopping = True

    cut = follow(asked, begun=stop)
    assert not cut.finished
    assert not (tmp_path / "small").exists()
    told: list[str] = []

    def showing(what: str) -> Any:
        told.append(what)
        return nullcontext(lambda done, of: None)

    done = follow(asked, showing=showing)
    assert done.finished
    assert told == ["step 2 of 3: train", "step 3 of 3: quantize", "comparing the last with the first"]
    assert isinstance(done.certificate, Certificate)
    written = manifest.verify(tmp_path / "small")
    assert written.parent == manifest.read(tiny_model).id == done.certificate.parent
    taught = manifest.read(Path(done.steps[1]))
    assert taught.recipe["train"]["distill"]["teacher"] == str(tiny_model)
    small = weights.load(tmp_path / "small")
    assert small.config.layers == 1
    assert {layer.bits for layer in small.model.layers.modules() if isinstance(layer, QuantizedLinear)} == {4}
    before = (tmp_path / "small" / "model.safetensors").read_bytes()
    told.clear()
    changed = recipe(tiny_model, tmp_path, rows, step=(*asked.step[:2], {"kind": "quantize"}))
    follow(changed, showing=showing)
    assert told[0] == "step 3 of 3: quantize"
    assert (tmp_path / "small" / "model.safetensors").read_bytes() != before
    rows.write_text(rows.read_text() * 2)
    told.clear()
    follow(changed, showing=showing)
    assert told[0] == "step 1 of 3: prune"


def test_what_was_cut_off_and_is_another_begins_anew(tiny_model: Path, tmp_path: Path) -> None:
    """A run that has other settings now, or another model before it, is not gone on with."""
    rows = texts(tmp_path)
    first = recipe(tiny_model, tmp_path, rows)

    def stop(trainer: Trainer) -> None:
        trainer.stopping = True

    assert not follow(first, begun=stop).finished
    steps = (first.step[0], {**first.step[1], "dtype": "bfloat16"}, first.step[2])
    assert follow(recipe(tiny_model, tmp_path, rows, step=steps)).finished
    other = tmp_path / "other"
    merged = prune(tiny_model, other, PruneConfig(method="magnitude", rate=0.1), accept=True)
    assert merged.parent == manifest.read(tiny_model).id
    again = follow(recipe(other, tmp_path, rows, step=steps))
    assert again.finished
    assert manifest.read(tmp_path / "small").parent == manifest.read(other).id


def test_gemma_is_not_smoothed(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    """Where rows are given and nothing is said, a method is taken that the model can have."""
    make(tmp_path / "gemma", "gemma3", vocab_size=512)
    for file in tiny_tokenizer_folder.iterdir():
        (tmp_path / "gemma" / file.name).write_bytes(file.read_bytes())
    follow(recipe(tmp_path / "gemma", tmp_path, texts(tmp_path), step=({"kind": "quantize"},)), accept=True)
    made: Any = manifest.read(tmp_path / "small").recipe["compress"]
    assert (made["bits"], made["method"]) == (8, "gptq")


def test_an_adapter_teaches_as_a_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    rows = texts(tmp_path)
    tuned = train(
        TrainConfig(model=str(tiny_model), output=str(tmp_path / "run"), data=DataConfig(train=str(rows)), epochs=1)
    )
    done = follow(recipe(Path(str(tuned.path)), tmp_path, rows))
    assert done.finished
    taught = manifest.read(Path(done.steps[1])).recipe["train"]["distill"]["teacher"]
    assert Path(taught).name == "00-merge"
    assert manifest.read(Path(taught)).parent == tuned.id


def test_past_its_threshold_nothing_is_handed_on(tiny_model: Path, tmp_path: Path) -> None:
    asked = recipe(
        tiny_model, tmp_path, texts(tmp_path), max_kl=1e-9, step=({"kind": "quantize", "bits": 4, "group": 16},)
    )
    with pytest.raises(FidelityError, match="past its thresholds"):
        follow(asked)
    assert not (tmp_path / "small").exists()
    accepted = follow(asked, accept=True)
    assert accepted.certificate is not None
    assert accepted.certificate.accepted
    assert torch.equal(
        weights.read_tensors(tmp_path / "small")["model.norm.weight"],
        weights.read_tensors(tiny_model)["model.norm.weight"].bfloat16(),
    )
    assert linears(weights.load(tiny_model))


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ({"kind": "shrink"}, "step 1: kind must be prune, quantize or train, not 'shrink'"),
        ({}, "step 1: kind must be prune, quantize or train, not None"),
        ({"kind": "prune", "rates": 0.5}, "step 1: unknown key 'rates'; did you mean 'rate'"),
        ({"kind": "prune", "rate": 2.0}, "rate 2.0"),
        ({"kind": "quantize", "bits": 3}, "bits"),
        ({"kind": "train", "output": "x"}, "step 1: 'output' is the recipe's"),
        ({"kind": "train", "data": {"train": "x"}, "epochs": 0}, "epochs must be at least 1"),
        ({"kind": "train", "data": {"train": "x"}, "epoch": 1}, "step 1: unknown key 'epoch'"),
    ],
)
def test_a_step_that_means_nothing(step: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        steps(Recipe(output="small", model="base", step=(step,)))


def test_a_recipe_that_means_nothing() -> None:
    with pytest.raises(ConfigError, match="has no step"):
        steps(Recipe(output="small", step=()))
    for step in ({"kind": "prune"}, {"kind": "train", "data": {"train": "x"}}):
        with pytest.raises(ConfigError, match=r"step 1: there is no model to"):
            steps(Recipe(output="small", step=(step,)))
