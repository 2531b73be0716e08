"""What the library and its users may ask of any of its models."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingModel
from tiny_models import tiny_model

IDS = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------------------- the router


@pytest.mark.parametrize("k", [2, 8])
def test_the_tasks_loss_reaches_the_routers(k: int) -> None:
    model = tiny_model(num_experts_per_tok=k)
    model(IDS, labels=IDS).loss.backward()
    gradients = [layer.feed_forward.router.weight.grad for layer in model.model.layers if layer.is_moe]
    assert len(gradients) == 3
    assert all(gradient.norm() > 1e-3 for gradient in gradients)


def test_one_expert_a_token_is_refused() -> None:
    """With its weight renormalised, or taken away by the norm behind, only the balance loss would move the router."""
    with pytest.raises(UsageError, match="num_experts_per_tok"):
        tiny_model(num_experts_per_tok=1)


# -------------------------------------------------------------------------------------------------------- outputs


def test_outputs_are_the_librarys() -> None:
    model = tiny_model(attention="eager")
    asked = {"output_attentions": True, "output_hidden_states": True, "output_router_logits": True}
    output = model(IDS, **asked)
    assert [weights.shape for weights in output.attentions] == [(2, 4, 11, 11)] * 6
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 11))
    assert [states.shape for states in output.hidden_states] == [(2, 11, 32)] * 7
    torch.testing.assert_close(F.linear(output.hidden_states[-1], model.lm_head.weight), output.logits)
    assert [logits.shape for logits in output.router_logits] == [(22, 12)] * 3
    assert {type(value) for value in output.values()} <= {torch.Tensor, tuple, type(output.past_key_values)}
    plain = model(IDS)
    assert set(plain) == {"logits", "past_key_values"}
    parts = model(IDS, labels=IDS, return_dict=False, use_cache=False)
    assert torch.equal(parts[1], plain.logits)
    generated = model.generate(IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert len(generated.attentions) == 2


@pytest.mark.parametrize("key", ["output_attentions", "output_hidden_states", "output_router_logits"])
def test_the_config_asks_for_outputs_too(key: str) -> None:
    name = key.removeprefix("output_")
    model = tiny_model(attention="eager")
    setattr(model.config, key, True)
    for one in (model, model.model):
        assert one(IDS)[name]
        assert not one(IDS, **{key: False}).get(name)


def test_the_number_of_layers_is_the_configs() -> None:
    """As an early exit sets it: what is left out is not computed."""
    model = tiny_model()
    third = model(IDS, output_hidden_states=True).hidden_states[3]
    model.config.num_hidden_layers = 3
    torch.testing.assert_close(model.model(IDS).last_hidden_state, model.model.norm(third))


# ------------------------------------------------------------------------------------------------ other people's tools


def test_trainer_evaluates_and_predicts(tmp_path: Path) -> None:
    model = tiny_model(output_router_logits=True)
    rows: Any = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=1)
    trainer = Trainer(model=model, args=arguments)
    expected = sum(float(model(row[None], labels=row[None]).loss) for row in IDS) / 2
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer.predict(rows).predictions.shape == (2, 11, 97)


def test_dropout_is_switched_off_as_trainers_do() -> None:
    model = tiny_model(dropout=0.5).train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    assert torch.equal(model(IDS).logits, model(IDS).logits)


class Packed(nn.Linear):
    """A stand-in for a quantised layer: bytes for weights, and any float for input, returned in its dtype."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.whole = plain
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype.is_floating_point
        return self.whole(x.to(self.whole.weight.dtype)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_may_be_packed(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    before = model(IDS, labels=IDS)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Packed(child))
    after = model(IDS, labels=IDS)
    torch.testing.assert_close(after.logits, before.logits, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0.05)
    torch.testing.assert_close(after.loss, before.loss, atol=1e-2, rtol=1e-3)
    assert len(model.generate(IDS, max_new_tokens=3, do_sample=False)[0]) == 14


def test_the_loss_of_an_adapted_head_is_that_of_its_logits() -> None:
    class Adapted(nn.Module):
        """As adapters do: the weight that it shows is the base's."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.change = base, nn.Parameter(torch.randn_like(base.weight))

        @property
        def weight(self) -> torch.Tensor:
            return self.base.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + F.linear(x, self.change)

    model = tiny_model()
    plain = float(model(IDS, labels=IDS).loss)
    model.lm_head = Adapted(model.lm_head)
    output = model(IDS, labels=IDS)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert abs(float(output.loss) - plain) > 0.1
    output.loss.backward()
    assert model.lm_head.change.grad.norm() > 0


def test_other_heads_load_the_same_decoder(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(decoder, MaiThinkingModel)
    torch.testing.assert_close(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    rewards = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.bfloat16)
    assert rewards(IDS).logits.shape == (2, 1)


# -------------------------------------------------------------------------------------------------------- folders


def test_a_folder_says_its_dtype_and_loads_in_it(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "fp32")
    AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.dtype == model.dtype == model.model.layers[1].feed_forward.experts.down_proj.dtype == dtype
        assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.float32


def test_a_tool_that_does_not_know_us_loads_a_folder(tmp_path: Path) -> None:
    """As command-line tools do, by `trust_remote_code`; and what it saves can be loaded so again."""
    tiny_model().save_pretrained(tmp_path / "ours")
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; folder = sys.argv[1]\n"
        "assert 'mai_thinking' not in sys.modules\n"
        "A.from_pretrained(folder + '/ours', trust_remote_code=True).save_pretrained(folder + '/again')"
    )
    environment = {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, capture_output=True)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("ours", "again")]
    assert files[0] == files[1]
    assert "modeling_mai_thinking.py" in files[0]


# -------------------------------------------------------------------------------------------------------- graphs


def test_export_with_a_dynamic_length() -> None:
    model = tiny_model(num_hidden_layers=2, attention_period=2)
    shapes = {"input_ids": {1: torch.export.Dim("T", min=2, max=64)}, "use_cache": None}
    inputs = {"input_ids": IDS[:1], "use_cache": False}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
    for length in (3, 11):
        ids = IDS[1:, :length]
        torch.testing.assert_close(
            exported(input_ids=ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4
        )
