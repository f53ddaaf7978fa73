"""Steps of continuous batching on a GPU, captured as CUDA graphs: rows, lengths and tables change between replays."""

from __future__ import annotations

import random
from typing import Any

import harness as h
import pytest
import torch
from batches import Requests
from torch import Tensor

from hf_pqcache.backends import cuda_backend, jit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or jit.why_unavailable() is not None, reason="needs a GPU and CuPy"),
]

#: (head_dim, keys, values): 4, 3 and 2 bits, codes that are read one by one, exact pages.
SHAPES = [
    (128, (64, 8), (64, 8)), (128, (64, 7), (64, 5)), (128, (64, 5), (32, 6)), (64, (32, 8), (32, 8)), (80, (40, 5), (20, 8)),
    (128, None, None), (80, None, None),
]  # fmt: skip
LENGTHS = [1, 3, 27, 100, 300, 900]
GROUP, KV_HEADS = 4, 2


class Graph:
    """A captured step of so many rows, and its inputs."""

    def __init__(self, requests: Requests, num_rows: int) -> None:
        self.requests, geometry, dtype = requests, requests.case.geometry, requests.case.windows[0].dtype
        self.table, self.lengths = requests.tables(num_rows)
        new = (num_rows, KV_HEADS, 1, geometry.head_dim)
        self.k, self.v = (torch.zeros(new, dtype=dtype, device="cuda") for _ in h.SIDES)
        self.q = torch.zeros(num_rows, KV_HEADS * GROUP, 1, geometry.head_dim, dtype=dtype, device="cuda")
        self.launch()  # compiles; no row is there
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.launch()

    def launch(self) -> None:
        self.step = self.requests.rows.begin_step(self.table, self.lengths)
        place = self.requests.at(self.step).place
        cuda_backend.append(self.k, self.v, place, self.requests.flags)
        self.out = cuda_backend.attend(self.q, place, None, None, 0.1, 0.0, place.geometry.max_tokens)

    def run(self, order: list[int | None]) -> Tensor:
        self.requests.fill(order, self.table, self.lengths)
        for x in (self.k, self.v, self.q):
            x.normal_()
        self.graph.replay()
        return self.out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_of_changing_rows(shape: Any, dtype: torch.dtype) -> None:
    """Two sizes of a batch share one `BatchRows`; pages leave windows, rows come and go and change their places."""
    torch.manual_seed(0)
    rng = random.Random(0)
    requests = Requests.make(
        shape, LENGTHS, max_batch=9, spare_blocks=40, kv_heads=KV_HEADS, page_size=16, recent=24, dtype=dtype,
        device="cuda", shared=[0, 0, 1, 0, 1, 0],
    )  # fmt: skip
    graphs = [Graph(requests, num_rows) for num_rows in (9, 3)]
    for _ in range(30):
        graph = rng.choice(graphs)
        num_rows = len(graph.lengths)
        there: list[int | None] = [*rng.sample(range(len(LENGTHS)), rng.randint(0, min(num_rows, len(LENGTHS))))]
        order = [*there, *[None] * (num_rows - len(there))]
        rng.shuffle(order)
        out = graph.run(order)
        requests.check(order, graph.step, graph.k, graph.v, graph.q, out, h.TOLERANCE[dtype])
