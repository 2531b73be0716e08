"""Batches of traces and text, and what a step learns from them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checksums import sha256_of
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.data import prepare
from mai_thinking.errors import UsageError
from mai_thinking.rl.rollout import Rollout
from mai_thinking.rl.trace_packing import IGNORED, TraceBatches, trace_row
from mai_thinking.rl.trace_selection import select
from mai_thinking.rl.traces import Trace
from mai_thinking.training.learner import TextLoss
from tiny_models import tiny_learner, tiny_model


def some_examples(seed: int = 0) -> list[Rollout]:
    random = np.random.default_rng(seed)
    sizes = [(7, 4), (12, 1), (5, 9), (1, 3), (20, 2)]
    tokens = [[random.integers(2, 97, n) for n in size] for size in sizes]
    return [Rollout(0, prompt.tolist(), 9, response_ids=response) for prompt, response in tokens]


def one_step(rows: list[dict[str, torch.Tensor]], balance: float = 0.0) -> dict[str, Any]:
    learner, _ = tiny_learner(tiny_model(), balance=balance)
    return learner.update([{name: value[None] for name, value in row.items()} for row in rows], TextLoss(), 1)


def test_the_loss_is_the_models_own_on_responses_alone() -> None:
    """Packed into two rows, against each trace by itself with the library's labels."""
    examples = some_examples()
    result = one_step([trace_row(examples[:3], 64), trace_row(examples[3:], 64)])

    model = tiny_model().train()
    total = sum(len(example.response_ids) for example in examples)
    loss = torch.zeros(())
    for example in examples:
        ids = torch.from_numpy(np.concatenate((example.prompt_ids, example.response_ids)).astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : len(example.prompt_ids)] = -100
        loss = loss + model(input_ids=ids, labels=labels).loss * len(example.response_ids) / total
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert result["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert result["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_padding_is_left_out_of_the_balance_loss() -> None:
    examples = some_examples()[:3]
    filled = sum(example.places for example in examples)
    exact, padded = (trace_row(examples, length) for length in (filled, filled + 40))
    wanted = one_step([exact], balance=0.5)
    result = one_step([padded], balance=0.5)
    assert result["balance_loss"] == pytest.approx(wanted["balance_loss"], rel=1e-5)
    assert result["violation"] == pytest.approx(wanted["violation"], rel=1e-5)
    assert result["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    unmasked = {name: value for name, value in padded.items() if name != "token_mask"}
    assert one_step([unmasked], balance=0.5)["balance_loss"] != pytest.approx(wanted["balance_loss"], rel=1e-2)


def contents(batch: Any) -> list[Any]:
    return [sha256_of(row) for part in batch.micro_batches for row in zip(*part.values(), strict=True)]


def test_runs_are_learned_from_by_their_weights(
    make: Callable[..., DistillConfig], store: Callable[..., Path], trace: Callable[..., Trace], tokenizer: Any
) -> None:
    """Also where one has fewer traces than its share: they come round more often."""
    runs = [
        store([trace(number, question=f"first {number}?") for number in range(60)], "a"),
        store([trace(number, question=f"second {number}?") for number in range(7)], "b"),
    ]
    weights = "traces=[" + ", ".join(f"{{run: {r}, late: 1, weight: {w}}}" for r, w in zip(runs, (3, 1), strict=True))
    config = make(runs, weights + "]", "selection.total=40")
    selection = select(config, tokenizer)
    assert [len(source.examples) for source in selection.sources] == [30, 7]
    assert selection.shares == [0.75, 0.25]
    batches, seen = TraceBatches(selection, None, config, rank=0, ranks=1), Counter[str]()
    for _ in range(10):
        batch = next(batches)
        for part in batch.micro_batches:
            for ids, mask in zip(part["input_ids"], part["token_mask"], strict=True):
                texts = tokenizer.decode(ids[mask]).split("<|endoftext|>")[1:]
                seen.update(text.partition("\n")[0] for text in texts)
    first = sum(count for text, count in seen.items() if "first" in text)
    assert first > 100
    assert abs(first - 0.75 * seen.total()) <= 1
    for word, traces in (("first", 30), ("second", 7)):
        counts = [count for text, count in seen.items() if word in text]
        assert len(counts) == traces
        assert max(counts) - min(counts) <= 1  # epoch by epoch


@pytest.fixture
def mixed(
    make: Callable[..., DistillConfig],
    store: Callable[..., Path],
    trace: Callable[..., Trace],
    tokenizer: Any,
    with_text: Callable[[float], str],
) -> Callable[..., TraceBatches]:
    """`mixed(rank, ranks, seed=…)`: batches of traces and text, three to one."""
    config = make([store([trace(number) for number in range(50)])], with_text(0.25))
    section = config.text.data.tokenizer.model_copy(update={"path": config.init_from}) if config.text else None
    text = prepare(config.text.data.model_copy(update={"tokenizer": section}), log=print) if config.text else None

    def batches(rank: int = 0, ranks: int = 1, *, seed: int = 0) -> TraceBatches:
        changed = config.model_copy(update={"seed": seed})
        return TraceBatches(select(changed, tokenizer), text, changed, rank=rank, ranks=ranks)

    return batches


def test_a_share_of_text_and_whoever_counts_it(mixed: Callable[..., TraceBatches]) -> None:
    batches, text_rows = mixed(), 0
    for _ in range(6):
        batch = next(batches)
        labels = torch.cat([part["labels"] for part in batch.micro_batches])
        whole = (labels != IGNORED).all(dim=1)
        assert int(whole.sum()) == batch.text_rows
        assert int((labels[~whole] != IGNORED).sum()) == batch.response_tokens
        text_rows += batch.text_rows
    assert text_rows == 6  # a quarter of 6 × 4 rows


def test_batches_do_not_depend_on_the_ranks_and_go_on_where_they_were(mixed: Callable[..., TraceBatches]) -> None:
    alone, ranks = mixed(), [mixed(rank, 2) for rank in range(2)]
    for _ in range(5):
        assert contents(next(alone)) == contents(next(ranks[0])) + contents(next(ranks[1]))
    resumed = mixed(1, 2)
    resumed.load_state_dict(alone.state_dict())
    for _ in range(5):
        assert contents(next(resumed)) == contents(next(ranks[1]))
    with pytest.raises(UsageError, match="have gone on or changed"):
        mixed(seed=1).load_state_dict(alone.state_dict())
