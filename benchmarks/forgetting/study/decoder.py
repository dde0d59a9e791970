"""A causal language model that classifies, with a head for each task: CURLoRA's Table 1."""

import torch
from torch import Tensor

from .encoder import EncoderClassifier


class DecoderClassifier(EncoderClassifier):
    """As ``EncoderClassifier``, for a causal language model: a head reads the last hidden state of
    a text's last token. Texts are padded on the right."""

    def features(
        self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        outputs = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        last = outputs.hidden_states[-1]  # after the final norm
        texts = torch.arange(len(last), device=last.device)
        pooled = last[texts, attention_mask.sum(1) - 1]
        return pooled, outputs.hidden_states if output_hidden_states else None
