"""A codebook goes to the Hub and comes back whole, or not at all; no token is ever seen. Against a stand-in on loopback."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import LlamaConfig

from hf_pqcache import Codebook, PagedPQCache
from hf_pqcache.codebook import hub
from hf_pqcache.codebook.codebook import CONFIG_FILE, MAX_TENSOR_BYTES, TENSOR_FILE

REPO = "user/book"
TOKEN = "hf_ThisTokenMustNeverBeSeenAnywhere"  # the one of conftest
CUT_OFF = -1
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own


def config(**kw: Any) -> LlamaConfig:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16}
    return LlamaConfig(**{**sizes, **kw})


def book(seed: int = 0) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 16, 2, generator=generator).half() for _ in range(2))
    settings = {"page_size": 32, "extended_residual": 64}
    return Codebook(keys, values, metadata={"model": "user/model"}, settings=settings)


def files(codebook: Codebook, folder: Path) -> dict[str, bytes]:
    codebook.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def repo(fake_hub: Any, tmp_path: Path) -> Any:
    """A repository with one commit of `book(0)`."""
    return fake_hub.add(REPO, {**files(book(), tmp_path / "made"), "README.md": b"#", "large.bin": b"x" * 4096})


def cached(folder: Path) -> list[str]:
    """Names of the files that a reader of the cache can see."""
    return sorted(path.name for path in folder.rglob("snapshots/*/*"))


def test_there_and_back(fake_hub: Any, tmp_path: Path) -> None:
    address = book().push_to_hub(REPO, private=True)
    stored = fake_hub.repositories[REPO]
    assert stored.is_private
    assert address.endswith(f"/{REPO}/commit/{stored.branches['main']}")
    assert set(stored.commits[stored.branches["main"]]) == {".gitattributes", "README.md", CONFIG_FILE, TENSOR_FILE}
    again = Codebook.from_pretrained(REPO, cache_dir=tmp_path)
    assert again.fingerprint == book().fingerprint
    assert again.settings == book().settings
    assert again.metadata == {"model": "user/model", "repository": f"{REPO}@{stored.branches['main']}"}
    assert fake_hub.tokens == {f"Bearer {TOKEN}", None}  # None: a large file goes to signed storage, without the token


def test_cache_takes_the_published_settings_and_the_callers_win(repo: Any, tmp_path: Path) -> None:
    cache = PagedPQCache.from_pretrained(REPO, config(), cache_dir=tmp_path, page_size=16)
    assert (cache._settings.page_size, cache._settings.extended_residual) == (16, 64)


def test_only_what_is_needed_is_fetched(fake_hub: Any, repo: Any, tmp_path: Path) -> None:
    Codebook.from_pretrained(REPO, cache_dir=tmp_path)
    assert cached(tmp_path) == [CONFIG_FILE, TENSOR_FILE]
    assert fake_hub.count("GET /user/book/resolve") == 2
    Codebook.from_pretrained(REPO, cache_dir=tmp_path)
    assert fake_hub.count("GET /user/book/resolve") == 2  # nothing is fetched twice


def test_a_pinned_commit_stays(repo: Any, tmp_path: Path) -> None:
    first = repo.branches["main"]
    repo.commit(files(book(1), tmp_path / "other"))
    newest = Codebook.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    pinned = Codebook.from_pretrained(REPO, revision=first, cache_dir=tmp_path / "cache")
    assert newest.fingerprint == book(1).fingerprint
    assert pinned.fingerprint == book(0).fingerprint
    assert pinned.metadata["repository"] == f"{REPO}@{first}"
    repo.branches["v1"] = first
    assert Codebook.from_pretrained(REPO, revision="v1", cache_dir=tmp_path / "cache").fingerprint == pinned.fingerprint


def test_a_file_that_is_too_large_is_never_downloaded(fake_hub: Any, repo: Any, tmp_path: Path) -> None:
    repo.sizes[TENSOR_FILE] = MAX_TENSOR_BYTES + 1
    with pytest.raises(
        ValueError, match=r"codebook.safetensors has 67,108,865 bytes, expected at most.*nothing was downloaded"
    ):
        PagedPQCache.from_pretrained(REPO, config(), cache_dir=tmp_path)
    repo.sizes = {CONFIG_FILE: 2 << 20}
    with pytest.raises(ValueError, match=r"codebook.json has 2,097,152 bytes"):
        Codebook.from_pretrained(REPO, cache_dir=tmp_path)
    assert fake_hub.count("GET /user/book/resolve") == 0
    assert cached(tmp_path) == []


def test_a_size_that_was_a_lie_is_found_out(repo: Any, tmp_path: Path) -> None:
    repo.sizes[TENSOR_FILE] = 10
    with pytest.raises(ValueError, match="expected at most 100"):
        Codebook.from_pretrained(REPO, cache_dir=tmp_path, max_bytes=100)


def test_a_repository_without_a_codebook_is_named(repo: Any, tmp_path: Path) -> None:
    repo.commits[repo.branches["main"]].pop(TENSOR_FILE)
    with pytest.raises(FileNotFoundError, match=r"'user/book' holds no codebook.safetensors"):
        Codebook.from_pretrained(REPO, cache_dir=tmp_path)


@pytest.mark.parametrize(
    "request_line", ["GET /api/models/user/book", "HEAD /user/book/resolve", "GET /user/book/resolve/main/codebook.s"]
)
@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_may_pass_is_tried_again(fake_hub: Any, repo: Any, tmp_path: Path, request_line: str, status: int) -> None:
    fake_hub.fail(request_line, status, times=2)
    assert Codebook.from_pretrained(REPO, cache_dir=tmp_path).fingerprint == book().fingerprint


@pytest.mark.parametrize("status", [500, 503])
def test_a_lasting_failure_is_reported_and_leaves_no_half(fake_hub: Any, repo: Any, tmp_path: Path, status: int) -> None:
    fake_hub.fail(f"GET /user/book/resolve/main/{TENSOR_FILE}", status, times=99)
    with pytest.raises(HfHubHTTPError, match=str(status)):
        Codebook.from_pretrained(REPO, cache_dir=tmp_path)
    assert cached(tmp_path) == [CONFIG_FILE]
    fake_hub.failures.clear()
    assert Codebook.from_pretrained(REPO, cache_dir=tmp_path).fingerprint == book().fingerprint


def test_a_download_that_breaks_off_is_taken_up_again(fake_hub: Any, repo: Any, tmp_path: Path) -> None:
    fake_hub.fail(f"GET /user/book/resolve/main/{TENSOR_FILE}", CUT_OFF, times=2)
    assert Codebook.from_pretrained(REPO, cache_dir=tmp_path).fingerprint == book().fingerprint
    assert fake_hub.count(f"GET /user/book/resolve/main/{TENSOR_FILE}") == 3


def test_a_download_that_always_breaks_off_leaves_no_half(fake_hub: Any, repo: Any, tmp_path: Path) -> None:
    fake_hub.fail(f"GET /user/book/resolve/main/{TENSOR_FILE}", CUT_OFF, times=10_000)
    with pytest.raises(Exception, match=r"."):
        Codebook.from_pretrained(REPO, cache_dir=tmp_path)
    assert cached(tmp_path) == [CONFIG_FILE]
    fake_hub.failures.clear()
    assert Codebook.from_pretrained(REPO, cache_dir=tmp_path).fingerprint == book().fingerprint


def test_without_a_connection_the_cache_is_used(
    fake_hub: Any, repo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Codebook.from_pretrained(REPO, cache_dir=tmp_path).metadata["repository"]
    seen = len(fake_hub.requests)
    offline = Codebook.from_pretrained(REPO, cache_dir=tmp_path, local_files_only=True)
    assert offline.metadata["repository"] == source
    assert len(fake_hub.requests) == seen
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert Codebook.from_pretrained(REPO, cache_dir=tmp_path).metadata["repository"] == source
    with pytest.raises(FileNotFoundError):
        Codebook.from_pretrained(REPO, cache_dir=tmp_path / "empty")


def test_who_may_not_see_it_is_told_so(repo: Any, tmp_path: Path) -> None:
    repo.is_private = True
    assert Codebook.from_pretrained(REPO, cache_dir=tmp_path / "mine").fingerprint == book().fingerprint
    with pytest.raises(RepositoryNotFoundError, match="401"):
        Codebook.from_pretrained(REPO, cache_dir=tmp_path, token=False)
    with pytest.raises(RevisionNotFoundError, match="404"):
        Codebook.from_pretrained(REPO, revision="v9", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError, match="404"):
        Codebook.from_pretrained("user/nothing", cache_dir=tmp_path)
    assert cached(tmp_path) == cached(tmp_path / "mine")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (CONFIG_FILE, lambda data: b"{", "not valid JSON"),
        (CONFIG_FILE, lambda data: data.replace(b'"schema_version": 2', b'"schema_version": 1'), "caches need no codebook"),
        (CONFIG_FILE, lambda data: data.replace(b'"page_size": 32', b'"page_size": 33'), "page_size=33"),
        (CONFIG_FILE, lambda data: data.replace(b'"page_size": 32', b'"page_size": "a"'), "must be an integer"),
        (CONFIG_FILE, lambda data: data.replace(b'"page_size"', b'"num_bits"'), r"settings must not repeat \['num_bits'\]"),
        (CONFIG_FILE, lambda data: data.replace(b'"page_size"', b'"trust_remote_code"'), "unknown cache settings"),
        (TENSOR_FILE, lambda data: data[:-2], "damaged or cut short"),
        (TENSOR_FILE, lambda data: data[:-2] + b"\x00\x00", "not the file that codebook.json describes"),
    ],
)
def test_a_damaged_repository_is_refused(repo: Any, tmp_path: Path, name: str, change: Any, message: str) -> None:
    repo.commit({name: change(repo.commits[repo.branches["main"]][name])})
    with pytest.raises(ValueError, match=message):
        Codebook.from_pretrained(REPO, cache_dir=tmp_path)


@pytest.mark.parametrize("step", ["/api/repos/create", f"/api/models/{REPO}/preupload", f"/api/models/{REPO}/commit"])
def test_an_upload_is_tried_again_and_lands_once(fake_hub: Any, step: str) -> None:
    fake_hub.fail(f"POST {step}", 503, times=2)
    book().push_to_hub(REPO)
    assert len(fake_hub.repositories[REPO].commits) == 2  # the empty first one, and ours


def test_an_upload_that_is_refused_is_reported(fake_hub: Any) -> None:
    fake_hub.fail("POST /api/repos/create", 403, times=99)
    with pytest.raises(HfHubHTTPError, match="403"):
        book().push_to_hub(REPO)
    assert fake_hub.count("POST /api/repos/create") == 1


def test_upload_to_a_branch_leaves_main_alone(fake_hub: Any) -> None:
    book().push_to_hub(REPO)
    main = fake_hub.repositories[REPO].branches["main"]
    book(1).push_to_hub(REPO, revision="v2")
    assert fake_hub.repositories[REPO].branches["main"] == main
    assert fake_hub.repositories[REPO].branches["v2"] != main


def test_no_token_is_seen_in_logs_or_errors(
    fake_hub: Any, repo: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    errors = []
    fake_hub.fail(f"GET /user/book/resolve/main/{TENSOR_FILE}", 500, times=99)
    for call in (
        lambda: Codebook.from_pretrained(REPO, cache_dir=tmp_path),
        lambda: Codebook.from_pretrained(REPO, cache_dir=tmp_path, token=TOKEN, revision="v9"),
        lambda: Codebook.from_pretrained("user/nothing", cache_dir=tmp_path, token=TOKEN),
    ):
        with pytest.raises(Exception, match=r".") as caught:
            call()
        chain: BaseException | None = caught.value
        while chain is not None:
            errors += [str(chain), repr(chain)]
            chain = chain.__cause__ or chain.__context__
    book().push_to_hub("user/other", token=TOKEN)
    captured = capfd.readouterr()
    told = "\n".join([*errors, caplog.text, captured.out, captured.err])
    assert len(told) > 200
    assert TOKEN not in told
    assert all(TOKEN.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_card_says_what_the_hub_reads() -> None:
    evaluation = {
        "task_type": "text-generation",
        "dataset_type": "Salesforce/wikitext",
        "dataset_name": "wikitext-2-raw-v1",
        "metric_type": "perplexity",
        "metric_value": 5.2,
    }
    text = hub.model_card(
        "user/book",
        {"model": "meta/llama", "evil | name": "a\nb"},
        license="mit",
        datasets=["Salesforce/wikitext"],
        evaluations=[evaluation],
        has_recipe=True,
    )
    card = ModelCard(text)
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("meta/llama", "mit", "hf-pqcache")
    assert card.data.datasets == ["Salesforce/wikitext"]
    assert "custom_generate" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("perplexity", 5.2, "Salesforce/wikitext")
    assert r"| evil \| name | a b |" in text
    assert 'PagedPQCache.from_pretrained("user/book", model)' in text
    local = ModelCard(hub.model_card("user/book", {"model": "/home/me/model"}))
    assert local.data.base_model is None
    assert "/home/me" not in local.content
    assert json.loads(json.dumps(local.data.to_dict())) == {
        "library_name": "hf-pqcache",
        "tags": ["kv-cache", "product-quantization"],
    }


@pytest.mark.parametrize("name", ["a/b\nlicense: mit", "a/b\n# Heading", "../b", "~/b", "a/b/c", "<b>/x", "a/", 7, None])
def test_card_names_no_model_that_is_none(name: Any) -> None:
    """Metadata comes from whoever made the file: what is no repository id stays out of the front matter and the title."""
    card = hub.model_card("user/codebook", {"model": name})
    assert "base_model" not in card
    assert "# Product-quantization codebook for the KV cache\n" in card
    assert str(name) not in card.replace("user/codebook", "")
