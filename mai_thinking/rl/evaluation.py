"""How well a policy solves problems that it cannot have trained on, and what its thoughts are worth.

pass@1 and pass@k with confidence intervals, by task and by problem size. Then the test of the thoughts: the answer is
asked for at once (*emptied*), after the thought of another problem of like size (*other thought*), and after the first
half of the policy's own (*half thought*). A thought that does work is worth the difference.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from mai_thinking.config.grpo import ClimbEvaluationSection
from mai_thinking.rl.rollout import Rollout
from mai_thinking.rl.rollout_worker import Responder
from mai_thinking.rl.tasks import Grade, Problem, TaskSampler
from mai_thinking.training.context import RunContext
from mai_thinking.training.metrics import MetricsLog

FIRST_ID = 2**61
"""Ids from here on are evaluations': other random numbers than any rollout that is learned from."""
_IDS = 2**40
"""Ids of each way of asking."""
ANSWER_TOKENS = 16
"""Tokens, beyond the longest reference answer, of an answer that is forced."""
FORCED = ("emptied", "other_thought", "half_thought")


class HeldOut:
    """The held-out problems of a run's tasks. Each rank answers its share."""

    def __init__(self, mix: TaskSampler, section: ClimbEvaluationSection, *, rank: int, ranks: int) -> None:
        self.section, self.rank, self.ranks = section, rank, ranks
        self.problems: dict[str, list[Problem]] = {
            family: mix.held_out(family, section.problems) for family in mix.families
        }
        self._all = [problem for problems in self.problems.values() for problem in problems]

    def evaluate(self, responder: Responder, max_length: int) -> tuple[dict[str, Any], list[Rollout]]:
        """→ flat metrics, the same on every rank, and the first rollout of each of this rank's problems. Collective."""
        k, temperature = self.section.samples, self.section.temperature
        mine = range(self.rank, len(self._all), self.ranks)
        rollouts = self._respond(responder, mine, k, FIRST_ID, max_length, temperature)
        numbers = [number for number in mine for _ in range(k)]
        # Per problem: passed in each way of asking, greedily, thoughts, tokens.
        sums = torch.zeros(len(self._all), len(FORCED) + 4, dtype=torch.float64)
        for number, rollout in zip(numbers, rollouts, strict=True):
            row = torch.tensor([rollout.grade.passed, rollout.has_thought, len(rollout.response_ids)])
            sums[number, [0, -2, -1]] += row.double()
        for column, grades in enumerate(self._forced(responder, numbers, rollouts), start=1):
            for number, grade in zip(numbers, grades, strict=True):
                sums[number, column] += grade.passed
        for number, rollout in zip(
            mine, self._respond(responder, mine, 1, FIRST_ID + _IDS // 2, max_length, 0.0), strict=True
        ):
            sums[number, -3] = k * rollout.grade.passed
        if self.ranks > 1:
            dist.all_reduce(sums)
        return self._metrics(sums), rollouts[::k]

    def _respond(
        self,
        responder: Responder,
        numbers: Sequence[int],
        samples: int,
        first_id: int,
        max_length: int,
        temperature: float | None,
    ) -> list[Rollout]:
        """`samples` responses to each of the problems."""
        asked: list[Rollout] = []
        for number in numbers:
            first = first_id + number * samples
            asked += responder.ask(self._all[number], range(first, first + samples), max_length)
        return responder.respond(asked, temperature)

    def _forced(
        self, responder: Responder, numbers: Sequence[int], rollouts: Sequence[Rollout]
    ) -> Iterable[list[Grade]]:
        """The grades where the answer is forced, in the three ways of `FORCED`, in the order of `rollouts`."""
        k = self.section.samples
        room = ANSWER_TOKENS + max(len(responder.encoder.encode(problem.answer)) for problem in self._all)
        own = [rollout.thought if rollout.has_thought else "" for rollout in rollouts]
        halves = [_half(responder, thought) for thought in own]
        ways = ([""] * len(own), _of_another(own, [self._all[number] for number in numbers]), halves)
        for way, thoughts in enumerate(ways, start=1):
            asked = []
            for index, (number, thought) in enumerate(zip(numbers, thoughts, strict=True)):
                rollout_id = FIRST_ID + way * _IDS + number * k + index % k
                asked.append((self._all[number], thought, rollout_id))
            yield responder.force(asked, room, self.section.temperature)

    def _metrics(self, sums: torch.Tensor) -> dict[str, Any]:
        k = self.section.samples
        passed = sums[:, 0].tolist()
        by_task: dict[str, list[int]] = {family: [] for family in self.problems}
        by_size: dict[tuple[str, int], list[int]] = {}
        for number, problem in enumerate(self._all):
            by_task[problem.task].append(round(passed[number]))
            if problem.size:
                by_size.setdefault((problem.task, problem.size), []).append(number)
        totals = dict(zip((*FORCED, "greedy", "thoughts", "tokens"), (sums[:, 1:].mean(0) / k).tolist(), strict=True))
        metrics = summarize(by_task, k) | {
            "greedy": totals["greedy"],
            "response_length": totals["tokens"],
            "thought_share": totals["thoughts"],
            # Means over problems, as pass@1 is where all tasks have as many.
            **{f"pass@1_{name}": totals[name] for name in FORCED},
        }
        for task, places in _places(self._all).items():
            for column, name in enumerate(FORCED, start=1):
                metrics[f"pass@1_{name}/{task}"] = float(sums[places, column].mean() / k)
            metrics[f"greedy/{task}"] = float(sums[places, -3].mean() / k)
            metrics[f"thought_share/{task}"] = float(sums[places, -2].mean() / k)
            metrics[f"response_length/{task}"] = float(sums[places, -1].mean() / k)
        for (task, size), places in sorted(by_size.items()):
            metrics[f"pass@1_size/{task}/{size}"] = float(sums[places, 0].mean() / k)
            metrics[f"response_length_size/{task}/{size}"] = float(sums[places, -1].mean() / k)
        return metrics


def show_evaluation(
    context: RunContext, step: int, metrics: Mapping[str, Any], samples: Sequence[Rollout], show: int
) -> None:
    """To the terminal, with some of the `samples`; all of them to the run's `samples.jsonl`."""
    if context.rank == 0:
        with closing(MetricsLog(context.folder.samples)) as log:
            log.append(samples_record(step, samples), exact=())
    tasks = [name.removeprefix("pass@1/") for name in metrics if name.startswith("pass@1/")]
    by_task = "  ".join(f"{task} {metrics[f'pass@1/{task}']:.3f}" for task in tasks)
    context.log(f"step {step}: held-out pass@1 {metrics['pass@1']:.3f}  ({by_task})")
    for sample in one_of_each(samples, show):
        mark = "right" if sample.grade.passed else f"wrong, it is {sample.problem.answer}"
        context.log(f"    {sample.problem.question} → {sample.text!r} ({mark})")


def samples_record(step: int, samples: Sequence[Rollout]) -> dict[str, Any]:
    """A line of the run's `samples.jsonl`."""
    rows = [
        {
            "task": sample.problem.task,
            "size": sample.problem.size,
            "question": sample.problem.question,
            "answer": sample.problem.answer,
            "response": sample.text,
            "passed": sample.grade.passed,
        }
        for sample in samples
    ]
    return {"kind": "samples", "step": step, "samples": rows}


def _half(responder: Responder, thought: str) -> str:
    """The first half of its tokens."""
    ids = responder.encoder.encode(thought)
    return str(responder.tokenizer.decode(ids[: len(ids) // 2]))


def _of_another(thoughts: Sequence[str], problems: Sequence[Problem]) -> list[str]:
    """For each thought that of another problem of the same task and size; where there is no other of its size, of
    another size; its own where the task has only one problem."""
    result = list(thoughts)
    for places in _places(problems).values():
        ordered = sorted(places, key=lambda place: (problems[place].size, place))
        distinct = list(dict.fromkeys(problems[place].id for place in ordered))
        following = dict(zip(distinct, distinct[1:] + distinct[:1], strict=True))
        of_problem: dict[str, list[int]] = {}
        of_size: dict[int, list[str]] = {}
        for place in ordered:
            of_problem.setdefault(problems[place].id, []).append(place)
        for one in distinct:
            of_size.setdefault(problems[of_problem[one][0]].size, []).append(one)
        for same in of_size.values():
            if len(same) > 1:
                following |= dict(zip(same, same[1:] + same[:1], strict=True))
        for own in distinct:
            for place, other in zip(of_problem[own], of_problem[following[own]], strict=True):
                result[place] = thoughts[other]
    return result


def _places(problems: Sequence[Problem]) -> dict[str, list[int]]:
    """Task → where its problems are."""
    places: dict[str, list[int]] = {}
    for place, problem in enumerate(problems):
        places.setdefault(problem.task, []).append(place)
    return places


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


def one_of_each(samples: Sequence[Rollout], count: int) -> list[Rollout]:
    """Up to `count` samples to show, the tasks in turn."""
    rounds: dict[str, int] = {}
    placed = []
    for sample in samples:
        rounds[sample.problem.task] = rounds.get(sample.problem.task, -1) + 1
        placed.append((rounds[sample.problem.task], sample))
    return [sample for _, sample in sorted(placed, key=lambda pair: pair[0])][:count]
