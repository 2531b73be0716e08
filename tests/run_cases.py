"""Run every case of a folder of failing inputs and judge it: `python tests/run_cases.py ../shared/cases [NAME …]`.

A NAME picks the cases whose path holds it. The folder is laid out as its own README says: `train/*/run.sh` is started
in the project's root, `rl/*/run.sh` and `company/*.py` want a tiny base model, which is trained once (or given by
`--base`). A case is right, wrong or skipped; what a program cannot judge, a person reads with `--show`. Exit code 1 if
one is wrong.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from case_judges import JUDGES, Seen

ROOT = Path(__file__).parent.parent

RENAMED = {
    "mai_thinking.questions": "mai_thinking.data.questions",
    "mai_thinking.view": "mai_thinking.report.page",
    "mai_thinking.lineage_report": "mai_thinking.report.lineage",
    "mai_thinking.training.goodput_report": "mai_thinking.report.goodput",
    "t._problems": "t.problems",
    # Each of its files has a run of its own, now that the first is no longer refused.
    "train data.sources.0.path=$p ": "train data.sources.0.path=$p output_dir=$OUT/$f ",
    # A grade has a score and a verdict; a grader passes answers only if it says so, and in one case it must not.
    "in zip(rows, got)": "in zip(rows, [grade.score for grade in got])",
    'pattern: "[a-m].*"': 'pattern: "[a-m].*", passes: true',
    "c.yaml steps=3 > log": "c.yaml steps=3 tasks.0.graders.0.passes=false > log",
    # What is left out is told at the start, and not in the last line.
    'steps=30 2>&1 | tail -1; echo "exit': 'steps=30 2>&1 | grep -a "left out\\|error:"; echo "exit',
}
"""What the cases call by a name of before → its name now; read in all their files."""


MAY_SHOW_TRACEBACKS = ("08-files-passed-over", "18-top-1-router", "duplicates-dropped", "gym-unsound-verifiers")
"""Their own inspection fails where the program refuses the input, which is right too."""
SECONDS = {"false-collapse": 1500}
"""Time limits of long cases; `--seconds` is that of the others."""
NEEDS = {
    "gym-fixed-size": "reasoning_gym",
    "gym-unsound-verifiers": "reasoning_gym",
    "quantized": "bitsandbytes",
}


def main() -> int:
    """Run, print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the cases")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only cases whose path holds one of these")
    parser.add_argument("--base", type=Path, help="the final/ of a run of configs/tiny.yaml (default: one is trained)")
    parser.add_argument("--seconds", type=float, default=300, help="time limit of a case (default: 300)")
    parser.add_argument("--show", action="store_true", help="print what each case printed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no case outlives this
    if not options.folder.is_dir():
        print(f"skipped: there is no folder {options.folder}")
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="cases-") as name:
        work = Path(name)
        work.chmod(0o755)  # some cases look at what another user can read
        cases = _copy(options.folder, work / "cases")
        base = (options.base or work / "base" / "final").resolve()
        for case in _find(cases, options.names):
            label = str(case.parent if case.name == "run.sh" else case.with_suffix("")).removeprefix(f"{cases}/")
            begin = time.monotonic()
            verdict, reason, text = _try(case, label.rpartition("/")[2], base, work, options.seconds)
            wrong += verdict == "wrong"
            print(f"{verdict:8}{time.monotonic() - begin:5.0f} s  {label:42}  {reason}", flush=True)
            if options.show:
                print("".join(f"        | {line}\n" for line in text.splitlines()), flush=True)
    print(f"{wrong} wrong")
    return 1 if wrong else 0


def _copy(folder: Path, target: Path) -> Path:
    """A copy that may be written to, in today's names."""
    shutil.copytree(folder, target, symlinks=True)
    for file in target.rglob("*"):
        if file.suffix in (".sh", ".py", ".yaml") and file.is_file():
            text = file.read_text()
            for old, new in RENAMED.items():
                text = text.replace(old, new)
            file.write_text(text)
    return target


def _find(cases: Path, names: list[str]) -> list[Path]:
    found = [*cases.glob("train/*/run.sh"), *cases.glob("rl/*/run.sh"), *cases.glob("company/*.py")]
    return [case for case in sorted(found) if not names or any(name in str(case.relative_to(cases)) for name in names)]


def _try(case: Path, name: str, base: Path, work: Path, seconds: float) -> tuple[str, str, str]:
    """(verdict, its reason, what was printed)."""
    needed = NEEDS.get(name)
    if needed and importlib.util.find_spec(needed) is None:
        return "skipped", f"needs {needed}", ""
    if case.parents[1].name != "train" and not base.is_dir():
        made = _run(["scripts/pretrain.py", "configs/tiny.yaml", f"output_dir={base.parent}"], base, work, seconds)
        if made.code:
            return "wrong", "no base model: scripts/pretrain.py configs/tiny.yaml failed", made.text
    arguments = [str(case), str(base)] if case.suffix == ".py" else ["bash", str(case)]
    seen = _run(arguments, base, work, SECONDS.get(name, seconds))
    try:
        assert seen.code is not None, "out of time"
        if case.suffix == ".py":
            assert seen.code == 0, (re.findall(r"^\S*Error.*", seen.text, re.M) or [f"exit code {seen.code}"])[-1]
        else:
            assert "Traceback (most" not in seen.text or name.startswith(MAY_SHOW_TRACEBACKS), "a traceback"
            if name not in JUDGES:
                return "skipped", "nothing here judges it; read it with --show", seen.text
            JUDGES[name](seen)
    except AssertionError as error:
        return "wrong", " ".join(str(error).split())[:200], seen.text
    return "right", "", seen.text


def _run(arguments: list[str], base: Path, work: Path, seconds: float) -> Seen:
    """Run in the project's root, in a process group of its own that is killed when the time is over."""
    if arguments[0].endswith(".py"):
        arguments = [sys.executable, *arguments]
    with tempfile.TemporaryDirectory(prefix="case-", dir=work) as scratch:
        given = {"MAI": ROOT, "PY": sys.executable, "BASE": base, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}
        given |= {"MODEL": work / "model", "OUT": f"{scratch}/out", "TMPDIR": scratch}
        Path(scratch).chmod(0o755)
        (Path(scratch) / "out").mkdir()
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also under nohup
            env=os.environ | {key: str(value) for key, value in given.items()},
        )  # fmt: skip
        try:
            output, code = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            output, code = b"", None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if code is None:
            output = process.communicate()[0]
        return Seen(output.decode(errors="replace"), code)


if __name__ == "__main__":
    sys.exit(main())
