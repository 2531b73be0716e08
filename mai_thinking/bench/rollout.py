"""Tokens per second of the rollout engine against the library's `generate`, on the nano model.

512 requests, 16 a prompt, temperature 1, top-p 0.97. As they fall: limits spread evenly over 4 … 100 tokens, fewer
where the model ends by itself. The engine has 256 slots; `generate` takes 256 requests at a time. The engine returns
nuclei, experts and log-probabilities besides.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from mai_thinking.bench.options import Options
from mai_thinking.bench.profile import profile_rows
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import alternate, rate, ratio
from mai_thinking.bench.train import CONFIG
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.rl.rollouts import BatchedEngine, Request
from mai_thinking.training.model_files import build_model, load_model, model_config

TOP_P = 0.97


def measure(options: Options) -> Result:
    """On `options.model`, or with fresh weights if there is no such folder."""
    if options.model.exists():
        return compare(load_model(options.model).eval(), options, about=str(options.model))
    config = load_config(PretrainConfig, CONFIG)
    return compare(build_model(config, model_config(config)).eval(), options, about="fresh weights")


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
    rng = np.random.default_rng(0)
    prompts = [
        rng.integers(2, model.config.vocab_size, rng.integers(10, 31)).tolist() for _ in range(-(-requests // 16))
    ]
    end: Any = model.config.eos_token_id
    rows: list[Row] = []
    profile: list[Row] = []
    kinds: list[tuple[str, Any, int | None]] = [
        ("as they fall", rng.integers(4, longest + 1, requests), end),
        (f"all {longest // 2}", np.full(requests, longest // 2), None),
    ]
    for name, limits, ending in kinds:
        asked = [Request(i, prompts[i // 16], int(limit)) for i, limit in enumerate(limits)]
        engine = BatchedEngine(model, slots=slots, temperature=1.0, top_p=TOP_P, seed=0, end_of_text=ending)

        def ours(engine: BatchedEngine = engine, asked: list[Request] = asked) -> float:
            return float(sum(len(one.response_ids) for one in engine.generate(asked)))

        def theirs(asked: list[Request] = asked, ending: int | None = ending) -> float:
            batches = (asked[i : i + slots] for i in range(0, len(asked), slots))
            return float(sum(_generate(model, batch, ending) for batch in batches))

        turns = alternate({"engine": ours, "generate": theirs}, rounds=max(2, options.rounds // 4))
        figures = {side: rate(taken, "tokens/s") for side, taken in turns.items()}
        rows.append(Row({"lengths": name}, figures | {"ratio": ratio(turns["generate"], turns["engine"])}))
        profile = profile or profile_rows(ours)
    notes = [f"{about}; shares: operators' own time of the engine, lengths as they fall"]
    return Result("rollout", rows + profile, notes)


def _generate(model: MaiThinkingForCausalLM, requests: Sequence[Request], end: int | None) -> int:
    """The requests as one batch of the library's `generate`; → response tokens, padding left out."""
    longest = max(len(request.prompt_ids) for request in requests)
    limits = torch.tensor([request.max_new_tokens for request in requests])

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
    output = model.generate(ids, attention_mask=mask, generation_config=settings, stopping_criteria=criteria)
    lengths = limits
    if end is not None:
        ended = output[:, longest:] == end
        lengths = torch.where(ended.any(dim=1), torch.minimum(limits, ended.int().argmax(dim=1) + 1), limits)
    return int(lengths.sum())
