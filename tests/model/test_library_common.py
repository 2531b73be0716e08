"""The library's common model tests, on our models: everything that it holds its own models to.

They are files of a source release of the installed version, fetched when the test runs; `TRANSFORMERS_SOURCE` may name
a folder that has one unpacked. Needs `pip install parameterized` besides, in an environment of its own.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

STUBS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
"""What the files import that is not in a source release."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source release of the installed version."""
    if folder := os.environ.get("TRANSFORMERS_SOURCE"):
        return Path(folder)
    release = ["--no-binary", "transformers", "--no-deps", f"transformers=={transformers.__version__}"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--dest", str(tmp_path), *release]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no source release to be had: {done.stderr.strip().splitlines()[-1:]}")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(importlib.util.find_spec("parameterized") is None, reason="needs `pip install parameterized`")
def test_the_librarys_common_tests(source: Path, tmp_path: Path) -> None:
    package = tmp_path / "package" / "tests"
    package.mkdir(parents=True)
    for file in (source / "tests").glob("test_*.py"):
        shutil.copy(file, package)
    for path, name in STUBS.items():
        (package / path).parent.mkdir()
        (package / path).write_text(f"class {name}: ...\n")
    shutil.copy(Path(__file__).with_name("library_common.py"), package / "test_ours.py")
    for folder in (package, *(package / path for path in ("exporters", "generation"))):
        (folder / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests/test_ours.py"],
        cwd=package.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(package.parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 100, done.stdout[-200:]
