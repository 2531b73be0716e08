"""requirements.lock: what pyproject.toml asks for, at versions that it allows."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
EXTRAS = ("test", "plots", "mixture", "tasks", "tools", "company", "ray", "corpus")


def test_the_lock_has_all_that_is_asked_for() -> None:
    """Versions alone, so that every index can serve it."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = [Requirement(line) for line in lines]
    assert not any(one.url for one in locked)
    versions = {canonicalize_name(one.name): next(iter(one.specifier)).version for one in locked}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [one for name in EXTRAS for one in project["optional-dependencies"][name]]
    for one in map(Requirement, asked):
        if one.name != project["name"]:  # which names its own extras
            assert one.specifier.contains(versions[canonicalize_name(one.name)]), one
