"""The resumable state of a run: masters, optimizer, random generator, position. Written whole, checked when read.

    state/step-00000150/tensors.safetensors    state.json (with the sha256 of the tensors)

Two are kept: one that is damaged falls back to the one before.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from steelyard.checkpoint.atomic import folder_aside, sweep
from steelyard.checkpoint.manifest import sha256_file

log = logging.getLogger(__name__)
KEPT = 2


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Write the state of `step`, and drop all but the last two."""
    with folder_aside(folder / f"step-{step:08d}") as aside:
        # Tensors may share memory (tied weights): safetensors stores each by itself.
        save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, aside / "tensors.safetensors")
        content = {**info, "step": step, "sha256": sha256_file(aside / "tensors.safetensors")}
        (aside / "state.json").write_text(json.dumps(content))
    for old in _steps(folder)[:-KEPT]:
        shutil.rmtree(old)


def load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest undamaged state, or None where there is none."""
    if not folder.is_dir():
        return None
    sweep(folder)
    for path in reversed(_steps(folder)):
        try:
            info = json.loads((path / "state.json").read_text())
            if sha256_file(path / "tensors.safetensors") != info["sha256"]:
                raise ValueError("its digest differs")
            return load_file(path / "tensors.safetensors"), info
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the state '%s' is damaged (%s); falling back to the one before", path, error)
            shutil.rmtree(path)
    return None


def flatten(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{key}": torch.as_tensor(value)
        for index, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def restore(optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Give the optimizer back what `flatten` took."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
