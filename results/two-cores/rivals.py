"""What else makes of the same minutes: `python results/two-cores/rivals.py run NAME STEPS SEED`, in the root.

A dense model of the record's active parameters, in our own trainer, and nanochat's model and optimiser, whose code
is not here: `NANOCHAT` names a folder that has `nanochat/gpt.py` and `nanochat/optim.py`. All read the rows of
configs/two-cores.yaml in their order, of its tokenizer, and are scored on all that is held out. `time NAME …` measures
steps, a few of each by turns, on `CORES` cores: of one the processor's seconds, of two, which should be quiet, the
clock's. `run` trains, in as many threads or in `OMP_NUM_THREADS`. Each adds lines to rivals.jsonl, from which
`python scripts/record.py --out results/two-cores --rivals results/two-cores/rivals.jsonl` makes the table.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mai_thinking.bench.machine import describe
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import PreparedData, prepare
from mai_thinking.model.latent_moe import Routing
from mai_thinking.model.modeling import DecoderLayer, DenseFeedForward
from mai_thinking.provenance.lineage import code_version
from mai_thinking.recipes.pretrain import make_loader
from mai_thinking.training import evaluation
from mai_thinking.training.context import make_accelerator
from mai_thinking.training.learner import Learner, TextLoss
from mai_thinking.training.model_files import build_model, model_config
from mai_thinking.training.process import keep_freed_memory

torch._dynamo.config.recompile_limit = 64  # the optimiser compiles a step for each shape
CONFIG, OUT = "configs/two-cores.yaml", Path(os.environ.get("RIVALS", Path(__file__).parent / "rivals.jsonl"))
BLOCK, ROUNDS, CORES = 6, int(os.environ.get("ROUNDS", 8)), int(os.environ.get("CORES", 1))
now = time.thread_time if CORES == 1 else time.perf_counter
DENSE_WIDTH = 376  # in six layers as many weights as one token uses of dense ones, routers and experts


class Nanochat(NamedTuple):
    """A shape of nanochat and how it is trained. `rate` multiplies all its learning rates, which it scales itself by
    the tokens of a step and the width."""

    layers: int
    width: int
    heads: int
    context: int
    tokens: int
    rate: float = 1.0
    warmup: int = 40
    what: str = ""


NANOCHAT = {
    "nanochat": Nanochat(6, 384, 6, 512, 16_384, what="runs/runcpu.sh: 6 layers of 384, 16,384 tokens a step"),
    "nanochat-small-steps": Nanochat(6, 384, 6, 512, 2_048, what="the same, 2,048 tokens a step"),
    "nanochat-96": Nanochat(6, 96, 3, 1024, 2_048, what="6 layers of 96, rows of 1,024, 2,048 tokens a step"),
    "nanochat-128": Nanochat(6, 128, 4, 1024, 2_048, what="6 layers of 128, rows of 1,024, 2,048 tokens a step"),
    "nanochat-192": Nanochat(6, 192, 6, 1024, 2_048, what="6 layers of 192, rows of 1,024, 2,048 tokens a step"),
}


class Rival(NamedTuple):
    """What is timed and scored: an update from the next rows, and the model as `evaluate_texts` calls it."""

    what: str
    parameters: tuple[int, int]
    """All, and those that a token uses."""
    tokens: int
    context: int
    update: Callable[[Iterator[Any], int], float]
    """The loss of step n, from 1."""
    model: Any


# ---------------------------------------------------------------------------------------------------- in our trainer


class DenseLoss(TextLoss):
    """Where there is no router, one that is in balance."""

    def forward(self, micro_batch: dict[str, Tensor], learner: Learner) -> tuple[Tensor, Routing, Tensor]:
        one, labels = torch.ones(1, 1), micro_batch["labels"]
        output = learner.model(
            input_ids=micro_batch["input_ids"],
            position_ids=micro_batch["position_ids"],
            shift_labels=labels,
            num_items_in_batch=self._labels,
            skip_logits=True,
            use_cache=False,
        )
        return output.loss, Routing(one, one, one[0], one[0], one[0]), output.loss.detach()


def ours(config: PretrainConfig, data: PreparedData, *, dense: bool) -> Rival:
    """The record's own model, or a dense one: SwiGLU in each layer, as many active parameters, all else the same."""
    changes: dict[str, Any] = {"intermediate_size": DENSE_WIDTH, "num_experts": 2, "num_experts_per_tok": 2}
    config = config.model_copy(update={"model": config.model | (changes if dense else {})})
    architecture = model_config(config, data.tokenizer)
    model = build_model(config, architecture)
    total, active = architecture.parameter_counts()
    what = "two-cores"
    if dense:
        for layer in model.model.layers:
            assert isinstance(layer, DecoderLayer)
            if layer.is_moe:
                layer.is_moe, layer.feed_forward = False, DenseFeedForward(architecture).apply(model._init_weights)
        total = active = sum(p.numel() for p in model.parameters())
        what = f"dense: SwiGLU of {DENSE_WIDTH} in all six layers, the same trainer"
        what += ", the same keys" * architecture.offset_keys
    learner = Learner(
        model, config, make_accelerator(config), balance=0.0 if dense else architecture.router_aux_loss_coef
    )
    loss = DenseLoss() if dense else TextLoss()
    model.train()

    def update(batches: Iterator[Any], step: int) -> float:
        return float(learner.update(next(batches), loss, step)["loss"])

    batch = config.batch
    return Rival(what, (total, active), batch.tokens_per_step, batch.context_length, update, model)


# --------------------------------------------------------------------------------------------------------- nanochat


class Scored(nn.Module):
    """nanochat's model as `evaluate_texts` calls one: its logits are capped, so it scores the targets itself."""

    def __init__(self, gpt: nn.Module) -> None:
        super().__init__()
        self.gpt, self.device = gpt, torch.device("cpu")

    def forward(self, input_ids: Tensor, use_cache: bool, head: Any) -> Any:
        targets = head.args[0]
        logits = self.gpt(input_ids)
        nats = F.cross_entropy(logits[targets != -100], targets[targets != -100], reduction="sum")
        return type("Output", (), {"scores": torch.stack((nats, torch.zeros(())))})


def nanochat(config: PretrainConfig, data: PreparedData, shape: Nanochat) -> Rival:
    """Its model, optimiser, initialisation, and the rules and schedules of its scripts/base_train.py as they stand."""
    sys.path.insert(0, os.environ["NANOCHAT"])
    from nanochat.gpt import GPT, GPTConfig  # type: ignore[import-not-found]

    def built(layers: int, width: int, heads: int) -> Any:
        return GPT(GPTConfig(shape.context, vocabulary, layers, heads, heads, width, "L"))

    def scaling(model: Any) -> int:
        return sum(p.numel() for part in (model.transformer.h, model.lm_head) for p in part.parameters())

    torch.manual_seed(config.seed)
    vocabulary = model_config(config, data.tokenizer).vocab_size
    model = built(shape.layers, shape.width, shape.heads)
    model.init_weights()
    with torch.device("meta"):
        reference = built(12, 768, 6)
    root = math.sqrt(shape.tokens / 2**19)
    rate, decay = root * shape.rate, 0.28 * root * scaling(reference) / scaling(model)
    optimizer = model.setup_optimizer(
        unembedding_lr=0.008 * rate,
        embedding_lr=0.3 * rate,
        scalar_lr=0.5 * rate,
        matrix_lr=0.02 * rate,
        weight_decay=decay,
    )
    compiled = torch.compile(model, dynamic=False)
    steps, down = config.steps, round(0.65 * config.steps)

    def multiplier(n: int) -> float:
        if n < shape.warmup:
            return (n + 1) / shape.warmup
        left = (steps - n) / down
        return 1.0 if n <= steps - down else left + (1 - left) * 0.05

    def momentum(n: int) -> float:
        if n < 400:
            return 0.85 + (0.97 - 0.85) * n / 400
        return 0.97 if n < steps - down else 0.97 - (0.97 - 0.90) * (n - (steps - down)) / down

    def update(batches: Iterator[Any], step: int) -> float:
        parts, loss = max(1, shape.tokens // config.batch.tokens_per_step), 0.0
        for _ in range(parts):
            (rows,) = next(batches)
            labels = rows["labels"].masked_fill(rows["labels"] == -100, -1)
            share = compiled(rows["input_ids"].view(-1, shape.context), labels.view(-1, shape.context)) / parts
            share.backward()
            loss += float(share.detach())
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier(step - 1)
            if group["kind"] == "muon":
                group["momentum"] = momentum(step - 1)
                group["weight_decay"] = decay * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss

    tables = sum(p.numel() for table in model.value_embeds.values() for p in table.parameters())
    total = sum(p.numel() for p in model.parameters())
    used = total - tables - vocabulary * shape.width  # rows of tables are looked up; the head is a product
    return Rival(f"nanochat: {shape.what}", (total, used), shape.tokens, shape.context, update, Scored(model))


# ---------------------------------------------------------------------------------------------------------- the work


def make(name: str, config: PretrainConfig, data: PreparedData) -> Rival:
    """By name; `@2` behind it: nanochat at twice its rates."""
    if name in ("two-cores", "dense"):
        return ours(config, data, dense=name == "dense")
    base, _, rate = name.partition("@")
    shape = NANOCHAT[base]
    rival = nanochat(config, data, shape._replace(rate=float(rate or 1)))
    return rival._replace(what=f"{rival.what}, {rate} times its rates" if rate else rival.what)


def measure(names: list[str], config: PretrainConfig, data: PreparedData) -> Iterator[dict[str, Any]]:
    """Seconds of a step, the median over blocks by turns; the first step of a block finds cold caches."""
    rivals = {name: make(name, config, data) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    with make_loader(config, data) as loader:
        batches = (batch.micro_batches for batch in loader)
        for turn in range(ROUNDS + 1):  # the first warms up, and compiles
            for name, rival in rivals.items():
                long = rival.tokens > config.batch.tokens_per_step
                for index in range(1 if long else BLOCK):
                    begin = now()
                    rival.update(batches, 1)
                    if turn and (index or long):
                        spent[name].append(now() - begin)
    for name, rival in rivals.items():
        found = sorted(spent[name])
        yield {
            "kind": "time", "name": name, "parameters": rival.parameters, "tokens": rival.tokens, "steps": len(found),
            "seconds": median(found), "low": found[len(found) // 4], "high": found[3 * len(found) // 4],
        }  # fmt: skip


def train(name: str, config: PretrainConfig, data: PreparedData) -> dict[str, Any]:
    """To the end, then all that is held out."""
    rival = make(name, config, data)
    begin, seconds = time.time(), []
    with make_loader(config, data) as loader:
        batches = (batch.micro_batches for batch in loader)
        for step in range(1, config.steps + 1):
            start = now()
            loss = rival.update(batches, step)
            seconds.append(now() - start)
            if step % max(1, config.steps // 40) == 0:
                print(f"{name} {step}: loss {loss:.3f}, {median(seconds):.4f} s a step", flush=True)
    wall = time.time() - begin
    limit = int(os.environ.get("HELD_OUT_BYTES", 0)) or None
    bits = {}
    for category, documents in data.held_out.items():
        if texts := evaluation._first_bytes([document.text for document in documents], limit):
            bits[category] = evaluation.evaluate_texts(
                rival.model, data.tokenizer, texts, context_length=rival.context, batch_size=4
            ).bits_per_byte
    return {
        "kind": "run", "name": name, "what": rival.what, "parameters": rival.parameters, "steps": config.steps,
        "seed": config.seed, "tokens": config.steps * rival.tokens, "seconds": median(seconds), "wall": wall,
        "weighted": evaluation.weighted_score(bits), "bits": bits, "held_out_bytes": limit,
    }  # fmt: skip


def main() -> None:
    """`time NAME …` or `run NAME STEPS SEED`."""
    kind, *rest = sys.argv[1:]
    steps, seed = (rest[1], rest[2]) if kind == "run" else ("2400", "0")
    warmup = min(100, int(steps) // 10)
    config = load_config(PretrainConfig, CONFIG, [f"steps={steps}", f"seed={seed}", f"schedule.warmup_steps={warmup}"])
    keep_freed_memory()
    code_version()  # of what runs, not of what lies there when it is done
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", CORES)) if kind == "run" else CORES)
    data = prepare(config.data, log=print)
    lines = [train(rest[0], config, data)] if kind == "run" else list(measure(rest, config, data))
    with OUT.open("a") as file:
        for line in lines:
            file.write(
                json.dumps(line | {"cores": CORES, "machine": describe(), "commit": code_version().commit}) + "\n"
            )
            print(json.dumps(line))


if __name__ == "__main__":
    main()
