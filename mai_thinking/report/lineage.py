"""The tree of where something came from, back to random weights, with every hash in it checked."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from mai_thinking.errors import UsageError
from mai_thinking.provenance.lineage import (
    RECORD,
    Data,
    Fault,
    Lineage,
    Record,
    file_faults,
    hash_file,
    read_lineage,
    stable_manifest,
)
from mai_thinking.report.document import printed


def report(path: Path, console: Console) -> bool:
    """Draw the trees of all that has or should have a record at or below `path`, then name what is not as recorded.

    `path` is a model folder, a checkpoint, a folder of traces, a run's folder, or a file in one of them. Returns
    whether all is well. UsageError if there is nothing of the kind.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; name a run's folder, such as runs/nano")
    folder = path if path.is_dir() else path.parent
    subjects = list(_subjects(folder))
    if not subjects:
        raise UsageError(f"{folder}: holds neither weights nor traces; name a run's folder, such as runs/nano")
    inspection = Inspection()
    for subject in subjects:
        console.print(inspection.tree_at(subject))
    for fault in inspection.faults:
        console.print(f"[bold red]not as recorded:[/] {escape(str(fault))}", soft_wrap=True, highlight=False)
    if not inspection.faults:
        console.print(f"{inspection.files} files are as they were recorded", soft_wrap=True, highlight=False)
    return not inspection.faults


def as_recorded(lineage: Lineage | str) -> str:
    """The tree of a lineage as a Markdown code block, no file looked at; a text says why there is none."""
    if isinstance(lineage, str):
        return lineage
    tree = Inspection(verify=False).tree(lineage)
    checks = "As recorded; `python scripts/lineage.py` checks every file against its hash."
    return f"{printed(lambda console: console.print(tree))}\n\n{checks}"


class Inspection:
    """One check of several things that may share ancestors: each is read and drawn once."""

    def __init__(self, *, verify: bool = True) -> None:
        """Without `verify` nothing is read but the records."""
        self.faults: list[Fault] = []
        self.files = 0
        """How many were read and found right."""
        self._verify = verify
        self._drawn: set[str] = set()
        self._data_checked: dict[Path, list[Fault]] = {}

    def tree_at(self, folder: Path) -> Tree:
        """The tree of what lies in `folder`."""
        try:
            return self.tree(read_lineage(folder))
        except ValueError as error:
            self.faults.append(Fault(folder, str(error)))
            return Tree(f"[red]{escape(str(folder))} {escape(str(error))}[/]")

    def tree(self, lineage: Lineage) -> Tree:
        """The tree of a lineage."""
        root = Tree(self._label(lineage, lineage.id, self._check(lineage, lineage.id)))
        self._grow(root, lineage, lineage.id)
        return root

    def _grow(self, node: Tree, lineage: Lineage, id: str) -> None:
        """Below `node`, which shows the record `id`: its marks, its data, its parents and theirs."""
        record = lineage.records[id]
        for mark in record.overrides:
            node.add(f"[bold red]override: {escape(mark)}[/]")
        if id in self._drawn:
            if record.parents:
                node.add("[dim]… as above[/]")
            return
        self._drawn.add(id)
        if record.data is not None and (record.data.sources or record.data.manifest):
            node.add(self._data_label(record.data, lineage.places.get(record.data.manifest or "")))
        for parent in record.parents:
            state = "" if parent in self._drawn else self._check(lineage, parent)
            self._grow(node.add(self._label(lineage, parent, state)), lineage, parent)

    def _label(self, lineage: Lineage, id: str, state: str) -> str:
        record, place = lineage.records[id], lineage.places.get(id)
        head = f"[bold]{record.kind}[/] [cyan]{id[:12]}[/]"
        if record.kind == "random-weights" and record.architecture is not None:
            sizes = record.architecture
            return f"{head} seed {record.seed}, {sizes.get('num_hidden_layers')} layers of {sizes.get('hidden_size')}"
        facts = [] if place is None else [escape(_near(place))]
        facts += [] if record.steps is None else [f"{record.steps:,} steps"]
        facts += [] if record.seed is None else [f"seed {record.seed}"]
        versions = [f"{(c.commit or 'no commit')[:9]} ({c.sha256[:9]})" for c in record.code]
        facts += [f"code {' then '.join(versions)}"] if versions else []
        return f"{head} {', '.join(facts)}{state}"

    def _data_label(self, data: Data, place: Path | None) -> str:
        sources = "; ".join(f"{s.name} ({', '.join(filter(None, (s.licence, s.provenance)))})" for s in data.sources)
        state = ""
        if self._verify and data.manifest is not None and place is not None and place.is_dir():
            if place not in self._data_checked:
                self._data_checked[place] = data_faults(place, data)
                self.faults += self._data_checked[place]
            state = _state(self._data_checked[place])
        return f"data: {escape(sources)}{state}"

    def _check(self, lineage: Lineage, id: str) -> str:
        """Whether its files are as recorded, if they are still where they were; a later run may have put others
        there."""
        record, place = lineage.records[id], lineage.places.get(id)
        if record.kind == "random-weights" or not self._verify:
            return ""
        if place is None or not place.is_dir():
            return " [dim]not there any more[/]"
        same = False
        if (place / RECORD).exists():
            try:
                now = read_lineage(place)
            except ValueError as error:
                self.faults.append(Fault(place, str(error)))
                return f" [red]✗ {escape(str(error))}[/]"
            same = now.id == id
            if not same and any(now.record.files.get(name) != was for name, was in record.files.items()):
                return " [yellow]another is there now[/]"
        faults = [*file_faults(place, record, complete=same), *_config_faults(place, record)]
        self.faults += faults
        self.files += 0 if faults else len(record.files)
        return _state(faults)


def _subjects(folder: Path) -> Iterator[Path]:
    """Folders at or below `folder` with a record, or with weights or traces, which should have one."""
    hidden = (".tmp", ".removed")
    for path in sorted({folder, *(p for p in folder.rglob("*") if p.is_dir())}):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") or part.endswith(hidden) for part in parts):
            continue
        if (path / RECORD).exists() or any(any(path.glob(f"*.{kind}")) for kind in ("safetensors", "parquet", "bin")):
            yield path


def _config_faults(folder: Path, record: Record) -> list[Fault]:
    """The run's config.yaml, if the folder still lies in its run (RUN/final, RUN/traces, RUN/checkpoints/step-…)."""
    for run in (folder.absolute().parent, folder.absolute().parent.parent):
        path = run / "config.yaml"
        if record.config is not None and path.is_file():
            changed = hash_file(path).sha256 != record.config
            return [Fault(Path(_near(path)), "has changed since it was recorded")] if changed else []
    return []


def data_faults(folder: Path, data: Data) -> list[Fault]:
    """What in a folder of prepared data is not as it was when `data` was recorded; reads every byte."""
    from mai_thinking.data import prepared  # imports transformers, which takes seconds

    path = folder / prepared.MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if hashlib.sha256(stable_manifest(manifest).encode()).hexdigest() != data.manifest:
            return [Fault(path, "has changed since it was recorded")]
        damage = prepared.find_damage(folder, manifest["key"])
    except (OSError, ValueError, AttributeError):
        return [Fault(path, "is missing or cannot be read")]
    return [Fault(folder, damage)] if damage else []


def _state(faults: list[Fault]) -> str:
    return f" [bold red]✗ {escape(str(faults[0].path.name))} {faults[0].problem}[/]" if faults else " [green]✓[/]"


def _near(path: Path) -> str:
    """Relative to here, where that is shorter to read."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
