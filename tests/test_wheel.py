"""A wheel has what the quick start needs, and works where there is no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.shipped import CONFIGS, SCRIPTS, find_config, find_script

ROOT = Path(__file__).parents[1]
STALE = "mai_thinking/renamed_since.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is in the checkout, beside what an earlier build has left."""
    source = tmp_path_factory.mktemp("source")
    for name in ("mai_thinking", "configs", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "build" / "lib" / "mai_thinking").mkdir(parents=True)
    (source / "build" / "lib" / STALE).write_text("")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([*pip, "--quiet", "--wheel-dir", str(folder), str(source)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has the package as an installation leaves it."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`mai-thinking …` of the installed copy, in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "mai_thinking", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith("mai_thinking-")}
        (entries,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "mai-thinking = mai_thinking.__main__:main" in archive.read(entries).decode()
    shipped = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("scripts/*.py")]
    modules = [path for kind in ("py", "css", "html") for path in ROOT.glob(f"mai_thinking/**/*.{kind}")]
    expected = {f"mai_thinking/{path.relative_to(ROOT).as_posix()}" for path in shipped}
    expected |= {path.relative_to(ROOT).as_posix() for path in modules}
    assert names == expected


def test_quick_start_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "pretrain", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "16,864,992" in done.stdout
    # It was not the checkout's: that has no copy of the config inside the package.
    where = "import mai_thinking.config.shipped as s; print(s.CONFIGS, s.SCRIPTS)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    told = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.stdout.split() == [str(installed / "mai_thinking" / name) for name in ("configs", "scripts")]


def test_commands_are_the_scripts(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path)
    assert listed.returncode == 0
    assert all(f"  {path.stem} " in listed.stdout for path in SCRIPTS.glob("*.py"))
    wrong = run(installed, tmp_path, "pretrian")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: mai-thinking pretrian: no such command; did you mean 'pretrain'?\n"


def test_shipped_configs_stand_behind_those_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/tiny.yaml", "tiny.yaml", "tiny"):
        assert find_config(Path(name)) == CONFIGS / "tiny.yaml"
        assert load_config(PretrainConfig, name).name == "tiny"
    assert find_config(Path("configs/ladders/tiny.yaml")) == CONFIGS / "ladders" / "tiny.yaml"
    assert find_script(Path("scripts/pretrain.py")) == find_script(Path("pretrain")) == SCRIPTS / "pretrain.py"
    Path("mine.yaml").write_text("base: configs/tiny.yaml\nname: mine\n")
    mine = load_config(PretrainConfig, "mine.yaml")
    assert (mine.name, mine.model["num_experts"]) == ("mine", 16)
    Path("configs").mkdir()
    shipped = (CONFIGS / "tiny.yaml").read_text()
    Path("configs/tiny.yaml").write_text(shipped.replace("num_experts: 16", "num_experts: 8"))
    for name in ("configs/tiny.yaml", "mine.yaml"):
        assert load_config(PretrainConfig, name).model["num_experts"] == 8
    assert find_config(Path("configs/none.yaml")) == Path("configs/none.yaml")
