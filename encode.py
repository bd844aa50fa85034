"""Stage 3, encoding (paper 4.1, Appendix A): images -> VAE moments, captions -> T5 tokens, once, in shards.

    python encode.py --images imagenet/train --captions captions.jsonl --out encoded/train
"""

import inspect
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from cutmix import UserError


# ---------------------------------------------------------------------------------------------------------------
# The autoencoder

class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, and a residual connection; (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention of one head over all positions, where the picture is smallest; (B, C, H, W) -> the same."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).mT                                         # (B, H*W, C)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # one head
        return x + self.to_out[0](h).mT.reshape(x.shape)


class Resample(nn.Module):
    """Half or double the resolution. The padding on the right and bottom only is Stable Diffusion's."""

    def __init__(self, channels, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution, then (except at the last level) the step to the next one."""

    def __init__(self, c_in, c_out, blocks, groups, step):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
        if step:
            setattr(self, step, nn.ModuleList([Resample(c_out, up=step == "upsamplers")]))
        self.step = step

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        return getattr(self, self.step)[0](x) if self.step else x


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Coder(nn.Module):
    """The encoder (`widths` from the finest level to the coarsest) or the decoder (from the coarsest)."""

    def __init__(self, c_in, c_out, widths, blocks, groups, decoder):
        super().__init__()
        steps = ["upsamplers" if decoder else "downsamplers"] * (len(widths) - 1) + [None]
        levels = nn.ModuleList(Level(a, b, blocks, groups, step)
                               for a, b, step in zip(widths[:1] + widths[:-1], widths, steps))
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.up_blocks, self.down_blocks = (levels, None) if decoder else (None, levels)
        self.mid_block = MidBlock(widths[0] if decoder else widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in ([self.mid_block, *self.up_blocks] if self.up_blocks else [*self.down_blocks, self.mid_block]):
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's KL autoencoder (Rombach et al. 2022); module names are those of diffusers' files.

    Latents go in and out **unscaled**; `scaling_factor` is what the diffusion model multiplies them with.
    `patch_size` > 1 (the toy's) folds p x p pixels into channels first, so that no convolution runs at full size.
    """

    def __init__(self, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512),
                 layers_per_block=2, norm_num_groups=32, scaling_factor=0.18215, patch_size=1):
        super().__init__()
        widths, p = list(block_out_channels), patch_size
        self.config = dict(in_channels=in_channels, out_channels=out_channels, latent_channels=latent_channels,
                           block_out_channels=widths, layers_per_block=layers_per_block,
                           norm_num_groups=norm_num_groups, scaling_factor=scaling_factor, patch_size=p)
        self.scaling_factor, self.patch_size = scaling_factor, p
        self.downscale = p * 2 ** (len(widths) - 1)                 # pixels per latent, along a side
        self.encoder = Coder(in_channels * p * p, 2 * latent_channels, widths, layers_per_block,
                             norm_num_groups, decoder=False)
        self.decoder = Coder(latent_channels, out_channels * p * p, widths[::-1], layers_per_block + 1,
                             norm_num_groups, decoder=True)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> mean and standard deviation of the latents, each (B, C, H / 8, W / 8)."""
        mean, log_variance = self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.patch_size))).chunk(2, 1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()

    def decode(self, latents):
        """(B, C, h, w) unscaled latents -> (B, 3, 8 h, 8 w), about [-1, 1]."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(latents)), self.patch_size)


def load_vae(path_or_repo, device="cpu", dtype=torch.float32):
    """A folder or hub repository in diffusers' format -> AutoencoderKL in eval mode.

    Reads the older folders too: config without `scaling_factor`, attention named query/key/value/proj_attn with
    1 x 1 convolutions' weights, `.bin` where there is no safetensors file (read with `weights_only=True`).
    Raises UserError where the folder is not an AutoencoderKL's or a tensor does not fit."""
    config = json.loads(fetch(path_or_repo, "config.json").read_text())
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or "block_out_channels" not in config:
        raise UserError(f"{path_or_repo}: config.json is not that of an AutoencoderKL")
    known = inspect.signature(AutoencoderKL).parameters
    vae = AutoencoderKL(**{k: v for k, v in config.items() if k in known})
    weights = load_file(fetch(path_or_repo, "diffusion_pytorch_model.safetensors"))
    old = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    for name in list(weights):
        new = name
        for a, b in old.items():
            new = new.replace(a, b)
        weights[new] = weights.pop(name)
        if ".attentions." in new and weights[new].ndim == 4:
            weights[new] = weights[new][:, :, 0, 0]
    try:
        vae.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path_or_repo}: the weights do not fit config.json ({str(error).splitlines()[1].strip()})")
    return vae.eval().requires_grad_(False).to(device, dtype)
