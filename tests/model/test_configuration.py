"""The ladder against the report's Table 1, and sizes that do not fit."""

import math
import time

import pytest
import torch

from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingConfig, MaiThinkingForCausalLM
from tiny_models import SIZES

# Table 1: rung → (active, total, hidden, query heads, latent, expert inner), numbers as printed there.
TABLE_1 = {
    12: ("365M", "3.9B", 1024, 16, 512, 768),
    18: ("760M", "13B", 1536, 16, 768, 1152),
    24: ("1.5B", "30B", 2048, 24, 1024, 1536),
    30: ("2.6B", "58B", 2560, 32, 1280, 1920),
    36: ("4.0B", "100B", 3072, 32, 1536, 2304),
    42: ("6.1B", "159B", 3584, 40, 1792, 2688),
    66: ("21.7B", "615B", 5632, 64, 2816, 4224),
    78: ("35.6B", "1015B", 6656, 80, 3328, 4992),
}


def as_printed(count: int, like: str) -> str:
    """`count` with the unit and the digits of `like`."""
    decimals = len(like.rstrip("MB").partition(".")[2])
    return f"{count / {'M': 1e6, 'B': 1e9}[like[-1]]:.{decimals}f}{like[-1]}"


def on_meta(config: MaiThinkingConfig) -> MaiThinkingForCausalLM:
    with torch.device("meta"):
        return MaiThinkingForCausalLM._from_config(config)


@pytest.mark.parametrize("rung", TABLE_1)
def test_ladder_gives_table_1(rung: int) -> None:
    active_printed, total_printed, *sizes = TABLE_1[rung]
    config = MaiThinkingConfig.ladder(rung)
    total, active = config.parameter_counts()
    assert as_printed(active, active_printed) == active_printed
    assert as_printed(total, total_printed) == total_printed
    assert [config.hidden_size, config.num_attention_heads, config.latent_size, config.moe_intermediate_size] == sizes
    assert config.num_hidden_layers == rung


@pytest.mark.parametrize(
    "config", [MaiThinkingConfig.ladder(12), MaiThinkingConfig.ladder(78), MaiThinkingConfig.mai_base_1()]
)
def test_counts_equal_the_real_modules(config: MaiThinkingConfig) -> None:
    begin = time.monotonic()
    model = on_meta(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    total, active = config.parameter_counts()
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    idle = config.num_experts - config.num_experts_per_tok
    idle_parameters = sum(
        parameter.numel() // config.num_experts * idle
        for name, parameter in model.named_parameters()
        if ".experts." in name
    )
    assert active == total - idle_parameters
    assert time.monotonic() - begin < 60


def test_mai_base_1() -> None:
    total, active = MaiThinkingConfig.mai_base_1().parameter_counts()
    assert as_printed(total, "962B") == "962B"
    assert as_printed(active, "34.7B") == "34.7B"


def test_flops_count_products_and_attention_by_hand() -> None:
    config = MaiThinkingConfig(**SIZES)
    context = 20
    D, inner, E, K, L, F = 32, 40, 12, 3, 16, 20
    attention = 2 * D * 32 + 2 * D * 16
    moe = E * D + 2 * D * L + K * 3 * L * F
    products = 6 * attention + 3 * 3 * D * inner + 3 * moe + 97 * D
    # keys seen, counted one query at a time: five local layers with a window of 8, one global
    seen = [sum(min(q + 1, 8) for q in range(context)), sum(q + 1 for q in range(context))]
    scores = 2 * 4 * 8 * (5 * seen[0] + seen[1]) / context
    assert config.flops_per_token(context) == pytest.approx(6 * (products + scores))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 7}, "attention_period"),
        ({"num_experts_per_tok": 13}, "num_experts_per_tok"),
        ({"num_attention_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "even"),
        ({"head_dim": 6, "offset_keys": True}, "multiple of 4"),
        ({"dropout": 1.0}, "dropout"),
        ({"latent_size": 0}, "latent_size"),
        ({"num_experts": 2.5}, "num_experts"),
        ({"hiden_size": 32}, "did you mean 'hidden_size'"),
        ({"ladder": 13}, "multiple of 6"),
        ({"ladder": 12, "preset": "mai-base-1"}, "not both"),
    ],
)
def test_bad_sizes_get_one_line(changes: dict[str, object], message: str) -> None:
    section = changes if "ladder" in changes else SIZES | changes
    with pytest.raises(UsageError, match=message) as caught:
        MaiThinkingConfig.from_section(section)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, math.nan) for name in ("rms_norm_eps", "rope_theta", "initializer_range", "dropout")),
        *((name, math.inf) for name in ("rms_norm_eps", "rope_theta", "router_aux_loss_coef", "router_z_loss_coef")),
        *((name, -1.0) for name in ("rms_norm_eps", "rope_theta", "initializer_range", "router_aux_loss_coef")),
        ("rms_norm_eps", 0.0),
        ("rope_theta", "1e4"),
        ("hidden_size", 32.0),
        ("vocab_size", 10**12),
        ("max_position_embeddings", -5),
    ],
)
def test_numbers_have_bounds_however_the_config_is_made(name: str, wrong: object) -> None:
    """In YAML, in Python and in a model folder's `config.json`."""
    with pytest.raises(UsageError, match=rf"^model\.{name}: [^\n]*$"):
        MaiThinkingConfig(**SIZES | {name: wrong})
    if wrong in ("1e4", 32.0):  # as YAML may have them: read as the numbers that they are
        assert getattr(MaiThinkingConfig.from_section(SIZES | {name: wrong}), name) == float(wrong)
        return
    with pytest.raises(UsageError, match=rf"^model[^\n]*{name}[^\n]*$"):
        MaiThinkingConfig.from_section(SIZES | {name: wrong})


def test_section_round_trip() -> None:
    config = MaiThinkingConfig.from_section({"ladder": 12, "dropout": 0.0})
    assert MaiThinkingConfig.from_section(config.to_section()).to_dict() == config.to_dict()
