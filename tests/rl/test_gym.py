"""Data sets of reasoning-gym as tasks: splits, sizes, and verifiers that pay for what is no answer."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.config.tasks import TaskSection
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks import Problem, make_task
from mai_thinking.rl.tasks.gym import rounds_to

reasoning_gym = pytest.importorskip("reasoning_gym")

NO_ANSWERS = (
    *(
        "none",
        "None",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "Infinity",
        "1e999",
        "0",
        "-0",
        "1",
        "0/1",
        "1j",
        "",
        "-",
        "...",
        "a",
    ),
    *(
        "banana",
        "True",
        "False",
        "true",
        "yes",
        "no",
        "null",
        "N/A",
        "impossible",
        "No solution",
        "[]",
        "{}",
        "()",
        "[[]]",
    ),
    *("[nan]", "nan nan", "0 0 0", "(0, 0)"),
)
REFUSED = {"composite", "game_of_life_halting", "propositional_logic", "puzzle24"}
"""`composite` is a mixture of others, and wants `options`."""
GUARDED = ["advanced_geometry", "coin_flip", "complex_arithmetic", "decimal_arithmetic", "number_format", "pool_matrix"]
GUARDED += ["polynomial_equations", "time_intervals"]
IN_MEMORY = ["acre", "gsm_symbolic", "list_functions", "word_ladder"]
ORDERLESS = {"cryptarithm", "knights_knaves", "prime_factorization", "quantum_lock", "shortest_path", "sokoban"}
ORDERLESS |= {"polynomial_multiplication", "simple_integration", "intermediate_integration", "complex_arithmetic"}
"""What is right in one order is right in others, or in some others."""


def gym_section(**fields: Any) -> TaskSection:
    return TaskSection(**{"name": "gym", "kind": "reasoning-gym", **fields})


def no_answers(dataset: str, problem: Problem, others: list[str]) -> Iterator[str]:
    """What no verifier may pay for."""
    answer = problem.answer
    yield from NO_ANSWERS
    yield from (problem.question, f"{problem.question} {answer}", f"{answer} or so", f"not {answer}", f"{answer} km")
    yield from (", ".join(others), "\n".join(others), " or ".join(others), f"{answer} {answer}")
    yield from others if dataset != "sokoban" else ()  # a long walk may solve a small puzzle too
    for separator in () if dataset in ORDERLESS else (", ", " ", "\n"):
        if len(set(parts := answer.split(separator))) > 1:
            yield separator.join(parts[::-1])
            yield separator.join(parts[1:] + parts[:1])
    try:
        number = float(answer)
    except ValueError:
        return
    if dataset != "power_function":  # three digits are asked for there
        yield from (repr(number * 1.01), repr(number + 0.01), repr(number / 100), repr(number + 1))


def same_number(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return False


def probe(dataset: str, count: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = make_task(gym_section(dataset=dataset))
        problems = [task.problem("train", index) for index in range(count)]
        others = list(dict.fromkeys(problem.answer for problem in problems))
        for problem in problems:
            if problem.answer != "None":  # for some the library has no answer, only a verifier
                assert task.verify(problem, problem.answer) == 1
            paid = [text for text in no_answers(dataset, problem, others) if task.verify(problem, text)]
            wrong = [text for text in paid if not same_number(text, problem.answer) and text != problem.answer]
            assert not wrong, (problem.question, problem.answer, wrong)


@pytest.mark.parametrize("dataset", [*GUARDED, *IN_MEMORY, "knights_knaves", "power_function", "simple_integration"])
def test_what_is_no_answer_earns_nothing(dataset: str) -> None:
    probe(dataset, 4)


@pytest.mark.slow
@pytest.mark.parametrize("dataset", sorted(set(reasoning_gym.factory.DATASETS) - REFUSED))
def test_no_data_set_pays_for_what_is_no_answer(dataset: str) -> None:
    probe(dataset, 8)


@pytest.mark.parametrize(
    ("dataset", "answer"),
    [
        ("coin_flip", "0"),
        ("complex_arithmetic", "nan"),
        ("game_of_life_halting", "banana"),
        ("number_format", "+0.005"),
    ],
)
def test_the_guard_is_needed(dataset: str, answer: str) -> None:
    """The library alone pays for these."""
    items = reasoning_gym.create_dataset(dataset, size=50, seed=0)
    texts = [repr(float(item["answer"]) + float(answer)) if answer[0] == "+" else answer for item in items]
    assert any(items.score_answer(text, item) >= 0.99 for text, item in zip(texts, items, strict=True))


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("-0.7757, 0.0, 1.9717", "-0.77568, 0.0, 1.97170", True),
        ("-0.7757, 0.0, 1.9717", "-0.776, 0.0, 1.972", False),
        ("-0.7757, 0.0, 1.9717", "0.0, -0.7757, 1.9717", False),
        ("0.0", "0.04", False),
        ("0.0", "0", True),
        ("8", "8.4", False),
        ("8.0", "8.04", False),
        ("592641326.305", "5.926413263049999e+08", True),
        ("4.86090396050", "4.8609039605", True),
        ("83 days, 18:16", "83 days, 18:1", False),
        ("3 days", "3", False),
    ],
)
def test_rounding(reference: str, answer: str, right: bool) -> None:
    assert rounds_to(reference, answer) == right


@pytest.mark.parametrize("dataset", ["chain_sum", "spell_backward", "countdown", "string_insertion", "n_queens"])
def test_items_and_splits(dataset: str) -> None:
    task = make_task(gym_section(dataset=dataset))
    train = [task.problem("train", index) for index in range(10)]
    held_out = [task.problem("held_out", index) for index in range(10)]
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert len({p.question for p in train}) == 10
    fresh = make_task(gym_section(dataset=dataset))  # as in a grading process
    for problem in train + held_out:
        assert fresh.verify(problem, problem.answer) == 1
        # The library itself pays for these: the reference as a part, or as the beginning, of the answer.
        assert fresh.verify(problem, f"{problem.answer} or so") == 0
        assert fresh.verify(problem, "") == 0


def test_another_answer_that_is_right_counts() -> None:
    task = make_task(gym_section(dataset="countdown"))
    problem = task.problem("train", 0)
    assert task.verify(problem, f"({problem.answer})") == 0
    first, rest = problem.answer.split(" ", 1)
    assert task.verify(problem, f"({first}) {rest}") == 1


def test_answers_are_never_run_as_code(tmp_path: Path) -> None:
    task, target = make_task(gym_section(dataset="string_insertion")), tmp_path / "made"
    problem = task.problem("train", 0)
    for code in (f"open('{target}', 'w')", f"[open('{target}', 'w')]", f'f\'{{open("{target}", "w")}}\''):
        assert task.verify(problem, code) == 0
    assert not target.exists()
    task._dataset.score_answer(f"open('{target}', 'w')", task._entry(problem.item))  # type: ignore[attr-defined]
    assert target.exists(), "the library alone would have run it: the guard is needed"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "chain_sun"}, "did you mean 'chain_sum'"),
        ({"dataset": "chain_sum", "options": {"terms": 3}}, "does not take these `options`"),
        ({"dataset": "puzzle24"}, "take `countdown`"),
        ({"dataset": "game_of_life_halting"}, "content with any text"),
        ({"dataset": "propositional_logic"}, "content with a premise said again"),
    ],
)
def test_what_cannot_be_had_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_task(gym_section(**fields))
