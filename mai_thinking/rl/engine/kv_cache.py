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
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.model.configuration import GLOBAL, LOCAL

SLOT_ATTENTION = "slot_sdpa"  # The name that the library knows `slot_attention` under


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA where a single query's heads that share keys count as so many queries: the library's older versions write
    the keys out for each of them, which is most of what a decoding step would read. Else the library's."""
    B, H, T, d = query.shape
    if T > 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    queries = query.reshape(B, key.size(1), -1, d)
    heads = F.scaled_dot_product_attention(queries, key, value, attn_mask=attention_mask, scale=scaling)
    return heads.reshape(B, 1, H, d), None


ALL_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_attention)


class Prompt(NamedTuple):
    """A prompt that has been through the model, to be copied into any number of slots. l layers of a kind."""

    states: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Keys and values of each kind of layer, [l, G, P, d]; local layers' of all tokens too."""
    hidden_D: torch.Tensor  # The last token's final hidden state, which predicts the response's first token
    experts_MPK: NDArray[np.uint16]


class SlotCache:
    """Keys and values of `slots` sequences of up to `length` tokens; the model takes it for `past_key_values`.

    Layers of a kind lie in one tensor, so that slots are filled and moved in few operations.
    """

    def __init__(self, config: MaiThinkingConfig, slots: int, length: int, like: torch.Tensor) -> None:
        self._window = min(config.sliding_window, length)
        self.slots, self.length, self._dtype = slots, length, like.dtype
        layers = layers_of(config)
        self._place = {layer: (kind, i) for kind, own in layers.items() for i, layer in enumerate(own)}
        self._states: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for kind, own in layers.items():
            room = self._window if kind == LOCAL else length
            shape = (len(own), slots, config.num_key_value_heads, room)
            key, value = config.cached_dims
            self._states[kind] = like.new_zeros(*shape, key), like.new_zeros(*shape, value)
        self._position_A = torch.zeros(0, dtype=torch.long, device=like.device)
        self._rows_A = torch.arange(slots, device=like.device)
        self._used = 0

    def fill(self, first: int, count: int, prompt: Prompt) -> None:
        """Copy a prompt into slots `first` … `first + count − 1`."""
        for kind, parts in self._states.items():
            for cache, states in zip(parts, prompt.states[kind], strict=True):
                P, room = states.size(2), cache.size(3)
                if room < P:
                    # Of a longer prompt than the window, the last tokens, each at its place in the ring.
                    states = states[:, :, P - room :].roll(P % room, dims=2)
                cache[:, first : first + count, :, :P] = states[:, None]

    def move(self, source: Sequence[int], target: Sequence[int], used: int) -> None:
        """Copy slots `source` over slots `target`, of their first `used` tokens."""
        origin, goal = (torch.tensor(slots, device=self._rows_A.device) for slots in (source, target))
        for parts in self._states.values():
            for states in parts:
                states[:, goal, :, :used] = states[:, origin, :, :used]

    def at(self, position_A: torch.Tensor, used: int) -> dict[str, torch.Tensor]:
        """Prepare a decoding step that writes slot i's token at `position_A[i]`, all of which are below `used`.

        → the masks of the two kinds of layers, [A, 1, 1, keys]: bool, or off the CPU what is added to the scores, which
        attention would otherwise make of it again in every layer.
        """
        self._position_A, self._used = position_A, used
        written = torch.arange(used, device=position_A.device) <= position_A[:, None]
        mask_A11T = written[:, None, None]
        if mask_A11T.device.type != "cpu":
            mask_A11T = torch.zeros_like(mask_A11T, dtype=self._dtype).masked_fill_(~mask_A11T, float("-inf"))
        return {GLOBAL: mask_A11T, LOCAL: mask_A11T[..., : self._window]}

    def update(
        self, k_AG1d: torch.Tensor, v_AG1d: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write this step's keys and values; → all of the layer's for the slots in use, views."""
        A = k_AG1d.size(0)
        keys, values, place_A = self._layer(layer, self._position_A)
        keys[self._rows_A[:A], :, place_A] = k_AG1d[:, :, 0]
        values[self._rows_A[:A], :, place_A] = v_AG1d[:, :, 0]
        return keys[:A, :, : self._used], values[:A, :, : self._used]

    def newest_keys(self, layer: int) -> torch.Tensor:
        """What is cached as the keys of the tokens before this step's, [A, G, 1, width]."""
        keys, _, place_A = self._layer(layer, self._position_A - 1)
        return keys[self._rows_A[: len(place_A)], :, place_A, None]

    def _layer(self, layer: int, position_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A layer's keys and values, and where in them tokens at these positions lie."""
        kind, index = self._place[layer]
        keys, values = (states[index] for states in self._states[kind])
        return keys, values, position_A % self._window if kind == LOCAL else position_A


def layers_of(config: MaiThinkingConfig) -> dict[str, list[int]]:
    """The layers of each kind, in order."""
    kinds = config.layer_types or []
    return {kind: [layer for layer, own in enumerate(kinds) if own == kind] for kind in sorted(set(kinds))}


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
    cache = DynamicCache()
    output = model.model(
        ids_BP.to(model.device),
        attention_mask=masks,
        position_ids=index_P[None],
        past_key_values=cache,
        use_cache=True,
        output_expert_choices=True,
    )
    experts_MBPK = output.expert_choices.cpu().numpy().astype(np.uint16)
    whole = {
        kind: [torch.stack([getattr(cache.layers[layer], part) for layer in own]) for part in ("keys", "values")]
        for kind, own in layers_of(model.config).items()
    }
    results = []
    for row, prompt in enumerate(prompts):
        P = len(prompt)
        states = {kind: (keys[:, row, :, :P], values[:, row, :, :P]) for kind, (keys, values) in whole.items()}
        results.append(Prompt(states, output.last_hidden_state[row, P - 1], experts_MBPK[:, row, :P]))
    return results


def decode(
    model: MaiThinkingForCausalLM, cache: SlotCache, tokens_A: torch.Tensor, position_A: torch.Tensor, used: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one token of each slot, at positions below `used`, through the model → final hidden states [A, D], experts
    [A, M, K] int64. Nothing in it waits for the device."""
    output = model.model(
        tokens_A[:, None],
        attention_mask=cache.at(position_A, used),
        position_ids=position_A[:, None],
        past_key_values=cache,
        use_cache=True,
        output_expert_choices=True,
    )
    return output.last_hidden_state[:, 0], output.expert_choices[:, :, 0].transpose(0, 1)
