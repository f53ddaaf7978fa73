"""Every error code is raised where it says, by what a user does, with the way out; and the cache goes on afterwards."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import SMALL, build, codebook_of, tokens

from hf_pqcache import PagedPQCache, PQCacheError, errors
from hf_pqcache.backends import dispatch
from hf_pqcache.cli import main
from hf_pqcache.config import PQConfig
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.pages.codec import CodedPages

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**options: Any) -> PagedPQCache:
    return PagedPQCache(build("llama").config, codebook_of("llama"), SMALL, **options)


def forward(cache: PagedPQCache, count: int) -> torch.Tensor:
    with torch.no_grad():
        return build("llama")(tokens(2, count), **cache_kwargs(cache)).logits


def pages_exhausted(monkeypatch: pytest.MonkeyPatch) -> tuple[PagedPQCache, str]:
    cache = make(max_pages=4)
    forward(cache, 30)
    with pytest.raises(errors.PagesExhaustedError) as caught:
        forward(cache, 90)
    return cache, str(caught.value)


def no_kernel(monkeypatch: pytest.MonkeyPatch) -> tuple[PagedPQCache, str]:
    cache = make()
    forward(cache, 30)
    monkeypatch.setenv("HF_PQCACHE_KERNEL", "tuned")
    other = make()
    with pytest.raises(errors.NoKernelError) as caught:
        forward(other, 90)
    monkeypatch.delenv("HF_PQCACHE_KERNEL")
    assert other.get_seq_length() == 0
    return cache, str(caught.value)


def window_overflow(monkeypatch: pytest.MonkeyPatch) -> tuple[PagedPQCache, str]:
    """No call of a user's brings it about: a window has room for all that its cache does not code. Were it not so ..."""
    cache = make()
    forward(cache, 30)
    with monkeypatch.context() as patch:
        patch.setattr(PQConfig, "coded_tokens", lambda self, length: 0)
        with pytest.raises(errors.WindowOverflowError) as caught:
            forward(cache, 90)
    return cache, str(caught.value)


def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> tuple[PagedPQCache, str]:
    cache, original = make(), CodedPages.encode
    forward(cache, 30)

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left, says the test")

    monkeypatch.setattr(CodedPages, "encode", full)
    with pytest.raises(errors.CacheOutOfMemoryError) as caught:
        forward(cache, 90)
    monkeypatch.setattr(CodedPages, "encode", original)
    return cache, str(caught.value)


#: code -> (what brings it about: a cache of 30 tokens afterwards, and the message; words of the way out).
RAISED: dict[str, tuple[Callable[[pytest.MonkeyPatch], tuple[PagedPQCache, str]], str]] = {
    "PQC001": (pages_exhausted, "max_pages="),
    "PQC002": (no_kernel, "unset it"),
    "PQC003": (window_overflow, "report it"),
    "PQC004": (out_of_memory, "use fewer bits or sequences"),
}


def classes() -> list[type[PQCacheError]]:
    found = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, PQCacheError)]
    return [c for c in found if c is not PQCacheError]


def test_every_code_is_one_error_and_has_a_case() -> None:
    codes = [c.code for c in classes()]
    assert sorted(codes) == sorted(RAISED)
    for error in classes():
        assert re.match(rf"{error.code}: ", error.__doc__ or ""), "the class says its code"


@pytest.mark.parametrize("code", RAISED)
def test_a_code_is_raised_with_the_way_out_and_the_cache_goes_on(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bring_about, way_out = RAISED[code]
    cache, message = bring_about(monkeypatch)
    assert message.startswith(f"[{code}] ")
    assert way_out in message
    assert cache.get_seq_length() == 30
    with torch.no_grad():
        wanted = build("llama")(torch.cat([tokens(2, 30), tokens(2, 1)], dim=1)).logits[:, -1]
    torch.testing.assert_close(forward(cache, 1)[:, -1], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["tuned", "generic"])
def test_a_forced_kernel_says_why_it_does_not_serve(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_PQCACHE_KERNEL", kernel)
    arguments = ((128, 128), dispatch.point(4, 128), 4, torch.float16, torch.device("cpu"))
    with pytest.raises(errors.NoKernelError, match=f"HF_PQCACHE_KERNEL={kernel}, but the cache is on cpu; unset it"):
        dispatch.select(*arguments)
    monkeypatch.setenv("HF_PQCACHE_KERNEL", "torch")
    assert dispatch.select(*arguments).name == "torch"
    monkeypatch.setenv("HF_PQCACHE_KERNEL", "fast")
    with pytest.raises(ValueError, match="none of tuned, generic, torch"):
        dispatch.select(*arguments)


def test_commands_show_a_code_as_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_pqcache.backends import diagnose

    def exhausted(*args: Any, **kwargs: Any) -> Any:
        raise errors.PagesExhaustedError("none left, says the test")

    monkeypatch.setattr(diagnose, "diagnose", exhausted)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "Error: [PQC001] none left, says the test"
