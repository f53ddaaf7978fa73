"""Examples of the task pqcache_articles: which words go on, after a long stretch of an embedded article."""

from typing import Any

from hf_pqcache import demo

#: Words of a context, of a choice, and from one context to the next.
CONTEXT, CHOICE, STEP = 250, 3, 90


def articles(**_: Any) -> dict[str, Any]:
    """{"test": data set of text, choices (the right one first) and gold}, from the articles kept for evaluation."""
    from datasets import Dataset

    from hf_pqcache.demo import split_text

    words = split_text(demo.TEXT.read_text(encoding="utf-8"))[1].split()
    examples = []
    for end in range(CONTEXT, len(words) - 4 * STEP, STEP):
        starts = (end, *(end + turn * STEP + CHOICE for turn in (1, 2, 3)))
        choices = [" " + " ".join(words[start : start + CHOICE]) for start in starts]
        examples.append({"text": " ".join(words[end - CONTEXT : end]), "choices": choices, "gold": 0})
    return {"test": Dataset.from_list(examples)}
