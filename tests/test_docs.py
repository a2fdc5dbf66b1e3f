"""The documents name everything that exists."""

from __future__ import annotations

import typing
from pathlib import Path

import msgspec
import pytest
from typer.main import get_command

from steelyard import errors
from steelyard.app import ENDPOINTS
from steelyard.checkpoint.sources import SOURCES
from steelyard.cli import build
from steelyard.train.config import TrainConfig
from steelyard.train.networks import Network
from steelyard.train.optimizers import OPTIMIZERS

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def settings(kind: type[msgspec.Struct], prefix: str = "") -> list[str]:
    """All keys of a configuration, dotted."""
    keys: list[str] = []
    for field in msgspec.structs.fields(kind):
        nested = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        keys += settings(field.type, f"{prefix}{field.name}.") if nested else [f"{prefix}{field.name}"]
    return keys


NETWORKS = [
    f"network.{name}"
    for network in typing.get_args(Network)
    for name in (*network.__struct_fields__, str(network.__struct_config__.tag))
]


@pytest.mark.parametrize("key", [*settings(TrainConfig), *NETWORKS])
def test_every_setting_is_documented(key: str) -> None:
    assert f"`{key}`" in REFERENCE or f"`{key.removeprefix('network.')}`" in REFERENCE.partition("## Networks")[2]


@pytest.mark.parametrize("verb", get_command(build()).commands)  # type: ignore[attr-defined]
def test_every_verb_is_documented(verb: str) -> None:
    assert f"| `{verb} " in REFERENCE
    command = get_command(build()).commands[verb]  # type: ignore[attr-defined]
    for inner in getattr(command, "commands", {verb: command}).values():
        assert "--json" in [option for parameter in inner.params for option in parameter.opts], verb
        assert "Examples" in (inner.help or ""), verb


@pytest.mark.parametrize("path", sorted({endpoint.path for endpoint in ENDPOINTS}))
def test_every_route_is_documented(path: str) -> None:
    assert path.replace(":path", "") in REFERENCE


@pytest.mark.parametrize("scheme", SOURCES)
def test_every_source_is_documented(scheme: str) -> None:
    assert f"`{scheme}:" in REFERENCE


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_its_formula(name: str) -> None:
    assert f"| `{name}`" in (ROOT / "docs" / "algorithms.md").read_text()


def test_every_error_has_an_edge_and_a_place_in_the_tree() -> None:
    tree = errors.__doc__ or ""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert kind.__name__ in tree
            assert errors.edge(kind("x")) != errors.BUG
    assert errors.edge(ValueError()) == errors.BUG


def test_every_room_is_in_the_architecture() -> None:
    architecture = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "src" / "steelyard").iterdir():
        if path.name.startswith("__") or path.suffix not in ("", ".py"):
            continue
        name = f"{path.name}/" if path.is_dir() else path.name
        assert f"`{name}`" in architecture, name
