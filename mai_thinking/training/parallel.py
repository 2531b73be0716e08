"""How ranks share a model: a replica each (DDP, through Accelerate), or a shard each (FSDP2).

With either, gradients meet once per global batch, while the backward pass of its last micro-batch still runs.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from mai_thinking.config.run import ExecutionSection
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model.latent_moe import rounded_once


class Replicated:
    """A model of which every rank holds the whole (DDP; with one rank, the model itself)."""

    def __init__(self, model: MaiThinkingForCausalLM, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._plain = model
        self.model: nn.Module = accelerator.prepare(model)
        """What to call in training; its parameters are the optimiser's."""

    def cached_bf16(self) -> AbstractContextManager[None]:
        """Around a step's micro-batches, in which no weight changes: those that kernels on a GPU have rounded are
        rounded once for all."""
        ours = self._plain.config._experts_implementation == "bucketed_mm"
        if ours and self.accelerator.device.type == "cuda" and self.accelerator.mixed_precision == "bf16":
            return rounded_once(self._plain, torch.bfloat16)
        return nullcontext()

    def no_sync(self) -> AbstractContextManager[None]:
        """Around the forward and backward of every micro-batch but the last: gradients stay on their rank."""
        return self.accelerator.no_sync(self.model)

    def unwrap(self) -> MaiThinkingForCausalLM:
        """The model with all its weights, on every rank and without any wrapper, for evaluation, sampling and saving.
        Collective; to be taken anew after each step."""
        return self._plain


class Sharded:
    """The same for a model whose weights, gradients and optimiser state lie in shards, an equal part on each rank
    (FSDP2, as ZeRO stage 3). A layer is gathered while it is computed. Accelerate falls back to DDP where there is no
    GPU; `fully_shard` works over gloo too."""

    def __init__(self, model: MaiThinkingForCausalLM, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._config = model.config
        self._implementations = {
            "attn_implementation": model.config._attn_implementation,
            "experts_implementation": model.config._experts_implementation,
        }
        model.to(accelerator.device)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        self._shards: FSDPModule = fully_shard(model, mesh=mesh)
        self.model: nn.Module = model

    def cached_bf16(self) -> AbstractContextManager[None]:
        return nullcontext()  # weights are whole only while they are computed with

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._shards.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._shards.set_requires_gradient_sync(True)

    def unwrap(self) -> MaiThinkingForCausalLM:
        state = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        with torch.device("meta"):
            model = MaiThinkingForCausalLM._from_config(self._config, **self._implementations)
        model.to_empty(device=self.accelerator.device)
        model.tie_weights()  # which `to_empty` undoes
        model.load_state_dict(state)
        return model


def parallelize(
    model: MaiThinkingForCausalLM, accelerator: Accelerator, how: Literal["ddp", "fsdp"]
) -> Replicated | Sharded:
    """`model`, the same on every rank, as `execution.parallel` says. A single rank has nobody to share with."""
    if how == "fsdp" and accelerator.num_processes > 1:
        return Sharded(model, accelerator)
    return Replicated(model, accelerator)


def apply_compile_and_checkpointing(model: MaiThinkingForCausalLM, execution: ExecutionSection) -> None:
    """Have `model` recompute activations and run compiled, as `execution` says."""
    if execution.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if execution.compile:
        compile_layers(model)


def compile_layers(model: MaiThinkingForCausalLM) -> None:
    """Compile each layer by itself, when it first runs: layers of a kind share one compilation, and whatever stands
    between layers, such as finding the documents in a row, may look at the data."""
    # A compilation for each kind of layer, with gradients and without, and for each shape.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in model.model.layers:
        layer.compile()


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scale all gradients to a global L2 norm of `largest` if it is more; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
