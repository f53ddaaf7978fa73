"""The JSON of answers and of the chunks of a stream, as OpenAI's API has it; knows no engine."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from hf_pqcache.serve.protocol import Job
from hf_pqcache.serve.run import Event, Run

DONE = b"data: [DONE]\n\n"


class Answers:
    """Writes what comes of one job.

    Args:
        model: the name that clients know the model by.
    """

    def __init__(self, job: Job, model: str, run: Run) -> None:
        self.job, self.run, self.model = job, run, model
        self.begun: set[int] = set()
        kind = "chat.completion" if job.is_chat else "text_completion"
        self.kind = kind + (".chunk" if job.is_chat and job.is_streaming else "")
        self.id = f"{'chatcmpl' if job.is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def usage(self) -> dict[str, int]:
        """Prompts count once, whatever the number of choices."""
        prompt = sum(len(choice.ids) for choice in self.run.choices[:: self.job.choices])
        return {"prompt_tokens": prompt, "completion_tokens": self.run.tokens, "total_tokens": prompt + self.run.tokens}

    def whole(self, texts: dict[int, str], finishes: dict[int, str | None]) -> dict[str, Any]:
        """All choices, by index."""
        choices = []
        for index in sorted(texts):
            content: dict[str, Any] = {"text": texts[index]}
            if self.job.is_chat:
                content = {"message": {"role": "assistant", "content": texts[index], "refusal": None}}
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": finishes[index]})
        return {**self._frame(choices), "usage": self.usage()}

    def chunks(self, event: Event) -> bytes:
        """Server-sent events for one event. A chat's choice begins with its role and ends with an empty delta."""
        if not self.job.is_chat:
            return self._chunk({"index": event.choice, "text": event.text, "logprobs": None, "finish_reason": event.finish})
        deltas: list[tuple[dict[str, str], str | None]] = []
        if event.choice not in self.begun:
            self.begun.add(event.choice)
            deltas.append(({"role": "assistant", "content": ""}, None))
        if event.text:
            deltas.append(({"content": event.text}, None))
        if event.finish is not None:
            deltas.append(({}, event.finish))
        return b"".join(
            self._chunk({"index": event.choice, "delta": delta, "logprobs": None, "finish_reason": finish})
            for delta, finish in deltas
        )

    def usage_chunk(self) -> bytes:
        """The last one before DONE, without choices."""
        return sse({**self._frame([]), "usage": self.usage()})

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        told: dict[str, Any] = {}
        if self.job.includes_usage:
            told = {"usage": self.usage() if self.job.repeats_usage else None}
        return sse({**self._frame([choice]), **told})

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": self.kind, "created": self.created, "model": self.model, "choices": choices}


def sse(document: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"
