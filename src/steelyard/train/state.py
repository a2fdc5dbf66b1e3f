"""The resumable state of a run: masters, optimizer, random generator, position. Written whole, checked when read.

    state/step-00000150/tensors.safetensors    state.json    SHA256SUMS (of both)

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

from steelyard.atomic import folder_aside, sweep
from steelyard.checkpoint.manifest import sha256_file

log = logging.getLogger(__name__)
KEPT = 2
SUMS = "SHA256SUMS"


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Write the state of `step`, and drop all but the last two."""
    with folder_aside(folder / f"step-{step:08d}") as aside:
        # Tensors may share memory (tied weights): safetensors stores each by itself.
        save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, aside / "tensors.safetensors")
        (aside / "state.json").write_text(json.dumps({**info, "step": step}))
        (aside / SUMS).write_text(_sums(aside))
    for old in _steps(folder)[:-KEPT]:
        shutil.rmtree(old)


def load(folder: Path, before: int | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest undamaged state, or None where there is none.

    Args:
        folder: where states are.
        before: of states from this step on nothing is left; None: any will do.
    """
    if not folder.is_dir():
        return None
    sweep(folder)
    for path in reversed(_steps(folder)):
        if before is not None and int(path.name.removeprefix("step-")) >= before:
            shutil.rmtree(path)
            continue
        try:
            if (path / SUMS).read_bytes() != _sums(path).encode():
                raise ValueError("its digests differ")
            return load_file(path / "tensors.safetensors"), json.loads((path / "state.json").read_text())
        except (OSError, ValueError) as error:
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


def _sums(path: Path) -> str:
    """What `sha256sum` prints of the state's files."""
    return "".join(f"{sha256_file(path / name)}  {name}\n" for name in ("tensors.safetensors", "state.json"))


def _steps(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
