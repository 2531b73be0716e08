"""Which traces of former RL runs are learned from, and in which words (MAI-Thinking-1 report §3.1.4).

Rules apply one after the other and a trace counts under the first that removes it: the steps, then what is wrong with a
trace by itself, then the cap per prompt, then the total. A store is read batch by batch, so that only the traces under
the cap need to fit into memory.
"""

import bisect
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from mai_thinking.config.distillation import DistillConfig, ReframeSection, SelectionSection, TraceSourceSection
from mai_thinking.config.loading import read_yaml_with_base, validate
from mai_thinking.config.table import Cell, Table
from mai_thinking.config.tasks import TemplateSection
from mai_thinking.data.tokenizer import Encoder, load_tokenizer
from mai_thinking.errors import UsageError
from mai_thinking.provenance.lineage import Lineage, require_own
from mai_thinking.rl.collapse import repetition
from mai_thinking.rl.language import foreign_words
from mai_thinking.rl.rollout import Rollout
from mai_thinking.rl.template import Template
from mai_thinking.rl.traces import FOLDER, SCHEMA, Trace, TraceStore

_GRAM = 8  # Tokens that are looked up as one in the search for loops


@dataclass(frozen=True)
class ChosenTraces:
    """What is taken of one run's traces."""

    run: str
    weight: float
    steps: tuple[int, int]  # The first and the last step of the weights that generated them
    found: int  # Traces in the store
    removed: dict[str, int]  # By rule, in the order of the rules
    prompts: int
    examples: Sequence[Rollout]  # In the order of their generation

    @cached_property
    def response_tokens(self) -> int:
        """Tokens that are learned from."""
        return sum(len(example.own_ids) for example in self.examples)

    @cached_property
    def places(self) -> int:
        """Places that they take in rows."""
        return sum(example.places for example in self.examples)


@dataclass(frozen=True)
class Selection:
    """What is taken of all runs."""

    sources: Sequence[ChosenTraces]

    @property
    def shares(self) -> list[float]:
        """Of the traces learned from, source by source."""
        total = sum(source.weight for source in self.sources)
        return [source.weight / total for source in self.sources]

    @cached_property
    def fingerprint(self) -> str:
        """xxh3-128 of all tokens: what a position in them refers to."""
        digest = xxhash.xxh3_128()
        for source in self.sources:
            digest.update(f"{len(source.examples)};".encode())
            for example in source.examples:
                digest.update(f"{len(example.prompt_ids)},{len(example.response_ids)};".encode())
                ids = np.array([*example.prompt_ids, *example.response_ids], dtype=np.int32)
                digest.update(ids.tobytes() + (example.observed.tobytes() if example.observed.any() else b""))
        return digest.hexdigest()

    def markdown(self) -> str:
        """How many traces each rule removed, and what is left; a column a source."""
        rules = dict.fromkeys(rule for source in self.sources for rule in source.removed)
        rows: list[list[Cell]] = [["traces found", *(source.found for source in self.sources)]]
        for rule in rules:
            rows.append([f"removed: {rule}", *(source.removed.get(rule, 0) for source in self.sources)])
        rows += [
            ["**taken**", *(f"**{len(source.examples):,}**" for source in self.sources)],
            ["prompts", *(source.prompts for source in self.sources)],
            ["from steps", *("{:,} to {:,}".format(*source.steps) for source in self.sources)],
            ["tokens a response", *(source.response_tokens / len(source.examples) for source in self.sources)],
            ["share of samples", *(f"{100 * share:.1f} %" for share in self.shares)],
        ]
        return Table(["", *(source.run for source in self.sources)], rows, digits=1).markdown()


def select(config: DistillConfig, tokenizer: PreTrainedTokenizerFast) -> Selection:
    """The traces of `config`, in tokens of `tokenizer`: the same whenever the stores hold the same.

    UsageError for a run without traces, or if the rules leave nothing of one.
    """
    total = sum(source.weight for source in config.traces)
    quotas = [max(1, round(config.selection.total * source.weight / total)) for source in config.traces]
    return Selection([_choose(config, number, quota, tokenizer) for number, quota in enumerate(quotas)])


def _choose(config: DistillConfig, source: int, quota: int, tokenizer: PreTrainedTokenizerFast) -> ChosenTraces:
    """Of one run up to `quota` traces: prompts in random order, up to `per_prompt` of each."""
    section, key, cap = config.traces[source], f"traces.{source}", config.selection.per_prompt
    store, frame = TraceStore(trace_folder(section, key)), _frame(section.folder)
    rules, read = _rules(config.selection, frame), _reader(section.folder, frame, tokenizer, config.reframe)
    random = np.random.default_rng([config.seed, source])
    steps = store.read(columns=["step"])["step"].to_numpy()
    window = _window(section, key, steps)
    columns = [name for name in SCHEMA.names if name != "logprobs"]
    numbers = itertools.count()  # in the order of their generation
    removed = Counter({"other steps": len(steps) - int(np.isin(steps, window).sum())})
    removed.update(dict.fromkeys([*rules, "not in the frame", "too long", "per prompt", "total"], 0))
    by_prompt: dict[str, list[tuple[float, int, Rollout]]] = {}
    for part in store.parts([("step", "in", set(window.tolist()))], columns):
        # A lot for each row, whatever the rules say: another rule does not reshuffle the rest.
        for lot, row in zip(random.random(part.num_rows), part.to_pylist(), strict=True):
            rule = next((name for name, breaks in rules.items() if breaks(row)), None)
            example = read(row) if rule is None else None
            if example is None:
                removed[rule or "not in the frame"] += 1
            elif example.places > config.batch.context_length:
                removed["too long"] += 1
            else:
                order = lot + (len(row["response_ids"]) if config.selection.order == "shortest" else 0)
                best = by_prompt.setdefault(row["prompt"], [])
                bisect.insort(best, (order, next(numbers), example))
                removed["per prompt"] += len(best) > cap
                del best[cap:]
    prompts = list(by_prompt)
    drawn = [(prompts[i], trace) for i in random.permutation(len(prompts)) for trace in by_prompt[prompts[i]]]
    if not drawn:
        most = ", ".join(f"{count:,} to {rule!r}" for rule, count in removed.most_common(3) if count)
        raise UsageError(
            f"{key}: nothing is left of {len(steps):,} traces in {section.run}; fell {most}: choose "
            "other steps, or loosen these rules under `selection`"
        )
    removed["total"] = max(0, len(drawn) - quota)
    return ChosenTraces(
        section.run,
        section.weight,
        (int(window[0]), int(window[-1])),
        found=len(steps),
        removed=dict(removed),
        prompts=len({prompt for prompt, _ in drawn[:quota]}),
        examples=[example for _, example in sorted((number, example) for _, (_, number, example) in drawn[:quota])],
    )


def _window(section: TraceSourceSection, key: str, steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """The steps whose traces are wanted, of those that traces have."""
    known = np.unique(steps)
    if not len(known):
        raise UsageError(f"{key}: {section.run} holds no traces yet")
    first, last = section.steps or (0, int(known[-1]))
    inside = known[(known >= first) & (known <= last)]
    if not len(inside):
        raise UsageError(
            f"{key}.steps: {section.run} has no traces from steps {first} to {last}; "
            f"there are some from {known[0]} to {known[-1]}"
        )
    return inside[-math.ceil(section.late_share * len(inside)) :]


def _rules(section: SelectionSection, frame: TemplateSection) -> dict[str, Callable[[Trace], bool]]:
    """What can be wrong with a trace by itself: by name, in their order, whether a row of the store breaks a rule."""
    rules: dict[str, Callable[[Trace], bool]] = {}
    if section.correct_only:
        rules["wrong"] = lambda row: not row["passed"]
    if not section.unfinished:
        rules["unfinished"] = lambda row: not row["finished"]
    if not section.unanswered:
        rules["unanswered"] = lambda row: row["answer"] is None
    if (most := section.max_repetition) is not None:
        rules["repetitive"] = lambda row: repetition(row["response_ids"], _GRAM) > most
    if (most_foreign := section.max_foreign) is not None:  # of all words; an answer may be asked for in any language
        parse = Template(frame).parse

        def foreign(row: Trace) -> bool:
            thought = parse(row["response"]).thought
            count = foreign_words(thought)
            return count / max(len(thought.split()), count, 1) > most_foreign

        rules["foreign"] = foreign
    # What stands right before the question, such as `Question:`; a bare frame has nothing that could be told.
    before = frame.prompt.partition("{question}")[0].rstrip().rpartition("\n")[2].strip()
    known = {
        "several-answers": f"(?s){re.escape(frame.answer_start)}.*{re.escape(frame.answer_start)}",
        "own-question": re.escape(before) if before else r"(?!)",
    }
    for name, pattern in ({name: known[name] for name in section.hacks} | section.patterns).items():
        rules[f"hack {name}"] = functools.partial(_contains, re.compile(pattern))
    return rules


def _contains(pattern: re.Pattern[str], row: Trace) -> bool:
    return pattern.search(row["response"]) is not None


def _reader(
    run: Path, frame: TemplateSection, tokenizer: PreTrainedTokenizerFast, reframe: ReframeSection | None
) -> Callable[[Trace], Rollout | None]:
    """Reads a trace in the tokens and the frame that the model will read: None if it does not follow the frame that it
    should be moved out of, or has calls of tools in it and would have to be written anew."""
    as_stored = reframe is None and load_tokenizer(run / "architecture").get_vocab() == tokenizer.get_vocab()
    encoder = Encoder(tokenizer)

    def read(row: Trace) -> Rollout | None:
        prompt_ids, response_ids, observed = row["prompt_ids"], row["response_ids"], row["observed"] or ()
        if not as_stored:  # else the very tokens that were drawn: encoding the text again may cut it otherwise
            if observed:  # which of the new tokens a tool wrote, nobody could tell
                return None
            texts = row["prompt"], row["response"]
            moved = texts if reframe is None else move(*texts, frame, reframe)
            if moved is None:
                return None
            end = [encoder.end_of_text] if row["finished"] else []
            prompt_ids, response_ids = encoder.encode_prompt(moved[0]), [*encoder.encode(moved[1]), *end]
        ids, by_tools = np.array(response_ids, dtype=np.int64), np.array(observed, dtype=bool)
        return Rollout(0, prompt_ids, len(ids), response_ids=ids, observed=by_tools)

    return read


def move(prompt: str, response: str, frame: TemplateSection, reframe: ReframeSection) -> tuple[str, str] | None:
    """(prompt, response) in the new frame; None if they are not in the old one, or would not be in the new one.

    The response is what stood before the answer, with the replacements made, and the answer between its new marks; what
    followed the answer is left out.
    """
    old, new = Template(frame), Template(reframe.template)
    before, _, after = frame.prompt.partition("{question}")
    question = prompt[len(before) : len(prompt) - len(after.partition("{question}")[0])]
    parsed = old.parse(response)
    if old.prompt(question) != prompt or parsed.answer is None:
        return None
    thought = parsed.thought
    for mark, instead in reframe.replace.items():
        thought = thought.replace(mark, instead)
    section = reframe.template
    moved = f"{thought}{section.answer_start}{parsed.answer}{section.answer_end}"
    return (new.prompt(question), moved) if new.parse(moved).answer == parsed.answer else None


def trace_folder(section: TraceSourceSection, key: str) -> Path:
    """A run's folder of traces; a UsageError that says what makes it if there is none."""
    folder = section.folder / FOLDER
    if not folder.is_dir():
        recipe = Path("configs", f"{section.folder.name}.yaml")
        command = f"python scripts/grpo.py{f' {recipe}' if recipe.is_file() else ''}"
        raise UsageError(f"{key}: {folder}: no traces here; `{command}` makes them, or name another run's folder")
    return folder


def own_traces(folder: Path, *, allow_third_party: bool) -> Lineage:
    """`require_own` of a run's traces; of a run that was struck, the UsageError says what to do."""
    try:
        return require_own(folder, allow_third_party=allow_third_party)
    except UsageError:
        run = folder.parent
        if (run / "config.yaml").exists() and (run / "checkpoints").is_dir() and not (run / "final").exists():
            raise UsageError(
                f"{folder}: their run was struck before it recorded the last of them; start it again, and stop it with "
                "Ctrl-C or let it finish"
            ) from None
        raise


def _frame(run: Path) -> TemplateSection:
    """The frame that a run asked in."""
    tree = read_yaml_with_base(run / "config.yaml").get("template")
    return validate(TemplateSection, tree if isinstance(tree, dict) else {}, f"{run / 'config.yaml'}: template")
