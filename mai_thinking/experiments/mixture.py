"""A mixture search: small models on sampled mixtures, a regression, finals (MAI-Thinking-1 report §2.5.2–2.5.4).

The start is the first small model, and the reference that all scores are normalised by (Eq. 3). When all small models
are done each worker comes to the same proposal, and the finals of three mixtures are trained at more compute: the
start, the proposal, and the best of the sampled ones, which is random search with the same number of small models.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from mai_thinking.config.loading import save_config
from mai_thinking.config.mixture import MixtureConfig, seeds_of
from mai_thinking.config.storage import atomic_file, atomic_folder
from mai_thinking.data import PreparedData, prepare
from mai_thinking.errors import RunError
from mai_thinking.experiments.ladder_plan import PlannedRun, plan_table
from mai_thinking.experiments.mixture_space import Array, MixtureSpace, Regression
from mai_thinking.experiments.queue import WorkQueue
from mai_thinking.experiments.workers import work
from mai_thinking.training.evaluation import Reference, reference_of
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model_and_tokenizer, model_config

FINALS = ("start", "proposed", "random-search")
SCORE, MEMORISED = "normalised", "memorised/"


@dataclass(frozen=True)
class Result:
    """A finished run."""

    name: str
    seed: int
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
    proposed: dict[str, float]
    predicted: float
    """The proposal's score at the small models' size."""
    finals: dict[str, list[Result]]


def run_mixture(config: MixtureConfig, *, dry_run: bool = False, report: Callable[[Search], str] | None = None) -> int:
    """Work on the search until it is done; returns the exit code. Any number of processes may share its folder."""
    config.folder.mkdir(parents=True, exist_ok=True)
    prepared = _with_tokenizer(config)
    unique = {name: len(source.tokens) for name, source in prepared.sources.items()}
    space = MixtureSpace.of(config.start, unique, config.target_tokens, config.max_epochs)
    mixtures = _sampled(config, space)
    first, rest = _small_runs(config, mixtures)
    if dry_run:
        finals = [run for name in FINALS for run in _final_runs(config, name, mixtures[0])]
        print(plan_table([first, *rest, *finals]))
        return 0
    with atomic_file(config.folder / "config.yaml") as path:
        save_config(config, path)
    told = partial(_told, config)
    if code := work(config.folder, [first], told=told, wait=True):
        return code
    reference = _reference(config, first)
    if code := work(config.folder, rest, told=told, wait=True):
        return code
    samples = [_result(config, run, reference) for run in (first, *rest)]
    shares_MS = np.array([list(one.shares.values()) for one in samples])
    scores_M = np.array([one.scores[SCORE] for one in samples])
    regression = Regression.fit(shares_MS, scores_M, seed=config.seed)
    proposed_S = space.propose(regression, config.spread, np.random.default_rng(config.seed))
    chosen = dict(zip(FINALS, (shares_MS[0], proposed_S, shares_MS[1 + scores_M[1:].argmin()]), strict=True))
    runs = {name: _final_runs(config, name, _named(config, shares_S)) for name, shares_S in chosen.items()}
    if code := work(
        config.folder, [run for trio in zip(*runs.values(), strict=True) for run in trio], told=told, wait=True
    ):
        return code
    results = {name: [_result(config, run, reference) for run in own] for name, own in runs.items()}
    predicted = float(regression.predict(proposed_S[None])[0])
    search = Search(config, samples, regression, _named(config, proposed_S), predicted, results)
    if report is not None:
        print(report(search))
    return 0


# -------------------------------------------------------------------------------------------------------------- runs


def _with_tokenizer(config: MixtureConfig) -> PreparedData:
    """The start's data; its tokenizer is everybody's, and so that it can be found it is copied into the folder."""
    prepared = prepare(config.data, log=print)
    shared = config.folder / "tokenizer"
    with WorkQueue(config.folder).planning():
        if not shared.exists():
            with atomic_folder(shared) as path:
                prepared.tokenizer.save_pretrained(path)
    return prepared


def _sampled(config: MixtureConfig, space: MixtureSpace) -> list[dict[str, float]]:
    drawn_MS = space.draw(config.samples - 1, config.spread, np.random.default_rng([config.seed, 1]))
    return [_named(config, shares_S) for shares_S in (space.start_S, *drawn_MS)]


def _named(config: MixtureConfig, shares_S: Array) -> dict[str, float]:
    return {name: float(share) for name, share in zip(config.start, shares_S, strict=True)}


def _small_runs(config: MixtureConfig, mixtures: list[dict[str, float]]) -> tuple[PlannedRun, list[PlannedRun]]:
    """The start's, which makes the reference, and all others, which are evaluated by it."""
    reference = str(config.folder / "reference.json")
    runs = [
        _planned(config, "sample", f"sample-{number:03d}", shares, 0, config.steps, reference if number else None)
        for number, shares in enumerate(mixtures)
    ]
    return runs[0], runs[1:]


def _final_runs(config: MixtureConfig, name: str, shares: dict[str, float]) -> list[PlannedRun]:
    reference = str(config.folder / "reference.json")
    return [
        _planned(config, name, f"final-{name}-s{seed}", shares, seed, config.final_steps, reference)
        for seed in seeds_of(config.final_seeds)
    ]


def _planned(
    config: MixtureConfig,
    variant: str,
    name: str,
    shares: dict[str, float],
    seed: int,
    steps: int,
    reference: str | None,
) -> PlannedRun:
    run = config.run_config(name, shares, seed=config.seed + seed, steps=steps, reference=reference)
    architecture = model_config(run)
    flops = architecture.flops_per_token(run.batch.context_length) * steps * run.batch.tokens_per_step
    return PlannedRun(variant, architecture.num_hidden_layers, seed, run, *architecture.parameter_counts(), flops)


# ----------------------------------------------------------------------------------------------------------- results


def _reference(config: MixtureConfig, first: PlannedRun) -> Reference:
    """The small start's losses on all held-out sets, those of unseen packages too; made once, then fixed."""
    path = config.folder / "reference.json"
    with WorkQueue(config.folder).planning():
        if not path.exists():
            model, tokenizer = load_model_and_tokenizer(str(first.folder.final))
            data = prepare(config.unseen_data(), log=print)
            reference_of(model, tokenizer, data, batch_size=first.config.evaluation.batch_size).write(path)
    return Reference.read(path)


def _result(config: MixtureConfig, run: PlannedRun, reference: Reference) -> Result:
    """From the run's records; the start has no normalised score of its own, since all are normalised by it."""
    last = [record for record in read_records(run.folder.metrics) if record.get("kind") == "evaluation"][-1]
    bits = {name: value for name, value in last.items() if name.split("/")[0] == "bits_per_byte"}
    scores = {name: value for name, value in last.items() if name.split("/")[0] == SCORE}
    scores = scores or {name.replace("bits_per_byte", SCORE): 1.0 for name in bits}
    memorised = {name.removeprefix(MEMORISED): value for name, value in last.items() if name.startswith(MEMORISED)}
    if run.variant in FINALS and config.unseen:
        scores["unseen"] = _unseen_score(config, run, reference)
    total = sum(source.weight for source in run.config.data.sources)
    shares = {source.name: source.weight / total for source in run.config.data.sources}
    return Result(run.name, run.seed, shares, scores, bits, memorised)


def _unseen_score(config: MixtureConfig, run: PlannedRun, reference: Reference) -> float:
    """Eq. 3 on the packages that nothing was trained on; computed once, and noted in the run's folder."""
    notes = json.loads(run.folder.notes.read_bytes())
    if "unseen" not in notes:
        model, tokenizer = load_model_and_tokenizer(str(run.folder.final))
        data = prepare(config.unseen_data(), log=print)
        found = reference_of(model, tokenizer, data, batch_size=run.config.evaluation.batch_size)
        names = [name for name in found.sets if name.split("/")[0] in {source.name for source in config.unseen}]
        if not names:
            raise RunError("unseen: none of these sources has held-out text; give them more")
        notes["unseen"] = float(np.mean([found.sets[name][1] / reference.sets[name][1] for name in names]))
        run.folder.note(unseen=notes["unseen"])
    return float(notes["unseen"])


def _told(config: MixtureConfig, run: PlannedRun) -> str:
    last = [record for record in read_records(run.folder.metrics) if record.get("kind") == "evaluation"][-1]
    shares: Mapping[str, float] = {source.name: source.weight for source in run.config.data.sources}
    mixture = ", ".join(f"{name} {share:.1f}" for name, share in shares.items())
    heart = {name: value for name, value in last.items() if name.startswith(MEMORISED)}
    known = max((value for name, value in heart.items() if not name.endswith("held_out")), default=0.0)
    return (
        f"{run.name}: score {last.get(SCORE, 1.0):.4f}, {last['bits_per_byte']:.4f} bits per byte; by heart at most "
        f"{known:.1%} of a source, {heart.get(MEMORISED + 'held_out', 0.0):.1%} of held-out text ({mixture})"
    )
