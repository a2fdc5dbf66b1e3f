"""The engine's process (`infer/worker.py`) with what explains its model: `python -m steelyard.explain.worker`."""

from __future__ import annotations

import sys
from pathlib import Path

from steelyard.errors import ModelNotFoundError
from steelyard.explain.explainer import ClassifierExplainer, DecoderExplainer
from steelyard.infer import worker
from steelyard.infer.asides import Explainer
from steelyard.infer.encoder_engine import EncoderEngine
from steelyard.infer.engine import Engine
from steelyard.infer.worker import AnyEngine


def explainer_of(engine: AnyEngine, checkpoint: Path) -> Explainer | None:
    """What explains an engine's model; None: nothing does."""
    if not isinstance(engine, Engine):
        texts = isinstance(engine, EncoderEngine) and engine.reader.task == "classify"
        return ClassifierExplainer(checkpoint) if texts else None
    adapters = engine.adapters

    def path(name: str) -> Path:
        found = adapters.find(name).path
        if found is None:
            raise ModelNotFoundError(f"adapter '{name}' has no file", param="model", code="model_not_found")
        return found

    return DecoderExplainer(checkpoint, path)


if __name__ == "__main__":
    sys.exit(worker.main(explaining=explainer_of))
