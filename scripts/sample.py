"""Talk to a model: `python scripts/sample.py [MODEL] [--prompt TEXT | --question TEXT | --serve [PORT]]`. Without any,
an interactive session; with `--serve`, a page for a browser on this machine. A question is asked in the frame of the
model's RL run (or of the exercises), and thought and answer are told apart.

MODEL is a Hugging Face folder, a run's folder (default: runs/nano) or a run's `checkpoints/step-…`.
Text streams as it is written.
"""

from mai_thinking.config.base import Count, EvaluationTemperature, Probability, Whole
from mai_thinking.config.command import Parser, exit_with, option


def main() -> None:
    """Parse, load, write."""
    parser = Parser(__doc__)
    parser.add_argument("model", nargs="?", default="runs/nano", help="a model folder, a run's folder or a checkpoint")
    parser.add_argument("--prompt", help="continue this text and stop")
    parser.add_argument("--question", help="ask this and stop, as an RL run asks it")
    parser.add_argument("--serve", type=option(Whole), nargs="?", const=8000, metavar="PORT", help="default: 8000")
    parser.add_argument("--tokens", type=option(Count), default=200, help="at most so many new tokens")
    parser.add_argument(
        "--temperature", type=option(EvaluationTemperature), default=0.8, help="0 takes the likeliest token each time"
    )
    parser.add_argument("--top-p", type=option(Probability), default=0.95)
    parser.add_argument("--seed", type=option(Whole), default=0)
    options = parser.parse_args()

    from mai_thinking.training.model_files import load_model_and_tokenizer
    from mai_thinking.training.sampling import converse, stream_text

    model, tokenizer = load_model_and_tokenizer(options.model)
    settings = {
        "tokens": options.tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }
    if options.serve is not None:
        from mai_thinking.rl.chat import Chat, serve
        from mai_thinking.rl.template import template_of

        serve(Chat(model, tokenizer, template_of(options.model), **settings), options.serve)
    elif options.question is not None:
        from mai_thinking.rl.ask import ask
        from mai_thinking.rl.template import template_of

        print(ask(model, tokenizer, template_of(options.model), options.question, **settings))
    elif options.prompt is None:
        converse(model, tokenizer, **settings)
    else:
        stream_text(model, tokenizer, options.prompt, **settings)


if __name__ == "__main__":
    exit_with(main)
