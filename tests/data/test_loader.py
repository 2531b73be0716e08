"""The loader: order, ranks, prefetching, resumption, and what it leaves alone."""

import gc
import json
import random
import subprocess
import sys
import threading
import time
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch

from mai_thinking.data import Batch, Loader, PreparedData
from mai_thinking.data.loader import _RowMaker
from mai_thinking.errors import UsageError

T = 48


def make(prepared: PreparedData, **more: Any) -> Loader:
    options = {"context_length": T, "micro_batch_size": 2, "rows_per_step": 8, "seed": 5, "prefetch": 0, **more}
    return Loader(prepared, **options)


def steps(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(islice(loader, count))


def rows(step: Batch) -> list[tuple[Any, ...]]:
    """A step's rows, each comparable."""
    stacked = [torch.cat([b[k] for b in step.micro_batches]) for k in ("input_ids", "labels", "position_ids")]
    return [(*(tensor[i].tolist() for tensor in stacked), tuple(step.document_ids[i])) for i in range(len(stacked[0]))]


def test_batches_have_the_promised_form(two_sources: PreparedData) -> None:
    for step in steps(make(two_sources), 6):
        assert len(step.micro_batches) == 4
        for batch in step.micro_batches:
            assert {(tensor.shape, tensor.dtype) for tensor in batch.values()} == {((2, T), torch.int64)}
            assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
        assert sum((b["labels"] != -100).sum().item() for b in step.micro_batches) == 8 * T


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_any_number_of_ranks_sees_the_same_global_batch(two_sources: PreparedData, micro_batch_size: int) -> None:
    alone = [rows(step) for step in steps(make(two_sources), 12)]
    for world_size in (2, 4):
        ranks = [
            steps(make(two_sources, micro_batch_size=micro_batch_size, world_size=world_size, rank=rank), 12)
            for rank in range(world_size)
        ]
        assert [list(chain.from_iterable(map(rows, parts))) for parts in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("prefetch", [1, 2, 9])
def test_prefetching_changes_nothing(two_sources: PreparedData, prefetch: int) -> None:
    plain = steps(make(two_sources), 15)
    assert [rows(step) for step in steps(make(two_sources, prefetch=prefetch), 15)] == [rows(step) for step in plain]


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("world_size", [1, 4])
def test_resuming_anywhere_gives_the_same_batches(two_sources: PreparedData, prefetch: int, world_size: int) -> None:
    whole = [rows(step) for step in steps(make(two_sources), 24)]
    for stop in (0, 1, 7, 16):
        with make(two_sources, prefetch=prefetch) as first:
            for _ in range(stop):
                next(first)
            if prefetch:
                time.sleep(0.05)  # let the thread run ahead: its steps were made but not delivered
            state = json.loads(json.dumps(first.state_dict()))
        parts = []
        for rank in range(world_size):
            resumed = make(two_sources, prefetch=prefetch, world_size=world_size, rank=rank)
            resumed.load_state_dict(state)
            parts.append(steps(resumed, 5))
        assert [list(chain.from_iterable(map(rows, step))) for step in zip(*parts, strict=True)] == whole[
            stop : stop + 5
        ]


def test_a_closed_loader_goes_on_where_it_was(two_sources: PreparedData) -> None:
    whole = [rows(step) for step in steps(make(two_sources), 8)]
    loader = make(two_sources, prefetch=3)
    before = steps(loader, 3)
    assert [rows(step) for step in before + steps(loader, 5)] == whole


def test_the_seed_decides_the_order(two_sources: PreparedData) -> None:
    assert rows(steps(make(two_sources, seed=5), 1)[0]) == rows(steps(make(two_sources, seed=5), 1)[0])
    assert rows(steps(make(two_sources, seed=5), 1)[0]) != rows(steps(make(two_sources, seed=6), 1)[0])


def test_sources_come_in_proportion_at_all_times(two_sources: PreparedData) -> None:
    counts = {"a": 0, "b": 0}
    for number, step in enumerate(steps(make(two_sources, rows_per_step=2), 40), 1):
        for ids in step.document_ids:
            counts[ids[0].split("/")[0]] += 1
        assert abs(counts["a"] - 0.75 * 2 * number) <= 1
        assert abs(counts["b"] - 0.25 * 2 * number) <= 1


@pytest.mark.parametrize("prefetch", [0, 3])
def test_global_generators_are_left_alone(two_sources: PreparedData, prefetch: int) -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = rows(steps(make(two_sources, prefetch=prefetch), 6)[-1])
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert rows(steps(make(two_sources, prefetch=prefetch), 6)[-1]) == first


def test_what_the_thread_raises_arrives_in_the_step(two_sources: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    make_step, calls = _RowMaker.step, []

    def break_at_third(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise UsageError("line 3 is broken")
        return make_step(*arguments)

    monkeypatch.setattr(_RowMaker, "step", break_at_third)
    with make(two_sources, prefetch=4) as loader:
        next(loader), next(loader)
        for _ in range(2):  # also when asked again
            with pytest.raises(UsageError, match="line 3 is broken"):
                next(loader)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data-prefetch")]


def test_the_thread_ends_with_the_loader(two_sources: PreparedData) -> None:
    loader = make(two_sources, prefetch=2)
    next(loader)
    assert prefetch_threads()
    del loader
    gc.collect()
    assert not prefetch_threads()
    with make(two_sources, prefetch=2) as loader:
        next(loader)
        assert prefetch_threads()
    assert not prefetch_threads()


def test_a_program_that_forgets_to_close_ends(two_sources: PreparedData) -> None:
    program = (
        "import sys; from mai_thinking.config.data import DataSection; from mai_thinking.data import *\n"
        "config = DataSection.model_validate_json(sys.argv[1])\n"
        "loader = Loader(prepare(config), context_length=48, micro_batch_size=2, rows_per_step=8)\n"
        "next(loader); print('made one'); raise SystemExit(7)"
    )
    command = [sys.executable, "-c", program, two_sources.config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (7, "made one"), done.stderr


def test_waiting_is_measured(two_sources: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    make_step = _RowMaker.step

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return make_step(*arguments)

    monkeypatch.setattr(_RowMaker, "step", slow)
    with make(two_sources, prefetch=1) as loader:
        next(loader)
        assert loader.wait_seconds >= 0.1
        time.sleep(0.5)
        next(loader)
        assert loader.wait_seconds < 0.1, "made while the step was busy"


def test_bad_requests_are_refused(two_sources: PreparedData) -> None:
    with pytest.raises(
        UsageError, match=r"global_batch_size: 8 rows cannot be divided over 3 ranks × micro-batches of 2"
    ):
        make(two_sources, world_size=3)
    with pytest.raises(UsageError, match="too few for a row of context_length 1000000; shorten context_length"):
        make(two_sources, context_length=1_000_000)
    state = make(two_sources).state_dict()
    for key, value in (("seed", 6), ("data", "other"), ("context_length", 64), ("weights", {"a": 1.0})):
        with pytest.raises(UsageError, match=f"the checkpoint's data position has {key} "):
            make(two_sources).load_state_dict({**state, key: value})
