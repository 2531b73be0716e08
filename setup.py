"""What pyproject.toml cannot say: a wheel has the folders `configs` and `scripts` inside the package.

They stay where they are in a checkout, which an editable installation reads (`mai_thinking.config.shipped`).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {"configs": "*.yaml", "scripts": "*.py"}


class BuildWithShipped(build_py):
    """Python modules, then the shipped folders beside them."""

    def run(self) -> None:
        """Of earlier builds in the same folder nothing is left over."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "mai_thinking"), ignore_errors=True)
        super().run()
        if self.editable_mode:
            return
        for name, pattern in SHIPPED.items():
            for source in sorted(Path(name).rglob(pattern)):
                target = Path(self.build_lib, "mai_thinking", source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithShipped})
