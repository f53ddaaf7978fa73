"""LongBench's metrics (Bai et al. 2023, table 1), one prediction at a time; knows no model, no task file and no result row.

Written from their definitions and checked against the 84 published scores. Two choices of the official runs matter and
are made here on purpose: code similarity is difflib's ratio (an installed python-Levenshtein gives 1.4 to 3.2 points
more), and ROUGE-L is the summary-level one over sets of words, with "." as the only end of a sentence.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

import numpy as np

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
#: What the official metric takes for Chinese punctuation; 《, 〈 and 〉 are not among them.
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､"  # fullwidth and halfwidth
    "、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
#: Tasks whose answer ends with the first line.
ONE_LINE_TASKS = ("trec", "triviaqa", "samsum", "lsht")


def _f1(prediction: Sequence[str], truth: Sequence[str]) -> float:
    """F1 of two bags of tokens."""
    common = sum((Counter(prediction) & Counter(truth)).values())
    return 2 * common / (len(prediction) + len(truth)) if common else 0.0


def qa_f1(prediction: str, truth: str) -> float:
    """F1 over words, lower case, without punctuation and articles (as SQuAD's, Rajpurkar et al. 2016)."""

    def words(text: str) -> list[str]:
        return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()

    return _f1(words(prediction), words(truth))


@cache
def _jieba() -> Any:
    try:
        import jieba
    except ImportError as error:
        raise ImportError("LongBench's Chinese tasks need jieba; type: pip install jieba") from error
    jieba.setLogLevel("WARNING")
    return jieba


def qa_f1_zh(prediction: str, truth: str) -> float:
    """F1 over the words that jieba finds, without punctuation."""

    def words(text: str) -> list[str]:
        cut = ("".join(word.lower().translate(_NO_CHINESE_PUNCTUATION).split()) for word in _jieba().cut(text))
        return [word for word in cut if word]

    return _f1(words(prediction), words(truth))


def rouge(prediction: str, truth: str) -> float:
    """F of summary-level ROUGE-L (Lin 2004, section 3.2) over distinct words; 0 where a text has no sentence."""
    sentences = [[part.split() or [""] for part in text.split(".") if part] for text in (prediction, truth)]
    if not all(sentences):
        return 0.0
    found: set[str] = set()
    for own in sentences[1]:
        for common in _common_subsequences(own, sentences[0]):
            found.update(common)
    precision, recall = (len(found) / len({word for part in side for word in part}) for side in sentences)
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_zh(prediction: str, truth: str) -> float:
    """`rouge` over the words that jieba finds."""
    cut = _jieba().cut
    return rouge(" ".join(cut(prediction)), " ".join(cut(truth)))


def _common_subsequences(x: Sequence[str], others: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Words of one longest common subsequence of x and each of `others`, the later words of the other dropped first.

    One table serves all pairs: the others are padded with a word that nothing equals.
    """
    numbers = {word: i for i, word in enumerate(dict.fromkeys(x))}
    width = max(map(len, others))
    ids = np.array([[numbers.get(word, -1) for word in y] + [-1] * (width - len(y)) for y in others])
    tables = np.zeros((len(others), len(x) + 1, width + 1), dtype=np.int32)
    for i, word in enumerate(x):
        above = tables[:, i]
        best = np.maximum(above[:, 1:], (above[:, :-1] + 1) * (ids == numbers[word]))
        np.maximum.accumulate(best, axis=1, out=tables[:, i + 1, 1:])
    for y, table in zip(others, tables.tolist(), strict=True):
        i, j = len(x), len(y)
        words = []
        while i and j:
            if x[i - 1] == y[j - 1]:
                words.append(x[i - 1])
                i, j = i - 1, j - 1
            elif table[i - 1][j] > table[i][j - 1]:
                i -= 1
            else:
                j -= 1
        yield words


def classification(prediction: str, truth: str, all_classes: Sequence[str]) -> float:
    """1 / (number of classes that the prediction names) if the right one is among them; parts of its name do not count."""
    named = [name for name in all_classes if name in prediction]
    named = [name for name in named if name == truth or name not in truth]
    return 1 / len(named) if truth in named else 0.0


def _share(prediction: str, number: str) -> float:
    """Share of the numbers in the prediction that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def count(prediction: str, truth: str) -> float:
    """Share of the numbers in the prediction that are the right count."""
    return _share(prediction, str(truth))


def retrieval(prediction: str, truth: str) -> float:
    """Share of the numbers in the prediction that are the right "Paragraph N"."""
    return _share(prediction, re.findall(r"Paragraph (\d+)", truth)[0])


def retrieval_zh(prediction: str, truth: str) -> float:
    """Share of the numbers in the prediction that are the right "段落N"."""
    return _share(prediction, re.findall(r"段落(\d+)", truth)[0])


def code_sim(prediction: str, truth: str) -> float:
    """difflib's ratio, in whole percents, of the truth and the prediction's first line without a comment or a backtick."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not truth:
        return 0.0
    return round(100 * SequenceMatcher(None, line, truth).ratio()) / 100


#: By the name that lm-evaluation-harness gives them.
METRICS: dict[str, Callable[..., float]] = {
    "qa_f1_score": qa_f1,
    "qa_f1_zh_score": qa_f1_zh,
    "rouge_score": rouge,
    "rouge_zh_score": rouge_zh,
    "classification_score": classification,
    "count_score": count,
    "retrieval_score": retrieval,
    "retrieval_zh_score": retrieval_zh,
    "code_sim_score": code_sim,
}


def score(metric: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None) -> float:
    """Best score of a prediction over all right answers, 0 to 1. Raises ValueError for an unknown metric."""
    if metric not in METRICS:
        raise ValueError(f"there is no LongBench metric {metric!r}; use one of {sorted(METRICS)}")
    more = {"all_classes": all_classes} if metric == "classification_score" else {}
    return max((METRICS[metric](prediction, answer, **more) for answer in answers), default=0.0)


def first_line(task: str, prediction: str) -> str:
    """What of a prediction is scored: its first line in ONE_LINE_TASKS (also their _e sets), all of it elsewhere."""
    return prediction.lstrip("\n").split("\n")[0] if task.removesuffix("_e") in ONE_LINE_TASKS else prediction
