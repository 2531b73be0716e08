"""Answers the calls that a policy writes, between two decoding steps. MAI-Thinking-1 report §3.3, App. D.

What comes back is context: it is encoded as text, whatever it spells, and the record of the rollout knows its tokens.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import xxhash
from transformers import PreTrainedTokenizerBase

from mai_thinking.config.grpo import ToolsSection
from mai_thinking.config.storage import atomic_file
from mai_thinking.data.tokenizer import Encoder
from mai_thinking.rl.rollout import Call, Rollout
from mai_thinking.rl.tasks import Problem
from mai_thinking.rl.template import Template
from mai_thinking.rl.tools.base import Tool, ToolError, make_call
from mai_thinking.rl.tools.builtin import BUILTIN
from mai_thinking.rl.tools.servers import ToolServers

_CUT = "…"
_PROBLEMS = 1024
"""Whose tools are kept: a schema is read out of a docstring, which no call should wait for."""
_CHARACTERS = 16
"""Of an observation that are looked at, for each token that it may have."""


class CallJournal:
    """Calls that change something outside: a file for each, there before the call is made. A rollout that is generated
    again, after a death or a failure, by whichever process, does not make them again. The folder is made when there is
    something to write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, key: tuple[int | str, ...], call: Callable[[], str]) -> str:
        """The result of `call`, or that of before. ToolError where it was begun and nobody knows what came of it."""
        path = self.folder / f"{xxhash.xxh3_128_hexdigest(json.dumps(key).encode())}.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.flush()
                os.fsync(file.fileno())
        except FileExistsError:
            text = path.read_text(encoding="utf-8")
            if not text:
                raise ToolError("nobody knows whether this call has had its effect; it is not made again") from None
            return str(json.loads(text)["result"])
        result = call()
        with atomic_file(path, durable=True) as temporary:
            temporary.write_text(json.dumps({"call": key, "result": result}), encoding="utf-8")
        return result


class Toolbox:
    """The tools of a run. Serves the engine as its `Tools`."""

    def __init__(
        self, section: ToolsSection, template: Template, tokenizer: PreTrainedTokenizerBase, journal: Path
    ) -> None:
        """`journal` is the folder of calls with an effect. UsageError if a server cannot be had."""
        self.section, self._template, self._tokenizer = section, template, tokenizer
        self._encoder = Encoder(tokenizer)
        texts = tokenizer.batch_decode([[id] for id in range(self._encoder.vocab_size)])
        self.ends = frozenset(id for id, text in enumerate(texts) if template.call_end[-1] in text)
        self._journal = CallJournal(journal)
        self._servers = ToolServers(section.servers)
        self._threads = ThreadPoolExecutor(os.cpu_count())
        self.tools = functools.lru_cache(_PROBLEMS)(self._tools)
        """What the rollouts of a problem may call, by name."""

    def _tools(self, problem: Problem) -> dict[str, Tool]:
        return {name: BUILTIN[name](problem, self.section) for name in self.section.use} | self._servers.tools

    def observe(self, steps: Sequence[tuple[Rollout, int, Sequence[int]]]) -> list[list[int] | None]:
        """See `rl.engine.engine.Tools`. The calls of all rollouts are made together."""
        texts = self._tokenizer.batch_decode([tokens for _, _, tokens in steps])
        asked = [self._template.calls(text) for text in texts]
        jobs = [
            (place, index, text)
            for place, (calls, (_, number, _)) in enumerate(zip(asked, steps, strict=True))
            if number < self.section.most_steps
            for index, text in enumerate((calls or ())[: self.section.parallel])
        ]
        answers: list[list[str]] = [[] for _ in steps]
        made = self._threads.map(lambda job: self._call(*steps[job[0]][:2], *job[1:]), jobs)
        for (place, _, _), call in zip(jobs, made, strict=True):
            rollout = steps[place][0]
            repeated = any(call.text == earlier.text for earlier in rollout.calls)
            rollout.calls += (replace(call, repeated=repeated),)
            answers[place].append(call.observation)
        return [
            None if calls is None else self._observation(results) if results else []
            for calls, results in zip(asked, answers, strict=True)
        ]

    def _call(self, rollout: Rollout, step: int, index: int, text: str) -> Call:
        try:
            tool, arguments = make_call(self.tools(rollout.problem), text)
            make = lambda: str(tool.function(*arguments))  # noqa: E731
            made = self._journal.once((rollout.id, step, index, text), make) if tool.effect else make()
            return Call(text, made, True, False, step)
        except Exception as error:  # a tool's own failure too is something to be told
            told = error if isinstance(error, ValueError) else type(error).__name__
            return Call(text, f"error: {told}", False, False, step)

    def _observation(self, results: Sequence[str]) -> list[int]:
        """The tokens of what a step gave, at most `section.tokens`."""
        most = self.section.tokens
        start, body, end = self._template.observation(results)
        body = body[: most * _CHARACTERS].encode("utf-8", "replace").decode()
        ids = self._encoder.encode(start + body + end)
        if len(ids) <= most:
            return ids
        tail = self._encoder.encode(_CUT + end)
        return [*self._encoder.encode(start + body)[: max(0, most - len(tail))], *tail]
