"""The corpora that come with every installation: no download, human-written (or made by rule), clear licences.

CPython's standard library and manuals are PSF-2.0; sympy, mpmath, numpy, networkx and torch, which a torch
installation brings, are BSD-3-Clause. Any other installed package may be named: `package/rich`, `docstrings/rich`.
"""

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from mai_thinking.config.data import DataSection, SerialSection, SourceSection
from mai_thinking.data.documents import Document
from mai_thinking.data.exercises import exercises
from mai_thinking.data.serial import serial_exercises
from mai_thinking.errors import UsageError

_PACKAGES = {
    "scientific": ("sympy", "mpmath", "numpy"),
    "docstrings": ("networkx", "torch/nn", "torch/optim", "torch/distributions", "torch/_torch_docs.py"),
}
"""Packages, or the documented parts of one."""
_MIN_DOCSTRING = 400
_ENOUGH = 1000
"""So many exercises show that the rule that makes them has changed."""
_ELSEWHERE = ("site-packages", "dist-packages", "__pycache__", "pydoc_data")


def read_embedded(source: SourceSection) -> Iterator[Document]:
    """The documents of a source whose path is one of `EMBEDDED_CORPORA` or begins with one of `EMBEDDED_PARTS`."""
    match source.path.partition("/")[0]:
        case "serial":
            return serial_exercises(source.serial or SerialSection())
        case "exercises":
            return exercises()
        case "manuals":
            return _manuals()
        case "docstrings":
            return _docstrings(_read_files(_files(source.path)))
    return _read_files(_files(source.path))


def embedded_fingerprint(source: SourceSection) -> str:
    """What the content depends on: versions of packages, number and size of files; of what is made, the beginning."""
    if source.endless:
        first = itertools.islice(read_embedded(source), _ENOUGH)
        return xxhash.xxh3_64_hexdigest("\0".join(document.text for document in first).encode())
    if source.path in _PACKAGES:
        names = dict.fromkeys(part.split("/")[0] for part in _PACKAGES[source.path])
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    sizes = [path.stat().st_size for path, _ in _files(source.path)]
    return f"{source.path.partition('/')[2] or sys.version} {len(sizes)} {sum(sizes)}"


def without_absent_tests(config: DataSection, log: Callable[[str], None]) -> DataSection:
    """Some distributions of Python leave the standard library's tests out; a mixture does without them then."""
    tests = [source for source in config.sources if source.path == "stdlib-tests" and source.kind == "embedded"]
    if not tests or _files("stdlib-tests"):
        return config
    if len(tests) == len(config.sources):
        raise UsageError(f"source {tests[0].name!r}: this Python comes without its tests; name another source")
    log(f"data: this Python comes without its tests; the mixture does without {tests[0].name!r}")
    return config.model_copy(update={"sources": tuple(s for s in config.sources if s not in tests)})


def _files(source: str) -> list[tuple[Path, str]]:
    """The modules that a source's path names, and their names below their library: those of the standard library, or
    its tests; of packages, or parts of them, all but the tests."""
    corpus, _, package = source.partition("/")
    if not package and corpus not in _PACKAGES:
        root = Path(sysconfig.get_paths()["stdlib"])
        if not (root / "os.py").is_file():
            raise UsageError(
                f"{root}: this Python has no standard library in source form; name other sources in `data.sources`"
            )
        return [module for module in _modules(root) if _is_test(module[1]) == (corpus == "stdlib-tests")]
    found: list[tuple[Path, str]] = []
    for part in (package,) if package else _PACKAGES[corpus]:
        name = part.split("/")[0]
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise UsageError(f"the package {name!r} is missing; `pip install {name}`")
        found += [one for one in _modules(Path(spec.origin).parent.parent, part) if not _is_test(one[1])]
    return found


@functools.cache
def _modules(root: Path, part: str = "") -> tuple[tuple[Path, str], ...]:
    """Each module of a `part` of `root`, which is a folder or a file, and its name below `root`, in order. Looked up
    once, and never below what is not the library's: installed packages may be a hundred times as many, and a restarted
    worker waits for this."""
    if (root / part).is_file():
        return ((root / part, part),)
    found = []
    for folder, below, files in os.walk(root / part):
        below[:] = [name for name in below if name not in _ELSEWHERE]
        found += [Path(folder, name).relative_to(root).parts for name in files if name.endswith(".py")]
    return tuple((root.joinpath(*parts), "/".join(parts)) for parts in sorted(found))


def _is_test(name: str) -> bool:
    return any(part in ("test", "tests", "idle_test", "testing") for part in name.split("/")[:-1])


def _read_files(files: list[tuple[Path, str]]) -> Iterator[Document]:
    for path, name in files:
        try:
            yield Document(name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a few of CPython's tests are in other encodings on purpose


def _manuals() -> Iterator[Document]:
    """Chapters of the language reference, and docstrings of modules written in C: both are in no file of `stdlib`."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", text)
    for name in sorted(sys.stdlib_module_names):
        if name.startswith(("_test", "_xx", "xx")) or not _is_compiled(name):
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        text = _compiled_docs(name, module)
        if text:
            yield Document(f"modules/{name}", text)


def _is_compiled(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return name in sys.builtin_module_names or (spec is not None and (spec.origin or "").endswith((".so", ".pyd")))


def _compiled_docs(name: str, module: object) -> str:
    """A manual page: each public object's name and docstring, and those of its methods, sorted by name."""
    parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or not callable(value) or getattr(value, "__module__", name) not in (name, None):
            continue
        parts.append(f"{name}.{key}\n\n{_own_doc(value)}")
        if isinstance(value, type):
            parts += [
                f"{name}.{key}.{method}\n\n{_own_doc(function)}"
                for method, function in sorted(vars(value).items())
                if not method.startswith("_") and _own_doc(function)
            ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _own_doc(value: object) -> str:
    doc = getattr(value, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _docstrings(modules: Iterator[Document]) -> Iterator[Document]:
    """The longer docstrings of each module, as one page."""
    for document in modules:
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        text = "\n\n".join(_docstrings_in(tree))
        if text:
            yield Document(document.id, text + "\n")


def _docstrings_in(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node) or ""
    if len(text) >= _MIN_DOCSTRING:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings_in(child)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            # torch keeps the manual of its compiled functions in calls: add_docstr(torch.abs, r"""…""")
            strings = [a.value for a in child.value.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            text = inspect.cleandoc(max(strings, key=len, default=""))
            if len(text) >= _MIN_DOCSTRING:
                yield text
