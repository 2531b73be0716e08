"""Ways to compute `Σ_k gate · expert(x)` for all tokens, registered with the transformers experts interface.

Shapes: T tokens, K chosen experts per token, S = T·K token-expert pairs, E experts, L latent size, F inner size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


def eager_experts(
    module: nn.Module, x_TL: torch.Tensor, chosen_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    """The definition: one expert after another. [T, L], [T, K] int64, [T, K] → [T, L]. Slow to differentiate."""
    out_TL = torch.zeros(x_TL.shape, dtype=torch.float32, device=x_TL.device)
    for expert in chosen_TK.unique().tolist():
        token, slot = torch.where(chosen_TK == expert)
        gate, up = F.linear(x_TL[token], module.gate_up_proj[expert]).chunk(2, dim=-1)
        y = F.linear(module.act_fn(gate) * up, module.down_proj[expert])
        out_TL = out_TL.index_add(0, token, y.float() * gates_TK[token, slot, None])
    return out_TL.to(x_TL.dtype)


ALL_EXPERTS_FUNCTIONS.register("bucketed_mm", eager_experts)
