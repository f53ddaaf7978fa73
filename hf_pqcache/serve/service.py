"""A model that is served: whether it is ready, how a job becomes choices, who is let in; knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_pqcache.models.positions import max_positions
from hf_pqcache.serve import log
from hf_pqcache.serve.engine import Engine
from hf_pqcache.serve.errors import ApiError, refused
from hf_pqcache.serve.metrics import Metrics
from hf_pqcache.serve.protocol import Job, sampling_of
from hf_pqcache.serve.run import Choice, Run
from hf_pqcache.serve.text import TextStream
from hf_pqcache.serve.vision import Vision

#: Of a completion that does not say, as OpenAI has it; a chat goes on to the end of the context.
DEFAULT_TOKENS = 16
#: What a model's generation config may say of sampling.
DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
CHECK_S = 0.25


@dataclass(frozen=True)
class Limits:
    """What one client may take from the others.

    Attributes:
        context: most tokens of a prompt and its answer; None leaves it to the model and the pool.
        queue: most choices that wait or run. body_bytes: of one request. drain_s: time that running requests get at the end.
        prefix_bytes: most of what is then saved, or handed over, of prefixes.
    """

    context: int | None = None
    queue: int = 1024
    body_bytes: int = 32 * 2**20
    drain_s: float = 30.0
    prefix_bytes: int = 2**30


class Service:
    """What the handlers of HTTP ask.

    Args:
        name: of the model, for clients. limits: of `Limits`.

    Attributes:
        engine: None until `ready`. is_draining: whether no new request is taken, as the server is about to end.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.created = int(time.time())
        self.engine: Engine | None = None
        self.tokenizer: Any = None
        self.vision: Vision | None = None
        self.is_draining = False
        self.runs: set[Run] = set()
        self.admitted = 0  # choices whose prompts are being turned into tokens
        self.metrics = Metrics(self._state, lambda: {} if self.engine is None else self.engine.facts())

    def ready(self, model: Any, tokenizer: Any, engine: Engine) -> None:
        """Take requests from now on. The engine runs, and has been warmed up."""
        self.tokenizer = tokenizer
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.ends = tuple(end for end in ends if 0 <= end < engine.vocab_size)
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self.special = {text: token for text, token in special if token < engine.vocab_size}
        self.vision = Vision(model, engine.settings)
        config = model.generation_config
        self.defaults: Mapping[str, float] = {}
        if config.do_sample:
            self.defaults = {name: value for name in DEFAULTS if (value := getattr(config, name, None)) is not None}
        bounds = (engine.capacity, max_positions(model.config), self.limits.context)
        self.context = min(bound for bound in bounds if bound is not None)
        self.engine = engine
        log.tell("ready", model=self.name, context=self.context, **engine.facts())

    def check_ready(self) -> Engine:
        """Raises ApiError 503 while the model is loaded, once the engine has died, and when the server is about to end."""
        if self.engine is None:
            raise ApiError(503, "the model is still being loaded; ask again soon", code="loading")
        if self.is_draining:
            raise ApiError(503, "the server is about to end and takes no more requests", code="draining")
        if not self.engine.is_alive():
            raise ApiError(503, self.engine.why_dead, code="engine_dead")
        return self.engine

    def check_model(self, asked: str | None) -> None:
        if asked is not None and asked != self.name:
            raise ApiError(404, f"the model {asked!r} is not served here; {self.name!r} is", "model", "model_not_found")

    async def run(self, job: Job, arrival: float, key: str | None = None) -> Run:
        """Let a job in: its choices, ready to go. Raises ApiError where it cannot be served, or not now.

        key: by which routers know how it begins.
        """
        engine = self.check_ready()
        self.check_model(job.model)
        wanted = job.choices * (1 if job.is_chat else len(job.prompts))
        if wanted > self.limits.queue:
            raise refused("n", f"{wanted} answers in one request; this server has room for {self.limits.queue} at a time")
        taken = self.admitted + sum(run.open_choices for run in self.runs)
        if taken + wanted > self.limits.queue:
            raise ApiError(
                429, f"{taken} requests wait or run, and this one is {wanted} more: over the limit of {self.limits.queue}"
            )
        self.admitted += wanted
        try:
            prompts, images = await asyncio.to_thread(self._token_ids, job)
        finally:
            self.admitted -= wanted
        each = [ids for ids in prompts for _ in range(job.choices)]
        choices = [self._choice(job, engine, ids, index) for index, ids in enumerate(each)]
        for ids in prompts:
            self.metrics.prompt_tokens.inc(len(ids))
            self.metrics.prompt_length.observe(len(ids))
        run = Run(engine, self.metrics, choices, job.is_streaming, arrival)
        run.tells_silence, run.key, run.images = job.repeats_usage, key, images
        self.runs.add(run)
        return run

    def end(self, run: Run) -> None:
        """Cancel what is left of a run and forget it."""
        run.close()
        run.images = None
        self.runs.discard(run)

    async def watch(self) -> None:
        """Tell the runs of an engine that has died. Goes on until it is cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            if self.engine is None:
                continue
            self.engine.drain()
            if not self.engine.is_alive():
                log.tell("engine_dead", running=len(self.runs))
                self.abort(ApiError(500, self.engine.why_dead, code="engine_dead"))

    def abort(self, error: ApiError) -> None:
        """End all runs with an error."""
        for run in list(self.runs):
            run.abort(error)

    def _state(self) -> dict[str, float]:
        return {} if self.engine is None else self.engine.state()

    def _token_ids(self, job: Job) -> tuple[list[list[int]], Any]:
        """Of each prompt; of a chat the template's, and what keeps its images."""
        try:
            if not job.is_chat:
                return [self._text_ids(prompt) for prompt in job.prompts], None
            if self.vision is not None and (job.has_images or self.vision.has_template):
                ids, images = self.vision.prompt(job.messages, job.template)
                return [ids], images
            return [self._chat_ids(job)], None
        except ApiError:
            raise
        except Exception as error:  # a template or a tokenizer says no, each in its own way
            told = " ".join(str(error).split())[:300]
            raise refused("messages" if job.is_chat else "prompt", f"it cannot be turned into tokens: {told}") from error

    def _text_ids(self, prompt: str | list[int]) -> list[int]:
        return prompt if isinstance(prompt, list) else list(self.tokenizer(prompt, verbose=False)["input_ids"])

    def _chat_ids(self, job: Job) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise refused("messages", "this model has no chat template; ask /v1/completions", "no_chat_template")
        options = {**job.template, "add_generation_prompt": True, "tokenize": True, "return_dict": True}
        return list(self.tokenizer.apply_chat_template(job.messages, **options)["input_ids"])

    def _choice(self, job: Job, engine: Engine, ids: list[int], index: int) -> Choice:
        """Check one prompt against the model; how it is answered."""
        name = "messages" if job.is_chat else "prompt"
        if not ids:
            raise refused(name, "the prompt has no tokens; give at least one")
        if not job.has_images and (min(ids) < 0 or max(ids) >= engine.vocab_size):  # images have ids of their own
            raise refused(name, f"token ids should be from 0 to {engine.vocab_size - 1}, got {min(ids)} to {max(ids)}")
        if any(not 0 <= one < engine.vocab_size for one in job.stop_ids):
            raise refused("stop_token_ids", f"token ids should be from 0 to {engine.vocab_size - 1}")
        room = self.context - len(ids)
        wanted = job.max_tokens if job.max_tokens is not None else room if job.is_chat else min(DEFAULT_TOKENS, room)
        if room < 1 or wanted > room:
            raise refused(
                name if room < 1 else "max_tokens",
                f"a prompt of {len(ids)} tokens and {max(1, wanted)} more do not fit into {self.context}; shorten either",
                "context_length_exceeded",
            )
        named = [self.special[stop] for stop in job.stops if stop in self.special]  # of these no text is ever seen
        ends = (*(() if job.ignores_eos else self.ends), *job.stop_ids, *named)
        text = TextStream(self.tokenizer, job.stops, job.min_tokens)
        return Choice(index, ids, wanted, sampling_of(job, self.defaults, index, ends), text)
