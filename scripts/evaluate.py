"""Bits per byte of any checkpoint on any text: `python scripts/evaluate.py MODEL FILE …`.

MODEL is a Hugging Face folder, a run's folder, or a run's `checkpoints/step-…`. Each FILE is one UTF-8 document.
`gzip -9` and `xz -9e` of the same bytes stand beside the result.
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
    options = parser.parse_args()

    from mai_thinking.training.evaluation import evaluate_files
    from mai_thinking.training.model_files import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer(options.model)
    print(
        evaluate_files(model, tokenizer, options.files, context_length=options.context, batch_size=options.batch_size)
    )


if __name__ == "__main__":
    exit_with(main)
