"""Services to talk to, and folders that look like checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from running_service import Service, serving


@pytest.fixture(scope="session")
def make_checkpoint(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a folder that looks like a checkpoint and has a real tokenizer."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("checkpoints") / name
        shutil.copytree(tiny_tokenizer_folder, folder)
        (folder / "config.json").write_text("{}")
        return folder

    return make


@pytest.fixture(scope="session")
def make_model(make_checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """Makes a checkpoint that the real engine runs and the real trainer learns on."""
    pytest.importorskip("torch")
    from families import make

    def model(name: str) -> Path:
        folder = make_checkpoint(name)
        make(folder, "smollm", vocab_size=512)
        return folder

    return model


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("adapters") / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        return folder

    return make


@pytest.fixture(scope="session")
def service(
    make_checkpoint: Callable[[str], Path],
    make_adapter: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """One for all tests that do not hurt it."""
    folder = tmp_path_factory.mktemp("adapter_folder")
    with serving(make_checkpoint("tiny"), (f"tuned={make_adapter('tuned')}",), adapter_folder=folder) as running:
        yield running


@pytest.fixture
def fragile(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    """One that a test may hurt."""
    with serving(make_checkpoint("fragile")) as running:
        yield running


@pytest.fixture(scope="session")
def client(service: Service) -> openai.OpenAI:
    return service.sdk()
