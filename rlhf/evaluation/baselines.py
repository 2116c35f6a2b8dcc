"""Baselines for a reward model: simple rules on the same pairs."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.data.records import Comparison


def longer_wins(pairs: Sequence[Comparison]) -> float:
    """Return the accuracy of preferring the response with more words; equal lengths count half.

    Pairs with a preference of 0.5 are left out.
    """
    decided = [p for p in pairs if p.preference != 0.5]
    score = 0.0
    for pair in decided:
        a, b = len(pair.chosen.split()), len(pair.rejected.split())
        score += 0.5 if a == b else float(a > b)
    return score / max(len(decided), 1)


def tfidf_accuracy(train: Sequence[Comparison], test: Sequence[Comparison]) -> float:
    """Return the held-out accuracy of a linear Bradley-Terry model on tf-idf features (words and word pairs)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train = [p for p in train if p.preference != 0.5]
    test = [p for p in test if p.preference != 0.5]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit([text for p in train for text in (p.chosen, p.rejected)])

    def difference(pairs: Sequence[Comparison]):  # type: ignore[no-untyped-def]
        return vectorizer.transform([p.chosen for p in pairs]) - vectorizer.transform([p.rejected for p in pairs])

    # Every second pair is swapped so that both classes occur. Without an intercept the model is antisymmetric.
    signs = [1 if i % 2 else -1 for i in range(len(train))]
    features = difference(train).multiply([[s] for s in signs]).tocsr()
    model = LogisticRegression(fit_intercept=False, C=1.0, max_iter=1000).fit(features, signs)
    return float((model.decision_function(difference(test)) > 0).mean())
