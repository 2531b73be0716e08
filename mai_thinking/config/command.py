"""What all scripts share: the command line, and the exit codes that schedulers and people rely on."""

import argparse
import contextlib
import errno
import hashlib
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mai_thinking.config.loading import ConfigType, load_config
from mai_thinking.config.run import TrainingConfig
from mai_thinking.errors import RunError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_COLLAPSED = 3
"""An RL run found that its policy has collapsed, and stopped: `collapse.json` in its folder has the evidence."""
EXIT_INTERRUPTED = 75
"""A SIGTERM came and the run was saved: the same command goes on with it (sysexits' EX_TEMPFAIL)."""

TOLD_VARIABLE = "MAI_TOLD"
"""The launcher names in this environment variable a folder in which ranks mark what one of them has told."""

_OF_THE_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS)
"""What is wrong with a path that was given, and not with what is done there."""
_LONGEST_TMPDIR = 64
"""A socket's path may have 107 bytes, of which multiprocessing takes some 40 below TMPDIR."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, as all others are, and whose help is the script's docstring."""

    def __init__(self, description: str | None, **settings: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Instead of the usage and exit."""
        raise UsageError(f"{message}; see --help")


def option(kind: Any) -> Callable[[str], Any]:
    """What argparse reads an option of a `kind` with, such as the annotated numbers of `config.base` with their
    bounds: `type=option(Count)`."""
    adapter = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))

    def read(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{error.errors()[0]['msg']}, got {text!r}") from None

    return read


def parse_run_command(
    kind: type[ConfigType], default: str, description: str, arguments: Sequence[str] | None = None
) -> tuple[ConfigType, bool]:
    """`CONFIG.yaml [key.path=value …] [--dry-run]` → (config, dry run?). Without CONFIG, `default` is read. What has a
    `=` in it is an override, if it is no file."""
    return parse_with_options(kind, default, description, {}, arguments)[:2]


def parse_with_options(
    kind: type[ConfigType],
    default: str,
    description: str,
    more: Mapping[str, dict[str, Any]],
    arguments: Sequence[str] | None = None,
) -> tuple[ConfigType, bool, dict[str, Any]]:
    """The same with a script's own options, as `add_argument` takes them → (config, dry run?, their values)."""
    parser = Parser(description)
    for name, settings in more.items():
        parser.add_argument(name, **settings)
    parser.add_argument("config", nargs="?", default=default, help=f"a YAML file (default: {default})")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="values that replace the file's")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its costs, and stop")
    options = parser.parse_intermixed_args(arguments)
    path, overrides = options.config, options.overrides
    if "=" in path and not Path(path).is_file():
        path, overrides = default, [path, *overrides]
    config = load_config(kind, path, overrides)
    if isinstance(config, TrainingConfig):
        config.check_ranks(int(os.environ.get("WORLD_SIZE", "1")))
        for tracker in config.tracking.trackers:
            if importlib.util.find_spec(tracker) is None:
                raise UsageError(
                    f"tracking.trackers: {tracker} is not installed: pip install 'mai_thinking[trackers]', or remove it"
                )
    return config, options.dry_run, vars(options)


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main`; turn a user's mistake, a full disk or a lack of memory into one line and exit code 2, a
    run that went wrong into one line and exit code 1. What the terminal cannot show is replaced; a terminal that is
    gone ends nothing."""
    sys.stdout = _Terminal(sys.stdout)
    sys.stderr = _Terminal(sys.stderr)
    if len(os.environ.get("TMPDIR", "")) > _LONGEST_TMPDIR:
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
    code = EXIT_USAGE
    try:
        sys.exit(main() or 0)
    except UsageError as error:
        problem = str(error)
    except RunError as error:
        problem, code = str(error), EXIT_FAILED
    except (MemoryError, RuntimeError) as error:
        if _is_lack_of_memory(error):
            problem = (
                f"out of memory ({str(error).splitlines()[0][:80] if str(error) else 'no more to be had'}); take less "
                "at once (batch.micro_batch_size, packing.rows, rollouts.slots): the same command goes on"
            )
        elif "home directory" in str(error):  # what `~name` is to `Path.expanduser` where there is no such user
            problem = "a path begins with ~ and a name, but no user is called so; write it in full"
        else:
            raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {error.filename}" if error.filename else ""
            problem = f"no space left on the disk{where}; free some and rerun"
        elif error.errno in _OF_THE_PATH and error.filename:
            problem = f"{error.filename}: {error.strerror}; name another path"
        else:
            raise
    if _is_first_to_tell(problem):
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(code)


class _Terminal:
    """A stream that people look at. What it cannot show is replaced, and when it is gone (a closed pipe, a lost
    terminal) what it is given is dropped: nothing that is printed may end a run."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """All of it, or none where nobody reads."""
        self._guard(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As far as somebody reads."""
        self._guard(self._stream.flush)

    def _guard(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what the interpreter flushes at its end
            os.close(nowhere)


def _is_lack_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "not enough memory", "size calculation overflowed")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(word in str(error) for word in words)


def _is_first_to_tell(problem: str) -> bool:
    """Whether no other rank of this job has told the same already."""
    folder = os.environ.get(TOLD_VARIABLE)
    if folder is None:
        return True
    mark = Path(folder, hashlib.sha256(problem.encode(errors="replace")).hexdigest())
    with contextlib.suppress(OSError):
        mark.touch(exist_ok=False)
        return True
    return False
