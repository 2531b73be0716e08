"""Where a run's model comes from, fresh weights of its seed or a model folder, and where it goes."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.utils import logging

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.storage import atomic_folder
from mai_thinking.data.tokenizer import architecture_folder, is_checkpoint, load_tokenizer, vocabulary_size
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.provenance.lineage import Lineage, random_weights, require_own
from mai_thinking.training.checkpoint import CheckpointReader
from mai_thinking.training.checkpoint_storage import find_damage, step_folder, visible_steps

_DEFAULT_HINT = "`python scripts/pretrain.py` makes runs/nano/final"
MAY_CHANGE = {
    "dropout",
    "document_masking",
    "max_position_embeddings",
    "router_aux_loss_coef",
    "router_z_loss_coef",
}
"""Fields that a later stage may set otherwise than the checkpoint that it starts from; the others are its weights'."""


def model_config(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> MaiThinkingConfig:
    """The architecture of a run: its `model:` section, or that of `init_from` with the section laid over it.

    `tokenizer` is the prepared data's; before there is one, the vocabulary is as large as the config asks. Raises
    `UsageError` for sizes that do not fit together or the checkpoint, or another tokenizer than the checkpoint's.
    """
    before = None if config.init_from is None else load_model_config(config.init_from)
    if tokenizer is None and config.data.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.data.tokenizer.path)
    vocab_size = config.data.tokenizer.vocab_size if tokenizer is None else vocabulary_size(tokenizer)
    changes = {"vocab_size": vocab_size}
    if tokenizer is not None:
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        changes |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": pad}
    if "max_position_embeddings" not in config.model:
        changes["max_position_embeddings"] = config.batch.context_length
    if before is None or config.init_from is None:
        return MaiThinkingConfig.from_section(config.model, **changes)
    # Equal sizes are not enough: the same id would mean another token.
    if tokenizer is None or tokenizer.get_vocab() != load_tokenizer(config.init_from).get_vocab():
        raise UsageError(
            f"init_from: {config.init_from} was trained with a tokenizer of its own; "
            f"set data.tokenizer.path={config.init_from}"
        )
    asked = MaiThinkingConfig.from_section(before.to_section() | config.model)
    for name, value in asked.to_section().items():
        if name not in MAY_CHANGE and value != before.to_section()[name]:
            raise UsageError(
                f"model.{name}: {value} does not fit {config.init_from}, which has {before.to_section()[name]}; "
                "remove the key"
            )
    return MaiThinkingConfig.from_section(asked.to_section() | changes)


def build_model(
    config: PretrainConfig, architecture: MaiThinkingConfig, *, skip_init: bool = False
) -> MaiThinkingForCausalLM:
    """The model in fp32 on the CPU, ready to train. Fresh weights follow from the seed alone. Those that are
    `skip_init`, from a checkpoint, are left as the memory was: drawing them takes longer than reading them."""
    kinds = {
        "attn_implementation": config.execution.attention,
        "experts_implementation": config.execution.experts,
    }
    try:
        if skip_init:
            return _unfilled(architecture, **kinds)
        if config.init_from is not None:
            return load_model(config.init_from, config=architecture, **kinds)
        torch.manual_seed(config.seed)
        model = MaiThinkingForCausalLM._from_config(architecture, **kinds)
        if config.init_by_name:
            _draw_by_name(model, config.seed)
        return model
    except (ValueError, ImportError, KeyError) as error:
        if any(name in str(error) for name in ("attn_implementation", "experts_implementation", "attention")):
            raise UsageError(f"execution: {' '.join(str(error).split())}") from None
        raise


def _draw_by_name(model: MaiThinkingForCausalLM, seed: int) -> None:
    """Each module's weights anew, from the seed and its name; what follows in the run begins at the seed again."""
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            torch.manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()) >> 1)
            model._init_weights(module)
    torch.manual_seed(seed)


def _unfilled(architecture: object, **changes: object) -> MaiThinkingForCausalLM:
    """A model whose weights are what was in their memory."""
    with no_init_weights():
        model = MaiThinkingForCausalLM._from_config(architecture, **changes)
    model.tie_weights()  # which the library takes for part of drawing them
    return model


def load_model_config(folder: str | Path) -> MaiThinkingConfig:
    """The architecture of a model folder or checkpoint, or a `UsageError` that says what is missing there."""
    path = architecture_folder(folder)
    if not (path / "config.json").is_file():
        unfinished = (path.parent / "config.yaml").is_file()
        recipe = Path("configs", f"{path.parent.name}.yaml")
        command = f"`python scripts/pretrain.py {recipe}` makes it" if recipe.is_file() else _DEFAULT_HINT
        hint = "the run is not finished" if unfinished else command
        raise UsageError(f"{folder}: no model here (config.json is missing); {hint}")
    try:
        config = MaiThinkingConfig.from_pretrained(path)
    except UsageError as error:
        raise UsageError(f"{folder}: config.json: {error}") from None
    except Exception as error:  # the library's own for a wrong type, a missing brace, ...
        raise UsageError(f"{folder}: config.json cannot be read: {' '.join(str(error).split())[:200]}") from None
    if config.model_type != MaiThinkingConfig.model_type:
        raise UsageError(f"{folder}: a {config.model_type!r} model, not {MaiThinkingConfig.model_type!r}")
    return config


def load_model(folder: str | Path, **changes: object) -> MaiThinkingForCausalLM:
    """The weights of a model folder or checkpoint in fp32; keywords as `from_pretrained` takes them."""
    config = load_model_config(folder)
    if is_checkpoint(folder):
        if (damage := find_damage(Path(folder).expanduser())) is not None:
            raise UsageError(f"{folder}: {damage}")
        model = _unfilled(changes.pop("config", config), dtype=torch.float32, **changes)
        model.load_state_dict(CheckpointReader(Path(folder).expanduser()).read("model"))
        return model
    try:
        return MaiThinkingForCausalLM.from_pretrained(Path(folder).expanduser(), dtype=torch.float32, **changes)
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:  # of any of its files
        raise UsageError(f"{folder}: the weights cannot be loaded: {' '.join(str(error).split())}") from None


def load_model_and_tokenizer(path: str | Path) -> tuple[MaiThinkingForCausalLM, PreTrainedTokenizerBase]:
    """What `path` holds: a model folder, a run's folder (its `final/`, else its newest checkpoint), or a checkpoint.

    On a GPU if there is one. Raises `UsageError` if there is no model, or its tokenizer is another's.
    """
    path = Path(path).expanduser()
    if (path / "config.json").is_file() or is_checkpoint(path):
        model, tokenizer = load_model(path), load_tokenizer(path)
    elif (path / "final" / "config.json").is_file():
        return load_model_and_tokenizer(path / "final")
    elif (found := _load_newest_checkpoint(path / "checkpoints")) is not None:
        return found
    else:
        hint = "" if path.exists() else " (no such folder); `python scripts/pretrain.py` makes runs/nano"
        raise UsageError(f"{path}: no model here{hint}")
    if (entries := vocabulary_size(tokenizer)) != model.config.vocab_size:
        raise UsageError(
            f"{path}: the tokenizer has {entries} entries, the model {model.config.vocab_size}; "
            "one of them belongs to another model"
        )
    if torch.cuda.is_available():
        model.to("cuda")
    return model, tokenizer


def _load_newest_checkpoint(
    folder: Path,
) -> tuple[MaiThinkingForCausalLM, PreTrainedTokenizerBase] | None:
    """The newest that is whole; None if there is none. A run under way may remove what was just listed: look again."""
    for _ in range(3):
        for step in reversed(visible_steps(folder)):
            try:
                return load_model_and_tokenizer(step_folder(folder, step))
            except (UsageError, OSError, CheckpointException) as error:
                if step_folder(folder, step).is_dir():
                    print(f"{' '.join(str(error).split())}; an older checkpoint is taken", file=sys.stderr, flush=True)
    return None


def starting_point(config: PretrainConfig, architecture: MaiThinkingConfig) -> Lineage:
    """Where the weights that `build_model` returns come from. UsageError if that is not known."""
    if config.init_from is not None:
        return require_own(config.init_from, allow_third_party=config.allow_third_party)
    return random_weights(config.seed, architecture.to_section())


def save_model(
    model: MaiThinkingForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    record: Callable[[Path], None] | None = None,
) -> None:
    """A Hugging Face folder of both, whole or not at all.

    `record` is called with the complete folder before it is visible, to put `lineage.record_model`'s record into it:
    without one, no run starts from this model.
    """
    logging.disable_progress_bar()
    with atomic_folder(folder) as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        if record is not None:
            record(path)
