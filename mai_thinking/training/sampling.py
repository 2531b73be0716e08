"""Text from a model, for people to look at."""

import io
import sys
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingForCausalLM


def sample_text(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
) -> str:
    """Continue `prompt` (without returning it) by up to `tokens` tokens. The same seed gives the same text; global
    random generators are left as they were. `temperature` 0 takes the likeliest token each time."""
    ids = Encoder(tokenizer).encode_prompt(prompt)
    inputs = torch.tensor([ids], device=model.device)
    greedy = temperature == 0
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=not greedy,
        temperature=None if greedy else temperature,
        top_p=None if greedy else top_p,
        top_k=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # A compilation for each length of the cache would take longer than the text.
        with torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(seed)
            output = model.generate(inputs, generation_config=settings, streamer=streamer)
    finally:
        model.train(was_training)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


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
