"""The test of the thoughts, with a policy whose answers are known: it answers what the last step of its prompt says."""

import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mai_thinking.config.grpo import ClimbEvaluationSection, GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.config.tasks import SERIAL, TaskSection, TemplateSection
from mai_thinking.data.questions import split_of
from mai_thinking.data.serial import solve
from mai_thinking.data.tokenizer import Encoder, load_tokenizer
from mai_thinking.rl.evaluation import HeldOut
from mai_thinking.rl.rollout import Rollout
from mai_thinking.rl.rollout_worker import RolloutWorker
from mai_thinking.rl.tasks import Grade, Problem, TaskSampler, make_task
from mai_thinking.rl.template import Template, template_of

ROOT = Path(__file__).parents[2]
TALLY = TaskSection(name="tally", kind="tally", length=(4, 6))


class Reckoner:
    """An engine that works a tally out step by step; made to answer, it gives the last total that it sees, or 999.
    Behind a forced answer it goes on to the right one, which must not count."""

    tools = None

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, Encoder(tokenizer)
        self.prompts: list[str] = []

    def update_weights(self, model: Any) -> None:
        raise AssertionError("nobody asks for it")

    def generate(self, rollouts: Sequence[Rollout], temperature: float | None = None) -> list[Rollout]:
        for rollout in rollouts:
            prompt = self.tokenizer.decode(rollout.prompt_ids, skip_special_tokens=True)
            question = prompt.split("\n")[0].removeprefix("Question: ")
            if prompt.endswith("Answer:"):
                self.prompts.append(prompt)
                totals = re.findall(r"=(\d+)", prompt)
                text = f" {totals[-1] if totals else 999}\nAnswer: {solve(question)}\n"
            else:
                total, steps = 0, []
                for name, digit in re.findall(r"([A-Za-z])(\d)", question.removeprefix("Add up")):
                    total += int(digit)
                    steps.append(f"{name}{digit}={total}")
                text = f"Steps: {', '.join(steps)}.\nAnswer: {total}\n"
            rollout.response_ids = np.array(self.encoder.encode(text), dtype=np.int64)
            rollout.finished = True
        return list(rollouts)


class Grader:
    """In place of the pool of processes."""

    def grade(self, answered: Sequence[tuple[Problem, str | None]]) -> list[Grade]:
        return [Grade(float(answer == p.answer), answer == p.answer, False, ()) for p, answer in answered]


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path) -> tuple[dict[str, Any], Reckoner]:
    tokenizer = load_tokenizer(tiny_run / "final")
    engine = Reckoner(tokenizer)
    config = load_config(GrpoConfig, ROOT / "configs" / "tiny-grpo.yaml", ["template={preset: exercise}"])
    mix = TaskSampler([TALLY], 0)
    alone: Any = SimpleNamespace(rank=0, ranks=1, device=None)
    held_out = HeldOut(mix, ClimbEvaluationSection(problems=12, samples=2), alone)
    worker = RolloutWorker(config, mix, engine, Grader(), tokenizer, ranks=1)  # type: ignore[arg-type]
    metrics, samples = held_out.evaluate(worker, 200)
    assert len(samples) == 12
    return metrics, engine


def test_only_its_own_whole_thought_leads_to_the_answer(evaluated: tuple[dict[str, Any], Reckoner]) -> None:
    metrics, _ = evaluated
    assert (metrics["pass@1"], metrics["greedy"], metrics["thought_share"]) == (1, 1, 1)
    assert metrics["pass@1_emptied"] == 0
    assert metrics["pass@1_other_thought"] < 0.2  # two tallies may have one sum
    assert metrics["pass@1_half_thought"] < 0.2  # the rest may be zeros
    assert {name for name in metrics if name.startswith("pass@1_size/")} == {
        f"pass@1_size/tally/{n}" for n in (4, 5, 6)
    }


def test_what_each_way_of_asking_shows(evaluated: tuple[dict[str, Any], Reckoner]) -> None:
    _, engine = evaluated
    emptied, other, half = (engine.prompts[at : at + 24] for at in (0, 24, 48))
    assert all(prompt.count("\n") == 1 and "Steps" not in prompt for prompt in emptied)
    for prompt in other:
        question, thought, _ = prompt.split("\n")
        names, thought_of = (re.findall(r"([A-Za-z])\d", line.partition(" ")[2]) for line in (question[14:], thought))
        assert names != thought_of
        assert len(names) == len(thought_of)  # of the same size
    for prompt in half:
        question, thought, _ = prompt.split("\n")
        assert 0 < thought.count("=") < question.count(",") + 1


def test_a_forced_answer_is_the_first() -> None:
    exercise, r1 = Template(TemplateSection(preset="exercise")), Template(TemplateSection())  # type: ignore[call-arg]
    assert exercise.force_answer("") == "Answer:"
    assert exercise.force_answer("Steps: a1=1.\n") == "Steps: a1=1.\nAnswer:"
    assert exercise.forced_answer(" 3\nAnswer: 4\n") == "3"
    assert exercise.forced_answer(" 3") == "3"  # at the end of a text a line ends too
    assert r1.force_answer("") == "</think>\n<answer>"
    assert r1.force_answer(" so 3 </think> ") == " so 3</think>\n<answer>".lstrip()
    assert r1.forced_answer("3</answer><answer>4</answer>") == "3"
    assert r1.forced_answer("3") is None  # cut off: not given


def test_the_frame_of_a_run_is_found_from_its_model(tmp_path: Path) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    assert template_of(tmp_path / "run" / "final").prompt("Q") == "Question: Q\n"
    (tmp_path / "run" / "config.yaml").write_text("template: {preset: r1-zero}\n")
    assert template_of(tmp_path / "run" / "final").prompt("Q").endswith("<think>")


@pytest.mark.parametrize("kind", SERIAL)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_serial_tasks(kind: str, split: Any) -> None:
    task = make_task(TaskSection(name="x", kind=kind, length=(2, 5)))  # type: ignore[arg-type]
    problems = [task.problem(split, index) for index in Random(1).sample(range(10**9), 60)]
    assert {problem.size for problem in problems} == {2, 3, 4, 5}
    for problem in problems:
        assert problem.answer == solve(problem.question)
        assert split_of(problem.question) == split
        assert task.verify(problem, problem.answer) == 1
        assert task.verify(problem, problem.answer + "1") == 0
