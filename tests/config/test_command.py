"""The command line of all scripts, and how they end: one line, an exit code, and no word about a terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mai_thinking.config.command import parse_run_command
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.storage import atomic_folder
from mai_thinking.errors import UsageError
from mai_thinking.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SMALLEST = "name: a\nsteps: 5\nbatch: {context_length: 64, global_batch_size: 4, micro_batch_size: 2}\n"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script whose `main` is `code`, with its output in pipes."""
    program = f"from mai_thinking.config.command import *\nimport sys\ndef main():\n  {code}\nexit_with(main)"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )


@pytest.mark.parametrize(
    ("script", "option", "value"),
    [
        ("evaluate", "--batch-size", "0"),
        ("evaluate", "--context", "1"),
        ("sample", "--tokens", "-3"),
        ("sample", "--temperature", "nan"),
        ("sample", "--temperature", "1e-40"),
        ("sample", "--top-p", "2"),
        ("sample", "--seed", "1180591620717411303424"),
    ],
)
def test_options_are_bounded_as_keys_are(
    script: str, option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is loaded."""
    import runpy

    monkeypatch.setattr(sys, "argv", [script, "no-model", "README.md", option, value])
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert option in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "code",
    [
        "open('x' * 300)",
        "open('/dev/null/x')",
        "open('.', 'w')",
        "from pathlib import Path; Path('~nobody-of-that-name/x').expanduser()",
        "import torch; torch.empty(2**31, 2**31)",
    ],
)
def test_a_path_or_size_that_cannot_be_is_told_in_a_line(code: str) -> None:
    ended = run(code)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


def test_a_file_that_should_be_there_is_no_mistake_of_the_user() -> None:
    """The negative control: what is not about a path's form keeps its traceback."""
    assert "Traceback" in run("open('no-such-file')").stderr


def test_a_file_with_an_equals_sign_in_its_path_is_the_config(tmp_path: Path) -> None:
    path = tmp_path / "lr=0.02" / "config.yaml"
    path.parent.mkdir()
    path.write_text(SMALLEST)
    assert parse_run_command(PretrainConfig, "none.yaml", "", [str(path), "steps=7"])[0].steps == 7
    path.write_text("base: tiny.yaml\nsteps: 9\n")  # which is not beside it, and comes with the package
    assert parse_run_command(PretrainConfig, "none.yaml", "", [str(path)])[0].steps == 9


def test_a_step_that_cannot_be_divided_is_told_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks, kind, config, key in (
        ("3", PretrainConfig, "configs/tiny.yaml", r"batch\.global_batch_size: 8 .* --nproc"),
        ("3", GrpoConfig, "configs/tiny-grpo.yaml", r"groups_per_step: 2 .* --nproc"),
    ):
        monkeypatch.setenv("WORLD_SIZE", "2")
        parse_run_command(kind, str(ROOT / config), "", [])
        monkeypatch.setenv("WORLD_SIZE", ranks)
        with pytest.raises(UsageError, match=key):
            parse_run_command(kind, str(ROOT / config), "", [])


def test_a_tracker_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tracking\.trackers: wandb is not installed: pip install"):
        parse_run_command(PretrainConfig, str(ROOT / "configs/tiny.yaml"), "", ["tracking.trackers=[wandb]"])


def test_what_the_terminal_cannot_show_is_replaced() -> None:
    ended = run("print('a ── b')", PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert (ended.returncode, ended.stdout) == (0, "a ?? b\n")


def test_a_closed_pipe_ends_nothing(tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = f"[print('x' * 1000, flush=True) for _ in range(1000)]; open({str(done)!r}, 'w')"
    program = f"from mai_thinking.config.command import *\ndef main():\n  {code}\nexit_with(main)"
    shell = '"$0" -c "$1" | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}'
    ended = subprocess.run(["bash", "-c", shell, sys.executable, program], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert done.exists()


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        ("MemoryError()", "out of memory"),
        ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 9 bytes")', "micro_batch"),
        ("OSError(28, 'No space left on device', 'x')", "no space left on the disk for x"),
        ("UsageError('the key')", "error: the key"),
    ],
)
def test_known_failures_are_one_line(raised: str, told: str) -> None:
    ended = run(f"raise {raised}")
    assert ended.returncode == 2
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    """The negative control."""
    ended = run("raise RuntimeError('a bug')")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


def test_ranks_tell_the_same_mistake_once(tmp_path: Path) -> None:
    told = [run("raise UsageError('the key')", MAI_TOLD=str(tmp_path)).stderr for _ in range(2)]
    told.append(run("raise UsageError('another')", MAI_TOLD=str(tmp_path)).stderr)
    assert told == ["error: the key\n", "", "error: another\n"]


@pytest.mark.parametrize("content", [b"", b"\0\0\0\0", b"name: [", b"- 1", b"\xff"])
def test_a_damaged_config_of_a_run_is_named(tmp_path: Path, content: bytes) -> None:
    config = parse_run_command(PretrainConfig, str(ROOT / "configs/tiny.yaml"), "", [])[0]
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.yaml: is damaged"):
        RunFolder(tmp_path).check(config)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    config = parse_run_command(PretrainConfig, str(ROOT / "configs/tiny.yaml"), "", [])[0]
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("/nowhere/x")
    for path in (tmp_path / "file" / "run", tmp_path / "dangling", Path("/proc/run")):
        with pytest.raises(UsageError, match=r"output_dir: .*cannot be written .*; name another"):
            RunFolder(path).check(config)
    RunFolder(tmp_path / "new" / "run").check(config)
    assert not (tmp_path / "new").exists()


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "final") as path:
            (path / "weights").touch(mode=0o600)  # as safetensors writes
    finally:
        os.umask(before)
    assert (tmp_path / "final" / "weights").stat().st_mode & 0o777 == 0o640


def test_a_run_of_an_earlier_version_is_told_the_new_word(tmp_path: Path) -> None:
    config = parse_run_command(GrpoConfig, str(ROOT / "configs/tiny-grpo.yaml"), "", [])[0]
    (tmp_path / "config.yaml").write_text("name: tiny-grpo\ncurriculum: {cut_off_share: 0.1}\n")
    with pytest.raises(
        UsageError, match=r"'curriculum\.cut_off_share'; it is called 'long_share' now .*\); choose another name"
    ):
        RunFolder(tmp_path).check(config)
    with pytest.raises(UsageError, match=r"'curriculum\.cut_off_share'; it is called 'long_share' now"):
        parse_run_command(GrpoConfig, str(ROOT / "configs/tiny-grpo.yaml"), "", ["curriculum.cut_off_share=0.1"])
