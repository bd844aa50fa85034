"""CAD-I: the paper's text-conditional Recurrent Interface Network (Appendix A, Fig. 6; Dufour et al. 2024).

A RIN (Jabri et al. 2023) does its thinking in a few latent tokens and only reads from and writes to the many
image tokens, so its cost hardly grows with resolution. CAD-I reads the caption the same way, by
cross-attention, and is told how far to trust it ("coherence": 1 for a caption, 0 for the null prompt). The
latents of one denoising step are the starting point of the next: `state`.

Shapes: B images, N image tokens of width D_x, M latents of width D, L text tokens of width D_text. The
architecture is exactly the released one: `Lucasdegeorge/CAD-I` fits (`from_released` translates its names).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------------------
# Layers

def layer_norm(dim):
    return nn.LayerNorm(dim, eps=1e-6)


def mlp(dim, ratio):
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


def attend(q, k, v, heads, mask=None):
    """(B, N, D), (B, S, D), (B, S, D) -> (B, N, D); `mask` (B, S), True where a key may be looked at."""
    dtype = q.dtype
    if q.device.type == "cpu":        # the CPU's fused attention has a backward five times slower in bfloat16
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))  # (B, heads, N|S, D / heads)
    out = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
    return out.transpose(1, 2).flatten(2).to(dtype)


class SelfAttention(nn.Module):
    """Pre-norm self-attention and MLP, both residual; LayerScale (Touvron et al. 2021) only where given."""

    def __init__(self, dim, heads, mlp_ratio=4, layer_scale=None):
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = layer_norm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.mlp = layer_norm(dim), mlp(dim, mlp_ratio)
        scale = None if layer_scale is None else torch.full((dim,), layer_scale)
        self.scale1 = None if scale is None else nn.Parameter(scale.clone())
        self.scale2 = None if scale is None else nn.Parameter(scale.clone())

    def forward(self, x, mask=None):
        h = self.out(attend(*self.qkv(self.norm1(x)).chunk(3, -1), self.heads, mask))
        x = x + (h if self.scale1 is None else self.scale1 * h)
        h = self.mlp(self.norm2(x))
        return x + (h if self.scale2 is None else self.scale2 * h)


class CrossAttention(nn.Module):
    """`to` tokens read from other tokens. Only queries are normalised; attention at the narrower width."""

    def __init__(self, dim_to, dim_from, heads, mlp_ratio=4):
        super().__init__()
        self.heads, dim = heads, min(dim_to, dim_from)
        self.norm1, self.q, self.kv = layer_norm(dim_to), nn.Linear(dim_to, dim), nn.Linear(dim_from, 2 * dim)
        self.out = nn.Linear(dim, dim_to)
        self.norm2, self.mlp = layer_norm(dim_to), mlp(dim_to, mlp_ratio)

    def forward(self, to, kv, mask=None):
        """to (B, N, D_to), kv = self.kv(from) (B, S, 2 D) -> (B, N, D_to). The caller may keep `kv`."""
        to = to + self.out(attend(self.q(self.norm1(to)), *kv.chunk(2, -1), self.heads, mask))
        return to + self.mlp(self.norm2(to))


class ScalarEmbedding(nn.Module):
    """A number in [0, 1] (gamma or coherence) -> (B, D): sinusoids of 1000 x, standardised, two layers."""

    def __init__(self, dim):
        super().__init__()
        self.half = dim // 8
        self.mlp = nn.Sequential(nn.Linear(dim // 4, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, value):
        i = torch.arange(self.half, device=value.device, dtype=torch.float32)
        angle = 1000 * value.float()[:, None] * 10000 ** (-i / self.half)            # (B, D / 8)
        h = torch.cat([angle.cos(), angle.sin()], -1)                                # (B, D / 4)
        h = (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True)                 # unbiased, as released
        return self.mlp(h.to(self.mlp[0].weight.dtype))


class Block(nn.Module):
    """Read the caption, read the image, think, write to the image."""

    def __init__(self, dim, data_dim, layers, heads, read_write_heads, mlp_ratio, data_mlp_ratio):
        super().__init__()
        self.read_text = CrossAttention(dim, dim, read_write_heads, mlp_ratio)
        self.read_data = CrossAttention(dim, data_dim, read_write_heads, mlp_ratio)
        self.process = nn.ModuleList(SelfAttention(dim, heads, mlp_ratio) for _ in range(layers))
        self.write_data = CrossAttention(data_dim, dim, read_write_heads, data_mlp_ratio)

    def forward(self, data, latents, text_kv, mask):
        latents = self.read_text(latents, text_kv, mask)                             # (B, M, D)
        latents = self.read_data(latents, self.read_data.kv(data))                   # (B, M, D)
        for layer in self.process:
            latents = layer(latents)                                                 # (B, M, D)
        data = self.write_data(data, self.write_data.kv(latents))                    # (B, N, D_x)
        return data, latents


# ------------------------------------------------------------------------------------------------------------
# The model

class CAD(nn.Module):
    """eps-prediction of VAE latents (B, channels, size, size) from a caption's T5 tokens (B, L, text_dim)."""

    def __init__(self, size=32, channels=4, patch=2, text_dim=2048, num_latents=256, dim=1024, data_dim=256,
                 depth=4, layers=4, heads=16, read_write_heads=16, mlp_ratio=4, data_mlp_ratio=4,
                 registers=16, self_conditioning=0.9):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.channels, self.size, self.patch = channels, size, patch
        self.self_conditioning = self_conditioning
        # image side
        self.patch_embed = nn.Conv2d(channels, data_dim, patch, stride=patch)
        self.data_norm = layer_norm(data_dim)
        self.position = nn.Parameter(torch.empty((size // patch) ** 2, data_dim))
        # latent side
        self.latents = nn.Parameter(torch.empty(num_latents, dim))
        self.time_embed = ScalarEmbedding(dim)
        self.previous_mlp = nn.Sequential(layer_norm(dim), mlp(dim, mlp_ratio))
        self.previous_norm = layer_norm(dim)
        # caption side
        self.text_embed = nn.Linear(text_dim, dim)
        self.coherence_embed = ScalarEmbedding(dim)
        self.coherence_position = nn.Parameter(torch.empty(dim))
        self.registers = nn.Parameter(torch.empty(registers, dim))
        self.refine = nn.ModuleList(SelfAttention(dim, 16, 4, layer_scale=0.1) for _ in range(2))
        self.blocks = nn.ModuleList(
            Block(dim, data_dim, layers, heads, read_write_heads, mlp_ratio, data_mlp_ratio)
            for _ in range(depth))
        self.out = nn.Sequential(layer_norm(data_dim), nn.Linear(data_dim, channels * patch * patch))
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in (self.position, self.latents, self.registers, self.coherence_position):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.previous_norm.weight)       # the previous latents come in step by step
        nn.init.zeros_(self.previous_norm.bias)

    def condition(self, text, mask, coherence):
        """text (B, L, text_dim), mask (B, L) bool, coherence (B,) -> context for `denoise`.

        Coherence token, registers and text refine one another; each block's keys and values are made here."""
        B = len(text)
        coherence = self.coherence_embed(coherence)[:, None] + self.coherence_position             # (B, 1, D)
        text = self.text_embed(text.to(self.latents.dtype))                                        # (B, L, D)
        tokens = torch.cat([coherence, self.registers.expand(B, -1, -1), text], 1)                 # (B, S, D)
        mask = F.pad(mask, (tokens.shape[1] - mask.shape[1], 0), value=True)                         # (B, S)
        for layer in self.refine:
            tokens = layer(tokens, mask)
        return [block.read_text.kv(tokens) for block in self.blocks], F.pad(mask, (1, 0), value=True)

    def denoise(self, x, gamma, context, state=None):
        """x (B, C, H, W), gamma (B,), context of `condition`, state (B, M, D) or None -> (eps, new state)."""
        text_kv, mask = context
        time = self.time_embed(gamma)[:, None]                                       # (B, 1, D)
        data = self.patch_embed(x).flatten(2).mT                                     # (B, N, D_x)
        data = self.data_norm(data) + self.position
        previous = torch.zeros_like(self.latents).expand(len(x), -1, -1) if state is None else state
        previous = self.previous_norm(previous + self.previous_mlp(previous))        # (B, M, D)
        latents = self.latents + time + previous                                     # (B, M, D)
        for block, kv in zip(self.blocks, text_kv):
            kv = torch.cat([block.read_text.kv(time), kv], 1)    # the time token, in front, is never refined
            data, latents = block(data, latents, kv, mask)
        p, n = self.patch, self.size // self.patch
        eps = self.out(data).reshape(-1, n, n, p, p, self.channels)                 # patch-major: (p1, p2, C)
        return eps.permute(0, 5, 1, 3, 2, 4).reshape(x.shape), latents

    def forward(self, x, gamma, text, mask, coherence):
        """The training pass with latent self-conditioning (Jabri et al. 2023) -> eps (B, C, H, W).

        Sampling starts every step from the latents of the step before; in training a first pass without
        gradient stands in for that step. For 1 sample in 10 there is none, as at sampling's first step."""
        context = self.condition(text, mask, coherence)
        with torch.no_grad():
            _, state = self.denoise(x, gamma, context)
            keep = torch.rand(len(x), 1, 1, device=x.device) < self.self_conditioning
            state = state * keep
        return self.denoise(x, gamma, context, state)[0]


PRESETS = {
    "toy": dict(size=8, channels=8, patch=1, text_dim=128, num_latents=16, dim=128, data_dim=96, depth=2,
                layers=2, heads=4, read_write_heads=4),
    "B": dict(num_latents=128, dim=768, heads=12),
    "L": dict(num_latents=256, dim=1024, heads=16),
}


# ------------------------------------------------------------------------------------------------------------
# The released format

RELEASED_SIZES = {      # its config key -> ours
    "data_size": "size", "num_input_channels": "channels", "path_size": "patch", "label_dim": "text_dim",
    "num_latents": "num_latents", "latents_dim": "dim", "data_dim": "data_dim", "num_blocks": "depth",
    "num_processing_layers": "layers", "compute_heads": "heads", "read_write_heads": "read_write_heads",
    "latent_mlp_multiplier": "mlp_ratio", "data_mlp_multiplier": "data_mlp_ratio",
    "num_text_registers": "registers",
}
RELEASED_CHOICES = {    # what CAD-I chose where the released code knows more; another value, another network
    "use_cond_rin_block": True, "concat_cond_token_to_latents": False, "use_cond_token": True,
    "noise_embedding_type": "positional", "data_positional_embedding_type": "learned", "time_scaling": 1000,
    "use_biases": True, "modulate_conditioning": False, "retrieve_attention_scores": False,
    "rw_dropout": 0, "compute_dropout": 0, "rw_stochastic_depth": 0, "compute_stochastic_depth": 0,
}
RELEASED_HARMLESS = {
    "num_cond_tokens", "weight_init", "bias_init", "use_16_bits_layer_norm", "architectures", "model_type",
    "torch_dtype", "dtype", "transformers_version", "license", "tags", "repo_url", "pipeline_tag",
}
RELEASED_NAMES = [      # part of a tensor name there -> here, applied in this order
    ("rin_blocks.", "blocks."), ("transformers_blocks.", "refine."), ("processer_sa.", "process."),
    ("retrieve_cond.", "read_text."), ("retriever_ca.", "read_data."), ("writer_ca.", "write_data."),
    (".initial_to_ln.", ".norm1."), (".initial_ln.", ".norm1."), (".middle_ln.", ".norm2."),
    (".ffn.0.", ".mlp.0."), (".ffn.3.", ".mlp.2."), (".sa.", "."), (".ca.", "."), ("layer_scale_", "scale"),
    ("time_embedder.map_time.", "time_embed.mlp."), ("coherence_embedder.map_time.", "coherence_embed.mlp."),
    ("coherence_positional_embedding", "coherence_position"), ("linear_previous.1.3.", "previous_mlp.1.2."),
    ("linear_previous.", "previous_mlp."), ("ln_previous.", "previous_norm."), ("data_ln.", "data_norm."),
    ("data_pos_embedding", "position"), ("patch_extractor.", "patch_embed."), ("text_registers", "registers"),
    ("map_text_tokens.", "text_embed."), ("map_tokens_to_patches.", "out."),
]


def from_released(config, weights):
    """Released config.json and tensors -> (arguments of CAD, its state dict). Raises ValueError (the key)."""
    known = RELEASED_SIZES.keys() | RELEASED_CHOICES.keys() | RELEASED_HARMLESS
    for key, value in config.items():
        if key in RELEASED_CHOICES and value != RELEASED_CHOICES[key]:
            raise ValueError(f"{key} = {value!r} is another network than CAD-I ({RELEASED_CHOICES[key]!r})")
        if key not in known and not key.startswith("_") and value not in (None, False):    # off: harmless
            raise ValueError(f"unknown key {key!r}")
    ours = {}
    for name, tensor in weights.items():
        if name.endswith(("attention_mask_dummy", "cond_mask", "coherence_mask", "freqs")):
            continue                                                # constants that the released code stores
        for there, here in RELEASED_NAMES:
            name = name.replace(there, here)
        ours[name] = tensor
    sizes = {here: config[there] for there, here in RELEASED_SIZES.items() if there in config}
    return sizes, ours
