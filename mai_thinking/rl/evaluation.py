"""How well a policy solves problems that it cannot have trained on, and what its thoughts are worth.

pass@1 and pass@k with confidence intervals, by task and by problem size. Then the test of the thoughts: the answer is
asked for at once (*emptied*), after the thought of another problem of like size (*other thought*), and after the first
half of the policy's own (*half thought*). A thought that does work is worth the difference.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice, zip_longest
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import mai_thinking.rl.policy_model as setup
from mai_thinking.config.grpo import ClimbEvaluationSection, GrpoConfig
from mai_thinking.rl.grading import GradingPool
from mai_thinking.rl.language import foreign_words
from mai_thinking.rl.rollout import Rollout
from mai_thinking.rl.rollout_worker import RolloutWorker
from mai_thinking.rl.tasks import Problem, TaskSampler
from mai_thinking.training.context import RunContext
from mai_thinking.training.metrics import MetricsLog

FIRST_ID = 2**61  # Ids from here on are evaluations': other random numbers than any rollout that is learned from
_IDS = 2**40  # Ids of each way of asking
ANSWER_TOKENS = 16  # Tokens, beyond the longest reference answer, of an answer that is forced


class Answer(NamedTuple):
    """What came of one held-out problem."""

    passed: bool
    tokens: int
    foreign: bool
    """Whether words of another language than English stand before the answer."""
    called: bool
    """Whether a tool was called."""


def answers(config: GrpoConfig, model: str, tasks: Sequence[str], problems: int) -> dict[str, list[Answer]]:
    """What the model in a folder answers to the first held-out problems of some of an RL config's tasks, one response
    each: by task. UsageError for a folder without a model of ours."""
    config = config.model_copy(
        update={"init_from": model, "tasks": tuple(task for task in config.tasks if task.name in tasks)}
    )
    mix, tokenizer = TaskSampler(config.tasks, config.seed), setup.policy_tokenizer(config)
    policy, _ = setup.policy_model(config, setup.policy_config(config))
    found: dict[str, list[Answer]] = {}
    with GradingPool(config.tasks, **config.grading.model_dump()) as pool:
        engine = setup.make_engine(policy, config, tokenizer, "no", heartbeat=lambda: None)
        worker = RolloutWorker(config, mix, engine, pool, tokenizer, ranks=1)
        for name in tasks:
            asked = [
                rollout
                for number, problem in enumerate(mix.held_out(name, problems))
                for rollout in worker.ask(problem, [FIRST_ID + number], config.curriculum.end)
            ]
            found[name] = [
                Answer(r.grade.passed, len(r.own_ids), foreign_words(r.thought) > 0, bool(r.calls))
                for r in worker.respond(asked)
            ]
    return found


class HeldOut:
    """The held-out problems of a run's tasks. Each rank answers its share."""

    def __init__(self, mix: TaskSampler, section: ClimbEvaluationSection, context: RunContext) -> None:
        self.section, self.rank, self.ranks, self._device = section, context.rank, context.ranks, context.device
        self.problems = [problem for family in mix.families for problem in mix.held_out(family, section.problems)]

    def evaluate(self, worker: RolloutWorker, max_length: int) -> tuple[dict[str, Any], list[Rollout]]:
        """→ flat metrics, the same on every rank, and the first rollout of each of this rank's problems. Collective."""
        k, own_temperature = self.section.samples, self.section.temperature
        mine = range(self.rank, len(self.problems), self.ranks)

        def respond(samples: int, first_id: int, temperature: float | None, *, tools: bool = True) -> list[Rollout]:
            asked: list[Rollout] = []
            for number in mine:
                first = first_id + number * samples
                asked += worker.ask(self.problems[number], range(first, first + samples), max_length)
            return worker.respond(asked, temperature, tools=tools)

        rollouts = respond(k, FIRST_ID, own_temperature)
        emptied, other_thought, half_thought = self._forced(worker, rollouts)
        greedy = respond(1, FIRST_ID + _IDS // 2, 0.0)
        # Of each response, by the name of the mean.
        values: dict[str, list[float]] = {
            "pass@1": [rollout.grade.passed for rollout in rollouts],
            "pass@1_emptied": emptied,
            "pass@1_other_thought": other_thought,
            "pass@1_half_thought": half_thought,
            "greedy": [rollout.grade.passed for rollout in greedy for _ in range(k)],
            "thought_share": [rollout.has_thought for rollout in rollouts],
            "response_length": [len(rollout.own_ids) for rollout in rollouts],
        }
        if worker.engine.tools:
            values["call_share"] = [bool(rollout.calls) for rollout in rollouts]
            # The same draws up to the first call, which nothing answers.
            bare = respond(k, FIRST_ID, own_temperature, tools=False)
            values["pass@1_tools_off"] = [rollout.grade.passed for rollout in bare]
        sums = torch.zeros(len(values), len(self.problems), dtype=torch.float64, device=self._device)
        own = torch.tensor(list(values.values()), dtype=torch.float64, device=self._device)
        sums[:, self.rank :: self.ranks] = own.view(len(values), len(mine), k).sum(dim=-1)
        if self.ranks > 1:
            dist.all_reduce(sums)
        return self._metrics(dict(zip(values, sums.cpu(), strict=True))), rollouts[::k]

    def _forced(self, worker: RolloutWorker, rollouts: Sequence[Rollout]) -> Iterator[list[float]]:
        """Which answers pass where the answer is forced: at once, after another's thought, after half of the own."""
        room = ANSWER_TOKENS + max(len(worker.encoder.encode(problem.answer)) for problem in self.problems)
        problems = [rollout.problem for rollout in rollouts]
        own = [rollout.thought if rollout.has_thought else "" for rollout in rollouts]
        ids = [worker.encoder.encode(thought) for thought in own]
        halves = [str(worker.tokenizer.decode(thought[: len(thought) // 2])) for thought in ids]
        for way, thoughts in enumerate(([""] * len(own), _of_another(own, problems), halves), start=1):
            asked = [
                (rollout.problem, thought, rollout.id + way * _IDS)
                for rollout, thought in zip(rollouts, thoughts, strict=True)
            ]
            yield [grade.passed for grade in worker.force(asked, room, self.section.temperature)]

    def _metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Means over problems, by task and by size; of pass@1 also the 95 % interval, and pass@k. `sums` over the
        responses to each problem, by name."""
        k, tasks = self.section.samples, _places(self.problems)
        metrics: dict[str, Any] = {}
        for task, places in tasks.items():
            passed = sums["pass@1"][places].tolist()
            rates = [count / k for count in passed]
            low, high = interval(rates)
            metrics |= {f"pass@1/{task}": fmean(rates), f"pass@1_low/{task}": low, f"pass@1_high/{task}": high}
            metrics[f"pass@{k}/{task}"] = fmean(count > 0 for count in passed)
        for name in ("pass@1", f"pass@{k}"):
            metrics[name] = fmean(metrics[f"{name}/{task}"] for task in tasks)
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


def _of_another(thoughts: Sequence[str], problems: Sequence[Problem]) -> list[str]:
    """For each thought that of another problem of the same task and size; where there is no other of its size, of
    another size; its own where the task has only one problem."""
    result = list(thoughts)
    for places in _places(problems).values():
        of_problem: dict[Problem, list[int]] = {}
        for place in sorted(places, key=lambda place: problems[place].size):
            of_problem.setdefault(problems[place], []).append(place)
        for problem, own in of_problem.items():
            alike = [one for one in of_problem if one.size == problem.size]
            circle = alike if len(alike) > 1 else list(of_problem)
            following = circle[(circle.index(problem) + 1) % len(circle)]
            for place, other in zip(own, of_problem[following], strict=True):
                result[place] = thoughts[other]
    return result


def _places(problems: Sequence[Problem]) -> dict[str, list[int]]:
    """Task → where its problems are."""
    places: dict[str, list[int]] = {}
    for place, problem in enumerate(problems):
        places.setdefault(problem.task, []).append(place)
    return places


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
