"""One paired trial of what might make nano better: `python results/two-cores/trial.py NAME STEPS SEED`, in the root.

Runs of the same steps and seed read the same rows and begin with the same weights wherever their shapes agree. `TRIED`
says what each NAME changes: keys of configs/nano.yaml, or something that the library does not have, which is patched in
here. A line is added to trials.jsonl: bits per byte of the first bytes of what is held out, and the processor's seconds
per step, which others on the machine disturb little. `python scripts/record.py --out results/two-cores --tried
results/two-cores/trials.jsonl` makes the table.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import prepare
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.model import loss as loss_module
from mai_thinking.model.latent_moe import Experts
from mai_thinking.recipes.pretrain import make_loader
from mai_thinking.training import evaluation, muon
from mai_thinking.training.context import make_accelerator
from mai_thinking.training.learner import Learner, TextLoss
from mai_thinking.training.model_files import build_model, model_config
from mai_thinking.training.process import keep_freed_memory

HELD_OUT_BYTES = int(os.environ.get("HELD_OUT_BYTES", 40_000))  # of each category
OUT = Path(os.environ.get("TRIALS", Path(__file__).parent / "trials.jsonl"))


class Trial(NamedTuple):
    """What is tried."""

    what: str
    overrides: tuple[str, ...] = ()
    model: Callable[[MaiThinkingForCausalLM], None] = lambda model: None
    learner: Callable[[Learner], None] = lambda learner: None
    weights: Mapping[str, float] = MappingProxyType({})
    average: float = 0.0


# ------------------------------------------------------------------------------------------------- what is patched in


def fine_tune_rate(part: str, factor: float) -> Callable[[Learner], None]:
    """Parameters with `part` in their names learn at another rate."""

    def change(learner: Learner) -> None:
        names = {id(p): name for name, p in learner.model.named_parameters()}
        for group in list(learner.optimizer.param_groups):
            those = [p for p in group["params"] if part in names[id(p)]]
            if those:
                group["params"] = [p for p in group["params"] if part not in names[id(p)]]
                learner.optimizer.param_groups.append({**group, "params": those, "factor": factor})

        def scale(optimizer: Any, *_: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= group.get("factor", 1.0)

        learner.optimizer.register_step_pre_hook(scale)

    return change


def schedule(shape: Callable[[float], float]) -> Callable[[Learner], None]:
    """The rate's share of its top, over the part of the run behind the warm-up."""

    def change(learner: Learner) -> None:
        top, warm, steps = (
            learner.config.optimizer.learning_rate,
            learner.config.schedule.warmup_steps,
            learner.config.steps,
        )
        learner.learning_rate = lambda n: top * (n / warm if n <= warm else shape((n - warm) / (steps - warm)))  # type: ignore[method-assign]

    return change


def hashed_rows(ids: Tensor, bits: int, orders: tuple[int, ...]) -> list[Tensor]:
    """For each order, the row of a table of 2^bits that a token and those before it are hashed to."""
    before, hashed, rows = ids, ids, []
    for order in range(2, max(orders) + 1):
        before = F.pad(before, (1, 0))[:, :-1]
        hashed = (hashed * 1_000_003 + before * 7_919 + 12_345) % 2**32
        if order in orders:
            rows.append((hashed ^ (hashed >> 15)) * 2_654_435_761 % 2**32 >> (32 - bits))
    return rows


def ngrams(bits: int, *orders: int) -> Callable[[MaiThinkingForCausalLM], None]:
    """Tables of 2^bits rows, added to a token's embedding: the row that the last few tokens are hashed to."""

    def change(model: MaiThinkingForCausalLM) -> None:
        tables = nn.ModuleList(nn.Embedding(2**bits, model.config.hidden_size) for _ in orders)
        for table in tables:
            nn.init.zeros_(table.weight)
        model.model.add_module("ngrams", tables)

        def add(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
            return sum(
                (table(row) for table, row in zip(tables, hashed_rows(inputs[0], bits, orders), strict=True)), out
            )

        model.model.embed_tokens.register_forward_hook(add)

    return change


def sparse_ngrams(bits: int, *orders: int, factor: float = 1.0) -> Callable[[Learner], None]:
    """The same, of which a step touches the rows that it read."""

    def change(learner: Learner) -> None:
        model = learner.model
        tables = [nn.Parameter(torch.zeros(2**bits, model.config.hidden_size)) for _ in orders]
        adam = torch.optim.SparseAdam(tables, betas=(0.9, 0.99))

        def add(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
            rows = hashed_rows(inputs[0], bits, orders)
            return sum((F.embedding(row, table, sparse=True) for table, row in zip(tables, rows, strict=True)), out)

        def step(optimizer: Any, *_: Any) -> None:
            adam.param_groups[0]["lr"] = factor * optimizer.param_groups[0]["lr"]
            adam.step()
            adam.zero_grad()

        model.model.embed_tokens.register_forward_hook(add)
        learner.optimizer.register_step_pre_hook(step)

    return change


def shift(model: MaiThinkingForCausalLM) -> None:
    """Attention reads of each token a learned share of the one before too, channel by channel; none at first."""

    def mix(norm: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        return out + norm.before * F.pad(out, (0, 0, 1, 0))[:, :-1]

    for layer in model.model.layers:
        layer.attention_in_norm.register_parameter("before", nn.Parameter(torch.zeros(model.config.hidden_size)))
        layer.attention_in_norm.register_forward_hook(mix)


def value_embeddings(model: MaiThinkingForCausalLM) -> None:
    """A table a layer, added to the values of attention."""
    seen: dict[str, Tensor] = {}
    model.model.register_forward_pre_hook(lambda m, a, k: seen.update(ids=k["input_ids"]), with_kwargs=True)
    for layer in model.model.layers:
        table = nn.Embedding(model.config.vocab_size, layer.attention.v_proj.out_features)
        nn.init.zeros_(table.weight)
        layer.attention.add_module("value_table", table)
        layer.attention.v_proj.register_forward_hook(lambda m, a, out, table=table: out + table(seen["ids"]))


def softcap(cap: float) -> Callable[[MaiThinkingForCausalLM], None]:
    """Logits are cap · tanh(logits / cap)."""

    def change(model: MaiThinkingForCausalLM) -> None:
        plain, product = loss_module._loss_and_gradient, evaluation.fp32_product

        def capped(logits: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
            tanh = (logits / cap).tanh_()
            loss, gradient = plain(tanh * cap, *rest, **named)
            return loss, None if gradient is None else gradient.mul_(1 - tanh.square())

        loss_module._loss_and_gradient = capped
        evaluation.fp32_product = lambda hidden, weight: cap * torch.tanh(product(hidden, weight) / cap)

    return change


def muon_for_experts(learner: Learner) -> None:
    """Each expert's gate, up and down are matrices of their own."""
    for group in list(learner.optimizer.param_groups):
        those = [p for p in group["params"] if p.dim() == 3]
        if those:
            group["params"] = [p for p in group["params"] if p.dim() != 3]
            learner.optimizer.param_groups.append({**group, "params": those, "muon": True})

    def step(group: dict[str, Any]) -> None:
        if group["params"][0].dim() == 2:
            plain(group)
            return
        for p in group["params"]:
            E, rows, columns = p.shape
            shape = (2 * E, rows // 2, columns) if rows > 2 * columns else p.shape
            blocks = learner.optimizer._momentum(p, p.grad).view(shape).split(64)
            change = torch.cat([muon.orthogonalized(block) for block in blocks]).view(p.shape)
            scale = muon.UPDATE_RMS * max(shape[1:]) ** 0.5 * group["lr"]
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=scale)
            p.grad = None

    plain = learner.optimizer._step_matrices
    learner.optimizer._step_matrices = step


def half_products(model: MaiThinkingForCausalLM) -> None:
    """Under autocast: the linear maps in bf16; attention, experts and routers, which are slower so, in fp32."""

    def wide(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *rest: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return forward(x.float(), *rest)

        return run

    for layer in model.model.layers:
        layer.attention.v_proj.register_forward_hook(lambda m, a, out: out.float())
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = wide(module.forward)  # type: ignore[method-assign]


MUON = ("optimizer.name=muon",)
BALANCED = {"stdlib": 50, "stdlib-tests": 4, "scientific": 18, "exercises": 12, "manuals": 6, "docstrings": 10}
TRIED = {
    "base": Trial("nano"),
    "muon": Trial("Muon for the dense matrices", MUON),
    "muon-rate-2": Trial("the same, at twice the rate", MUON, learner=lambda ln: matrices_rate(ln, 2.0)),
    "muon-rate-half": Trial("the same, at half the rate", MUON, learner=lambda ln: matrices_rate(ln, 0.5)),
    "muon-experts": Trial("Muon for the experts too", MUON, learner=muon_for_experts),
    "to-zero": Trial("cosine to zero, not to a tenth", ("schedule.floor=0",)),
    "linear": Trial("linear to zero", learner=schedule(lambda x: 1 - x)),
    "wsd": Trial("constant, then linear to zero from 60 % on", learner=schedule(lambda x: min(1.0, (1 - x) / 0.4))),
    "average": Trial("the mean of the weights over the last 50 steps or so (EMA .98) is evaluated", average=0.98),
    "constant-average": Trial("the same of a constant rate", ("schedule.shape=constant",), average=0.98),
    "beta2-995": Trial("β₂ = .995", ("optimizer.betas=[0.9,0.995]",)),
    "beta2-95": Trial("β₂ = .95", ("optimizer.betas=[0.9,0.95]",)),
    "rate-up": Trial("learning rate 1.5e-2", ("optimizer.learning_rate=1.5e-2",)),
    "rate-down": Trial("learning rate 7e-3", ("optimizer.learning_rate=7e-3",)),
    "rows-1": Trial(
        "half the tokens a step, twice the steps", ("batch.global_batch_size=1", "batch.micro_batch_size=1")
    ),
    "context-512": Trial(
        "rows of 512", ("batch.context_length=512", "batch.global_batch_size=4", "batch.micro_batch_size=4")
    ),
    "bigrams": Trial(
        "a hashed table of 2^15 pairs of tokens beside the embedding",
        model=ngrams(15, 2),
        learner=fine_tune_rate("ngrams", 0.3),
    ),
    "trigrams": Trial(
        "tables of 2^16 pairs and 2^16 triples", model=ngrams(16, 2, 3), learner=fine_tune_rate("ngrams", 0.3)
    ),
    "trigrams-sparse": Trial(
        "the same tables, of which a step changes the rows it read", learner=sparse_ngrams(16, 2, 3)
    ),
    "quadgrams-sparse": Trial(
        "so too, 2^18 pairs, triples and quadruples, at three times the rate",
        learner=sparse_ngrams(18, 2, 3, 4, factor=3.0),
    ),
    "shift": Trial("attention reads a share of the token before", model=shift),
    "values": Trial("value embeddings", model=value_embeddings, learner=fine_tune_rate("value_table", 0.3)),
    "softcap": Trial("logits capped at 15", model=softcap(15.0)),
    "untied": Trial("head and embeddings apart", ("model.tie_word_embeddings=false",)),
    "mixture": Trial("50 % stdlib, 18 % scientific, 16 % manuals and docstrings", weights=BALANCED),
    "experts-4": Trial("4 of 512 experts a token", ("model.num_experts_per_tok=4",)),
    "experts-256": Trial("8 of 256 experts", ("model.num_experts=256",)),
    "wider": Trial("hidden size 128, 4 heads", ("model.hidden_size=128", "model.num_attention_heads=4")),
    "half": Trial("linear maps in bf16", ("execution.precision=bf16",), model=half_products),
    "vocabulary-2048": Trial("2,048 tokens", ("data.tokenizer.vocab_size=2048",)),
    "vocabulary-8192": Trial("8,192 tokens", ("data.tokenizer.vocab_size=8192",)),
}


def matrices_rate(learner: Learner, factor: float) -> None:
    def scale(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= factor if group["muon"] else 1.0

    learner.optimizer.register_step_pre_hook(scale)


# ------------------------------------------------------------------------------------------------------------ the run


def main() -> None:
    """Train, evaluate, add a line. Names joined by + are tried together."""
    name, steps, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    trials = [TRIED[part] for part in name.split("+")]
    overrides = [key for trial in trials for key in trial.overrides]
    if "batch.global_batch_size=1" in overrides:
        steps *= 2
    derived = [f"steps={steps}", f"seed={seed}", "init_by_name=true", f"schedule.warmup_steps={steps // 24}"]
    config = load_config(PretrainConfig, "configs/nano.yaml", [*derived, *overrides])
    keep_freed_memory()
    torch.set_num_threads(1)
    data = prepare(config.data, log=lambda text: None)
    if weights := {source: weight for trial in trials for source, weight in trial.weights.items()}:
        sources = tuple(s.model_copy(update={"weight": weights[s.name]}) for s in data.config.sources)
        data.config = data.config.model_copy(update={"sources": sources})
    architecture = model_config(config, data.tokenizer)
    model = build_model(config, architecture)
    for trial in trials:
        trial.model(model)
    learner = Learner(model, config, make_accelerator(config), balance=architecture.router_aux_loss_coef)
    for trial in trials:
        trial.learner(learner)
    decay = max(trial.average for trial in trials)
    average = [p.detach().clone() for p in model.parameters()] if decay else []
    seconds, loss = [], TextLoss()
    learner.model.train()
    with make_loader(config, data) as loader:
        for step in range(1, steps + 1):
            batch, begin = next(loader), time.thread_time()
            metrics = learner.update(batch.micro_batches, loss, step)
            if decay:
                torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - decay)
            seconds.append(time.thread_time() - begin)
            if step % 50 == 0:
                print(f"{name} {step}: loss {metrics['loss']:.3f}, {median(seconds):.4f} s a step", flush=True)
    if decay:
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), average)
    likelihoods = {}
    for category, documents in data.held_out.items():
        if texts := evaluation._first_bytes([d.text for d in documents], HELD_OUT_BYTES):
            likelihoods[category] = evaluation.evaluate_texts(
                model, data.tokenizer, texts, context_length=1024, batch_size=8
            )
    bits = {category: found.bits_per_byte for category, found in likelihoods.items()}
    line = {
        "name": name, "what": "; ".join(trial.what for trial in trials), "steps": steps, "seed": seed,
        "tokens": steps * config.batch.tokens_per_step, "seconds": steps * median(seconds),
        "weighted": evaluation.weighted_score(bits), "bits": bits,
    }  # fmt: skip
    with OUT.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
