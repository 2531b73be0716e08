"""Where a run's model comes from, fresh weights of its seed or a model folder, and where it goes."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.utils import logging

from mai_thinking.config.pretraining import PretrainConfig
from mai_thinking.config.storage import atomic_folder
from mai_thinking.data.tokenizer import architecture_folder, is_checkpoint, load_tokenizer, vocabulary_size
from mai_thinking.errors import UsageError, one_line
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from mai_thinking.model.modeling import MaiThinkingModel
from mai_thinking.provenance.lineage import Lineage, random_weights, require_own
from mai_thinking.training.checkpoint import CheckpointReader
from mai_thinking.training.checkpoint_storage import find_damage, step_folder, visible_steps
from mai_thinking.training.state import ModelState

_DEFAULT_HINT = "`python scripts/pretrain.py` makes runs/nano/final"
MAY_CHANGE = {"dropout", "document_masking", "max_position_embeddings", "router_aux_loss_coef", "router_z_loss_coef"}
"""Fields that a later stage may set otherwise than the checkpoint that it starts from; the others are its weights'."""


def model_config(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> MaiThinkingConfig:
    """The architecture of a run: its `model:` section, or that of `init_from` with the section laid over it.
    `tokenizer` is the prepared data's; before there is one, the vocabulary is as large as the config asks. Raises
    `UsageError` for sizes that do not fit together or the checkpoint, or another tokenizer than the checkpoint's."""
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
    config: PretrainConfig, architecture: MaiThinkingConfig, *, skip_init: bool = False, on_meta: bool = False
) -> MaiThinkingForCausalLM:
    """The model in fp32 on the CPU, ready to train. Fresh weights follow from the seed alone. Those that are
    `skip_init`, from a checkpoint, are left as the memory was: drawing them takes longer than reading them. `on_meta`:
    without memory; for `fill_model`, when ranks have divided it."""
    kinds = {"attn_implementation": config.execution.attention, "experts_implementation": config.execution.experts}
    with torch.device("meta") if on_meta else nullcontext():
        model = _unfilled(architecture, **kinds)
    if not (on_meta or skip_init):
        fill_model(model, config)
    return model


def _draw_by_name(model: MaiThinkingForCausalLM, seed: int) -> None:
    """Each module's weights anew, from the seed and its name; what follows in the run begins at the seed again."""
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            torch.manual_seed(xxhash.xxh3_64_intdigest(f"{seed} {name}".encode()) >> 1)
            model._init_weights(module)
    torch.manual_seed(seed)


def fill_model(model: MaiThinkingForCausalLM, config: PretrainConfig) -> None:
    """Give a model its first weights; of one that ranks have divided, each rank its part of the same."""
    if config.init_from is not None:
        read_weights(model, config.init_from)
        return
    architecture, head = model.config, model.lm_head
    torch.manual_seed(config.seed)
    with _DrawnWhole():
        # PyTorch's modules draw weights when they are made, and then the library does anew: first of the decoder.
        with torch.device("meta"):
            MaiThinkingModel._from_config(architecture)
        model.model.initialize_weights()
        if not architecture.tie_word_embeddings:
            nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
            model._init_weights(head)
        if config.init_by_name:
            _draw_by_name(model, config.seed)


_DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)


class _DrawnWhole(TorchDispatchMode):
    """Random values of a part are those that one process draws of the whole, on the CPU. So every rank draws all of
    them, one tensor at a time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target: Any = args[0] if args else None
        if func not in _DRAWS or (type(target) is Tensor and target.is_cpu):
            return func(*args, **(kwargs or {}))
        whole = func(torch.empty(target.shape, dtype=target.dtype), *args[1:], **(kwargs or {}))
        if isinstance(target, DTensor):
            shape, offset = compute_local_shape_and_global_offset(whole.shape, target.device_mesh, target.placements)
            whole = whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))]
            target.to_local().copy_(whole)
        else:
            target.copy_(whole)
        return target


def read_weights(model: MaiThinkingForCausalLM, folder: str | Path) -> None:
    """The weights of a model folder or checkpoint, each rank the part that it has of `model`."""
    path, state = Path(folder).expanduser(), ModelState(model)
    if is_checkpoint(path):
        if (damage := find_damage(path)) is not None:
            raise UsageError(f"{path}: {damage}")
        state.load_state_dict(CheckpointReader(path).read("model", like=state.state_dict()))
        return
    tensors = {name: value for name, value in state.state_dict().items() if name not in model.all_tied_weights_keys}
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except (CheckpointException, SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{folder}: the weights cannot be loaded: {one_line(error)}") from None


def _unfilled(architecture: object, **changes: object) -> MaiThinkingForCausalLM:
    """A model whose weights are what was in their memory. UsageError for kinds of attention or experts that the library
    does not know, or that need what is not installed."""
    try:
        with no_init_weights():
            model = MaiThinkingForCausalLM._from_config(architecture, **changes)
    except (ValueError, ImportError, KeyError) as error:
        if any(name in str(error) for name in ("attn_implementation", "experts_implementation", "attention")):
            raise UsageError(f"execution: {error}") from None
        raise
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
        raise UsageError(f"{folder}: config.json cannot be read: {one_line(error)}") from None
    if config.model_type != MaiThinkingConfig.model_type:
        raise UsageError(f"{folder}: a {config.model_type!r} model, not {MaiThinkingConfig.model_type!r}")
    return config


def load_model(folder: str | Path, **changes: object) -> MaiThinkingForCausalLM:
    """The model of a model folder or checkpoint in fp32, for evaluation; keywords as `from_pretrained` takes them."""
    config = load_model_config(folder)
    model = _unfilled(changes.pop("config", config), dtype=torch.float32, **changes)
    read_weights(model, folder)
    return model.eval()


def load_model_and_tokenizer(path: str | Path) -> tuple[MaiThinkingForCausalLM, PreTrainedTokenizerBase]:
    """What `path` holds: a model folder, a run's folder (its `final/`, else its newest checkpoint), or a checkpoint. On
    a GPU if there is one. Raises `UsageError` if there is no model, or its tokenizer is another's."""
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


def _load_newest_checkpoint(folder: Path) -> tuple[MaiThinkingForCausalLM, PreTrainedTokenizerBase] | None:
    """The newest that is whole; None if there is none. A run under way may remove what was just listed: look again."""
    for _ in range(3):
        for step in reversed(visible_steps(folder)):
            try:
                return load_model_and_tokenizer(step_folder(folder, step))
            except (UsageError, OSError, CheckpointException) as error:
                if step_folder(folder, step).is_dir():
                    print(f"{one_line(error)}; an older checkpoint is taken", file=sys.stderr, flush=True)
    return None


def starting_point(config: PretrainConfig, architecture: MaiThinkingConfig) -> Lineage:
    """Where the weights that `build_model` returns come from. UsageError if that is not known."""
    if config.init_from is not None:
        return require_own(config.init_from, allow_third_party=config.allow_third_party)
    return random_weights(config.seed, architecture.to_section())


def save_model(
    checkpoint: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, record: Callable[[Path], None]
) -> None:
    """The model of a `checkpoint` and its tokenizer as a Hugging Face folder, whole or not at all, read from the shards
    a file's worth at a time. `record` is called with the complete folder before it is visible, to put
    `lineage.record_model`'s record into it: without one, no run starts from this model."""
    logging.disable_progress_bar()
    with torch.device("meta"):
        model = _unfilled(load_model_config(checkpoint), dtype=torch.float32)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    reader, split = CheckpointReader(checkpoint), split_torch_state_dict_into_shards(wanted)
    with atomic_folder(folder) as path:
        model.save_pretrained(path, state_dict={})
        for file in path.glob("*.safetensors"):
            file.unlink()
        for name, members in split.filename_to_tensors.items():
            save_file(reader.read_tensors("model", members), path / name, {"format": "pt"})
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        tokenizer.save_pretrained(path)
        record(path)
