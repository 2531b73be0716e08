"""Documents that say the same in other words. MAI-Thinking-1 report §2.4.3, App. A.

The embeddings are made here and by no other model: hashed words, weighted by their rarity, and their singular vectors
(latent semantic analysis), by which documents are clustered. Within a cluster the weighted words themselves are
compared: the singular vectors of a few thousand documents tell subjects apart, and not what is said on one. Of
documents that lie close together a few representatives are kept.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mai_thinking.config.data import SemanticSection
from mai_thinking.data.documents import Documents
from mai_thinking.data.duplicates import Places
from mai_thinking.data.words import hashed_features, one_thread
from mai_thinking.data.work import Arrays, Parts, Work

_SAMPLE = 8192
"""So many documents, evenly spread, decide on the weights and the singular vectors."""
_CLUSTERED = 131_072
"""So many decide on the clusters' means."""
_BATCH = 2048
_CLUSTER = 512
"""Documents of a cluster, on average."""
_LARGE = 2048
"""Clusters that have more are cut: comparing takes the square, in time and in memory."""
_OFTEN = 1024
"""Words that are so frequent in a cluster that their product is a dense one."""
_NEAREST = 2
"""Clusters that a document is compared in, since two that are close may lie on either side of a border."""


@one_thread()
def semantic_duplicates(documents: Documents, section: SemanticSection, work: Work) -> Places:
    """For each document the place of an earlier representative that says the same; its own for representatives."""
    twins = np.arange(len(documents))
    if len(documents) < 2:
        return twins
    sample = documents[:: -(-len(documents) // _SAMPLE)]
    table = work.once("embedding.npz", partial(_fit, sample, section.dimensions))
    with np.load(table) as file:
        rarity = file["rarity"]
    for members in clusters(work.each("embeddings", partial(_embeddings, table), documents), len(documents)):
        often, rest = _parted(_weighted(documents[members], rarity))
        for start in range(0, len(members), _CLUSTER):  # some clusters are far larger than others
            end = start + _CLUSTER
            closeness = often[start:end] @ often[:end].T + (rest[start:end] @ rest[:end].T).toarray()
            close = np.tril(closeness >= section.similarity, start - 1)
            for row in np.flatnonzero(close.any(axis=1)):
                place, like = members[start + row], members[np.flatnonzero(close[row])]
                like = like[twins[like] == like]
                if twins[place] == place and len(like) >= section.representatives:
                    twins[place] = like[0]
    return twins


def _weighted(documents: Documents, rarity: NDArray[np.float32]) -> Any:
    """Unit vectors [documents, words], sparse."""
    from sklearn.preprocessing import normalize

    features = hashed_features(documents.words(), longest=1, bits=16)
    features.data *= rarity[features.indices]
    return normalize(features, copy=False)


def _parted(vectors: Any) -> tuple[NDArray[np.float32], Any]:
    """The `_OFTEN` most frequent words [documents, words], dense, and the sparse rest: a sparse product takes for each
    word the square of the documents that it stands in, and so most of its time for a few words."""
    often = np.argsort(-np.bincount(vectors.indices, minlength=vectors.shape[1]), kind="stable")[:_OFTEN]
    dense = np.ascontiguousarray(vectors[:, often].toarray())
    vectors.data[np.isin(vectors.indices, often)] = 0
    vectors.eliminate_zeros()
    return dense, vectors


def _fit(sample: Documents, dimensions: int, path: Path) -> None:
    """The words' rarity, and the singular vectors of a sample."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    rarity = TfidfTransformer().fit(hashed_features(sample.words(), longest=1, bits=16)).idf_.astype(np.float32)
    svd = TruncatedSVD(min(dimensions, len(sample) - 1), n_iter=2, random_state=0).fit(_weighted(sample, rarity))
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, rarity=rarity, vectors=svd.components_.T.astype(np.float32))


@one_thread()
def _embeddings(table: Path, shard: int, documents: Documents) -> Arrays:
    """Unit vectors [documents, dimensions]; zero for one without words."""
    with np.load(table) as file:
        rarity, directions = file["rarity"], file["vectors"]
    batches = (documents[start : start + _BATCH] for start in range(0, len(documents), _BATCH))
    vectors = np.concatenate([_weighted(batch, rarity) @ directions for batch in batches])
    return {"vectors": vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-9))}


def clusters(embeddings: Parts, count: int) -> Iterator[Places]:
    """The places of each cluster's members, in order; those near a border are in two. Large ones are cut, each by
    itself: near copies, which are in two clusters together, are seldom cut apart in both."""
    from sklearn.cluster import MiniBatchKMeans

    step, first, some = -(-count // _CLUSTERED), 0, []
    for vectors in embeddings.each("vectors"):
        some.append(vectors[-first % step :: step].copy())  # a view would keep them all
        first += len(vectors)
    means = MiniBatchKMeans(-(-count // _CLUSTER), n_init=1, random_state=0, batch_size=_BATCH)
    centres = means.fit(np.concatenate(some)).cluster_centers_
    nearest = np.concatenate([
        two_nearest(vectors[start : start + _BATCH] @ centres.T)
        for vectors in embeddings.each("vectors")
        for start in range(0, len(vectors), _BATCH)
    ])  # fmt: skip
    large = list[Places]()
    for members in _members(nearest):
        if len(members) <= _LARGE:
            yield members
        else:
            large.append(members)
    while large:
        together = [large.pop()]
        while large and sum(map(len, together)) + len(large[-1]) <= _CLUSTERED:
            together.append(large.pop())
        places = np.unique(np.concatenate(together))
        vectors = np.concatenate(list(embeddings.rows("vectors", places)))
        for members in together:
            yield from (members[part] for part in _cut(vectors[np.searchsorted(places, members)]))


def _cut(vectors: NDArray[np.float32]) -> Iterator[Places]:
    """The places of the members of each part; the largest is halved until there are enough. What cannot be told apart
    stays whole."""
    from sklearn.cluster import BisectingKMeans

    halves = BisectingKMeans(-(-len(vectors) // _CLUSTER), random_state=0, bisecting_strategy="largest_cluster")
    return _members(halves.fit_predict(vectors)[:, None])


def _members(clusters: NDArray[np.int32]) -> Iterator[Places]:
    """The places, in order, of each cluster's members, of the clusters [documents, 1 or more] that each is in; some
    have none."""
    order = np.argsort(clusters, axis=None, kind="stable")
    ends = np.cumsum(np.bincount(clusters.ravel()))
    yield from filter(len, np.split(order // clusters.shape[1], ends[:-1]))


def two_nearest(closeness: NDArray[np.float32]) -> NDArray[np.int32]:
    """The columns [documents, 2 or fewer] of the largest numbers, the largest first; a sort of thousands would take
    longer than all else. `closeness` is used up."""
    found = []
    for _ in range(min(_NEAREST, closeness.shape[1])):
        best = closeness.argmax(axis=1)
        closeness[np.arange(len(best)), best] = -np.inf
        found.append(best)
    return np.stack(found, axis=1).astype(np.int32)
