"""What clients may ask, as OpenAI's API and its usual extensions have it: a body becomes a `Job`; knows no model."""

from __future__ import annotations

import json
import reprlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_pqcache.serve.errors import ApiError, refused
from hf_pqcache.serve.sampling import Sampling

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS = 128, 1024, 16
#: What we do not do, and the values that ask for nothing.
UNDONE: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}


@dataclass(frozen=True)
class Job:
    """A request that is in order, as far as one can say without the model.

    Attributes:
        prompts: texts or lists of token ids; of a chat, none. messages: of a chat, contents as texts; one with images as parts,
            {"type": "text", "text"} or {"type": "image", "url", "field"}. has_images: whether one of them is such.
        template: more arguments of the chat template. choices: answers to each prompt.
        max_tokens: None leaves it to the server. sampling: what was given of `Sampling`'s fields.
    """

    is_chat: bool
    prompts: list[str | list[int]]
    messages: list[dict[str, Any]]
    template: dict[str, Any]
    model: str | None
    choices: int
    max_tokens: int | None
    min_tokens: int
    stops: tuple[str, ...]
    stop_ids: tuple[int, ...]
    ignores_eos: bool
    seed: int
    sampling: dict[str, float]
    is_streaming: bool
    includes_usage: bool
    repeats_usage: bool

    @property
    def has_images(self) -> bool:
        return any(isinstance(message["content"], list) for message in self.messages)


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {' '.join(str(error).split())}") from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body should be a JSON object, got {_kind(body)}")
    return {name: value for name, value in body.items() if value is not None}


def job_of(body: Mapping[str, Any], is_chat: bool) -> Job:
    """Check each field. Raises ApiError with the field that is at fault."""
    for name, idle in UNDONE.items():
        if name in body and not any(body[name] == one and type(body[name]) is type(one) for one in idle):
            raise refused(name, f"{name} is not supported by this server; leave it out", "unsupported_parameter")
    choices = _whole(body, "n", 1, 1, MOST_CHOICES)
    if _whole(body, "best_of", choices, 1, MOST_CHOICES) != choices:
        raise refused("best_of", "best_of is not supported by this server other than as n", "unsupported_parameter")
    max_tokens = _whole(body, "max_tokens", None, 1, 2**31 - 1)
    max_tokens = _whole(body, "max_completion_tokens", max_tokens, 1, 2**31 - 1)
    min_tokens = _whole(body, "min_tokens", 0, 0, 2**31 - 1)
    if max_tokens is not None and min_tokens > max_tokens:
        raise refused("min_tokens", f"min_tokens is {min_tokens}, more than the {max_tokens} tokens at most")
    stream = _of_kind(body, "stream", bool, False)
    options = _of_kind(body, "stream_options", dict, {})
    if options and not stream:
        raise refused("stream_options", "stream_options is for stream=true only")
    model = body.get("model")
    if not isinstance(model, str | None):
        raise refused("model", f"model should be a string, got {_kind(model)}")
    return Job(
        is_chat,
        prompts=[] if is_chat else _prompts(body),
        messages=_messages(body) if is_chat else [],
        template=_template(body),
        model=model,
        choices=choices,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stops=_stops(body),
        stop_ids=_ids(body, "stop_token_ids", body.get("stop_token_ids", [])),
        ignores_eos=_of_kind(body, "ignore_eos", bool, False),
        seed=_whole(body, "seed", secrets.randbits(63), -(2**63), 2**64 - 1) % 2**64,
        sampling=_sampling(body),
        is_streaming=stream,
        includes_usage=_of_kind(options, "include_usage", bool, False),
        repeats_usage=_of_kind(options, "continuous_usage_stats", bool, False),
    )


def sampling_of(job: Job, defaults: Mapping[str, float], choice: int, ends: tuple[int, ...]) -> Sampling:
    """Of one of the choices: each draws by a seed of its own."""
    given = {**defaults, **job.sampling, "seed": job.seed + choice, "min_tokens": job.min_tokens, "ends": ends}
    return Sampling(**given)  # type: ignore[arg-type]


def _sampling(body: Mapping[str, Any]) -> dict[str, float]:
    limits = {"temperature": (0, 2), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 10)}
    limits |= {"presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
    found = {name: _number(body, name, *ends) for name, ends in limits.items() if name in body}
    if "top_k" in body:
        found["top_k"] = max(0, _whole(body, "top_k", 0, -1, 2**31 - 1))
    return found


def _prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """A text, a list of ids, or a list of either kind."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise refused("prompt", f"prompt should be a text, token ids, or a list of these, got {_kind(prompt)}")
    if all(isinstance(one, str) for one in prompt):
        found: list[Any] = prompt
    elif all(isinstance(one, list) for one in prompt):
        found = [list(_ids(body, "prompt", one)) for one in prompt]
    else:
        found = [list(_ids(body, "prompt", prompt))]
    if len(found) > MOST_PROMPTS:
        raise refused("prompt", f"{len(found)} prompts in one request; give {MOST_PROMPTS} at most")
    return found


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Messages whose contents are texts, of several parts joined; or, where there are images, lists of parts."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise refused("messages", f"messages should be a list that is not empty, got {_kind(messages)}")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise refused(f"messages[{i}]", f"messages[{i}] should be an object with a role, got {_kind(message)}")
        content = message.get("content")
        if isinstance(content, list):
            parts = [_part(part, f"messages[{i}].content") for part in content]
            is_text = all(part["type"] == "text" for part in parts)
            content = "".join(part["text"] for part in parts) if is_text else parts
        if not isinstance(content, str | list):
            raise refused(f"messages[{i}].content", f"messages[{i}].content should be a text, got {_kind(content)}")
        found.append({**message, "content": content})
    return found


def _template(body: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for the model's own template: a template of the client's would run here."""
    given: dict[str, Any] = _of_kind(body, "chat_template_kwargs", dict, {})
    if "chat_template" in given or "chat_template" in body:
        raise refused("chat_template", "the model's own chat template is the only one here", "unsupported_parameter")
    return given


def _part(part: Any, name: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        given = part.get("image_url")
        url = given.get("url") if isinstance(given, dict) else given
        if not isinstance(url, str):
            raise refused(name, f"{name}: image_url should be an object with a url, got {_kind(given)}")
        return {"type": "image", "url": url, "field": f"{name}.image_url"}
    raise refused(name, f"{name}: only parts of type text and image_url are supported, got {kind}")


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stops = body.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops) or len(stops) > MOST_STOPS:
        raise refused("stop", f"stop should be a text, or {MOST_STOPS} at most, none empty, got {_kind(stops)}")
    return tuple(stops)


def _ids(body: Mapping[str, Any], name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise refused(name, f"{name} should be {'a text or ' if name == 'prompt' else ''}whole numbers, got {_kind(value)}")
    return tuple(value)


def _of_kind(body: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name, default)
    if not isinstance(value, kind):
        raise refused(name, f"{name} should be {_KINDS[kind]}, got {_kind(value)}")
    return value


def _number(body: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = body[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise refused(name, f"{name} should be a number from {low:g} to {high:g}, got {_kind(value)}")
    return float(value)


def _whole(body: Mapping[str, Any], name: str, default: Any, low: int, high: int) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise refused(name, f"{name} should be a whole number from {low} to {high}, got {_kind(value)}")
    return value


_KINDS = {bool: "true or false", dict: "an object"}


def _kind(value: Any) -> str:
    """A value as a message shows it, whatever its size."""
    return "nothing" if value is None else reprlib.repr(value)
