"""README and docs against the script that runs their commands, and their links against the tree."""

import re
from pathlib import Path

from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.config.pretraining import PretrainConfig
from readme_commands import ADDED, INSTEAD, ROOT, blocks, readme_commands


def test_what_is_run_in_their_place_are_commands_of_ours() -> None:
    """A long one that changed would be run in full, or not at all."""
    commands = readme_commands()
    assert len(commands) > 20
    assert [command for command in (*ADDED, *INSTEAD) if command not in commands] == []
    long = [
        c
        for c in commands
        if re.search(r"(pretrain|grpo|climb|study|self_distill|ladder|mixture)\.py", c) and "--dry-run" not in c
    ]
    assert [command for command in long if command not in ADDED and command not in INSTEAD] == []


def test_examples_are_valid_configs(tmp_path: Path) -> None:
    """Each laid over the config that it is a part of."""
    examples = blocks("yaml")
    kinds = (PretrainConfig, GrpoConfig, GrpoConfig, PretrainConfig)
    for example, kind, base in zip(examples, kinds, ("nano", "nano-grpo", "nano-grpo", "nano"), strict=True):
        file = tmp_path / "example.yaml"
        file.write_text(f"base: {ROOT / 'configs' / base}.yaml\n{example}")
        load_config(kind, file)


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())]
    local = [(page, link) for page, link in links if "://" not in link]
    assert len(local) > 80
    assert [(page.name, link) for page, link in local if not (page.parent / link).exists()] == []


def test_the_names_of_a_step_are_there() -> None:
    """Each once: none that has gone, and none that stands for two things."""
    names = re.findall(r"`(\w+)`", (ROOT / "docs" / "reading.md").read_text().partition("## The names")[2])
    source = "\n".join(path.read_text() for path in (ROOT / "mai_thinking").rglob("*.py"))
    assert len(names) > 30
    found = {name: re.findall(rf"^(?:class|def) {name}\b|^{name} = ", source, flags=re.M) for name in names}
    assert [name for name, places in found.items() if len(places) != 1] == []


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme] == []
    assert len(readme.splitlines()) <= 150


def test_a_folder_imports_none_above_it_in_the_map() -> None:
    table = (ROOT / "README.md").read_text().partition("## Map")[2].partition("## Limits")[0]
    floors = re.findall(r"\]\(mai_thinking/(\w+)\)", table)
    assert set(floors) == {path.parent.name for path in ROOT.glob("mai_thinking/*/__init__.py")}
    for place, floor in enumerate(floors):
        for path in (ROOT / "mai_thinking" / floor).rglob("*.py"):
            imported = set(re.findall(r"^\s*(?:from|import) mai_thinking\.(\w+)", path.read_text(), flags=re.M))
            assert not imported & set(floors[:place]), path
