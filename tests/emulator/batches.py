"""Requests of a continuous-batching engine over one layer of a pool, and what a step must do to them; runs no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import harness as h
import torch
from torch import Tensor

from hf_pqcache.backends.batch_rows import BatchRows, Step

#: A row of a step: the number of a request; None for one that is not there.
Order = Sequence[int | None]
NUM_LAYERS = 3  # whose pages a block holds; the one looked at is not the first
LAYER = 1


@dataclass
class Requests:
    """Request r has slot r; one slot more is the trash slot. Of each: blocks, length, tokens in pages, and all that it holds.

    history: of each side and request, float64 (H, length, d); coded tokens as their pages have them.
    """

    case: h.Case
    rows: BatchRows
    blocks: list[list[int]]
    free: list[int]
    lengths: list[int]
    coded: list[int]
    history: list[list[Tensor]]
    flags: Tensor

    @classmethod
    def make(cls, shape, lengths: list[int], max_batch: int, spare_blocks: int = 8, **options) -> Requests:  # type: ignore[no-untyped-def]
        """Requests of these lengths. `options`: of `make_case`."""
        if "shared" in options:
            options["shared"] = [*options["shared"], 0]
        case = h.make_case(*shape, [*lengths, 0], **options)
        geometry, device = case.geometry, case.pool.device
        blocks = [[page for page in row if page >= 0] for row in case.page_table[: len(lengths)].tolist()]
        width = geometry.table_width + spare_blocks
        num_blocks = len(case.pool) + spare_blocks
        free = sorted(set(range(num_blocks)) - {block for row in blocks for block in row})
        pool = torch.full((num_blocks, NUM_LAYERS, case.pool.shape[1]), 255, dtype=torch.uint8, device=device)
        pool[: len(case.pool), LAYER] = case.pool
        case.geometry, case.pool = replace(geometry, table_width=width), pool[:, LAYER]
        history = [[h.exact(case, row, which) for row in range(len(lengths))] for which in h.SIDES]
        case.tickets = torch.zeros(max_batch * (1 + 2 * geometry.kv_heads), dtype=torch.int32, device=device)
        begin = case.pool.data_ptr()
        case.desc[LAYER, :2] = torch.tensor([begin, begin + case.offset])
        case.desc[LAYER, 7] = case.tickets.data_ptr()
        rows = BatchRows(NUM_LAYERS, max_batch, width, num_blocks, trash_slot=len(lengths), device=device)
        coded, flags = case.counts[: len(lengths), 1].tolist(), torch.zeros(4, dtype=torch.int32, device=device)
        return cls(case, rows, blocks, free, list(lengths), coded, history, flags)

    def coded_after(self, request: int) -> int:
        """Tokens of a request in pages once it has one token more."""
        return max(self.coded[request], self.case.config.coded_tokens(self.lengths[request] + 1))

    def fill(self, order: Order, block_table: Tensor, lengths: Tensor) -> None:
        """Write a step's rows, as an engine does. Requests get a block before a page leaves their window."""
        table = torch.full(block_table.shape, -1, dtype=torch.int32)
        given = torch.zeros(len(order), dtype=torch.int32)
        for row, request in enumerate(order):
            if request is None:
                continue
            while len(self.blocks[request]) < self.coded_after(request) // self.case.config.page_size:
                self.blocks[request].append(self.free.pop())
            entries = [request, self.coded[request], *self.blocks[request]]
            table[row, : len(entries)] = torch.tensor(entries)
            given[row] = self.lengths[request] + 1
        block_table.copy_(table)
        lengths.copy_(given)

    def tables(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """A block table and lengths for so many rows, none there."""
        device = self.flags.device
        table = torch.full((num_rows, 2 + self.rows.width), -1, dtype=torch.int32, device=device)
        return table, torch.zeros(num_rows, dtype=torch.int32, device=device)

    def at(self, step: Step) -> h.Case:
        """The layer as the step's launches find it."""
        geometry = self.case.geometry.of_batch(len(step.slots))
        return replace(
            self.case, counts=step.seq_lens[LAYER], starts=step.left_pad, page_table=step.page_table, geometry=geometry,
            slots=step.slots,
        )  # fmt: skip

    def check(self, order: Order, step: Step, k: Tensor, v: Tensor, q: Tensor, out: Tensor, tolerance: float) -> None:
        """Take the step's k, v (B, H, 1, d) over, and see that they were stored and that q attends to all of it."""
        case, config = self.at(step), self.case.config
        assert not self.flags.any()
        assert not self.case.tickets.any()
        assert out.isfinite().all()
        gathered = replace(
            case, slots=None, page_table=case.page_table.clone() // NUM_LAYERS,
            windows=[window[step.slots.long()] for window in case.windows],
        )  # fmt: skip
        there = [(row, request) for row, request in enumerate(order) if request is not None]
        for row, request in there:
            coded = self.coded_after(request)
            first, end = (config.sink_tokens + n for n in (self.coded[request], coded))
            self.lengths[request], self.coded[request] = self.lengths[request] + 1, coded
            assert case.counts[row].tolist() == [self.lengths[request], coded]
            for side, (which, x) in enumerate(zip(h.SIDES, (k, v), strict=True)):
                held = torch.cat([self.history[side][request], x[row].double().cpu()], dim=1)
                now = h.exact(gathered, row, which)
                assert torch.equal(now[:, :first], held[:, :first]), "pages that are there already stay"
                assert torch.equal(now[:, end:], held[:, end:])
                page, left = (first - config.sink_tokens) // config.page_size, held[:, first:end]
                if end > first and case.geometry.is_exact:
                    assert torch.equal(now[:, first:end], left)
                elif end > first:
                    h.check_page(case, which, self.blocks[request][page], left)
                self.history[side][request] = now
        rows = [row for row, _ in there]
        wanted = h.reference(gathered, q, None, None, 0.1, 0.0)
        assert h.relative_error(out[rows], wanted[rows]) < tolerance
        for row in set(range(len(order))) - set(rows):
            assert int(step.slots[row]) == self.rows.trash_slot
            assert case.counts[row].tolist() == [1, 0]
