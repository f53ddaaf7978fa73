"""A sequence that leaves a GPU as bytes: the same bytes come back, and a CPU can go on with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build, tokens

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("make", [PagedKVCache, PagedPQCache])
def test_the_same_bytes(make: Any, offload: bool) -> None:
    import copy

    model = copy.deepcopy(build("llama")).to("cuda", torch.float16)
    ids = tokens(2, 300).to("cuda")

    def go_on(cache: Any, ids: Any) -> Any:
        return model.generate(ids, **cache_kwargs(cache), max_new_tokens=40, do_sample=False)

    cache, again = (make(model.config, page_size=16, offload=offload) for _ in range(2))
    said = go_on(cache, ids)[1:]
    data = cache.export_sequence(1, model=model)
    again.import_sequence(data, model=model, device=model.device)
    assert again.export_sequence(0, model=model) == data
    alone = copy.deepcopy(cache)
    alone.batch_select_indices([1])
    more = torch.cat([said, tokens(1, 9).to("cuda")], dim=1)
    assert torch.equal(go_on(again, more), go_on(alone, more))
    host = make(model.config, page_size=16)
    host.import_sequence(data, model=model)
    assert host.export_sequence(0, model=model) == data
