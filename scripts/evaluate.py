"""Bits per byte of any checkpoint on any text: `python scripts/evaluate.py MODEL FILE …`.

MODEL is a Hugging Face folder, a run's folder, or a run's `checkpoints/step-…`. Each FILE is one UTF-8 document.
`gzip -9` and `xz -9e` of the same bytes stand beside the result.

`python scripts/evaluate.py MODEL --reference OUT.json CONFIG.yaml` writes what MODEL makes of each held-out set of a
pre-training config: what `evaluation.reference` normalises other models' losses by.

`python scripts/evaluate.py MODEL FILE … --suffix 64` shows what a longer prefix is worth: the NLL of the same 64 tokens
as the text before them grows to four times the trained length.
"""

from pathlib import Path

from mai_thinking.config.base import ContextLength, Count
from mai_thinking.config.command import Parser, exit_with, option


def main() -> None:
    """Parse, load, measure."""
    parser = Parser(__doc__)
    parser.add_argument("model", help="a model folder, a run's folder or a checkpoint")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--context", type=option(ContextLength), help="tokens in a window (default: what the model was trained on)"
    )
    parser.add_argument("--batch-size", type=option(Count), default=16)
    parser.add_argument("--reference", type=Path, metavar="OUT.json", help="FILE is a pre-training config")
    parser.add_argument("--suffix", type=option(Count), metavar="TOKENS", help="NLL of so many, by the prefix's length")
    options = parser.parse_args()

    from mai_thinking.training.evaluation import evaluate_files
    from mai_thinking.training.model_files import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(options.model)
    if options.reference is not None:
        from mai_thinking.config.loading import load_config
        from mai_thinking.config.pretraining import PretrainConfig
        from mai_thinking.data import prepare
        from mai_thinking.training.evaluation import reference_of

        data = prepare(load_config(PretrainConfig, str(options.files[0])).data, log=print)
        reference_of(model, tokenizer, data, batch_size=options.batch_size).write(options.reference)
        return
    if options.suffix is not None:
        from mai_thinking.training.long_context import long_context_table

        trained = options.context or model.config.max_position_embeddings
        print(long_context_table(model, tokenizer, options.files, suffix=options.suffix, trained=trained))
        return
    print(
        evaluate_files(model, tokenizer, options.files, context_length=options.context, batch_size=options.batch_size)
    )


if __name__ == "__main__":
    exit_with(main)
