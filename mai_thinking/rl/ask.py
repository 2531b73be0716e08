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
    thought, answer = template.parse(response)
    reference, verdict = solve(question), ""
    if reference is not None:
        right = answer is not None and same_text(reference, answer)
        verdict = "  (right)" if right else "  (wrong)"
    shown = "none was given" if answer is None else answer
    return f"thought  {thought.strip() or 'none'}\nanswer   {shown}{verdict}"
