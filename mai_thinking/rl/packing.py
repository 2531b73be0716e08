"""Rollouts of many lengths packed into rows for the learner.

A rollout of P prompt and n response tokens takes P + n − 1 places: its last token is only predicted. Rollouts lie in a
row one behind the other, each with positions from 0, which is what keeps them apart in the model. What is left at the
row's end is padding: positions from 0 as well, left out of the routing's sums.

Shapes: B rows, T places in a row, N response tokens in all, M MoE layers, K experts chosen per token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mai_thinking.errors import UsageError
from mai_thinking.rl.nuclei import bits_of
from mai_thinking.rl.rollout import Rollout
from mai_thinking.training.learner import MicroBatch

MULTIPLE = 64
"""Rows are padded to whole blocks of this many places, for attention in blocks and for few different shapes."""


def pack(rollouts: Sequence[Rollout], *, row_length: int, rows: int, num_experts: int) -> list[MicroBatch]:
    """Rollouts into micro-batches of up to `rows` rows of up to `row_length` places.

    Of each: `input_ids` [B, T] int64; `position_ids` [B, T] int64, from 0 in each rollout; `token_mask` [B, T] bool, no
    padding; `response_mask` [B, T] bool, places whose *next* token the policy drew and no tool wrote, N in all;
    `expert_choices` [M, B, T, K] int64, arbitrary for padding. And of the response tokens, in the order of their
    places, row by row: `targets` [N] int64, the tokens; `rollout_index` [N] int64, which of the rollouts they are of;
    `old_logprobs` [N] fp32, the engine's; `nucleus` [N, ceil(V / 8)] uint8, bit-packed.

    First-fit decreasing, equal lengths in the given order: the same rollouts always give the same micro-batches. Rows
    are as long as a micro-batch's longest, in whole blocks of `MULTIPLE`. Raises `UsageError` for a rollout that is
    longer than a row.
    """
    layout = first_fit_decreasing([rollout.places for rollout in rollouts], row_length)
    groups = [layout[begin : begin + rows] for begin in range(0, len(layout), rows)]
    return [_micro_batch(rollouts, group, row_length, num_experts) for group in groups]


def first_fit_decreasing(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of `lengths`, row by row: each, longest first, goes into the first row that has room for it."""
    too_long = max(lengths, default=0)
    if too_long > row_length:
        raise UsageError(f"packing: a rollout takes {too_long} places, a row has {row_length}; make rows longer")
    layout: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, free in enumerate(room) if free >= lengths[index]), len(layout))
        if row == len(layout):
            layout.append([])
            room.append(row_length)
        layout[row].append(index)
        room[row] -= lengths[index]
    return layout


def lay_out(rollouts: Sequence[Rollout], length: int) -> dict[str, NDArray[Any]]:
    """A row of `length` places: `input_ids` and `position_ids` [T] int64, `token_mask` and `response_mask` [T] bool, as
    in `pack`."""
    input_ids, position_ids = np.zeros((2, length), dtype=np.int64)
    token_mask, response_mask = np.zeros((2, length), dtype=bool)
    start = 0
    for rollout in rollouts:
        own = slice(start, start + rollout.places)
        input_ids[own] = np.concatenate((rollout.prompt_ids, rollout.response_ids[:-1]))
        position_ids[own] = np.arange(rollout.places)
        token_mask[own] = True
        response_mask[start + len(rollout.prompt_ids) - 1 : own.stop] = ~rollout.observed
        start = own.stop
    position_ids[start:] = np.arange(length - start)
    row = {"input_ids": input_ids, "position_ids": position_ids}
    return row | {"token_mask": token_mask, "response_mask": response_mask}


def _micro_batch(rollouts: Sequence[Rollout], layout: list[list[int]], row_length: int, num_experts: int) -> MicroBatch:
    order = [index for row in layout for index in row]
    parts = [rollouts[index] for index in order]
    longest = max(sum(rollouts[index].places for index in row) for row in layout)
    B, T = len(layout), min(row_length, -(-longest // MULTIPLE) * MULTIPLE)
    M, _, K = parts[0].experts.shape
    # Padding goes through experts too: through all of them in turn, so that none is busier for it.
    idle_TK = np.arange(T * K).reshape(T, K) % num_experts
    expert_choices = np.broadcast_to(idle_TK, (M, B, T, K)).copy()
    for b, row in enumerate(layout):
        experts_MPK = np.concatenate([rollouts[index].experts for index in row], axis=1)
        expert_choices[:, b, : experts_MPK.shape[1]] = experts_MPK
    rows = [lay_out([rollouts[index] for index in row], T) for row in layout]
    drawn = np.concatenate([~one.observed for one in parts])
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {
        "expert_choices": expert_choices,
        "targets": np.concatenate([one.response_ids for one in parts])[drawn],
        "rollout_index": np.repeat(order, [len(one.response_ids) for one in parts])[drawn],
        "old_logprobs": np.concatenate([one.logprobs for one in parts])[drawn],
        "nucleus": bits_of([part for one in parts for part in one.nuclei], len(drawn))[drawn],
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
