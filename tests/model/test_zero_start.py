"""Attention's output gains start at zero (report §2.6.2): the model begins as a stack of feed-forward layers."""

import torch

from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from tiny_models import SIZES


def fresh(zero: bool, seed: int) -> MaiThinkingForCausalLM:
    torch.manual_seed(seed)
    return MaiThinkingForCausalLM(
        MaiThinkingConfig(**(SIZES | {"zero_init_attention": zero, "num_experts": 64}))
    ).eval()


def test_at_first_no_token_sees_another() -> None:
    ids = torch.randint(2, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 3] = 96
    for zero in (True, False):
        model = fresh(zero, 0)
        same = torch.equal(model(ids).logits[0, 4:], model(changed).logits[0, 4:])
        assert same == zero


def test_experts_are_loaded_more_evenly() -> None:
    """Without attention, which makes the tokens of a row alike, the worst layer's busiest expert is less busy."""
    # Words as often as in language: a few common, most rare.
    frequencies = 1.0 / torch.arange(1, 96)
    ids = 2 + torch.multinomial(frequencies, 2048, replacement=True, generator=torch.Generator().manual_seed(1))
    violations = {True: 0.0, False: 0.0}
    for seed in range(5):
        for zero in violations:
            counts = fresh(zero, seed)(ids.view(16, 128), output_routing=True).routing.counts_E
            violations[zero] += float((counts.amax(-1) / counts.mean(-1) - 1).max()) / 5
    assert violations[True] < violations[False]
