"""What comes with the package: configs and scripts, in a checkout beside it, in an installed wheel inside it."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def _folder(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


CONFIGS = _folder("configs")
SCRIPTS = _folder("scripts")


def find_config(path: Path) -> Path:
    """`path` if there is such a file; else the config of that name that we ship: `configs/nano.yaml`, `nano.yaml` and
    `nano` are all the same one. If there is none either, `path` as it is."""
    return _find(path, "configs", CONFIGS, ".yaml")


def find_script(path: Path) -> Path:
    """The same for our scripts: `scripts/pretrain.py`, `pretrain.py`, `pretrain`."""
    return _find(path, "scripts", SCRIPTS, ".py")


def _find(path: Path, prefix: str, shipped: Path, suffix: str) -> Path:
    if path.is_file() or path.is_absolute():
        return path
    name = Path(*path.parts[1:]) if path.parts[:1] == (prefix,) else path
    ours = shipped / (name if name.suffix == suffix else f"{name}{suffix}")
    return ours if ours.is_file() else path
