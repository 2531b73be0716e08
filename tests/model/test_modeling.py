"""The whole model: against itself by other routes, and against the library's conventions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM, modeling
from mai_thinking.model.attention import offset_keys, second_halves
from mai_thinking.model.modeling import DecoderLayer
from tiny_models import SIZES, tiny_model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefill_and_cached_decoding_equal_one_forward(attention: str, offset: bool) -> None:
    """Past the window's length (8) too, in pieces of several sizes, and the local layers keep only the window."""
    model, ids = tiny_model(attention=attention, offset_keys=offset), tokens(2, 40)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, pieces = None, []
        for piece in ids.split([13, 1, 1, 9, 1, 1, 1, 13], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < 1e-4
    lengths = [layer.keys.size(-2) for layer in cache.layers]
    assert lengths == [7, 7, 7, 7, 7, 40]


def test_offset_keys_go_on_from_a_cropped_cache() -> None:
    """As assisted generation crops it; to nothing too. A cache whose keys are gone is an error."""
    model, ids = tiny_model(offset_keys=True), tokens(2, 20)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache()
        for crop in (0, 8, 20):
            if crop:
                cache.crop(-crop)
            start = 20 - crop if crop else 0
            again = model(ids[:, start:], past_key_values=cache, use_cache=True).logits
            assert (again - whole[:, start:]).abs().max() < 1e-4
        cache.layers[0].get_seq_length = lambda: 20  # as one that quantises: it counts tokens whose keys it lacks
        cache.layers[0].keys = torch.tensor([])
        with pytest.raises(UsageError, match="quantised"):
            model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_window_and_positions() -> None:
    """A local layer sees `sliding_window` tokens; a global one everything, and no order but causality."""
    ids = tokens(1, 30)
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 90 + 2
    model = tiny_model()
    layer = model.model.layers[0]  # local
    with torch.no_grad():
        hidden = [
            model.model(batch, output_hidden_states=True, use_cache=False).hidden_states for batch in (ids, other)
        ]
    after_first = (hidden[0][1] - hidden[1][1]).abs().amax(dim=-1)[0]
    assert layer.attention.is_local
    assert (after_first[:8] > 0).all()  # tokens 0 … 7 have token 0 in their window of 8
    assert after_first[8:].max() == 0
    after_global = (hidden[0][6] - hidden[1][6]).abs().amax(dim=-1)[0]
    assert (after_global > 0).all()


def test_global_layer_ignores_positions_and_local_layers_only_their_differences() -> None:
    model, ids = tiny_model(), tokens(1, 12)
    positions = torch.arange(12)[None]
    with torch.no_grad():
        here = model(ids, position_ids=positions, use_cache=False).logits
        shifted = model(ids, position_ids=positions + 1000, use_cache=False).logits
        for layer in model.model.layers:
            layer.attention.is_local = False  # rotate nothing, keep the masks
        unrotated = model(ids, position_ids=positions, use_cache=False).logits
    assert (here - shifted).abs().max() < 1e-3
    assert (here - unrotated).abs().max() > 1e-2


def test_half_of_an_offset_key_is_of_the_token_before() -> None:
    """Of a head of 8, dimensions 2, 3, 6 and 7, which are RoPE's slower pairs; zeros for a document's first token."""
    k_BGTd = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [5, 6, 0, 1, 2, 0, 1]])
    before = torch.full((2, 3, 1, 4), 9.0)  # what a cache holds
    found = offset_keys(k_BGTd, second_halves(k_BGTd), before, positions)
    for row in range(2):
        for place in range(7):
            previous = k_BGTd[row, :, place - 1, [2, 3, 6, 7]] if place else before[row, :, 0]
            expected = k_BGTd[row, :, place].clone()
            expected[:, [2, 3, 6, 7]] = 0.0 if positions[row, place] == 0 else previous
            assert torch.equal(found[row, :, place], expected)


@pytest.mark.parametrize("offset", [False, True])
def test_packed_documents_equal_documents_alone(offset: bool) -> None:
    model = tiny_model(offset_keys=offset)
    first, second = tokens(1, 11, seed=1), tokens(1, 14, seed=2)
    packed = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(11), torch.arange(14)))[None]
    with torch.no_grad():
        together = model(packed, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(ids, use_cache=False).logits for ids in (first, second)], dim=1)
        unmasked = tiny_model(document_masking=False)(packed, position_ids=positions, use_cache=False).logits
    assert (together - alone).abs().max() < 1e-4
    assert (unmasked - alone).abs().max() > 1e-2  # the switch does something


@pytest.mark.parametrize("offset", [False, True])
def test_padding_changes_nothing(offset: bool) -> None:
    model, ids = tiny_model(offset_keys=offset), tokens(1, 9)
    padded = torch.cat((torch.full((1, 4), 1), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 4), torch.ones(1, 9)), dim=1).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids, use_cache=False, output_routing=True)
        beside = model(padded, attention_mask=mask, position_ids=positions, use_cache=False, output_routing=True)
    assert (alone.logits - beside.logits[:, 4:]).abs().max() < 1e-4
    torch.testing.assert_close(alone.routing, beside.routing, atol=1e-3, rtol=1e-4)


def test_zero_start_is_a_stack_of_feed_forward_layers() -> None:
    """With attention's output gains at zero, a token's logits depend on that token alone."""
    model = tiny_model(zero_init_attention=True)
    gains = [layer.attention_out_norm.weight for layer in model.model.layers]
    assert all((gain == 0).all() for gain in gains)
    ids = tokens(1, 10)
    with torch.no_grad():
        together = model(ids, use_cache=False).logits
        alone = model(ids.T, use_cache=False).logits.transpose(0, 1)
    assert (together - alone).abs().max() < 1e-4


def test_initialisation() -> None:
    torch.manual_seed(0)
    config = MaiThinkingConfig(**(SIZES | {"hidden_size": 256, "latent_size": 128, "moe_intermediate_size": 64}))
    model = MaiThinkingForCausalLM._from_config(config)
    residual = {"o_proj.weight", "down_proj.weight", "latent_up.weight"}
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            expected = 0.0 if name.endswith("attention_out_norm.weight") else 1.0
            assert (parameter == expected).all(), name
        else:
            feeds_residual = any(name.endswith(end) for end in residual)
            std = 0.02 / 12**0.5 if feeds_residual else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


def test_loss_equals_plain_cross_entropy_with_gradients() -> None:
    model = tiny_model()
    ids = tokens(3, 17)
    labels = ids.clone()
    labels[0, :6] = -100
    fused = model(ids, labels=labels, skip_logits=True, use_cache=False)
    fused.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    plain.backward()
    assert fused.logits is None
    assert fused.loss.item() == pytest.approx(plain.item(), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_activation_checkpointing_changes_nothing() -> None:
    ids = tokens(2, 16)
    results = []
    for checkpointing in (False, True):
        model = tiny_model(dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        output = model(ids, labels=ids, output_router_logits=True, output_routing=True)
        output.loss.backward()
        results.append((output.loss, output.routing, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_dropout_is_on_sublayer_outputs_only_in_training() -> None:
    model, ids = tiny_model(dropout=0.5), tokens(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


def test_fp32_parts_stay_fp32_in_bf16(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        fp32 = any(part in name for part in ("norm", "router", "embed_tokens", "lm_head"))
        assert parameter.dtype == (torch.float32 if fp32 else torch.bfloat16), name
    kept: list[torch.dtype] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: kept.append(output[0].dtype))
    output = model(tokens(1, 12))
    assert set(kept) == {torch.float32}  # the residual stream
    assert output.logits.dtype == torch.float32


def test_the_head_rounds_as_the_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast on a GPU, though autocast itself is off around the head: in fp32 it would take half a step."""
    given: list[torch.dtype | None] = []

    def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, half: Any) -> torch.Tensor:
        given.append(half)
        return hidden.sum()

    def head(hidden: torch.Tensor, weight: torch.Tensor, half: Any) -> Any:
        given.append(half)

    layers_round = property(lambda model: torch.bfloat16 if torch.is_autocast_enabled("cpu") else None)
    monkeypatch.setattr(modeling.MaiThinkingModel, "half_precision", layers_round)
    monkeypatch.setattr(modeling, "chunked_cross_entropy", cross_entropy)
    model, tokens = tiny_model(), torch.arange(8)[None]
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, labels=tokens, skip_logits=True, head=head)
    model(tokens, labels=tokens, skip_logits=True, head=head)
    assert given == [torch.bfloat16, torch.bfloat16, None, None]


def test_bf16_autocast_trains() -> None:
    model, ids = tiny_model().train(), tokens(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids, skip_logits=True)
    output.loss.backward()
    exact = tiny_model()(ids, labels=ids).loss
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert output.loss.item() == pytest.approx(exact.item(), rel=0.02)


def test_save_and_load_is_exact(tmp_path: Path) -> None:
    model, ids = tiny_model(), tokens(2, 20)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MaiThinkingForCausalLM)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    for (name, before), (_, after) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(before, after), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_generate_equals_greedy_by_hand_with_ragged_prompts() -> None:
    model = tiny_model(eos_token_id=None)
    prompts = [tokens(1, 5, seed=3), tokens(1, 12, seed=4)]
    settings = GenerationConfig(max_new_tokens=14, do_sample=False, pad_token_id=1, eos_token_id=None)
    longest = max(prompt.size(1) for prompt in prompts)
    padded = torch.cat([torch.nn.functional.pad(prompt, (longest - prompt.size(1), 0), value=1) for prompt in prompts])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(prompt), (longest - prompt.size(1), 0)) for prompt in prompts]
    )
    generated = model.generate(padded, attention_mask=mask, generation_config=settings)[:, longest:]
    for row, prompt in enumerate(prompts):
        ids = prompt
        for _ in range(14):
            with torch.no_grad():
                ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        assert generated[row].tolist() == ids[0, prompt.size(1) :].tolist()


def test_routing_has_a_row_for_each_moe_layer() -> None:
    model, ids = tiny_model(), tokens(2, 10)
    routing = model(ids, output_routing=True).routing
    assert routing.counts_E.shape == (3, 12)
    assert (routing.counts_E.sum(dim=-1) == 2 * 10 * 3).all()
    assert [isinstance(layer, DecoderLayer) and layer.is_moe for layer in model.model.layers] == [False, True] * 3
    every = tiny_model(moe_period=1)
    assert every(ids, output_routing=True).routing.counts_E.shape == (6, 12)


@pytest.mark.parametrize("length", [64, 61, 16, 8])
def test_attention_implementations_agree(length: int) -> None:
    """Whole blocks of the window (8), a ragged length, and lengths that fit into one or two windows; two documents."""
    ids = torch.randint(2, 97, (3, length), generator=torch.Generator().manual_seed(length))
    cut = length // 3
    positions = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand(3, length)
    results = []
    for attention in ("eager", "sdpa", "windowed_sdpa"):
        model = tiny_model(attention=attention).train()
        output = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
        output.loss.backward()
        results.append((output.logits, [parameter.grad for parameter in model.parameters()]))
    for logits, gradients in results[1:]:
        torch.testing.assert_close(logits, results[0][0], atol=1e-4, rtol=1e-4)
        for one, other in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", ["whole", "packed", "padded"])
def test_a_local_layers_mask_is_the_part_of_the_librarys_that_it_looks_at(rows: str) -> None:
    T, W = 64, 8
    positions = torch.stack([torch.cat((torch.arange(cut), torch.arange(T - cut))) for cut in (5, 8, 40)])
    arguments = {
        "inputs_embeds": torch.zeros(3, T, 1),
        "attention_mask": torch.arange(T) >= torch.tensor([[0], [5], [40]]) if rows == "padded" else None,
        "past_key_values": None,
        "position_ids": positions if rows == "packed" else None,
    }
    own, whole = (
        create_sliding_window_causal_mask(config=tiny_model(attention=attention).config, **arguments)
        for attention in ("windowed_sdpa", "sdpa")
    )
    assert own.shape == (3 * T // W, 1, W, 2 * W)
    whole = whole.expand(3, 1, T, T)
    padded = torch.nn.functional.pad(whole, (W, 0))
    for row in range(3):
        for block in range(T // W):
            start = block * W
            expected = padded[row, 0, start : start + W, start : start + 2 * W]
            assert torch.equal(own[row * T // W + block, 0], expected)
