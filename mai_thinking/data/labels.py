"""Quality tiers, topics, languages: classifiers trained here on given examples. MAI-Thinking-1 report §2.4.3.

Logistic regression over hashed words and pairs of words: about what fastText does, on a library that is at hand.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from mai_thinking.data.decontamination import read_benchmark
from mai_thinking.data.features import hashed_features
from mai_thinking.data.jsonl import shown
from mai_thinking.errors import UsageError

_BATCH = 2048
_features = functools.partial(hashed_features, longest=2, bits=18)


class Labeller:
    """One classifier; the same examples give the same labels."""

    def __init__(self, name: str, examples: Mapping[str, str]) -> None:
        """`examples`: label → file. UsageError for fewer than two labels, or an empty file."""
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.linear_model import LogisticRegression

        texts, labels = list[str](), list[str]()
        for label, path in sorted(examples.items()):
            found = [text for record in read_benchmark(Path(path).expanduser()) for text in record]
            if not found or len(examples) < 2:
                problem = "has no examples" if not found else "is the only label; name a second"
                raise UsageError(f"data.cleaning.labels.{name}.{label}: {shown(path)}: {problem}")
            texts += found
            labels += [label] * len(found)
        self._rarity = TfidfTransformer(sublinear_tf=False)
        features = self._rarity.fit_transform(_features(texts))
        # Fewer examples of a label do not make it rarer.
        self._model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300).fit(features, labels)

    def labels(self, texts: Iterable[str]) -> Iterator[str]:
        """The most probable label of each text."""
        remaining = iter(texts)
        while batch := list(islice(remaining, _BATCH)):
            yield from map(str, self._model.predict(self._rarity.transform(_features(batch))))
