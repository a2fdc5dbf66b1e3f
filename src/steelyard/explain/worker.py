"""The engine's process (`infer/worker.py`) with what explains its model: `python -m steelyard.explain.worker`."""

from __future__ import annotations

import sys
from pathlib import Path

from steelyard.explain.explainer import ClassifierExplainer, DecoderExplainer
from steelyard.infer import worker
from steelyard.infer.asides import Explainer
from steelyard.infer.encoder_engine import EncoderEngine
from steelyard.infer.engine import Engine
from steelyard.infer.worker import AnyEngine


def explainer_of(engine: AnyEngine, checkpoint: Path) -> Explainer | None:
    """What explains an engine's model; None: nothing does."""
    if isinstance(engine, Engine):
        return DecoderExplainer(checkpoint, engine.tokenizer, engine.vocabulary, engine.adapters.find)
    classifies = isinstance(engine, EncoderEngine) and engine.reader.task == "classify"
    return ClassifierExplainer(checkpoint) if classifies else None


if __name__ == "__main__":
    sys.exit(worker.main(explaining=explainer_of))
