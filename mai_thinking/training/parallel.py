"""How ranks share a model: a replica each (DDP, through Accelerate), or a shard each (FSDP2). With either, groups of
ranks may divide the experts among them (expert parallelism).

Replicas meet once per global batch, while the backward pass of its last micro-batch still runs; shards in each
micro-batch, since otherwise every rank would hold the gradient of the whole model.
"""

from collections.abc import Callable, Iterable, Iterator
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
from mai_thinking.model.latent_moe import LatentMoE


def divides(execution: ExecutionSection, ranks: int) -> bool:
    """Whether no rank holds the whole model. Then every rank must make as many forward passes as the others."""
    return ranks > 1 and (execution.parallel == "fsdp" or execution.expert_parallel > 1)


def parallelize(
    model: MaiThinkingForCausalLM, accelerator: Accelerator, execution: ExecutionSection
) -> tuple[nn.Module, Callable[[], AbstractContextManager[None]]]:
    """Share `model`, the same on every rank, as `execution` says. On the meta device, it gets memory for this rank's
    part alone, to be filled. → What to call in training, whose parameters are the optimiser's; and what stands around
    every micro-batch but the last, so that gradients stay on their rank. UsageError if experts cannot be divided so."""
    # Experts are gathered as they are computed with, and their gradients added up in fp32.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if accelerator.mixed_precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    divided: dict[str, FSDPModule] = {}
    if execution.expert_parallel > 1:
        divided = _divide_experts(model, accelerator, execution, policy)
    if execution.parallel == "fsdp" and accelerator.num_processes > 1:
        _shard(model, accelerator, None if divided else policy)
        return model, nullcontext
    _to_device(model, accelerator.device)
    own = [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in divided]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
    # Gradients lie in what is reduced, not beside it.
    accelerator.ddp_handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    replicated: nn.Module = accelerator.prepare(model)

    @contextmanager
    def no_sync() -> Iterator[None]:
        with accelerator.no_sync(replicated):
            try:
                _meet(divided.values(), False)
                yield
            finally:
                _meet(divided.values(), True)

    return replicated, no_sync


def _shard(model: MaiThinkingForCausalLM, accelerator: Accelerator, experts: MixedPrecisionPolicy | None) -> None:
    """Weights, gradients and optimiser state in shards, an equal part on each rank (FSDP2). A layer is gathered while
    it is computed, its `experts` by themselves. Not through Accelerate, which falls back to DDP without a GPU."""
    if model.device.type != "meta":
        model.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in model.model.layers:
        if isinstance(layer.feed_forward, LatentMoE) and experts is not None:
            fully_shard(layer.feed_forward.experts, mesh=mesh, mp_policy=experts)
        # Routers, norms and the head are fp32 in any case: what is gathered with them is rounded when it is used.
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _to_device(model, accelerator.device)


def _divide_experts(
    model: MaiThinkingForCausalLM,
    accelerator: Accelerator,
    execution: ExecutionSection,
    policy: MixedPrecisionPolicy,
) -> dict[str, FSDPModule]:
    """Each layer's experts over groups of `execution.expert_parallel` neighbouring ranks; → them, by name. Of the ranks
    in different groups that have the same experts, each has all of them (DDP) or a part (FSDP)."""
    ranks, groups_of, sharded = accelerator.num_processes, execution.expert_parallel, execution.parallel == "fsdp"
    _check_divides(model, ranks, execution)
    copies = ranks // groups_of
    mesh = init_device_mesh(  # a dimension of 1 costs nothing
        accelerator.device.type,
        (1, copies, groups_of) if sharded else (copies, 1, groups_of),
        mesh_dim_names=("replicate", "shard", "experts"),
    )
    divided = {}
    for name, layer in [(name, module) for name, module in model.named_modules() if isinstance(module, LatentMoE)]:
        experts = layer.experts
        experts.exchange = ExpertExchange(mesh["experts"].get_group(), experts.num_experts, accelerator.device)
        for of, parameter in list(experts.named_parameters()):
            # Every rank has the same values: none needs to be sent another's.
            share = distribute_tensor(parameter.detach(), mesh["experts"], [Shard(0)], src_data_rank=None)
            setattr(experts, of, nn.Parameter(share))
        module = divided[f"{name}.experts"] = fully_shard(
            experts,
            mesh=mesh["replicate", "shard"],
            mp_policy=policy,
            reshard_after_forward=sharded,
            shard_placement_fn=lambda _: Shard(1),
        )
        # A rank's gradient is a sum over the ranks of its group already, and the loss is `ranks` times too large.
        module.set_gradient_divide_factor(float(ranks))
        # Gloo knows no other reduction; where there is nothing to reduce-scatter, torch 2.13 would divide twice.
        module.set_force_sum_reduction_for_comms(mesh["shard"].size() > 1)
    return divided


def _meet(divided: Iterable[FSDPModule], now: bool) -> None:
    """Whether replicas of experts add up their gradients, and let go of the weights as they are computed with."""
    for module in divided:
        module.set_requires_all_reduce(now)
        module.set_reshard_after_backward(now)


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
    if (kind := config._experts_implementation) != "bucketed_mm":
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
    if not norm + 1e-6 <= largest:  # else the library multiplies every gradient by 1; NaN goes on to whoever looks
        for parameters in by_mesh.values():
            nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return float(norm)


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """Over which ranks its shards lie; tensors of different meshes meet in no operation."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None
