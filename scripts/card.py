"""A card's first minutes in order of worth: `python scripts/card.py --minutes 12 --out results/card --work runs/card`.

The tests that need a GPU; a step of L12; a whole GRPO run of L6, from random weights; a resume, bit for bit; rollouts.
What each part found is in the folder when the next begins. One that fails costs its own figures only.
"""

from pathlib import Path

from mai_thinking.config.command import Parser, exit_with


def main() -> None:
    """Parse, run, write."""
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="for all parts together (default: 12)")
    parser.add_argument("--out", type=Path, required=True, help="the folder for what was found")
    parser.add_argument("--work", type=Path, required=True, help="the folder for the runs")
    parser.add_argument(
        "--tiny", action="store_true", help="models that take no time: the same on a CPU, to see it work"
    )
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these; the folder keeps others")
    options = parser.parse_args()

    from mai_thinking.experiments.card import parts_of, run_parts

    parts = {part.name: part for part in parts_of(options.work, tiny=options.tiny)}
    if unknown := set(options.parts or ()) - parts.keys():
        parser.error(f"--parts: no {min(unknown)!r}; there are {', '.join(parts)}")
    chosen = [part for name, part in parts.items() if name in (options.parts or parts)]
    run_parts(chosen, options.minutes, options.out)
    print(f"{options.out}/summary.md")


if __name__ == "__main__":
    exit_with(main)
