"""What a run leaves for people: figures and one Markdown page in `report/`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.storage import atomic_file
from mai_thinking.data import PreparedData
from mai_thinking.data.accounting import LeftOut, left_out_table
from mai_thinking.model import MaiThinkingConfig
from mai_thinking.training.evaluation import Yardstick, compressors
from mai_thinking.training.metrics import read_records
from mai_thinking.training.plan import Plan
from mai_thinking.training.run_folder import RunFolder

Record = dict[str, Any]
BITS = "bits_per_byte/"


def write_report(
    folder: RunFolder,
    config: PretrainConfig,
    architecture: MaiThinkingConfig,
    data: PreparedData,
    left_out: Sequence[LeftOut],
    evaluation: Mapping[str, Any],
    samples: Mapping[str, str],
) -> None:
    """`summary.md`, and with the `plots` extra `loss.png`, `bits_per_byte.png` and `expert_load.png`."""
    folder.report.mkdir(exist_ok=True)
    yardsticks = {
        category: compressors([document.text for document in documents])
        for category, documents in data.held_out.items()
        if documents
    }
    figures = draw(folder, yardsticks, architecture)
    mixture = data.mixture_table(config.steps * config.batch.tokens_per_step)
    page = "\n\n".join(
        [
            f"# {config.name}",
            "```\n" + Plan.of(config, architecture).text() + "\n```",
            "## Held-out bits per byte\n\n" + evaluation_table(evaluation, yardsticks),
            "## Mixture\n\n" + mixture.markdown(),
            "## Left out\n\n" + left_out_table(left_out),
            *(f"![{name}]({name}.png)" for name in figures),
            "## Samples\n\n" + "\n\n".join(fenced(prompt + text) for prompt, text in samples.items()),
        ]
    )
    with atomic_file(folder.report / "summary.md") as path:
        path.write_text(page + "\n")


def evaluation_table(evaluation: Mapping[str, Any], yardsticks: Mapping[str, Yardstick]) -> str:
    """Model, `gzip -9` and `xz -9e` on the same held-out bytes, in Markdown."""
    lines = ["| category | model | gzip -9 | xz -9e |", "|---|---:|---:|---:|"]
    for category, yardstick in yardsticks.items():
        model = evaluation[BITS + category]
        lines.append(f"| {category} | {model:.4f} | {yardstick.gzip:.4f} | {yardstick.xz:.4f} |")
    lines.append(f"| weighted | {evaluation['bits_per_byte']:.4f} | | |")
    return "\n".join(lines)


def draw(folder: RunFolder, yardsticks: Mapping[str, Yardstick], architecture: MaiThinkingConfig) -> list[str]:
    """The run's figures as PNG; returns their names, none without matplotlib."""
    plt = pyplot()
    if plt is None:
        return []
    records = read_records(folder.metrics)
    steps = [record for record in records if "kind" not in record]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    draw_loss(plt, folder.report / "loss.png", steps)
    _draw_bits(plt, folder.report / "bits_per_byte.png", evaluations, yardsticks)
    _draw_load(plt, folder.report / "expert_load.png", steps, architecture)
    return ["loss", "bits_per_byte", "expert_load"]


def draw_loss(plt: Any, path: Path, steps: Sequence[Record]) -> None:
    """Training loss, gradient norm and learning rate over tokens, as PNG."""
    tokens = [record["tokens"] / 1e6 for record in steps]
    loss = [record["loss"] for record in steps]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(tokens, loss, linewidth=0.5, alpha=0.5, color="tab:blue")
    left.plot(tokens, smooth(loss), color="tab:blue")
    left.set(xlabel="training tokens (millions)", ylabel="cross-entropy (nats per token)", title="training loss")
    right.plot(tokens, [record["grad_norm"] for record in steps], linewidth=0.7, color="tab:grey")
    right.set(xlabel="training tokens (millions)", title="gradient norm (grey), learning rate (orange)", yscale="log")
    rate = right.twinx()
    rate.plot(tokens, [record["lr"] for record in steps], color="tab:orange")
    save_figure(figure, path)


def _draw_bits(plt: Any, path: Path, evaluations: Sequence[Record], yardsticks: Mapping[str, Yardstick]) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    tokens = [record["tokens"] / 1e6 for record in evaluations]
    for index, (category, yardstick) in enumerate(yardsticks.items()):
        color = f"C{index}"
        axes.plot(
            tokens, [record[BITS + category] for record in evaluations], "o-", markersize=3, color=color, label=category
        )
        axes.axhline(yardstick.xz, color=color, linestyle="--", linewidth=0.8)
    axes.plot([], [], "k--", linewidth=0.8, label="xz -9e on the same bytes")
    axes.set(xlabel="training tokens (millions)", ylabel="bits per byte", title="held-out text")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _draw_load(plt: Any, path: Path, steps: Sequence[Record], architecture: MaiThinkingConfig) -> None:
    """Each MoE layer: the busiest expert's load over the mean load, as it goes."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    tokens = [record["tokens"] / 1e6 for record in steps]
    for index, layer in enumerate(architecture.moe_layers):
        axes.plot(tokens, [record["violation"][index] for record in steps], linewidth=0.8, label=f"layer {layer}")
    axes.set(
        xlabel="training tokens (millions)",
        ylabel="violation rate (max load / mean load − 1)",
        title=f"expert load: {architecture.num_experts} experts, {architecture.num_experts_per_tok} active",
        yscale="log",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def pyplot() -> Any:
    """matplotlib's pyplot without a display, or None (and a line that says so) where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no figures: install matplotlib, or mai_thinking[plots]")
        return None
    return plt


def smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential moving average, from the first value on."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else keep * smoothed[-1] + (1 - keep) * value)
    return smoothed


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG, whole or not at all, and give its memory back."""
    from matplotlib import pyplot as plt

    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def fenced(text: str) -> str:
    """`text` as a Markdown code block, whatever backticks it has."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
