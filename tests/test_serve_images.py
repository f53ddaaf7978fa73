"""Chats with images over HTTP: what `generate` says to them, no end of new ones, and what is no image refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_llava
import transformers

from hf_pqcache import PagedPQCache
from hf_pqcache.models.names import cache_kwargs

image = pytest.importorskip("PIL.Image")
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20):
    pytest.skip("continuous batching needs transformers 5.20", allow_module_level=True)

from served import Served, eventually, is_idle, served  # noqa: E402

from hf_pqcache.eval.session.models import load_model  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for p in m.content %}"
    "{{ '<image> ' if p.type == 'image' else p.text + ' ' }}{% endfor %}{% endfor %}w7"
)
WORDS = " ".join(f"w{i}" for i in range(5, 45))
ROOM = 3 * tiny_llava.FEATURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    found: Path = tmp_path_factory.mktemp("llava")
    tiny_llava.model().save_pretrained(found)
    processor = tiny_llava.processor()
    processor.chat_template = TEMPLATE
    processor.save_pretrained(found)
    return found


def load(folder: Path) -> tuple[Any, Any]:
    return load_model(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(load=lambda: load(folder), image_tokens=ROOM) as found:
        yield found


def picture(shade: int) -> Any:
    made = image.new("RGB", (80, 60), (shade, 255 - shade, 90))
    made.paste((20, shade, 200), (10, 10, 10 + shade % 60, 50))
    return made


def url(shade: int, kind: str = "PNG") -> str:
    file = io.BytesIO()
    picture(shade).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(*shades: int, text: str = WORDS) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url(shade)}} for shade in shades]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def expected(folder: Path, *shades: int, text: str = WORDS) -> str:
    """Of `generate` over the cache of the same kind."""
    model, _ = load(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture(shade)} for shade in shades]
    told = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    made = processor.apply_chat_template(told, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    cache = PagedPQCache(model.config, bits=4, page_size=16)
    out = model.generate(**made, **cache_kwargs(cache), max_new_tokens=24, do_sample=False)
    return str(processor.tokenizer.decode(out[0, made["input_ids"].shape[1] :], skip_special_tokens=True))


def ask(server: Served, messages: list[dict[str, Any]], **more: Any) -> Any:
    return server.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 24, "temperature": 0, **more})


def said(server: Served, messages: list[dict[str, Any]], **more: Any) -> str:
    answer = ask(server, messages, **more)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_what_generate_says(server: Served, folder: Path) -> None:
    asked = [(10,), (200,), (10, 120), ()]
    with ThreadPoolExecutor() as pool:  # together: they share steps
        found = list(pool.map(lambda shades: said(server, chat(*shades)), asked))
    assert found == [expected(folder, *shades) for shades in asked]
    assert len(set(found)) == 4
    as_text = [{"role": "user", "content": WORDS}]
    assert said(server, as_text) == found[3]
    assert said(server, chat(10), repetition_penalty=1.3, seed=1) != found[0]


def test_new_images_without_end(server: Served, folder: Path) -> None:
    """There is room for three at a time."""
    shown = [said(server, chat(shade)) for shade in range(0, 250, 25)]
    assert shown[1] == expected(folder, 25)
    assert shown == [said(server, chat(shade)) for shade in range(0, 250, 25)]
    assert eventually(lambda: is_idle(server) and server.metric("pqcache_image_tokens_held ") == 0)
    assert server.metric("pqcache_image_tokens ") == server.metric("pqcache_image_tokens_room ") == ROOM


def test_more_at_a_time_than_there_is_room_for(server: Served) -> None:
    """Some are told to come again; who is let in is answered rightly."""
    alone = {shade: said(server, chat(shade)) for shade in range(0, 240, 30)}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda shade: (shade, ask(server, chat(shade), max_tokens=24)), alone))
    for shade, answer in answers:
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "images_exhausted"
        else:
            assert answer.json()["choices"][0]["message"]["content"] == alone[shade]
    assert any(answer.status_code == 200 for _, answer in answers)
    assert ask(server, chat(1, 2, 3, 4)).json()["error"]["message"] == (
        "the images are 64 tokens, and this server takes 48 at a time; show fewer"
    )


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("https://example.org/a.png", "got https:; this server fetches nothing"),
        ("file:///etc/passwd", "got file:; this server fetches nothing"),
        ("data:text/html;base64,AAAA", "got data:; this server fetches nothing"),
        ("data:image/png;base64,%%%", "is no base64"),
        ("data:image/png;base64,AAAA", "is no image of PNG, JPEG"),
        ("/etc/passwd", "got no scheme; this server fetches nothing"),
        (3, "image_url should be an object with a url"),
    ],
)
def test_what_is_no_image(server: Served, part: Any, told: str) -> None:
    answer = ask(server, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": part}}]}])
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"].startswith("messages[0].content")


def test_an_image_that_unpacks_to_too_much(server: Served) -> None:
    file = io.BytesIO()
    image.new("1", (16000, 5000)).save(file, "PNG")
    data = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    answer = ask(server, [{"role": "user", "content": [{"type": "image_url", "image_url": data}]}])
    assert answer.status_code == 400
    assert "80,000,000 pixels" in answer.json()["error"]["message"]


def test_ids_of_images_are_not_for_everybody(server: Served) -> None:
    answer = server.completions(prompt=[1, 2, 130], max_tokens=2)
    assert answer.status_code == 400
    assert "from 0 to 127" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("settings", "why"), [({"image_tokens": 0}, "turned off"), ({"variant": "stock"}, "turned off")])
def test_a_server_without_images(folder: Path, settings: dict[str, Any], why: str) -> None:
    with served(load=lambda: load(folder), **settings) as server:
        answer = ask(server, chat(10))
        assert answer.status_code == 400
        assert why in answer.json()["error"]["message"]
        assert said(server, chat())


def test_a_model_without_images() -> None:
    with served() as server:
        answer = ask(server, chat(10))
        assert answer.json()["error"] | {"message": ""} == {
            "message": "", "type": "invalid_request_error", "param": "messages", "code": "images_not_supported",
        }  # fmt: skip
        assert "this model takes no images" in answer.json()["error"]["message"]
