"""ROUGE-L between a generated text and its reference: the usual one, and the one that the papers report.

`rouge_l` is that of the package rouge-score: lower case, runs of letters and digits, F measure of the longest common
subsequence. `rouge_l_papers` is what FedKSeed's and Ferret's codes get from the package `rouge` 1.0.1, rewritten: figures
of the two differ by several points, so a comparison must say which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L F in 0 .. 1 of rouge-score with its default tokenizer, without stemming."""
    return float(_scorer().score(reference, text)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l_papers(text: str, reference: str) -> float:
    """ROUGE-L F in 0 .. 1 as FedKSeed's and Ferret's evaluation computes it (package `rouge` 1.0.1, metric "rouge-l").

    Both texts are cut into sentences at every full stop and sentences into words at white space; case and punctuation
    count. The union over all pairs of sentences of their longest common subsequences is a set of distinct words; its size
    over the number of distinct words of the reference (of the text) is the recall R (the precision P), and the score is
    2 P R / (P + R + 1e-8). A text or reference without a sentence scores 0, as in their code.
    """
    hypothesis, target = _sentences(text), _sentences(reference)
    if not hypothesis or not target:
        return 0.0
    common: set[str] = set()
    for sentence in target:
        for own in hypothesis:
            common |= set(common_subsequence(sentence, own))
    recall = len(common) / len({word for sentence in target for word in sentence})
    precision = len(common) / len({word for sentence in hypothesis for word in sentence})
    return 2.0 * precision * recall / (precision + recall + 1e-8)


def common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """The longest common subsequence of two lists of words; among equally long ones the choice of package `rouge`."""
    length = [[0] * (len(y) + 1) for _ in range(len(x) + 1)]
    for i, word in enumerate(x, 1):
        for j, other in enumerate(y, 1):
            length[i][j] = length[i - 1][j - 1] + 1 if word == other else max(length[i - 1][j], length[i][j - 1])
    words, i, j = [], len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.append(x[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1][j] > length[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words[::-1]


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence. A sentence of white space only is one empty word, which `rouge` counts."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]
