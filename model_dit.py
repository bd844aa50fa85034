"""DiT-I: the paper's Diffusion Transformer with text (Appendix A, Fig. 6).

It is DiT-L/2 (Peebles and Xie 2023) with a caption in place of the class label, built as in
PixArt-alpha (Chen et al. 2024). Every block reads the caption by cross-attention. The time
embedding shifts, scales and gates every block through one shared network (adaLN-single). The
caption's T5 tokens are projected and then refined by two layers of self-attention. Two
changes keep training stable on a small data set: QK normalisation in every attention, and
LayerScale on every residual branch.

The class keeps the contract of all models, `TextToImageModel` in sample.py.

Shapes: B images, N image tokens and L text tokens of width D, H heads of width D / H.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------
# Embeddings

def sinusoids(x, dim):
    """Return cosines, then sines, of x (...,) at dim / 2 frequencies: (..., dim) float32.

    The frequencies fall geometrically from 1 to 1 / 10000. Neighbouring values differ in
    the fast waves, distant ones in the slow waves (Vaswani et al. 2017).
    """
    half = dim // 2
    i = torch.arange(half, device=x.device, dtype=torch.float32)
    frequency = 10000 ** (-i / half)                                 # (dim / 2,)
    angle = x.float()[..., None] * frequency                         # (..., dim / 2)
    return torch.cat([angle.cos(), angle.sin()], -1)                 # (..., dim)


def position_embedding(n, dim):
    """Return fixed positions of an n x n grid, row by row: (n * n, dim) float32.

    The first half of the features tells y, the second half x. They are computed, not
    learned, so a model of any size has them.
    """
    axis = sinusoids(torch.arange(n), dim // 2)                      # (n, dim / 2)
    y = axis[:, None].expand(n, n, -1)                               # (n, n, dim / 2)
    x = axis[None].expand(n, n, -1)                                  # (n, n, dim / 2)
    return torch.cat([y, x], -1).flatten(0, 1)                       # (n * n, dim)


# --------------------------------------------------------------------------------------
# Layers

class Attention(nn.Module):
    """Multi-head attention with QK normalisation (Henry et al. 2020).

    Queries and keys are RMS-normalised in each head, so that no attention logit can grow
    without bound. It is self-attention if keys and values are made from `x` itself.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_norm = nn.RMSNorm(dim // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(dim // heads, eps=1e-6)

    def split(self, x):
        """Return x (B, N, D) as heads (B, H, N, D / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x):
        """Return normalised keys (float32) and values of x (B, S, D), each (B, H, S, D / H)."""
        k, v = self.kv(x).chunk(2, -1)                               # (B, S, D) each
        k = self.k_norm(self.split(k).float())                       # (B, H, S, D / H)
        return k, self.split(v)

    def forward(self, x, keys_values=None, mask=None):
        """Return what the queries of x (B, N, D) read: (B, N, D).

        keys_values: those of the tokens to look at; None: those of x.
        mask: (B, S) bool, True where a key may be looked at; None: everywhere.
        """
        q = self.q_norm(self.split(self.q(x)).float())               # (B, H, N, D / H)
        k, v = self.keys_values(x) if keys_values is None else keys_values
        if mask is not None:
            mask = mask[:, None, None]                               # (B, 1, 1, S)

        # Under autocast the values are bfloat16 and the normalised q and k float32; attention
        # wants one type.
        h = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask)
        h = h.transpose(1, 2).flatten(2)                             # (B, N, D)
        return self.out(h)


def mlp(dim, ratio=4):
    """Return a network of two layers, (..., dim) -> (..., dim)."""
    return nn.Sequential(nn.Linear(dim, ratio * dim),
                         nn.GELU(approximate="tanh"),
                         nn.Linear(ratio * dim, dim))


def plain_norm(dim):
    """Return a LayerNorm without weights: the time embedding gives shift and scale (`modulate`)."""
    return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)


def modulate(x, shift, scale):
    """Return normalised tokens x (B, N, D), scaled and shifted by (B, 1, D) each."""
    return x * (1 + scale) + shift


def layer_scale_parameter(dim, value):
    """Return LayerScale's learned factor of a residual branch (Touvron et al. 2021): (D,)."""
    return nn.Parameter(torch.full((dim,), value))


class RefinerBlock(nn.Module):
    """Self-attention and MLP over the caption's tokens. They know nothing of time or image."""

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim)
        self.scale1 = layer_scale_parameter(dim, layer_scale)
        self.scale2 = layer_scale_parameter(dim, layer_scale)

    def forward(self, text, mask):
        """Return text (B, L, D) refined; mask (B, L) bool is True where there is a token."""
        text = text + self.scale1 * self.attention(self.norm1(text), mask=mask)
        text = text + self.scale2 * self.mlp(self.norm2(text))
        return text                                                  # (B, L, D)


class Block(nn.Module):
    """Self-attention, cross-attention to the caption, MLP, each with its own LayerScale.

    The time embedding shifts, scales and gates the self-attention and the MLP. The numbers
    for that come from one network for all blocks; a block only adds its own table to them
    (adaLN-single).
    """

    def __init__(self, dim, heads, layer_scale):
        super().__init__()
        self.norm1 = plain_norm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.cross = Attention(dim, heads)
        self.norm3 = plain_norm(dim)
        self.mlp = mlp(dim)
        self.scale1 = layer_scale_parameter(dim, layer_scale)
        self.scale2 = layer_scale_parameter(dim, layer_scale)
        self.scale3 = layer_scale_parameter(dim, layer_scale)

        # Shift, scale and gate of the attention, then of the MLP. The two gates start open,
        # because LayerScale already starts small.
        table = torch.zeros(6, dim)
        table[2] = 1
        table[5] = 1
        self.table = nn.Parameter(table)

    def forward(self, x, modulation, text_kv, mask):
        """Return x (B, N, D) after the block.

        modulation: (B, 6, D), the same for all blocks. text_kv: keys and values of the caption.
        mask: (B, L) bool, True where there is a token.
        """
        own = (modulation + self.table)[:, :, None]                  # (B, 6, 1, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = own.unbind(1)

        # scale1 to scale3 are LayerScale's, not the time's.
        h = self.attention(modulate(self.norm1(x), shift_attn, scale_attn))
        x = x + self.scale1 * gate_attn * h                          # (B, N, D)
        h = self.cross(self.norm2(x), text_kv, mask)
        x = x + self.scale2 * h                                      # (B, N, D)
        h = self.mlp(modulate(self.norm3(x), shift_mlp, scale_mlp))
        x = x + self.scale3 * gate_mlp * h                           # (B, N, D)
        return x


# --------------------------------------------------------------------------------------
# The model

class DiT(nn.Module):
    """Predict the noise in VAE latents (B, channels, size, size) from a caption's T5 tokens.

    size: height and width of the latents, any multiple of `patch`. patch: height and width of
    the square of latents that becomes one token. text_dim: width of T5's tokens. layer_scale:
    what every branch is multiplied by at the start. Raises ValueError if the sizes do not go
    together.
    """

    def __init__(self, size=32, channels=4, patch=2, text_dim=2048, depth=24, dim=1024,
                 heads=16, layer_scale=0.1):
        super().__init__()
        if size % patch:
            raise ValueError(f"size {size} is not a multiple of patch {patch}")
        if dim % heads or dim % 4:
            raise ValueError(f"dim {dim} must be a multiple of heads {heads} and of 4")
        # All that it takes to build the same network again; saved in config.json.
        self.config = {
            "size": size,
            "channels": channels,
            "patch": patch,
            "text_dim": text_dim,
            "depth": depth,
            "dim": dim,
            "heads": heads,
            "layer_scale": layer_scale,
        }
        self.size = size
        self.channels = channels
        self.patch = patch
        self.dim = dim
        # True: blocks do not keep their activations for the backward pass but compute them
        # again in it. That saves most of the memory and costs about a third more time.
        self.checkpoint_activations = False

        # Image tokens. The buffer is not saved, because it can be computed.
        self.patch_embed = nn.Linear(channels * patch * patch, dim)
        position = position_embedding(size // patch, dim)            # (N, D)
        self.register_buffer("position", position, persistent=False)

        # Time, and the modulation of all blocks that is computed from it.
        self.time_embed = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_table = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

        # The caption.
        self.text_embed = nn.Sequential(nn.Linear(text_dim, dim),
                                        nn.GELU(approximate="tanh"),
                                        nn.Linear(dim, dim))
        self.refine = nn.ModuleList(RefinerBlock(dim, heads, layer_scale) for _ in range(2))

        self.blocks = nn.ModuleList(Block(dim, heads, layer_scale) for _ in range(depth))

        # Back to latents.
        self.final_norm = plain_norm(dim)
        self.final_table = nn.Parameter(torch.zeros(2, dim))
        self.out = nn.Linear(dim, channels * patch * patch)
        self.init_weights()

    def init_weights(self):
        """Initialise so that the untrained network predicts zero, at every time alike, as DiT does.

        Unlike DiT's (adaLN-Zero), the gates of the blocks start at 1: LayerScale keeps them small.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.time_embed[0].weight, std=0.02)
        nn.init.normal_(self.time_embed[2].weight, std=0.02)
        # At the start every block is modulated by its table alone ...
        nn.init.zeros_(self.time_table[1].weight)
        # ... and no token is written to the prediction.
        nn.init.zeros_(self.out.weight)

    def patchify(self, x):
        """Cut latents x (B, C, size, size) into patches, row by row: (B, N, p * p * C)."""
        p = self.patch
        n = self.size // p                                           # tokens along a side
        patches = x.reshape(-1, self.channels, n, p, n, p)           # (B, C, n, p, n, p)
        patches = patches.permute(0, 2, 4, 3, 5, 1)                  # (B, n, n, p, p, C)
        return patches.flatten(3).flatten(1, 2)                      # (B, N, p * p * C)

    def unpatchify(self, tokens):
        """Put patches (B, N, p * p * C) back to their places: (B, C, size, size)."""
        p = self.patch
        n = self.size // p
        patches = tokens.reshape(-1, n, n, p, p, self.channels)      # (B, n, n, p, p, C)
        patches = patches.permute(0, 5, 1, 3, 2, 4)                  # (B, C, n, p, n, p)
        return patches.reshape(-1, self.channels, self.size, self.size)

    def condition(self, text, mask, coherence=None):
        """Return the context of captions: what `denoise` needs of them at every step.

        text: (B, L, text_dim). mask: (B, L) bool, True where there is a token.
        coherence: an input of CAD, not used here. A dropped caption shows in its null text.

        The context is a list of every block's keys and values of the caption, and the mask.
        """
        text = self.text_embed(text.to(self.out.weight.dtype))       # (B, L, D)
        for block in self.refine:
            text = block(text, mask)                                 # (B, L, D)
        text_kv = [block.cross.keys_values(text) for block in self.blocks]
        return text_kv, mask

    def denoise(self, x, gamma, context, state=None):
        """Return the noise predicted in x (B, C, size, size), and None for the state.

        gamma: (B,), the signal level of each sample. context: what `condition` returns.
        state: part of the contract; this model carries nothing from step to step.
        """
        text_kv, mask = context
        tokens = self.patch_embed(self.patchify(x)) + self.position    # (B, N, D)

        # The network is told the paper's step, 0 to 1000, in place of gamma = 1 - step / 1000.
        step = 1000 * (1 - gamma.float())                            # (B,)
        time = sinusoids(step, 256).to(self.out.weight.dtype)        # (B, 256)
        time = self.time_embed(time)                                 # (B, D)
        modulation = self.time_table(time).unflatten(-1, (6, self.dim))   # (B, 6, D)

        for block, kv in zip(self.blocks, text_kv):
            if self.checkpoint_activations:
                tokens = checkpoint(block, tokens, modulation, kv, mask, use_reentrant=False)
            else:
                tokens = block(tokens, modulation, kv, mask)         # (B, N, D)

        shift, scale = (time[:, None] + self.final_table)[:, :, None].unbind(1)   # (B, 1, D)
        tokens = modulate(self.final_norm(tokens), shift, scale)     # (B, N, D)
        eps = self.unpatchify(self.out(tokens))                      # (B, C, size, size)
        return eps, None

    def forward(self, x, gamma, text, mask, coherence=None, coin=None):
        """Return the noise predicted in x: the training pass, (B, C, size, size).

        `coherence` and `coin` are inputs of CAD and are not used.
        """
        context = self.condition(text, mask, coherence)
        eps, _ = self.denoise(x, gamma, context)
        return eps


# DiT's sizes for images of 256 x 256 pixels; the toy's latents are 8 x 8.
PRESETS = {
    "toy": dict(size=8, channels=8, patch=2, text_dim=128,
                depth=4, dim=128, heads=4, layer_scale=0.3),
    "S/2": dict(depth=12, dim=384, heads=6),
    "B/2": dict(depth=12, dim=768, heads=12),
    "L/2": dict(depth=24, dim=1024, heads=16),
}
