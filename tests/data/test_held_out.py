"""Held-out text as sets, and sources cut by document."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rich.console
import rich.markdown

from mai_thinking.config.data import DataSection, SourceSection
from mai_thinking.data import prepare
from mai_thinking.data.documents import Document
from mai_thinking.data.embedded import embedded_fingerprint, read_embedded
from mai_thinking.data.exercises import exercise, exercise_kind
from mai_thinking.data.held_out import fingerprint, held_out_sets
from mai_thinking.data.prepared import PreparedSource
from mai_thinking.errors import UsageError
from mai_thinking.training.evaluation import Likelihood, Reference, weighted_score


def embedded(path: str, category: str, **more: object) -> SourceSection:
    tree = {"name": path, "kind": "embedded", "path": path, "category": category, "licence": "x", "provenance": "human"}
    return SourceSection.model_validate({**tree, "weight": 1, **more})


def test_sets_are_packages_and_small_ones_are_put_together() -> None:
    sizes = {"sympy/a.py": 500, "sympy/b.py": 300, "numpy/c.py": 150, "mpmath/d.py": 40, "top.py": 10}
    documents = [Document(f"scientific/{id}", "x" * size) for id, size in sizes.items()]
    sets = held_out_sets({"stem": documents}, [embedded("scientific", "stem")])["stem"]
    assert {name: [d.size for d in found] for name, found in sets.items()} == {
        "scientific/numpy": [150],
        "scientific/sympy": [500, 300],
        "scientific/others": [40, 10],
    }


def test_any_installed_package_is_a_source() -> None:
    """Its modules, and the docstrings of one of them: found by importing it."""
    source = embedded("scientific", "code").model_copy(update={"name": "rich", "path": "package/rich"})
    read = {document.id: document.text for document in read_embedded(source)}
    assert {"rich/markdown.py", "rich/console.py"} < set(read)
    assert all(id.startswith("rich/") for id in read)
    assert read["rich/markdown.py"] == inspect.getsource(rich.markdown)
    manual = read_embedded(source.model_copy(update={"path": "docstrings/rich"}))
    long = inspect.cleandoc(rich.console.Console.__doc__ or "")
    assert long in next(document.text for document in manual if document.id == "rich/console.py")
    assert embedded_fingerprint(source) != embedded_fingerprint(source.model_copy(update={"path": "package/filelock"}))
    with pytest.raises(UsageError, match="`pip install nosuch`"):
        list(read_embedded(source.model_copy(update={"path": "package/nosuch"})))


def test_exercises_are_sorted_by_what_they_practise() -> None:
    source = embedded("exercises", "maths", provenance="procedural", max_bytes=1000)
    documents = [Document(f"exercises/{index}", exercise(index)) for index in range(200)]
    sets = held_out_sets({"maths": documents}, [source])["maths"]
    assert len(sets) >= 3
    for name, found in sets.items():
        kinds = {exercise_kind(int(document.id.split("/")[1])) for document in found}
        assert name.endswith("/others") or kinds == {name.split("/")[1]}
    percentages = [index for index in range(200) if exercise_kind(index) == "percentage"]
    assert all("%" in exercise(index) or "percent" in exercise(index) for index in percentages)


def test_every_embedded_category_of_the_default_has_three_sets(tmp_path: Path) -> None:
    sources = [
        embedded("manuals", "general"),
        embedded("docstrings", "general"),
        embedded("exercises", "maths", provenance="procedural", max_bytes=100_000),
    ]
    prepared = prepare(DataSection(sources=tuple(sources), cache_dir=str(tmp_path), tokenizer={"vocab_size": 300}))
    sets = held_out_sets(prepared.held_out, sources)
    assert set(sets) == {"general", "maths"}
    assert min(len(by_name) for by_name in sets.values()) >= 3


def likelihood(nats: float, size: int) -> Likelihood:
    return Likelihood(nats, 10, size)


def test_eq_3_is_the_uniform_mean_of_ratios_then_the_weights(tmp_path: Path) -> None:
    reference = Reference.model_validate(
        {
            "model": "abc",
            "sets": {"a": {"text": "1", "nats": 2.0}, "b": {"text": "2", "nats": 4.0}, "c": {"text": "3", "nats": 1.0}},
        }
    )
    reference.write(tmp_path / "reference.json")
    assert Reference.read(tmp_path / "reference.json") == reference
    # "b" has a hundred times the bytes of "a", and counts no more.
    results = {"code": {"a": likelihood(10, 10), "b": likelihood(2000, 1000)}, "general": {"c": likelihood(3, 2)}}
    found = reference.normalised(results, {"a": "1", "b": "2", "c": "3"})
    assert found["normalised/code"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["normalised/general"] == pytest.approx(1.5)
    assert found["normalised"] == pytest.approx(weighted_score({"code": 0.5, "general": 1.5}))
    assert found["normalised"] == pytest.approx((0.5 * 0.5 + 0.1 * 1.5) / 0.6)


@pytest.mark.parametrize(
    ("texts", "message"),
    [({"a": "1", "b": "9"}, "'b' has other text than the reference has seen"), ({"a": "1", "z": "2"}, "'z' is not in")],
)
def test_other_text_is_refused(texts: dict[str, str], message: str) -> None:
    reference = Reference.model_validate(
        {"model": "abc", "sets": {"a": {"text": "1", "nats": 2.0}, "b": {"text": "2", "nats": 4.0}}}
    )
    with pytest.raises(UsageError, match=message):
        reference.normalised({"code": {name: likelihood(1, 1) for name in texts}}, texts)


def test_a_file_that_is_no_reference_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"sets": 3}))
    with pytest.raises(UsageError, match=r"no reference; write one with scripts/evaluate.py --reference"):
        Reference.read(tmp_path / "x.json")


def test_a_fingerprint_is_of_the_text_alone() -> None:
    one, other = Document("a", "text"), Document("b", "more")
    assert fingerprint([one, other]) == fingerprint([Document("z", "more"), Document("y", "text")])
    assert fingerprint([one]) != fingerprint([one, other])


# ----------------------------------------------------------------------------------------------------- down-sampling


def source(documents: int = 400) -> PreparedSource:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 500, size=rng.integers(5, 60), dtype=np.uint16) for _ in range(documents)]
    offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return PreparedSource(np.concatenate(parts), offsets, [str(i) for i in range(documents)])


def test_a_cut_source_is_whole_documents_and_part_of_every_larger_cut() -> None:
    whole = source()
    smaller, larger = whole.cut(0.1), whole.cut(0.5)
    for cut, share in ((smaller, 0.1), (larger, 0.5)):
        assert len(cut.tokens) == pytest.approx(share * len(whole.tokens), abs=30)
        for place, id in enumerate(cut.ids):
            begin, end = whole.offsets[int(id)], whole.offsets[int(id) + 1]
            own = cut.tokens[cut.offsets[place] : cut.offsets[place + 1]]
            assert np.array_equal(own, whole.tokens[begin:end])
    assert set(smaller.ids) < set(larger.ids)
    assert larger.ids == sorted(larger.ids, key=int)  # the order of the whole
    assert smaller.ids != [str(i) for i in range(len(smaller.ids))]  # by hash, not from the front
    assert whole.cut(1.0).ids == whole.ids


def test_each_rung_repeats_each_source_as_often_as_the_target(tmp_path: Path) -> None:
    """To within a document; without the cut a rung of a tenth repeats a tenth as often."""
    base = DataSection(
        sources=(
            embedded("exercises", "maths", provenance="procedural", max_bytes=200_000),
            embedded("serial", "maths", provenance="procedural", weight=3, max_bytes=200_000),
        ),
        cache_dir=str(tmp_path),
        tokenizer={"vocab_size": 300},
    )
    target = 3_000_000
    at_target = {row["source"]: row["epochs"] for row in prepare(base).mixture(target).records()}
    for tokens in (60_000, 300_000, target):
        cut = base.model_copy(update={"down_sample": tokens / target})
        prepared = prepare(cut)
        assert prepared.key == prepare(base).key  # the same tokenizer and held-out text, prepared once
        for row in prepared.mixture(tokens).records():
            assert row["epochs"] is not None
            assert row["epochs"] == pytest.approx(at_target[row["source"]], rel=0.05)
    uncut = {row["source"]: row["epochs"] for row in prepare(base).mixture(300_000).records()}
    assert uncut["serial"] == pytest.approx(0.1 * at_target["serial"])  # the control
    assert prepare(cut.model_copy(update={"down_sample": 0.1})).content != prepare(base).content


def test_a_stream_cannot_be_cut() -> None:
    stream = SimpleNamespace(name="a", kind="jsonl", path="a.jsonl", category="code", licence="x", provenance="human")
    with pytest.raises(ValueError, match="a stream's size is not known"):
        DataSection(sources=[vars(stream) | {"weight": 1, "streaming": True}], down_sample=0.5)
