"""Data sets of the library reasoning-gym as tasks (extra `tasks`).

Three of its habits are not ours. It pays partial credit, for the reference as a part of the answer among other things:
only full marks count. Some verifiers are content with what is no answer: their data sets are refused, or
compared with the reference here; a test probes all of them. And item i of a data set with seed s is item 0 of one with
seed s + i, so that two seeds give no two splits: ours go by the question's text.
"""

import inspect
import random
import re
import sys
from decimal import Decimal
from functools import lru_cache

from mai_thinking.config.names import nearest_name
from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.questions import Split, split_of
from mai_thinking.errors import UsageError
from mai_thinking.rl.tasks.base import LONGEST_ANSWER, Problem, Task
from mai_thinking.rl.tasks.mathematics import same_mathematics

_FULL = 1 - 1e-6
"""Less than full marks may be one wrong cell of a hundred."""
_ITEMS = 2**31
_IN_MEMORY = {"acre": 10_000, "gsm_symbolic": 10_000, "list_functions": 10_000, "word_ladder": 10_000}
"""Items of the data sets that make them, or a list of them, at once. `word_ladder` takes at most 20,000."""
_UNSOUND = {
    "puzzle24": "is content with any four numbers that make 24; take `countdown`",
    "game_of_life_halting": "is content with any text; take `game_of_life`",
    "propositional_logic": "is content with a premise said again; take `knights_knaves`",
}
"""Data sets whose verifiers can be fooled without any knowledge of the question."""
_TOLERANT = frozenset(
    {"advanced_geometry", "coin_flip", "complex_arithmetic", "decimal_arithmetic", "number_format", "pool_matrix"}
    | {"polynomial_equations", "time_intervals"}
)
"""Data sets whose verifiers take numbers that are near, by any distance or NaN's: an answer must round to the reference
at its last digit."""
_NEAR = Decimal("1e-4")
"""Of the reference: digits beyond it may differ by no more, so that 0.04 is not 0.0."""
_ATTEMPTS = 500

_EVALUATES = re.compile(r"(?<!def )\b(?:eval|exec|sympify|parse_expr)\(")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,3})?")
_SPACE = re.compile(r"[ \t]+")
_QUOTED = re.compile(r"""'[^'\\\n]*'|"[^"\\\n]*\"""")
_NAME = re.compile(r"[^\W\d]\w*")
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
    | {"exp", "log", "ln", "sqrt", "Abs", "pi", "True", "False"}
)


class GymTask(Task):
    """One data set of reasoning-gym, with its section's options."""

    def __init__(self, section: TaskSection) -> None:
        """Raises UsageError if the library is missing, or does not know the data set or an option."""
        super().__init__(section)
        dataset = section.dataset
        try:
            import reasoning_gym
        except ImportError:
            raise UsageError(
                f"task {self.name!r} needs reasoning-gym: pip install 'mai_thinking[tasks]', or remove the task"
            ) from None
        if dataset not in reasoning_gym.factory.DATASETS:
            near = nearest_name(str(dataset), reasoning_gym.factory.DATASETS)
            raise UsageError(f"task {self.name!r}: reasoning-gym has no data set {dataset!r}; {near}")
        if dataset in _UNSOUND:
            raise UsageError(f"task {self.name!r}: the verifier of {dataset} {_UNSOUND[dataset]}")
        self._items = _IN_MEMORY.get(str(dataset), _ITEMS)
        self._tolerant = dataset in _TOLERANT
        try:
            self._dataset = reasoning_gym.create_dataset(dataset, **{**section.options, "seed": 0, "size": self._items})
        except (TypeError, ValueError, AssertionError) as error:
            raise UsageError(f"task {self.name!r}: {dataset} does not take these `options`: {error}") from None
        # Some verifiers hand the answer to Python's eval, or to sympy's, which is the same.
        modules = {sys.modules[cls.__module__] for cls in type(self._dataset).__mro__ if "reasoning" in cls.__module__}
        self._evaluates = any(_EVALUATES.search(inspect.getsource(module)) for module in modules)
        self._entry = lru_cache(maxsize=256)(self._dataset.__getitem__)

    def problem(self, split: Split, index: int) -> Problem:
        rng = random.Random(f"{split} {index}")
        for _ in range(_ATTEMPTS):
            item = rng.randrange(self._items)
            entry = self._entry(item)
            question = str(entry["question"]).strip()
            if split_of(question) == split:
                return self.made(question, str(entry["answer"]), item=item)
        raise self.lacks(split, f" among {_ATTEMPTS}; give it `options` with more distinct questions")

    def verify(self, problem: Problem, answer: str) -> float:
        """1 if the library's own verifier gives full marks. For a grading process only.

        More text around the reference is wrong, for some verifiers look no further than the reference's length.
        """
        answer = answer.strip()
        if len(answer) > LONGEST_ANSWER:
            return 0.0
        try:
            entry = self._entry(problem.item)
            if answer != problem.answer and (
                problem.answer.casefold() in answer.casefold() or (self._evaluates and not harmless(answer))
            ):
                return 0.0
            if self._tolerant:
                return float(
                    rounds_to(problem.answer, answer) or same_mathematics(problem.answer, answer, problem.question)
                )
            return float(self._dataset.score_answer(answer, entry) >= _FULL)
        except Exception:  # verifiers raise all kinds of errors on text that is no answer
            return 0.0


def rounds_to(reference: str, answer: str) -> bool:
    """Whether `answer` is `reference` but for numbers that are the reference's when rounded to its digits."""
    if _SPACE.sub(" ", _NUMBER.sub("#", answer)).strip() != _SPACE.sub(" ", _NUMBER.sub("#", reference)).strip():
        return False
    return all(
        abs(Decimal(other) - Decimal(one)) <= min(_half_unit(one), abs(Decimal(one)) * _NEAR)
        for one, other in zip(_NUMBER.findall(reference), _NUMBER.findall(answer), strict=True)
    )


def _half_unit(number: str) -> Decimal:
    """Half of what the last of its decimals counts; 0 if it has none."""
    exponent = Decimal(number).as_tuple().exponent
    return Decimal((0, (5,), exponent - 1)) if isinstance(exponent, int) and exponent < 0 else Decimal(0)


def harmless(answer: str) -> bool:
    """Whether evaluating `answer` can do nothing but compute (for ever, perhaps): it is a literal, with quoted text or
    not, or a formula of one-letter variables and known functions. Quoted text beside names is refused, for sympy
    evaluates the text that a function is given."""
    bare = _QUOTED.sub("", answer)
    names = set(_NAME.findall(bare))
    if any(sign in bare for sign in ("'", '"', "\\", "@", ":=")) or (bare != answer and names):
        return False
    # S(…), N(…), Q and the like are sympy's own; a letter that is called is none of ours.
    called = re.search(r"(?<!\w)[^\W\d](?=\s*[(.])", bare)
    return called is None and all(len(name) == 1 or name in _FUNCTIONS for name in names)
