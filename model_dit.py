"""DiT-I: the paper's Diffusion Transformer with text (Appendix A, Fig. 6).

DiT-L/2 (Peebles and Xie 2023) in which cross-attention to the caption replaces AdaLN-Zero's class label, as
in PixArt-alpha: time modulates every block through one shared MLP (adaLN-single), the caption's T5 tokens are
projected and refined by two self-attention layers. Two changes keep it stable on a small data set: QK
normalisation in every attention and LayerScale on every residual branch.

Shapes: B images, N image tokens and L text tokens of width D, H heads of width D / H.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------------------
# Embeddings

def sinusoids(x, dim):
    """Cosines then sines of x (...,) at dim / 2 frequencies from 1 to 1 / 10000 -> (..., dim), float32."""
    i = torch.arange(dim // 2, device=x.device, dtype=torch.float32)
    angle = x.float()[..., None] * 10000 ** (-i / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], -1)


def position_embedding(n, dim):
    """Fixed 2-D sine-cosine positions of an n x n grid -> (n * n, dim): first half for y, second for x."""
    axis = sinusoids(torch.arange(n), dim // 2)                                     # (n, dim / 2)
    return torch.cat([axis[:, None].expand(n, n, -1), axis[None].expand(n, n, -1)], -1).flatten(0, 1)


# ------------------------------------------------------------------------------------------------------------
# Layers

class Attention(nn.Module):
    """Multi-head attention with QK normalisation (Henry et al. 2020): queries and keys are RMS-normalised per
    head, so that no logit grows without bound. Self-attention where keys and values are made from `x`."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.RMSNorm(dim // heads, eps=1e-6), nn.RMSNorm(dim // heads, eps=1e-6)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                    # (B, H, N, D / H)

    def keys_values(self, x):
        """x (B, S, D) -> normalised keys (float32) and values, each (B, H, S, D / H)."""
        k, v = self.kv(x).chunk(2, -1)
        return self.k_norm(self.split(k).float()), self.split(v)

    def forward(self, x, keys_values=None, mask=None):
        """x (B, N, D), keys and values, mask (B, S) True where a key may be looked at -> (B, N, D)."""
        q = self.q_norm(self.split(self.q(x)).float())
        k, v = keys_values or self.keys_values(x)
        dtype = v.dtype
        # The CPU's fused attention has a backward five times slower in bfloat16 than in float32.
        q, k, v = (z.float() if x.device.type == "cpu" else z.to(dtype) for z in (q, k, v))
        h = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return self.out(h.transpose(1, 2).flatten(2).to(dtype))


def mlp(dim, ratio=4):
    return nn.Sequential(
        nn.Linear(dim, ratio * dim), nn.GELU(approximate="tanh"), nn.Linear(ratio * dim, dim))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class RefinerBlock(nn.Module):
    """Self-attention and MLP over the caption's tokens; they know nothing of time or image."""

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), mlp(dim)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))

    def forward(self, text, mask):
        text = text + self.scale1 * self.attention(self.norm1(text), mask=mask)     # (B, L, D)
        return text + self.scale2 * self.mlp(self.norm2(text))                      # (B, L, D)


class Block(nn.Module):
    """Self-attention, cross-attention to the caption, MLP; each residual branch has its own LayerScale
    (Touvron et al. 2021). Time shifts, scales and gates the first and the last (adaLN-single)."""

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, heads)
        self.norm2, self.cross = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm3, self.mlp = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False), mlp(dim)
        self.scale1, self.scale2, self.scale3 = (
            nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(3))
        self.table = nn.Parameter(torch.zeros(6, dim))
        nn.init.ones_(self.table.data[2::3])       # the two gates start open: LayerScale already starts small

    def forward(self, x, time, text_kv, mask):
        """x (B, N, D), time (B, 6, D), text_kv and mask of the caption -> (B, N, D)."""
        shift1, scale1, gate1, shift3, scale3, gate3 = (time + self.table)[:, :, None].unbind(1)   # (B, 1, D)
        x = x + self.scale1 * gate1 * self.attention(modulate(self.norm1(x), shift1, scale1))
        x = x + self.scale2 * self.cross(self.norm2(x), text_kv, mask)
        return x + self.scale3 * gate3 * self.mlp(modulate(self.norm3(x), shift3, scale3))


# ------------------------------------------------------------------------------------------------------------
# The model

class DiT(nn.Module):
    """eps-prediction of VAE latents (B, channels, size, size) from a caption's T5 tokens (B, L, text_dim)."""

    def __init__(self, size=32, channels=4, patch=2, text_dim=2048, depth=24, dim=1024, heads=16,
                 layer_scale=0.1):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.size, self.channels, self.patch, self.dim = size, channels, patch, dim
        self.patch_embed = nn.Linear(channels * patch * patch, dim)
        self.register_buffer("position", position_embedding(size // patch, dim), persistent=False)
        self.time_embed = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_table = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))      # adaLN-single, shared by all
        self.text_embed = nn.Sequential(
            nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.refine = nn.ModuleList(RefinerBlock(dim, heads, layer_scale) for _ in range(2))
        self.blocks = nn.ModuleList(Block(dim, heads, layer_scale) for _ in range(depth))
        self.final_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.final_table = nn.Parameter(torch.zeros(2, dim))
        self.out = nn.Linear(dim, channels * patch * patch)
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed[0], self.time_embed[2]):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.time_table[1].weight)   # at the start every block is modulated by its table alone
        nn.init.zeros_(self.out.weight)                 # and the prediction is zero

    def condition(self, text, mask, coherence=None):
        """text (B, L, text_dim), mask (B, L) bool -> context: every block's keys and values, and the mask.

        `coherence` is CAD's and is not used: a dropped caption shows in its null text."""
        text = self.text_embed(text.to(self.out.weight.dtype))                       # (B, L, D)
        for block in self.refine:
            text = block(text, mask)
        return [block.cross.keys_values(text) for block in self.blocks], mask

    def denoise(self, x, gamma, context, state=None):
        """x (B, C, size, size), gamma (B,), context of `condition` -> (eps (B, C, size, size), None)."""
        text_kv, mask = context
        p, n = self.patch, self.size // self.patch
        tokens = x.reshape(-1, self.channels, n, p, n, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        tokens = self.patch_embed(tokens) + self.position                            # (B, N, D)
        t = 1000 * (1 - gamma.float())                                           # the paper's step, 0 .. 1000
        time = self.time_embed(sinusoids(t, 256).to(self.out.weight.dtype))          # (B, D)
        modulation = self.time_table(time).unflatten(-1, (6, self.dim))              # (B, 6, D)
        for block, kv in zip(self.blocks, text_kv):
            tokens = block(tokens, modulation, kv, mask)
        shift, scale = (time[:, None] + self.final_table)[:, :, None].unbind(1)      # (B, 1, D)
        eps = self.out(modulate(self.final_norm(tokens), shift, scale))              # (B, N, p p C)
        eps = eps.reshape(-1, n, n, p, p, self.channels).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        return eps, None

    def forward(self, x, gamma, text, mask, coherence=None):
        """The training pass -> eps (B, C, size, size)."""
        return self.denoise(x, gamma, self.condition(text, mask, coherence))[0]


PRESETS = {     # DiT's sizes for 256 x 256 pictures; the toy's latents are 8 x 8
    "toy": dict(size=8, channels=8, patch=2, text_dim=128, depth=4, dim=128, heads=4, layer_scale=0.3),
    "S/2": dict(depth=12, dim=384, heads=6),
    "B/2": dict(depth=12, dim=768, heads=12),
    "L/2": dict(depth=24, dim=1024, heads=16),
}
