"""Our scripts as one command, wherever the package is installed: `mai-thinking pretrain [CONFIG] …`.

`mai-thinking NAME …` is `python scripts/NAME.py …`; `python -m mai_thinking NAME …` is the same again.
"""

import ast
import runpy
import sys

from mai_thinking.config.command import exit_with
from mai_thinking.config.names import nearest_name
from mai_thinking.config.shipped import SCRIPTS
from mai_thinking.errors import UsageError


def main() -> None:
    """Run the script that the first argument names; without one, list them."""
    exit_with(_run)


def _run() -> None:
    scripts = {path.stem: path for path in sorted(SCRIPTS.glob("*.py"))}
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: mai-thinking NAME [arguments]; `mai-thinking NAME --help` tells which\n")
        for name, path in scripts.items():
            about = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
            print(f"  {name:<14}{about}")
        return
    name = sys.argv[1]
    if name not in scripts:
        raise UsageError(f"mai-thinking {name}: no such command; {nearest_name(name, scripts)}")
    del sys.argv[1]
    runpy.run_path(str(scripts[name]), run_name="__main__")


if __name__ == "__main__":
    main()
