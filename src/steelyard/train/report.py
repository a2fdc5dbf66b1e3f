"""The page that a training run leaves: loss, learning rate and validation over the steps, and the full recipe."""

from __future__ import annotations

from typing import Any

import msgspec

from steelyard.report import Report
from steelyard.train.config import TrainConfig
from steelyard.train.networks import kind_of

LABELS = {
    "validation_loss": "validation",
    "validation_accuracy": "accuracy",
    "validation_mcc": "Matthews correlation",
}


def training_report(config: TrainConfig, metrics: list[dict[str, Any]], counts: dict[str, int]) -> Report:
    """A page from a run's metrics.

    Args:
        config: the run's configuration.
        metrics: the objects of metrics.jsonl.
        counts: of the data: rows, tokens and so on.
    """
    report = Report(f"Training run {config.output}")
    steps = [point for point in metrics if "loss" in point]
    if steps:
        last = steps[-1]
        report.text(
            f"{_what(config)}: {last['step']} steps over {counts['rows']} rows{_trained(counts)}, "
            f"{last['tokens_per_second']:.0f} tokens/s, loss {last['loss']:.4f} at the end."
        )
        loss = {"training": _series(steps, "loss")}
        if any("validation_loss" in point for point in metrics):
            loss["validation"] = _series(metrics, "validation_loss")
        report.lines("Loss", loss, "step", "nats per trained token", log_y=_positive(loss))
        quality = {
            LABELS[key]: _series(metrics, key)
            for key in ("validation_accuracy", "validation_mcc")
            if any(key in point for point in metrics)
        }
        if quality:
            report.lines("Quality on the validation rows", quality, "step", "share")
        report.lines("Learning rate", {"learning rate": _series(steps, "learning_rate")}, "step", "learning rate")
        report.lines("Gradient norm", {"norm": _series(steps, "gradient_norm")}, "step", "norm before clipping")
    report.table(["rows", "value"], [[key.replace("_", " "), value] for key, value in counts.items()], "Data")
    report.table(["setting", "value"], _settings(msgspec.to_builtins(config)), "Configuration")
    return report


def _what(config: TrainConfig) -> str:
    if config.task == "generation" and config.network is None:
        return f"{config.method} on {config.model}"
    return (
        f"{config.task} on {config.model}"
        if config.network is None
        else f"{config.task} by a new {kind_of(config.network)}"
    )


def _trained(counts: dict[str, int]) -> str:
    return f" ({counts['trained_tokens']} of {counts['tokens']} tokens trained)" if "tokens" in counts else ""


def _series(points: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    chosen = [point for point in points if key in point]
    return [point["step"] for point in chosen], [point[key] for point in chosen]


def _positive(series: dict[str, tuple[list[float], list[float]]]) -> bool:
    return all(value > 0 for _, values in series.values() for value in values)


def _settings(values: dict[str, Any], prefix: str = "") -> list[list[str]]:
    rows: list[list[str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _settings(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append([f"{prefix}{key}", str(value)])
    return rows
