"""CAD-I: the paper's text-conditional Recurrent Interface Network (Appendix A, Fig. 6).

A RIN (Jabri et al. 2023) does its thinking in a few latent tokens. From the many image
tokens it only reads, and at the end of each block it writes to them, so its cost hardly
grows with resolution. CAD (Dufour et al. 2024) reads the caption in the same way, by
cross-attention, and is told how far to trust it: "coherence" is 1 for a caption and 0 for
the null prompt. The latents of one denoising step are where the next step starts: `state`.

The class keeps the contract of all models, `TextToImageModel` in sample.py. The network is
the released one: `from_released` translates the names of `Lucasdegeorge/CAD-I`'s weights, and
with small recorded weights of the release's code the outputs are the same (tests/fixtures).

Two things are called latents: the autoencoder's, which are the image here (x), and the RIN's, the
few tokens it thinks in. Below, "latents" are the RIN's; the autoencoder's are "VAE latents".

Shapes: B images, N image tokens of width D_x, M latents of width D, L text tokens, and
S = 1 + registers + L tokens of the context.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------
# Layers

def layer_norm(dim):
    """Return a LayerNorm with the released network's epsilon."""
    return nn.LayerNorm(dim, eps=1e-6)


def mlp(dim, ratio):
    """Return a network of two layers, (..., dim) -> (..., dim)."""
    return nn.Sequential(nn.Linear(dim, ratio * dim), nn.GELU(), nn.Linear(ratio * dim, dim))


def attend(q, k, v, heads, mask=None):
    """Return what the queries q (B, N, D) read from k and v (B, S, D): (B, N, D).

    mask: (B, S) bool, True where a key may be looked at; None: everywhere.
    """
    q = split_heads(q, heads)                                        # (B, H, N, D / H)
    k = split_heads(k, heads)                                        # (B, H, S, D / H)
    v = split_heads(v, heads)                                        # (B, H, S, D / H)
    if mask is not None:
        mask = mask[:, None, None]                                   # (B, 1, 1, S)
    h = F.scaled_dot_product_attention(q, k, v, mask)                # (B, H, N, D / H)
    return h.transpose(1, 2).flatten(2)                              # (B, N, D)


def split_heads(x, heads):
    """Return x (B, N, D) as heads (B, H, N, D / H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttentionLayer(nn.Module):
    """Self-attention and MLP, each normalised first and added to what was there.

    layer_scale: start value of LayerScale on both branches (Touvron et al. 2021), with
    which the caption is refined; None: no LayerScale, as in the blocks.
    """

    def __init__(self, dim, heads, mlp_ratio=4, layer_scale=None):
        super().__init__()
        self.heads = heads
        self.norm1 = layer_norm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = layer_norm(dim)
        self.mlp = mlp(dim, mlp_ratio)
        self.scale1 = None
        self.scale2 = None
        if layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x, mask=None):
        """Return x (B, N, D) after both; mask (B, N) bool is True where there is a token."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)               # (B, N, D) each
        h = self.out(attend(q, k, v, self.heads, mask))
        if self.scale1 is not None:
            h = self.scale1 * h
        x = x + h                                                    # (B, N, D)

        h = self.mlp(self.norm2(x))
        if self.scale2 is not None:
            h = self.scale2 * h
        return x + h                                                 # (B, N, D)


class CrossAttentionLayer(nn.Module):
    """Tokens `to` read from other tokens, then an MLP, each added to what was there.

    Attention has the width of the narrower side. LayerNorm is applied to the tokens that read,
    not to those that are read.
    """

    def __init__(self, dim_to, dim_from, heads, mlp_ratio=4):
        super().__init__()
        dim = min(dim_to, dim_from)
        self.heads = heads
        self.norm1 = layer_norm(dim_to)
        self.q = nn.Linear(dim_to, dim)
        self.kv = nn.Linear(dim_from, 2 * dim)
        self.out = nn.Linear(dim, dim_to)
        self.norm2 = layer_norm(dim_to)
        self.mlp = mlp(dim_to, mlp_ratio)

    def forward(self, to, kv, mask=None):
        """Return `to` (B, N, D_to) after both; kv is `self.kv(other tokens)` (B, S, 2 D).

        The caller makes `kv`, so that the caption's can be kept for all denoising steps.
        """
        k, v = kv.chunk(2, -1)                                       # (B, S, D) each
        h = attend(self.q(self.norm1(to)), k, v, self.heads, mask)
        to = to + self.out(h)                                        # (B, N, D_to)
        return to + self.mlp(self.norm2(to))                         # (B, N, D_to)


class ScalarEmbedding(nn.Module):
    """Embed a number in [0, 1], gamma or coherence: (B,) -> (B, D).

    Sinusoids of 1000 times the number, standardised, then two layers.
    """

    def __init__(self, dim):
        super().__init__()
        self.half = dim // 8
        self.mlp = nn.Sequential(nn.Linear(dim // 4, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, value):
        i = torch.arange(self.half, device=value.device, dtype=torch.float32)
        frequency = 10000 ** (-i / self.half)                        # (D / 8,)
        angle = 1000 * value.float()[:, None] * frequency            # (B, D / 8)
        h = torch.cat([angle.cos(), angle.sin()], -1)                # (B, D / 4)
        # `std` divides by n - 1, as the released network does.
        h = (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True)
        return self.mlp(h.to(self.mlp[0].weight.dtype))              # (B, D)


class Block(nn.Module):
    """Read the caption, read the image, think, write to the image."""

    def __init__(self, dim, data_dim, layers, heads, read_write_heads, mlp_ratio,
                 data_mlp_ratio):
        super().__init__()
        self.read_text = CrossAttentionLayer(dim, dim, read_write_heads, mlp_ratio)
        self.read_data = CrossAttentionLayer(dim, data_dim, read_write_heads, mlp_ratio)
        self.process = nn.ModuleList(
            SelfAttentionLayer(dim, heads, mlp_ratio) for _ in range(layers))
        self.write_data = CrossAttentionLayer(data_dim, dim, read_write_heads, data_mlp_ratio)

    def forward(self, data, latents, text_kv, mask):
        """Return image tokens `data` (B, N, D_x) and `latents` (B, M, D) after the block.

        text_kv: (B, S, 2 D), the caption's. mask: (B, S) bool, True where there is a token.
        """
        latents = self.read_text(latents, text_kv, mask)             # (B, M, D)
        latents = self.read_data(latents, self.read_data.kv(data))   # (B, M, D)
        for layer in self.process:
            latents = layer(latents)                                 # (B, M, D)
        data = self.write_data(data, self.write_data.kv(latents))    # (B, N, D_x)
        return data, latents


# --------------------------------------------------------------------------------------
# The model

# The caption is refined with as many heads at every size of the network, as released.
REFINE_HEADS = 16


class CAD(nn.Module):
    """Predict the noise in VAE latents (B, channels, size, size) from a caption's T5 tokens.

    size: height and width of the VAE latents, a multiple of `patch`. patch: height and width of
    the square of VAE latents that becomes one image token. text_dim: width of T5's tokens.
    num_latents, dim: M and D. data_dim: D_x. depth: blocks. layers: self-attention layers in
    each. heads, read_write_heads: of self-attention and of cross-attention. registers: learned
    tokens beside the caption's. self_conditioning: share of training samples whose latents
    start from those of a first pass. Raises ValueError if the sizes do not go together.
    """

    def __init__(self, size=32, channels=4, patch=2, text_dim=2048, num_latents=256,
                 dim=1024, data_dim=256, depth=4, layers=4, heads=16, read_write_heads=16,
                 mlp_ratio=4, data_mlp_ratio=4, registers=16, self_conditioning=0.9):
        super().__init__()
        if size % patch:
            raise ValueError(f"size {size} is not a multiple of patch {patch}")
        if dim % heads or dim % REFINE_HEADS:
            raise ValueError(f"dim {dim} must be a multiple of heads {heads} and of {REFINE_HEADS}")
        if min(dim, data_dim) % read_write_heads:
            raise ValueError(f"dim {dim} or data_dim {data_dim} is not a multiple of "
                             f"read_write_heads {read_write_heads}")
        # All that it takes to build the same network again; saved in config.json.
        self.config = {
            "size": size, "channels": channels, "patch": patch, "text_dim": text_dim,
            "num_latents": num_latents, "dim": dim, "data_dim": data_dim, "depth": depth,
            "layers": layers, "heads": heads, "read_write_heads": read_write_heads,
            "mlp_ratio": mlp_ratio, "data_mlp_ratio": data_mlp_ratio,
            "registers": registers, "self_conditioning": self_conditioning,
        }
        self.channels = channels
        self.size = size
        self.patch = patch
        self.self_conditioning = self_conditioning
        # True: blocks do not keep their activations for the backward pass but compute them
        # again in it. That saves most of the memory and costs about a third more time.
        self.checkpoint_activations = False

        # The image's side.
        self.patch_embed = nn.Conv2d(channels, data_dim, patch, stride=patch)
        self.data_norm = layer_norm(data_dim)
        self.position = nn.Parameter(torch.empty((size // patch) ** 2, data_dim))

        # The latents' side. `previous` is what was thought in the step before.
        self.latents = nn.Parameter(torch.empty(num_latents, dim))
        self.time_embed = ScalarEmbedding(dim)
        self.previous_mlp = nn.Sequential(layer_norm(dim), mlp(dim, mlp_ratio))
        self.previous_norm = layer_norm(dim)

        # The caption's side.
        self.text_embed = nn.Linear(text_dim, dim)
        self.coherence_embed = ScalarEmbedding(dim)
        self.coherence_position = nn.Parameter(torch.empty(dim))
        self.registers = nn.Parameter(torch.empty(registers, dim))
        self.refine = nn.ModuleList(
            SelfAttentionLayer(dim, REFINE_HEADS, layer_scale=0.1) for _ in range(2))

        self.blocks = nn.ModuleList(
            Block(dim, data_dim, layers, heads, read_write_heads, mlp_ratio, data_mlp_ratio)
            for _ in range(depth))
        self.out = nn.Sequential(layer_norm(data_dim),
                                 nn.Linear(data_dim, channels * patch * patch))
        self.init_weights()

    def init_weights(self):
        """Initialise so that training learns from the first step.

        The untrained network leaves image tokens as they are, predicts zero, and ignores
        previous latents. Comments say what differs from the release.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for parameter in (self.registers, self.coherence_position):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        # In the release latents and positions start within 0.04 of zero. Latents are then nearly
        # alike, read nearly the same, and take long until they share the work; and the image
        # tokens hardly know where they are.
        nn.init.normal_(self.latents)
        nn.init.normal_(self.position)
        # Training lets the previous latents in little by little.
        nn.init.zeros_(self.previous_norm.weight)
        nn.init.zeros_(self.previous_norm.bias)
        # The release starts the following at random, too. What untrained latents write then
        # drowns the image, and has to be unlearned first. LAMB changes a matrix by no more than a
        # thousandth of its norm a step: for hundreds of steps the network predicts zero.
        for block in self.blocks:
            nn.init.zeros_(block.write_data.out.weight)
            nn.init.zeros_(block.write_data.mlp[-1].weight)
        nn.init.zeros_(self.out[1].weight)

    def unpatchify(self, patches):
        """Put patches (B, N, p * p * C) back to their places: (B, C, size, size)."""
        p = self.patch
        n = self.size // p                                           # tokens along a side
        patches = patches.reshape(-1, n, n, p, p, self.channels)     # (B, n, n, p, p, C)
        patches = patches.permute(0, 5, 1, 3, 2, 4)                  # (B, C, n, p, n, p)
        return patches.reshape(-1, self.channels, self.size, self.size)

    def condition(self, text, mask, coherence):
        """Return the context of captions: what `denoise` needs of them at every step.

        text: (B, L, text_dim). mask: (B, L) bool, True where there is a token.
        coherence: (B,), 1 for a caption and 0 for the null prompt.

        The coherence token, the registers and the text refine one another. The context is a
        list of every block's keys and values of these S tokens, and a mask (B, S + 1): its first
        place is for the time, a token that `denoise` puts in front.
        """
        B = len(text)
        coherence = self.coherence_embed(coherence)[:, None]         # (B, 1, D)
        coherence = coherence + self.coherence_position
        registers = self.registers.expand(B, -1, -1)                 # (B, registers, D)
        text = self.text_embed(text.to(self.latents.dtype))          # (B, L, D)
        tokens = torch.cat([coherence, registers, text], 1)          # (B, S, D)

        # Only the caption has padding.
        always_there = tokens.shape[1] - mask.shape[1]
        mask = F.pad(mask, (always_there, 0), value=True)            # (B, S)
        for layer in self.refine:
            tokens = layer(tokens, mask)                             # (B, S, D)
        text_kv = [block.read_text.kv(tokens) for block in self.blocks]
        return text_kv, F.pad(mask, (1, 0), value=True)              # mask (B, S + 1)

    def denoise(self, x, gamma, context, state=None):
        """Return the noise predicted in x (B, C, size, size), and the new latents (B, M, D).

        gamma: (B,), the signal level of each sample. context: what `condition` returns.
        state: the latents that the step before returned; None at the first step.
        """
        text_kv, mask = context
        time = self.time_embed(gamma)[:, None]                       # (B, 1, D)

        data = self.patch_embed(x).flatten(2).mT                     # (B, N, D_x)
        data = self.data_norm(data) + self.position

        if state is None:
            state = torch.zeros_like(self.latents).expand(len(x), -1, -1)
        previous = self.previous_norm(state + self.previous_mlp(state))   # (B, M, D)
        latents = self.latents + time + previous                     # (B, M, D)

        for block, kv in zip(self.blocks, text_kv):
            # The time is a token beside the caption's, but it changes from step to step, so
            # it was not there when they were refined.
            kv = torch.cat([block.read_text.kv(time), kv], 1)        # (B, S + 1, 2 D)
            if self.checkpoint_activations:
                data, latents = checkpoint(block, data, latents, kv, mask, use_reentrant=False)
            else:
                data, latents = block(data, latents, kv, mask)

        eps = self.unpatchify(self.out(data))                        # (B, C, size, size)
        return eps, latents

    def forward(self, x, gamma, text, mask, coherence, coin=None):
        """Return the noise predicted in x (B, C, size, size): the training pass.

        It has latent self-conditioning (Jabri et al. 2023). Sampling starts every step from
        the latents of the step before. In training a first pass without gradient stands in
        for that step. Some samples start without latents, as sampling does at its first step.

        coin: (B,) uniform in [0, 1), which decides for each sample: it starts from latents if
        its coin is below `self_conditioning`. None: drawn here.
        """
        context = self.condition(text, mask, coherence)
        if coin is None:
            coin = torch.rand(len(x), device=x.device)
        with torch.no_grad():
            _, state = self.denoise(x, gamma, context)               # (B, M, D)
            starts_from_latents = coin < self.self_conditioning      # (B,)
            state = state * starts_from_latents[:, None, None]
        eps, _ = self.denoise(x, gamma, context, state)
        return eps


# The released CAD-I is "L". The toy's VAE latents are 8 x 8; toy/recipe.py says how the other
# sizes of its network were chosen.
PRESETS = {
    "toy": dict(size=8, channels=8, patch=1, text_dim=128, num_latents=32, dim=96,
                data_dim=96, depth=2, layers=2, heads=4, read_write_heads=4),
    "B": dict(num_latents=128, dim=768, heads=12),
    "L": dict(num_latents=256, dim=1024, heads=16),
}


def resize_positions(weights, size, patch):
    """Return a CAD's weights with positions for latents of another `size`: a new dict.

    weights: a state dict. size, patch: as in CAD's arguments, of the network to be loaded.

    CAD learns one vector for each place of its grid. They are taken for a picture with D_x
    channels and enlarged or reduced (bicubic), so that a network trained on 256 x 256 pixels
    can go on with 512 x 512. All else in CAD works at any size. Raises ValueError if
    `size` is not a multiple of `patch`.
    """
    if size % patch:
        raise ValueError(f"size {size} is not a multiple of patch {patch}")
    n = size // patch
    position = weights["position"]                                   # (n_old * n_old, D_x)
    n_old = round(len(position) ** 0.5)
    if n == n_old:
        return dict(weights)
    grid = position.float().T.reshape(1, -1, n_old, n_old)           # (1, D_x, n_old, n_old)
    grid = F.interpolate(grid, (n, n), mode="bicubic", antialias=True)
    resized = grid.flatten(2)[0].T.contiguous()                      # (n * n, D_x)
    return {**weights, "position": resized.to(position.dtype)}


# --------------------------------------------------------------------------------------
# The released format

# Sizes in the released config.json, and our name for each.
RELEASED_SIZES = {
    "data_size": "size",
    "num_input_channels": "channels",
    "path_size": "patch",
    "label_dim": "text_dim",
    "num_latents": "num_latents",
    "latents_dim": "dim",
    "data_dim": "data_dim",
    "num_blocks": "depth",
    "num_processing_layers": "layers",
    "compute_heads": "heads",
    "read_write_heads": "read_write_heads",
    "latent_mlp_multiplier": "mlp_ratio",
    "data_mlp_multiplier": "data_mlp_ratio",
    "num_text_registers": "registers",
}

# What CAD-I chose where the released code offers a choice. Any other value is another
# network, which is not implemented here.
RELEASED_CHOICES = {
    "use_cond_rin_block": True,
    "concat_cond_token_to_latents": False,
    "use_cond_token": True,
    "noise_embedding_type": "positional",
    "data_positional_embedding_type": "learned",
    "time_scaling": 1000,
    "use_biases": True,
    "modulate_conditioning": False,
    "retrieve_attention_scores": False,
    "rw_dropout": 0,
    "compute_dropout": 0,
    "rw_stochastic_depth": 0,
    "compute_stochastic_depth": 0,
}

# Keys that change nothing in a trained network.
RELEASED_HARMLESS = {
    "num_cond_tokens", "weight_init", "bias_init", "use_16_bits_layer_norm", "architectures",
    "model_type", "torch_dtype", "dtype", "transformers_version", "license", "tags",
    "repo_url", "pipeline_tag",
}

# Parts of the released tensors' names and ours, replaced in this order.
RELEASED_NAMES = [
    ("rin_blocks.", "blocks."),
    ("transformers_blocks.", "refine."),
    ("processer_sa.", "process."),
    ("retrieve_cond.", "read_text."),
    ("retriever_ca.", "read_data."),
    ("writer_ca.", "write_data."),
    (".initial_to_ln.", ".norm1."),
    (".initial_ln.", ".norm1."),
    (".middle_ln.", ".norm2."),
    (".ffn.0.", ".mlp.0."),
    (".ffn.3.", ".mlp.2."),
    (".sa.", "."),
    (".ca.", "."),
    ("layer_scale_", "scale"),
    ("time_embedder.map_time.", "time_embed.mlp."),
    ("coherence_embedder.map_time.", "coherence_embed.mlp."),
    ("coherence_positional_embedding", "coherence_position"),
    ("linear_previous.1.3.", "previous_mlp.1.2."),
    ("linear_previous.", "previous_mlp."),
    ("ln_previous.", "previous_norm."),
    ("data_ln.", "data_norm."),
    ("data_pos_embedding", "position"),
    ("patch_extractor.", "patch_embed."),
    ("text_registers", "registers"),
    ("map_text_tokens.", "text_embed."),
    ("map_tokens_to_patches.", "out."),
]

# Constants that the released code stores beside the weights.
RELEASED_CONSTANTS = ("attention_mask_dummy", "cond_mask", "coherence_mask", "freqs")


def from_released(config, weights):
    """Translate a released config.json and its tensors: (arguments of CAD, its state dict).

    Raises ValueError, which names the key, if the config describes another network.
    """
    known = RELEASED_SIZES.keys() | RELEASED_CHOICES.keys() | RELEASED_HARMLESS
    for key, value in config.items():
        if key in RELEASED_CHOICES and value != RELEASED_CHOICES[key]:
            raise ValueError(f"{key} = {value!r} is another network than CAD-I "
                             f"({RELEASED_CHOICES[key]!r})")
        # An unknown option that is off (0 as well, which equals False) does no harm.
        is_off = value in (None, False)
        if key not in known and not key.startswith("_") and not is_off:
            raise ValueError(f"unknown key {key!r}")

    arguments = {}
    for released, ours in RELEASED_SIZES.items():
        if released in config:
            arguments[ours] = config[released]

    state_dict = {}
    for released_name, tensor in weights.items():
        if released_name.endswith(RELEASED_CONSTANTS):
            continue
        name = released_name
        for released, ours in RELEASED_NAMES:
            name = name.replace(released, ours)
        state_dict[name] = tensor
    return arguments, state_dict
