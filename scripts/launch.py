"""Run a script data-parallel on this machine: `python scripts/launch.py --nproc 2 scripts/pretrain.py CONFIG.yaml …`.

Restarts the workers from the newest good checkpoint when one dies or hangs. On several machines, run the same script
under `torchrun --nnodes`.
"""

import argparse
import os
from pathlib import Path

from mai_thinking.config.command import Parser, exit_with
from mai_thinking.config.launch import LaunchSection
from mai_thinking.config.loading import validate
from mai_thinking.config.shipped import find_script
from mai_thinking.errors import UsageError
from mai_thinking.launch.warm_workers import start_warm_workers


def parse(arguments: list[str] | None = None) -> tuple[LaunchSection, Path, list[str]]:
    """(options, script, the script's own arguments)."""
    parser = Parser(__doc__, argument_default=argparse.SUPPRESS)
    for name, field in LaunchSection.model_fields.items():
        default = f" (default: {field.default})" if field.default != "" else ""
        help_text = f"{' '.join((field.description or '').split())}{default}".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=help_text)
    parser.add_argument("script", type=Path, help="such as scripts/pretrain.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its config, overrides and flags")
    options = vars(parser.parse_args(arguments))
    script, rest = find_script(options.pop("script")), options.pop("arguments")
    if not script.is_file():
        raise UsageError(f"{script}: no such script")
    return validate(LaunchSection, options, "launch"), script, rest


def main() -> int:
    """Parse, start the warm workers, run."""
    section, script, arguments = parse()
    # More threads than cores make every rank wait for the others.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // section.nproc)))
    if os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here; no name to look up
    start_warm_workers(script)
    # Only now, beside their own imports: this one brings torch.
    from mai_thinking.launch.launcher import launch

    return launch(section, script, arguments)


if __name__ == "__main__":
    exit_with(main)
