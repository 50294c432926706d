"""A decoder with one fused ``[q|k|v]`` linear, grouped heads, and positions as one learned slope per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class SprigConfig(PreTrainedConfig):
    model_type = "sprig"

    vocab_size: int = 1009
    hidden_size: int = 64
    num_hidden_layers: int = 2
    n_heads: int = 8
    n_kv_heads: int = 4
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = False
    use_cache: bool = False


class Mix(nn.Module):
    def __init__(self, config: SprigConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_size = config.hidden_size // config.n_heads
        self.qkv = nn.Linear(config.hidden_size, (self.n_heads + 2 * self.n_kv_heads) * self.head_size)
        self.slopes = nn.Parameter(torch.linspace(0.1, 1.0, self.n_heads))
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """x (batch, time, hidden), allowed and distance (..., time, time) → (batch, time, hidden)."""
        batch, time, _ = x.shape
        counts = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        q, k, v = self.qkv(x).view(batch, time, -1, self.head_size).transpose(1, 2).split(counts, dim=1)
        scores = -self.slopes[:, None, None] * distance
        mask = scores.masked_fill(~allowed, torch.finfo(x.dtype).min)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, -1))


class FeedForward(nn.Module):
    def __init__(self, config: SprigConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.down = nn.Linear(3 * config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.relu(self.up(x)).square())


class Layer(nn.Module):
    def __init__(self, config: SprigConfig):
        super().__init__()
        self.mix_norm, self.mix = nn.LayerNorm(config.hidden_size), Mix(config)
        self.ff_norm, self.ff = nn.LayerNorm(config.hidden_size), FeedForward(config)

    def forward(self, x: torch.Tensor, allowed: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(self.mix_norm(x), allowed, distance)
        return x + self.ff(self.ff_norm(x))


class SprigForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SprigConfig

    def __init__(self, config: SprigConfig):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.last_norm = nn.LayerNorm(config.hidden_size)
        self.unembed = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **unused: object,
    ) -> CausalLMOutput:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        distance = position[:, None] - position[None, :]
        allowed = (distance >= 0)[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None].bool()
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x, allowed, distance)
        logits = self.unembed(self.last_norm(x))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)
