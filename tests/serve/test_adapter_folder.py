"""Adapters over HTTP: they come, change and go at once, only from inside the folder that the operator named."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_service import Service, eventually, serving, stand_in_command

from steelyard.errors import ConfigError, EngineUnavailableError, ModelNotFoundError, RequestError
from steelyard.serve.adapters import AdapterFolder
from steelyard.serve.engine_client import EngineClient

Make = Callable[[str], Path]


def adapter(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return path


@pytest.fixture
def changing(make_checkpoint: Make, make_adapter: Make, tmp_path: Path) -> Iterator[tuple[Service, Path]]:
    folder = tmp_path / "adapters"
    adapter(folder / "spam")
    adapter(folder / "team" / "ham")
    with serving(make_checkpoint("base"), (f"first={make_adapter('first')}",), adapter_folder=folder) as service:
        yield service, folder


def post(service: Service, verb: str, **body: Any) -> httpx.Response:
    with service.admin_http() as http:
        return http.post(f"/v1/{verb}_lora_adapter", json=body)


def names(service: Service) -> list[str]:
    return [model.id for model in service.sdk().models.list()]


def test_they_come_change_and_go(changing: tuple[Service, Path]) -> None:
    service, folder = changing
    answer = post(service, "load", lora_name="x", lora_path="spam")
    assert (answer.status_code, answer.json()["loaded"]) == (200, True)
    assert names(service) == ["base", "first", "x"]
    assert service.sdk().completions.create(model="x", prompt="a", max_tokens=2).model == "x"
    assert service.received()[-1]["adapter"] == "x"
    swapped = post(service, "load", lora_name="x", lora_path=str(folder / "team" / "ham"))
    assert swapped.json()["digest"] != answer.json()["digest"]
    assert service.received()[-1]["path"] == str(folder / "team" / "ham")
    for name in ("x", "first"):
        assert post(service, "unload", lora_name=name).json() == {"lora_name": name, "loaded": False, "digest": None}
    assert names(service) == ["base"]
    assert post(service, "unload", lora_name="x").json()["error"]["code"] == "model_not_found"
    answer = service.http().post("/v1/completions", json={"model": "x", "prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_only_from_inside_the_folder(changing: tuple[Service, Path], tmp_path: Path, make_adapter: Make) -> None:
    service, folder = changing
    outside = adapter(tmp_path / "outside")
    (folder / "link").symlink_to(outside)
    shutil.copytree(folder / "spam", folder / "file-link")
    (folder / "file-link" / "adapter_model.safetensors").symlink_to(outside / "adapter_config.json")
    (folder / "loop").symlink_to("loop")
    (folder / "empty").mkdir()
    shutil.copytree(service.checkpoint, folder / "whole")
    paths = [
        *("../outside", "spam/../../outside", str(outside), "/", "", ".", "link", "file-link", "loop", "none", "\0"),
        *("spam/adapter_config.json", "empty", "whole", "x" * 5000, str(tmp_path / "adapters-not")),
    ]
    before = len(service.received())
    for path in paths:
        answer = post(service, "load", lora_name="x", lora_path=path)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "lora_path", "invalid_adapter"), path
        assert str(tmp_path) not in error["message"]
    assert len(service.received()) == before, "the engine was not asked"
    (folder / "inside").symlink_to("spam")
    assert post(service, "load", lora_name="x", lora_path="inside").status_code == 200, "a link that stays inside"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_path": "spam"}, 400, "lora_name"),
        ({"lora_name": "x", "lora_path": 3}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "spam", "lora_alpha": 3}, 400, "lora_alpha"),
        ({"lora_name": "no name", "lora_path": "spam"}, 400, "lora_name"),
        ({"lora_name": "base", "lora_path": "spam"}, 400, "lora_name"),
        ({"lora_name": "x", "lora_path": "spam", "base_model_name": "other"}, 404, "base_model_name"),
        ({"lora_name": "x", "lora_path": "broken"}, 400, "lora_path"),
    ],
)
def test_what_is_wrong_is_named(changing: tuple[Service, Path], body: dict[str, Any], status: int, param: str) -> None:
    service, folder = changing
    adapter(folder / "broken")
    answer = post(service, "load", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert str(folder) not in answer.text
    assert names(service) == ["base", "first"]


def test_without_a_folder_there_is_no_such_path(fragile: Service) -> None:
    assert post(fragile, "load", lora_name="x", lora_path="/tmp").status_code == 404
    assert post(fragile, "unload", lora_name="x").status_code == 404


def test_several_bases(make_checkpoint: Make, tmp_path: Path) -> None:
    from steelyard.serve.models import load_models

    async def use() -> None:
        models = load_models([make_checkpoint("one"), make_checkpoint("two")], command=stand_in_command)
        adapter(tmp_path / "x")
        folder = AdapterFolder(tmp_path, models)
        for name in ("one", "two"):
            await models[name].engine.start()
            await models[name].engine.wait_ready()
        with pytest.raises(RequestError, match="one of one, two"):
            await folder.load("x", "x", None)
        await folder.load("x", "x", "two")
        assert models["x"].engine is models["two"].engine
        with pytest.raises(RequestError, match="an adapter of another model"):
            await folder.load("x", "x", "one")
        for name in ("one", "two"):
            await models[name].engine.stop()

    asyncio.run(use())
    with pytest.raises(ConfigError, match="no such folder"):
        AdapterFolder(tmp_path / "none", {})


def loads(folder: Path) -> list[str]:
    return [line for line in (folder / "received").read_text().splitlines() if '"load_adapter"' in line]


def test_a_restarted_engine_gets_the_current_adapters(make_checkpoint: Make, make_adapter: Make) -> None:
    folder = make_checkpoint("restarts")
    first, second, broken = make_adapter("one"), make_adapter("two"), make_adapter("later")

    async def use() -> None:
        client = EngineClient("m", folder, {"a": first, "b": first, "c": broken}, command=stand_in_command)
        await client.start()
        assert (await client.wait_ready()).adapters == ["a", "b", "c"]
        await client.load_adapter("a", second)
        await client.drop_adapter("b")
        shutil.move(broken, broken.with_name("broken"))
        client.adapters["c"] = broken.with_name("broken")
        before = len(loads(folder))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        while client.ready is not None:
            await asyncio.sleep(0.01)
        assert (await asyncio.wait_for(client.wait_ready(), 20)).adapters == []
        again = loads(folder)[before:]
        assert [(f'"name":"{name}"' in line) for name, line in zip("ac", again, strict=True)] == [True, True]
        assert str(second) in again[0]
        assert client.status == "ready", "one adapter that fails does not keep the others from running"
        await client.stop()

    asyncio.run(use())


def test_an_engine_that_dies_of_an_adapter_says_so(make_checkpoint: Make, make_adapter: Make) -> None:
    async def use() -> None:
        client = EngineClient("m", make_checkpoint("dies"), command=stand_in_command)
        with pytest.raises(EngineUnavailableError):
            await client.load_adapter("x", make_adapter("x"))
        await client.start()
        await client.wait_ready()
        with pytest.raises(EngineUnavailableError, match="while it loaded an adapter"):
            await asyncio.wait_for(client.load_adapter("x", make_adapter("deadly")), 20)
        assert client.adapters == {}, "it is not loaded again and again"
        await client.stop()

    asyncio.run(use())


def test_refusals_of_the_engine_have_their_kind(make_checkpoint: Make) -> None:
    client = EngineClient("m", make_checkpoint("kinds"), command=stand_in_command)
    from steelyard.infer.request import Failure

    assert isinstance(client._explain(Failure("x", "gone", "model", "model_not_found")), ModelNotFoundError)
    assert type(client._explain(Failure("x", "wrong", "prompt", "y"))) is RequestError
    assert isinstance(client._explain(Failure("x", "broken")), EngineUnavailableError)


def test_requests_of_a_swapped_name_go_on(changing: tuple[Service, Path]) -> None:
    service, _ = changing
    post(service, "load", lora_name="x", lora_path="spam")
    stream = service.sdk().completions.create(model="x", prompt="a", max_tokens=40, seed=20, stream=True)
    first = next(iter(stream))
    post(service, "load", lora_name="x", lora_path="team/ham")
    post(service, "unload", lora_name="x")
    rest = list(stream)
    assert first.model == rest[-1].model == "x"
    assert rest[-1].choices[0].finish_reason == "length"
    eventually(lambda: "x" not in names(service))
