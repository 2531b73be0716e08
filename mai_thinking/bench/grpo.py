"""A whole step of nano's climb against one of TRL's GRPOTrainer, new weights for the engine each step.

16 problems, 16 responses to each of at most 32 tokens, graded, all learned from. TRL (extra `company`) has the same
problems in the same order, sampling, and a learning rate so low that both policies stay what they are. It pays for
right answers alone, grades in its own process, replays nothing, balances nothing and keeps no traces.
"""

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

from mai_thinking.bench.measure import Figure, Result, Row, Turn, ratio
from mai_thinking.config.grpo import GrpoConfig
from mai_thinking.config.loading import load_config
from mai_thinking.errors import UsageError
from mai_thinking.recipes.grpo import GrpoRecipe
from mai_thinking.training.context import RunContext
from mai_thinking.training.metrics import read_records
from mai_thinking.training.model_files import load_model, load_model_config
from mai_thinking.training.trainer import Trainer

CONFIG = "configs/nano-grpo.yaml"
Seconds = tuple[float, float, float]
"""Of a step: the whole, up to its last reward; and the response tokens."""


def measure(model: Path, rounds: int) -> Result:
    """From `model`, which must be there; half of `rounds` steps each, and one that does not count."""
    load_model_config(model)
    steps = 1 + max(2, rounds // 2)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name, contextlib.ExitStack() as stack:
        changes = ["rollouts.steps_per_update=1", "sampling.final_range=null", "optimizer.learning_rate=1e-6"]
        places = [f"output_dir={name}/run", f"init_from={model}", "tracking.print_every=1e9"]
        config = load_config(GrpoConfig, CONFIG, [*changes, *places])
        recipe = GrpoRecipe(config, RunContext(config, stack))
        ours_trainer = Trainer(config, recipe)
        recipe.learner.model.train()
        trainer, theirs = _trl_trainer(ours_trainer, recipe, steps, f"{name}/trl")
        trainer.train()
        rollouts = config.groups_per_step * config.sampling.full_size
        records = read_records(recipe.context.folder.metrics)
    ours = [(r["seconds"], r["rollout_seconds"], r["response_length"] * rollouts) for r in records]
    rows = [_row(side, taken[1:]) for side, taken in (("ours", ours), ("TRL", theirs))]
    pairs = [[Turn(whole, 1.0) for whole, _, _ in taken[1:]] for taken in (theirs, ours)]
    rows.append(Row({"": "TRL's step / ours"}, {"ratio": ratio(*pairs)}))
    return Result(rows, [f"from {model}"])


def _row(side: str, steps: list[Seconds]) -> Row:
    wholes, generating, tokens = zip(*steps, strict=True)
    learning = [whole - part for whole, part, _ in steps]
    seconds = {"step": wholes, "rollouts": generating, "learning": learning}
    figures = {name: Figure.of(values, "s") for name, values in seconds.items()}
    return Row({"side": side}, figures | {"responses": Figure.of(tokens, "tokens")})


def _trl_trainer(ours: Trainer, recipe: GrpoRecipe, steps: int, folder: str) -> tuple[Any, list[Seconds]]:
    """TRL's trainer of the run's first model on its problems, which lets the run make a step after each of its own;
    and where it will leave what each step took."""
    try:
        from datasets import Dataset
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        raise UsageError("bench grpo compares with TRL; `pip install mai_thinking[company]` brings it") from None

    config, mix, group = recipe.config, recipe.worker.mix, recipe.config.sampling.full_size
    problems = [mix.problem("train", number) for number in range(steps * config.groups_per_step)]
    opening, template = recipe.tokenizer.eos_token, recipe.worker.template
    rows: list[Seconds] = []
    now = time.perf_counter
    began, rewarded, tokens = 0.0, 0.0, 0

    def is_right(number: int, response: str) -> float:
        answer, problem = template.parse(response)[1], problems[number]
        return float(answer is not None and mix.task(problem.task).verify(problem, answer) == 1)

    def reward(completions: list[str], completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        nonlocal rewarded, tokens
        rewards = list(map(is_right, number, completions))
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
