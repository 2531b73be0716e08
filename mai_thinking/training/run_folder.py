"""The folder that a run lives in: one config, one process at a time, nothing overwritten."""

import contextlib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mai_thinking.config.loading import parse_yaml, save_config, validate
from mai_thinking.config.run import RunConfig
from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import UsageError

NOTES, SAMPLES = "notes.json", "samples.jsonl"
FREE_TO_CHANGE = (
    "output_dir", "tracking", "checkpoint", "launch", "plan", "collapse", "evaluation",
    "data.cache_dir", "data.ray", "rollouts.ray",
)  # fmt: skip
"""Keys that a run may be resumed with other values of: they do not change what is computed."""
CHANGE_ROUNDING = (
    "batch.micro_batch_size",
    "packing.rows",
    "execution.activation_checkpointing",
    "execution.parallel",
    "execution.expert_parallel",
)
"""The same of keys that change the order of sums: what to change when a run has died of memory, or has other ranks."""
_DATA_PATH = re.compile(r"((text\.)?data\.sources|tasks)\.\d+\.path")
"""Files may be moved. That they are the same is known by their content, when the checkpoint is loaded."""


class RunFolder:
    """`config.yaml`, `metrics.jsonl`, `events.jsonl`, `checkpoints/`, `final/`, `report/` under one path.

    `evaluations.jsonl` holds the parts of the last evaluation, so that it can go on where it was; `samples.jsonl` what
    a policy wrote at each evaluation of an RL run; `notes.json` what the page of results tells beside the records;
    `architecture/` what a checkpoint needs to be read as a model: the model's config and the tokenizer; `.ranks/` what
    each rank has of its own, for just-in-time checkpoints.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.events = path / "events.jsonl"
        self.notes = path / NOTES
        self.samples = path / SAMPLES
        self.checkpoints = path / "checkpoints"
        self.architecture = path / "architecture"
        self.final = path / "final"
        self.report = path / "report"
        self.ranks = path / ".ranks"

    def documents(self, rank: int, ranks: int) -> Path:
        """The record of what one of so many ranks has read, step by step."""
        return self.path / "documents" / f"rank-{rank}-of-{ranks}.jsonl"

    def note(self, **facts: Any) -> None:
        """Keep `facts` (JSON) for the page of results, which is made from the folder alone. On rank 0."""
        before = json.loads(self.notes.read_bytes()) if self.notes.is_file() else {}
        with atomic_file(self.notes) as path:
            path.write_text(json.dumps(before | facts, indent=1) + "\n")

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.final.is_dir()

    def check(self, config: RunConfig) -> None:
        """Raise `UsageError` if the folder belongs to another run, naming the first keys that differ."""
        if int(os.environ.get("RANK", "0")) == 0:
            self._check_writable()
        if not self.config.exists():
            try:
                names = os.listdir(self.path)
            except FileNotFoundError:  # or it was there for a moment, made by another rank to try whether it can be
                return
            # What is hidden is being written, or was when a process died.
            if any(name != "lock" and name[0] != "." for name in names):
                raise UsageError(f"{self.path}: holds files but no config.yaml of a run; choose another output_dir")
            return
        if changed := self.changed_keys(config):
            shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise UsageError(
                f"{self.path}: belongs to a run with another config ({shown} differ); "
                "choose another name or output_dir, or remove the folder yourself"
            )

    def _check_writable(self) -> None:
        """Raise `UsageError` if nothing can be written here. What had to be made for that is removed again."""
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise UsageError(f"output_dir: {self.path}: cannot be written ({error.strerror}); name another") from None
        finally:
            for path in made:
                with contextlib.suppress(OSError):  # never made, or another process's by now
                    path.rmdir()

    def changed_keys(self, config: RunConfig) -> list[str]:
        """The keys that make `config` another run than the folder's, as `key.path`."""
        try:
            before = parse_yaml(self.config.read_text(encoding="utf-8"), str(self.config))
        except (UsageError, UnicodeDecodeError):
            before = None
        if not isinstance(before, dict):
            raise UsageError(f"{self.config}: is damaged; restore it from a copy")
        try:  # a key that did not exist then has its default
            was = validate(type(config), before, "its config")
        except UsageError as error:
            raise UsageError(
                f"{self.path}: belongs to a run of another kind, or of an earlier version ({error}); "
                "choose another name or output_dir, or finish it with that version"
            ) from None
        before, now = was.model_dump(mode="json"), config.model_dump(mode="json")
        workers = [(tree.get("rollouts") or {}).get("workers", 0) for tree in (before, now)]
        return [
            key
            for key in _differences(before, now)
            if not _is_free(key) and not (key == "rollouts.workers" and min(workers) > 0)  # another schedule, as exact
        ]

    def rounds_otherwise(self, config: RunConfig) -> bool:
        """Whether `config` adds in another order than the run's first."""
        before, now = yaml.safe_load(self.config.read_text()), config.model_dump(mode="json")
        return any(key in CHANGE_ROUNDING for key in _differences(before, now))

    @contextlib.contextmanager
    def claim(self, config: RunConfig) -> Iterator[None]:
        """Make the folder this run's while the block runs, for one process (rank 0) at a time."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"{self.path}: another process is running this run; wait for it or stop it") from None
            self.check(config)
            if not self.config.exists():
                with atomic_file(self.config) as path:
                    save_config(config, path)
            yield


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys((*before, *now)))
        return [path for key in keys for path in _differences(before.get(key), now.get(key), f"{prefix}{key}.")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [path for index, pair in pairs for path in _differences(*pair, f"{prefix}{index}.")]
    return [] if before == now else [prefix.rstrip(".")]


def _is_free(key: str) -> bool:
    free = any(key == name or key.startswith(name + ".") for name in (*FREE_TO_CHANGE, *CHANGE_ROUNDING))
    return free or _DATA_PATH.fullmatch(key) is not None
