"""What the demo shows: the table in the terminal and demo/report.html."""

from __future__ import annotations

from typing import Any

from steelyard.demo.lifecycle import Learnt
from steelyard.demo.sms import HELD_OUT, LABELS
from steelyard.report import Report

NAMES = {
    "linear": "TF-IDF + LinearSVC",
    "base": "SmolLM2-135M, zero-shot",
    "tuned": "tuned (LoRA)",
    "int8": "tuned, int8",
}
HEADERS = ("model", "accuracy", "MCC", "MB", "tokens/s", "minutes")


def table(learnt: Learnt) -> list[list[str]]:
    """Rows under `HEADERS`."""
    lines = []
    for key, stage in learnt.stages.items():
        size = "-" if stage.bytes is None else f"{stage.bytes / 1e6:.1f}"
        speed = "-" if stage.tokens_per_second is None else f"{stage.tokens_per_second:.0f}"
        lines.append([NAMES[key], f"{stage.accuracy:.3f}", f"{stage.mcc:.3f}", size, speed, f"{stage.minutes:.1f}"])
    return lines


def page(learnt: Learnt, figures: dict[str, Any], answers: list[tuple[str, str]]) -> Report:
    """The report."""
    report = Report("Steelyard demo: from 400 labels to a served int8 model".replace("400", str(figures["labels"])))
    report.text(
        f"SMS Spam collection, {learnt.distinct} distinct messages; {figures['labels']} labelled ones learnt from, "
        f"{HELD_OUT} others held out for every figure in the table. Nothing was chosen by the held-out messages. "
        f"{figures['minutes']:.1f} minutes after the downloads. Tokens/s is how fast messages were read while "
        "classifying them."
    )
    rows = [
        (
            NAMES[key],
            round(stage.accuracy, 3),
            round(stage.mcc, 3),
            None if stage.bytes is None else round(stage.bytes / 1e6, 1),
            None if stage.tokens_per_second is None else round(stage.tokens_per_second),
            round(stage.minutes, 1),
        )
        for key, stage in learnt.stages.items()
    ]
    report.table(HEADERS, rows, "Before and after")
    report.bars("Matthews correlation on the held-out messages", {NAMES[k]: s.mcc for k, s in learnt.stages.items()})
    steps = [point for point in learnt.curve if "loss" in point]
    checks = [point for point in learnt.curve if "validation_loss" in point]
    loss = {"training": ([p["step"] for p in steps], [p["loss"] for p in steps])}
    if checks:
        loss["other messages"] = ([p["step"] for p in checks], [p["validation_loss"] for p in checks])
    report.lines("Learning curve", loss, "step", "nats per trained token", log_y=True)
    if checks:
        quality = {
            "accuracy": ([p["step"] for p in checks], [p["validation_accuracy"] for p in checks]),
            "MCC": ([p["step"] for p in checks], [p["validation_mcc"] for p in checks]),
        }
        report.lines("Quality on 100 other messages while learning", quality, "step", "share")
    report.heading("Confusion matrices")
    for key, stage in learnt.stages.items():
        report.matrix(NAMES[key], list(LABELS), stage.confusion)
    report.heading("Fidelity certificate of the int8 model")
    report.text(learnt.certificate.summary())
    report.heading("What the server answered")
    report.table(["asked through the openai SDK", "answer"], [list(pair) for pair in answers], "")
    return report
