"""A mixture search: small models on sampled mixtures, a regression, finals (MAI-Thinking-1 report §2.5.2–2.5.4).

The start is the first small model, and the reference that all scores are normalised by (Eq. 3). When all small models
are done each worker comes to the same proposal, and the finals of three mixtures are trained at more compute: the
start, the proposal, and the best of the sampled ones, which is random search with the same number of small models.
"""

import json
from collections.abc import Callable, Container
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from mai_thinking.config.loading import save_config
from mai_thinking.config.mixture import MixtureConfig
from mai_thinking.config.storage import atomic_file
from mai_thinking.data import prepare
from mai_thinking.errors import RunError
from mai_thinking.experiments.mixture_space import Array, MixtureSpace, Regression
from mai_thinking.experiments.queue import WorkQueue
from mai_thinking.experiments.runs import PlannedRun, plan_table, share_tokenizer, work
from mai_thinking.training.evaluation import Reference, reference_of, weighted_score
from mai_thinking.training.metrics import read_metrics
from mai_thinking.training.model_files import load_model_and_tokenizer

FINALS = ("start", "proposed", "random-search")
SCORE, MEMORISED, REFERENCE = "normalised", "memorised/", "reference.json"


@dataclass(frozen=True)
class Result:
    """A finished run."""

    name: str
    shares: dict[str, float]
    scores: dict[str, float]
    """`normalised` and its categories; of finals `unseen` too. Lower is better; the small start has 1."""
    bits: dict[str, float]
    """Bits per byte, weighted and by category."""
    memorised: dict[str, float]
    """Share of tokens of NLL < 0.01: of each source's training text, and `held_out`."""


@dataclass(frozen=True)
class Search:
    """All that is known at the end."""

    config: MixtureConfig
    samples: list[Result]
    regression: Regression
    predicted: float
    """The proposal's score at the small models' size."""
    finals: dict[str, list[Result]]


def run_mixture(config: MixtureConfig, *, dry_run: bool = False, report: Callable[[Search], str] | None = None) -> int:
    """Work on the search until it is done; returns the exit code. Any number of processes may share its folder."""
    config.folder.mkdir(parents=True, exist_ok=True)
    prepared = prepare(config.data, log=print)
    share_tokenizer(config.folder, prepared)
    unique = {name: len(source.tokens) for name, source in prepared.sources.items()}
    space = MixtureSpace.of(config.start, unique, config.target_tokens, config.max_epochs)
    drawn_MS = space.draw(config.samples - 1, config.spread, np.random.default_rng([config.seed, 1]))
    first, *rest = [_small_run(config, number, shares) for number, shares in enumerate((space.start_S, *drawn_MS))]
    if dry_run:
        finals = [run for name in FINALS for run in _final_runs(config, name, space.start_S)]
        print(plan_table([first, *rest, *finals]))
        return 0
    with atomic_file(config.folder / "config.yaml") as path:
        save_config(config, path)
    if code := work(config.folder, [first], told=_told, wait=True):
        return code
    reference = _reference(config, first)
    if code := work(config.folder, rest, told=_told, wait=True):
        return code
    samples = [_result(config, run, reference) for run in (first, *rest)]
    shares_MS = np.array([list(one.shares.values()) for one in samples])
    scores_M = np.array([one.scores[SCORE] for one in samples])
    regression = Regression.fit(shares_MS, scores_M, seed=config.seed)
    proposed_S = space.propose(regression, config.spread, np.random.default_rng(config.seed))
    chosen = (shares_MS[0], proposed_S, shares_MS[1 + scores_M[1:].argmin()])
    runs = {name: _final_runs(config, name, shares_S) for name, shares_S in zip(FINALS, chosen, strict=True)}
    if code := work(
        config.folder, [run for trio in zip(*runs.values(), strict=True) for run in trio], told=_told, wait=True
    ):
        return code
    results = {name: [_result(config, run, reference) for run in own] for name, own in runs.items()}
    predicted = float(regression.predict(proposed_S[None])[0])
    if report is not None:
        print(report(Search(config, samples, regression, predicted, results)))
    return 0


def _small_run(config: MixtureConfig, number: int, shares_S: Array) -> PlannedRun:
    """The start's, number 0, makes the reference; all others are evaluated by it."""
    name, reference = f"sample-{number:03d}", str(config.folder / REFERENCE) if number else None
    run = config.run_config(name, shares_S, seed=config.seed, steps=config.steps, reference=reference)
    return PlannedRun("sample", run)


def _final_runs(config: MixtureConfig, variant: str, shares_S: Array) -> list[PlannedRun]:
    """Their seeds are not the small models'."""
    runs = []
    for seed in range(1, config.final_seeds + 1):
        name, reference = f"final-{variant}-s{seed}", str(config.folder / REFERENCE)
        steps = config.final_steps
        run = config.run_config(name, shares_S, seed=config.seed + seed, steps=steps, reference=reference)
        runs.append(PlannedRun(variant, run))
    return runs


def _reference(config: MixtureConfig, first: PlannedRun) -> Reference:
    """The small start's losses on all held-out sets, those of unseen packages too; made once, then fixed."""
    path = config.folder / REFERENCE
    with WorkQueue(config.folder).planning():
        if not path.exists():
            _losses(config, first).write(path)
    return Reference.read(path)


def _losses(config: MixtureConfig, run: PlannedRun, only: Container[str] | None = None) -> Reference:
    """Of a finished run, on all held-out sets, or those of some sources."""
    model, tokenizer = load_model_and_tokenizer(str(run.folder.final))
    data = prepare(config.unseen_data(), log=print)
    return reference_of(model, tokenizer, data, batch_size=run.config.evaluation.batch_size, only=only)


def _result(config: MixtureConfig, run: PlannedRun, reference: Reference) -> Result:
    """From the run's records; the start has no normalised score of its own, since all are normalised by it."""
    last = read_metrics(run.folder.path)[1][-1]
    bits = {name: value for name, value in last.items() if name.split("/")[0] == "bits_per_byte"}
    scores = {name: value for name, value in last.items() if name.split("/")[0] == SCORE}
    scores = scores or {name.replace("bits_per_byte", SCORE): 1.0 for name in bits}
    memorised = {name.removeprefix(MEMORISED): value for name, value in last.items() if name.startswith(MEMORISED)}
    if run.variant in FINALS and config.unseen:
        scores["unseen"] = _unseen_score(config, run, reference)
    total = sum(source.weight for source in run.config.data.sources)
    shares = {source.name: source.weight / total for source in run.config.data.sources}
    return Result(run.name, shares, scores, bits, memorised)


def _unseen_score(config: MixtureConfig, run: PlannedRun, reference: Reference) -> float:
    """Eq. 3 on the packages that nothing was trained on; computed once, and noted in the run's folder."""
    notes = json.loads(run.folder.notes.read_bytes())
    if "unseen" not in notes:
        categories = {source.name: source.category for source in config.unseen}
        ratios: dict[str, list[float]] = {}
        for name, loss in _losses(config, run, categories).sets.items():
            ratios.setdefault(categories[name.split("/")[0]], []).append(loss.nats / reference.sets[name].nats)
        if not ratios:
            raise RunError("unseen: none of these sources has held-out text; give them more")
        notes["unseen"] = weighted_score({category: fmean(values) for category, values in ratios.items()})
        run.folder.note(unseen=notes["unseen"])
    return float(notes["unseen"])


def _told(run: PlannedRun) -> str:
    last = read_metrics(run.folder.path)[1][-1]
    mixture = ", ".join(f"{source.name} {source.weight:.1f}" for source in run.config.data.sources)
    heart = {name.removeprefix(MEMORISED): value for name, value in last.items() if name.startswith(MEMORISED)}
    held_out = heart.pop("held_out", 0.0)
    return (
        f"{run.name}: score {last.get(SCORE, 1.0):.4f}, {last['bits_per_byte']:.4f} bits per byte; by heart at most "
        f"{max(heart.values(), default=0.0):.1%} of a source, {held_out:.1%} of held-out text ({mixture})"
    )
