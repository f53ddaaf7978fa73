"""Tensor parallelism in tests: what each process does, also alone for what is expected, and how processes are started.

A folder holds `model`, `codebook` and `settings.json`: {"dtype": ..., "plan": how the model is told to spread its heads,
"cache": settings of the cache}. Rank r of torchrun
writes its results to `rank<r>.pt` there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompileConfig
from transformers.distributed import DistributedConfig

from hf_pqcache import Codebook, PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

PROMPT, NEW, FEW = 60, 24, 8


def torchrun(folder: Path, processes: int, script: str = "tp_worker.py") -> list[dict[str, Any]]:
    """Run this file, or another one beside it, in several processes -> the results of every rank."""
    here = Path(__file__).with_name(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    path = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(here), str(folder)], env=environment, capture_output=True, text=True, timeout=500)
    (folder / "stderr.txt").write_text(done.stderr)
    lines = done.stderr.splitlines()
    first = next((i for i, line in enumerate(lines) if "Error" in line), 0)
    assert done.returncode == 0, "\n".join(lines[max(0, first - 30) : first + 30])
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


def load(folder: Path, **options: Any) -> Any:
    dtype = getattr(torch, json.loads((folder / "settings.json").read_text())["dtype"])
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype, **options).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def compiling(model: Any) -> dict[str, Any]:
    """On a CPU `generate` compiles only if it is told to, and here without a compiler: one graph, run as it is."""
    if model.device.type != "cpu":
        return {}
    is_whole = model.config.model_type == "llama"  # 5.17 hooks Qwen3's norms for a backward pass, which breaks the graph
    config = CompileConfig(fullgraph=is_whole, backend=lambda graph, inputs, **options: graph.forward, mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}


def inputs(model: Any) -> dict[str, Tensor]:
    """Two rows, the second one padded on the left."""
    ids = torch.randint(3, model.config.vocab_size, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :17], mask[1, :17] = 0, 0
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def generate(model: Any, cache: Any, **options: Any) -> tuple[Tensor, Tensor]:
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    print(f"{type(cache).__name__}, eager: {cache.stats()['eager_because']}", file=sys.stderr, flush=True)
    out = model.generate(**inputs(model), **cache_kwargs(cache), **(settings | options))
    return out.sequences.cpu(), torch.stack(out.logits).float().cpu()


def run(model: Any, folder: Path) -> dict[str, Any]:
    """Everything that is compared, of this process."""
    settings = json.loads((folder / "settings.json").read_text())["cache"]
    book = Codebook.from_pretrained(folder / "codebook")
    settings = {k: v for k, v in settings.items() if v is not None and k not in ("bits", "num_bits", "num_subspaces")}
    cache = PagedPQCache(model.config, book, **settings, compile=False)
    results: dict[str, Any] = {"greedy": generate(model, cache)}
    stats = cache.stats()
    results["facts"] = {
        "heads": cache.storage.layers.views[0].window_keys.shape[1],
        "code_bytes": stats["bytes"]["codes"],
        "codebook_bytes": stats["bytes"]["codebooks"],
        "pages": stats["pages_used"],
        "tokens": stats["tokens"],
        "calls": stats["calls"],
    }
    cache.reset()
    results["beams, after reset"] = generate(model, cache, num_beams=3, max_new_tokens=FEW)
    published = PagedPQCache.from_pretrained(folder / "codebook", model, **settings, compile=False)
    results["from_pretrained"] = generate(model, published, max_new_tokens=FEW)
    exact = PagedKVCache(model.config, page_size=16, max_pages=64, compile=False)
    results["exact pages"] = generate(model, exact, max_new_tokens=FEW)
    results["shipped codebook"] = generate(model, PagedPQCache(model.config, bits=3, **settings, compile=False))
    compiled = PagedPQCache(model.config, book, **settings, compile=True)
    results["compiled"] = generate(model, compiled, max_new_tokens=FEW, **compiling(model))
    return results


def main() -> None:
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "settings.json").read_text())["plan"]
    # The first is what transformers' guides say, and deprecated; the second is what follows it.
    spread = {"tp_plan": {"tp_plan": "auto"}, "distributed_config": {"distributed_config": DistributedConfig(tp_plan="auto")}}
    model = load(folder, **spread[plan])
    with torch.inference_mode():
        results = run(model, folder)
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    # NCCL would wait without end for the captured graphs that hold its collectives (StaticCache's as well).
    os._exit(0)


if __name__ == "__main__":
    main()
