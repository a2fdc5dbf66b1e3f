"""What a decoder holds of the next tokens of rows: asked once, the likeliest of each place kept in the run's folder."""

# N trained tokens  K tokens that are kept of each

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from steelyard.atomic import write_file
from steelyard.data.packing import pack
from steelyard.data.token_rows import TokenRows
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.head_tokens import Head
from steelyard.runs import Run
from steelyard.train import soft_targets
from steelyard.train.soft_targets import CHUNK, Likeliest

PIECE = 1 << 16
"""Tokens of a file: what a kill makes be asked again."""
FOLDER = "teacher"


class TeacherMemory:
    """Files of a folder, read where they are asked for.

    Args:
        folder: theirs.
        rows: of which they say something.
    """

    def __init__(self, folder: Path, rows: TokenRows) -> None:
        self._files: list[safetensors.safe_open] = []
        self._places: list[tuple[int, int, int]] = []
        """Of each row its file, where it begins there and where it ends."""
        for number, piece in enumerate(_pieces(rows)):
            self._files.append(safetensors.safe_open(_path(folder, number), "pt"))
            end = 0
            for row in piece:
                begin, end = end, end + int(rows.targets[row])
                self._places.append((number, begin, end))

    def of(self, rows: Sequence[int]) -> Likeliest:
        """See `Memory`."""
        tokens, held = (torch.cat([self._slice(name, row) for row in rows]) for name in ("tokens", "log_probabilities"))
        return Likeliest(tokens.long(), held.float())

    def _slice(self, name: str, row: int) -> torch.Tensor:
        file, begin, end = self._places[row]
        part = self._files[file].get_slice(name)  # type: ignore[no-untyped-call]
        found: torch.Tensor = part[begin:end]
        return found


def remember(
    run: Run,
    key: Sequence[str],
    rows: TokenRows,
    count: int,
    temperature: float,
    teacher: Callable[[], Decoder],
    head: Head | None = None,
) -> TeacherMemory:
    """Ask a teacher of rows, or find what it has said: 6 bytes for each of `count` tokens at every trained place.

    Args:
        run: in whose folder it is kept.
        key: what decides what it says, besides the rows' tokens.
        rows: to learn from.
        count: K.
        temperature: that its logits are divided by.
        teacher: loads it.
        head: of a draft: the tokens that it has rows for, by whose numbers it learns.
    """
    folder, pieces = run.folder / FOLDER, list(_pieces(rows))
    folder.mkdir(exist_ok=True)
    asked: Decoder | None = None
    for number, piece in enumerate(pieces):
        said = hashlib.sha256(repr((*key, count, temperature)).encode())
        for row in piece:
            said.update(repr((rows[row].tokens, rows[row].trained)).encode())
        path = _path(folder, number)
        if _is_there(path, said.hexdigest()):
            continue
        if asked is None:
            asked = teacher()
        run.log(f"the teacher reads rows {piece[0] + 1} to {piece[-1] + 1} of {len(rows)}")
        parts = [_ask(asked, rows, row, count, temperature, head) for row in piece]
        kept = {
            "tokens": torch.cat([part.tokens for part in parts]).int(),
            "log_probabilities": torch.cat([part.log_probabilities for part in parts]).half(),
        }
        write_file(path, safetensors.torch.save(kept, metadata={"asked": said.hexdigest()}))
    for left in folder.glob("*.safetensors"):
        if left not in {_path(folder, number) for number in range(len(pieces))}:
            left.unlink()
    return TeacherMemory(folder, rows)


def _pieces(rows: TokenRows) -> Iterator[range]:
    """Rows one after the other, some `PIECE` trained tokens together."""
    begin, tokens = 0, 0
    for row in range(len(rows)):
        tokens += int(rows.targets[row])
        if tokens >= PIECE or row == len(rows) - 1:
            yield range(begin, row + 1)
            begin, tokens = row + 1, 0


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.safetensors"


def _is_there(path: Path, asked: str) -> bool:
    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("asked") == asked
    except safetensors.SafetensorError:
        return False


@torch.inference_mode()
def _ask(teacher: Decoder, rows: TokenRows, row: int, count: int, temperature: float, head: Head | None) -> Likeliest:
    batch = pack([rows[row]])
    states = teacher(batch.token_ids, batch.positions, PackedAttention(batch.lengths)).index_select(0, batch.places)
    weight = teacher.lm_head.weight if head is None else head.rows(teacher.lm_head.weight)
    parts = [
        soft_targets.likeliest(states[begin : begin + CHUNK] @ weight.T, count, temperature)
        for begin in range(0, len(states), CHUNK)
    ]
    return Likeliest(*(torch.cat(each) for each in zip(*parts, strict=True)))
