"""How well a policy solves problems that it cannot have trained on, and what its thoughts are worth.

pass@1 and pass@k with confidence intervals, by task and by problem size. Then the test of the thoughts: the answer is
asked for at once (*emptied*), after the thought of another problem of like size (*other thought*), and after the first
half of the policy's own (*half thought*). A thought that does work is worth the difference.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import chain, groupby, islice, zip_longest
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
FORCED = ("pass@1_emptied", "pass@1_other_thought", "pass@1_half_thought")
COLUMNS = ("pass@1", *FORCED, "greedy", "thought_share", "response_length")
"""What is summed up over the responses to a problem, by the name of its mean."""
WITH_TOOLS = ("call_share", "pass@1_tools_off")
"""The same where there are tools: responses with a call, and how many pass if nothing answers."""


class HeldOut:
    """The held-out problems of a run's tasks. Each rank answers its share."""

    def __init__(
        self,
        mix: TaskSampler,
        section: ClimbEvaluationSection,
        *,
        rank: int,
        ranks: int,
        device: torch.device | None = None,
    ) -> None:
        """`device` is where the ranks meet."""
        self.section, self.rank, self.ranks, self._device = section, rank, ranks, device
        self.problems = [problem for family in mix.families for problem in mix.held_out(family, section.problems)]

    def evaluate(self, responder: Responder, max_length: int) -> tuple[dict[str, Any], list[Rollout]]:
        """→ flat metrics, the same on every rank, and the first rollout of each of this rank's problems. Collective."""
        k, temperature = self.section.samples, self.section.temperature
        mine = range(self.rank, len(self.problems), self.ranks)
        rollouts = self._respond(responder, mine, k, FIRST_ID, max_length, temperature)
        numbers = [number for number in mine for _ in range(k)]
        columns = (*COLUMNS, *(WITH_TOOLS if responder.engine.tools else ()))
        sums = torch.zeros(len(columns), len(self.problems), dtype=torch.float64)
        column = dict(zip(columns, sums, strict=True))
        for number, rollout in zip(numbers, rollouts, strict=True):
            column["pass@1"][number] += rollout.grade.passed
            column["thought_share"][number] += rollout.has_thought
            column["response_length"][number] += len(rollout.own_ids)
        for name, grades in zip(FORCED, self._forced(responder, numbers, rollouts), strict=True):
            for number, grade in zip(numbers, grades, strict=True):
                column[name][number] += grade.passed
        if responder.engine.tools:
            for number, rollout in zip(numbers, rollouts, strict=True):
                column["call_share"][number] += bool(rollout.calls)
            # The same draws up to the first call.
            bare = self._respond(responder, mine, k, FIRST_ID, max_length, temperature, tools=False)
            for number, rollout in zip(numbers, bare, strict=True):
                column["pass@1_tools_off"][number] += rollout.grade.passed
        greedy = self._respond(responder, mine, 1, FIRST_ID + _IDS // 2, max_length, 0.0)
        for number, rollout in zip(mine, greedy, strict=True):
            column["greedy"][number] = k * rollout.grade.passed
        if self.ranks > 1:
            there = sums.to(self._device)
            dist.all_reduce(there)
            sums.copy_(there)  # which `column` looks at
        return self._metrics(column), rollouts[::k]

    def _respond(
        self,
        responder: Responder,
        numbers: Sequence[int],
        samples: int,
        first_id: int,
        max_length: int,
        temperature: float | None,
        *,
        tools: bool = True,
    ) -> list[Rollout]:
        """`samples` responses to each of the problems."""
        asked: list[Rollout] = []
        for number in numbers:
            first = first_id + number * samples
            asked += responder.ask(self.problems[number], range(first, first + samples), max_length)
        return responder.respond(asked, temperature, tools=tools)

    def _forced(
        self, responder: Responder, numbers: Sequence[int], rollouts: Sequence[Rollout]
    ) -> Iterable[list[Grade]]:
        """The grades where the answer is forced, in the three ways of `FORCED`, in the order of `rollouts`."""
        k = self.section.samples
        room = ANSWER_TOKENS + max(len(responder.encoder.encode(problem.answer)) for problem in self.problems)
        problems = [self.problems[number] for number in numbers]
        own = [rollout.thought if rollout.has_thought else "" for rollout in rollouts]
        halves = [_half(responder, thought) for thought in own]
        for way, thoughts in enumerate(([""] * len(own), _of_another(own, problems), halves), start=1):
            ids = [FIRST_ID + way * _IDS + number * k + index % k for index, number in enumerate(numbers)]
            yield responder.force(list(zip(problems, thoughts, ids, strict=True)), room, self.section.temperature)

    def _metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Means over problems, by task and by size; `sums` of each problem, by column."""
        k = self.section.samples
        tasks = _places(self.problems)
        passed = sums["pass@1"].tolist()
        metrics = summarize({task: [round(passed[place]) for place in places] for task, places in tasks.items()}, k)
        for name in list(sums)[1:]:
            metrics[name] = float(sums[name].mean() / k)
            for task, places in tasks.items():
                metrics[f"{name}/{task}"] = float(sums[name][places].mean() / k)
        by_size: dict[tuple[str, int], list[int]] = {}
        for number, problem in enumerate(self.problems):
            if problem.size:
                by_size.setdefault((problem.task, problem.size), []).append(number)
        for (task, size), places in sorted(by_size.items()):
            for name in ("pass@1", "response_length"):
                metrics[f"{name}_size/{task}/{size}"] = float(sums[name][places].mean() / k)
        return metrics


def show_evaluation(
    context: RunContext, step: int, metrics: Mapping[str, Any], samples: Sequence[Rollout], show: int
) -> None:
    """To the terminal, with some of the `samples`; all of them to the run's `samples.jsonl`."""
    if context.rank == 0:
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
        with closing(MetricsLog(context.folder.samples)) as log:
            log.append({"kind": "samples", "step": step, "samples": rows}, exact=())
    tasks = [name.removeprefix("pass@1/") for name in metrics if name.startswith("pass@1/")]
    by_task = "  ".join(f"{task} {metrics[f'pass@1/{task}']:.3f}" for task in tasks)
    context.log(f"step {step}: held-out pass@1 {metrics['pass@1']:.3f}  ({by_task})")
    for sample in one_of_each(samples, show):
        mark = "right" if sample.grade.passed else f"wrong, it is {sample.problem.answer}"
        context.log(f"    {sample.problem.question} → {sample.text!r} ({mark})")


def _half(responder: Responder, thought: str) -> str:
    """The first half of its tokens."""
    ids = responder.encoder.encode(thought)
    return str(responder.tokenizer.decode(ids[: len(ids) // 2]))


def _of_another(thoughts: Sequence[str], problems: Sequence[Problem]) -> list[str]:
    """For each thought that of another problem of the same task and size; where there is no other of its size, of
    another size; its own where the task has only one problem."""
    result = list(thoughts)
    for places in _places(problems).values():
        of_problem: dict[Problem, list[int]] = {}
        for place in sorted(places, key=lambda place: problems[place].size):
            of_problem.setdefault(problems[place], []).append(place)
        following = _each_to_the_next(list(of_problem))
        for _, same in groupby(of_problem, key=lambda problem: problem.size):
            if len(of_this_size := list(same)) > 1:
                following |= _each_to_the_next(of_this_size)
        for problem, own in of_problem.items():
            for place, other in zip(own, of_problem[following[problem]], strict=True):
                result[place] = thoughts[other]
    return result


def _each_to_the_next(problems: list[Problem]) -> dict[Problem, Problem]:
    return dict(zip(problems, problems[1:] + problems[:1], strict=True))


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
    by_task: dict[str, list[Rollout]] = {}
    for sample in samples:
        by_task.setdefault(sample.problem.task, []).append(sample)
    turns = chain.from_iterable(zip_longest(*by_task.values()))
    return list(islice(filter(None, turns), count))
