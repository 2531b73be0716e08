"""Has the climb collapsed? Its signs, each against the run's own history (MAI-Thinking-1 report §3.1.4).

The report recovers from a collapse by self-distillation and not by rolling back, because "the damage is older than the
visible drop". So two questions are asked after every step: has it collapsed, and since when?

A *sign* is a number of the step record. Its reading x is compared with the median m of the readings before it, in
spreads s: their median absolute deviation, made comparable to a standard deviation, and never less than the smallest
change that would matter. The excesses are summed by Page's rule (CUSUM, 1954):

    z = ±(x − m)/s        S ← clip(S + min(z, 6) − 1, 0, 2·threshold)        alarm: S ≥ threshold

so that one wild reading is no alarm, a lasting change is, and a sign's change began after S was 0 for the last time.
A change that lasts half a window becomes what is usual, and the alarm ends: entropy may go where the climb takes it.

The verdict is *collapsed* when a sign of harm (fewer problems solved, or within reach at all) and a sign of another
kind raise their alarms within a window of steps, or one of harm alone comes to 2·threshold; and *starved* when the
engine's newest weights find next to no problem to learn from where the run's earlier ones did: then no further step
would ever come.
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

from mai_thinking.config.collapse import CollapseSection
from mai_thinking.config.storage import atomic_file
from mai_thinking.rl.problem_filter import FilterCounts

_LARGEST_EXCESS, _DRIFT = 6.0, 1.0
_GRAM, _SHORTEST_LOOP = 4, 16
_STARVED_LOG_ODDS = math.log(1e9)


@dataclass(frozen=True)
class _Kind:
    """What is looked at for a sign."""

    field: str
    """Of the record that `_with_shares` makes."""
    worse: int
    """+1 where more is worse, −1 where less is."""
    least_spread: float
    """s is never less: in natural logarithms where `logarithmic`; as a part of what is usual for a sign of harm."""
    logarithmic: bool = False
    share_of: str = "step"
    """The field that says of how many problems a sign of harm is a share."""
    harm: bool = False
    """Whether it is itself what a climb is for, and so must be among the alarms."""


SIGNS = {
    "solved": _Kind("solved", -1, 0.25, share_of="problems", harm=True),
    "within_reach": _Kind("within_reach", -1, 0.25, share_of="unsolved", harm=True),
    "entropy_low": _Kind("entropy", -1, 0.25, logarithmic=True),
    "entropy_high": _Kind("entropy", +1, 0.25, logarithmic=True),
    "grad_norm": _Kind("grad_norm", +1, 0.4, logarithmic=True),
    "mismatch": _Kind("mismatch", +1, 0.7, logarithmic=True),
    "repetition": _Kind("repetition", +1, 0.05),
}
"""`solved` and `within_reach` are shares of the problems drawn to fill a buffer, dropped ones included: what is learned
from is chosen by its pass rate, which therefore falls as easy problems drop out. Solved: of all problems, where too
easy ones count whole and kept ones by their pass rate. Within reach: of those not too easy, the kept ones. That falls
too when a policy narrows until it solves a problem always or never, while the share solved stays what it was."""


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
        self._signs = {name: _Sign(kind, section) for name, kind in SIGNS.items()}
        self._fillings: deque[tuple[int, int]] = deque(maxlen=section.window)

    def update(self, record: Mapping[str, Any]) -> Verdict | None:
        """Take in the record of the step just done; the verdict, if that is what it comes to."""
        record = _with_shares(record)
        if drawn := record.get("unsolved"):
            self._fillings.append((drawn, record["groups_kept"]))
        for sign in self._signs.values():
            if (value := record.get(sign.kind.field)) is not None:
                sign.take(record["step"], float(value), record[sign.kind.share_of])
        harms = [sign.score for sign in self._signs.values() if sign.kind.harm]
        alarms, last_good = self._alarms(record["step"])
        company = any(not SIGNS[name].harm for name in alarms)
        if self.verdict is None and max(harms) >= self.section.threshold * (1 if company else 2):
            self.verdict = Verdict(record["step"], last_good, "collapsed", alarms)
        return self.verdict

    def _alarms(self, step: int) -> tuple[dict[str, Any], int]:
        """The evidence of the signs that have alarmed in the last `window` steps, and the last step before all that."""
        recent = {name: sign.alarm for name, sign in self._signs.items() if sign.alarmed_since(step)}
        return recent, min((alarm["last_good_step"] for alarm in recent.values()), default=step)

    def hopeless(self, counts: FilterCounts) -> bool:
        """Whether filling the buffer had better be given up: of the problems drawn for it so far and not too easy, less
        than a fifth of the usual share is within reach, and if nothing had changed that would be less likely than 1 in
        10⁹ (by the likelihood ratio of two coins against one). Never in the first filling, before which nothing is
        usual."""
        drawn, reached = _unsolved(counts)
        before, reached_before = self._drawn_before()
        if not drawn or not before:
            return False
        one = (reached + reached_before) / (drawn + before)
        surprise = drawn * _divergence(reached / drawn, one) + before * _divergence(reached_before / before, one)
        return reached / drawn < reached_before / before / 5 and surprise > _STARVED_LOG_ODDS

    def starve(self, step: int, counts: FilterCounts) -> Verdict:
        """The verdict after `step`, when a buffer could not be filled, from the counts of all ranks."""
        reach = self._signs["within_reach"]
        drawn, reached = _unsolved(counts)
        before, reached_before = self._drawn_before()
        found = {
            "value": reached / drawn,
            "usual": reached_before / max(1, before),
            "drawn": drawn,
            "drawn_before": before,
            "since": step + 1,
        }
        alarms, last_good = self._alarms(step)
        # The engine's weights of the last filling could still find problems.
        self.verdict = Verdict(step, min(reach.last_step - 1, last_good), "starved", alarms | {"within_reach": found})
        return self.verdict

    def _drawn_before(self) -> tuple[int, int]:
        """`_unsolved` of the last `window` fillings."""
        return sum(drawn for drawn, _ in self._fillings), sum(reached for _, reached in self._fillings)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "signs": {name: sign.state_dict() for name, sign in self._signs.items()},
            "fillings": [list(pair) for pair in self._fillings],
            "verdict": asdict(self.verdict) if self.verdict else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        for name, sign in self._signs.items():
            sign.load_state_dict(state["signs"][name])
        self._fillings = deque(((drawn, reached) for drawn, reached in state["fillings"]), maxlen=self.section.window)
        self.verdict = Verdict(**state["verdict"]) if state["verdict"] else None


class _Sign:
    """One sign's history and its sum of excesses."""

    def __init__(self, kind: _Kind, section: CollapseSection) -> None:
        self.kind, self.section = kind, section
        self.score = 0.0
        self.last_step = 0
        """Of the last reading."""
        self.last_good_step = 0
        """The step whose weights gave the last reading with a score of 0: a record's numbers are of the weights before
        its step."""
        self.alarm: dict[str, Any] = {}
        """Evidence of the last alarm, where the score was highest."""
        self._since = 0
        self._history: deque[float] = deque(maxlen=section.window)

    def take(self, step: int, value: float, problems: int) -> None:
        """Take in a reading, of so many problems if it is a share of them."""
        x = math.log(max(value, 1e-9)) if self.kind.logarithmic else value
        if len(self._history) >= self.section.warmup:
            median = statistics.median(self._history)
            deviation = 1.4826 * statistics.median(abs(old - median) for old in self._history)
            least = self.kind.least_spread
            if self.kind.harm:  # a quarter of the usual share, or what chance does to a share of so few problems
                least = max(least * median, math.sqrt(median * (1 - median) / problems), 1e-9)
            spread = max(least, deviation)
            excess = min(self.kind.worse * (x - median) / spread, _LARGEST_EXCESS) - _DRIFT
            was = self.score
            self.score = min(max(was + excess, 0.0), 2 * self.section.threshold)
            if was == 0.0 < self.score:
                self._since = step
            if self.score >= self.section.threshold:
                usual = math.exp(median) if self.kind.logarithmic else median
                self._raise_alarm(step, {"value": value, "usual": usual, "spread": spread, "score": self.score})
        if self.score == 0.0:
            self.last_good_step = step - 1
        self.last_step = step
        self._history.append(x)

    def _raise_alarm(self, step: int, found: dict[str, Any]) -> None:
        if self.alarm.get("since") != self._since or self.score > self.alarm["score"]:
            self.alarm = {**found, "since": self._since, "last_good_step": self.last_good_step}
        self.alarm["step"] = step

    def alarmed_since(self, step: int) -> bool:
        """Whether it has alarmed in the `window` steps up to `step`."""
        return bool(self.alarm) and self.alarm["step"] > step - self.section.window

    def state_dict(self) -> dict[str, Any]:
        return {
            "score": self.score,
            "last_step": self.last_step,
            "last_good_step": self.last_good_step,
            "since": self._since,
            "alarm": dict(self.alarm),
            "history": list(self._history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score, self.last_step, self.last_good_step = state["score"], state["last_step"], state["last_good_step"]
        self._since, self.alarm = state["since"], dict(state["alarm"])
        self._history = deque(state["history"], maxlen=self.section.window)


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


def _with_shares(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record`, and if a buffer was filled in its step: the problems drawn for that, and shares of them."""
    if "groups_kept" not in record:
        return dict(record)
    hard = record["groups_dropped/early_too_hard"] + record["groups_dropped/too_hard"]
    easy = record["groups_dropped/early_too_easy"] + record["groups_dropped/too_easy"]
    kept = record["groups_kept"]
    shares: dict[str, Any] = {}
    if problems := hard + easy + kept:
        shares = {"problems": problems, "solved": (easy + kept * record["pass_rate"]) / problems}
    if hard + kept:
        shares |= {"unsolved": hard + kept, "within_reach": kept / (hard + kept)}
    return {**record, **shares}


def _unsolved(counts: FilterCounts) -> tuple[int, int]:
    """Problems drawn that were not too easy, and how many of them were within reach."""
    return counts.kept + counts.early_too_hard + counts.too_hard, counts.kept


def _divergence(share: float, usual: float) -> float:
    """KL(share ‖ usual) of two coins, in nats."""
    pairs = ((share, usual), (1 - share, 1 - usual))
    return sum(p * math.log(p / q) if q > 0 else math.inf for p, q in pairs if p > 0)
