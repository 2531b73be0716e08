"""A corpus before any run: `python scripts/prepare.py [CONFIG.yaml] [key.path=value …] [--sample 0.01]`.

Prepares the data of a pre-training config, prints what each stage left out of each source, and writes a page with
histograms and a data card beside it. `--sample` takes this share of the documents, by the hash of their text, and says
what the whole would cost.
"""

from rich.console import Console
from rich.markdown import Markdown

from mai_thinking.config.base import Probability
from mai_thinking.config.command import exit_with, option, parse_with_options
from mai_thinking.config.pretraining import PretrainConfig


def main() -> None:
    """Parse, prepare, report."""
    sample = {"type": option(Probability), "default": 1.0, "help": "share of the documents (default: all)"}
    config, dry_run, options = parse_with_options(
        PretrainConfig, "configs/nano.yaml", __doc__ or "", {"--sample": sample}
    )
    if dry_run:
        print(*(f"{source.name}: {source.kind} {source.path}" for source in config.data.sources), sep="\n")
        return
    from mai_thinking.data import prepare
    from mai_thinking.report.corpus import corpus_page, estimate

    data = prepare(config.data, sample=options["sample"], log=print)
    folder = data.folder / "report"
    Console().print(Markdown(corpus_page(data).write(folder)))
    if options["sample"] < 1:
        print(estimate(data, options["sample"]))
    print(f"page and card: {folder}/summary.md, {data.folder}/card.md")


if __name__ == "__main__":
    exit_with(main)
