"""Runs inside OpenVINO's environment: GenAI's continuous batching in process, without HTTP (a favour to the peer).

python openvino_run.py MODEL ROWS.json CONCURRENCY     -> one JSON line of raw times
"""

# Its environment has no type stubs, and nothing of Steelyard.
import json
import sys
import time
from pathlib import Path
from typing import Any

import openvino_genai as genai  # type: ignore[import-not-found]

CACHE_GB, MOST_SEQUENCES, BATCHED_TOKENS = 2, 64, 2048


def main(model: str) -> None:
    """Load once, then run each plan that comes on standard input."""
    sizes = genai.SchedulerConfig()
    sizes.cache_size, sizes.max_num_seqs, sizes.max_num_batched_tokens = CACHE_GB, MOST_SEQUENCES, BATCHED_TOKENS
    sizes.enable_prefix_caching = sizes.dynamic_split_fuse = True
    pipe = genai.ContinuousBatchingPipeline(model, sizes, "CPU", {})
    tokenizer = pipe.get_tokenizer()
    print("ready", flush=True)
    number = 0
    for line in sys.stdin:
        plan = json.loads(line)
        waiting = json.loads(Path(plan["rows"]).read_text())
        live: dict[int, tuple[Any, dict[str, Any]]] = {}
        done: list[dict[str, Any]] = []
        started = time.perf_counter()
        while waiting or live:
            while waiting and len(live) < plan["concurrency"]:
                row = waiting.pop(0)
                begun = time.perf_counter()
                ids = tokenizer.encode(
                    tokenizer.apply_chat_template(row["messages"], True), add_special_tokens=False
                ).input_ids
                config = genai.GenerationConfig()
                config.max_new_tokens = config.min_new_tokens = row["max_tokens"]
                config.ignore_eos, config.do_sample = True, False
                number += 1
                live[number] = (pipe.add_request(number, ids, config), {"started": begun, "pieces": [], "tokens": 0})
            pipe.step()
            now = time.perf_counter()
            for key, (handle, answer) in list(live.items()):
                while handle.can_read():
                    answer["tokens"] += sum(len(output.generated_ids) for output in handle.read().values())
                    answer["pieces"].append(now)
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    answer["ended"] = now
                    done.append(answer)
                    del live[key]
        print(json.dumps({"seconds": time.perf_counter() - started, "answers": done}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
