"""How well a policy solves problems that it cannot have trained on: pass@1 and pass@k, with confidence intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from mai_thinking.config.grpo import ClimbEvaluationSection
from mai_thinking.rl.collecting import Responder
from mai_thinking.rl.rollouts import Request
from mai_thinking.rl.tasks import Problem, TaskMix

FIRST_ID = 2**61
"""Request ids from here on are evaluations': other random numbers than any rollout that is learned from."""


@dataclass(frozen=True)
class Sample:
    """A response, to look at."""

    task: str
    question: str
    answer: str
    response: str
    passed: bool


class HeldOut:
    """The held-out problems of a run's tasks. Each rank answers its share."""

    def __init__(self, mix: TaskMix, section: ClimbEvaluationSection, *, rank: int, ranks: int) -> None:
        self.section, self.rank, self.ranks = section, rank, ranks
        self.problems: dict[str, list[Problem]] = {
            family: mix.held_out(family, section.problems) for family in mix.families
        }

    def evaluate(self, responder: Responder, max_length: int) -> tuple[dict[str, Any], list[Sample]]:
        """→ flat metrics, the same on every rank, and this rank's first samples of each task. Collective."""
        k = self.section.samples
        asked = []
        numbered = [problem for problems in self.problems.values() for problem in problems]
        for number in range(self.rank, len(numbered), self.ranks):
            _, prompt_ids = responder.encode(numbered[number])
            for sample in range(k):
                request = Request(FIRST_ID + number * k + sample, prompt_ids, max_length)
                asked.append((number, numbered[number], request))
        attempts = responder.respond([(problem, request) for _, problem, request in asked], self.section.temperature)
        passed = torch.zeros(len(numbered), dtype=torch.float64)
        length = torch.zeros((), dtype=torch.float64)
        samples: dict[int, Sample] = {}
        for (number, problem, _), attempt in zip(asked, attempts, strict=True):
            passed[number] += attempt.grade.passed
            length += len(attempt.rollout.response_ids)
            sample_shown = Sample(problem.task, problem.question, problem.answer, attempt.text, attempt.grade.passed)
            samples.setdefault(number, sample_shown)
        if self.ranks > 1:
            dist.all_reduce(passed)
            dist.all_reduce(length)
        by_task: dict[str, list[int]] = {family: [] for family in self.problems}
        for problem, count in zip(numbered, passed.tolist(), strict=True):
            by_task[problem.task].append(round(count))
        metrics = summarize(by_task, k) | {"response_length": float(length) / (len(numbered) * k)}
        return metrics, _one_of_each(list(samples.values()), self.section.show)


def summarize(passed: Mapping[str, Sequence[int]], k: int) -> dict[str, Any]:
    """Task → how many of each problem's k responses passed; flat metrics `pass@1/TASK`, `pass@1_low/TASK`,
    `pass@1_high/TASK` (95 % interval), `pass@k/TASK`, and the means over tasks."""
    result: dict[str, Any] = {}
    for task, counts in passed.items():
        rates = [count / k for count in counts]
        low, high = interval(rates)
        result |= {f"pass@1/{task}": fmean(rates), f"pass@1_low/{task}": low, f"pass@1_high/{task}": high}
        result[f"pass@{k}/{task}"] = fmean(count > 0 for count in counts)
    for name in ("pass@1", f"pass@{k}"):
        result[name] = fmean(result[f"{name}/{task}"] for task in passed)
    return result


def interval(rates: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of the mean of independent rates in [0, 1], by Wilson's score with as many trials as
    have the rates' own variance: the responses to one problem are not independent, the problems are."""
    n, mean = len(rates), fmean(rates)
    variance = sum((rate - mean) ** 2 for rate in rates) / max(1, n - 1)
    # A problem's k responses count for between one trial (all alike) and k (independent).
    trials = n if variance <= 0 else max(n, n * mean * (1 - mean) / variance)
    z = 1.959964
    centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = z / (1 + z * z / trials) * math.sqrt(mean * (1 - mean) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def _one_of_each(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Up to `count`, the tasks in turn."""
    rounds: dict[str, int] = {}
    placed = []
    for sample in samples:
        rounds[sample.task] = rounds.get(sample.task, -1) + 1
        placed.append((rounds[sample.task], sample))
    return [sample for _, sample in sorted(placed, key=lambda pair: pair[0])][:count]
