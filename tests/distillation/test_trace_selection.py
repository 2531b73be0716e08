"""Which traces the rules choose, and how one moves into another chat format."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mai_thinking.config.distillation import DistillConfig, ReframeSection
from mai_thinking.config.tasks import TemplateSection
from mai_thinking.data.tokenizer import train_tokenizer
from mai_thinking.rl.trace_selection import Selection, move, select
from mai_thinking.rl.traces import Trace


def prompts_of(selection: Selection, tokenizer: Any, source: int = 0) -> list[str]:
    return [tokenizer.decode(example.prompt_ids) for example in selection.sources[source].examples]


LOOP = "so we try once more. " * 20 + "Answer: 3\n"
FRENCH = "Nous devons additionner les deux nombres et vérifier le résultat. " * 2 + "Answer: 3\n"


@pytest.mark.parametrize(
    ("rule", "bad", "off"),
    [
        ("wrong", {"passed": False, "reward_task": 0.5}, "selection.correct_only=false"),
        ("unfinished", {"finished": False}, "selection.unfinished=true"),
        ("unanswered", {"answer": None, "response": "three\n"}, "selection.unanswered=true"),
        ("repetitive", {"response": LOOP}, "selection.max_repetition=null"),
        ("foreign", {"response": FRENCH}, "selection.max_foreign=null"),
        ("hack several-answers", {"response": "Answer: 2\nAnswer: 3\n"}, "selection.hacks=[own-question]"),
        ("hack own-question", {"response": "Question: 3?\nAnswer: 3\n"}, "selection.hacks=[several-answers]"),
        ("hack begging", {"response": "Please say yes. Answer: 3\n"}, "selection.patterns={}"),
        ("too long", {"response": "First " + "one, two, " * 60 + "Answer: 3\n"}, "batch.context_length=512"),
    ],
)
def test_a_rule_removes_its_own_and_counts_it(
    make: Callable[..., DistillConfig],
    store: Callable[..., Path],
    trace: Callable[..., Trace],
    tokenizer: Any,
    rule: str,
    bad: dict[str, Any],
    off: str,
) -> None:
    # What was asked for in French is no thought in French.
    asked = "It is 1 more, then 2 more than that.\nAnswer: trois nombres additionnés et leur résultat vérifié\n"
    good = [trace(0), trace(1, response=asked)]
    run = store([*good, trace(2, **bad)])
    loose = ["selection.patterns={begging: '[Pp]lease'}", "batch.context_length=512"]
    if rule == "too long":
        loose[1:] = ["batch.context_length=128", "selection.max_repetition=null"]
    chosen = select(make([run], *loose), tokenizer).sources[0]
    assert {name: count for name, count in chosen.removed.items() if count} == {rule: 1}
    assert (chosen.found, len(chosen.examples)) == (3, 2)
    assert f"| removed: {rule} | 1 |" in Selection([chosen]).markdown()
    assert len(select(make([run], *loose, off), tokenizer).sources[0].examples) == 3


@pytest.mark.parametrize(
    ("window", "wanted"),
    [
        ("{}", {7, 8, 9}),  # several late ones: a quarter of ten, rounded up
        ("{late: 0.01}", {9}),
        ("{steps: [2, 5]}", {2, 3, 4, 5}),
        ("{steps: [2, 5], late: 0.5}", {4, 5}),
    ],
)
def test_steps_are_chosen(
    make: Callable[..., DistillConfig],
    store: Callable[..., Path],
    trace: Callable[..., Trace],
    tokenizer: Any,
    window: str,
    wanted: set[int],
) -> None:
    run = store([trace(step, question=f"step {step}?", step=step) for step in range(10)])
    source = window.replace("{", f"{{run: {run}, ").replace(", }", "}")
    selection = select(make([run], f"traces=[{source}]"), tokenizer)
    assert prompts_of(selection, tokenizer) == [f"<|endoftext|>Question: step {step}?\n" for step in sorted(wanted)]
    assert selection.sources[0].removed["other steps"] == 10 - len(wanted)


def uneven(trace: Callable[..., Trace]) -> list[Trace]:
    """400 prompts, every other one with twelve times as many traces; of one prompt some are shorter than others."""
    traces = []
    for prompt in range(400):
        for number in range(12 if prompt % 2 else 1):
            thought = "well, " * (number % 3)
            traces.append(trace(len(traces), question=f"number {prompt}?", response=f"{thought}Answer: 3\n"))
    return traces


def test_prompts_are_drawn_uniformly_with_a_cap_and_a_total(
    make: Callable[..., DistillConfig], store: Callable[..., Path], trace: Callable[..., Trace], tokenizer: Any
) -> None:
    run = store(uneven(trace))
    options = ["selection.per_prompt=1", "selection.total=200"]
    chosen = prompts_of(select(make([run], *options), tokenizer), tokenizer)
    assert len(chosen) == len(set(chosen)) == 200
    numbers = [int(prompt.split("number ")[1].split("?")[0]) for prompt in chosen]
    assert 170 <= np.mean(numbers) <= 230  # 199.5 ± 6; the first to come would give 99.5
    rich = sum(number % 2 for number in numbers)
    assert 70 <= rich <= 130  # 100 ± 7; if traces were drawn and not prompts, it would be 185

    selection = select(make([run], "selection.per_prompt=5", "selection.total=300"), tokenizer)
    counts, source = Counter(prompts_of(selection, tokenizer)), selection.sources[0]
    assert max(counts.values()) == 5
    assert (len(source.examples), source.prompts) == (300, len(counts))
    assert source.removed["per prompt"] == 200 * 7
    assert source.removed["total"] == 200 + 200 * 5 - 300
    assert source.found == len(source.examples) + sum(source.removed.values())


def test_shortest_takes_the_shortest_and_random_does_not(
    make: Callable[..., DistillConfig], store: Callable[..., Path], trace: Callable[..., Trace], tokenizer: Any
) -> None:
    run = store(uneven(trace))
    lengths = {}
    for order in ("shortest", "random"):
        source = select(make([run], "selection.per_prompt=2", f"selection.order={order}"), tokenizer).sources[0]
        lengths[order] = Counter(len(example.response_ids) for example in source.examples)
    assert len(lengths["shortest"]) == 1
    assert len(lengths["random"]) == 3


def test_the_seed_decides(
    make: Callable[..., DistillConfig], store: Callable[..., Path], trace: Callable[..., Trace], tokenizer: Any
) -> None:
    run = store(uneven(trace))
    prints = [select(make([run], "selection.total=100", f"seed={seed}"), tokenizer).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_the_tokens_are_those_that_were_drawn(
    make: Callable[..., DistillConfig],
    store: Callable[..., Path],
    trace: Callable[..., Trace],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    """Letter by letter, as no encoding of the text would give them; unless the model has another tokenizer."""
    letters = [token for letter in "Answer: 3\n" for token in tokenizer.encode(letter, add_special_tokens=False)]
    run = store([trace(0) | {"response_ids": [*letters, tokenizer.eos_token_id]}])
    (example,) = select(make([run]), tokenizer).sources[0].examples
    assert example.response_ids.tolist() == [*letters, tokenizer.eos_token_id]

    other = train_tokenizer(["Question: What is the answer? Answer: 3\n"] * 20, 300)
    (example,) = select(make([run]), other).sources[0].examples
    assert other.decode(example.response_ids) == "Answer: 3\n<|endoftext|>"
    assert other.decode(example.prompt_ids) == f"<|endoftext|>{trace(0)['prompt']}"


def test_a_trace_moves_into_another_frame_and_back() -> None:
    exercise, r1 = (TemplateSection.model_validate({"preset": preset}) for preset in ("exercise", "r1-zero"))
    forth = move("Question: 1 + 2?\n", "2 and 1.\nAnswer: 3\nMore", exercise, ReframeSection(template=r1))
    assert forth is not None
    assert forth[0].endswith("User: 1 + 2?\nAssistant: <think>")
    assert forth[1] == "2 and 1.\n<answer>3</answer>"
    back = ReframeSection(template=exercise.model_copy(update={"answer_start": "Answer: "}), replace={"</think>": ""})
    assert move(forth[0], "2 and 1.\n</think><answer> 3 </answer>", r1, back) == (
        "Question: 1 + 2?\n",
        "2 and 1.\nAnswer: 3\n",
    )
    assert move("Question: 1 + 2?\n", "three\n", exercise, ReframeSection(template=r1)) is None
    assert move("User: 1 + 2?\n", "Answer: 3\n", exercise, ReframeSection(template=r1)) is None


def test_the_model_reads_the_new_frame(
    make: Callable[..., DistillConfig], store: Callable[..., Path], trace: Callable[..., Trace], tokenizer: Any
) -> None:
    run = store([trace(0, question="1 + 2?"), trace(1, response="no idea\n")])
    frame = "{prompt: '[{question}]', answer_start: '(', answer_end: ')'}"
    source = select(make([run], f"reframe={{template: {frame}}}"), tokenizer).sources[0]
    assert source.removed["not in the frame"] == 1
    assert tokenizer.decode(source.examples[0].prompt_ids) == "<|endoftext|>[1 + 2?]"
    assert tokenizer.decode(source.examples[0].response_ids) == "(3)<|endoftext|>"
