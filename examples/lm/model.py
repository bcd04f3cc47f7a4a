"""The model: a decoder-only transformer as in GPT-2, small."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each with normalised input and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Decoder-only transformer, its embedding tied to the output: tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, vocab_size: int, context: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        # Small weights make the first logits nearly equal, so that the first loss is about ln V. Projections
        # into the residual stream are scaled down further, for the 2 * layers of them.
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                additions = 2 * layers if name.endswith("_out.weight") else 1
                nn.init.normal_(parameter, std=0.02 / math.sqrt(additions))

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the output layer multiplies with the weight of the embedding: tokens [B, T] -> [B, T, width]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return self.norm(self.blocks(x))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.token.weight)

    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
