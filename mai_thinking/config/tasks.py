"""What a model is asked in RL, in which frame, how its answers are graded and what they earn.

Importable without torch. MAI-Thinking-1 report §3.1, §3.6.
"""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from mai_thinking.config.base import ORDERED, Coefficient, Name, Pattern, Seconds, Section, Weight

SerialFamily = Literal["tally", "running", "cups", "chain", "repeat", "numbers", "long-sum", "map", "wording"]
"""The families of `mai_thinking.data.serial`, whose problems need a step of work for each item; `repeat` and `numbers`
need none. The steps of `long-sum` and `map` are calls of a tool; the items of `numbers` and `long-sum` are digits.
`wording` asks for a form: a language, and a mark between the words."""

Family = Literal["sum", "difference", "largest", "count", "position", "sort", "next"]
"""The procedural families of `mai_thinking.rl.tasks.procedural`, beside the serial ones."""

FAMILIES: tuple[Family, ...] = get_args(Family)
SERIAL: tuple[SerialFamily, ...] = get_args(SerialFamily)
LISTS: tuple[Family, ...] = ("largest", "count", "position", "sort", "next")
"""Families whose question shows a list."""

Combination = Literal["sum", "gate", "lexicographic"]
"""How several graders of one problem become one grade; see `mai_thinking.rl.tasks.base.combine`."""

_Digits = Annotated[int, Field(ge=1, le=12)]
_Items = Annotated[int, Field(ge=1, le=30)]


class GraderSection(Section):
    """One more grader of a task's answers, beside the task's own."""

    pattern: Pattern
    """A regular expression that the whole answer must match, white space around it apart."""
    weight: Coefficient = 1.0
    """In a sum of graders; the task's own counts 1."""
    passes: bool = False
    """Whether an answer that matches passes, as one does that the task's own grader passes."""


class TaskSection(Section):
    """One family of problems."""

    name: Name
    """Unique in the run; letters, digits, `.`, `_` and `-`."""
    kind: Family | SerialFamily | Literal["reasoning-gym", "verifiers", "jsonl", "repair"]
    """A procedural family, a data set of the library reasoning-gym, a taskset of the library verifiers, a file of
    questions and answers, or programs to repair."""
    weight: Weight = 1.0
    """Share of the problems, relative to the other tasks' weights."""
    digits: Annotated[tuple[_Digits, _Digits], ORDERED] | None = None
    """Procedural: fewest and most digits of a number, each count as likely as the others; null means 1 to 2."""
    length: Annotated[tuple[_Items, _Items], ORDERED] | None = None
    """Procedural, with a list, or serial: fewest and most items; null means 3 to 6."""
    dataset: str | None = None
    """reasoning-gym: the data set's name; verifiers: the taskset's."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of its configuration."""
    path: str | None = None
    """JSONL: the file."""
    question_field: str = "question"
    """JSONL: the field that holds the question."""
    answer_field: str = "answer"
    """JSONL: the field that holds the answer; of a worked solution only what follows its last `####` counts."""
    grading: Literal["exact", "math"] = "math"
    """JSONL: equal text but for white space, or equal mathematically."""
    graders: tuple[GraderSection, ...] = ()
    """Further graders of the same answer."""
    combination: Combination = "gate"
    """How the task's own grade and those of `graders`, in this order, become one score."""

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        kinds = {
            "digits": FAMILIES, "length": (*LISTS, *SERIAL), "path": ("jsonl",),
            "dataset": ("reasoning-gym", "verifiers"), "options": ("reasoning-gym", "verifiers"),
        }  # fmt: skip
        for field, allowed in kinds.items():
            if getattr(self, field) and self.kind not in allowed:
                raise ValueError(f"task {self.name!r}: `{field}` is not for kind {self.kind!r}; remove it")
        for field, kind in (("dataset", "reasoning-gym"), ("dataset", "verifiers"), ("path", "jsonl")):
            if self.kind == kind and not getattr(self, field):
                raise ValueError(f"task {self.name!r}: kind {kind!r} needs `{field}`")
        if self.length and self.length[0] < 2 and self.kind not in SERIAL:
            raise ValueError(f"task {self.name!r}: `length` begins at 2, not at {self.length[0]}; a list has two items")
        return self


_PRESETS: dict[str, dict[str, str]] = {
    # Our words for the report's frame (§3.1): plain text, no chat tokens, the thought opened for the model.
    "r1-zero": {
        "prompt": (
            "A user asks and an assistant replies. The assistant first works the problem out between <think> and"
            " </think>, then gives the bare result between <answer> and </answer>.\n"
            "User: {question}\nAssistant: <think>"
        ),
        "thought_end": "</think>\n",
        "answer_start": "<answer>",
        "answer_end": "</answer>",
        "call_start": "<call>",
        "call_end": "</call>",
        "result_start": "<result>",
        "result_end": "</result>\n",
    },
    # The form of the embedded corpus of exercises, which a small base model knows.
    "exercise": {
        "prompt": "Question: {question}\n",
        "thought_end": "\n",
        "answer_start": "Answer:",
        "answer_end": "\n",
        "call_start": "Call: ",
        "call_end": "\n",
        "result_start": "Result: ",
        "result_end": "\n",
    },
}


class TemplateSection(Section):
    """The frame of a question, and where the answer lies in a response (§3.1). Fields not given are the preset's."""

    preset: Literal["r1-zero", "exercise"] = "r1-zero"
    prompt: str
    """With `{question}` in it."""
    thought_end: str = ""
    """What comes between a thought and the start of the answer, where evaluation forces the answer."""
    answer_start: str = Field(min_length=1)
    """The answer is what follows the last of these …"""
    answer_end: str
    """… up to the next of these. Empty: the end of the text. A line break: the end of the line or of the text."""
    call_start: str = Field(min_length=1)
    """With tools: the calls of a step are what follows the last of these, with `&&` between them, …"""
    call_end: str = Field(min_length=1)
    """… up to the next of these, which ends the step."""
    result_start: str
    """What comes before what the calls gave, …"""
    result_end: str = Field(min_length=1)
    """… and behind it."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {**_PRESETS.get(str(fields.get("preset", "r1-zero")), {}), **fields}

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if "{question}" not in prompt:
            raise ValueError("the prompt lacks `{question}`, the place of the question")
        return prompt


EXERCISE = TemplateSection(preset="exercise")  # type: ignore[call-arg]
"""The frame of the embedded exercises."""


class GradingSection(Section):
    """Limits of the processes that grade what a model wrote."""

    workers: int = Field(default=1, ge=1, le=1024)
    """Processes, beside the trainer."""
    seconds: Seconds = 2.0
    """Processor time that one answer may take; waiting, it may take `grading.WAIT_FACTOR` times as long."""
    megabytes: int = Field(default=1024, ge=16, lt=2**31)
    """Memory that a process may take beyond what it starts with."""


class RewardSection(Section):
    """R = R_task + w_language·R_language − w_length·R_length (§3.1)."""

    w_language: Coefficient = 0.5
    """0 switches the term off."""
    alpha: Coefficient = 0.005
    """What one word of another language costs: R_language = max(1 − alpha·n, 0)."""
    w_length: Coefficient = 0.25
    """0 switches the term off, as in the last stage of the length curriculum."""
    w_calls: Coefficient = 0.0
    """What the most calls of a group cost, where all of it passes."""
    w_waste: Coefficient = 0.0
    """What it costs if all calls of a rollout are invalid or repeated."""
    flat_length: bool = False
    """A rival: the price on length is the same however many of a problem's rollouts pass (ρ = 1)."""
