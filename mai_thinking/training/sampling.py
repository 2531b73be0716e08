"""Text from a model, for people to look at."""

import ast
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingForCausalLM

GLANCES = 0.05
"""Share of the training time that looking at the model may take."""


class Glance:
    """When to look at what a model writes while it learns: after `first` seconds, then each time it has trained for
    twice as long, and later where looking would take more than `GLANCES` of the time. A clock decides, so nothing that
    a run computes or records may depend on it."""

    def __init__(self, first: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Time counts from the first question whether to look."""
        self._first, self._clock = first, clock
        self._begin: float | None = None
        self._spent, self._at, self._cost = 0.0, 0.0, 0.5  # seconds; the first look has no cost yet to go by

    def due(self) -> bool:
        """Whether to look now."""
        return self._trained() >= max(self._first, 2 * self._at, (self._spent + self._cost) / GLANCES)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Around the look."""
        self._at, begin = self._trained(), self._clock()
        yield
        self._cost = self._clock() - begin
        self._spent += self._cost

    def _trained(self) -> float:
        now = self._clock()
        if self._begin is None:
            self._begin = now
        return now - self._begin - self._spent


def sample_text(
    model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, *, tokens: int, **settings: Any
) -> str:
    """Continue `prompt` (without returning it) by up to `tokens` tokens; `settings` as `sample_texts` takes them."""
    return sample_texts(model, tokenizer, prompt, tokens=tokens, **settings)[0]


def sample_texts(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    samples: int = 1,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
) -> list[str]:
    """So many continuations of `prompt` (without it) by up to `tokens` tokens. The same seed gives the same texts; the
    model's mode and global random generators are left as they were. `temperature` 0 takes the likeliest token each
    time."""
    ids = Encoder(tokenizer).encode_prompt(prompt)
    # Without a top_k of 0 the library draws from the likeliest 50.
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "num_return_sequences": samples}
    settings = GenerationConfig(
        max_new_tokens=tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(drawn if temperature else {"do_sample": False, "temperature": None, "top_p": None}),
    )
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # A compilation for each length of the cache would take longer than the text.
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            start = torch.tensor([ids], device=model.device)
            output = model.generate(start, generation_config=settings, streamer=streamer)
    finally:
        model.train(was_training)
    return [tokenizer.decode(row[len(ids) :], skip_special_tokens=True) for row in output]


def share_parsed(
    model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerBase, *, samples: int, tokens: int
) -> float:
    """How many of so many functions, written from `def` and ended before the next line that is not indented, Python's
    parser takes. The same model gives the same share."""
    return fmean(parses("def" + text) for text in sample_texts(model, tokenizer, "def", tokens=tokens, samples=samples))


def parses(text: str) -> bool:
    """Whether the first block of `text` is Python; a last line that may not be whole is left out."""
    first, *others = text.split("\n")[:-1] or [text]
    end = next((i for i, line in enumerate(others) if line.strip() and not line[0].isspace()), len(others))
    try:
        ast.parse("\n".join([first, *others[:end]]) + "\n")
    except (SyntaxError, ValueError):
        return False
    return True


def stream_text(model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, **settings: Any) -> str:
    """Print `prompt` and its continuation while it is written; keywords as for `sample_text`."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # bytes of the command line or of standard input that are no text
        raise UsageError("the prompt is not UTF-8; convert it") from None
    print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return sample_text(model, tokenizer, prompt, streamer=streamer, **settings)


def converse(
    model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, **settings: Any
) -> None:
    """Read prompts line by line and continue each, until the input ends. `\\n` in a line stands for a line break."""
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # one bad line ends no session
    if interactive:
        print("A base model continues text. Type its beginning (\\n for a line break); Ctrl-D ends.")
    while True:
        try:
            prompt = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if prompt:
            try:
                stream_text(model, tokenizer, prompt.replace("\\n", "\n"), seed=seed, **settings)
            except UsageError as error:
                print(f"error: {error}", file=sys.stderr)
            seed += 1
