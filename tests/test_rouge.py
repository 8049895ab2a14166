"""ROUGE-L: known values of both kinds, and what they have in common."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.rouge import common_subsequence, rouge_l, rouge_l_papers

TEXTS = st.text(alphabet="ab .", max_size=20)


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [  # computed with the package rouge 1.0.1
        ("The cat sat on the mat. It was warm.", "A cat sat on a mat. It was very warm", 0.7368421002770082),
        ("the the the cat", "the cat the dog.", 0.39999999520000007),
        ("Paris", "Paris.", 0.999999995),
        ("b c a. d e", "a b c d. e f", 0.7272727223140496),
        ("paris is big", "Paris is big", 0.6666666616666668),
        ("", "Paris", 0.0),
        ("...", "Paris", 0.0),
    ],
)
def test_the_papers_measure_has_the_values_of_their_package(text: str, reference: str, score: float) -> None:
    assert rouge_l_papers(text, reference) == pytest.approx(score, abs=1e-12)


def test_the_usual_measure_ignores_case_and_punctuation() -> None:
    assert rouge_l("paris is BIG!", "Paris is big.") == 1.0
    assert rouge_l("a b c d", "a x c y") == pytest.approx(0.5)
    assert rouge_l("", "Paris") == 0.0


@given(text=TEXTS, reference=TEXTS)
def test_scores_are_between_0_and_1_and_a_text_matches_itself(text: str, reference: str) -> None:
    assert 0.0 <= rouge_l_papers(text, reference) <= 1.0
    if text.strip(" ."):
        assert rouge_l_papers(text, text) == pytest.approx(1.0)


@given(x=st.text("abc", max_size=8), y=st.text("abc", max_size=8))
def test_the_common_subsequence_is_one_and_the_longest(x: str, y: str) -> None:
    def is_subsequence(part: list[str], whole: str) -> bool:
        rest = iter(whole)
        return all(word in rest for word in part)

    def longest(a: str, b: str) -> int:
        if not a or not b:
            return 0
        return 1 + longest(a[1:], b[1:]) if a[0] == b[0] else max(longest(a[1:], b), longest(a, b[1:]))

    found = common_subsequence(list(x), list(y))
    assert is_subsequence(found, x)
    assert is_subsequence(found, y)
    assert len(found) == longest(x, y)
