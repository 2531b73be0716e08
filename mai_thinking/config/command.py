"""What all scripts share: the command line, and the exit codes that schedulers and people rely on."""

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from mai_thinking.config.loading import ConfigType, load_config
from mai_thinking.errors import RunError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_COLLAPSED = 3
"""An RL run found that its policy has collapsed, and stopped: `collapse.json` in its folder has the evidence."""
EXIT_INTERRUPTED = 75
"""A SIGTERM came and the run was saved: the same command goes on with it (sysexits' EX_TEMPFAIL)."""


def parse_run_command(
    kind: type[ConfigType], default: str, description: str, arguments: Sequence[str] | None = None
) -> tuple[ConfigType, bool]:
    """`CONFIG.yaml [key.path=value …] [--dry-run]` → (config, dry run?). Without CONFIG, `default` is read."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", nargs="?", default=default, help=f"a YAML file (default: {default})")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its costs, and stop")
    options = parser.parse_intermixed_args(arguments)
    path, overrides = options.config, options.overrides
    if "=" in path:
        path, overrides = default, [path, *overrides]
    return load_config(kind, path, overrides), options.dry_run


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main`; turn a user's mistake or a full disk into one line and exit code 2, a run that went wrong
    into one line and exit code 1."""
    code = EXIT_USAGE
    try:
        sys.exit(main() or 0)
    except UsageError as error:
        problem = str(error)
    except RunError as error:
        problem, code = str(error), EXIT_FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = f"no space left on the disk{f' for {error.filename}' if error.filename else ''}; free some and rerun"
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(code)
