"""A whole step of nano's climb against one of TRL's GRPOTrainer, new weights for the engine each step.

16 problems, 16 responses to each of at most 32 tokens, graded, all learned from. TRL (extra `company`) has the same
problems in the same order, sampling, reward, and a learning rate so low that both policies stay what they are. It
grades in its own process, replays nothing, balances nothing and keeps no traces.
"""

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mai_thinking.bench.machine import Options
from mai_thinking.bench.profile import profile_rows
from mai_thinking.bench.result import Result, Row
from mai_thinking.bench.timing import Figure, Turn, ratio
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.errors import UsageError
from mai_thinking.recipes.grpo import GrpoRecipe
from mai_thinking.rl.rewards import reward_group
from mai_thinking.rl.rollout import Group, Rollout
from mai_thinking.rl.tasks import Grade
from mai_thinking.training.context import RunContext
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model, load_model_config
from mai_thinking.training.trainer import Trainer

CONFIG = "configs/nano-grpo.yaml"
PROFILED_STEPS = 2
Seconds = tuple[float, float, float]
"""Of a step: the whole, up to its last reward; and the response tokens."""


def measure(options: Options) -> Result:
    """From `options.model`, which must be there; half of `options.rounds` steps each, and one that does not count."""
    load_model_config(options.model)
    steps = 1 + max(2, options.rounds // 2)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name, contextlib.ExitStack() as stack:
        changes = ["rollouts.steps_per_update=1", "sampling.final_range=null", "optimizer.learning_rate=1e-6"]
        places = [f"output_dir={name}/run", f"init_from={options.model}", "tracking.print_every=1e9"]
        config = load_config(GrpoConfig, CONFIG, [*changes, *places])
        recipe = GrpoRecipe(config, RunContext(config, stack))
        ours_trainer = Trainer(config, recipe)
        recipe.learner.model.train()
        trainer, theirs = _trl_trainer(ours_trainer, recipe, steps, f"{name}/trl")
        trainer.train()
        rollouts = config.groups_per_step * config.sampling.full_size
        records = read_records(recipe.context.folder.metrics)
        ours = [(r["seconds"], r["rollout_seconds"], r["response_length"] * rollouts) for r in records]

        def profiled() -> None:
            for _ in range(PROFILED_STEPS):
                ours_trainer.take_step()

        profile = profile_rows(profiled)
    rows = [_row(side, taken[1:steps]) for side, taken in (("ours", ours), ("TRL", theirs))]
    pairs = [[Turn(whole, 1.0) for whole, _, _ in taken[1:steps]] for taken in (theirs, ours)]
    against = Row({"": "TRL's step / ours"}, {"ratio": ratio(*pairs)})
    notes = [f"from {options.model}; shares: operators' own time in {PROFILED_STEPS} of our steps"]
    return Result("grpo", [*rows, against, *profile], notes)


def _row(side: str, steps: Sequence[Seconds]) -> Row:
    return Row(
        {"side": side},
        {
            "step": Figure.of((whole for whole, _, _ in steps), "s"),
            "rollouts": Figure.of((generating for _, generating, _ in steps), "s"),
            "learning": Figure.of((whole - generating for whole, generating, _ in steps), "s"),
            "responses": Figure.of((tokens for _, _, tokens in steps), "tokens"),
        },
    )


def _trl_trainer(ours: Trainer, recipe: GrpoRecipe, steps: int, folder: str) -> tuple[Any, list[Seconds]]:
    """TRL's trainer of the run's first model on its problems, which lets the run make a step after each of its own;
    and where it will leave, for each step, the seconds, those of them up to the last reward, and response tokens."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        raise UsageError("bench grpo compares with TRL; `pip install mai_thinking[company]` brings it") from None

    config, mix, group = recipe.config, recipe.mix, recipe.config.sampling.full_size
    problems = [mix.problem("train", number) for number in range(steps * config.groups_per_step)]
    opening, template = recipe.tokenizer.eos_token, recipe.responder.template
    rows: list[Seconds] = []
    now = time.perf_counter
    began, rewarded, tokens = 0.0, 0.0, 0

    def reward(completions: list[str], completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        nonlocal rewarded, tokens
        rewards = _rewards(recipe, [problems[i] for i in number], completions)
        rewarded, tokens = now(), sum(map(len, completion_ids))
        return rewards

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal began
            began = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            rows.append((now() - began, rewarded - began, tokens))
            ours.take_step()

    arguments = GRPOConfig(
        folder, max_steps=steps, per_device_train_batch_size=config.groups_per_step * group, num_generations=group,
        max_completion_length=config.curriculum.end, temperature=config.rollouts.temperature,
        top_p=config.rollouts.top_p, learning_rate=config.optimizer.learning_rate, lr_scheduler_type="constant",
        max_grad_norm=config.optimizer.clip_norm, router_aux_loss_coef=0.0, shuffle_dataset=False, bf16=False,
        gradient_checkpointing=False, report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    prompts = [opening + template.prompt(problem.question) for problem in problems]
    data = Dataset.from_dict({"prompt": prompts, "number": list(range(len(prompts)))})
    model = load_model(config.init_from)
    trainer = GRPOTrainer(model, reward, arguments, data, None, recipe.tokenizer, callbacks=[InTurn()])
    trainer.remove_callback(PrinterCallback)
    return trainer, rows


def _rewards(recipe: GrpoRecipe, problems: Any, responses: list[str]) -> list[float]:
    """What a climb of one stage gives for responses, each to its problem, computed here and now."""
    mix, template = recipe.mix, recipe.responder.template
    rollouts = []
    for problem, text in zip(problems, responses, strict=True):
        thought, answer = template.parse(text)
        right = answer is not None and mix.task(problem.task).verify(problem, answer) == 1
        rollouts.append(Rollout(0, [], 1, thought=thought, grade=Grade(float(right), right)))
    # Nothing is charged for length.
    reward_group(Group(0, 0, rollouts=rollouts), recipe.config.reward.model_copy(update={"w_length": 0.0}))
    return [rollout.reward for rollout in rollouts]
