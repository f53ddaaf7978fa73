"""Counts the memory that tensors hold on a CPU, whose allocator keeps no count; knows no cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_pqcache.attention import ops


class Allocations(TorchDispatchMode):
    """While active, remembers every storage that is made; `held()` is what of it is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hf_pqcache":
            with self:  # what our own ops allocate
                return ops.IMPLEMENTATIONS[func._schema.name.split("::")[1]](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def held(self) -> int:
        """Bytes of the storages that are still there."""
        self._made = {key: (ref, count) for key, (ref, count) in self._made.items() if not ref.expired()}
        return sum(count for _, count in self._made.values())
