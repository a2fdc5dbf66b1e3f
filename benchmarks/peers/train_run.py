"""One contender's training run in a process of its own: seconds and loss of each step, and the memory that it took.

    python benchmarks/peers/train_run.py steelyard|trainer|peft|trl --model DIR --rows FILE --steps N --method lora|full

The same weights, rows, batch, learning rate and precision (bfloat16 weights) for all; the rows are packed text, and
every token is learnt. Prints a JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

RATE = {"lora": 4e-4, "full": 2e-5}
RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock:
    """When each step ended, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())


def steelyard(model: Path, rows: torch.Tensor, batch: int, method: str, clock: Clock) -> None:
    """Our trainer, as `steelyard train` runs it, without evaluations and states."""
    import msgspec

    from steelyard.data.rows import TokenRow
    from steelyard.data.token_rows import TokenRows
    from steelyard.models import weights
    from steelyard.runs import Run
    from steelyard.train import lora
    from steelyard.train.config import DataConfig, TrainConfig
    from steelyard.train.language_model import LanguageModelling
    from steelyard.train.lora import LoraConfig
    from steelyard.train.optimizers import OptimizerConfig
    from steelyard.train.schedules import ScheduleConfig
    from steelyard.train.trainer import Lineage, Progress, Trainer

    folder = Path(tempfile.mkdtemp())
    config = TrainConfig(
        model=str(model),
        output=str(folder),
        data=DataConfig(train="rows"),
        method="lora" if method == "lora" else "full",
        epochs=1,
        batch_size=batch,
        checkpoint_every=1 << 30,
        optimizer=OptimizerConfig(name="adamw", learning_rate=RATE[method], weight_decay=0.0),
        schedule=ScheduleConfig(name="linear", warmup=0),
        lora=LoraConfig(rank=RANK, alpha=ALPHA),
    )
    decoder = weights.load(model, torch.bfloat16)
    adapter = lora.start(decoder, config.lora, 0) if method == "lora" else None
    learnt = [TokenRow(tokens=row, trained=[False] + [True] * (len(row) - 1)) for row in rows.tolist()]
    task = LanguageModelling(decoder, adapter, TokenRows.of(learnt), model)
    run = Run(folder, msgspec.to_builtins(config))
    trainer = Trainer(task, config, run, Lineage(parent=None, data={}))
    trainer.loader = InOrder(len(rows), batch)  # type: ignore[assignment]
    trainer._evaluate = lambda: None  # type: ignore[method-assign]
    trainer._save_state = lambda: None  # type: ignore[method-assign]

    def report(progress: Progress) -> None:
        clock.losses.append(progress.loss)
        clock.tick()

    trainer.fit(report)


class InOrder:
    """Batches in the order of the file."""

    epoch = 0

    def __init__(self, rows: int, batch: int) -> None:
        self.batches_per_epoch = rows // batch
        self._batches = (list(range(begin, begin + batch)) for begin in range(0, rows, batch))

    def next(self) -> list[int]:
        """The next one."""
        return next(self._batches)


def peer(kind: str, model: Path, rows: torch.Tensor, batch: int, method: str, clock: Clock) -> None:
    """Hugging Face's Trainer, with PEFT's LoRA, or TRL's on top of it."""
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Ticking(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_log(self, _: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                clock.losses.append(float(logs["loss"]))

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        network = get_peft_model(
            network, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        )
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "num_train_epochs": 1,
        "learning_rate": RATE[method],
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "weight_decay": 0.0,
    }
    items = [{"input_ids": row, "labels": row.clone()} for row in rows]
    if kind == "trl":
        from datasets import Dataset  # type: ignore[import-not-found]
        from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

        data = Dataset.from_dict({"input_ids": rows.tolist()})
        settings = SFTConfig(**common, max_length=rows.shape[1], dataset_kwargs={"skip_prepare_dataset": True})
        trainer: Any = SFTTrainer(model=network, train_dataset=data, args=settings, callbacks=[Ticking()])
    else:
        trainer = Trainer(model=network, args=TrainingArguments(**common), train_dataset=items, callbacks=[Ticking()])
    trainer._get_train_sampler = lambda *_: SequentialSampler(items)
    trainer.train()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["steelyard", "trainer", "peft", "trl"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="safetensors with int64 `rows` [N, L]")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--method", choices=["lora", "full"], required=True)
    asked = parser.parse_args()
    from safetensors.torch import load_file

    torch.manual_seed(0)
    rows, clock = load_file(asked.rows)["rows"], Clock()
    if asked.kind == "steelyard":
        steelyard(asked.model, rows, asked.batch, asked.method, clock)
    else:
        peer(asked.kind, asked.model, rows, asked.batch, asked.method, clock)
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "losses": clock.losses[: len(clock.ends)], "peak_bytes": peak}))


if __name__ == "__main__":
    main()
