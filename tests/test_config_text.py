"""Settings as text: every key of a training run through TOML and through --set, and the way back from a wrong key."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.config import assigned, convert, load
from steelyard.errors import ConfigError
from steelyard.train.config import TrainConfig

MINIMAL: dict[str, Any] = {"model": "base", "output": "run", "data": {"train": "rows.jsonl"}}
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


def is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def fields(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that holds a value, with its type; but not those of tables that a tag tells apart."""
    for field in msgspec.structs.fields(kind):
        structs = [option for option in typing.get_args(field.type) or (field.type,) if is_struct(option)]
        if len(structs) > 1:
            continue
        nested = structs[0] if structs else None
        if nested is not None and typing.get_origin(field.type) is not tuple:
            yield from fields(nested, f"{prefix}{field.encode_name}.")
        else:
            yield prefix + field.encode_name, field.type


KEYS = dict(fields(TrainConfig))


def values(kind: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if inner[-1] is ...:
            return st.lists(values(inner[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, inner))
    if isinstance(kind, types.UnionType):
        return st.one_of(*(values(option) for option in typing.get_args(kind) if option is not type(None)))
    if is_struct(kind):
        inside = {field.encode_name: values(field.type) for field in msgspec.structs.fields(kind)}
        return st.fixed_dictionaries(inside).map(lambda found: kind(**found))
    floats = st.floats(allow_nan=False).map(lambda value: value + 0.0)
    return {str: text, int: st.integers(-(2**63), 2**63 - 1), float: floats, bool: st.booleans()}[kind]


def toml(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, msgspec.Struct):
        pairs = msgspec.structs.asdict(value).items()
        return "{" + ", ".join(f"{name} = {toml(inner)}" for name, inner in pairs) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("path", KEYS)
def test_every_key_through_set_and_through_a_file(path: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("config")

    @given(values(KEYS[path]))
    def check(value: Any) -> None:
        changed = convert(MINIMAL, TrainConfig, [f"{path} = {toml(value)}"])
        assert at(changed, path) == value
        assert type(at(changed, path)) is type(value)
        table, _, key = path.rpartition(".")
        raw = {**MINIMAL, "data": dict(MINIMAL["data"])}
        (raw[table] if table == "data" else raw).pop(key, None)
        lines = [f"{name} = {toml(entry)}" for name, entry in raw.items() if not isinstance(entry, dict)]
        lines += [] if table else [f"{key} = {toml(value)}"]
        for name in sorted({"data", table} - {""}):
            lines += [f"[{name}]", *(f"{inner} = {toml(entry)}" for inner, entry in raw.get(name, {}).items())]
            lines += [f"{key} = {toml(value)}"] if name == table else []
        (folder / "run.toml").write_text("\n".join(lines), "utf-8", newline="")
        assert load(folder / "run.toml", TrainConfig) == changed

    check()


@given(text)
def test_set_takes_any_plain_text_for_a_string_or_refuses_it_as_another_type(value: str) -> None:
    read = assigned({}, [f"model={value}"])["model"]
    if isinstance(read, str):
        assert convert(MINIMAL, TrainConfig, [f"model={value}"]).model == read
    else:
        with pytest.raises(ConfigError, match="Expected `str"):
            convert(MINIMAL, TrainConfig, [f"model={value}"])


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("'''a\nb\n'''", "a\nb\n"),
        ("a\nb", "a\nb"),
        ("1\nseed = 2", "1\nseed = 2"),
        ("1\n[data]\ntrain = 2", "1\n[data]\ntrain = 2"),
        (" two words ", "two words"),
        ("' two words '", " two words "),
        ("runs/a#b", "runs/a#b"),
    ],
)
def test_what_a_set_value_becomes(value: str, found: str) -> None:
    assert convert(MINIMAL, TrainConfig, [f"model={value}"]).model == found


def test_overrides_leave_what_they_were_given_alone() -> None:
    raw = {"data": {"train": "a"}}
    assert assigned(raw, ["data.train=b", "seed=1"]) == {"data": {"train": "b"}, "seed": 1}
    assert raw == {"data": {"train": "a"}}


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("learning_rate=1e-4", "did you mean 'optimizer.learning_rate'?"),
        ("rank=8", "did you mean 'lora.rank'?"),
        ("optimizer.warmup=3", "known here: name, learning_rate"),
        ("epoch=3", "did you mean 'epochs'?"),
        ("data.maxlength=3", "did you mean 'data.max_length'?"),
        ("max_length=3", "did you mean 'data.max_length'?"),
        ("optimiser.name=sgd", "did you mean 'optimizer'?"),
    ],
)
def test_the_nearest_key(setting: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(MINIMAL, TrainConfig, [setting])
    assert str(caught.value).startswith(f"settings: unknown key '{setting.partition('=')[0].partition('.name')[0]}'")
    assert str(caught.value).count(hint) == 1


@pytest.mark.parametrize("name", [name for name in KEYS if len(name.rpartition(".")[2]) > 4])
def test_every_key_with_one_letter_missing_is_found_again(name: str) -> None:
    table, _, key = name.rpartition(".")
    for place in range(1, len(key)):
        wrong = key[:place] + key[place + 1 :]
        if (f"{table}.{wrong}" if table else wrong) in KEYS:
            continue
        with pytest.raises(ConfigError, match="did you mean") as caught:
            convert(MINIMAL, TrainConfig, [f"{table}.{wrong}=1" if table else f"{wrong}=1"])
        assert f"did you mean '{name}'?" in str(caught.value)


def test_a_choice_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"Invalid enum value 'qlora' at `method`; known: lora, full"):
        convert(MINIMAL, TrainConfig, ["method=qlora"])
    with pytest.raises(ConfigError, match=r"at `dtype`; known: auto, bfloat16, float32"):
        convert(MINIMAL, TrainConfig, ["dtype=int8"])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"seed = " + b"9" * 5000, "is not TOML"),
        (b"seed = 2024-99-99", "is not TOML"),
        (b"a" * 100, "is not TOML"),
        (b"[data]\ntrain = 1\ntrain = 2", "is not TOML"),
        (b"\x00", "is not TOML"),
        (b"", "missing required field `output`"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load(tmp_path / "run.toml", TrainConfig)
    assert "run.toml" in str(caught.value)


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b'\xef\xbb\xbfmodel = "base"\r\noutput = "run"\r\n[data]\r\ntrain = "x"\r\n')
    assert load(tmp_path / "run.toml", TrainConfig).data.train == "x"


@pytest.mark.parametrize(
    "setting", ["seed=" + "9" * 5000, "epochs=" + "[" * 100_000, "model.=x", ".=x", "a" * 10_000 + "=1"]
)
def test_settings_that_are_none(setting: str) -> None:
    with pytest.raises(ConfigError):
        convert(MINIMAL, TrainConfig, [setting])
