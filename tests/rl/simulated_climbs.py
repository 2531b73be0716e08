"""Climbs made up problem by problem: what the detector sees of them, and how much the policy truly solves.

A problem has a difficulty, a policy a skill, both in logits; some problems nobody can solve, and a ceiling may lie over
the pass rate. Skill climbs, with noise that lasts some steps; entropy wanders. A sickness takes hold over some tens of
steps, slow rot over hundreds, until nothing that it touches is solved any more.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

KINDS = ("sudden", "narrowing", "rot", "loops", "mismatch", "forgetting")


class SimulatedClimb:
    """One climb of `steps` steps; drawn from `seed`, healthy without a `sickness`."""

    def __init__(self, seed: int, sickness: str = "") -> None:
        self.sickness = sickness
        self.draw = np.random.default_rng([seed, *map(ord, sickness)])
        pick, between = self.draw.choice, self.draw.uniform
        self.steps = 400
        self.unsolvable = pick((0, 0.1, 0.2, 0.3, 0.4, 0.5))
        self.ceiling = pick((1, 1, 1, 0.9, 0.7, 0.5))
        self.difficulty = between(0.8, 2.5)
        self.refill = int(pick((1, 2, 2, 4)))
        self.wanted = self.refill * int(pick((12, 16, 24)))
        self.group = int(pick((8, 16)))
        self.start, self.height, self.pace = between(-3.5, -1.5), between(2.5, 6.0), between(50, 150)
        self.wobble, self.wander = between(0, 0.06), between(0, 0.08)
        self.onset = int(between(100, 200))
        self.lasts = {"sudden": between(70, 130), "rot": between(170, 200)}.get(sickness, between(110, 180))
        self.truth: list[float] = []
        """After each record: the share of problems that the policy solves."""

    def records(self) -> Iterator[dict[str, Any]]:
        """Step records as a run writes them, until the last step or until there is nothing left to learn from."""
        d = self.draw
        sample = self.problems(400)
        noise = wander = 0.0
        entropy, grad_norm, mismatch = np.exp(d.uniform(-1.5, 0)), np.exp(d.uniform(-2, 0)), 10 ** d.uniform(-6, -3)
        usual_repetition = d.choice((0, 0.01, 0.03))
        signs = {  # what comes of it: of entropy, gradient norm, mismatch (logarithms) and repetition
            "sudden": (1.5, 1.5, 2, 0.1),
            "narrowing": (-2, 0, 0, 0),
            "loops": (-1, 0, 0, 0.8),
            "mismatch": (0.8, 2.5, 5, 0),
        }
        of_entropy, of_grad_norm, of_mismatch, of_repetition = signs.get(self.sickness, (0, 0, 0, 0))
        kept = np.empty(0)
        for step in range(1, self.steps + 1):
            noise = 0.95 * noise + self.wobble * d.normal()
            wander = 0.99 * wander + self.wander * d.normal()
            skill = self.start + self.height * (1 - np.exp(-step / self.pace)) + noise
            ill = min(1.0, max(0.0, (step - self.onset) / self.lasts)) if self.sickness else 0.0
            record = {
                "step": step,
                "entropy": entropy * np.exp(wander + d.normal(0, 0.15) + of_entropy * ill),
                "grad_norm": grad_norm * np.exp(d.normal(0, 0.35) + of_grad_norm * ill),
                "repetition": min(1.0, max(0.0, usual_repetition + d.normal(0, 0.01) + of_repetition * ill)),
            }
            if (step - 1) % self.refill == 0:
                kept, counts = self.fill(skill, ill)
                if len(kept) < self.wanted:
                    return
                record |= counts | {"mismatch": mismatch * np.exp(d.normal(0, 0.3) + of_mismatch * ill)}
            record["pass_rate"] = kept[(step - 1) % self.refill :: self.refill].mean()
            self.truth.append(self.pass_rates(sample, skill, ill).mean())
            yield {name: value if name == "step" else float(value) for name, value in record.items()}

    def problems(self, count: int) -> tuple[np.ndarray, ...]:
        d = self.draw
        return (
            d.random(count) >= self.unsolvable,
            d.normal(0, self.difficulty, count),
            d.random(count) < 0.5,
            d.random(count),
        )

    def pass_rates(self, problems: tuple[np.ndarray, ...], skill: float, ill: float) -> np.ndarray:
        solvable, difficulty, first, luck = problems
        p = solvable * self.ceiling / (1 + np.exp(difficulty - skill))
        if self.sickness == "narrowing":
            return (1 - ill) * p + ill * (luck < 0.4 * p)
        return p * (1 - ill * (first if self.sickness == "forgetting" else 1.0 if self.sickness else 0.0))

    def fill(self, skill: float, ill: float) -> tuple[np.ndarray, dict[str, int]]:
        d, early_size = self.draw, self.group // 2
        p = self.pass_rates(self.problems(30 * self.wanted), skill, ill)
        early = d.binomial(early_size, p)
        full = early + d.binomial(self.group - early_size, p)
        middle = (early > 0) & (early < early_size)
        end = int(np.searchsorted(np.cumsum(middle), self.wanted)) + 1
        early, full, middle = early[:end], full[:end], middle[:end]
        counts = {"groups_kept": middle.sum(), "groups_dropped/too_hard": 0, "groups_dropped/too_easy": 0}
        counts |= {
            "groups_dropped/early_too_hard": (early == 0).sum(),
            "groups_dropped/early_too_easy": (early == early_size).sum(),
        }
        return full[middle] / self.group, counts
