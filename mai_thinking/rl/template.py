"""The frame around a question, and the answer in a response. MAI-Thinking-1 report §3.1."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from mai_thinking.config.tasks import TemplateSection

_CHAT = """
{% if tools %}{% for tool in tools %}{{ tool | tojson }}{{ "\\n" }}{% endfor %}{% endif %}
{% for message in messages %}
{% if message.role == "user" %}<BEFORE>{{ message.content }}<AFTER>
{% elif message.role == "tool" %}
{% if loop.previtem.role == "tool" %}{{ " && " }}{% else %}<RESULT>{% endif %}{{ message.content }}
{% if loop.last or loop.nextitem.role != "tool" %}<CLOSE>{% endif %}
{% else %}{{ message.content or "" }}
{% if message.tool_calls %}<CALL>
{% for call in message.tool_calls %}{{ call.function.name }}{{ " " }}
{% set values = call.function.arguments.values() | list %}
{% if values | length == 1 and values[0] is string %}{{ values[0] }}
{% else %}{% for value in values %}{{ value | tojson }}{% if not loop.last %}{{ ", " }}{% endif %}{% endfor %}
{% endif %}
{% if not loop.last %}{{ " && " }}{% endif %}{% endfor %}<END>{% endif %}
{% endif %}{% endfor %}
"""


class Parsed(NamedTuple):
    """A response, taken apart."""

    thought: str  # What comes before the answer; the whole response if there is none
    answer: str | None  # The last answer, without white space around it; None if the response has none


class Template:
    """Prompts and answers by a section's strings."""

    def __init__(self, section: TemplateSection) -> None:
        self._prompt = section.prompt
        self._start, self._end = section.answer_start, section.answer_end
        self._thought_end = section.thought_end
        self._call_start, self.call_end = section.call_start, section.call_end
        self._result_start, self._result_end = section.result_start, section.result_end

    def prompt(self, question: str) -> str:
        """The text that the model continues."""
        return self._prompt.replace("{question}", question)

    def force_answer(self, thought: str) -> str:
        """A response that has got as far as `thought` (possibly none), up to where its answer begins. `thought` loses
        the white space around it and gets the template's own end of a thought."""
        body = thought.strip().removesuffix(self._thought_end.strip()).rstrip()
        return (body + self._thought_end if body or self._thought_end.strip() else "") + self._start

    def forced_answer(self, continuation: str) -> str | None:
        """The answer that follows `force_answer`; None if it was cut off. What comes behind it does not count: the
        thought that was kept back could be there."""
        answer, end, _ = continuation.partition(self._end) if self._end else (continuation, "", "")
        return answer.strip() if end or not self._end.strip() else None

    def calls(self, step: str) -> list[str] | None:
        """The calls at the end of a step's text; None unless it ends with calls, and they are complete. Where calls are
        lines, only a line that begins with their mark is one."""
        before, end, _ = step.rpartition(self.call_end)
        if self.call_end == "\n":
            line = before.rpartition("\n")[2]
            calls = line.removeprefix(self._call_start) if line.startswith(self._call_start) else None
        else:
            _, mark, rest = before.rpartition(self._call_start)
            calls = rest if mark else None
        return [call.strip() for call in calls.split("&&")] if end and calls is not None else None

    def observation(self, results: Sequence[str]) -> tuple[str, str, str]:
        """What the policy reads after its calls: what opens it, the results, and what closes it."""
        return self._result_start, " && ".join(results), self._result_end

    def chat_template(self) -> str:
        """The same frame for `tokenizer.apply_chat_template`, whose `tools` and `tool_calls` are Hugging Face's: what
        the policy saw and wrote, if each message's content is what it wrote."""
        before, after = self._prompt.split("{question}", 1)
        marks = {
            "BEFORE": before, "AFTER": after, "CALL": self._call_start, "END": self.call_end,
            "RESULT": self._result_start, "CLOSE": self._result_end,
        }  # fmt: skip
        text = "".join(line.strip() for line in _CHAT.splitlines())
        for mark, value in marks.items():
            text = text.replace(f"<{mark}>", f"{{{{ {json.dumps(value)} }}}}")
        return text

    def parse(self, response_text: str) -> Parsed:
        """Look at the response alone, never at the prompt: what the template itself says cannot pass for an answer. Of
        several answers the last counts, so that listing guesses gains nothing."""
        # An answer that is cut off has not been given; but at the end of a text, a line ends too.
        text = response_text if self._end.strip() else response_text + self._end
        last_end = text.rfind(self._end)  # of the empty string: the end of the text
        start = text.rfind(self._start, 0, last_end) if last_end >= 0 else -1
        if start < 0:
            return Parsed(response_text, None)
        first = start + len(self._start)
        answer = text[first : text.find(self._end, first) if self._end else None]
        return Parsed(response_text[:start], answer.strip())


def template_of(model: str | Path) -> Template:
    """The frame in which a run's folder, its `final/` or one of its checkpoints was asked; that of the exercises
    where no RL run's config stands beside it."""
    folder = Path(model).expanduser()
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "config.yaml").is_file():
            config = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
            if isinstance(config, dict) and isinstance(config.get("template"), dict):
                return Template(TemplateSection(**config["template"]))
            break
    return Template(TemplateSection(preset="exercise"))  # type: ignore[call-arg]
