"""Tokens per second of the rollout engine against the library's `generate`, and its mismatch with the learner.

On a CPU: the nano model, 512 requests, 16 a prompt, temperature 1, top-p 0.97. As they fall: limits spread evenly over
4 … 100 tokens, fewer where the model ends by itself. The engine has 256 slots; `generate` takes 256 requests at a time.
The engine returns nuclei, experts and log-probabilities besides.

On a GPU: a fresh L12 with a vocabulary of 32,768 unless a model is given, 256 requests of 128 tokens, everybody in
bf16; and the engine once more without its graphs.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from mai_thinking.bench.machine import Options
from mai_thinking.bench.profile import profile_rows
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure, alternate, rate, ratio
from mai_thinking.bench.train import CONFIG
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.rl.engine import BatchedEngine, inference_copy
from mai_thinking.rl.packing import pack
from mai_thinking.rl.policy import response_logprobs
from mai_thinking.rl.rollout import Rollout
from mai_thinking.training.model_files import build_model, load_model, model_config

TOP_P = 0.97


class Kind(NamedTuple):
    """A kind of requests."""

    name: str
    limits: Any
    """Of each request's response."""
    end: Any
    """What ends a response early."""


def measure(options: Options) -> Result:
    """On `options.model`, or with fresh weights if there is no such folder."""
    on_gpu = torch.cuda.is_available()
    if options.model.exists():
        model, about = load_model(options.model), str(options.model)
    elif on_gpu:
        model, about = fresh_l12("cuda"), "L12 with fresh weights"
    else:
        config = load_config(PretrainConfig, CONFIG)
        model, about = build_model(config, model_config(config)), "fresh weights"
    model.eval()
    if on_gpu:
        return compare(model.cuda(), options, about=about, requests=256, longest=128)
    return compare(model, options, about=about)


def fresh_l12(device: str) -> MaiThinkingForCausalLM:
    """3.6 billion parameters, whose attention is on, as after some training."""
    torch.manual_seed(0)
    config = MaiThinkingConfig.ladder(12, vocab_size=2**15, dropout=0.0, zero_init_attention=False)
    with torch.device(device):
        return MaiThinkingForCausalLM(config)


def compare(
    model: MaiThinkingForCausalLM,
    options: Options,
    *,
    about: str,
    requests: int = 512,
    longest: int = 100,
    slots: int = 256,
) -> Result:
    """`requests` of each kind of lengths; a quarter of `options.rounds` rounds, since each takes many seconds."""
    on_gpu = model.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else None
    rng = np.random.default_rng(0)
    prompts = _prompts(model, rng, requests)
    if on_gpu:
        model.set_attn_implementation("windowed_sdpa")  # the learner's
        peer = inference_copy(model, torch.bfloat16)
        peer.set_attn_implementation("sdpa")
        kinds = [Kind(f"all {longest}", np.full(requests, longest), None)]
    else:
        peer = model
        kinds = [
            Kind("as they fall", rng.integers(4, longest + 1, requests), model.config.eos_token_id),
            Kind(f"all {longest // 2}", np.full(requests, longest // 2), None),
        ]
    rows: list[Row] = []
    shares: list[Row] = []
    for kind in kinds:
        asked = [Rollout(number, prompts[number // 16], int(limit)) for number, limit in enumerate(kind.limits)]
        engine = _engine(model, slots, dtype=dtype, end_of_text=kind.end)
        sides = {"engine": _ours(engine, asked), "generate": _theirs(peer, slots, asked, kind)}
        if on_gpu:
            sides["no graphs"] = _ours(_engine(model, slots, dtype=dtype, backend="static"), asked)
        turns = alternate(sides, rounds=max(2, options.rounds // 4), clock=_clock)
        figures = {side: rate(taken, "tokens/s") for side, taken in turns.items()}
        others = [side for side in sides if side != "engine"]
        figures |= {f"engine to {side}": ratio(turns[side], turns["engine"]) for side in others}
        rows.append(Row({"lengths": kind.name}, figures))
        if not on_gpu and not shares:
            shares = profile_rows(sides["engine"])
    rows += [*shares, _mismatch(model, engine, asked[:64], dtype)]
    notes = [f"{about}; mismatch: of {min(64, requests)} responses"]
    notes += [f"{torch.cuda.get_device_name()}, all in bf16"] if on_gpu else []
    notes += ["shares: operators' own time of the engine, lengths as they fall"] if shares else []
    return Result("rollout", rows, notes)


def differences(
    model: MaiThinkingForCausalLM, made: Sequence[Rollout], *, temperature: float, dtype: torch.dtype | None
) -> torch.Tensor:
    """|Δ log p| of every response token, the learner's, packed, with both replays and under autocast to `dtype` (None:
    without), against the engine's; [N] fp32."""
    longest = max(len(one.prompt_ids) + len(one.response_ids) for one in made)
    parts = []
    for batch in pack(made, row_length=max(1024, longest), rows=8, num_experts=model.config.num_experts):
        here = batch.to(model.device)
        autocast = torch.autocast(model.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        with torch.no_grad(), autocast:
            logprobs_N = response_logprobs(model, here, temperature=temperature).logprobs_N
        parts.append((logprobs_N - here.old_logprobs).abs())
    return torch.cat(parts)


def _mismatch(
    model: MaiThinkingForCausalLM, engine: BatchedEngine, asked: Sequence[Rollout], dtype: torch.dtype | None
) -> Row:
    apart_N = differences(model, engine.generate(asked), temperature=1.0, dtype=dtype)
    figures = {"max |Δ log p|": float(apart_N.max()), "mean |Δ log p|": float(apart_N.mean())}
    precision = "fp32" if dtype is None else "bf16"
    return Row({"learner against engine": precision}, {name: Figure.of([x], "nats") for name, x in figures.items()})


def _prompts(model: MaiThinkingForCausalLM, rng: np.random.Generator, requests: int) -> list[list[int]]:
    """One for 16 requests each, of 10 to 30 tokens."""
    return [rng.integers(2, model.config.vocab_size, rng.integers(10, 31)).tolist() for _ in range(-(-requests // 16))]


def _engine(model: MaiThinkingForCausalLM, slots: int, end_of_text: Any = None, **how: Any) -> BatchedEngine:
    return BatchedEngine(model, slots=slots, temperature=1.0, top_p=TOP_P, seed=0, end_of_text=end_of_text, **how)


def _ours(engine: BatchedEngine, asked: Sequence[Rollout]) -> Callable[[], float]:
    return lambda: float(sum(len(one.response_ids) for one in engine.generate(asked)))


def _theirs(model: MaiThinkingForCausalLM, slots: int, asked: Sequence[Rollout], kind: Kind) -> Callable[[], float]:
    batches = [asked[i : i + slots] for i in range(0, len(asked), slots)]
    return lambda: float(sum(_generate(model, batch, kind.end) for batch in batches))


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _generate(model: MaiThinkingForCausalLM, requests: Sequence[Rollout], end: int | None) -> int:
    """The requests as one batch of the library's `generate`; → response tokens, padding left out."""
    longest = max(len(request.prompt_ids) for request in requests)
    limits = torch.tensor([request.max_new_tokens for request in requests], device=model.device)

    class Limits(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.size(1) - longest >= limits

    ids, mask = torch.ones(2, len(requests), longest, dtype=torch.long)
    for row, request in enumerate(requests):
        padding = longest - len(request.prompt_ids)
        mask[row, :padding] = 0
        ids[row, padding:] = torch.tensor(request.prompt_ids)
    settings = GenerationConfig(
        max_new_tokens=int(limits.max()), do_sample=True, top_p=TOP_P, top_k=None, eos_token_id=end, pad_token_id=1
    )
    criteria = StoppingCriteriaList([Limits()])
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        stopping_criteria=criteria,
    )
    lengths = limits
    if end is not None:
        ended = output[:, longest:] == end
        lengths = torch.where(ended.any(dim=1), torch.minimum(limits, ended.int().argmax(dim=1) + 1), limits)
    return int(lengths.sum())
