"""An engine finds what its model's certificate says of the golden prompts, or the model is not served."""

from __future__ import annotations

from pathlib import Path

import msgspec

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.infer.engine import Engine
from steelyard.infer.request import Request, Sampling

MOST = 0.5
"""Nats a token, in the mean. Whoever rounds to bytes in another order (evaluation, other kernels, another cache) is off
by 0.1 to 0.25 on a small model, in both directions; what is broken is off by nats."""


class Golden(msgspec.Struct, frozen=True):
    """The beginning of a text, and -log p of its last tokens."""

    tokens: list[int]
    nats: list[float]


def recheck(engine: Engine, checkpoint: Path) -> float | None:
    """Score the golden prompts of a checkpoint's certificate by an engine.

    Args:
        engine: of the checkpoint, idle.
        checkpoint: a model; its manifest has the certificate.

    Returns:
        The mean difference of a token's log-probability, nats; None: there is no certificate, or it has no prompts.

    Raises:
        CheckpointError: what the engine computes is not what was certified.
    """
    path = checkpoint / manifest.MANIFEST
    try:
        known = msgspec.convert((manifest.read(checkpoint).certificate or {}).get("golden") or [], list[Golden])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"'{path}' has golden prompts that are none: {error}") from None
    if any(not 0 < len(each.nats) < len(each.tokens) for each in known):
        raise CheckpointError(f"'{path}' has golden prompts without figures, or with more than tokens")
    sampling = Sampling(max_tokens=0, prompt_logprobs=0)
    requests = [
        Request(id=f"golden-{number}", prompt=each.tokens, sampling=sampling, counted=False)
        for number, each in enumerate(known)
    ]
    found: dict[str, list[float]] = {}
    for output in engine.run(requests):
        found.setdefault(output.id, []).extend(token.logprob for token in output.prompt_logprobs or ())
    differences = [
        abs(nats + logprob)
        for request, each in zip(requests, known, strict=True)
        for nats, logprob in zip(each.nats, found[request.id][-len(each.nats) :], strict=True)
    ]
    if not differences:
        return None
    mean = sum(differences) / len(differences)
    if not mean <= MOST:
        raise CheckpointError(
            f"'{checkpoint}' is not what was certified: its golden prompts are off by {mean:.3f} nats a token, and "
            f"{MOST} is allowed. Its files or this machine's kernels are broken: make it again, or serve its parent"
        )
    return mean
