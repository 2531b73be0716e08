"""Has the run collapsed? Its signs, each against the run's own history (MAI-Thinking-1 report §3.1.4).

The report recovers from a collapse by self-distillation and not by rolling back, because "the damage is older than the
visible drop". So two questions are asked after every step: has it collapsed, and since when?

*Harm* is that fewer problems are solved than at the best: x is the share solved of all problems drawn to fill the
buffer, m the best level so far. The sum (CUSUM, Page 1954) of the log-likelihood ratio of a loss δ against none finds a
sudden fall and slow rot alike, as fast as the noise allows. Each of the k steps that learn from a filling of n problems
is a reading, with its own pass rate and n/k problems:

    S ← max(S + δ/σ² · (m − x − δ/2), 0)        δ = max(gained/2, m/5)        σ² = v·k/n + min(0.4 δ, 0.05)²

v is the variance among the problems. The rest of σ² stands for a healthy policy's own ups and downs, which last some
steps: then many problems say hardly more than few.

Problems that nobody can solve, and easy ones that drop out, change nothing in it. *Signs* of other kinds (entropy, the
gradient's norm, mismatch, repetition) are compared with the median m of their last readings, in spreads s, their median
absolute deviation made comparable to a standard deviation and never less than the smallest change that would matter:

    z = ±(x − m)/s        C ← max(C + min(z, 6) − ½, 0)

so that one wild reading counts little and a lasting change much, until half a window has made it usual: entropy may go
where the run takes it. Signs alone are no collapse; in their company less harm is enough for the verdict:

    S · (1 + Σ C / (2.5 · threshold)) ≥ threshold        C ≤ 2.5 · threshold, so that a sign at most adds as much again

The verdict is *starved* when the engine's newest weights find next to no problem to learn from where earlier ones did,
and more of them have become too hard than too easy: then no further step would ever come.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mai_thinking.config.grpo import CollapseSection
from mai_thinking.config.storage import atomic_file
from mai_thinking.rl.problem_filter import DROPPED, FilterCounts

_LARGEST_Z, _DRIFT = 6.0, 0.5
_MOST = 2.5
"""Times the threshold: no score is higher, so that what has passed is forgotten."""
_MOST_OF_FILLING = 0.5
"""Times the threshold: one filling is no collapse."""
_LEVEL_PROBLEMS = 800
"""Over so many a level of the share solved is a mean: few enough to follow a run."""
_CAUTION = 0.5
"""Standard errors below its estimate at which a level counts."""
_LOST_OF_GAIN, _LOST_OF_LEVEL, _WANDERS, _WANDERS_AT_MOST = 0.5, 0.2, 0.4, 0.05
_LEAST_VARIANCE = 0.02
"""Of one problem: where next to none or all are solved, it is known too badly."""
_NATS = 2.6
"""What counts one in the score of harm."""
_GRAM, _SHORTEST_LOOP = 4, 16
_STARVED_LOG_ODDS = math.log(1e9)

# Sign → field of the step record; +1 where more is worse, −1 where less is; s is never less; whether of its logarithm.
SIGNS = {
    "entropy_low": ("entropy", (-1, 0.25, True)),
    "entropy_high": ("entropy", (+1, 0.25, True)),
    "grad_norm": ("grad_norm", (+1, 0.4, True)),
    "mismatch": ("mismatch", (+1, 0.7, True)),
    "repetition": ("repetition", (+1, 0.05, False)),
}

COLLAPSE = "collapse.json"
"""In the folder of a run that was stopped as collapsed: the fields of its `Collapse`."""


@dataclass(frozen=True)
class Collapse:
    """Why a run stops; `collapse.json` in its folder."""

    step: int
    """The last step that was done."""
    last_good_step: int
    """The last step whose weights were as usual by every sign that led to the verdict."""
    verdict: str
    """`collapsed` or `starved`."""
    evidence: dict[str, Any]
    """Sign → its `value`, what was `usual`, the `spread` and the `score` when that was highest, the step `since` which
    it was off, and its own `last_good_step`."""

    def __str__(self) -> str:
        """One line."""
        parts = [
            f"{name} {found['value']:.3g} where {found['usual']:.3g} is usual, since step {found['since']}"
            for name, found in self.evidence.items()
        ]
        return f"{self.verdict} after step {self.step}: {'; '.join(parts)}. Last good step: {self.last_good_step}"


def read_verdict(run: Path) -> Collapse | None:
    """Of the run in folder `run`, if it has collapsed."""
    path = run / COLLAPSE
    return Collapse(**json.loads(path.read_text())) if path.is_file() else None


def write_verdict(run: Path, verdict: Collapse | None) -> None:
    """Into the run's folder, where the next stage looks for it."""
    assert verdict is not None
    with atomic_file(run / COLLAPSE) as path:
        path.write_text(json.dumps(asdict(verdict), indent=2) + "\n")


class CollapseDetector:
    """Takes every step's record in. All its state is plain numbers; the same records give the same verdict, however
    often the run was interrupted, and on every rank, since records hold sums over all of them."""

    def __init__(self, section: CollapseSection) -> None:
        self.section = section
        self.verdict: Collapse | None = None
        """Once there is one, it stays."""
        self._solved = _Solved()
        self._signs = {name: _Sign() for name in SIGNS}
        self._fillings: deque[tuple[int, int, int, int]] = deque(maxlen=section.window)
        """Step, problems drawn, kept and too hard."""

    def update(self, record: Mapping[str, Any]) -> Collapse | None:
        """Take in the record of the step just done; the verdict, if that is what it comes to."""
        step, threshold = record["step"], self.section.threshold
        for name, (number, kind) in SIGNS.items():
            if (value := record.get(number)) is not None:
                self._signs[name].take(self.section, step, float(value), *kind)
        if "groups_kept" in record:
            counts = FilterCounts(
                kept=record["groups_kept"], **{rule: record[f"groups_dropped/{rule}"] for rule in DROPPED}
            )
            self._solved.fill(step, counts)
            if (drawn := _drawn(counts))[0]:
                self._fillings.append((step, *drawn))
        self._solved.take(self.section, step, record["pass_rate"])
        company = sum(sign.score for sign in self._signs.values()) / (_MOST * threshold)
        if self.verdict is None and self._solved.score * (1 + company) >= threshold:
            self._conclude(step, "collapsed", {"solved": self._solved.evidence} | self._alarms())
        return self.verdict

    def _alarms(self) -> dict[str, Any]:
        """The evidence of the signs whose score is at half the threshold."""
        return {name: sign.evidence for name, sign in self._signs.items() if 2 * sign.score >= self.section.threshold}

    def _conclude(self, step: int, verdict: str, evidence: dict[str, Any]) -> Collapse:
        last_good = min(found["last_good_step"] for found in evidence.values())
        self.verdict = Collapse(step, last_good, verdict, evidence)
        return self.verdict

    def hopeless(self, counts: FilterCounts) -> bool:
        """Whether filling the buffer had better be given up: of the problems drawn for it so far less than a fifth of
        the usual share is within reach, more of the others became too hard than too easy, and if nothing had changed
        that would be less likely than 1 in 10⁹ (by the likelihood ratio of two coins against one). Never in the first
        filling, before which nothing is usual."""
        (drawn, kept, _), (before, kept_before, _) = _drawn(counts), self._drawn_before()
        if not drawn or not before:
            return False
        one = (kept + kept_before) / (drawn + before)
        surprise = drawn * _divergence(kept / drawn, one) + before * _divergence(kept_before / before, one)
        return kept / drawn < kept_before / before / 5 and surprise > _STARVED_LOG_ODDS and self.harder(counts)

    def harder(self, counts: FilterCounts) -> bool:
        """Whether of the problems that are no longer within reach more became too hard than too easy."""
        (drawn, kept, hard), (before, kept_before, hard_before) = _drawn(counts), self._drawn_before()
        if not drawn or not before:
            return False
        return hard / drawn - hard_before / before > (kept_before / before - kept / drawn) / 2

    def starve(self, step: int, counts: FilterCounts) -> Collapse:
        """The verdict after `step`, when a buffer could not be filled, from the counts of all ranks."""
        (drawn, kept, _), (before, kept_before, _) = _drawn(counts), self._drawn_before()
        found = {
            "value": kept / max(1, drawn), "usual": kept_before / max(1, before),
            "drawn": drawn, "drawn_before": before,
            # The engine's weights of the last filling could still find problems.
            "since": step + 1, "last_good_step": self._fillings[-1][0] - 1 if self._fillings else step,
        }  # fmt: skip
        solved = {"solved": self._solved.evidence} if self._solved.score >= self.section.threshold else {}
        return self._conclude(step, "starved", self._alarms() | {"within_reach": found} | solved)

    def _drawn_before(self) -> tuple[int, int, int]:
        """`_drawn` of the last `window` fillings."""
        drawn, kept, hard = (sum(filling[column] for filling in self._fillings) for column in (1, 2, 3))
        return drawn, kept, hard

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "solved": asdict(self._solved),
            "signs": {name: asdict(sign) for name, sign in self._signs.items()},
            "fillings": [list(filling) for filling in self._fillings],
            "verdict": asdict(self.verdict) if self.verdict else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._solved = _Solved(**state["solved"])
        self._signs = {name: _Sign(**state["signs"][name]) for name in SIGNS}
        self._fillings.extend(map(tuple, state["fillings"]))
        self.verdict = Collapse(**state["verdict"]) if state["verdict"] else None


@dataclass
class _Sum:
    """A sum of excesses, 0 while all is usual. Its fields are its state."""

    score: float = 0.0
    last_good_step: int = 0
    """The step whose weights gave the last reading with a score of 0: a record's numbers are of the weights before
    its step."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """Since the score was last 0, of when it was highest."""
    history: list[Any] = field(default_factory=list)

    def add(
        self, section: CollapseSection, step: int, excess: float, value: float, usual: float, spread: float
    ) -> None:
        self.score = min(max(self.score + excess, 0.0), _MOST * section.threshold)
        if self.score == 0.0:
            self.last_good_step, self.evidence = step - 1, {}
        elif self.score > self.evidence.get("score", 0.0):
            found = {"value": value, "usual": usual, "spread": spread, "score": self.score}
            since = self.evidence.get("since", step)
            self.evidence = {**found, "since": since, "last_good_step": self.last_good_step}


class _Sign(_Sum):
    """How far one number of the step record is from its usual value."""

    def take(
        self, section: CollapseSection, step: int, value: float, worse: int, least_spread: float, logarithmic: bool
    ) -> None:
        """Take in a reading."""
        x = math.log(max(value, 1e-9)) if logarithmic else value
        if len(self.history) >= section.warmup:
            median = statistics.median(self.history)
            deviation = 1.4826 * statistics.median(abs(old - median) for old in self.history)
            spread = max(least_spread, deviation)
            usual = math.exp(median) if logarithmic else median
            self.add(section, step, min(worse * (x - median) / spread, _LARGEST_Z) - _DRIFT, value, usual, spread)
        else:
            self.last_good_step = step - 1
        self.history = [*self.history, x][-section.window :]


@dataclass
class _Solved(_Sum):
    """How much of the best share of problems solved is lost."""

    filling: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Problems drawn, kept and too easy in the last."""
    filled: int = 0
    """The step that it was for."""
    steps_per_filling: int = 1
    fillings: int = 0
    first: float | None = None
    best: float = 0.0

    def fill(self, step: int, counts: FilterCounts) -> None:
        """Before the step that first learns from these."""
        drawn, kept, hard = _drawn(counts)
        self.filling = [drawn, kept, drawn - kept - hard]
        self.steps_per_filling = step - self.filled if self.filled else 1
        self.filled = step
        self.fillings += drawn > 0

    def take(self, section: CollapseSection, step: int, pass_rate: float) -> None:
        """Take in the pass rate of a step's groups, of the problems within reach."""
        drawn, kept, easy = self.filling
        if not drawn:
            return
        share, problems = (easy + kept * pass_rate) / drawn, drawn / self.steps_per_filling
        if self.first is None:
            self.last_good_step = step - 1
        else:
            loss = max(_LOST_OF_GAIN * (self.best - self.first), _LOST_OF_LEVEL * self.best)
            variance = max((easy + kept * pass_rate**2) / drawn - share**2, _LEAST_VARIANCE)
            spread = math.hypot(math.sqrt(variance / problems), min(_WANDERS * loss, _WANDERS_AT_MOST))
            excess = loss / spread**2 * (self.best - share - loss / 2) / _NATS
            most = _MOST_OF_FILLING * section.threshold / self.steps_per_filling
            self.add(section, step, min(excess, most), share, self.best, spread)
        self.history.append([share, problems])
        total = sum(problems for _, problems in self.history)
        while total - self.history[0][1] >= _LEVEL_PROBLEMS:
            total -= self.history.pop(0)[1]
        if self.fillings >= section.warmup:
            level = sum(share * problems for share, problems in self.history) / total
            self.first = level if self.first is None else self.first
            self.best = max(self.best, level - _CAUTION * math.sqrt(level * (1 - level) / total))


def is_repetitive(response_ids: Sequence[int] | np.ndarray) -> bool:
    """Whether a response goes round in a loop: more than half of its runs of 4 tokens occurred in it before. One of
    fewer than 16 tokens never does."""
    ids = list(map(int, response_ids))
    return len(ids) >= _SHORTEST_LOOP and repetition(ids, _GRAM) > 0.5


def repetition(ids: Sequence[int], size: int) -> float:
    """Share of the runs of `size` tokens that occurred before in the same response; 0 of a response that is too
    short."""
    runs = list(zip(*(ids[offset:] for offset in range(size)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _drawn(counts: FilterCounts) -> tuple[int, int, int]:
    """Problems drawn, kept and too hard."""
    hard = counts["early_too_hard"] + counts["too_hard"]
    return counts["kept"] + hard + counts["early_too_easy"] + counts["too_easy"], counts["kept"], hard


def _divergence(share: float, usual: float) -> float:
    """KL(share ‖ usual) of two coins, in nats."""
    pairs = ((share, usual), (1 - share, 1 - usual))
    return sum(p * math.log(p / q) if q > 0 else math.inf for p, q in pairs if p > 0)
