"""Any task of lm-evaluation-harness under any cache: its model `hf-pqcache`; knows no task and no result row.

The harness's own model `hf` scores a continuation in the same forward pass as its context, so that no cache takes part.
Here the context goes into the cache first, all but its last token, and what is scored is predicted from what the cache
has kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm

from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.eval.measure.deployed import ANSWER_CHUNK
from hf_pqcache.eval.session.caches import CacheSpec, head_dim_of
from hf_pqcache.eval.session.given import check_given
from hf_pqcache.eval.session.model_config import load_model_config
from hf_pqcache.eval.session.models import load_model, public_name
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.setup import Calibration, fitted
from hf_pqcache.models.identity import model_fingerprint
from hf_pqcache.models.names import cache_kwargs

_SHAPE = tuple(field.name for field in fields(PQConfig))


@dataclass(frozen=True)
class _Request:
    """tokens: what goes in, the last `scored` of them behind the context; targets: (index of the answer, scored tokens)."""

    tokens: tuple[int, ...]
    scored: int
    targets: list[tuple[int, list[int]]]

    @property
    def prefix(self) -> int:
        """Tokens that are in the cache before anything is predicted from it."""
        return len(self.tokens) - self.scored


@register_model("hf-pqcache")
class CacheLM(HFLM):
    """A causal model of transformers under one cache.

    Args:
        pretrained: a name of model_configs/, a YAML file, a folder or a Hub id; or a loaded model.
        cache: name and bits as in `--cache`: dynamic, quanto:4, hqq:3, fp8, pq:2, ...; or a finished CacheSpec.
        codebook: folder or Hub repository; the model config's, or the one that comes with the package, if absent.
            codebook_revision: its commit.
        calibration: text to learn a codebook of the model's own from. data_dir: where data sets' plain files lie.
        chunk: tokens of a continuation that go in at once; they see each other exactly. 1 is token by token.
        options: settings of a model config (bits, num_subspaces, page_size, extended_residual, calibration_tokens, ...) and
            all arguments of the harness's `hf`.

    Raises:
        ValueError: batch_size is "auto", or the model is no causal one.
    """

    def __init__(
        self,
        pretrained: Any,
        cache: str | CacheSpec = "pq",
        codebook: str | None = None,
        codebook_revision: str | None = None,
        calibration: str | None = None,
        data_dir: str | None = None,
        chunk: int = ANSWER_CHUNK,
        **options: Any,
    ) -> None:
        shape = {name: options.pop(name) for name in (*_SHAPE, "calibration_tokens") if name in options}
        if str(options.get("batch_size", 1)).startswith("auto"):
            raise ValueError("batch_size=auto would be measured without the cache; give a number")
        config = None
        if isinstance(pretrained, str):
            config = load_model_config(pretrained, shape)
            pretrained = config.source
            if pretrained.endswith(".gguf"):  # the harness would keep its weights packed
                wanted = {name: options.pop(name) for name in ("dtype", "device") if name in options}
                pretrained, options["tokenizer"] = load_model(pretrained, **wanted)
            else:
                options.setdefault("revision", config.revision or "main")
        super().__init__(pretrained=pretrained, **options)
        if self.backend != "causal":
            raise ValueError(f"a KV cache under test needs a causal model, got a {self.backend} one")
        self.chunk = int(chunk)
        if isinstance(cache, CacheSpec):
            if shape or codebook or calibration:
                raise ValueError(
                    f"cache={cache.label} is finished: {[*shape, *filter(None, (codebook, calibration))]} do nothing"
                )
            self.spec = cache
        elif config is None:
            raise ValueError("with a loaded model give cache=CacheSpec(...)")
        else:
            config.check(self.model.config)
            given = {name: value for name, value in shape.items() if value is not None}
            width, own = head_dim_of(self.model.config), codebook or (config.codebook if cache == "pq" else None)
            revision = codebook_revision or (None if codebook else config.codebook_revision)
            book = Codebook.from_pretrained(own, revision=revision) if own and not (calibration and not codebook) else None
            sources = {"codebook": codebook, "calibration": calibration}
            check_given([cache], given, book, sources, head_dim=width)
            self.spec = CacheSpec.parse(cache, width, config.pq_config)
            fingerprint = model_fingerprint(self.model, config.source, config.revision)
            session = Session(self.model, self.tokenizer, public_name(config.source), fingerprint=fingerprint)
            if calibration is not None:
                learning = Calibration.of(config, source=calibration, data_dir=data_dir)
                book = learning.codebook(session, self.spec.config)
            if book is not None:
                self.spec = fitted(session, self.spec, book)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives it) of every (names, context, continuation).

        Requests that put the same tokens in, such as answers of one token, share a forward pass.
        """
        unique: dict[tuple[tuple[int, ...], int], _Request] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"{len(continuation)} tokens after {len(context)}: at least one of each is needed, and a continuation of "
                    f"at most {self.max_length} tokens"
                )
            tokens = tuple((context + continuation)[-(self.max_length + 1) : -1])
            if self.spec.press and len(tokens) - len(continuation) < 1:
                raise ValueError(
                    f"press {self.spec.press} prunes prompts, and a rolling text has none: leave --press out, or such tasks"
                )
            request = unique.setdefault((tokens, len(continuation)), _Request(tokens, len(continuation), []))
            request.targets.append((index, continuation))
        answers: dict[int, tuple[float, bool]] = {}
        is_part = override_bs is not None  # of a rolling text: the harness calls this once a batch
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or is_part or self.rank != 0) as bar:
            for batch in _batches(unique.values(), override_bs or int(self.batch_size)):
                for request, logits in zip(batch, self._logits(batch), strict=True):
                    for index, continuation in request.targets:
                        answers[index] = _score(logits, continuation)
                        if requests[index][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                    bar.update(len(request.targets))
        return [answers[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _logits(self, batch: Sequence[_Request]) -> list[Tensor]:
        """Float32 logits (scored, vocabulary) of every request, the scored tokens predicted from the cache.

        All prefixes have one length. Shorter continuations are filled up behind, where nothing that counts looks.
        """
        longest = max(len(request.tokens) for request in batch)
        rows = [[*request.tokens, *[request.tokens[-1]] * (longest - len(request.tokens))] for request in batch]
        ids, prefix = torch.tensor(rows, device=self.device), batch[0].prefix
        cache = self.spec.make(self.model, longest, len(batch))
        type_ = self.mixed_precision_dtype
        with torch.autocast(device_type=self.device.type, dtype=type_, enabled=type_ is not None):
            if prefix:
                self.model(input_ids=ids[:, :prefix], **cache_kwargs(cache, self.model), use_cache=True, logits_to_keep=1)
            parts = [
                self.model(input_ids=part, **cache_kwargs(cache, self.model), use_cache=True).logits.float()
                for part in ids[:, prefix:].split(self.chunk, dim=1)
            ]
        logits = torch.cat(parts, dim=1)
        return [logits[i, : request.scored] for i, request in enumerate(batch)]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Any:
        """`generate` as the harness calls it, into a fresh cache."""
        cache = self.spec.make(self.model, max_length, context.shape[0] * int(options.get("num_beams") or 1))
        return super()._model_generate(context, max_length, stop, **cache_kwargs(cache), **options)


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """logits (n, vocabulary), n tokens -> their log-likelihood, and whether each is the most likely one."""
    wanted = torch.tensor(continuation, device=logits.device)
    likelihood = F.log_softmax(logits, dim=-1).gather(1, wanted[:, None]).sum()
    return float(likelihood), bool((logits.argmax(-1) == wanted).all())


def _batches(requests: Iterable[_Request], size: int) -> list[list[_Request]]:
    """Batches of equal prefix length, the longest first: what does not fit in memory fails at once."""
    ordered = sorted(requests, key=lambda request: (-request.prefix, -request.scored, request.tokens))
    batches: list[list[_Request]] = []
    for request in ordered:
        if batches and len(batches[-1]) < size and batches[-1][0].prefix == request.prefix:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches
