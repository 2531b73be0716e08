"""A model's decoding in slots: a cache of fixed size, and the two forward passes that fill it.

Both passes are the model's own forward pass; only the cache and the masks are ours. A slot is a row of the cache. The
first A slots are in use, each at a position of its own. Global layers keep all tokens of a slot; local layers a ring of
as many as their window, in which the token of position p lies at p modulo the ring's length, since attention does not
see the order of keys.

Shapes: A slots in use, P tokens of a prompt, D hidden size, G key-value heads, d head size, M MoE layers, K experts
chosen per token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.model.configuration import GLOBAL, LOCAL

Experts = NDArray[np.uint16]


class Prompt(NamedTuple):
    """A prompt that has been through the model, to be copied into any number of slots."""

    keys: list[torch.Tensor]
    """A layer each, [G, P, d]; local layers' too."""
    values: list[torch.Tensor]
    hidden_D: torch.Tensor
    """The last token's final hidden state, which predicts the response's first token."""
    experts_MPK: Experts


class SlotCache:
    """Keys and values of `slots` sequences of up to `length` tokens; the model takes it for `past_key_values`."""

    def __init__(self, config: MaiThinkingConfig, slots: int, length: int, like: torch.Tensor) -> None:
        self._window = min(config.sliding_window, length)
        self.slots, self.length = slots, length
        self._local = [kind == LOCAL for kind in config.layer_types or []]
        rooms = [self._window if local else length for local in self._local]
        shapes = [(slots, config.num_key_value_heads, room, config.head_dim) for room in rooms]
        self._keys, self._values = ([like.new_zeros(shape) for shape in shapes] for _ in range(2))
        self._position_A = torch.zeros(0, dtype=torch.long, device=like.device)
        self._rows_A = torch.arange(slots, device=like.device)
        self._used = 0

    def fill(self, first: int, count: int, prompt: Prompt) -> None:
        """Copy a prompt into slots `first` … `first + count − 1`."""
        for layer, local in enumerate(self._local):
            P = prompt.keys[layer].size(1)
            kept = min(P, self._window) if local else P
            # Of a longer prompt than the window, the last tokens, each at its place in the ring.
            tokens = torch.arange(P - kept, P, device=prompt.hidden_D.device)
            place = tokens % self._window if local else tokens
            for cache, states in ((self._keys, prompt.keys), (self._values, prompt.values)):
                cache[layer][first : first + count, :, place] = states[layer][:, P - kept :]

    def move(self, source: Sequence[int], target: Sequence[int], used: int) -> None:
        """Copy slots `source` over slots `target`, of their first `used` tokens."""
        origin, goal = (torch.tensor(slots, device=self._rows_A.device) for slots in (source, target))
        for states in (*self._keys, *self._values):
            states[goal, :, :used] = states[origin, :, :used]

    def at(self, position_A: torch.Tensor, used: int) -> dict[str, torch.Tensor]:
        """Prepare a decoding step that writes slot i's token at `position_A[i]`, the largest of which is `used` − 1.

        → the masks of the two kinds of layers, [A, 1, 1, keys] bool.
        """
        self._position_A, self._used = position_A, used
        written = torch.arange(used, device=position_A.device) <= position_A[:, None]
        mask_A11T = written[:, None, None]
        return {GLOBAL: mask_A11T, LOCAL: mask_A11T[..., : self._window]}

    def update(
        self, k_AG1d: torch.Tensor, v_AG1d: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write this step's keys and values; → all of the layer's for the slots in use, views."""
        A = k_AG1d.size(0)
        place_A = self._position_A % self._window if self._local[layer] else self._position_A
        keys, values = self._keys[layer], self._values[layer]
        keys[self._rows_A[:A], :, place_A] = k_AG1d[:, :, 0]
        values[self._rows_A[:A], :, place_A] = v_AG1d[:, :, 0]
        return keys[:A, :, : self._used], values[:A, :, : self._used]


class _Capture:
    """Stands for the cache in a prefill: hands through what the layers compute, and keeps it."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.append(key)
        self.values.append(value)
        return key, value


def prefill(model: MaiThinkingForCausalLM, prompts: Sequence[Sequence[int]]) -> list[Prompt]:
    """Take prompts through the model, padded on the right, where causal attention hides the padding."""
    longest = max(map(len, prompts))
    ids_BP = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BP[row, : len(prompt)] = torch.tensor(prompt)
    index_P = torch.arange(longest, device=model.device)
    distance_PP = index_P[:, None] - index_P
    within = (distance_PP >= 0) & (distance_PP < model.config.sliding_window)
    # No mask at all is the library's sign for a causal one.
    masks = {GLOBAL: None, LOCAL: within[None, None] if longest > model.config.sliding_window else None}
    capture = _Capture()
    output = model.model(
        ids_BP.to(model.device),
        attention_mask=masks,
        position_ids=index_P[None],
        past_key_values=capture,
        use_cache=True,
        output_expert_choices=True,
    )
    experts_MBPK = output.expert_choices.cpu().numpy().astype(np.uint16)
    results = []
    for row, prompt in enumerate(prompts):
        P = len(prompt)
        keys, values = ([states[row, :, :P] for states in part] for part in (capture.keys, capture.values))
        results.append(Prompt(keys, values, output.last_hidden_state[row, P - 1], experts_MBPK[:, row, :P]))
    return results


def decode(
    model: MaiThinkingForCausalLM, cache: SlotCache, tokens_A: torch.Tensor, positions_A: NDArray[np.int64]
) -> tuple[torch.Tensor, Experts]:
    """Take one token of each slot through the model → final hidden states [A, D], experts [A, M, K]."""
    position_A = torch.from_numpy(positions_A).to(model.device)
    output = model.model(
        tokens_A[:, None],
        attention_mask=cache.at(position_A, int(positions_A.max()) + 1),
        position_ids=position_A[:, None],
        past_key_values=cache,
        use_cache=True,
        output_expert_choices=True,
    )
    experts_AMK = output.expert_choices[:, :, 0].transpose(0, 1)
    return output.last_hidden_state[:, 0], experts_AMK.cpu().numpy().astype(np.uint16)
