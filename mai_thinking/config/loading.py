"""YAML files, `base:` inheritance and `key.path=value` overrides, validated into a tree of Sections.

Every failure is a `UsageError` of one line that names the key and the fix.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mai_thinking.config.base import UNKNOWN_KEY, Section
from mai_thinking.config.names import nearest_path
from mai_thinking.config.shipped import find_config
from mai_thinking.errors import UsageError

ConfigType = TypeVar("ConfigType", bound=Section)


def load_config(kind: type[ConfigType], path: Path | str, overrides: Iterable[str] = ()) -> ConfigType:
    """Read `path`, its chain of `base:` parents and the overrides into a `kind`.

    Mappings are merged key by key, the child's values winning; lists and scalars are replaced whole. `base:` is
    relative to the file that names it. Overrides are `key.path=value` with the value read as YAML; a number in the path
    picks an element of a list.
    """
    tree = read_yaml_with_base(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return validate(kind, tree, str(path))


def validate(kind: type[ConfigType], tree: dict[str, Any], where: str) -> ConfigType:
    """`tree` as a `kind`, or a UsageError of one line for the first thing that is wrong in it."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        details = error.errors()
        unknown = [detail for detail in details if detail["type"] == UNKNOWN_KEY]
        more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
        raise UsageError(f"{where}: {_explain((unknown or details)[0])}{more}") from None


def save_config(config: Section, path: Path | str) -> None:
    """Write the resolved tree as YAML, in the order in which the fields are declared."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def read_yaml_with_base(path: Path, descendants: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in `path`, laid over those of its `base:` parents. What is not there is looked for among the configs
    that come with the package."""
    path = find_config(path)
    if path.resolve() in descendants:
        raise UsageError(f"{path}: `base:` leads back to itself; remove one of the links")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such config file{nearest_path(path, path.parent.glob('*.yaml'))}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: a config is a mapping of keys to values, not a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    beside = path.parent / str(base)
    # Beside the file; else among those that come with the package.
    parent = beside if beside.is_file() else find_config(Path(str(base)))
    parent = parent if parent.is_file() else beside
    return merge(read_yaml_with_base(parent, (*descendants, path.resolve())), tree)


class _Loader(yaml.SafeLoader):
    """YAML's plain types. A key that is given twice is an error, since one of the two would be dropped, and so is a
    string that no file can hold."""

    def construct_document(self, node: yaml.Node) -> Any:
        return self.construct_object(node, deep=True)  # so that what holds itself is refused

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    self._refuse(f"`{key.value}` is given twice; remove one", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep=True)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in node.value):
            self._refuse("a NUL or half a surrogate pair is no text; remove it", node)
        return super().construct_scalar(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        number = float(super().construct_yaml_float(node))
        if not math.isfinite(number):  # also where a key takes anything, such as the `options` of a task
            self._refuse("a number has to be finite", node)
        return number

    def _refuse(self, problem: str, node: yaml.Node) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; a UsageError of one line, which begins with `where`, for what cannot be read."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "syntax error"
        raise UsageError(f"{where}{f', line {mark.line + 1}' if mark else ''}: not valid YAML: {problem}") from None
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply; write it flatter") from None
    except (ValueError, OverflowError) as error:  # a date that is none, a number of thousands of digits
        raise UsageError(f"{where}: a value cannot be read: {error}") from None


def merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """`parent` with `child`'s values laid over it, mapping by mapping."""
    merged = dict(parent)
    for key, value in child.items():
        both_mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both_mappings else value
    return merged


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in `tree`, in place."""
    path, separator, text = override.partition("=")
    override = _short(override)
    if not separator or not path:
        raise UsageError(f"override {override!r}: write it as key.path=value")
    value = parse_yaml(text, f"override {override!r}")
    keys = path.split(".")
    node: Any = tree
    for depth, name in enumerate(keys):
        key: str | int = name
        if isinstance(node, list):
            if not name.isdecimal() or int(name) >= len(node):
                raise UsageError(f"override {override!r}: {name!r} is not an index of a list of {len(node)}")
            key = int(name)
        elif not isinstance(node, dict):
            raise UsageError(f"override {override!r}: {'.'.join(keys[:depth])} is a plain value and has no keys")
        if depth == len(keys) - 1:
            node[key] = value
        elif (node.get(key) if isinstance(node, dict) else node[key]) is None:
            node[key] = {}
        node = node[key]


def _explain(detail: ErrorDetails) -> str:
    """One line for one of pydantic's errors: the key and what is wrong."""
    # Pydantic adds the name of a union's member to the path; a reader wants only keys of the file.
    parts = [str(part) for part in detail["loc"] if not str(part).startswith(("function-", "tagged-"))]
    if detail["type"] == UNKNOWN_KEY:
        key = ".".join([*parts, detail["ctx"]["key"]])
        return f"unknown key {key!r}; {detail['msg']}"
    key = ".".join(parts)
    if detail["type"] == "missing":
        return f"{key!r} is missing; add it"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if detail["type"] == "value_error":
        return f"{key}: {message}" if key and not message.startswith(key) else message
    return f"{key}: {message}, got {_short(detail['input'])!r}"


def _short(value: Any) -> Any:
    """A value for a message of one line."""
    return value if len(str(value)) <= 100 else f"{str(value)[:100]} …"
