"""Training on preferences: pairs of answers to rows of tokens, the base, its adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import preference
from steelyard.data.preference import Preference
from steelyard.data.rows import token_counts
from steelyard.data.split import parted
from steelyard.data.tokenize import tokenize
from steelyard.errors import DataError
from steelyard.models import weights
from steelyard.runs import Run
from steelyard.stages.tasks.language_model import check_dense
from steelyard.stages.tasks.prepared import DTYPES, Prepared, check_one_way, file_digests
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer
from steelyard.train import lora
from steelyard.train.config import TrainConfig
from steelyard.train.preference import Pair, PreferenceLearning


def prepare(config: TrainConfig) -> Prepared:
    """Read a run's pairs. Raises as `stages.train.train` does."""
    assert config.model is not None, "checked before"
    base = resolve(config.model)
    learnt, held = _read(config)
    tokenizer, template = Tokenizer.load(base), ChatTemplate.load(base)

    def pairs(rows: Sequence[Preference]) -> list[Pair]:
        sides = (
            tokenize([getattr(row, side) for row in rows], tokenizer, template, config.data.max_length)
            for side in ("preferred", "other")
        )
        return list(zip(*sides, strict=True))

    learning, validation = pairs(learnt), pairs(held)

    def build(run: Run) -> PreferenceLearning:
        decoder = weights.load(base, DTYPES[config.dtype])
        check_dense(decoder)
        decoder.recompute_blocks = config.recompute == "blocks"
        adapter = lora.start(decoder, config.lora, config.seed)
        return PreferenceLearning(decoder, adapter, learning, validation, config.beta, base.resolve())

    both = token_counts([row for pair in learning for row in pair])
    counts = {**both, "rows": len(learning), "validation_rows": len(validation)}
    parent = manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=file_digests(config))


def _read(config: TrainConfig) -> tuple[list[Preference], list[Preference]]:
    rows = preference.read(Path(config.data.train))
    if config.data.validation is None:
        return parted(rows, lambda row: row.preferred.prompt_key, config.data.holdout, config.seed)
    check_one_way(config)
    held = preference.read(Path(config.data.validation))
    learnt = {row.preferred.prompt_key: row.preferred for row in rows}
    for row in held:
        twin = learnt.get(row.preferred.prompt_key)
        if twin is not None:
            reason = f"the same prompt is in the training file, line {twin.line}: the validation would be too kind"
            raise DataError(reason, file=row.preferred.file, line=row.preferred.line)
    return rows, held
