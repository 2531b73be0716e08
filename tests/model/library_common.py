"""transformers' common tests on our models. `test_library_common.py` copies this file among the library's own test
files and runs it there.

Not run, and why: the tests of `generate` and of export, which are no part of a source release (ours are in
`test_company.py`); those for other hardware or composite models, which skip themselves as they do for Qwen3Moe."""

import unittest

import torch

from mai_thinking.model import (
    MaiThinkingConfig,
    MaiThinkingForCausalLM,
    MaiThinkingForSequenceClassification,
    MaiThinkingForTokenClassification,
    MaiThinkingModel,
)

from . import test_modeling_common as library
from .test_modeling_common import ModelTesterMixin, ids_tensor
from .test_training_mixin import TrainingTesterMixin

# What the library knows by lists of its own: which classes take labels, and which are the bare decoder.
library.MODEL_MAPPING_NAMES["mai_thinking"] = "MaiThinkingModel"
library.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["mai_thinking"] = "MaiThinkingForCausalLM"
library.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["mai_thinking"] = "MaiThinkingForSequenceClassification"
library.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["mai_thinking"] = "MaiThinkingForTokenClassification"


class Tester:
    """What the library's tests ask of a `model_tester`: sizes, a config and inputs."""

    is_training = True
    batch_size, seq_length, vocab_size = 3, 7, 99
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    causal_lm_class = MaiThinkingForCausalLM
    sequence_classification_class = MaiThinkingForSequenceClassification

    def get_config(self):
        return MaiThinkingConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            attention_period=2,
            intermediate_size=37,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=16,
            num_experts=8,
            num_experts_per_tok=2,
            latent_size=16,
            moe_intermediate_size=16,
            dropout=0.0,
            zero_init_attention=False,
            initializer_range=0.1,
            pad_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(min=1)
        mask = torch.tril(torch.ones_like(ids)).flip(0)  # padding on the right, of several lengths
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Ours(ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (
        MaiThinkingModel,
        MaiThinkingForCausalLM,
        MaiThinkingForSequenceClassification,
        MaiThinkingForTokenClassification,
    )

    def setUp(self):
        self.model_tester = Tester()

    def test_generation_tester_mixin_inheritance(self):
        self.skipTest("the tests of `generate` are no part of a source release")
