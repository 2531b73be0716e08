"""AdamW in the report's parameter groups, and its learning rate over a run."""

import math

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mai_thinking.config.run import OptimizerSection, ScheduleSection
from mai_thinking.training.parallel import mesh_of


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over all trainable parameters, weight decay by kind (MAI-Thinking-1 report §2.6).

    Three groups: attention (everything inside an attention sublayer), embeddings (with the tied head), and the rest.
    The report exempts nothing else, so norm gains decay like what they belong to. Where ranks divide the experts, these
    are a group of their own: one operation takes no shards of different meshes.
    """
    decay = {
        "attention": section.weight_decay_attention,
        "embeddings": section.weight_decay_embeddings,
        "rest": section.weight_decay,
    }
    members: dict[tuple[str, DeviceMesh | None], list[nn.Parameter]] = {(group, None): [] for group in decay}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((_group(name), mesh_of(parameter)), []).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay[group], "name": group}
        for (group, _), parameters in members.items()
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.epsilon, fused=True)


def _group(name: str) -> str:
    parts = name.split(".")
    if "attention" in parts:
        return "attention"
    return "embeddings" if "embed_tokens" in parts or "lm_head" in parts else "rest"


def learning_rate(step: int, steps: int, top: float, section: ScheduleSection) -> float:
    """The rate of step 1 … `steps`: linear to `top` over the warm-up, then `section.shape` to the end."""
    if step <= section.warmup_steps:
        return top * step / section.warmup_steps
    if section.shape == "constant":
        return top
    done = (step - section.warmup_steps) / max(1, steps - section.warmup_steps)
    return top * (section.floor + (1 - section.floor) * 0.5 * (1 + math.cos(math.pi * done)))
