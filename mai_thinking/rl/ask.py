"""One question to a model, for people to look at: its thought, its answer, and the verifier's word."""

from transformers import PreTrainedTokenizerBase

from mai_thinking.data.serial import solve
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.rl.tasks.base import same_text
from mai_thinking.rl.template import Template
from mai_thinking.training.sampling import sample_text


def ask(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    question: str,
    **settings: float,
) -> str:
    """Ask `question` in the frame of `template`; `settings` as for `sample_text`. → Text for a terminal, with a verdict
    if the question is of a family that the project can solve."""
    response = sample_text(model, tokenizer, template.prompt(question), **settings)  # type: ignore[arg-type]
    thought, answer, right = judged(template, question, response)
    verdict = "" if right is None else "  (right)" if right else "  (wrong)"
    return f"thought  {thought or 'none'}\nanswer   {'none was given' if answer is None else answer}{verdict}"


def judged(template: Template, question: str, response: str) -> tuple[str, str | None, bool | None]:
    """Thought, answer (None: none was given), and whether it is right (None: nobody here can solve the question)."""
    (thought, answer), reference = template.parse(response), solve(question)
    right = None if reference is None else answer is not None and same_text(reference, answer)
    return thought.strip(), answer, right
