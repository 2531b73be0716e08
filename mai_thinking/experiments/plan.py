"""What a climb consists of, what of it is done, how long the rest will take: read from the disk alone, without torch.

A stage is *finished* when its folder has a model, and the inputs that it was made from are still the present ones: its
resolved config, and the records of lineage of the models and traces that it began with. A stage that has collapsed
(`collapse.json`) is answered by two more (MAI-Thinking-1 report §3.1.4), which the plan holds from then on.
"""

import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from mai_thinking.config.climb import ClimbConfig, StageKind, StageSection, answer_names
from mai_thinking.config.distillation import DistillConfig
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import apply_override, read_yaml_with_base, validate
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.storage import atomic_file
from mai_thinking.errors import RunError, UsageError
from mai_thinking.launch.goodput import account_of
from mai_thinking.provenance.lineage import read_lineage
from mai_thinking.rl.collapse import Collapse, read_verdict
from mai_thinking.training.ledger import RESTART
from mai_thinking.training.metrics import read_records
from mai_thinking.training.run_folder import RunFolder

StageConfig = PretrainConfig | GrpoConfig | DistillConfig
_CONFIGS: dict[StageKind, type[StageConfig]] = {
    "pretrain": PretrainConfig, "grpo": GrpoConfig, "self_distill": DistillConfig,
}  # fmt: skip
INPUTS = "stages.json"
"""In the climb's folder: the ids of the lineage records that each stage began with."""
LATE = 0.5
"""Traces of the later half of the steps before a collapse: of the earliest ones the report says that they hurt."""

State = Literal["finished", "collapsed", "begun", "changed", "waits", "to do"]


@dataclass
class Stage:
    """One run of the climb, resolved."""

    name: str
    run: StageKind
    config: StageConfig
    parents: tuple[Path, ...]
    """The model folder and the folders of traces that it begins with."""
    seconds_per_step: float | None
    """As declared."""
    answers: str | None = None
    """The stage whose collapse this one answers."""
    state: State = "to do"
    why: str = ""
    """What has changed, or is waited for."""

    @property
    def folder(self) -> RunFolder:
        """Where it runs."""
        return RunFolder(self.config.folder)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to run of it."""
        return self.state in ("finished", "collapsed")

    @cached_property
    def collapse(self) -> Collapse | None:
        """The verdict, if it has collapsed."""
        return read_verdict(self.folder.path)

    @property
    def steps_done(self) -> int:
        """Steps in its records."""
        return max((record["step"] for record in read_records(self.folder.metrics)), default=0)

    @property
    def seconds(self) -> float:
        """What it has taken so far, without the time in which nobody ran it."""
        spent = account_of(self.folder.path)
        return spent.wall_clock - spent.seconds[RESTART]

    def parent_ids(self) -> dict[str, str | None]:
        """The ids of its parents' records, by path; None where there is no sound record."""
        ids: dict[str, str | None] = {}
        for path in self.parents:
            ids[str(path)] = None
            with suppress(ValueError):
                ids[str(path)] = read_lineage(path).id
        return ids


class ClimbPlan:
    """The stages of a climb as they stand now: those declared, and the answers to collapses."""

    def __init__(self, config: ClimbConfig) -> None:
        """UsageError if a stage's config is wrong, or its file is not there."""
        self.config = config
        self.path = config.folder
        self._inputs: dict[str, Any] = _read_json(self.path / INPUTS)
        self._last: dict[str, Stage] = {}  # by declared name: the stage that has its model and its newest traces
        self.stages: list[Stage] = []
        for section in config.stages:
            stage = self._add(section.name, section.run, self._tree(section), section.seconds_per_step)
            if stage.run == "grpo":
                stage = self._add_answers(stage)
            self._last[section.name] = stage

    @property
    def ready(self) -> list[Stage]:
        """The stages that may be run, or gone on with, now; none when all is done. RunError if one has collapsed, and
        that is neither answered nor accepted."""
        reset, answered = self.config.reset, {stage.answers for stage in self.stages}
        for stage in self.stages:
            if stage.state == "collapsed" and stage.name not in answered and not self._accepted(stage):
                allowed = f"`reset` allows {reset.at_most} answer(s), from traces before it; change" if reset else ""
                advice = allowed or "Set `reset` to answer with self-distillation, or change"
                raise RunError(f"stage {stage.name}: {stage.collapse}. {advice} the stage's config")
        return [stage for stage in self.stages if not stage.ended and self._waits_for(stage) is None]

    def remember_inputs(self, stage: Stage) -> None:
        """Write down what `stage` begins with, before it does."""
        inputs = _read_json(self.path / INPUTS) | {stage.name: stage.parent_ids()}
        with atomic_file(self.path / INPUTS) as path:
            path.write_text(json.dumps(inputs, indent=1) + "\n")

    # ------------------------------------------------------------------------------------------------ the stages

    def _add(
        self,
        name: str,
        run: StageKind,
        tree: dict[str, Any],
        declared: float | None,
        answers: str | None = None,
    ) -> Stage:
        tree |= {"name": name, "output_dir": str(self.path / name)}
        # By its name, so that another stage before it changes nothing here.
        tree.setdefault("seed", (self.config.seed + zlib.crc32(name.encode())) % 2**31)
        config = validate(_CONFIGS[run], tree, f"stage {name!r}")
        model = config.init_from
        parents = [] if model is None else [Path(model).expanduser()]
        if isinstance(config, DistillConfig):
            parents += [source.folder / "traces" for source in config.traces]
        stage = Stage(name, run, config, tuple(parents), declared, answers)
        stage.state, stage.why = self._judge(stage)
        self.stages.append(stage)
        return stage

    def _tree(self, section: StageSection) -> dict[str, Any]:
        tree = read_yaml_with_base(Path(section.config))
        _lay_over(tree, section.set, section.name)
        if section.init_from is not None:
            model = str(self._last[section.init_from].folder.final)
            tree["init_from"] = model
            if section.run == "pretrain":
                apply_override(tree, f"data.tokenizer.path={json.dumps(model)}")
        if section.rollback_of is not None:
            collapsed = next(stage for stage in self.stages if stage.name == section.rollback_of)
            tree["init_from"] = str(_newest_before_collapse(collapsed))
        if section.traces:
            tree["traces"] = [
                {"run": str(self._last[traces.stage].folder.path)}
                | traces.model_dump(mode="json", exclude={"stage"}, exclude_none=True)
                for traces in section.traces
            ]
        return tree

    def _add_answers(self, stage: Stage) -> Stage:
        """What a collapse of `stage` asks for, if there was one; the stage that has its model in the end."""
        reset = self.config.reset
        first, left = stage, stage.config.steps
        traces: list[dict[str, Any]] = []
        while stage.state == "collapsed" and stage.collapse and reset and len(traces) < reset.at_most:
            good = stage.collapse.last_good_step
            if good < 1:
                break  # nothing is older than the damage
            traces.append({"run": str(stage.folder.path), "steps": [0, good], "late": LATE})
            left = max(1, left - good)
            names = answer_names(first.name, len(traces))
            tree = read_yaml_with_base(Path(reset.config))
            _lay_over(tree, reset.set, names[0])
            model = reset.set.get("init_from", first.config.init_from)
            tree |= {"init_from": model, "traces": list(traces)}
            distilled = self._add(names[0], "self_distill", tree, reset.seconds_per_step, stage.name)
            tree = first.config.model_dump(mode="json", exclude={"seed"})
            _lay_over(tree, reset.set_on, names[1])
            tree |= {"init_from": str(distilled.folder.final), "steps": left}
            stage = self._add(names[1], "grpo", tree, first.seconds_per_step, stage.name)
        return stage

    def _judge(self, stage: Stage) -> tuple[State, str]:
        """(state, why): from its folder, and the states of the stages that it begins with."""
        folder = stage.folder
        if not folder.config.exists():
            return "to do", ""
        if (before := self._waits_for(stage)) is not None:
            return "waits", f"for {before.name}"
        if changed := folder.changed_keys(stage.config):
            return "changed", f"{', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}"
        began, now = self._inputs.get(stage.name), stage.parent_ids()
        if began is None:
            return "changed", "nothing says what it began with"
        if began != now:
            others = [path for path in now if began.get(path) != now[path]]
            return "changed", f"{', '.join(others)} is another than it began with"
        if folder.finished:
            return "finished", ""
        return ("begun", "") if stage.collapse is None else ("collapsed", "")

    def _accepted(self, collapsed: Stage) -> bool:
        """Whether its collapse is an outcome, and nobody waits for its model."""
        needed = any(collapsed.folder.final in stage.parents for stage in self.stages)
        return self.config.accept_collapse and not needed

    def _waits_for(self, stage: Stage) -> Stage | None:
        """The first of the stages that it begins with that has not come to its end."""
        for parent in stage.parents:
            before = self._stage_of(parent)
            # One that has collapsed has traces and no model.
            if before is not None and not (before.ended if parent.name != "final" else before.state == "finished"):
                return before
        return None

    # ------------------------------------------------------------------------------------------------ in words

    def text(self) -> str:
        """The plan as a table: each stage, its state, and an estimate of its time."""
        rows = [("stage", "run", "from", "steps", "state", "minutes")]
        spent = known = unknown = 0.0
        for stage in self.stages:
            left = self.seconds_left(stage)
            minutes = "unknown" if left is None else f"about {left / 60:.1f} to come"
            if stage.ended:
                minutes = f"{stage.seconds / 60:.1f}"
            spent += stage.seconds if stage.ended or stage.state == "begun" else 0.0
            known, unknown = known + (left or 0.0), unknown + (left is None)
            steps = f"{stage.config.steps:,}"
            rows.append((stage.name, stage.run, self._spell_parents(stage), steps, _spell(stage), minutes))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        rest = f" and {unknown:.0f} stages of unknown length" if unknown else ""
        total = f"{spent / 60:.0f} minutes so far; about {known / 60:.0f} minutes{rest} to come"
        return "\n".join([f"{self.config.name} in {self.path}", "", *lines, "", total])

    def seconds_left(self, stage: Stage) -> float | None:
        """Estimate of what `stage` will still take: by its own steps so far, else by what its config declares, times
        what the climb's steps so far took against what was declared of them. None if nothing is known."""
        if stage.ended:
            return 0.0
        done = stage.steps_done if stage.state == "begun" else 0
        if done:
            return stage.seconds / done * max(0, stage.config.steps - done)
        return None if stage.seconds_per_step is None else stage.seconds_per_step * stage.config.steps * self._pace

    @cached_property
    def _pace(self) -> float:
        """How long a second of the declared times is here."""
        timed = [stage for stage in self.stages if stage.ended and stage.seconds_per_step is not None]
        declared = sum((stage.seconds_per_step or 0.0) * stage.steps_done for stage in timed)
        return sum(stage.seconds for stage in timed) / declared if declared else 1.0

    def _spell_parents(self, stage: Stage) -> str:
        """The stages that `stage` begins with, or folders from elsewhere."""
        parts = []
        for path in stage.parents:
            of_it = "" if path.name == "final" else f" ({path.name})"
            parts.append(f"{before.name}{of_it}" if (before := self._stage_of(path)) else str(path))
        return ", ".join(parts)

    def _stage_of(self, path: Path) -> Stage | None:
        """The stage that `path` is a part of."""
        return next((stage for stage in self.stages if stage.folder.path in path.parents), None)


def _spell(stage: Stage) -> str:
    said = {
        "begun": f"begun, {stage.steps_done if stage.state == 'begun' else 0} steps done",
        "changed": f"to do again: {stage.why}",
        "waits": f"there, but waits {stage.why}",
        "collapsed": f"collapsed at step {stage.collapse.step}" if stage.collapse else "",
    }
    answer = f"; answers the collapse of {stage.answers}" if stage.answers else ""
    return said.get(stage.state) or f"{stage.state}{answer}"


def _lay_over(tree: dict[str, Any], changes: Mapping[str, Any], stage: str) -> None:
    for key, value in changes.items():
        try:
            apply_override(tree, f"{key}={yaml.safe_dump(value, default_flow_style=True)}")
        except UsageError as error:
            raise UsageError(f"stage {stage!r}: {error}") from None


def _newest_before_collapse(stage: Stage) -> Path:
    """Of a stage that has not collapsed yet, the folder that it would be in. RunError if it never will, or none is
    left."""
    if stage.state == "finished":
        raise RunError(f"stage {stage.name} is to be rolled back, but it did not collapse; remove what rolls it back")
    if stage.collapse is None:
        return stage.folder.checkpoints
    saved = sorted(stage.folder.checkpoints.glob("step-*"))
    before = [path for path in saved if int(path.name.removeprefix("step-")) < stage.collapse.step]
    if not before:
        raise RunError(f"stage {stage.name} has no checkpoint from before its collapse; raise checkpoint.keep")
    return before[-1]


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
