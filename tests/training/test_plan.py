"""What `--dry-run` promises of a rank's memory and of what ranks send, against ranks that train."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_learner import cut, global_batch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.run import ExecutionSection
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.training.learner import TextLoss
from mai_thinking.training.model_files import model_config
from mai_thinking.training.plan import PEAK, Work, memory_per_rank, plan_text, step_seconds, traffic, work_of
from ranks import run_ranks
from tiny_models import tiny_learner, tiny_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "expert_parallel": {"expert_parallel": 2},
    "expert_parallel_fsdp": {"parallel": "fsdp", "expert_parallel": 2},
}
WORLD = 4
ROOT = Path(__file__).parents[2]


class Counting(TorchDispatchMode):
    """Bytes that go into all-to-alls of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.alltoall_base_.default and args[1].is_floating_point():
            self.sent += args[1].nbytes
        return func(*args, **(kwargs or {}))


def local_bytes(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def held_and_sent(rank: int, execution: dict[str, Any]) -> tuple[dict[str, float], int]:
    learner, _ = tiny_learner(tiny_model(), **execution)
    held: dict[str, float] = {}

    def note(*_: Any) -> None:
        parameters = list(learner.model.parameters())
        held["weights"] = local_bytes(parameters)
        held["gradients"] = local_bytes(p.grad for p in parameters if p.grad is not None)

    learner.optimizer.register_step_pre_hook(note)
    with Counting() as counting:
        learner.update([cut(global_batch(), WORLD)[rank]], TextLoss(), 1)
    states = learner.optimizer.state.values()
    held["optimiser"] = local_bytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))
    return held, counting.sent


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_of_what_fsdp_and_expert_parallel_ranks_hold_and_send(layout: str) -> None:
    """Within a few percent: what does not divide evenly is one rank's."""
    config = tiny_model().config
    for checkpointing in (False, True) if layout == "expert_parallel" else (False,):
        execution = LAYOUTS[layout] | {"activation_checkpointing": checkpointing}
        section, work = ExecutionSection(**execution), Work(WORLD, tokens=24, step_tokens=24, compute_bytes=4)
        memory = memory_per_rank(config, section, work)
        results = run_ranks(WORLD, held_and_sent, execution)
        for use in ("weights", "gradients", "optimiser"):
            whole = sum(held[use] for held, _ in results)
            assert whole / WORLD == pytest.approx(memory[use], rel=0.02), use
        rows = traffic(config, section, work).get("experts: rows", {"within": 0.0, "between": 0.0})
        away = 1 - 1 / section.expert_parallel  # what stays at home is not sent
        assert sum(sent for _, sent in results) / WORLD * away == pytest.approx(rows["within"])
        assert rows["between"] == 0


def test_activations_within_a_tenth() -> None:
    """What autograd keeps of a forward pass, in fp32 on a CPU."""
    tokens = 1024
    config = MaiThinkingConfig.ladder(6, num_experts=32, vocab_size=2048, dropout=0.0)
    kinds = {"experts_implementation": "bucketed_mm", "attn_implementation": "windowed_sdpa"}
    model = MaiThinkingForCausalLM._from_config(config, **kinds).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor
        return tensor

    ids = torch.randint(0, 2048, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids[:, :-1], shift_labels=ids[:, 1:], skip_logits=True, output_routing=True, use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    work = Work(1, tokens, tokens, compute_bytes=4)
    assert memory_per_rank(config, ExecutionSection(), work)["activations"] == pytest.approx(measured, rel=0.1)


def test_a_step_of_one_card_is_what_was_measured() -> None:
    """And rows that travel, or gathers that outlast what they run beside, only add to it."""
    config = MaiThinkingConfig.ladder(12, vocab_size=32768)
    flops = config.flops_per_token(4096)
    alone = step_seconds(config, ExecutionSection(), Work(1, 65536, 65536, 2), flops)
    assert (alone["rows"], alone["waiting"]) == (0, 0)
    assert 65536 * flops / alone["compute"] / PEAK == pytest.approx(0.409 * 766 / 989)
    eight, many = Work(8, 65536, 65536, 2), Work(64, 1024, 1024, 2)
    divided = ExecutionSection(expert_parallel=8)
    assert 0 < step_seconds(config, divided, eight, flops)["rows"] < alone["compute"]
    assert step_seconds(config, ExecutionSection(parallel="fsdp"), many, flops)["waiting"] > alone["compute"] / 64


@pytest.mark.parametrize(("rows", "measured"), [(16, 106), (24, 128)])
def test_the_memory_of_one_card_is_what_was_measured(rows: int, measured: float) -> None:
    """L12 on an H200: the most that PyTorch had allocated in a step (results/card), GiB."""
    config = load_config(
        PretrainConfig,
        ROOT / "configs" / "L12.yaml",
        [f"batch.{key}" for key in (f"micro_batch_size={rows}", f"global_batch_size={6 * rows}")],
    )
    held = memory_per_rank(MaiThinkingConfig.ladder(12, vocab_size=2**15), config.execution, work_of(config, 1))
    assert sum(held.values()) / 2**30 == pytest.approx(measured, rel=0.05)


def test_the_page_says_what_dry_runs_say() -> None:
    page = (ROOT / "docs" / "gpus.md").read_text()
    rows = re.findall(r"^\| \[(?:L\d+|mai-base-1)\]\(\.\./(\S+)\), (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    for path, row in rows:
        config = load_config(PretrainConfig, ROOT / path)
        said = dict(
            line.split("  ", 1) for line in plan_text(config, model_config(config)).splitlines() if line[0] != " "
        )
        said = {name: text.strip() for name, text in said.items()}
        execution, ranks = config.execution, config.plan.gpus
        held = memory_per_rank(model_config(config), execution, work_of(config, ranks))
        states = sum(held[use] for use in ("weights", "gradients", "optimiser")) / 2**30
        percent = re.findall(r"(\d+ %) of", said["memory"])[0]
        sent = re.match(r"(\S+ GB).*, (\S+ GB)", said["sends"])
        assert sent is not None
        step, used = said["a step"].split(": ")[1], said["utilisation"].split(" of")[0]
        expected = [
            f"experts over {execution.expert_parallel}", f"{ranks:,}", f"{states:.2f} GiB", percent,
            f"{sent[1]}, {sent[2]}", step, used,
        ]  # fmt: skip
        assert row.split(" | ") == expected
