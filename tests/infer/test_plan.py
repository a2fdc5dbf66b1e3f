"""The plan: native kernels against their twins to the bit, and both against the reference forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from families import make
from native_forms import native
from steelyard.compress.quantize import layout
from steelyard.compress.quantize.decoders import QuantizeConfig
from steelyard.data.packing import pack
from steelyard.data.rows import TokenRow
from steelyard.errors import CheckpointError
from steelyard.infer.plan import Plan
from steelyard.infer.runner import has_plan
from steelyard.kernels import library
from steelyard.kernels.library import Library
from steelyard.kernels.steps import Batch
from steelyard.models import weights
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter, AdapterRows

FAMILIES = [
    "smollm",
    "llama2",
    "llama-biases",
    "llama-yarn",
    "llama-head-width",
    "mistral",
    "qwen2-window",
    "qwen3",
    "gemma3",
    "gemma3-linear",
]
INT4 = QuantizeConfig(bits=4, group=16)
KINDS = [
    *((family, QuantizeConfig()) for family in FAMILIES),
    ("smollm", QuantizeConfig(method="smoothquant")),
    *((family, QuantizeConfig(group=16)) for family in ("smollm", "llama-biases", "qwen2-window", "gemma3")),
    *((family, INT4) for family in ("smollm", "llama-biases", "qwen2-window")),
    ("smollm", QuantizeConfig(bits=4, method="awq")),
]
BLOCKS = 64
__all__ = ["native"]


def small(folder: Path, family: str, config: QuantizeConfig = QuantizeConfig()) -> Decoder:  # noqa: B008
    """The quantised form of a small random model, in float32."""
    make(folder / "base", family)
    (folder / "int8").mkdir()
    row = TokenRow(tokens=torch.randint(97, (40,)).tolist(), trained=[True] * 40)
    given = [] if config.method == "nearest" else [pack([row])]
    layout.write(weights.load(folder / "base", torch.float32), folder / "int8", folder / "base", config, given)
    return weights.load(folder / "int8", torch.float32)


def plan(decoder: Decoder, native: Library | None) -> Plan:
    return Plan(decoder, blocks=BLOCKS, tokens=200, draws=200, context=600, native=native)


class Rows:
    """Sequences and the blocks that they hold; makes batches of any pieces of them."""

    def __init__(self, tokens: Sequence[torch.Tensor], adapters: Sequence[int | None] | None = None) -> None:
        self.tokens, self.adapters = tokens, adapters or [None] * len(tokens)
        free = iter(torch.randperm(BLOCKS).tolist())
        self.tables = [[next(free) for _ in range(-(-len(row) // 32))] for row in tokens]
        self.done = [0] * len(tokens)

    def batch(self, counts: dict[int, int]) -> Batch:
        """The next `count` tokens of each row, by row number; all of them draw."""
        ids, positions, slots, spans, tables, worn = [], [], [], [], [], []
        for row, count in counts.items():
            begin = self.done[row]
            self.done[row] += count
            spans.append([len(ids), begin, count, len(tables)])
            places = range(begin, begin + count)
            ids += self.tokens[row][begin : begin + count].tolist()
            positions += places
            slots += [self.tables[row][place // 32] for place in places]
            tables += self.tables[row]
            worn += [-1 if self.adapters[row] is None else self.adapters[row]] * count
        numbers = [torch.tensor(values, dtype=torch.int32) for values in (ids, positions, slots, spans, tables)]
        draws = torch.arange(len(ids), dtype=torch.int32)
        adapters = torch.tensor(worn, dtype=torch.int32) if any(place >= 0 for place in worn) else None
        return Batch(*numbers, draws, adapters)


def together(plan: Plan, rows: Rows) -> list[torch.Tensor]:
    """All rows in one batch; logits of each."""
    lengths = [len(row) for row in rows.tokens]
    logits = plan.run(rows.batch(dict(enumerate(lengths)))).clone()
    return list(logits.split(lengths))


def random_rows(lengths: Sequence[int]) -> list[torch.Tensor]:
    return [torch.randint(97, (length,)) for length in lengths]


@pytest.mark.parametrize(("family", "config"), KINDS)
def test_native_equals_the_twin_to_the_bit(
    tmp_path: Path, native: Library, family: str, config: QuantizeConfig
) -> None:
    decoder = small(tmp_path, family, config)
    rows = random_rows([1, 37, 5, 70])
    ours, twin = together(plan(decoder, native), Rows(rows)), together(plan(decoder, None), Rows(rows))
    for found, expected in zip(ours, twin, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("family", "config"), KINDS)
def test_it_is_the_reference_forward(tmp_path: Path, family: str, config: QuantizeConfig) -> None:
    decoder = small(tmp_path, family, config)
    rows = random_rows([60, 9])
    found = together(plan(decoder, library.load()), Rows(rows))
    for row, logits in zip(rows, found, strict=True):
        with torch.no_grad():
            hidden = decoder(row, torch.arange(len(row)), PackedAttention([len(row)]))
            expected = decoder.logits(hidden)
        # Keys and values are rounded to bfloat16 in the cache, and a rounding to int8 can fall to the other side.
        assert float((logits - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize(
    ("family", "config"),
    [("smollm", QuantizeConfig()), ("mistral", QuantizeConfig()), ("smollm", INT4), ("gemma3", QuantizeConfig())],
)
def test_alone_beside_others_and_in_chunks_the_same_bits(
    tmp_path: Path, native: Library, family: str, config: QuantizeConfig
) -> None:
    decoder = small(tmp_path, family, config)
    rows = [torch.randint(97, (length,)) for length in (300, 1, 33, 64, 270)]
    ours = Plan(decoder, blocks=BLOCKS, tokens=700, draws=700, context=600, native=native)
    alone = [together(ours, Rows([row]))[0] for row in rows]
    for found, expected in zip(together(ours, Rows(rows)), alone, strict=True):
        assert torch.equal(found, expected)
    chunked = Rows(rows)
    collected: list[list[torch.Tensor]] = [[] for _ in rows]
    draw = torch.Generator().manual_seed(1)
    while any(done < len(row) for done, row in zip(chunked.done, rows, strict=True)):
        counts = {}
        for place, row in enumerate(rows):
            left = len(row) - chunked.done[place]
            count = min(left, int(torch.randint(0, 90, (), generator=draw)))
            if count:
                counts[place] = 1 if left < 20 else count
        if counts:
            logits = ours.run(chunked.batch(counts)).clone()
            for place, part in zip(counts, logits.split(list(counts.values())), strict=True):
                collected[place].append(part)
    for parts, expected in zip(collected, alone, strict=True):
        assert torch.equal(torch.cat(parts), expected)


def random_adapter(decoder: Decoder, rank: int, targets: tuple[str, ...], seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    adapter = Adapter.create(decoder, rank=rank, alpha=8.0, targets=targets, generator=generator)
    for _, b in adapter.pairs.values():
        b.normal_(0, 0.2, generator=generator)
    return adapter


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("family", "config"),
    [("smollm", QuantizeConfig()), ("qwen3", QuantizeConfig()), ("smollm", INT4), ("gemma3", QuantizeConfig())],
)
def test_rows_wear_their_own_adapters(tmp_path: Path, native: Library, family: str, config: QuantizeConfig) -> None:
    decoder = small(tmp_path, family, config)
    adapters = [random_adapter(decoder, 4, ALL, 1), random_adapter(decoder, 7, ("v_proj", "up_proj"), 2)]
    rows, worn = random_rows([8, 40, 3, 21]), [1, None, 0, 1]
    both = [plan(decoder, native), plan(decoder, None)]
    for each in both:
        assert [each.wear(each.fit(adapter)) for adapter in adapters] == [0, 1]
    ours, twin = (together(each, Rows(rows, worn)) for each in both)
    for place, (found, expected) in enumerate(zip(ours, twin, strict=True)):
        assert torch.equal(found, expected)
        alone = together(both[0], Rows([rows[place]], [worn[place]]))[0]
        assert torch.equal(found, alone), "the others' adapters change nothing"
    for row, adapter, found in zip(rows, worn, ours, strict=True):
        wearing = None if adapter is None else AdapterRows([(adapters[adapter], torch.arange(len(row)))])
        with torch.no_grad():
            hidden = decoder(row, torch.arange(len(row)), PackedAttention([len(row)]), wearing)
            expected = decoder.logits(hidden)
        assert float((found - expected).norm() / expected.norm()) < 0.04
    both[0].take_off(0)
    third = random_adapter(decoder, 2, ("q_proj",), 3)
    assert both[0].wear(both[0].fit(third)) == 0
    assert torch.equal(together(both[0], Rows([rows[0]], [1]))[0], ours[0])


def test_sizes_beyond_the_kernels_run_by_the_reference(tmp_path: Path) -> None:
    decoder = small(tmp_path, "smollm")
    assert has_plan(decoder, library.load())
    for field in ("head_width", "feed_forward"):
        decoder.config = msgspec.structs.replace(decoder.config, **{field: 1 << 17})
        assert not has_plan(decoder, library.load())
        decoder.config = msgspec.structs.replace(decoder.config, **{field: 16})


def test_norms_of_what_is_added_need_rows_without_padding(tmp_path: Path) -> None:
    make(tmp_path / "base", "gemma3", hidden_size=42)
    (tmp_path / "int8").mkdir()
    layout.write(weights.load(tmp_path / "base"), tmp_path / "int8", tmp_path / "base", QuantizeConfig())
    assert not has_plan(weights.load(tmp_path / "int8"), library.load())


def test_layers_of_another_kind_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "smollm")
    with pytest.raises(CheckpointError, match=r"is neither bfloat16 nor integers"):
        plan(weights.load(tmp_path, torch.float32), None)


@pytest.mark.parametrize("family", ["smollm", "llama-head-width", "mistral"])
def test_an_int8_cache_natively_equals_the_twin_and_is_near_the_reference(
    tmp_path: Path, native: Library, family: str
) -> None:
    decoder = small(tmp_path, family)
    rows = random_rows([1, 37, 70])
    sizes: dict[str, int] = {"blocks": BLOCKS, "tokens": 200, "draws": 200, "context": 600}
    ours, twin = (
        together(Plan(decoder, **sizes, native=library, cache_dtype=torch.int8), Rows(rows))
        for library in (native, None)
    )
    wide = together(Plan(decoder, **sizes, native=native), Rows(rows))
    for found, expected, near in zip(ours, twin, wide, strict=True):
        assert torch.equal(found, expected)
        assert not torch.equal(found, near)
        assert float((found - near).norm() / near.norm()) < 0.03


EVEN = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Widths that dense products take."""


def dense(folder: Path, family: str) -> Decoder:
    """A small random model in bfloat16."""
    make(folder / "base", family, **EVEN)
    return weights.load(folder / "base", torch.bfloat16)


@pytest.mark.parametrize("family", ["smollm", "llama-biases", "qwen3", "gemma3"])
def test_dense_layers_natively_equal_the_twin_and_are_near_the_reference(
    tmp_path: Path, native: Library, family: str
) -> None:
    decoder = dense(tmp_path, family)
    assert has_plan(decoder, native)
    rows = random_rows([1, 37, 5, 40])
    ours, twin = together(plan(decoder, native), Rows(rows)), together(plan(decoder, None), Rows(rows))
    exact = weights.load(tmp_path / "base", torch.float32)
    for row, found, expected in zip(rows, ours, twin, strict=True):
        assert torch.equal(found, expected)
        with torch.no_grad():
            logits = exact.logits(exact(row, torch.arange(len(row)), PackedAttention([len(row)])))
        assert float((found - logits).norm() / logits.norm()) < 0.02


def test_a_dense_row_alone_and_beside_others_is_the_same(tmp_path: Path, native: Library) -> None:
    decoder = dense(tmp_path, "smollm")
    rows = random_rows([300, 1, 33, 64])
    ours = Plan(decoder, blocks=BLOCKS, tokens=700, draws=700, context=600, native=native)
    alone = [together(ours, Rows([row]))[0] for row in rows]
    for found, expected in zip(together(ours, Rows(rows)), alone, strict=True):
        assert torch.equal(found, expected)


def test_layers_of_both_kinds_in_one_plan(tmp_path: Path, native: Library) -> None:
    make(tmp_path / "base", "llama2", **EVEN)
    (tmp_path / "int8").mkdir()
    layout.write(weights.load(tmp_path / "base"), tmp_path / "int8", tmp_path / "base", QuantizeConfig(portable=True))
    decoder = weights.load(tmp_path / "int8")
    assert has_plan(decoder, native)
    assert not has_plan(decoder, None)
    ours, twin = (together(plan(decoder, kernels), Rows([torch.arange(40)]))[0] for kernels in (native, None))
    assert torch.equal(ours, twin)
