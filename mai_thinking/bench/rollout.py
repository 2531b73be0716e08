"""Tokens per second of the rollout engine against the library's `generate`, and its mismatch with the learner.

On a CPU: the nano model, 512 requests, 16 a prompt, temperature 1, top-p 0.97. As they fall: limits spread evenly over
4 … 100 tokens, fewer where the model ends by itself. The engine has 256 slots; `generate` takes 256 requests at a time.
The engine returns nuclei, experts and log-probabilities besides.

On a GPU: a fresh L12 with a vocabulary of 32,768 unless a model is given, 256 requests of 128 tokens, everybody in
bf16; and the engine once more without its graphs.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from mai_thinking.bench.measure import Figure, Result, Row, alternate, rate, ratio
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


def measure(model: Path, rounds: int) -> Result:
    """On `model`, or with fresh weights if there is no such folder."""
    on_gpu = torch.cuda.is_available()
    if model.exists():
        loaded, about = load_model(model), str(model)
    elif on_gpu:
        # As after some training, its attention is on.
        torch.manual_seed(0)
        l12 = MaiThinkingConfig.ladder(12, vocab_size=2**15, dropout=0.0, zero_init_attention=False)
        with torch.device("cuda"):
            loaded, about = MaiThinkingForCausalLM(l12), "L12 with fresh weights"
    else:
        config = load_config(PretrainConfig, CONFIG)
        loaded, about = build_model(config, model_config(config)), "fresh weights"
    if on_gpu:
        result = compare(loaded.cuda(), rounds, requests=256, longest=128)
        about += f"; {torch.cuda.get_device_name()}, all in bf16"
    else:
        result = compare(loaded, rounds)
    return Result(result.rows, [f"{about}; mismatch: of 64 responses"])


def compare(
    model: MaiThinkingForCausalLM, rounds: int, *, requests: int = 512, longest: int = 100, slots: int = 256
) -> Result:
    """`requests` of each kind of lengths; a quarter of `rounds` rounds, since each takes many seconds."""
    model.eval()
    on_gpu = model.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else None
    rng = np.random.default_rng(0)
    # One prompt of 10 to 30 tokens for 16 requests each.
    vocabulary, count = model.config.vocab_size, -(-requests // 16)
    prompts = [rng.integers(2, vocabulary, rng.integers(10, 31)).tolist() for _ in range(count)]
    # Kind of lengths → each request's limit, and what ends a response early.
    if on_gpu:
        model.set_attn_implementation("windowed_sdpa")  # the learner's
        peer = inference_copy(model, torch.bfloat16)
        peer.set_attn_implementation("sdpa")
        kinds: dict[str, tuple[Any, Any]] = {f"all {longest}": (np.full(requests, longest), None)}
    else:
        peer = model
        drawn = rng.integers(4, longest + 1, requests)
        kinds = {
            "as they fall": (drawn, model.config.eos_token_id),
            f"all {longest // 2}": (np.full(requests, longest // 2), None),
        }
    rows = []
    for kind, (limits, end) in kinds.items():
        asked = [Rollout(number, prompts[number // 16], int(limit)) for number, limit in enumerate(limits)]
        settings = {"slots": slots, "temperature": 1.0, "top_p": TOP_P, "seed": 0, "end_of_text": end, "dtype": dtype}
        engine = BatchedEngine(model, **settings)
        sides = {"engine": partial(_ours, engine, asked), "generate": partial(_theirs, peer, slots, asked, end)}
        if on_gpu:
            sides["no graphs"] = partial(_ours, BatchedEngine(model, **settings, backend="static"), asked)
        turns = alternate(sides, rounds=max(2, rounds // 4))
        figures = {side: rate(taken, "tokens/s") for side, taken in turns.items()}
        others = [side for side in sides if side != "engine"]
        figures |= {f"engine to {side}": ratio(turns[side], turns["engine"]) for side in others}
        rows.append(Row({"lengths": kind}, figures))
    apart_N = differences(model, engine.generate(asked[:64]), temperature=1.0, dtype=dtype)
    apart = {"max |Δ log p|": float(apart_N.max()), "mean |Δ log p|": float(apart_N.mean())}
    case: dict[str, str | int] = {"learner against engine": "fp32" if dtype is None else "bf16"}
    rows.append(Row(case, {name: Figure.of([value], "nats") for name, value in apart.items()}))
    return Result(rows, [])


def differences(
    model: MaiThinkingForCausalLM, made: Sequence[Rollout], *, temperature: float, dtype: torch.dtype | None
) -> torch.Tensor:
    """|Δ log p| of every response token, the learner's, packed, with both replays and under autocast to `dtype` (None:
    without), against the engine's; [N] fp32."""
    longest = max(len(one.prompt_ids) + len(one.response_ids) for one in made)
    parts = []
    for batch in pack(made, row_length=max(1024, longest), rows=8, num_experts=model.config.num_experts):
        here = {name: tensor.to(model.device) for name, tensor in batch.items()}
        autocast = torch.autocast(model.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        with torch.no_grad(), autocast:
            logprobs_N, _ = response_logprobs(model, here, temperature=temperature)
        parts.append((logprobs_N - here["old_logprobs"]).abs())
    return torch.cat(parts)


def _ours(engine: BatchedEngine, asked: Sequence[Rollout]) -> float:
    return float(sum(len(one.response_ids) for one in engine.generate(asked)))


def _theirs(model: MaiThinkingForCausalLM, slots: int, asked: Sequence[Rollout], end: int | None) -> float:
    return float(sum(_generate(model, asked[i : i + slots], end) for i in range(0, len(asked), slots)))


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
        max_new_tokens=int(limits.max()), do_sample=True, top_p=TOP_P, top_k=0, eos_token_id=end, pad_token_id=1
    )
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([Limits()]),
    )
    if end is None:
        return int(limits.sum())
    ended = output[:, longest:] == end
    lengths = torch.where(ended.any(dim=1), torch.minimum(limits, ended.int().argmax(dim=1) + 1), limits)
    return int(lengths.sum())
