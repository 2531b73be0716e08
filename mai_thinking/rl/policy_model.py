"""What an RL run is made from, and what it will cost."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.tasks import TaskSection
from mai_thinking.data.questions import Split
from mai_thinking.data.tokenizer import Encoder, load_tokenizer
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.model.configuration import LOCAL
from mai_thinking.provenance.lineage import Lineage, Source, hash_file, require_own
from mai_thinking.rl.engine import BatchedEngine, Engine
from mai_thinking.rl.tasks import Problem, TaskSampler
from mai_thinking.rl.template import Template
from mai_thinking.rl.tools.sandbox import isolation
from mai_thinking.rl.tools.toolbox import Toolbox
from mai_thinking.training.model_files import load_model, load_model_config
from mai_thinking.training.plan import (
    WEIGHT,
    Work,
    computes_in_bf16,
    layout_text,
    memory_per_rank,
    memory_rows,
    quantity,
)


def policy_config(config: GrpoConfig) -> MaiThinkingConfig:
    """The architecture of `init_from`, without dropout: the learner must compute what the engine computed (§3.1)."""
    architecture = load_model_config(config.init_from)
    architecture.dropout = 0.0
    return architecture


def policy_tokenizer(config: GrpoConfig) -> PreTrainedTokenizerFast:
    """That of `init_from`; with tools, with a chat template in whose frame they are called."""
    tokenizer = load_tokenizer(config.init_from)
    if config.tools.enabled:
        tokenizer.chat_template = Template(config.template).chat_template()
    return tokenizer


def policy_model(
    config: GrpoConfig | DistillConfig, architecture: MaiThinkingConfig
) -> tuple[MaiThinkingForCausalLM, Lineage]:
    """The weights of `init_from` in fp32 on the CPU, and where they come from. UsageError if that is not known."""
    lineage = require_own(config.init_from, allow_third_party=config.allow_third_party)
    execution = config.execution
    model = load_model(
        config.init_from,
        config=architecture,
        attn_implementation=execution.attention,
        experts_implementation=execution.experts,
    )
    return model, lineage


def make_engine(
    model: MaiThinkingForCausalLM,
    config: GrpoConfig,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    heartbeat: Callable[[], None],
    device: torch.device | None = None,
) -> Engine:
    """What generates rollouts, also the evaluation's; on the model's device unless another is given. On a CPU it stays
    in fp32, whose products are the faster ones there."""
    section, template = config.tools, Template(config.template)
    tools = Toolbox(section, template, tokenizer, config.folder / "calls") if section.enabled else None
    device = device or model.device
    casts = precision == "bf16" and device.type == "cuda"
    return BatchedEngine(
        model,
        slots=config.rollouts.slots,
        temperature=config.rollouts.temperature,
        top_p=config.rollouts.top_p,
        seed=config.seed,
        end_of_text=tokenizer.eos_token_id,
        dtype=torch.bfloat16 if casts else None,
        device=device,
        heartbeat=heartbeat,
        tools=tools,
    )


def check_lengths(config: GrpoConfig, mix: TaskSampler) -> None:
    """Let `mix` pass over problems whose prompts leave no room in a row for a response of the last stage, and note how
    many there are. UsageError if that is every problem of a task, or by `packing.long_prompts`."""
    encoder, template = Encoder(load_tokenizer(config.init_from)), Template(config.template)
    room = config.packing.row_length - config.curriculum.end

    def length(problem: Problem) -> int:
        return len(encoder.encode_prompt(template.prompt(problem.question)))

    splits: tuple[Split, ...] = ("train", "held_out")
    for section in config.tasks:
        prompts = [(length(problem), problem, split) for split in splits for problem in mix.probe(section.name, split)]
        count = sum(tokens > room for tokens, _, _ in prompts)
        if not count:
            continue
        most, longest, _ = max(prompts, key=lambda prompt: prompt[0])
        where = f"{section.path}, line {longest.item}" if section.path else f"{longest.question[:40]!r}"
        found = (
            f"{count:,} of {len(prompts):,} prompts of task {section.name!r} leave no room in packing.row_length "
            f"{config.packing.row_length} for responses of {config.curriculum.end} tokens; the longest ({where}) has "
            f"{most:,} tokens and needs {most + config.curriculum.end}"
        )
        none_left = {split for tokens, _, split in prompts if tokens <= room} != set(splits)
        if none_left or config.packing.long_prompts == "refuse":
            raise UsageError(found)
        mix.notes.append(found)
    mix.fits = lambda problem: length(problem) <= room


def source_of(task: TaskSection) -> Source:
    """A task as a record of lineage names it: by its section, and a file by its content."""
    content = task.model_dump_json() + (hash_file(Path(task.path)).sha256 if task.path else "")
    made = "procedural" if task.path is None else "human"
    return Source(name=task.name, licence="", provenance=made, content=hashlib.sha256(content.encode()).hexdigest())


def task_contents(tasks: Sequence[TaskSection]) -> list[str | None]:
    """The SHA-256 of each task's file, if it has one."""
    return [hash_file(Path(task.path)).sha256 if task.path else None for task in tasks]


def check_same_tasks(before: Sequence[str | None], now: Sequence[str | None], tasks: Sequence[TaskSection]) -> None:
    """UsageError if a task's file is another than when the run began, by `task_contents` then and now."""
    for old, new, task in zip(before, now, tasks, strict=True):
        if old != new:
            raise UsageError(
                f"tasks: {task.path} has changed since this run began; restore it, or start under another name"
            )


def describe(config: GrpoConfig) -> str:
    """What `--dry-run` prints. Token counts are upper bounds: responses as long as the curriculum lets them be."""
    architecture = policy_config(config)
    mix = TaskSampler(config.tasks, config.seed)
    check_lengths(config, mix)
    total, active = architecture.parameter_counts()
    group = config.sampling.full_size
    rollouts = config.steps * config.groups_per_step * group
    tokens = rollouts * config.curriculum.start
    flops = architecture.flops_per_token(config.packing.row_length)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    batch = f"{config.groups_per_step} groups of {group}: {quantity(rollouts)} rollouts learned from"
    stale, dropout = config.rollouts.max_staleness, load_model_config(config.init_from).dropout
    pace = f"at most {stale} updates ahead" if stale else "in turn with the learner"
    workers = f"{config.rollouts.workers} a rank, {pace}, each with {total * WEIGHT / 2**30:,.2f} GiB of weights"
    rows = [  # those without a value are left out
        ("parameters", f"{quantity(total)} total, {quantity(active)} active ({total:,} / {active:,})"),
        ("FLOPs", f"{quantity(flops)} a learned token, {quantity(flops / 3)} a generated one"),
        ("tasks", ", ".join(mix.families)),
        *(("left out", note) for note in mix.notes),
        ("tools", ", ".join((*config.tools.use, *config.tools.servers))),
        ("caution", isolation() if "python" in config.tools.use else ""),
        ("steps", f"{config.steps:,} of {batch}"),
        ("tokens", f"at most {quantity(tokens)} of responses, at the first stage's {config.curriculum.start} each"),
        ("engine", f"{config.rollouts.slots} slots, new weights every {config.rollouts.steps_per_update} steps"),
        ("workers", workers if config.rollouts.workers else ""),
        ("ranks", layout_text(ranks, config.execution)),
        *memory_rows(memory_of_policy(config, architecture, ranks), None),
        ("dropout", f"off, which {config.init_from} was trained with at {dropout}" if dropout else ""),
    ]
    return "\n".join(f"{name:<12}  {value}" for name, value in rows if value)


def memory_of_policy(config: GrpoConfig, architecture: MaiThinkingConfig, ranks: int) -> dict[str, float]:
    """Bytes by use, of one rank: `plan.memory_per_rank` of the learner, then the engine's weights and cache, and the
    nuclei of a micro-batch, which waits in less room (`rl.nuclei`). Micro-batches and slots are taken to be full."""
    section, parts = config.packing, architecture.parameter_breakdown()
    cast = 2 if computes_in_bf16(config.execution, None) else 4
    tokens = section.rows * section.row_length
    in_products = sum(parts[name] for name in ("attention", "dense", "latent_projections", "experts"))
    wide = architecture.parameter_counts()[0] - in_products
    kept = sum(
        min(architecture.sliding_window, section.row_length) if kind == LOCAL else section.row_length
        for kind in architecture.layer_types or []
    )
    states = architecture.num_key_value_heads * sum(architecture.cached_dims) * cast
    return memory_per_rank(architecture, config.execution, Work(ranks, tokens, tokens, cast)) | {
        "engine": cast * in_products + WEIGHT * wide,
        "its cache": config.rollouts.slots * kept * states,
        "nuclei": tokens * -(-architecture.vocab_size // 8),
    }
