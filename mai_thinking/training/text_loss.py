"""Cross-entropy of next tokens: the loss of pre-training, mid-training and self-distillation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mai_thinking.training.learner import Counts, Forward, Learner

MicroBatch = dict[str, Tensor]
"""[B, T] int64 `input_ids`, `labels` (next tokens, -100 for none) and `position_ids`; and, where there is padding,
[B, T] bool `token_mask` that is false there."""


class TextLoss:
    """Nats per label of the global batch. One object serves one run."""

    advice = "Lower the learning rate, or start again from the newest checkpoint with another seed"

    def count(self, micro_batches: Sequence[MicroBatch], learner: Learner) -> Counts:
        """Labels for the cross-entropy, tokens for the routers."""
        labels = torch.tensor([float((batch["labels"] != -100).sum()) for batch in micro_batches]).sum()
        self._labels = learner.sum(labels.to(learner.device))
        if "token_mask" not in micro_batches[0]:
            return Counts(learner.ranks * sum(batch["input_ids"].numel() for batch in micro_batches), None)
        mine = torch.stack([batch["token_mask"].sum() for batch in micro_batches]).sum()
        return Counts(int(learner.sum(mine.to(learner.device))), None)

    def forward(self, micro_batch: MicroBatch, learner: Learner) -> Forward:
        """Through the model, which computes the loss without holding all logits."""
        batch = {name: learner.moved(tensor) for name, tensor in micro_batch.items()}
        with learner.accelerator.autocast():
            output = learner.model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                shift_labels=batch["labels"],
                token_mask=batch.get("token_mask"),
                num_items_in_batch=self._labels,
                skip_logits=True,
                use_cache=False,
                output_router_logits=False,
                output_routing=True,
            )
        return Forward(output.loss, output.routing, output.loss.detach())

    def metrics(self, parts: list[Tensor], learner: Learner) -> dict[str, float]:
        """`loss`: cross-entropy per label, in nats."""
        return {"loss": float(learner.sum(sum(parts[1:], parts[0])))}
