"""A search for the smallest, fastest or most faithful form of a decoder that meets a target.

First the model as it is and the usual forms are measured; then, if none of them meets the target, those between: layers
are ordered by what four bits cost them, and the first so many keep eight; if that is not enough, blocks go as well.
What comes next is chosen by what was measured. All of it is kept, so that the same command goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard.atomic import write_file
from steelyard.checkpoint import manifest
from steelyard.compress import search, sensitivity
from steelyard.compress.inputs import dense, linears
from steelyard.compress.quantize import grid
from steelyard.compress.quantize.decoders import HEAD, QuantizeConfig, settled
from steelyard.compress.search import Ladder, Part, Point
from steelyard.errors import CheckpointError, ConfigError
from steelyard.evaluate.likelihood import packs
from steelyard.models import lora
from steelyard.models.decoder import Decoder
from steelyard.models.opening import Opened, open_checkpoint
from steelyard.stages import recipe as recipes
from steelyard.stages.compress import token_rows
from steelyard.stages.compress_networks import is_network
from steelyard.stages.form_measures import Measuring
from steelyard.stages.recipe import Recipe
from steelyard.stages.search_page import Found, page

SENSED = 1 << 9
"""Tokens that layers are ordered by."""
HOPELESS = 0.02
"""A form that is expected to miss its goals by more is not worth measuring."""
FIXED: dict[str, list[dict[str, Any]]] = {
    "int8, by channel": [{"kind": "quantize", "bits": 8, "group": "all", "method": "nearest"}],
    "int8, by group": [{"kind": "quantize", "bits": 8}],
    "int4": [{"kind": "quantize", "bits": 4}],
}
TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}
"""Layers that an engine runs as one: they have the same number of bits."""
FOUR, EIGHT = "int4", "int8, by group"
Showing = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


class Search:
    """One search.

    Args:
        source: a decoder, or an adapter of one.
        output: the folder of all forms.
        target: see `search.goals`; empty: the usual forms and three between are measured.
        data: rows to judge by.
        held: other rows, to measure on.
        minutes: after which no form is begun that is expected to end later.
        training: settings of a run after blocks went, as a recipe's train step has them.
        showing: where progress is told.

    Raises:
        ConfigError: a target, an output that is something else, or a measure that this machine has not.
        CheckpointError: no dense decoder.
        DataError: a row.
    """

    def __init__(
        self,
        source: Path,
        output: Path,
        target: str,
        data: Path,
        held: Path,
        *,
        minutes: float = 30.0,
        training: dict[str, Any] | None = None,
        showing: Showing = lambda what: nullcontext(lambda done, of: None),
    ) -> None:
        self.goals = search.goals(target)
        if is_network(source):
            raise ConfigError("a search is for decoders: quantise or prune this network, or write a recipe")
        opened = open_checkpoint(source)
        if not dense(opened.decoder):
            raise CheckpointError(f"'{source}' is quantised already; start from its parent")
        if opened.adapter is not None:
            lora.merge(opened.decoder, opened.adapter)
        self.opened, self.source, self.output, self.data = opened, source, output, data
        self.training, self.minutes, self.showing = training, minutes, showing
        self.target, self.began = target, time.monotonic()
        self.measuring = Measuring(opened, held)
        if not self.measuring.counts_energy and any(goal.measure == "energy" for goal in self.goals):
            raise ConfigError("this machine has no counter of energy that can be read: leave 'energy' out")
        digests = {"data": manifest.sha256_file(data), "held": manifest.sha256_file(held)}
        self.origin = {"source": manifest.read(source).id, **digests}
        self.points: list[Point] = []
        self.sensed: dict[str, float] = {}
        self._load()

    @property
    def base(self) -> dict[str, float]:
        """Measures of the model as it is."""
        return self.points[0].measures

    def run(self) -> Found:
        """Measure until the target is met, none is expected to meet it, or time is up."""
        if not self.points:
            self._add(Point(name="as it is", steps=[], measures=self.measuring.whole()))
        for number, (name, steps) in enumerate(FIXED.items(), 1):
            self._try(name, steps, f"{number} of {len(FIXED)} usual forms", fixed=True)
        if self._met() is not None:
            return self._end(None)
        ladder = self._ladder()
        if not self.goals:
            for share in (1, 2, 3):
                self._rung(ladder, round(share * len(ladder.parts) / 4))
        while self.goals and self._met() is None and not self._late():
            following = ladder.next(self.goals, self.base)
            if following is None or following[1] > HOPELESS:
                break
            self._rung(ladder, following[0])
        if self.goals and self._met() is None:
            self._cut_blocks()
        return self._end(ladder)

    def _rung(self, ladder: Ladder, count: int) -> None:
        eight = [path for part in ladder.parts[:count] for path in part.paths]
        steps = [{**FIXED[FOUR][0], "int8_layers": eight}] if eight else FIXED[FOUR]
        every = sum(len(part.paths) for part in ladder.parts)
        name = f"int4, {len(eight)} of {every} layers int8"
        point = self._try(name, steps, name)
        ladder.learn(count, point.measures)

    def _cut_blocks(self) -> None:
        """Fewer blocks, all of four bits: twice as many go each time, until what is not the loss is met."""
        layers = self.opened.decoder.config.layers
        others = [goal for goal in self.goals if goal.measure != "loss"]
        four = next(point for point in self.points if point.name == FOUR)
        if not others or search.worst(others, four.measures, self.base) <= 0:
            return
        count = 1
        while count <= layers // 2 and not self._late():
            steps: list[dict[str, Any]] = [
                {"kind": "prune", "structure": "blocks", "method": "divergence", "rate": count / layers},
                *([{"kind": "train", **self.training}] if self.training else []),
                *FIXED[FOUR],
            ]
            name = f"int4, {layers - count} of {layers} blocks"
            point = self._try(name, steps, name)
            if search.worst(others, point.measures, self.base) <= 0:
                return
            count *= 2

    def _met(self) -> Point | None:
        """Of the points that meet the target, the one that loses least."""
        fit = [p for p in self.points if p.steps and search.worst(self.goals, p.measures, self.base) <= 0]
        return min(fit, key=lambda point: point.measures["loss"], default=None) if self.goals else None

    def _late(self) -> bool:
        longest = max((point.seconds for point in self.points), default=0.0)
        return time.monotonic() - self.began + longest > 60 * self.minutes

    def _try(self, name: str, steps: Sequence[dict[str, Any]], what: str, *, fixed: bool = False) -> Point:
        """Make a form and measure it, unless it was."""
        for point in self.points:
            if point.name == name and point.steps == list(steps):
                return point
        started = time.monotonic()
        with self.showing(f"{what}: {name}" if what != name else name) as report:
            path = self._make(steps, report)
            measures, interval = self.measuring.of(path)
        point = Point(
            name=name,
            steps=list(steps),
            measures=measures,
            loss_interval=interval,
            seconds=time.monotonic() - started,
            fixed=fixed,
            path=str(path),
        )
        self._add(point)
        return point

    def _make(self, steps: Sequence[dict[str, Any]], report: Callable[[int, int], None]) -> Path:
        """The checkpoint of a form, in a folder of its own."""
        asked = Recipe(output="", model=str(self.source), data=str(self.data), step=tuple(steps))
        known = [int(folder.name[:3]) for folder in (self.output / "forms").glob("[0-9][0-9][0-9]-*")]
        at, place = self.source, self.output / "forms" / f"{max(known, default=0) + 1:03}"
        for number, step in enumerate(recipes.steps(asked), 1):
            made = place.with_name(f"{place.name}-{number}")
            done = recipes.do(step, at, made, asked, report, teacher=self.source)
            assert done is not None, "nobody interrupts it"
            at = done
        return at

    def _ladder(self) -> Ladder:
        layers = linears(self.opened.decoder)
        layers.pop(HEAD, None)
        if not self.sensed:
            group = settled(QuantizeConfig(bits=4, group="auto"), self.opened.decoder).group
            assert group != "auto"

            def four(weight: torch.Tensor) -> torch.Tensor:
                return grid.rounded(weight, 4, group).restored()

            batches = list(packs(token_rows(self.opened, self.data, SENSED)))
            with self.showing("what four bits cost each layer") as report:
                # In float32: what bfloat16 rounds is more than some layers lose.
                self.sensed = sensitivity.of_layers(_wide(self.opened), batches, four, report)
            self._save()
        together: dict[str, list[str]] = {}
        for path in layers:
            together.setdefault(path.rpartition(".")[0] + "." + TOGETHER.get(path.rpartition(".")[2], path), []).append(
                path
            )
        parts = [
            Part(
                paths=tuple(paths),
                loss=max(0.0, sum(self.sensed[path] for path in paths)),
                size=sum(layers[path].weight.numel() for path in paths) / 2,
            )
            for paths in together.values()
        ]
        ends = {point.name: point.measures for point in self.points}
        return Ladder(search.order(parts), ends[FOUR], ends[EIGHT])

    def _add(self, point: Point) -> None:
        self.points.append(point)
        self._save()

    def _save(self) -> None:
        values = {"origin": self.origin, "points": self.points, "sensed": self.sensed}
        write_file(self.output / "search.json", msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n")

    def _load(self) -> None:
        """What an earlier call measured of the same model by the same rows."""
        if self.output.exists() and any(self.output.iterdir()) and not (self.output / "search.json").is_file():
            raise ConfigError(f"the output '{self.output}' is there and holds no search: name another folder")
        if not (self.output / "search.json").is_file():
            return
        known = manifest.read_json(self.output / "search.json")
        if known.get("origin") != self.origin:
            raise ConfigError(
                f"the search in '{self.output}' is of another model or other rows: name another output, or remove it"
            )
        self.points = msgspec.convert(known["points"], list[Point])
        self.sensed = dict(known["sensed"])

    def _end(self, ladder: Ladder | None) -> Found:
        chosen = self._met()
        best = search.front(self.points[1:], ("loss", "size", "tokens_per_second", "throughput"))
        missed = {p.name: search.worst(self.goals, p.measures, self.base) for p in self.points[1:]}
        nearest = min(missed, key=missed.__getitem__) if self.goals and chosen is None else None
        path = None
        if chosen is not None:
            made = Path(str(chosen.path))
            if not made.is_dir():  # an earlier call chose another, and left this one's figures alone
                with self.showing(f"{chosen.name}, once more") as report:
                    made = self._make(chosen.steps, report)
            path = self.output / "best"
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(made, path)
            write_file(self.output / "recipe.toml", _toml(chosen, str(self.source), str(self.data)))
        kept = [Path(str(point.path)) for point in (*best, *([chosen] if chosen else []))]
        for folder in (self.output / "forms").glob("*"):
            if not any(path.is_relative_to(folder) for path in kept):
                shutil.rmtree(folder)
        found = Found(
            chosen=None if chosen is None else chosen.name,
            path=None if path is None else str(path),
            points=self.points,
            front=[point.name for point in best],
            explained=search.explain(self.points, self.base),
            nearest=nearest,
            missed=0.0 if nearest is None else missed[nearest],
            seconds=time.monotonic() - self.began,
            report=str(self.output / "search.html"),
        )
        write_file(self.output / "search.html", page(f"Forms of {self.source.name}", self.target, found, ladder).html())
        return found


def _wide(opened: Opened) -> Decoder:
    """The decoder in float32, its adapter merged."""
    wide = open_checkpoint(opened.folder, torch.float32)
    if wide.adapter is not None:
        lora.merge(wide.decoder, wide.adapter)
    return wide.decoder


def _toml(point: Point, model: str, data: str) -> str:
    """A recipe that makes a point anew; JSON's strings, numbers and lists are TOML's, too."""
    lines = [f"# {point.name}", *(f"{key} = {json.dumps(value)}" for key, value in (("model", model), ("data", data)))]
    lines += ['output = "OUTPUT"']
    for step in point.steps:
        plain = {key: value for key, value in step.items() if not isinstance(value, dict)}
        tables = {key: value for key, value in step.items() if isinstance(value, dict)}
        lines += ["", "[[step]]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
        for name, table in tables.items():
            lines += [f"[step.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"
