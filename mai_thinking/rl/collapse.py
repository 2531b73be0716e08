"""Has the run collapsed? Its signs, each against the run's own history (MAI-Thinking-1 report §3.1.4).

The report recovers from a collapse by self-distillation and not by rolling back, because "the damage is older than the
visible drop". So two questions are asked after every step: has it collapsed, and since when?

*Harm* is that fewer problems are solved than at the best: x is the share solved of all problems drawn to fill the
buffer, m the best level so far (a mean over some fillings, less its standard error). The sum (CUSUM, Page 1954) of the
log-likelihood ratio of a loss δ against none finds a sudden fall and slow rot alike, as fast as the noise σ allows:

    S ← max(S + δ/σ² · (m − x − δ/2), 0)        δ = 0.4 of what was gained, or 0.2 of m        σ² = m(1 − m)/problems

Problems that nobody can solve, and easy ones that drop out, change nothing in it. *Signs* of other kinds (entropy, the
gradient's norm, mismatch, repetition) are compared with the median m of their last readings, in spreads s, their median
absolute deviation made comparable to a standard deviation and never less than the smallest change that would matter:

    z = ±(x − m)/s        S ← max(S + min(z, 6) − 1, 0)        alarm: S ≥ threshold

so that one wild reading is no alarm and a lasting change is, until half a window has made it usual: entropy may go
where the climb takes it. A sign alone is no collapse; in company of one, less harm is enough for the verdict.

The verdict is *starved* when the engine's newest weights find next to no problem to learn from where earlier ones did,
and more of them have become too hard than too easy: then no further step would ever come.
"""

import json
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mai_thinking.config.grpo import CollapseSection
from mai_thinking.config.storage import atomic_file
from mai_thinking.rl.problem_filter import FilterCounts

_LARGEST_EXCESS, _DRIFT = 6.0, 1.0
_LEVEL_PROBLEMS = 400
"""Over so many a level of the share solved is a mean: few enough to follow a climb."""
_CAUTION = 1.0
"""Standard errors below its estimate at which a level counts."""
_LOST_OF_GAIN, _LOST_OF_LEVEL = 0.4, 0.2
_LEAST_VARIANCE = 0.02
"""Of one problem: where next to none or all are solved, m(1 − m) is known too badly."""
_NATS, _ALONE = 1.4, 1.25
"""What counts one in the score of harm, and how many times the threshold harm needs without a sign's company: at the
default 8.4 and 10.5 nats, odds of 4,000 and 36,000 to 1."""
_GRAM, _SHORTEST_LOOP = 4, 16
_STARVED_LOG_ODDS = math.log(1e9)


@dataclass(frozen=True)
class _Kind:
    """What is looked at for a sign."""

    field: str
    """Of the step record."""
    worse: int
    """+1 where more is worse, −1 where less is."""
    least_spread: float
    """s is never less: in natural logarithms where `logarithmic`."""
    logarithmic: bool = True


SIGNS = {
    "entropy_low": _Kind("entropy", -1, 0.25),
    "entropy_high": _Kind("entropy", +1, 0.25),
    "grad_norm": _Kind("grad_norm", +1, 0.4),
    "mismatch": _Kind("mismatch", +1, 0.7),
    "repetition": _Kind("repetition", +1, 0.05, logarithmic=False),
}


COLLAPSE = "collapse.json"
"""In the folder of a run that was stopped as collapsed: the fields of its `Verdict`."""


@dataclass(frozen=True)
class Verdict:
    """Why a run stops; `collapse.json` in its folder."""

    step: int
    """The last step that was done."""
    last_good_step: int
    """The last step whose weights were as usual by every sign that led to the verdict."""
    verdict: str
    """`collapsed` or `starved`."""
    evidence: dict[str, Any]
    """Sign → its `value`, what was `usual`, the `spread` s and the `score` S when that was highest; the step `since`
    which it was off, its own `last_good_step`, and the `step` of its last alarm."""

    def __str__(self) -> str:
        """One line."""
        parts = [
            f"{name} {found['value']:.3g} where {found['usual']:.3g} is usual, since step {found['since']}"
            for name, found in self.evidence.items()
        ]
        return f"{self.verdict} after step {self.step}: {'; '.join(parts)}. Last good step: {self.last_good_step}"


def read_verdict(run: Path) -> Verdict | None:
    """Of the run in folder `run`, if it has collapsed."""
    path = run / COLLAPSE
    return Verdict(**json.loads(path.read_text())) if path.is_file() else None


def write_verdict(run: Path, verdict: Verdict | None) -> None:
    """Into the run's folder, where the next stage looks for it."""
    assert verdict is not None
    with atomic_file(run / COLLAPSE) as path:
        path.write_text(json.dumps(asdict(verdict), indent=2) + "\n")


class CollapseDetector:
    """Takes every step's record in. All its state is plain numbers; the same records give the same verdict, however
    often the run was interrupted, and on every rank, since records hold sums over all of them."""

    def __init__(self, section: CollapseSection) -> None:
        self.section = section
        self.verdict: Verdict | None = None
        """Once there is one, it stays."""
        self._solved = _Solved(section)
        self._signs = {name: _Sign(kind, section) for name, kind in SIGNS.items()}
        self._fillings: deque[tuple[int, int, int]] = deque(maxlen=section.window)
        """Problems drawn, kept and too hard."""

    def update(self, record: Mapping[str, Any]) -> Verdict | None:
        """Take in the record of the step just done; the verdict, if that is what it comes to."""
        step = record["step"]
        for name, sign in self._signs.items():
            if (value := record.get(SIGNS[name].field)) is not None:
                sign.take(step, float(value))
        if "groups_kept" in record:
            kept = record["groups_kept"]
            hard, easy = (
                record[f"groups_dropped/early_too_{how}"] + record[f"groups_dropped/too_{how}"]
                for how in ("hard", "easy")
            )
            if drawn := kept + hard + easy:
                self._fillings.append((drawn, kept, hard))
                self._solved.take(step, (easy + kept * record["pass_rate"]) / drawn, drawn)
        signs = self._alarms(step)
        needed = self.section.threshold * (1 if signs else _ALONE)
        if self.verdict is None and self._solved.score >= needed:
            evidence = {"solved": self._solved.evidence} | signs
            self.verdict = Verdict(step, _last_good(evidence, step), "collapsed", evidence)
        return self.verdict

    def _alarms(self, step: int) -> dict[str, Any]:
        """The evidence of the signs that have alarmed in the last `window` steps."""
        recent = {name: sign.evidence for name, sign in self._signs.items() if sign.evidence}
        return {name: found for name, found in recent.items() if found["step"] > step - self.section.window}

    def hopeless(self, counts: FilterCounts) -> bool:
        """Whether filling the buffer had better be given up: of the problems drawn for it so far less than a fifth of
        the usual share is within reach, more of the others became too hard than too easy, and if nothing had changed
        that would be less likely than 1 in 10⁹ (by the likelihood ratio of two coins against one). Never in the first
        filling, before which nothing is usual."""
        drawn, kept, _ = _drawn(counts)
        before, kept_before, _ = self._drawn_before()
        if not drawn or not before:
            return False
        one = (kept + kept_before) / (drawn + before)
        surprise = drawn * _divergence(kept / drawn, one) + before * _divergence(kept_before / before, one)
        return kept / drawn < kept_before / before / 5 and surprise > _STARVED_LOG_ODDS and self.harder(counts)

    def harder(self, counts: FilterCounts) -> bool:
        """Whether of the problems that are no longer within reach more became too hard than too easy."""
        drawn, kept, hard = _drawn(counts)
        before, kept_before, hard_before = self._drawn_before()
        return (
            bool(drawn and before) and hard / drawn - hard_before / before > (kept_before / before - kept / drawn) / 2
        )

    def starve(self, step: int, counts: FilterCounts) -> Verdict:
        """The verdict after `step`, when a buffer could not be filled, from the counts of all ranks."""
        drawn, kept, _ = _drawn(counts)
        before, kept_before, _ = self._drawn_before()
        # The engine's weights of the last filling could still find problems.
        found = {
            "value": kept / max(1, drawn), "usual": kept_before / max(1, before),
            "drawn": drawn, "drawn_before": before,
            "since": step + 1, "last_good_step": self._solved.last_step - 1,
        }  # fmt: skip
        evidence = self._alarms(step) | {"within_reach": found}
        if self._solved.score >= self.section.threshold:
            evidence["solved"] = self._solved.evidence
        self.verdict = Verdict(step, _last_good(evidence, step), "starved", evidence)
        return self.verdict

    def _drawn_before(self) -> tuple[int, int, int]:
        """`_drawn` of the last `window` fillings."""
        drawn, kept, hard = (sum(filling[column] for filling in self._fillings) for column in range(3))
        return drawn, kept, hard

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "solved": self._solved.state_dict(),
            "signs": {name: sign.state_dict() for name, sign in self._signs.items()},
            "fillings": [list(filling) for filling in self._fillings],
            "verdict": asdict(self.verdict) if self.verdict else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`. A state from before the share solved had one of its own is left: history begins
        anew."""
        if "solved" not in state:
            return
        self._solved.load_state_dict(state["solved"])
        for name, sign in self._signs.items():
            sign.load_state_dict(state["signs"][name])
        self._fillings.extend((drawn, kept, hard) for drawn, kept, hard in state["fillings"])
        self.verdict = Verdict(**state["verdict"]) if state["verdict"] else None


def _last_good(evidence: Mapping[str, Any], step: int) -> int:
    """The last step before all that."""
    return min((found["last_good_step"] for found in evidence.values()), default=step)


class _Sum:
    """A sum of excesses, 0 while all is usual."""

    def __init__(self, section: CollapseSection, window: int) -> None:
        self.section = section
        self.score = 0.0
        self.last_step = 0
        """Of the last reading."""
        self.last_good_step = 0
        """The step whose weights gave the last reading with a score of 0: a record's numbers are of the weights before
        its step."""
        self.evidence: dict[str, Any] = {}
        """Of the last time that the score came to the threshold, where it was highest."""
        self._since = 0
        self._history: deque[Any] = deque(maxlen=window)

    def _add(self, step: int, excess: float, found: dict[str, float]) -> None:
        was = self.score
        self.score = min(max(was + excess, 0.0), 2 * _ALONE * self.section.threshold)
        if was == 0.0 < self.score:
            self._since = step
        if self.score >= self.section.threshold:
            if self.evidence.get("since") != self._since or self.score > self.evidence["score"]:
                since = {"since": self._since, "last_good_step": self.last_good_step}
                self.evidence = {**found, "score": self.score, **since}
            self.evidence["step"] = step

    def _done(self, step: int, reading: Any) -> None:
        if self.score == 0.0:
            self.last_good_step = step - 1
        self.last_step = step
        self._history.append(reading)

    def state_dict(self) -> dict[str, Any]:
        plain = {name: value for name, value in vars(self).items() if name not in ("section", "kind", "_history")}
        return plain | {"evidence": dict(self.evidence), "_history": list(self._history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        history = deque(state["_history"], maxlen=self._history.maxlen)
        vars(self).update({**state, "evidence": dict(state["evidence"]), "_history": history})


class _Sign(_Sum):
    """How far one number of the step record is from its usual value."""

    def __init__(self, kind: _Kind, section: CollapseSection) -> None:
        super().__init__(section, section.window)
        self.kind = kind

    def take(self, step: int, value: float) -> None:
        """Take in a reading."""
        x = math.log(max(value, 1e-9)) if self.kind.logarithmic else value
        if len(self._history) >= self.section.warmup:
            median = statistics.median(self._history)
            deviation = 1.4826 * statistics.median(abs(old - median) for old in self._history)
            spread = max(self.kind.least_spread, deviation)
            usual = math.exp(median) if self.kind.logarithmic else median
            excess = min(self.kind.worse * (x - median) / spread, _LARGEST_EXCESS) - _DRIFT
            self._add(step, excess, {"value": value, "usual": usual, "spread": spread})
        self._done(step, x)


class _Solved(_Sum):
    """How much of the best share of problems solved is lost."""

    def __init__(self, section: CollapseSection) -> None:
        super().__init__(section, section.window)
        self._readings = 0
        self._first: float | None = None
        self._best = 0.0

    def take(self, step: int, share: float, problems: int) -> None:
        """Take in the share solved of so many problems drawn."""
        if self._first is not None:
            best = self._best
            variance = max(best * (1 - best), _LEAST_VARIANCE) / problems
            loss = max(_LOST_OF_GAIN * (best - self._first), _LOST_OF_LEVEL * best)
            excess = min(loss / variance * (best - share - loss / 2) / _NATS, self.section.threshold / 2)
            self._add(step, excess, {"value": share, "usual": best, "spread": math.sqrt(variance)})
        self._done(step, [share, problems])
        drawn = sum(problems for _, problems in self._history)
        while drawn - self._history[0][1] >= _LEVEL_PROBLEMS:
            drawn -= self._history.popleft()[1]
        self._readings += 1
        if self._readings >= self.section.warmup:
            level = sum(share * problems for share, problems in self._history) / drawn
            self._first = level if self._first is None else self._first
            self._best = max(
                self._best, level - _CAUTION * math.sqrt(max(level * (1 - level), _LEAST_VARIANCE) / drawn)
            )


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
