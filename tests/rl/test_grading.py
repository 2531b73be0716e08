"""Graders under attack: verifiers that hang, crash and eat memory, and ten thousand hostile strings."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.config.tasks import FAMILIES, GradingSection, TaskSection
from mai_thinking.errors import UsageError
from mai_thinking.rl.grading import GradingPool
from mai_thinking.rl.tasks import Grade, Problem, TaskSampler

SUM = TaskSection(name="sum", kind="sum")
RIGHT = Problem("sum", "", "What is 7 + 5?", "12", 0)

# Python runs a module of this name at its start: the grading processes get verifiers that do what an answer says.
SABOTAGE = """
import mmap, os, signal, sys, time
from mai_thinking.rl.tasks.procedural import ProceduralTask

def recurse(): return recurse()

DEEDS = {
    "wait": lambda: time.sleep(1000),
    "work": lambda: 9**9**9,
    "eat": lambda: float(len(mmap.mmap(-1, 2 * 10**9)) > 0),
    "abort": os.abort,
    "exit": lambda: os._exit(0),
    "leave": sys.exit,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "recurse": recurse,
    "raise": lambda: 1 / 0,
    "print": lambda: print("1.0"),
    "write": lambda: os.write(os.open(os.environ["SABOTAGE_TARGET"], os.O_WRONLY), b"x"),
    "nan": lambda: float("nan"),
    "much": lambda: 1e9,
    "half": lambda: 0.5,
    "partly": lambda: (0.5, True),
}
honest = ProceduralTask.verify

def verify(self, problem, answer):
    return (DEEDS[answer]() or 0.0) if answer in DEEDS else honest(self, problem, answer)

ProceduralTask.verify = verify
"""


@pytest.fixture
def sabotaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GradingPool]:
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "target").write_text("")
    monkeypatch.setenv("SABOTAGE_TARGET", str(tmp_path / "target"))
    with GradingPool([SUM], workers=2, seconds=0.2, megabytes=256) as pool:
        yield pool


@pytest.fixture
def pool() -> Iterator[GradingPool]:
    with GradingPool([SUM], workers=2, seconds=2, megabytes=256) as pool:
        yield pool


def scores(grades: list[Grade]) -> list[float]:
    return [grade.score for grade in grades]


def test_grades_come_in_order(pool: GradingPool) -> None:
    problems = [TaskSampler([SUM], 0).problem("train", n) for n in range(300)]
    answers = [p.answer if n % 3 == 0 else None if n % 3 == 1 else f"{p.answer}0" for n, p in enumerate(problems)]
    expected = [float(n % 3 == 0) for n in range(300)]
    assert scores(pool.grade(list(zip(problems, answers, strict=True)))) == expected
    assert pool.grade([]) == []
    assert scores(pool.grade([(RIGHT, None)] * 3)) == [0, 0, 0]


@pytest.mark.parametrize(
    "deed",
    ["wait", "work", "eat", "abort", "exit", "leave", "kill", "recurse", "raise", "print", "write", "nan", "much"],
)
def test_a_bad_grader_costs_one_score(sabotaged: GradingPool, tmp_path: Path, deed: str) -> None:
    items = [(RIGHT, "12")] * 20 + [(RIGHT, deed)] + [(RIGHT, "12")] * 20
    start = time.monotonic()
    assert scores(sabotaged.grade(items)) == [1.0] * 20 + [0.0] + [1.0] * 20
    assert scores(sabotaged.grade(items[:3])) == [1.0] * 3, "the pool goes on"
    assert time.monotonic() - start < 60
    assert (tmp_path / "target").read_text() == ""


def test_a_number_is_no_verdict(sabotaged: GradingPool) -> None:
    """Less than all passes only if the grader says so."""
    items = [(RIGHT, answer) for answer in ("12", "half", "partly", "nan")]
    assert sabotaged.grade(items) == [Grade(1, True), Grade(0.5, False), Grade(0.5, True), Grade(0, False)]


def test_a_process_that_dies_by_accident_makes_no_answer_wrong(pool: GradingPool) -> None:
    for round_ in range(3):
        for worker in pool._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
        assert scores(pool.grade([(RIGHT, "12")] * 200)) == [1.0] * 200, round_


def test_a_process_that_is_held_up_makes_no_answer_wrong(pool: GradingPool) -> None:
    pids = [worker.process.pid for worker in pool._workers]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(0.5, lambda: [os.kill(pid, signal.SIGCONT) for pid in pids])
    timer.start()
    assert scores(pool.grade([(RIGHT, "12")] * 200)) == [1.0] * 200
    assert [worker.process.pid for worker in pool._workers] == pids, "it took less than its time"
    timer.join()


def test_signals_for_the_job_do_not_end_the_processes(pool: GradingPool) -> None:
    pids = [worker.process.pid for worker in pool._workers]
    for pid, number in ((pids[0], signal.SIGTERM), (pids[1], signal.SIGINT)):
        os.kill(pid, number)
    assert scores(pool.grade([(RIGHT, "12")] * 200)) == [1.0] * 200
    assert [worker.process.pid for worker in pool._workers] == pids
    assert all(os.getpgid(pid) != os.getpgid(0) for pid in pids), "Ctrl-C does not reach them"


def test_the_processes_end_with_the_pool_and_with_the_trainer() -> None:
    with GradingPool([SUM], workers=1, seconds=1, megabytes=64) as pool:
        process = pool._workers[0].process
        assert process.poll() is None
    assert process.poll() is not None
    script = (
        "import os, signal; from mai_thinking.config.tasks import TaskSection; from mai_thinking.rl.grading import *\n"
        "pool = GradingPool([TaskSection(name='s', kind='sum')], workers=1, seconds=1, megabytes=64)\n"
        "print(pool._workers[0].process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid = int(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False).stdout)
    until = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")


def test_no_torch_in_the_processes(pool: GradingPool) -> None:
    import torch  # noqa: F401  # in this process, so that a fork would show

    pool.grade([(RIGHT, "12")])
    for worker in pool._workers:
        assert "libtorch" not in Path(f"/proc/{worker.process.pid}/maps").read_text()
    assert "libtorch" in Path("/proc/self/maps").read_text()


def test_further_graders_and_a_pattern_without_end() -> None:
    gate = TaskSection(name="sum", kind="sum", graders=({"pattern": r"(1+)+2?\.?"},))  # type: ignore[arg-type]
    mean = gate.model_copy(update={"name": "mean", "combination": "sum"})
    ties = gate.model_copy(update={"name": "ties", "combination": "lexicographic"})
    mine, last = Problem("mean", "", "", "12", 0), Problem("ties", "", "", "12", 0)
    items = [
        *[(RIGHT, "12"), (RIGHT, "1"), (RIGHT, "12 ."), (RIGHT, "1" * 60 + "x"), (RIGHT, None)],
        *[(mine, " 12"), (mine, "12 ."), (mine, "112"), (mine, None), (last, "12 ."), (last, "112")],
    ]
    stopped = Grade(0, False, gate_failed=True)
    with GradingPool([gate, mean, ties], workers=1, seconds=0.3, megabytes=64) as pool:
        assert pool.grade(items) == [
            *[Grade(1, True), Grade(0, False), stopped, stopped, stopped],
            # The form alone earns half of the score, and passes nothing.
            *[Grade(1, True), Grade(0.5, True), Grade(0.5, False), Grade(0, False)],
            *[Grade(1, True, tie_breakers=(0,)), Grade(0, False, tie_breakers=(1,))],
        ]


def test_a_task_that_cannot_be_had_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        GradingPool(
            [TaskSection(name="x", kind="jsonl", path=str(tmp_path / "none"))], workers=2, seconds=1, megabytes=64
        )


def test_an_exception_leaves_no_scores_behind(pool: GradingPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.grade([(RIGHT, "12")] * 10)
    assert all(worker.process.poll() is not None for worker in pool._workers)


HOSTILE = (
    *("(" * 5000 + ")" * 5000, "9**9**9", "10**10**10", "factorial(10**9)", "__import__('os')._exit(0)"),
    *("１２", "١٢", "½", "∞", "nan", "inf", "None", "True", "0x1F", "1_000", "\\boxed{", "\\frac{1}{0}", "\\sqrt{"),
    *("{" * 900, "[" * 2000, "$" * 99, "a" * 9000, "x" * 12000, "🙂" * 50, " " * 500),
    *("\0", "\ud800", "\u202e", "\u200b", "\n1.0\nready\n", '{"problems": []}', "%s%n"),
    *("<answer>", "</answer>", "Answer:", "1, 2, 3", "a or b"),
)


def hostile(rng: random.Random, problem: Problem) -> str:
    """Something that a model could write to break or to fool a verifier."""
    digits = "".join(rng.choices("0123456789", k=rng.choice([3, 30, 5000])))
    pieces = [
        *HOSTILE,
        *(digits, f"-{digits}", f"{digits}.{digits}e{digits}", problem.question),
        "".join(chr(rng.randrange(0x11000)) for _ in range(rng.randrange(30))),
    ]
    text = rng.choice(["", " ", "\n", ", "]).join(rng.sample(pieces, rng.randint(1, 4)))
    if rng.random() < 0.1:  # the answer, written in other digits or among others
        written = [
            problem.answer.translate({ord("0") + d: chr(0x660 + d) for d in range(10)}),
            " ".join(problem.answer) + " ",
            f"{problem.answer}, {text}",
            f"0{problem.answer}",
        ]
        return rng.choice(written)
    return text


@pytest.mark.timeout(120)
def test_ten_thousand_hostile_strings(tmp_path: Path) -> None:
    """None hangs, none crashes, and none that is not the answer earns anything."""
    qa = tmp_path / "qa.jsonl"
    qa.write_text("\n".join(f'{{"question": "How many, {n}?", "answer": "so #### {n * 37:,}"}}' for n in range(100)))
    sections = [TaskSection(name=family, kind=family) for family in FAMILIES]
    mix = TaskSampler([*sections, TaskSection(name="qa", kind="jsonl", path=str(qa), weight=7)], seed=0)
    rng, items = random.Random(20), []
    for n in range(10_000):
        problem = mix.problem("train", n)
        items.append((problem, problem.answer if n % 100 == 0 else hostile(rng, problem)))
    with GradingPool([*sections, mix_section(qa)], workers=2, seconds=2, megabytes=512) as pool:
        pids = [worker.process.pid for worker in pool._workers]
        earned = scores(pool.grade(items))
        assert [worker.process.pid for worker in pool._workers] == pids, "nothing hung and nothing crashed"
    assert earned[::100] == [1.0] * 100
    paid = [(problem.answer, answer) for (problem, answer), score in zip(items, earned, strict=True) if score > 0]
    assert all(same(reference, answer) for reference, answer in paid), paid


def same(reference: str, answer: str) -> bool:
    """Whether an answer is the reference but for white space at its ends and around commas."""
    return re.sub(r"\s*,\s*", ",", answer.strip()) == re.sub(r"\s*,\s*", ",", reference)


def mix_section(qa: Path) -> TaskSection:
    return TaskSection(name="qa", kind="jsonl", path=str(qa))


def test_mathematics_without_end(tmp_path: Path) -> None:
    qa = tmp_path / "qa.jsonl"
    qa.write_text('{"question": "Which?", "answer": "x+1"}')
    problem = Problem("qa", "", "Which?", "x+1", 0.5)
    bad = ["9**9**9", "9^{9^{9^{9}}}", "(" * 140 + ")" * 140]
    answers = ["1+x", *bad, "$1 + x$"]
    with GradingPool([mix_section(qa)], workers=1, seconds=1, megabytes=512) as pool:
        start = time.monotonic()
        assert scores(pool.grade([(problem, answer) for answer in answers])) == [1, 0, 0, 0, 1]
        assert time.monotonic() - start < 90


def test_the_limits_are_a_section() -> None:
    limits = GradingSection()
    with GradingPool([SUM], **limits.model_dump()) as pool:
        assert scores(pool.grade([(RIGHT, "12")])) == [1]
