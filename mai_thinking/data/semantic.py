"""Documents that say the same in other words. MAI-Thinking-1 report §2.4.3, App. A.

The embeddings are made here and by no other model: hashed words, weighted by their rarity, and their singular vectors
(latent semantic analysis), by which documents are clustered. Within a cluster the weighted words themselves are
compared: the singular vectors of a few thousand documents tell subjects apart, and not what is said on one. Of
documents that lie close together a few representatives are kept.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mai_thinking.config.data import SemanticSection
from mai_thinking.data.documents import Document
from mai_thinking.data.duplicates import Places
from mai_thinking.data.features import hashed_features

_SAMPLE = 8192
"""So many documents, evenly spread, decide on the weights and the singular vectors."""
_BATCH = 2048
_CLUSTER = 512
"""Documents of a cluster, on average."""
_NEAREST = 2
"""Clusters that a document is compared in, since two that are close may lie on either side of a border."""
_features = functools.partial(hashed_features, longest=1, bits=16)


def semantic_duplicates(documents: Sequence[Document], section: SemanticSection) -> Places:
    """For each document the place of an earlier representative that says the same; its own for representatives."""
    from sklearn.feature_extraction.text import TfidfTransformer

    places = np.arange(len(documents))
    if len(documents) < 2:
        return places
    sample = documents[:: -(-len(documents) // _SAMPLE)]
    rarity = TfidfTransformer().fit(_features([document.text for document in sample]))

    def weighted(some: Sequence[Document]) -> Any:
        """Unit vectors, sparse."""
        return rarity.transform(_features([document.text for document in some]))

    twins = places.copy()
    for members in _clusters(_embeddings(documents, weighted, weighted(sample), section.dimensions)):
        vectors = weighted([documents[place] for place in members])
        for start in range(0, len(members), _CLUSTER):  # some clusters are far larger than others
            closeness = (vectors[start : start + _CLUSTER] @ vectors[: start + _CLUSTER].T).toarray()
            for row, place in enumerate(members[start : start + _CLUSTER], start):
                earlier = members[:row]
                close = earlier[(twins[earlier] == earlier) & (closeness[row - start, :row] >= section.similarity)]
                if twins[place] == place and len(close) >= section.representatives:
                    twins[place] = close[0]
    return twins


def _embeddings(documents: Sequence[Document], weighted: Any, sample: Any, dimensions: int) -> NDArray[np.float32]:
    """Unit vectors [documents, dimensions]; zero for one without words."""
    from sklearn.decomposition import TruncatedSVD

    svd = TruncatedSVD(min(dimensions, sample.shape[0] - 1), n_iter=2, random_state=0).fit(sample)
    batches = (documents[start : start + _BATCH] for start in range(0, len(documents), _BATCH))
    vectors = np.concatenate([svd.transform(weighted(batch)) for batch in batches]).astype(np.float32)
    unit: NDArray[np.float32] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    return unit


def _clusters(vectors: NDArray[np.float32]) -> Iterator[NDArray[np.int64]]:
    """The places of each cluster's members, in order; those near a border are in two."""
    from sklearn.cluster import MiniBatchKMeans

    count = -(-len(vectors) // _CLUSTER)
    means = MiniBatchKMeans(count, n_init=1, random_state=0, batch_size=_BATCH).fit(vectors).cluster_centers_
    nearest = np.concatenate([
        np.argsort(-(vectors[start : start + _BATCH] @ means.T), axis=1, kind="stable")[:, :_NEAREST]
        for start in range(0, len(vectors), _BATCH)
    ])  # fmt: skip
    for label in range(count):
        yield np.flatnonzero((nearest == label).any(axis=1))
