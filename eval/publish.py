"""A codebook and its results -> the files of a Hub repository; knows what is in it, not how it gets there."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from hf_pqcache import __version__
from hf_pqcache.codebook import hub
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import OPERATING_POINTS, PQConfig, Side
from hf_pqcache.eval import tasks
from hf_pqcache.eval.report import naming, summary
from hf_pqcache.eval.report.html import conditions, items, read_rows
from hf_pqcache.eval.session.model_config import ModelConfig
from hf_pqcache.eval.session.results import Results, Row

RECIPE = '''"""generate() with the KV cache compressed by this repository's codebook. Needs: pip install hf-pqcache

    model.generate(**inputs, custom_generate="{repo_id}", trust_remote_code=True)
"""

import inspect
from functools import lru_cache

from transformers import GenerationMixin

from hf_pqcache import Codebook, PagedPQCache, PQConfig

REPOSITORY = "{repo_id}"
NAMES = ("cache", "past_key_values")  # of the argument: since transformers 5.24, and before


@lru_cache(maxsize=4)
def load(codebook, revision):
    return Codebook.from_pretrained(codebook, revision=revision)


def generate(model, codebook=REPOSITORY, revision=None, cache_options=None, **kwargs):
    """As model.generate, with a compressed cache unless `cache` (before transformers 5.24: `past_key_values`) brings one.

    codebook: folder or Hub repository. revision: its commit, branch or tag (and that of this file).
    cache_options: settings of hf_pqcache.PQConfig that win over the published ones, e.g. {{"max_pages": 4000}}.
    """
    given = [kwargs.pop(name, None) for name in NAMES]
    cache = next((cache for cache in given if cache is not None), None)
    if cache is None:
        book = load(codebook, revision)
        cache = PagedPQCache(model.config, book, PQConfig(**book.settings), **(cache_options or {{}}))
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    kwargs[next((name for name in NAMES if name in known), NAMES[0])] = cache
    return model.generate(**kwargs)
'''


def publish(
    folder: str | Path,
    repo_id: str,
    results: Iterable[str | Path] = (),
    *,
    license: str,
    settings: dict[str, Any] | None = None,
    dry_run: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> tuple[str, list[str]]:
    """Publish the codebook in `folder` with everything that belongs to it, in one commit -> (where it is, its files).

    Args:
        repo_id: user/name.
        results: JSONL files; their rows of the codebook's model are published, and must hold some of this codebook.
        license: identifier of the Hub's list.
        settings: settings of PQConfig to recommend (page_size, ...); None leaves those of the codebook.
        dry_run: write the files into this folder, and ask the Hub nothing.
        private, revision, create_pr: of the repository, see `hub.upload`.

    Raises:
        ValueError, FileNotFoundError: a broken codebook or results file, no repository id, rows of other codebooks, or a
            codebook that no cache takes.
        What huggingface_hub raises: no access, no connection.
    """
    hub.check_repo_id(repo_id)
    codebook = Codebook.from_pretrained(Path(folder))
    if not codebook.is_normalised:
        raise ValueError(
            f"{folder} holds MILLION's codebook, for comparison: no cache takes it; publish one of `pqcache calibrate`"
        )
    if settings is not None:
        codebook = replace(codebook, settings=settings)
    paths = list(results)
    rows = _rows_of(codebook, read_rows(paths)) if paths else []
    if dry_run is not None:
        return str(dry_run), write_repository(codebook, repo_id, rows, dry_run, license=license)
    with tempfile.TemporaryDirectory() as temporary:
        files = write_repository(codebook, repo_id, rows, temporary, license=license)
        options: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr}
        return hub.upload(temporary, repo_id, **options), files


def worth(folder: str | Path) -> str:
    """What speaks against publishing the codebook in `folder`, by what its calibration measured; "" if nothing does."""
    facts = Codebook.from_pretrained(Path(folder)).metadata
    own, shipped = facts.get("held_out_loss"), facts.get("held_out_loss_shipped")
    if not isinstance(own, float) or not isinstance(shipped, float) or own < shipped:
        return ""
    return f"it loses {own:+.2%} on held-out text, the codebook that every cache has {shipped:+.2%}: nobody needs it"


def write_repository(codebook: Codebook, repo_id: str, rows: Sequence[Row], folder: str | Path, *, license: str) -> list[str]:
    """Write all files of the repository into `folder` -> their names.

    codebook.json and codebook.safetensors, README.md (the model card), model_config.yaml (for `pqcache run -f`),
    custom_generate/ (the recipe), and with rows results.jsonl and plots/.
    """
    root = Path(folder)
    codebook.save_pretrained(root)
    model_config(codebook, repo_id).save(root / "model_config.yaml", f"For: pqcache run -f model_config.yaml, with {repo_id}.")
    (root / "custom_generate").mkdir(exist_ok=True)
    (root / "custom_generate" / "generate.py").write_text(RECIPE.format(repo_id=repo_id), encoding="utf-8")
    (root / "custom_generate" / "requirements.txt").write_text(f"hf-pqcache>={__version__}\n", encoding="utf-8")
    plots = _write_results(rows, root)
    card = hub.model_card(
        repo_id,
        facts(codebook),
        license=license,
        datasets=_calibration_datasets(codebook),
        evaluations=evaluations(codebook, rows),
        body=_body(codebook, rows, plots),
        has_recipe=True,
    )
    (root / "README.md").write_text(card, encoding="utf-8")
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def facts(codebook: Codebook) -> dict[str, Any]:
    """What the card's first table says."""
    own = {
        **{f"{which}s": _codes_text(codebook, which) for which in get_args(Side)},
        "bytes": f"{codebook.nbytes:,}",
        "fingerprint": codebook.fingerprint[:16],
        "recommended": naming.settings_text(codebook.settings) or "the defaults",
    }
    return {**codebook.metadata, **own}


def _codes_text(codebook: Codebook, which: Side) -> str:
    _, centroids, width = codebook.side(which).shape
    bits = centroids.bit_length() - 1
    return f"a code of {bits} bits for {width} numbers, {bits / width:g} bits a number without scales"


def model_config(codebook: Codebook, repo_id: str) -> ModelConfig:
    """A model config that uses the published codebook, which decides the codes; only what it knows itself, no local path."""
    known = {
        "calibration_tokens": "tokens",
        "calibration_seed": "seed",
        "window_tokens": "window",
        "calibration_text": "source",
    }
    made = {key: codebook.metadata[name] for key, name in known.items() if name in codebook.metadata}
    key, value = ((x.shape[2], x.shape[1].bit_length() - 1) for x in (codebook.keys, codebook.values))
    points = {sides: bits for bits, sides in OPERATING_POINTS.items()}
    return ModelConfig(
        model=str(codebook.metadata.get("model") or "unknown"),
        bits=points.get((key, value), PQConfig.bits),
        codebook=repo_id,
        **codebook.settings,
        **made,
    )


def evaluations(codebook: Codebook, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Arguments of huggingface_hub's EvalResult for the qualities measured with this codebook.

    Only rows with the recommended settings count where there are such; others are told apart by name. Figures that
    differ in nothing but depth and length (recall) are averaged. Times and bytes are no evaluation.
    """
    own = [row for row in rows if row.codebook == codebook.fingerprint and math.isfinite(row.value)]
    own = [row for row in own if row.metric in ("perplexity", "recall") or naming.is_score(row)]
    own = [row for row in own if codebook.settings.items() <= row.cache_config.items()] or own
    names = naming.labels(own)
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    hidden = {"depth", *naming.LENGTH_KEYS, "text_sha256"}
    for row in own:
        told = [naming.settings_text({key: value for key, value in row.settings.items() if key not in hidden})]
        told += [names[row.key]] if len(set(names.values())) > 1 else []
        groups[row.task, row.metric, ", ".join(filter(None, told))].append(row.value)
    return [
        {
            **_dataset(task),
            "task_type": "text-generation",
            "metric_type": metric,
            "metric_name": f"{metric} ({told})" if told else metric,
            "metric_value": round(math.fsum(values) / len(values), 6),
        }
        for (task, metric, told), values in groups.items()
    ]


def _rows_of(codebook: Codebook, rows: Sequence[Row]) -> list[Row]:
    """The rows of the codebook's model. Raises ValueError if none of them was measured with this codebook."""
    if not any(row.codebook == codebook.fingerprint for row in rows):
        raise ValueError(
            f"no row of the results was measured with this codebook (fingerprint {codebook.fingerprint[:16]}): run "
            "`pqcache eval ... --codebook FOLDER --results FILE` with it first, or publish without results"
        )
    models = {(row.model, row.model_fingerprint) for row in rows if row.codebook == codebook.fingerprint}
    return [row for row in rows if (row.model, row.model_fingerprint) in models]


def _write_results(rows: Sequence[Row], root: Path) -> list[tuple[str, str]]:
    """Write results.jsonl and plots/ -> (title, file) of each plot. Nothing without rows."""
    if not rows:
        return []
    from hf_pqcache.eval.report.plots import save_png

    (root / "plots").mkdir(exist_ok=True)
    (root / "results.jsonl").unlink(missing_ok=True)
    kept = Results(root / "results.jsonl")
    for row in rows:
        kept.add(row)
    found = []
    for item in items(rows):
        save_png(item, root / "plots" / f"{item.name}.png")
        found.append((item.title, f"plots/{item.name}.png"))
    return found


def _body(codebook: Codebook, rows: Sequence[Row], plots: Sequence[tuple[str, str]]) -> str:
    """Results, plots and conditions as Markdown; "" without rows."""
    if not rows:
        return ""
    rows = naming.told_apart(rows)
    names = naming.labels(rows)
    own = {names[row.key] for row in rows if row.codebook == codebook.fingerprint}
    lines = ["## Results", "", f"This codebook: **{', '.join(sorted(own))}**. Every figure is in `results.jsonl`.", ""]
    for model in naming.models(rows):
        table = summary.summary_table(rows, model)
        lines += ["| " + " | ".join(table.columns) + " |", "|---" + "|--:" * (len(table.columns) - 1) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in table.texts()]
        lines.append("")
    for title, file in plots:
        lines += [f"![{title}]({file})", ""]
    lines += ["## Conditions", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in conditions(rows)]
    return "\n".join(lines)


def _dataset(task: str) -> dict[str, Any]:
    """dataset_type and its like for the data set that a task reads: a Hub id where it is one, else the task's name."""
    name, _, part = task.partition("/")
    known = tasks.registry().get(task) or tasks.registry().get(name)
    if path := getattr(known, "path", None):
        split = part if part in ("train", "validation", "test") else None
        config = getattr(known, "config", None) or (part if split is None and part else None)
        return {"dataset_type": path, "dataset_name": name, "dataset_config": config, "dataset_split": split}
    return {"dataset_type": name, "dataset_name": task}


def _calibration_datasets(codebook: Codebook) -> list[str]:
    """Hub ids of the text that the codebook was learnt from; none for a file."""
    known = tasks.registry().get(str(codebook.metadata.get("source", "")).partition("/")[0])
    path = getattr(known, "path", None)
    return [path] if path else []
