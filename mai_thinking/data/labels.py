"""Quality tiers, topics, languages: classifiers trained here on given examples. MAI-Thinking-1 report §2.4.3.

Logistic regression over hashed words and pairs of words: about what fastText does, on a library that is at hand.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mai_thinking.data.decontamination import read_benchmark
from mai_thinking.data.jsonl import shown
from mai_thinking.data.words import WordHashes, hashed_features, one_thread
from mai_thinking.errors import UsageError

_BATCH = 2048


def _features(texts: Iterable[str]) -> Any:
    words = WordHashes()
    return hashed_features(map(words.of, texts), longest=2, bits=18)


def read_examples(labels: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, list[str]]]:
    """Classifier → label → texts, of `data.cleaning.labels`. UsageError for fewer than two labels, or no examples."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, files in labels.items():
        if len(files) < 2:
            raise UsageError(f"data.cleaning.labels.{name}: needs two labels or more, has {len(files)}")
        for label, path in sorted(files.items()):
            texts = [text for record in read_benchmark(Path(path).expanduser()) for text in record if text.strip()]
            if not texts:
                raise UsageError(f"data.cleaning.labels.{name}.{label}: {shown(path)}: no text in it")
            found.setdefault(name, {})[label] = texts
    return found


class Labeller:
    """One classifier; the same examples give the same labels."""

    @one_thread()
    def __init__(self, examples: Mapping[str, Sequence[str]]) -> None:
        """`examples`: label → texts."""
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.linear_model import LogisticRegression

        texts = [text for found in examples.values() for text in found]
        labels = [label for label, found in examples.items() for _ in found]
        self._rarity = TfidfTransformer()
        features = self._rarity.fit_transform(_features(texts))
        # Fewer examples of a label do not make it rarer.
        self._model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=300).fit(features, labels)

    def labels(self, texts: Iterable[str]) -> Iterator[str]:
        """The most probable label of each text."""
        remaining = iter(texts)
        while batch := list(islice(remaining, _BATCH)):
            yield from map(str, self._model.predict(self._rarity.transform(_features(batch))))
