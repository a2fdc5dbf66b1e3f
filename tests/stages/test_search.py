"""A learning rate by rising it, and settings by trials: on a task whose answer is known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from steelyard.errors import ConfigError, TrainingError
from steelyard.stages import rate
from steelyard.stages.search import Range, search, space
from steelyard.train import rate_finder
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.networks import LstmNetwork
from steelyard.train.optimizers import OptimizerConfig


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    draw = random.Random(0)
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(120):
            label = draw.choice(["cat", "dog"])
            word = {"cat": "meow", "dog": "woof"}[label]
            file.write(json.dumps({"text": f"{word} {number}", "label": label}) + "\n")
    return TrainConfig(
        task="classification",
        network=LstmNetwork(vocabulary=300, embedding=8, hidden=8, dense=8),
        output=str(tmp_path / "out"),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), holdout=30),
        epochs=2,
        optimizer=OptimizerConfig(name="adamw"),
    )


def test_a_rate_is_found_and_shown(config: TrainConfig) -> None:
    found = rate.find(config, steps=60)
    assert 1e-4 < found.learning_rate < 0.5
    page = Path(found.report).read_text()
    assert f"Suggested: {found.learning_rate:g}" in page
    assert not Path(config.output).exists(), "the run itself has not begun"


def test_the_steepest_fall_is_suggested() -> None:
    rates = [10.0**power for power in range(-7, 1)]
    assert rate_finder.suggest(rates, [5, 5, 5, 4, 1, 0.9, 3, 9]) == pytest.approx(1e-4), "the fall from 4 to 1"
    assert rate_finder.suggest(rates, [5, 4.9, 4.8, 4.7, 4.6, 1, 3, 9]) == pytest.approx(1e-3)
    with pytest.raises(TrainingError, match="fell at no learning rate"):
        rate_finder.suggest(rates, [1, 2, 3, 4, 5, 6, 7, 8])


def test_trials_find_the_better_setting_and_go_on(config: TrainConfig) -> None:
    raw: dict[str, Any] = msgspec.to_builtins(config)
    wanted = space(["optimizer.learning_rate=1e-7,3e-2", "network.dense=4..8:int"])
    first = search(raw, wanted, 2)
    assert len(first.trials) == 2
    found = search(raw, wanted, 5)
    assert [trial.number for trial in found.trials] == [0, 1, 2, 3, 4]
    assert found.trials[:2] == first.trials, "those were done"
    drawn = [tuple(trial.settings.items()) for trial in found.trials]
    assert drawn[2:4] != drawn[:2], "what goes on does not draw the same again"
    for other in (space(["network.dense=4..8:int"]), wanted):
        metric = "validation_loss" if other is not wanted else "validation_accuracy"
        with pytest.raises(ConfigError, match=r"has another (space|metric)"):
            search(raw, other, 6, metric=metric)
    assert found.best is not None
    assert found.best.settings["optimizer.learning_rate"] == "3e-2"
    assert found.best.value == min(trial.value or 9 for trial in found.trials)
    assert 4 <= found.best.settings["network.dense"] <= 8
    assert (Path(found.best.output) / "best" / "model.safetensors").is_file()
    page = Path(found.report).read_text()
    assert "best so far" in page
    assert "optimizer.learning_rate" in page


def test_a_metric_that_is_high_is_best(config: TrainConfig) -> None:
    raw: dict[str, Any] = msgspec.to_builtins(config)
    found = search(raw, space(["optimizer.learning_rate=1e-7,3e-2"]), 4, metric="validation_accuracy")
    assert found.best is not None
    assert found.best.value == max(trial.value or 0 for trial in found.trials)
    with pytest.raises(ConfigError, match=r"do not measure 'validation_f1'; they measure .*validation_mcc"):
        search({**raw, "output": f"{config.output}2"}, space(["seed=1..3:int"]), 1, metric="validation_f1")


def test_spaces() -> None:
    assert space(["a.b=1e-5..1e-2:log", "c=2..4:int", "d=-1..1.5", "e=x, y"]) == {
        "a.b": Range(1e-5, 1e-2, "log"),
        "c": Range(2, 4, "int"),
        "d": Range(-1, 1.5, "plain"),
        "e": ("x", "y"),
    }


@pytest.mark.parametrize("wish", ["a", "a=1", "a=2..1", "a=0..1:log", "a=1..2:odd", "a=1e..2"])
def test_a_wrong_space_is_named(wish: str) -> None:
    with pytest.raises(ConfigError, match=r"write key=low\.\.high"):
        space([wish])
    with pytest.raises(ConfigError, match="nothing is searched"):
        space([])


def test_a_wrong_key_ends_the_search(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'optimizer.rate'"):
        search(msgspec.to_builtins(config), space(["optimizer.rate=1..2"]), 3)
