"""How ranks share a model: a replica each (DDP, through Accelerate), or a shard each (FSDP2). With either, groups of
ranks may divide the experts among them (expert parallelism).

Replicas meet once per global batch, while the backward pass of its last micro-batch still runs; shards in each
micro-batch, since otherwise every rank would hold the gradient of the whole model.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mai_thinking.config.run import ExecutionSection
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model.expert_parallel import ExpertExchange
from mai_thinking.model.latent_moe import Experts, LatentMoE, rounded_once


class Replicated:
    """A model that every rank holds whole, but for experts that are divided (DDP; with one rank, the model itself)."""

    def __init__(self, model: MaiThinkingForCausalLM, accelerator: Accelerator, experts: "DividedExperts") -> None:
        self.accelerator, self._plain, self._experts = accelerator, model, experts
        _to_device(model, accelerator.device)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, experts.parameters)
        # Gradients lie in what is reduced, not beside it.
        accelerator.ddp_handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.model: nn.Module = accelerator.prepare(model)
        """What to call in training; its parameters are the optimiser's."""
        self.in_step = bool(experts.parameters)
        """Whether every rank must make as many forward passes as the others."""

    def cached_bf16(self) -> AbstractContextManager[None]:
        """Around a step's micro-batches, in which no weight changes: those that kernels on a GPU have rounded are
        rounded once for all."""
        ours = self._plain.config._experts_implementation == "bucketed_mm" and not self.in_step
        if ours and self.accelerator.device.type == "cuda" and self.accelerator.mixed_precision == "bf16":
            return rounded_once(self._plain, torch.bfloat16)
        return nullcontext()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around the forward and backward of every micro-batch but the last: gradients stay on their rank."""
        with self.accelerator.no_sync(self.model), self._experts.no_sync():
            yield

    def unwrap(self) -> MaiThinkingForCausalLM:
        """The model without any wrapper, for evaluation and sampling; where `in_step`, all ranks call it together."""
        return self._plain


class Sharded:
    """The same for a model whose weights, gradients and optimiser state lie in shards, an equal part on each rank
    (FSDP2). A layer is gathered while it is computed, its experts by themselves. Not through Accelerate, which falls
    back to DDP where there is no GPU."""

    in_step = True

    def __init__(self, model: MaiThinkingForCausalLM, accelerator: Accelerator, experts: "DividedExperts") -> None:
        self.model = model
        if model.device.type != "meta":
            model.to(accelerator.device)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for layer in model.model.layers:
            if isinstance(layer.feed_forward, LatentMoE) and not experts.parameters:
                fully_shard(layer.feed_forward.experts, mesh=mesh, mp_policy=experts.precision)
            # Routers, norms and the head are fp32 in any case: what is gathered with them is rounded when it is used.
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        _to_device(model, accelerator.device)

    def cached_bf16(self) -> AbstractContextManager[None]:
        return nullcontext()  # weights are whole only while they are computed with

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def unwrap(self) -> MaiThinkingForCausalLM:
        return self.model


class DividedExperts:
    """Each layer's experts divided over groups of `execution.expert_parallel` neighbouring ranks. Of the ranks in
    different groups that have the same experts, each has all of them (DDP) or a part (FSDP)."""

    def __init__(self, model: MaiThinkingForCausalLM, accelerator: Accelerator, execution: ExecutionSection) -> None:
        rounds = accelerator.mixed_precision == "bf16"
        # Gathered as they are computed with; gradients are added up in fp32. Gates and latents come as they should be.
        self.precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if rounds else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self.parameters: list[str] = []
        """Their names in the model; none if experts are not divided."""
        self._modules: list[FSDPModule] = []
        ranks, groups_of, sharded = accelerator.num_processes, execution.expert_parallel, execution.parallel == "fsdp"
        if groups_of == 1:
            return
        _check_divides(model, ranks, execution)
        copies = ranks // groups_of
        mesh = init_device_mesh(  # a dimension of 1 costs nothing
            accelerator.device.type,
            (1, copies, groups_of) if sharded else (copies, 1, groups_of),
            mesh_dim_names=("replicate", "shard", "experts"),
        )
        for name, module in model.named_modules():
            if isinstance(module, LatentMoE):
                module.exchange = ExpertExchange(mesh["experts"].get_group(), module.experts.num_experts)
                self._modules.append(self._divide(module.experts, mesh, ranks, sharded=sharded))
                self.parameters += [f"{name}.experts.{of}" for of, _ in module.experts.named_parameters()]

    def _divide(self, experts: Experts, mesh: DeviceMesh, ranks: int, *, sharded: bool) -> FSDPModule:
        for name, parameter in list(experts.named_parameters()):
            # Every rank has the same values: none needs to be sent another's.
            share = distribute_tensor(parameter.detach(), mesh["experts"], [Shard(0)], src_data_rank=None)
            setattr(experts, name, nn.Parameter(share))
        module = fully_shard(
            experts,
            mesh=mesh["replicate", "shard"],
            mp_policy=self.precision,
            reshard_after_forward=sharded,
            shard_placement_fn=lambda _: Shard(1),
        )
        # A rank's gradient is a sum over the ranks of its group already, and the loss is `ranks` times too large.
        module.set_gradient_divide_factor(float(ranks))
        # Gloo knows no other reduction; where there is nothing to reduce-scatter, torch 2.13 would divide twice.
        module.set_force_sum_reduction_for_comms(mesh["shard"].size() > 1)
        return module

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Between micro-batches replicas of experts keep their gradients, and the weights as they are computed with."""

        def meet(now: bool) -> None:
            for module in self._modules:
                module.set_requires_all_reduce(now)
                module.set_reshard_after_backward(now)

        meet(False)
        try:
            yield
        finally:
            meet(True)


def divides(execution: ExecutionSection, ranks: int) -> bool:
    """Whether no rank holds the whole model."""
    return ranks > 1 and (execution.parallel == "fsdp" or execution.expert_parallel > 1)


def parallelize(
    model: MaiThinkingForCausalLM, accelerator: Accelerator, execution: ExecutionSection
) -> Replicated | Sharded:
    """`model`, the same on every rank, as `execution` says. A single rank has nobody to share with. On the meta device,
    it gets memory for this rank's part alone, to be filled. UsageError if the experts cannot be divided so."""
    experts = DividedExperts(model, accelerator, execution)
    if execution.parallel == "fsdp" and accelerator.num_processes > 1:
        return Sharded(model, accelerator, experts)
    return Replicated(model, accelerator, experts)


def _to_device(model: MaiThinkingForCausalLM, device: torch.device) -> None:
    if model.device.type == "meta":
        model.to_empty(device=device)
        model.tie_weights()  # which that undoes
    else:
        model.to(device)


def _check_divides(model: MaiThinkingForCausalLM, ranks: int, execution: ExecutionSection) -> None:
    groups_of, config = execution.expert_parallel, model.config
    key = f"execution.expert_parallel: {groups_of}"
    if ranks % groups_of:
        raise UsageError(f"{key} does not divide {ranks} rank{'s' * (ranks > 1)}; change it, or --nproc")
    if config.num_experts % groups_of:
        raise UsageError(f"{key} does not divide the {config.num_experts} experts of a layer")
    copies = ranks // groups_of
    for size in (2 * config.moe_intermediate_size, config.latent_size):
        if execution.parallel == "fsdp" and size % copies:
            raise UsageError(
                f"{key} leaves {copies} ranks to shard an expert's {size} rows, which they do not divide; make it "
                f"larger, or execution.parallel=ddp"
            )
    if (kind := config._experts_implementation) not in ("bucketed_mm", "eager"):
        raise UsageError(f"{key} needs execution.experts=bucketed_mm, not {kind!r}, which computes all experts")


def apply_compile_and_checkpointing(model: MaiThinkingForCausalLM, execution: ExecutionSection) -> None:
    """Have `model` recompute activations and run compiled, as `execution` says: each layer by itself, when it first
    runs. Layers of a kind share one compilation, and what stands between layers may look at the data."""
    if execution.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if execution.compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut graphs where DDP's buckets end, as layers do already
        # A compilation for each kind of layer, with gradients and without, and for each shape.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for layer in model.model.layers:
            layer.compile()


def clip_gradients(model: nn.Module, largest: float) -> float:
    """Scale all gradients to a global L2 norm of `largest` if it is more; returns the norm before."""
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        by_mesh.setdefault(mesh_of(parameter), []).append(parameter)
    norms = [nn.utils.get_total_norm([p.grad for p in those if p.grad is not None]) for those in by_mesh.values()]
    wholes = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = wholes[0] if len(wholes) == 1 else torch.stack(wholes).norm()
    for parameters in by_mesh.values():
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """Over which ranks its shards lie; tensors of different meshes meet in no operation."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None
