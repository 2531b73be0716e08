"""One question to a model, for people to look at: its thought, its answer, and the verifier's word."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mai_thinking.data.serial import solve
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.rl.tasks.base import same_text
from mai_thinking.rl.template import Template
from mai_thinking.training.sampling import sample_text


@dataclass(frozen=True)
class Reply:
    """A response, taken apart."""

    thought: str
    """Empty if the answer came at once."""
    answer: str | None
    right: bool | None
    """None if the question is of no family that the project can solve."""

    def text(self) -> str:
        """For a terminal."""
        verdict = {None: "", True: "  (right)", False: "  (wrong)"}[self.right]
        answer = "none was given" if self.answer is None else self.answer
        return f"thought  {self.thought.strip() or 'none'}\nanswer   {answer}{verdict}"


def ask(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    question: str,
    **settings: float,
) -> Reply:
    """Ask `question` in the frame of `template`; `settings` as for `sample_text`."""
    response = sample_text(model, tokenizer, template.prompt(question), **settings)  # type: ignore[arg-type]
    parsed = template.parse(response)
    reference = solve(question)
    right = None if reference is None else parsed.answer is not None and same_text(reference, parsed.answer)
    return Reply(parsed.thought, parsed.answer, right)
