"""CONTRIBUTING.md's examples: each change applies to the tree as it is, and what is said of it holds."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_examples_apply_and_hold(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    diffs, checks = (re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.M | re.S) for kind in ("diff", "python"))
    assert len(diffs) == len(checks) == 4

    def hold() -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        program = [sys.executable, "-c", "".join(checks)]
        return subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)

    shutil.copytree(ROOT / "mai_thinking", tmp_path / "mai_thinking", ignore=shutil.ignore_patterns("__pycache__"))
    assert "double" in hold().stderr  # nothing holds before
    for diff in diffs:
        applied = subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, capture_output=True, text=True)
        assert applied.returncode == 0, f"{applied.stderr}\n{diff}"
    ended = hold()
    assert ended.returncode == 0, ended.stderr
