"""Continuous batching under tensor parallelism in tests: what each process does; takes a folder of `tp_worker.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import tp_worker
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_pqcache.batching import enable_batching

LENGTHS, NEW = (5, 37, 60, 90), 24


def run(model: Any, exact: bool, settings: dict[str, Any]) -> list[list[int]]:
    """Tokens that are said to each prompt."""
    made = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, model.config.vocab_size, (n,), generator=made).tolist() for n in LENGTHS]
    enable_batching(model, exact=exact, **settings)
    config = ContinuousBatchingConfig(num_blocks=40, max_batch_tokens=64, allow_block_sharing=False, cpu_group_timeout=60)
    found = model.generate_batch(prompts, GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1), config)
    assert all(result.error is None for result in found.values())
    return [result.generated_tokens for result in found.values()]


def results(model: Any) -> dict[str, Any]:
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight = weight.to_local() if hasattr(weight, "to_local") else weight
    coded = {"page_size": 16, "extended_residual": 16}
    return {"coded": run(model, False, coded), "exact": run(model, True, {"page_size": 16}), "rows": len(weight)}


def main() -> None:
    folder = Path(sys.argv[1])
    model = tp_worker.load(folder, tp_plan="auto")
    torch.save(results(model), folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    os._exit(0)  # as in tp_worker.py


if __name__ == "__main__":
    main()
