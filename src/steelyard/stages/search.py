"""Settings searched by trials: each is a run of its own, what comes next is Optuna's to say; and a page of all.

Trials are kept in `study.db` in the output folder, so that the same command goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from steelyard import config as configuration
from steelyard.atomic import write_file
from steelyard.errors import ConfigError, TrainingError
from steelyard.report import Report
from steelyard.stages.train import train
from steelyard.train.config import TrainConfig

RANGE = re.compile(r"([-+.\deE]+)\.\.([-+.\deE]+)(?::(log|int))?")
DEFAULT = "validation_loss"


class Range(msgspec.Struct, frozen=True):
    """Numbers between two."""

    low: float
    high: float
    scale: str
    """`plain`, `log`: even in their logarithms, or `int`: whole."""


Space = dict[str, Range | tuple[str, ...]]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    number: int
    settings: dict[str, Any]
    value: float | None
    """Of the metric; None: it failed, or has not ended."""
    output: str


class Searched(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it."""

    best: Trial | None
    trials: list[Trial]
    metric: str
    report: str


def space(wishes: Sequence[str]) -> Space:
    """`optimizer.learning_rate=1e-5..1e-3:log`, `lora.rank=4..32:int`, `optimizer.name=adamw,lion`.

    Raises:
        ConfigError: one that is none of these, or nothing to search.
    """
    found: Space = {}
    for wish in wishes:
        key, equals, value = wish.partition("=")
        match = RANGE.fullmatch(value.strip())
        try:
            if match is None:
                choices = tuple(part.strip() for part in value.split(",") if part.strip())
                found[key.strip()] = choices
                bad = not equals or len(choices) < 2
            else:
                low, high, scale = float(match[1]), float(match[2]), match[3] or "plain"
                found[key.strip()] = Range(low, high, scale)
                bad = not low < high or (scale == "log" and low <= 0)
        except ValueError:
            bad = True
        if bad:
            raise ConfigError(f"--space {wish}: write key=low..high, key=low..high:log, :int, or key=one,other")
    if not found:
        raise ConfigError("nothing is searched: name a setting, such as --space optimizer.learning_rate=1e-5..1e-3:log")
    return found


def search(
    raw: dict[str, Any],
    wanted: Space,
    trials: int,
    *,
    metric: str = DEFAULT,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Searched:
    """Run trials until there are so many.

    Args:
        raw: a run's plain settings; its output becomes the folder of all trials.
        wanted: what is searched.
        trials: how many there are to be, earlier ones counted.
        metric: of the validation; losses and error rates are to be low, all else high.
        report: told (trials done, of how many).

    Raises:
        ConfigError: a setting; a metric that the runs do not measure; Optuna is not installed.
        DataError, CheckpointError: as `train`; these end the search, since every trial would meet them.
    """
    try:
        import optuna
    except ImportError:
        raise ConfigError("a search needs a library more: pip install 'steelyard[search]'") from None
    config = configuration.convert(raw, TrainConfig)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="search",
        storage=f"sqlite:///{folder / 'study.db'}",
        load_if_exists=True,
        direction="minimize" if metric.endswith(("loss", "cer")) else "maximize",
    )
    asked = {"space": _shown(wanted), "metric": metric, "settings": msgspec.to_builtins(config)}
    for name, value in json.loads(json.dumps(asked)).items():
        if study.user_attrs.setdefault(name, value) != value:
            raise ConfigError(f"the search in '{folder}' has another {name}: name another output, or remove study.db")
        study.set_user_attr(name, value)
    # Each trial draws by its own number: what goes on after an interruption does not begin the same draws anew.
    study.sampler = optuna.samplers.TPESampler(seed=(config.seed + 7919 * len(study.trials)) % 2**32)

    def one(trial: Any) -> float:
        chosen = {key: _suggested(trial, key, options) for key, options in wanted.items()}
        output = folder / f"trial-{trial.number:03}"
        settings = [f"{key}={_toml(value)}" for key, value in chosen.items()]
        asked = configuration.convert({**raw, "output": str(output)}, TrainConfig, settings)
        done = train(asked, fresh=True)
        if metric not in done.metrics:
            known = ", ".join(done.metrics) or "nothing: set data.holdout or data.validation"
            raise ConfigError(f"the runs do not measure '{metric}'; they measure {known}")
        return float(done.metrics[metric])

    while (ended := sum(trial.state.is_finished() for trial in study.trials)) < trials:
        report(ended, trials)
        study.optimize(one, n_trials=1, catch=(TrainingError,))
    report(trials, trials)
    found = [_trial(trial, folder) for trial in study.trials if trial.state.is_finished()]
    best = _trial(study.best_trial, folder) if any(trial.value is not None for trial in found) else None
    page = folder / "search.html"
    write_file(page, _page(folder, found, best, metric).html())
    return Searched(best=best, trials=found, metric=metric, report=str(page))


def _shown(wanted: Space) -> dict[str, str]:
    return {
        key: ",".join(options) if isinstance(options, tuple) else f"{options.low}..{options.high}:{options.scale}"
        for key, options in wanted.items()
    }


def _suggested(trial: Any, key: str, options: Range | tuple[str, ...]) -> Any:
    if isinstance(options, tuple):
        return trial.suggest_categorical(key, options)
    if options.scale == "int":
        return trial.suggest_int(key, int(options.low), int(options.high))
    return trial.suggest_float(key, options.low, options.high, log=options.scale == "log")


def _toml(value: Any) -> str:
    return str(value) if isinstance(value, str) else repr(value)


def _trial(trial: Any, folder: Path) -> Trial:
    output = str(folder / f"trial-{trial.number:03}")
    return Trial(number=trial.number, settings=dict(trial.params), value=trial.value, output=output)


def _page(folder: Path, trials: Sequence[Trial], best: Trial | None, metric: str) -> Report:
    report = Report(f"Search in {folder.name}")
    if best is not None:
        shown = ", ".join(f"{key} = {value}" for key, value in best.settings.items())
        report.text(f"Best of {len(trials)} trials: {metric} {best.value:.4f} with {shown} (trial {best.number}).")
    whole = [trial for trial in trials if trial.value is not None]
    low = metric.endswith(("loss", "cer"))
    so_far = [(min if low else max)(each.value or 0.0 for each in whole[: place + 1]) for place in range(len(whole))]
    numbers = [float(trial.number) for trial in whole]
    values = [trial.value or 0.0 for trial in whole]
    report.lines("Trials", {"each": (numbers, values), "best so far": (numbers, so_far)}, "trial", metric)
    for key in whole[0].settings if whole else ():
        pairs = sorted((trial.settings[key], trial.value or 0.0) for trial in whole)
        if all(isinstance(value, int | float) for value, _ in pairs):
            line = ([value for value, _ in pairs], [value for _, value in pairs])
            report.lines(key, {metric: line}, key, metric, log_x=_spread(line[0]))
        else:
            means = {name: [value for each, value in pairs if each == name] for name in {each for each, _ in pairs}}
            report.bars(f"{key}: mean {metric}", {name: sum(some) / len(some) for name, some in sorted(means.items())})
    keys = list(trials[0].settings) if trials else []
    rows = [
        [
            str(trial.number),
            *(str(trial.settings.get(key)) for key in keys),
            "failed" if trial.value is None else f"{trial.value:.4f}",
        ]
        for trial in sorted(trials, key=lambda trial: (trial.value is None, (trial.value or 0.0) * (1 if low else -1)))
    ]
    report.table(["trial", *keys, metric], rows, "All trials, the best first")
    return report


def _spread(values: Sequence[float]) -> bool:
    """Whether values are of several magnitudes."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 20
