"""The unmodified Node SDK through the whole of fine-tuning, with real weights: see `tests/node/fine_tuning.mjs`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from running_service import serving

from steelyard.serve.engine_client import worker_command

SCRIPT = Path(__file__).parent.parent / "node" / "fine_tuning.mjs"
PACKAGE = "openai@6"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the SDK and the script."""
    npm = shutil.which("npm")
    if shutil.which("node") is None or npm is None:
        pytest.skip("there is no node or no npm here")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}')
    command = [npm, "install", "--prefer-offline", "--no-audit", "--no-fund", PACKAGE]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install {PACKAGE}: {installed.stderr[-200:]}")
    shutil.copy(SCRIPT, folder)
    return folder


def test_fine_tuning_from_node(node_folder: Path, smollm2: Path) -> None:
    with serving(smollm2, command=worker_command, seconds=120) as service:
        environment = {**os.environ, "OPENAI_BASE_URL": f"{service.url}/v1", "OPENAI_API_KEY": service.key}
        command = ["node", SCRIPT.name]
        done = subprocess.run(command, cwd=node_folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["steps"] == [1, 2, 3, 4, 5]
    assert "The job has successfully completed" in done.stderr
