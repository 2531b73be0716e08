"""Stages of cleaning: what each finds of planted faults, what it leaves alone, who keeps what two sources have."""

import json
import os
import random
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from measure_cleaning import STAGES, harmed, outcomes, recall
from planted import similarity

from conftest import Corpus, source
from mai_thinking.config.data import BoilerplateSection, DataSection, FuzzySection, SemanticSection, TemplatesSection
from mai_thinking.data import PreparedData, documents, prepare, semantic
from mai_thinking.data.accounting import card
from mai_thinking.data.boilerplate import without_boilerplate
from mai_thinking.data.cleaning import with_words
from mai_thinking.data.decontamination import FuzzyIndex
from mai_thinking.data.documents import Document, Documents, Writer, rewritten
from mai_thinking.data.duplicates import near_duplicates, templated
from mai_thinking.data.semantic import semantic_duplicates
from mai_thinking.data.words import WordHashes
from mai_thinking.data.work import Parts, Work
from mai_thinking.errors import UsageError
from mai_thinking.report.corpus import corpus_page

Make = Callable[..., DataSection]


class Stored:
    """Documents in files, and the work on them."""

    def __init__(self, folder: Path, texts: list[str]) -> None:
        self.work = Work(Path(tempfile.mkdtemp(dir=folder)), processes=1)
        writer = Writer(self.work.texts, 0)
        for place, text in enumerate(texts):
            writer.add(Document(str(place), text))
        self.documents = with_words(writer.close().sharded(), self.work)


def cleaned(folder: Path, texts: list[str], code: bool, section: BoilerplateSection) -> list[str]:
    stored = Stored(folder, texts)
    parts = without_boilerplate(stored.documents, {0} if code else set(), section, stored.work)
    assert not parts.all("gone").any()
    return list(Documents(stored.work.texts, parts.all("records")).texts())


@pytest.fixture(params=[32_000_000, 500], ids=["one shard", "many shards"])
def shard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever shards the documents lie in, a stage finds the same."""
    monkeypatch.setattr(documents, "_SHARD", request.param)


def dropped(prepared: PreparedData, name: str) -> dict[str, int]:
    counts = prepared.manifest["sources"][name]["counts"]["dropped"]
    return {rule: documents for rule, (documents, _) in counts.items()}


def test_planted_faults_are_found_and_clean_documents_stay(tmp_path: Path) -> None:
    """In code and in Chinese; `measure_cleaning` has all languages, and each stage alone."""
    found = outcomes(STAGES["all"], tmp_path, ("code", "chinese"))
    shares = recall(found)
    for kind, by_language in shares.items():
        least = 0.8 if kind in ("paraphrase", "near 0.6") else 0.95
        assert by_language["all"] >= least, (kind, by_language)
    assert harmed(found)["all"] <= 0.01


@pytest.mark.usefixtures("shard")
def test_near_duplicates_are_those_of_comparing_all_pairs(corpus: Corpus) -> None:
    """Against Jaccard similarities counted here: the first that is alike is named, and it is itself kept."""
    originals = corpus.documents(30)
    texts = list(originals)
    for text in originals:
        words = text.split(" ")
        for changed in (1, len(words) // 3, len(words) // 2):
            texts.append(" ".join(["new", *words[changed:]]))
    cleaning = DataSection.model_validate({"cleaning": {"near_duplicates": 0.7, "minhash_permutations": 512}}).cleaning
    stored = Stored(corpus.folder, texts)
    twins = near_duplicates(stored.documents, cleaning, stored.work)
    kept: list[int] = []
    for place, text in enumerate(texts):
        values = {other: similarity(texts[other], text) for other in kept}
        if any(abs(value - 0.7) < 0.07 for value in values.values()):  # the estimate may say either
            kept += [place] if twins[place] == place else []
            continue
        alike = [other for other, value in values.items() if value >= 0.7]
        assert twins[place] == (alike[0] if alike else place)
        kept += [] if alike else [place]


def test_a_text_without_words_is_nobodys_duplicate(tmp_path: Path) -> None:
    cleaning = DataSection().cleaning
    words, none, dots = (Stored(tmp_path, texts) for texts in (["", "...", "", "a b"], [], ["", "..."]))
    assert near_duplicates(words.documents, cleaning, words.work).tolist() == [0, 1, 2, 3]
    assert near_duplicates(none.documents, cleaning, none.work).tolist() == []
    assert templated(dots.documents, TemplatesSection(), 128, dots.work).tolist() == [0, 1]
    for texts in ([""], ["", "", "a b c", "d e f"]):
        stored = Stored(tmp_path, texts)
        assert semantic_duplicates(stored.documents, SemanticSection(), stored.work).tolist() == [*range(len(texts))]


@pytest.mark.usefixtures("shard")
def test_boilerplate_is_counted_in_documents_and_one_of_a_repeated_line_stays(tmp_path: Path) -> None:
    section = BoilerplateSection(min_words=3, across=2, within=2)
    everywhere, often, few = "all rights reserved here\n", "read this page again\n", "two words\n"
    texts = [f"{everywhere}text number {i}\n{few}{often * (4 if i == 0 else 2)}end {i}\n" for i in range(3)]
    cut = cleaned(tmp_path, texts, False, section)
    # `often` stands in three documents too.
    assert cut == [f"text number {i}\n{few}end {i}\n" for i in range(3)]
    cut = cleaned(tmp_path, texts[:2], False, section)
    assert cut == [texts[0].replace(often * 4, often), texts[1]]


def test_a_line_of_more_documents_than_a_byte_can_count_is_still_everywhere(tmp_path: Path) -> None:
    texts = [f"the same line again\nand number {i}\n" for i in range(270)]
    assert cleaned(tmp_path, texts, False, BoilerplateSection(min_words=4)) == [
        text.split("\n", 1)[1] for text in texts
    ]


def test_a_stored_text_is_read_back_whole(tmp_path: Path) -> None:
    texts = ["", "naïve Ω 漢字 𝄞", "plain", "\r\nlines\r"]
    stored = Stored(tmp_path, texts).documents
    assert list(stored) == [Document(str(place), text) for place, text in enumerate(texts)]
    assert stored.records["size"].tolist() == [document.size for document in stored]
    assert stored.records["fingerprint"].tolist() == [document.fingerprint for document in stored]
    changed = Documents(stored.folder, rewritten(stored, [(1, "é"), (2, None)], 1)["records"])
    assert list(changed.texts()) == ["", "é", "plain", "\r\nlines\r"]
    assert list(stored[np.array([3, 1])].texts()) == [texts[3], texts[1]]


def test_of_a_program_only_comments_are_cut(tmp_path: Path) -> None:
    section = BoilerplateSection(min_words=3, across=1, within=9)
    texts = [f"# the same licence notice\nfrom here import everything\nx = {i}\n" for i in range(3)]
    cut = cleaned(tmp_path, texts, True, section)
    assert cut == [text.split("\n", 1)[1] for text in texts]
    assert cleaned(tmp_path, texts, False, section) == [f"x = {i}\n" for i in range(3)]


def test_a_cluster_is_compared_whole_however_large_it_is(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last document repeats the first, in another order, far behind it."""
    texts = corpus.documents(40)
    texts += [" ".join(reversed(texts[0].split()))]
    for size in (512, 3):
        monkeypatch.setattr(semantic, "_CLUSTER", size)
        monkeypatch.setattr(semantic, "_NEAREST", 100)
        stored = Stored(corpus.folder, texts)
        assert semantic_duplicates(stored.documents, SemanticSection(), stored.work).tolist() == [*range(40), 0]


def test_frequent_words_and_the_rest_have_the_products_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = scipy.sparse.random_array((40, 200), density=0.2, rng=np.random.default_rng(0), dtype=np.float32).tocsr()
    expected = (vectors @ vectors.T).toarray()
    for often in (1, 20, 300):
        monkeypatch.setattr(semantic, "_OFTEN", often)
        dense, rest = semantic._parted(vectors.copy())
        assert (rest.nnz == 0) == (often == 300)
        np.testing.assert_allclose(dense @ dense.T + (rest @ rest.T).toarray(), expected, rtol=1e-5)


FITTED = """
import sys
from pathlib import Path
import numpy as np
from shard_tasks import stored
from mai_thinking.config.data import SemanticSection
from mai_thinking.data.cleaning import with_words
from mai_thinking.data.semantic import semantic_duplicates
from mai_thinking.data.work import Work
draw = np.random.default_rng(0)
texts = [" ".join(map(str, draw.zipf(1.3, 60))) for _ in range(1500)]
with Work(Path(sys.argv[1]), processes=1) as work:
    documents = with_words(stored(work, texts), work)
    semantic_duplicates(documents, SemanticSection(), work)
"""


def test_singular_vectors_are_the_same_bits_on_any_number_of_cores(tmp_path: Path) -> None:
    found = []
    for cores in "12":
        places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
        variables = os.environ | {"PYTHONPATH": places, "OPENBLAS_NUM_THREADS": cores, "OMP_NUM_THREADS": cores}
        subprocess.run([sys.executable, "-c", FITTED, str(tmp_path / cores)], env=variables, check=True)
        with (
            np.load(tmp_path / cores / "embedding.npz") as table,
            np.load(next((tmp_path / cores / "embeddings").iterdir())) as part,
        ):
            found.append((table["vectors"].tobytes(), part["vectors"].tobytes()))
    assert found[0] == found[1]


def test_clusters_hold_one_shard_of_embeddings_and_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty shards of 1.3 MB, of which a thousandth decides on the means."""
    monkeypatch.setattr(semantic, "_CLUSTERED", 100)
    monkeypatch.setattr(semantic, "_CLUSTER", 5000)
    monkeypatch.setattr(semantic, "_LARGE", 100_000)

    class Shards(Parts):
        def each(self, name: str) -> Iterator[Any]:
            draw = np.random.default_rng(0)
            return (draw.random((5000, 64), dtype=np.float32) for _ in range(20))

    import sklearn.cluster  # noqa: F401 — which would count where this test is the first to need it

    tracemalloc.start()
    found = list(semantic.clusters(Shards({}), 100_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, found)) == 200_000
    assert peak < 13e6


def test_a_large_cluster_is_cut_and_near_copies_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of 4,000 lie around one of 20 places, so that its clusters are far larger than others; 400 have a copy that
    is a little off."""
    monkeypatch.setattr(semantic, "_CLUSTER", 40)
    draw = np.random.default_rng(0)
    middles = draw.standard_normal((20, 16)) * 2
    vectors = middles[np.where(draw.random(4000) < 0.5, 0, draw.integers(0, 20, 4000))] + draw.standard_normal(
        (4000, 16)
    )
    copied = draw.choice(3600, 400, replace=False)
    vectors[3600:] = vectors[copied] + 0.02 * draw.standard_normal((400, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    class Shards(Parts):
        def each(self, name: str) -> Iterator[Any]:
            return iter(np.array_split(vectors, 7))

    monkeypatch.setattr(semantic, "_LARGE", 4000)
    assert max(map(len, semantic.clusters(Shards({}), 4000))) > 200
    monkeypatch.setattr(semantic, "_LARGE", 100)
    for room in (131_072, 600):  # the large ones together, or a few at once
        monkeypatch.setattr(semantic, "_CLUSTERED", room)
        found = list(semantic.clusters(Shards({}), 4000))
        assert max(map(len, found)) <= 100
        assert np.bincount(np.concatenate(found)).tolist() == [2] * 4000
        assert all((np.diff(members) > 0).all() for members in found)
        sets = [set(members.tolist()) for members in found]
        together = [
            any({int(a), b} <= members for members in sets) for a, b in zip(copied, range(3600, 4000), strict=True)
        ]
        assert np.mean(together) > 0.99


def test_a_document_belongs_to_the_two_nearest_the_first_of_equals() -> None:
    closeness = np.array([[1, 3, 2, 3], [0, 0, 0, 0], [5, 1, 2, 4]], dtype=np.float32)
    assert semantic.two_nearest(closeness.copy()).tolist() == [[1, 3], [0, 1], [0, 3]]
    assert semantic.two_nearest(closeness[:, :1].copy()).tolist() == [[0], [0], [0]]


def test_a_cluster_may_be_empty(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of copies of one text, which all lie nearest to the same two of four; nothing can cut them."""
    monkeypatch.setattr(semantic, "_CLUSTER", 3)
    monkeypatch.setattr(semantic, "_LARGE", 4)
    stored = Stored(corpus.folder, [corpus.document()] * 12)
    assert semantic_duplicates(stored.documents, SemanticSection(), stored.work).tolist() == [0] * 12


def test_few_representatives_of_what_says_the_same_stay(corpus: Corpus) -> None:
    base = corpus.document(100).split()
    shuffled = [" ".join(random.Random(seed).sample(base, len(base))) for seed in range(5)]
    stored = Stored(corpus.folder, [*shuffled, *corpus.documents(30)])
    for representatives in (1, 3):
        section = SemanticSection(representatives=representatives)
        twins = semantic_duplicates(stored.documents, section, stored.work)
        own = twins == np.arange(len(twins))
        assert own[:5].sum() == representatives
        assert own[5:].all()


@pytest.mark.parametrize(("changed", "found"), [(0, True), (3, True), (4, True), (8, False)])
def test_fuzzy_decontamination_finds_four_fifths_of_twenty_words(corpus: Corpus, changed: int, found: bool) -> None:
    """Four of twenty may be others, wherever they stand; eight may not."""
    words = WordHashes()
    texts = [corpus.sentence(20) for _ in range(20)]
    index = FuzzyIndex(FuzzyIndex.joined([words.of(text) for text in texts]), FuzzySection())
    draw = random.Random(3)
    for text in texts:
        parts = text.split()
        places = draw.sample(range(20), changed)
        for place in places:
            parts[place] = f"other{place}"
        around = [corpus.sentence(40).split() for _ in range(2)]
        covered = index.overlap(words.of(" ".join([*around[0], *parts, *around[1]])))
        if not found:
            assert not covered.any()
            continue
        assert covered[40:60].sum() == 20 - changed
        assert not covered[:38].any()
        assert not covered[62:].any()


def test_a_word_put_in_or_left_out_does_not_hide_a_text(corpus: Corpus) -> None:
    words = WordHashes()
    text = corpus.sentence(30).split()
    index = FuzzyIndex(FuzzyIndex.joined([words.of(" ".join(text))]), FuzzySection())
    for other in ([*text[:15], "new", *text[15:]], [*text[:15], *text[16:]]):
        assert index.overlap(words.of(" ".join(other))).sum() >= 29
    assert not index.overlap(words.of(" ".join(text[::-1]))).any()
    assert not index.overlap(words.of("")).any()


def test_the_higher_ranked_source_keeps_what_two_have_and_the_card_says_so(corpus: Corpus, section: Make) -> None:
    texts = corpus.documents(30)
    first, second = corpus.jsonl("a.jsonl", texts[:20]), corpus.jsonl("b.jsonl", texts[10:])
    sources = source("a", first, held_out=False), source("b", second, held_out=False)
    prepared = prepare(section(*sources, cleaning={"drop_order": ["b"]}))
    assert dropped(prepared, "a") == {"exact_duplicates": 10}
    assert dropped(prepared, "b") == {}
    assert list(prepared.manifest["sources"]) == ["a", "b"]
    text = (prepared.folder / "card.md").read_text()
    assert "| a | b | 10 (" in text
    assert "| a | exact_duplicates | `a.jsonl:11` |" in text
    assert prepared.manifest["files"]["card.md"]["bytes"] == len(text.encode())
    assert card(prepared.manifest) == text
    assert card(prepared.manifest | {"seconds": {}}) == text


def test_a_dropped_text_cannot_break_the_card_s_table(corpus: Corpus, section: Make) -> None:
    nasty = "| `x` |\n\n# heading\n\x1b[31m <script>"
    path = corpus.jsonl("a.jsonl", [*corpus.documents(30), nasty])
    text = (prepare(section(source("a", path, held_out=False))).folder / "card.md").read_text()
    (line,) = (line for line in text.splitlines() if "min_bytes" in line and "script" in line)
    assert line.count("|") == 6
    assert "# heading" not in text.splitlines()
    assert "\x1b" not in text


def test_labels_part_a_source_that_a_mixture_can_weigh(corpus: Corpus, section: Make, tmp_path: Path) -> None:
    """Two subjects with words of their own, and examples of each: every document comes to one of two sources."""
    draw = random.Random(1)
    vocabulary = {"sea": corpus.words[:300], "land": corpus.words[200:500]}

    def text(label: str) -> str:
        return " ".join(draw.choices(vocabulary[label], k=80))

    examples = {label: str(corpus.jsonl(f"{label}.jsonl", [text(label) for _ in range(20)])) for label in vocabulary}
    labels = [draw.choice(["sea", "land"]) for _ in range(60)]
    path = corpus.jsonl("all.jsonl", [text(label) for label in labels])
    sources = [
        source(label, path, held_out=False, weight=weight, labels={"subject": label})
        for label, weight in (("sea", 3), ("land", 1))
    ]
    prepared = prepare(section(*sources, cleaning={"labels": {"subject": examples}}))
    for label in vocabulary:
        lines = {int(id.rpartition(":")[2]) for id in prepared.sources[label].ids}
        right = {line for line, given in enumerate(labels, 1) if given == label}
        assert len(lines ^ right) <= 2
    assert dropped(prepared, "sea").keys() == {"labels"}
    plain = prepare(section(source("sea", path, held_out=False)))
    assert len(plain.sources["sea"].ids) == 60


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"cleaning": {"drop_order": ["x"]}}, "no source is called 'x'; known: a"),
        ({"labels": {"tier": "high"}}, "labels: tier: 'high' is no label of `cleaning.labels`; it has none"),
        ({"labels": {"t": "h"}, "streaming": True, "cleaning": {"labels": {"t": {"h": "x"}}}}, "remove `streaming`"),
    ],
)
def test_a_wrong_name_is_told(section: Make, tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("`", ".")):
        section(source("a", "a.jsonl", **{k: v for k, v in tree.items() if k != "cleaning"}),
                cleaning=tree.get("cleaning", {}))  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"high": "no.txt", "low": "empty.txt"}, "no.txt"),
        ({"high": "full.txt", "low": "empty.txt"}, "empty.txt"),
        ({"high": "full.txt"}, "needs two labels or more, has 1"),
    ],
)
def test_examples_that_are_missing_are_told(
    corpus: Corpus, section: Make, tmp_path: Path, labels: dict[str, str], message: str
) -> None:
    (tmp_path / "full.txt").write_text("some words\n")
    (tmp_path / "empty.txt").write_text("")
    examples = {label: str(tmp_path / name) for label, name in labels.items()}
    config = section(source("a", corpus.jsonl("a.jsonl", corpus.documents(9))), cleaning={"labels": {"t": examples}})
    with pytest.raises(UsageError, match=message):
        prepare(config)


def test_a_sample_is_part_of_the_whole_and_has_a_key_of_its_own(corpus: Corpus, section: Make) -> None:
    config = section(source("a", corpus.jsonl("a.jsonl", corpus.documents(200)), held_out=False))
    whole, half = prepare(config), prepare(config, sample=0.5)
    assert set(half.sources["a"].ids) < set(whole.sources["a"].ids)
    assert 70 <= len(half.sources["a"].ids) <= 130
    assert half.key != whole.key


def test_fuzzy_decontamination_survives_a_reload_and_cuts_streams_too(corpus: Corpus, section: Make) -> None:
    questions = [corpus.sentence(24) for _ in range(3)]
    changed = [" ".join("other" if i % 8 == 5 else word for i, word in enumerate(q.split())) for q in questions]
    texts = corpus.documents(60)
    path = corpus.jsonl("a.jsonl", [*texts, *(f"{corpus.document()}\n{line}\n{corpus.document()}" for line in changed)])
    benchmark = corpus.folder / "b.json"
    benchmark.write_text(json.dumps(questions))
    for fuzzy, cut in (({}, 3), (None, 0)):
        cleaning = {"benchmarks": [str(benchmark)], "fuzzy_decontamination": fuzzy, "near_duplicates": None}
        prepared = prepare(section(source("a", path, held_out=False), cleaning=cleaning))
        assert prepared.manifest["sources"]["a"]["counts"]["cut"].get("decontamination", [0])[0] == cut
        overlap = prepared.overlap
        assert overlap is not None
        assert [overlap.clean(f"{texts[0]}\n{line}\n") != f"{texts[0]}\n{line}\n" for line in changed] == [cut > 0] * 3


def test_the_page_of_a_corpus_adds_up(corpus: Corpus, section: Make, tmp_path: Path) -> None:
    texts = corpus.documents(40)
    path = corpus.jsonl("a.jsonl", [*texts, texts[0], "short"])
    prepared = prepare(section(source("a", path)))
    page = corpus_page(prepared)
    page.write(tmp_path / "report")
    rows = {row["stage"]: (row["documents"], row["MB"]) for row in page.facts["stages"]}
    assert rows["read"][0] == 42
    assert rows["trained on"][0] == len(prepared.sources["a"].ids)
    left = len(prepared.held_out["general"]) + sum(rows[rule][0] for rule in ("exact_duplicates", "min_bytes"))
    assert rows["read"][0] == rows["trained on"][0] + left
    assert rows["min_bytes"][1] == len("short") / 1e6
    assert "exact_duplicates" in (tmp_path / "report" / "summary.md").read_text()
