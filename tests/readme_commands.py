"""Runs the shell and Python blocks of README and docs, in order, in a fresh clone: `python tests/readme_commands.py`.

In the present environment, which needs the extras `test` and `plots`; installing is what `.ci/run` tries. Long runs are
cut short: `ADDED` says by what, `INSTEAD` what is run in a command's place; `test_readme.py` sees that these are all
of the long ones. A quarter of an hour on two cores.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("climb", "faults", "ladders", "gpus", "data"))]
"""What is run, in this order: each builds on what those before have left."""
_QUICK = "data.held_out.max_bytes=30000 evaluation.every=4 evaluation.max_bytes=2000 checkpoint.every=4"
_SOON = f"schedule.warmup_steps=2 {_QUICK}"
_CLIMB = (  # an untrained policy, all of whose answers are wrong
    "steps=4 evaluation.every=4 evaluation.problems=4 groups_per_step=2 "
    "sampling.early_range=null sampling.final_range=null"
)
_ANY = (  # traces
    "steps=2 traces.0.late=1.0 selection.correct_only=false selection.unfinished=true selection.unanswered=true "
    "selection.hacks=[] selection.max_repetition=null selection.max_foreign=null"
)
_CONSOLIDATION = (
    "python scripts/consolidation.py configs/nano-consolidated-grpo.yaml --specialists runs/nano-think-grpo "
    "runs/nano-tools runs/nano-helpful --students runs/nano-consolidated runs/nano-consolidated-grpo --out consolidated"
)
_FAULTS = "--hang-seconds 10 --restarts 100"

_BESIDE = "OMP_NUM_THREADS=1 python scripts/grpo.py configs/nano-think-grpo.yaml"

ADDED = {
    "python scripts/pretrain.py": f"steps=8 {_SOON}",
    "python scripts/sample.py runs/nano": "--prompt 'def '",
    "python scripts/pretrain.py configs/nano-mid.yaml": f"steps=4 {_SOON}",
    "python scripts/pretrain.py steps=100 name=short seed=1": f"steps=4 {_SOON}",
    "python scripts/launch.py --nproc 2 scripts/pretrain.py": f"name=two steps=8 {_SOON}",
    "python scripts/pretrain.py configs/nano-maths.yaml": f"steps=4 {_SOON}",
    "python scripts/grpo.py": _CLIMB,
    "python scripts/pretrain.py configs/nano-worked.yaml": f"steps=4 {_SOON}",
    "python scripts/pretrain.py configs/nano-longer.yaml": f"steps=4 {_SOON}",
    "python scripts/pretrain.py configs/nano-think.yaml": f"steps=4 {_QUICK}",
    "python scripts/grpo.py configs/nano-think-grpo.yaml": _CLIMB,
    f"{_BESIDE} rollouts.workers=1 rollouts.max_staleness=2 name=beside": _CLIMB,
    f"{_BESIDE} rollouts.replay=runs/beside rollouts.max_staleness=2 name=again": _CLIMB,
    "python scripts/pretrain.py configs/nano-tools-worked.yaml": f"steps=4 {_SOON}",
    "python scripts/pretrain.py configs/nano-tools-base.yaml": f"steps=4 {_SOON}",
    "python scripts/grpo.py configs/nano-tools.yaml": _CLIMB,
    "python scripts/pretrain.py configs/nano-helpful-base.yaml": f"steps=4 {_SOON}",
    "python scripts/grpo.py configs/nano-helpful.yaml": _CLIMB,
    "python scripts/grpo.py configs/nano-consolidated-grpo.yaml": _CLIMB,
    "python scripts/launch.py --nproc 2 scripts/grpo.py": f"name=two-climb {_CLIMB}",
    "python scripts/grpo.py objective.entropy_control=fixed name=fixed": _CLIMB,
    "python scripts/self_distill.py": _ANY,
    "python scripts/self_distill.py configs/nano-consolidated.yaml": f"{_ANY} traces.1.late=1.0 traces.2.late=1.0",
    _CONSOLIDATION: "--problems 2",
}
_LAUNCH = "python scripts/launch.py --nproc 2"
_STUDY = "OMP_NUM_THREADS=1 python scripts/study.py"
_LADDER = "python scripts/ladder.py"
INSTEAD = {
    "pytest": "true  # as .ci/run does",
    f"{_LAUNCH} --chaos 'kill:60s,hang:300s' scripts/pretrain.py": (
        f"{_LAUNCH} {_FAULTS} --chaos 'kill:10s,hang:20s' scripts/pretrain.py name=faults steps=40 {_SOON}"
    ),
    f"{_LAUNCH} --restarts 100 --chaos kill:60s --chaos-seed 1 scripts/pretrain.py steps=1280 name=goodput-kill60": (
        f"{_LAUNCH} --restarts 100 --chaos kill:10s scripts/pretrain.py steps=40 name=goodput-kill60 {_SOON}"
    ),
    "python scripts/climb.py": "python scripts/climb.py configs/tiny-climb.yaml",
    _STUDY: (
        "python scripts/pretrain.py configs/tiny.yaml && "
        f"{{ {_STUDY} configs/tiny-findings.yaml & {_STUDY} configs/tiny-findings.yaml && wait $!; }}"
    ),
    f"{_LADDER} configs/ladders/experts-512-vs-128.yaml": f"{_LADDER} configs/ladders/tiny.yaml",
    # Two rungs of one seed have no plan; that it says so is tests/experiments/test_ladder.py's.
    f"{_LADDER} configs/ladders/experts-512-vs-128.yaml --plan 60": f"{_LADDER} --help",
    "python scripts/mixture.py configs/nano-mixture.yaml": "python scripts/mixture.py configs/tiny-mixture.yaml",
    f"{_LADDER} fit POINTS.json": f"{_LADDER} fit tests/experiments/scaling/gadre-2024.json",
}


def readme_commands() -> list[str]:
    """Of all shell blocks, in order, without comments and installation."""
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [re.sub(r"^pip install .* && ", "", line) for line in lines if line]


def main() -> int:
    """Run all; the exit code."""
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), name], check=True)
        environment = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={name}; "
        commands = [INSTEAD.get(command, f"{command} {ADDED.get(command, '')}") for command in readme_commands()]
        tried = [["bash", "-c", environment + command] for command in commands]
        tried += [["bash", "-c", f"{environment}python - <<'END'\n{block}END"] for block in blocks("python")]
        for arguments, command in zip(tried, [*commands, *blocks("python")], strict=True):
            begin = time.monotonic()
            ended = subprocess.run(arguments, cwd=name, capture_output=True, text=True)
            verdict = "FAILED" if ended.returncode else "ok"
            print(f"{verdict:6} {time.monotonic() - begin:4.0f} s  {command.strip()}", flush=True)
            if ended.returncode:
                failed += 1
                print(ended.stdout[-3000:], ended.stderr[-3000:], sep="\n", flush=True)
    print(f"{failed} failed" if failed else "all commands of README and docs ran")
    return 1 if failed else 0


def blocks(language: str) -> list[str]:
    """All code blocks of a language."""
    text = "\n".join(page.read_text() for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


if __name__ == "__main__":
    sys.exit(main())
