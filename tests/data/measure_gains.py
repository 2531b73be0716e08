"""What cleaning is worth: small models of the same size, seeds and steps on a dirtied corpus, by what was cleaned.
`PYTHONPATH=. python tests/data/measure_gains.py RUNS` runs what is missing below the folder RUNS, and prints JSON.

The text is real: manuals, docstrings, and the standard library. A fifth is set apart; Eq. 3 is of this, and every arm's
training text is kept apart from it. The rest is dirtied by rule: furniture around every page, near copies of a third of
them, exact copies of a quarter, and pages of a few templates; or it is left as it is.
"""

import json
import random
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from mai_thinking.config.data import EMBEDDED_DEFAULT
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.data import prepare
from mai_thinking.data.embedded import read_embedded
from mai_thinking.data.tokenizer import load_tokenizer, train_tokenizer
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.recipes.pretrain import pretrain
from mai_thinking.report.comparison import student
from mai_thinking.training.evaluation import evaluate_texts, weighted_score
from mai_thinking.training.metrics import read_metrics

OFF: dict[str, Any] = {"exact_duplicates": False, "near_duplicates": None}
COPIES: dict[str, Any] = {"exact_duplicates": True, "near_duplicates": 0.7}
EVERYTHING: dict[str, Any] = {**COPIES, "boilerplate": {}, "templates": {}, "semantic": {}}
AS_IT_IS = "as it is, "
ARMS = {
    "nothing": OFF,
    "copies": COPIES,
    **{stage: OFF | {stage: {}} for stage in ("boilerplate", "templates", "semantic")},
    "everything": EVERYTHING,
    AS_IT_IS + "nothing": OFF,
    AS_IT_IS + "everything": EVERYTHING,
}
SEEDS = (0, 1, 2)
CATEGORIES = {"general": ("manuals", "docstrings"), "code": ("stdlib",)}
STEPS, CONTEXT, ROWS = 400, 256, 8
MODEL = {
    "hidden_size": 64, "num_hidden_layers": 6, "intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 64, "num_experts": 32, "num_experts_per_tok": 4,
    "latent_size": 32, "moe_intermediate_size": 48, "initializer_range": 0.05,
}  # fmt: skip


def clean_pages(category: str) -> list[str]:
    """Whole documents, in an order by chance."""
    sources = [source for source in EMBEDDED_DEFAULT if source.name in CATEGORIES[category]]
    pages = [one.text for source in sources for one in read_embedded(source) if 1000 < len(one.text) < 30_000]
    random.Random(category).shuffle(pages)
    return pages[: 800 if category == "code" else None]


def dirtied(pages: list[str], category: str) -> list[str]:
    """The pages among their copies, in their furniture, and pages of templates."""
    draw = random.Random(f"dirt {category}")
    mark = "# " if category == "code" else ""
    words = re.findall(r"[a-z]{3,}", " ".join(pages[:50]))

    def sentence(count: int) -> str:
        return mark + " ".join(draw.choices(words, k=count)) + "\n"

    furniture = [sentence(draw.randint(8, 16)) for _ in range(60)]
    frames = [[sentence(12) for _ in range(14)] for _ in range(6)]

    def furnished(text: str) -> str:
        return "".join(draw.sample(furniture, 8)) + text + "".join(draw.sample(furniture, 8))

    def near(text: str) -> str:
        return re.sub(r"[a-z]{3,}", lambda word: draw.choice(words) if draw.random() < 0.01 else word[0], text)

    found = [furnished(text) for text in pages]
    found += [furnished(near(text)) for text in pages[::3] for _ in range(2)]
    found += found[: len(pages) // 4]
    for _ in range(2 * len(pages)):
        frame = draw.choice(frames)
        found.append("".join(line[:-1] + f" {draw.choice(words)} {draw.randint(0, 999)}\n" for line in frame))
    draw.shuffle(found)
    return found


def written(folder: Path) -> dict[str, list[str]]:
    """The files of all arms; the texts set apart, by category."""
    folder.mkdir(parents=True, exist_ok=True)
    apart: dict[str, list[str]] = {}
    training = []
    for category in CATEGORIES:
        pages = clean_pages(category)
        cut = len(pages) // 5
        apart[category], rest = pages[:cut], pages[cut:]
        training += rest
        for name, texts in ((category, dirtied(rest, category)), (AS_IT_IS + category, rest)):
            if not (path := folder / f"{name}.jsonl").exists():  # what is prepared is known by its files' times
                path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if not (folder / "tokenizer").exists():
        (folder / "apart.json").write_text(json.dumps(apart))
        train_tokenizer(training, 2048).save_pretrained(folder / "tokenizer")
    return apart


def config_of(arm: str, seed: int, folder: Path) -> PretrainConfig:
    """One run. All have one tokenizer, so that they differ in the text alone."""
    corpus = AS_IT_IS if arm.startswith(AS_IT_IS) else ""
    sources = [
        {"name": category, "kind": "jsonl", "path": str(folder / f"{corpus}{category}.jsonl"), "category": category,
         "licence": "mixed", "provenance": "human", "weight": 1}
        for category in CATEGORIES
    ]  # fmt: skip
    cleaning = {**ARMS[arm], "benchmarks": [str(folder / "apart.json")]}
    data = {
        "sources": sources,
        "held_out": {"max_bytes": 2000},
        "cleaning": cleaning,
        "tokenizer": {"path": str(folder / "tokenizer")},
    }
    name = f"{arm.replace(' ', '-').replace(',', '')}-{seed}"
    return PretrainConfig.model_validate({
        "name": name, "output_dir": str(folder / name), "seed": seed, "steps": STEPS, "model": MODEL,
        "data": {**data, "cache_dir": str(folder / "cache")},
        "batch": {"context_length": CONTEXT, "global_batch_size": ROWS, "micro_batch_size": ROWS},
        "optimizer": {"learning_rate": 1e-2, "betas": [0.9, 0.99]}, "schedule": {"warmup_steps": 20},
        "evaluation": {"every": STEPS, "sample_prompts": []}, "checkpoint": {"every": STEPS},
    })  # fmt: skip


def nats_of(config: PretrainConfig, apart: dict[str, list[str]]) -> dict[str, float]:
    """Nats per byte of what was set apart, by category; noted in the run's folder."""
    path = config.folder / "apart.json"
    if not path.exists():
        assert pretrain(config) == 0
        model = MaiThinkingForCausalLM.from_pretrained(config.folder / "final")
        tokenizer = load_tokenizer(config.folder / "final")
        found = {}
        for category, texts in apart.items():
            result = evaluate_texts(model, tokenizer, texts[:40], context_length=CONTEXT, batch_size=16)
            found[category] = result.nats / result.bytes
        path.write_text(json.dumps(found))
    return dict(json.loads(path.read_text()))


def measure(folder: Path) -> dict[str, Any]:
    """Eq. 3, normalised by the first run without cleaning: of every arm, what it gains on its corpus without cleaning,
    in %, over the seeds that are done."""
    apart = written(folder)
    runs: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in ARMS}
    for seed in SEEDS:
        for arm in ARMS:
            runs[arm][seed] = nats_of(config_of(arm, seed, folder), apart)
            print(arm, seed, runs[arm][seed], file=sys.stderr, flush=True)
    first = runs["nothing"][SEEDS[0]]
    scores = {
        arm: [weighted_score({name: nats / first[name] for name, nats in run.items()}) for run in found.values()]
        for arm, found in runs.items()
    }
    gains = {}
    for arm, values in scores.items():
        without = scores[AS_IT_IS * arm.startswith(AS_IT_IS) + "nothing"]
        pairs = [100 * (before - after) for before, after in zip(without, values, strict=True)]
        mean, low, high = student(pairs)
        gains[arm] = {"eq3": fmean(values), "gain": mean, "low": low, "high": high, "seeds": len(values)}
        read, kept = sizes_of(config_of(arm, SEEDS[0], folder))
        gains[arm] |= {"read_mb": read, "trained_mb": kept}
    configs = [config_of(arm, seed, folder) for arm in ARMS for seed in SEEDS]
    steps = [step for config in configs for step in read_metrics(config.folder)[0][1:]]
    waiting = sum(step["data_wait"] for step in steps) / sum(step["seconds"] for step in steps)
    model = MaiThinkingForCausalLM.from_pretrained(configs[0].folder / "final")
    parameters = sum(tensor.numel() for tensor in model.parameters())
    return {"gains": gains, "tokens": STEPS * CONTEXT * ROWS, "parameters": parameters, "waiting": waiting}


def sizes_of(config: PretrainConfig) -> tuple[float, float]:
    """Megabytes read and left."""
    counts = [entry["counts"] for entry in prepare(config.data).manifest["sources"].values()]
    return sum(one["read"][1] for one in counts) / 1e6, sum(one["kept"][1] for one in counts) / 1e6


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
