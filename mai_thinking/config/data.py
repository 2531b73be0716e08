"""What a run reads: sources with a licence and a provenance, cleaning, the held-out split, the tokenizer.

Importable without torch. MAI-Thinking-1 report §2.4.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mai_thinking.config.base import ORDERED, Section, Share, Weight
from mai_thinking.config.names import nearest_name
from mai_thinking.config.tasks import SerialFamily

Category = Literal["code", "stem", "maths", "general", "multilingual"]
Provenance = Literal["human", "procedural", "own-model", "third-party-model"]

EMBEDDED_CORPORA = ("stdlib", "stdlib-tests", "scientific", "manuals", "docstrings", "exercises", "serial")
"""Corpora that every Python environment with this package already has; see `mai_thinking.data.embedded`."""
EMBEDDED_PARTS = ("package/", "docstrings/")
"""Before the name of any installed package: its modules, or their longer docstrings."""


_Items = Annotated[int, Field(ge=1, le=30)]


class SerialSection(Section):
    """`serial:` of the embedded corpus `serial`: exercises that need a step of work for each item."""

    families: tuple[SerialFamily, ...] = Field(default=("tally", "running", "cups", "chain"), min_length=1)
    """Each as likely as the others."""
    sizes: Annotated[tuple[_Items, _Items], ORDERED] = (2, 8)
    """Fewest and most items; each number as likely as the others."""
    p_cot: Share = 1.0
    """Share of the exercises whose working is shown; the others give the bare answer. Of `wording`: share that is
    answered as asked."""


class SourceSection(Section):
    """One source of documents."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Unique in the run; letters, digits, `.`, `_` and `-`."""
    kind: Literal["embedded", "jsonl", "parquet", "text", "hub"]
    """`embedded` needs no download; `hub` is a dataset's name on the Hugging Face Hub, read through `datasets`."""
    path: str = Field(min_length=1)
    """A file, a folder of such files, a Hub dataset's name, the name of an embedded corpus, or `package/NAME` or
    `docstrings/NAME` of an installed package."""
    category: Category
    """Where its tokens count in the mixture and in the evaluation."""
    licence: str = Field(min_length=1)
    """An SPDX expression, or words."""
    provenance: Provenance
    """Who wrote the text. `third-party-model` is always refused, `own-model` in pre-training."""
    weight: Weight
    """Share of the training tokens, relative to the other sources' weights."""
    text_field: str = "text"
    """The field or column that holds a document's text (JSONL, Parquet, Hub)."""
    split: str = "train"
    """The split of a Hub dataset."""
    subset: str | None = None
    """The configuration of a Hub dataset, where it has several."""
    streaming: bool = False
    """Train from the source directly instead of preparing tokens on disk: for sources larger than memory."""
    held_out: bool = True
    """Whether part of it is kept for evaluation."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Take whole documents, chosen by the hash of their text, up to this many bytes of UTF-8."""
    labels: dict[str, str] = Field(default={})
    """Of `cleaning.labels`: classifier → the label that a document must have. Two sources of one path and different
    labels give a mixture that weighs them."""
    serial: SerialSection | None = None
    """What the embedded corpus `serial` is made of; null: its defaults."""

    @property
    def endless(self) -> bool:
        """Whether it is made by rule and never ends."""
        return self.kind == "embedded" and self.path in ("exercises", "serial")

    @field_validator("provenance")
    @classmethod
    def _refuse_third_party(cls, provenance: Provenance) -> Provenance:
        if provenance == "third-party-model":
            raise ValueError("text written by somebody else's model is never trained on; remove this source")
        return provenance

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.kind == "embedded":
            if self.path not in EMBEDDED_CORPORA and not self.path.startswith(EMBEDDED_PARTS):
                fix = nearest_name(self.path, EMBEDDED_CORPORA)
                raise ValueError(f"source {self.name!r}: no embedded corpus {self.path!r}; {fix}")
            if self.endless and self.max_bytes is None:
                raise ValueError(f"source {self.name!r}: {self.path} goes on for ever; set `max_bytes`")
            if self.streaming:
                raise ValueError(f"source {self.name!r}: an embedded corpus is prepared; remove `streaming`")
        if self.serial is not None and (self.kind, self.path) != ("embedded", "serial"):
            raise ValueError(f"source {self.name!r}: `serial` is for the embedded corpus `serial`; remove it")
        if self.streaming and self.max_bytes is not None:
            raise ValueError(f"source {self.name!r}: `max_bytes` is for prepared sources; remove it or `streaming`")
        return self


class TokenizerSection(Section):
    """A byte-level BPE, trained on the training documents or taken from a former run."""

    vocab_size: int = Field(default=4096, ge=258, le=2**31)
    """Entries of a new tokenizer: 256 bytes, two special tokens, and merges. Without meaning if `path` is given."""
    path: str | None = None
    """A folder with a tokenizer to reuse, such as a former run's `final/`."""
    training_bytes: int = Field(default=16_000_000, gt=0)
    """At most this many bytes of training documents, drawn by the sources' weights, are read to learn merges."""


class QualitySection(Section):
    """A document outside any of these bounds is dropped, and counted under the rule's name."""

    min_bytes: int = Field(default=64, ge=0)
    """Shorter documents teach little: empty `__init__.py` files, stubs."""
    max_line: int = Field(default=2_000, gt=0)
    """Characters in the longest line; beyond it: data written as code, minified text."""
    min_alphabetic: float = Field(default=0.4, ge=0, le=1)
    """Share of letters among the characters that are not white space; below it: tables of numbers."""
    max_compression: float = Field(default=12.0, gt=1)
    """Size over zlib-compressed size; beyond it: generated tables, the same line over and over."""


class BoilerplateSection(Section):
    """Lines that stand in many documents, or over and over in one, are cut out (§2.4.3). In code, comments alone."""

    min_words: int = Field(default=6, ge=1)
    """Shorter lines are never cut: headings, brackets, a name."""
    across: int = Field(default=20, ge=1, lt=255)
    """In so many documents a line may stand."""
    within: int = Field(default=4, ge=1)
    """So often a line may stand in one document; beyond that, once."""


class TemplatesSection(Section):
    """Pages of one frame with other fillers. A page is reduced to its frequent runs of words, and compared (App. A)."""

    pages: int = Field(default=5, ge=2, le=255)
    """A run of words is frequent if it stands in so many documents."""
    frame: float = Field(default=0.25, gt=0, le=1)
    """The least share of frequent runs in a templated page."""
    similarity: float = Field(default=0.7, gt=0, lt=1)
    """Estimated Jaccard similarity of two frames, whatever the order of their parts, from which they are the same."""


class SemanticSection(Section):
    """Documents that say the same in other words, by embeddings that no third party's model made (App. A)."""

    dimensions: int = Field(default=64, ge=2)
    """Of the embeddings by which documents are clustered."""
    similarity: float = Field(default=0.6, gt=0, lt=1)
    """Cosine of two documents' weighted words from which they say the same."""
    representatives: int = Field(default=1, ge=1)
    """So many documents that lie close together are kept."""


class FuzzySection(Section):
    """Decontamination that forgives changed words (§2.4.4)."""

    ngram: int = Field(default=20, ge=8)
    """Consecutive words that are looked at."""
    share: float = Field(default=0.8, gt=0.5, le=1)
    """Training text that has this share of them in a row with little between is cut out."""


class CleaningSection(Section):
    """Deduplication, quality filters and decontamination. Every document dropped is counted per rule and source."""

    exact_duplicates: bool = True
    """Drop a document whose text (but for white space) was seen before, in any source."""
    near_duplicates: float | None = Field(default=0.7, gt=0, lt=1)
    """Estimated Jaccard similarity from which a document is a duplicate of an earlier one; null keeps them all."""
    minhash_permutations: int = Field(default=128, ge=16, multiple_of=16)
    """Length of a MinHash signature."""
    minhash_shingle: int = Field(default=5, ge=1)
    """Words per shingle."""
    quality: QualitySection = QualitySection()
    decontamination_ngram: int | None = Field(default=13, ge=2)
    """Training text that shares this many consecutive words with a held-out document is cut out; null leaves it."""
    fuzzy_decontamination: FuzzySection | None = None
    """Besides: what shares most of a run of words with a held-out document; null leaves it."""
    boilerplate: BoilerplateSection | None = None
    """Cut lines by their counts; null leaves them."""
    templates: TemplatesSection | None = None
    """Keep one page of each template; null keeps them all."""
    semantic: SemanticSection | None = None
    """Drop documents that say the same in other words; null keeps them. Needs the extra `corpus`."""
    labels: dict[str, dict[str, str]] = Field(default={})
    """Classifiers that are trained here (§2.4.3): name → label → a file of examples, as `benchmarks`. Every document
    gets one label of each; a source's `labels` says which of them it wants. Needs the extra `corpus`."""
    drop_order: tuple[str, ...] = ()
    """Names of sources, the highest rank first: what stands in two of them is dropped from the lower one. Sources that
    are not named follow, in the order of `sources`."""
    benchmarks: tuple[str, ...] = ()
    """More files to keep out of training: JSONL, JSON or text, also gzipped; every string in them counts."""


class HeldOutSection(Section):
    """How much of each source is kept for evaluation: whole documents, chosen by the hash of their text.

    The choice depends on neither weights nor seed, so that a later stage with another mixture keeps the same documents.
    """

    fraction: float = Field(default=0.05, gt=0, le=0.5)
    """At most this share of a source's bytes."""
    max_bytes: int = Field(default=400_000, gt=0)
    """At most this many bytes of a source. Of a streamed source: these many, from its head."""


def _embedded(name: str, category: Category, licence: str, weight: float, **more: Any) -> SourceSection:
    fields = {"provenance": "human", **more}
    return SourceSection(
        name=name, kind="embedded", path=name, category=category, licence=licence, weight=weight, **fields
    )


EMBEDDED_DEFAULT = (
    _embedded("stdlib", "code", "PSF-2.0", 45),
    # Not every distribution has the tests. Held-out code is the library itself, so that runs can be compared.
    _embedded("stdlib-tests", "code", "PSF-2.0", 10, held_out=False, max_bytes=8_000_000),
    _embedded("scientific", "stem", "BSD-3-Clause", 20, max_bytes=12_000_000),
    _embedded("exercises", "maths", "MIT", 10, provenance="procedural", max_bytes=4_000_000),
    _embedded("manuals", "general", "PSF-2.0", 5),
    _embedded("docstrings", "general", "BSD-3-Clause", 10),
)
"""The default mixture: in every Python environment, human-written or procedural, permissively licensed."""


class DataSection(Section):
    """Everything that decides which tokens a run sees."""

    sources: tuple[SourceSection, ...] = Field(default=EMBEDDED_DEFAULT, min_length=1)
    """Without any: `EMBEDDED_DEFAULT`."""
    tokenizer: TokenizerSection = TokenizerSection()
    cleaning: CleaningSection = CleaningSection()
    held_out: HeldOutSection = HeldOutSection()
    down_sample: float = Field(default=1.0, gt=0, le=1)
    """Share of each source's training tokens that is read: whole documents in the order of their hashes, so that a
    smaller share is part of every larger one. Tokenizer and held-out text stay as they are (§2.4.5)."""
    cache_dir: str = "~/.cache/mai_thinking"
    """Prepared data is kept below this folder, one folder per content."""
    ray: str | None = None
    """The address of a Ray cluster whose machines prepare it (`auto`: this machine's) and see `cache_dir` at the same
    path; None: processes here."""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.down_sample < 1 and any(source.streaming for source in self.sources):
            raise ValueError("down_sample: a stream's size is not known; remove it, or the sources' `streaming`")
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}; give each its own name")
        for name in self.cleaning.drop_order:
            if name not in names:
                raise ValueError(f"cleaning.drop_order: no source is called {name!r}; {nearest_name(name, names)}")
        for source in self.sources:
            for classifier, label in source.labels.items():
                known = self.cleaning.labels.get(classifier, {})
                if label not in known:
                    where = f"source {source.name!r}: labels: {classifier}: {label!r}"
                    raise ValueError(f"{where} is no label of `cleaning.labels`; it has {sorted(known) or 'none'}")
                if source.streaming:
                    raise ValueError(f"source {source.name!r}: `labels` are for prepared sources; remove `streaming`")
        return self
