"""Stage 3, encoding (paper 4.1, Appendix A): images to VAE moments, captions to T5 tokens.

    python encode.py --images imagenet/train --captions captions.jsonl --out encoded/train

Training reads every image many dozens of times, so the work of the two frozen encoders is
done once, here. What is kept of an image is the mean and the standard deviation of its
latents: training draws x_0 from them, anew each time. What is kept of a caption is the last
hidden states of T5's encoder, at most 256 tokens, without padding. There are no flipped
copies, because captions say left and right.

The folder OUT gets 00000.safetensors, ... (shards of images in sorted order),
null.safetensors (the empty prompt), skipped.jsonl (what was left out, and why) and at last
meta.json. Several processes or nodes share the work if this is started under torchrun.
A killed command goes on when it is started again. `--check encoded/train` verifies every
number of every shard, says how the latents are distributed and draws four images.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import math
import os
from bisect import bisect_right
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import (HelpFormatter, UserError, at_least, begin_or_resume, command_line, complete,
                    contact_sheet, default_workers, fetch, is_last_rank, list_images, load_image,
                    local_device, one_line, only_command, rank_and_world, read_captions, read_json,
                    read_jsonl, shorten, to_images, write_jsonl)

# --------------------------------------------------------------------------------------
# The autoencoder

class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a residual connection: C_in to C_out channels."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        same = c_in == c_out
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                        # (B, C_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))                        # (B, C_out, H, W)
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Self-attention of one head over all positions, (B, C, H, W) to the same shape."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A list of one, because diffusers' files call it "to_out.0".
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).mT                    # (B, H * W, C)
        q = self.to_q(tokens)[:, None]                               # (B, 1 head, H * W, C)
        k = self.to_k(tokens)[:, None]
        v = self.to_v(tokens)[:, None]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]            # (B, H * W, C)
        h = self.to_out[0](h).mT.reshape(x.shape)                    # (B, C, H, W)
        return x + h


class Downsample(nn.Module):
    """Halve the resolution: (B, C, H, W) -> (B, C, H / 2, W / 2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        # Padding on the right and at the bottom only, as Stable Diffusion was trained.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: (B, C, H, W) -> (B, C, 2 H, 2 W)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))


def resnet_blocks(c_in, c_out, count, groups):
    """Return `count` ResnetBlocks; the first one changes the number of channels."""
    widths = [c_in] + [c_out] * (count - 1)
    return nn.ModuleList(ResnetBlock(width, c_out, groups) for width in widths)


class Level(nn.ModuleDict):
    """The layers of one resolution, in order: lists that are named as in diffusers' files."""

    def forward(self, x):
        for layers in self.values():
            for layer in layers:
                x = layer(x)
        return x


def make_levels(widths, blocks, groups, step, steps_name):
    """Return one Level for each width, all but the last with a `step` to the next resolution."""
    levels = nn.ModuleList()
    for i, width in enumerate(widths):
        before = widths[max(i - 1, 0)]
        layers = {"resnets": resnet_blocks(before, width, blocks, groups)}
        if i < len(widths) - 1:
            layers[steps_name] = nn.ModuleList([step(width)])
        levels.append(Level(layers))
    return levels


class MidBlock(nn.Module):
    """The blocks at the coarsest resolution, where every position sees all others."""

    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = resnet_blocks(channels, channels, 2, groups)
        self.attentions = nn.ModuleList([AttentionBlock(channels, groups)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Pixels (B, c_in, H, W) to moments (B, c_out, h, w); `widths`, finest level first."""

    def __init__(self, c_in, c_out, widths, blocks, groups):
        super().__init__()
        levels = make_levels(widths, blocks, groups, Downsample, "downsamplers")
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.down_blocks = levels
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (B, c_in, h, w) to pixels (B, c_out, H, W); `widths`, coarsest level first."""

    def __init__(self, c_in, c_out, widths, blocks, groups):
        super().__init__()
        levels = make_levels(widths, blocks, groups, Upsample, "upsamplers")
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.up_blocks = levels
        self.mid_block = MidBlock(widths[0], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid_block(x)
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's KL autoencoder (Rombach et al. 2022).

    The modules are named as in diffusers' files. Latents go in and out **unscaled**;
    `scaling_factor` is what the diffusion model multiplies them with. `patch_size` above 1
    (the toy's) folds p x p pixels into channels, so that no convolution runs at full size.
    """

    def __init__(self, in_channels=3, out_channels=3, latent_channels=4,
                 block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                 norm_num_groups=32, scaling_factor=0.18215, patch_size=1):
        super().__init__()
        widths = list(block_out_channels)
        self.config = {
            "in_channels": in_channels, "out_channels": out_channels,
            "latent_channels": latent_channels, "block_out_channels": widths,
            "layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups,
            "scaling_factor": scaling_factor, "patch_size": patch_size,
        }
        self.scaling_factor = scaling_factor
        self.patch_size = patch_size
        # Pixels for each latent, along a side.
        self.downscale = patch_size * 2 ** (len(widths) - 1)

        folded = patch_size * patch_size
        self.encoder = Encoder(in_channels * folded, 2 * latent_channels, widths,
                               layers_per_block, norm_num_groups)
        self.decoder = Decoder(latent_channels, out_channels * folded, widths[::-1],
                               layers_per_block + 1, norm_num_groups)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images):
        """Return mean and standard deviation of the latents, each (B, C, H / 8, W / 8).

        images: (B, 3, H, W) in [-1, 1].
        """
        images = F.pixel_unshuffle(images, self.patch_size)          # (B, 3 p p, H / p, W / p)
        moments = self.quant_conv(self.encoder(images))              # (B, 2 C, h, w)
        mean, log_variance = moments.chunk(2, dim=1)                 # (B, C, h, w) each
        std = (0.5 * log_variance.clamp(-30, 20)).exp()
        return mean, std

    def decode(self, latents):
        """Return images (B, 3, 8 h, 8 w) in about [-1, 1] for unscaled latents (B, C, h, w)."""
        images = self.decoder(self.post_quant_conv(latents))         # (B, 3 p p, H / p, W / p)
        return F.pixel_shuffle(images, self.patch_size)              # (B, 3, H, W)


# --------------------------------------------------------------------------------------
# The encoders, from a folder or from the hub, and how their tokens are stored

# What the parts of the attention were called in diffusers before version 0.17.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_vae(path_or_repo, device="cpu", dtype=torch.float32):
    """Return an AutoencoderKL in eval mode from a folder or hub repository of diffusers' format.

    Reads old folders too: without `scaling_factor`, with other names in the attention, and
    with 1 x 1 convolutions in place of its linear layers. Raises UserError.
    """
    config_file = fetch(path_or_repo, "config.json")
    weights_file = fetch(path_or_repo, "diffusion_pytorch_model.safetensors")
    arguments = inspect.signature(AutoencoderKL).parameters
    # Anything may be wrong: half a download, other shapes, text in place of numbers.
    try:
        config = json.loads(config_file.read_text())
        known = {name: value for name, value in config.items() if name in arguments}
        vae = AutoencoderKL(**known)
        vae.load_state_dict(translate_vae(load_file(weights_file)))
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{path_or_repo}: no AutoencoderKL of diffusers ({one_line(error)})")
    return vae.eval().requires_grad_(False).to(device, dtype)


def translate_vae(weights):
    """Return a state dict of diffusers, old or new, with today's names and shapes."""
    translated = {}
    for name, tensor in weights.items():
        parts = [OLD_ATTENTION_NAMES.get(part, part) for part in name.split(".")]
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]                              # (C, C, 1, 1) -> (C, C)
        translated[".".join(parts)] = tensor
    return translated


def load_text_encoder(path_or_repo, device="cpu", dtype=torch.float32):
    """Return (tokenizer, T5's encoder in eval mode), local or from the hub. Raises UserError."""
    from transformers import AutoTokenizer, T5EncoderModel
    fetch(path_or_repo, "config.json")
    # transformers raises almost any exception if the folder is wrong.
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_repo)
        t5, report = T5EncoderModel.from_pretrained(path_or_repo, dtype=dtype,
                                                    output_loading_info=True)
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{path_or_repo}: not a T5 with its tokenizer ({one_line(error)})")
    # What the file lacks, transformers fills with random numbers.
    random = [*report["missing_keys"], *report["mismatched_keys"]]
    if random:
        raise UserError(f"{path_or_repo}: not a T5's weights ({random[0]} is missing or wrong)")
    return tokenizer, t5.eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode_text(tokenizer, t5, captions, max_tokens=256):
    """Return T5's last hidden states of B captions, (B, L, D), and their mask (B, L) bool.

    The mask is True where there is a token. A caption of more than `max_tokens` tokens
    (paper: 256) loses its end. The empty prompt is one token, </s>.
    """
    tokens = tokenizer(list(captions), padding=True, truncation=True, max_length=max_tokens,
                       return_tensors="pt")
    tokens = tokens.to(t5.device)                                    # (B, L)
    output = t5(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    return output.last_hidden_state, tokens.attention_mask.bool()


def fingerprint(rows, weights=()):
    """Return 16 hexadecimal digits that tell lists of JSON values, and networks, apart.

    weights: (name, tensor) of a network. The first 256 values of each tensor count: whoever
    trains a network further changes all of its tensors.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    for name, tensor in weights:
        digest.update(f"{name} {tensor.flatten()[:256].tolist()}".encode())
    return digest.hexdigest()[:16]


def fingerprint_of_t5(tokenizer, t5):
    """Return a text encoder's fingerprint, the same in float32 (CPU) and bfloat16 (CUDA).

    For that, the weights are rounded to bfloat16 first.
    """
    rounded = [(name, tensor.flatten()[:256].bfloat16()) for name, tensor in t5.state_dict().items()]
    return fingerprint(sorted(tokenizer.get_vocab().items()), rounded)


# The number that each of the 256 bytes stands for in float8 (e4m3).
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def store_text(text, text_dtype):
    """Return the tensors that a shard keeps of tokens (n, D), by name.

    float8 takes half the disk, for an error of 2.7% (root mean square). It is e4m3 with one
    "scale" (n, 1) a token, so that a large value costs only its own token precision.
    """
    if text_dtype == "bfloat16":
        return {"text": text.bfloat16()}
    text = text.float()
    largest = text.abs().amax(1, keepdim=True).clamp(min=1e-20)      # (n, 1)
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    return {"text": (text / scale).to(torch.float8_e4m3fn), "scale": scale}


def restore_text(text, scale=None):
    """Return tokens (n, D) bfloat16 from what `store_text` made of them.

    For float8 this is `(text.float() * scale).bfloat16()`. Looking the bytes up in a table
    takes a quarter of the time.
    """
    if scale is None:
        return text
    as_bytes = text.view(torch.uint8).int().flatten()                # (n * D,)
    values = E4M3.index_select(0, as_bytes).view(text.shape)         # (n, D)
    return (values * scale).bfloat16()


# --------------------------------------------------------------------------------------
# Reading an encoded data set

# Version 1 had another fingerprint of T5, which depended on its precision, and no
# `shard_hashes`, `captions`, `cutmix` and `mean_tokens`. It is still read.
VERSION = 2

# What meta.json must say. counts: the images in each shard, count: all of them. longest: the
# tokens of the longest caption. latent_shape: [C, h, w].
META_KINDS = {
    "version": int, "size": int, "vae": str, "text_encoder": str, "text_dtype": str,
    "text_dim": int, "latent_shape": list, "scaling_factor": (int, float),
    "shards": int, "counts": list, "count": int, "longest": int,
}

REMEDY = "delete it and run its encode.py command again"
FOREIGN = "of another list of images and captions, or of other encoders"


def shard_name(k):
    """Return the name of the file of shard k."""
    return f"{k:05d}.safetensors"


def read_meta(folder):
    """Return an encoded data set's meta.json, if it adds up. Raises UserError."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(f"{folder}: not an encoded data set, or not a finished one (no meta.json)")
    meta = read_json(path, "the description of an encoded data set")
    fault = fault_of_meta(meta)
    if fault:
        raise UserError(f"{path}: {fault}: {REMEDY}")
    return meta


def fault_of_meta(meta):
    """Return what is wrong with the content of a meta.json, or None."""
    for key, kind in META_KINDS.items():
        value = meta.get(key)
        is_number = isinstance(value, (int, float))
        if not isinstance(value, kind) or is_number and not 0 < value < math.inf:
            return f"{key} is {shorten(value)}"
    if meta["version"] > VERSION:
        return f"made by a newer encode.py (version {meta['version']}, here {VERSION})"
    if meta["text_dtype"] not in ("bfloat16", "float8"):
        return f"text_dtype is {shorten(meta['text_dtype'])}"

    shape = meta["latent_shape"]
    if len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
        return f"latent_shape is {shorten(shape)}"
    counts = meta["counts"]
    if not all(type(count) is int and count >= 0 for count in counts):
        return f"counts is {shorten(counts)}, not numbers of images"
    if len(counts) != meta["shards"]:
        return f"counts has {len(counts)} entries for {meta['shards']} shards"
    if sum(counts) != meta["count"]:
        return f"counts adds up to {sum(counts)} and count is {meta['count']}"

    hashes = meta.get("shard_hashes")
    if hashes is not None and not (isinstance(hashes, list) and len(hashes) == len(counts)):
        return f"shard_hashes is {shorten(hashes)}"
    return None


def read_tensors(path):
    """Return a safetensors file's tensors, views into its memory map. Raises UserError.

    The file is closed: two data sets of 800 shards would exceed the usual 1,024 open files.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path.parent}: {path.name} is missing, run its encode.py command again")
    try:
        with safe_open(path, "pt") as file:
            # Not a dict, although it has keys.
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}): {REMEDY}") from None


def hash_of_header(path):
    """Return 16 hexadecimal digits that tell one shard from another.

    A file begins with its header's length and the header: files, captions, shapes, settings.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return hashlib.sha256(file.read(length)).hexdigest()[:16]


def open_shard(folder, meta, k):
    """Return the tensors of shard k, checked against meta.json. Raises UserError.

    mean, std: (n, C, h, w) float16. text: (sum of L_i, D), and scale if it is float8. offset:
    (n + 1,) int64, where each caption's tokens begin. Only the header and `offset` are read.
    """
    path = Path(folder) / shard_name(k)
    tensors = read_tensors(path)
    fault = fault_of_shard(tensors, meta, meta["counts"][k])
    hashes = meta.get("shard_hashes")
    if not fault and hashes and hash_of_header(path) != hashes[k]:
        fault = FOREIGN
    if fault:
        raise UserError(f"{path}: damaged ({fault}): {REMEDY}")
    return tensors


def fault_of_shard(tensors, meta, count):
    """Return what is wrong with the tensors of a shard of `count` images, or None."""
    moments = [count, *meta["latent_shape"]]
    tokens = len(tensors.get("text", ()))
    expected = {
        "mean": (torch.float16, moments),
        "std": (torch.float16, moments),
        "offset": (torch.int64, [count + 1]),
        "text": (torch.bfloat16, [tokens, meta["text_dim"]]),
    }
    if meta["text_dtype"] == "float8":
        expected["text"] = (torch.float8_e4m3fn, [tokens, meta["text_dim"]])
        expected["scale"] = (torch.float32, [tokens, 1])
    fault = fault_of_tensors(tensors, expected)
    if fault:
        return fault

    offset = tensors["offset"]
    lengths = offset.diff()
    if offset[0] != 0 or (lengths < 1).any() or (lengths > meta["longest"]).any():
        return f"offset does not hold captions of 1 to {meta['longest']} tokens"
    if offset[-1] != tokens:
        return f"offset ends at {offset[-1]} of {tokens} tokens"
    return None


def fault_of_tensors(tensors, expected):
    """Return how tensors differ from what is expected, {name: (dtype, shape)}, or None."""
    for name, (dtype, shape) in expected.items():
        if name not in tensors:
            return f"no {name}"
        tensor = tensors[name]
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}"
    return None


def read_null(folder, meta):
    """Return the tokens of the empty prompt, (1, D) bfloat16. Raises UserError."""
    path = Path(folder) / "null.safetensors"
    tensors = read_tensors(path)
    tokens = max(1, len(tensors.get("text", ())))
    fault = fault_of_tensors(tensors, {"text": (torch.bfloat16, [tokens, meta["text_dim"]])})
    if not fault and not tensors["text"].isfinite().all():
        fault = "values are not finite"
    expected = meta.get("null_hash")                                 # not in older data sets
    if not fault and expected and hash_of_header(path) != expected:
        fault = FOREIGN
    if fault:
        raise UserError(f"{path}: damaged ({fault}): {REMEDY}")
    return tensors["text"].clone()


def samples_of(path):
    """Return a shard's lists "files", "captions", "skipped", and its "settings". Raises UserError."""
    try:
        with safe_open(path, "pt") as file:
            samples = json.loads(file.metadata()["samples"])
        samples.setdefault("settings", None)                         # as in older shards
        return {key: samples[key] for key in ("files", "captions", "skipped", "settings")}
    except (SafetensorError, OSError, TypeError, ValueError, KeyError):
        raise UserError(f"{path}: damaged (no list of samples): {REMEDY}") from None


class Encoded:
    """An encoded data set, read through memory maps: a sample costs little more than its bytes.

    `len(data)` is its number of images, `data.meta` its meta.json and `data.null` (1, D)
    bfloat16 the tokens of the empty prompt. The methods take a sample's number.

    All shards are opened at once and their headers checked, so that damaged, swapped or
    missing ones are refused here and not after hours of training. Raises UserError.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.null = read_null(folder, self.meta)
        self.shards = [open_shard(folder, self.meta, k) for k in range(self.meta["shards"])]
        # Indexing a numpy array takes a tenth of the time of indexing a tensor.
        self.offsets = [shard["offset"].numpy() for shard in self.shards]
        # Each shard's first sample. A shard with broken images is shorter than others.
        self.starts = [0, *itertools.accumulate(self.meta["counts"])]

    def __reduce__(self):
        # A process that is not forked opens the files itself: maps cannot be pickled.
        return Encoded, (self.folder,)

    def __len__(self):
        return self.meta["count"]

    def locate(self, i):
        """Return the number of the shard that sample i is in, and its number in there."""
        k = bisect_right(self.starts, i) - 1
        return k, i - self.starts[k]

    def moments(self, i):
        """Return mean and standard deviation of the unscaled latents, each (C, h, w) float32."""
        k, j = self.locate(i)
        shard = self.shards[k]
        return shard["mean"][j].float(), shard["std"][j].float()

    def text(self, i):
        """Return the caption's tokens, (L_i, D) bfloat16: in bfloat16 files, a view into them."""
        k, j = self.locate(i)
        shard = self.shards[k]
        start = self.offsets[k][j]
        end = self.offsets[k][j + 1]
        if "scale" in shard:
            return restore_text(shard["text"][start:end], shard["scale"][start:end])
        return shard["text"][start:end]

    def sample(self, i):
        """Return (file, caption). The file is a path relative to the folder of images."""
        k, j = self.locate(i)
        samples = samples_of(self.folder / shard_name(k))
        return samples["files"][j], samples["captions"][j]

    def caption(self, i):
        """Return the caption."""
        return self.sample(i)[1]


def refuse_other_encoders(original, augmented):
    """Raise UserError if two data sets (Encoded) come from different encoders or sizes.

    The precision in which T5 ran is not compared: rounding is not another encoder.
    """
    a = original.meta
    b = augmented.meta
    keys = ["latent_shape", "text_dim", "scaling_factor", "autoencoder", "T5"]
    # In version 1 T5's fingerprint depended on its precision.
    same_precision = a.get("precision_of_T5") == b.get("precision_of_T5")
    if a["version"] != b["version"] or a["version"] == 1 and not same_precision:
        keys.remove("T5")
    for key in keys:
        if a.get(key) != b.get(key):
            raise UserError(f"{original.folder} and {augmented.folder} differ in {key} "
                            f"({shorten(a.get(key))} and {shorten(b.get(key))}): encode both "
                            "with the same encoders")


# --------------------------------------------------------------------------------------
# Making one, and checking it

def pair_up(files, captions):
    """Return [(file, caption)] in the files' order, and rows of skipped.jsonl.

    files: all images. captions: {file: caption}. A caption that names a file without its
    folder (the paper's .tsv) goes to the only image of that name.
    """
    pairs = []
    skipped = []
    used = set()
    images_called = Counter(os.path.basename(file) for file in files)
    for file in files:
        name = os.path.basename(file)
        key = file
        if file not in captions and images_called[name] == 1:
            key = name
        used.add(key)
        if captions.get(key):
            pairs.append((file, captions[key]))
        else:
            skipped.append({"file": file, "reason": "no caption"})

    for file in captions:
        if file not in used:
            several = images_called[file] > 1
            why = "images of this name in several folders" if several else "no such image"
            skipped.append({"file": file, "reason": f"caption, but {why}"})
    return pairs, skipped


class Pictures(Dataset):
    """Batches of images, decoded by the DataLoader's workers.

    batches: lists of (file, caption). A batch is returned as pixels (n, size, size, 3) uint8,
    the pairs of images that could be read, and rows of skipped.jsonl for the others.
    """

    def __init__(self, folder, size, batches):
        self.folder = folder
        self.size = size
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        pictures = []
        kept = []
        skipped = []
        for file, caption in self.batches[number]:
            path = f"{self.folder}/{file}"
            try:
                pictures.append(np.asarray(load_image(path, self.size)))
                kept.append((file, caption))
            except OSError as error:
                skipped.append({"file": file, "reason": str(error).removeprefix(f"{path}: ")})
        pixels = np.array(pictures, np.uint8)
        return pixels.reshape(-1, self.size, self.size, 3), kept, skipped


def encode_captions(tokenizer, t5, captions, args):
    """Return the tensors that keep the tokens of a shard's captions, by name.

    Captions are encoded in batches of about the same length, so that little is padded, and
    equal ones once ("An image of tench" comes 1,300 times). The batches depend on nothing
    but the shard's captions, and so do its bytes.
    """
    different = sorted(set(captions), key=lambda caption: (len(caption), caption))
    tokens = {}
    for batch in split(different, args.batch_size):
        text, mask = encode_text(tokenizer, t5, batch, args.max_tokens)
        unpadded = text[mask].cpu()                                  # (sum of L_i, D)
        lengths = mask.sum(1).tolist()
        tokens.update(zip(batch, unpadded.split(lengths)))

    # No tokens stand before the first caption, so that the offsets begin with 0.
    texts = [torch.empty(0, t5.config.d_model)]
    texts += [tokens[caption] for caption in captions]               # (L_i, D) each
    # Where each caption's tokens begin, and where the last ones end.
    tensors = {"offset": torch.tensor([len(text) for text in texts]).cumsum(0)}
    stored = [store_text(text, args.text_dtype) for text in texts]
    for name in stored[0]:
        tensors[name] = torch.cat([parts[name] for parts in stored])
    return tensors


def split(rows, size):
    """Return a list as a list of lists of `size` rows; the last may be shorter."""
    return [rows[start:start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def make_shards(args, settings, parts, shards, vae, tokenizer, t5, bar):
    """Make the shards with these numbers, while the workers decode what comes next.

    parts: for each shard of the data set, its list of (file, caption).
    """
    device = vae.quant_conv.weight.device
    batches = {k: split(parts[k], args.batch_size) for k in shards}
    pictures = Pictures(args.images, args.size, list(itertools.chain(*batches.values())))
    # As they are (a tuple), numpy arrays come from the workers through a pipe. Tensors, which a
    # DataLoader would make of them, wait for ever where shared memory is full.
    decoded = iter(DataLoader(pictures, batch_size=None, collate_fn=tuple,
                              num_workers=args.workers))

    for k in shards:
        means = []
        stds = []
        kept = []
        skipped = []
        for batch in batches[k]:
            pixels, readable, broken = next(decoded)
            x = torch.from_numpy(pixels).to(device)                  # (n, size, size, 3)
            x = x.permute(0, 3, 1, 2) / 127.5 - 1                    # (n, 3, size, size)
            mean, std = vae.encode(x)                                # (n, C, h, w) each
            means.append(mean.half().contiguous().cpu())
            stds.append(std.half().contiguous().cpu())
            kept += readable
            skipped += broken
            bar.update(len(batch))
        files = [file for file, _ in kept]
        captions = [caption for _, caption in kept]
        tensors = {"mean": torch.cat(means), "std": torch.cat(stds),
                   **encode_captions(tokenizer, t5, captions, args)}
        # One entry of metadata: safetensors writes several in random order, and a shard that
        # is made again must have the same bytes.
        samples = {"files": files, "captions": captions, "skipped": skipped, "settings": settings}
        with complete(args.out / shard_name(k), durable=True) as temporary:
            temporary.write_bytes(save(tensors, {"samples": json.dumps(samples)}))


def describe_shards(out, settings, parts):
    """Return what meta.json says of finished shards, and their rows of skipped.jsonl.

    Raises UserError if a shard is torn, or does not hold its part of this data set.
    """
    counts = []
    hashes = []
    skipped = []
    lengths = []
    for k, part in enumerate(parts):
        path = out / shard_name(k)
        tensors = read_tensors(path)
        samples = samples_of(path)
        broken = {row["file"] for row in samples["skipped"]}
        expected = [pair for pair in part if pair[0] not in broken]
        found = list(zip(samples["files"], samples["captions"]))
        of_others = found != expected or samples["settings"] not in (None, settings)
        if of_others or "offset" not in tensors:
            raise UserError(f"{path}: damaged ({FOREIGN}): {REMEDY}")
        counts.append(len(expected))
        hashes.append(hash_of_header(path))
        skipped += samples["skipped"]
        lengths += tensors["offset"].diff().tolist()
    # The paper's short captions are "An image of <class-name>".
    all_aio = all(caption.startswith("An image of ") for part in parts for _, caption in part)
    description = {
        "shards": len(parts),
        "counts": counts,
        "count": sum(counts),
        "shard_hashes": hashes,
        "longest": max(lengths, default=1),
        "mean_tokens": round(sum(lengths) / max(1, len(lengths)), 2),
        "captions": "aio" if all_aio else "long",
    }
    return description, skipped


def cutmix_settings(images):
    """Return the sorted CutMix settings of a folder of composites, None for other images."""
    path = Path(images) / "cutmix.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    return sorted({str(row.get("setting")) for row in rows}) or None


# Bounds of |x_0| in common use, for the report of --check (sample.py --clamp).
CLAMPS = [1.0, 1.2, 3.0]


def check(folder):
    """Verify all shards, report on the latents and draw four images. Raises UserError."""
    folder = Path(folder)
    meta = read_meta(folder)
    damaged = 0
    for k in tqdm(range(meta["shards"]), desc="check", unit="shard"):
        try:
            shard = open_shard(folder, meta, k)
            refuse_non_finite(folder / shard_name(k), shard)
        except UserError as error:
            damaged += 1
            tqdm.write(str(error))
    if damaged:
        raise UserError(f"{folder}: {damaged} of {meta['shards']} shards are damaged: delete them "
                        "and run its encode.py command again")

    data = Encoded(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {len(data)} pictures of {meta['size']} pixels, {meta['shards']} shards, "
          f"{size / 2 ** 30:.2f} GiB")
    print(f"  latents {' x '.join(map(str, meta['latent_shape']))}, from {meta['vae']}")
    print(f"  text    {meta['text_dim']} wide, {meta['text_dtype']}, at most {meta['longest']} "
          f"tokens, from {meta['text_encoder']}")
    print_latents(data)
    draw_four(data)


def refuse_non_finite(path, shard):
    """Raise UserError, which names the image, if a number of a shard is not finite."""
    offset = shard["offset"].tolist()
    for j in range(len(offset) - 1):
        tokens = slice(offset[j], offset[j + 1])
        scale = shard["scale"][tokens] if "scale" in shard else None
        text = restore_text(shard["text"][tokens], scale)            # (L_j, D)
        numbers = [shard["mean"][j], shard["std"][j], text]
        if not all(tensor.isfinite().all() for tensor in numbers):
            file = samples_of(path)["files"][j]
            raise UserError(f"{path}: damaged (values of {file} are not finite): {REMEDY}")


def print_latents(data):
    """Print mean and deviation of each latent channel, and what a clamp of x_0 would cut.

    The numbers are those of x_0 as training draws it, mean + std * noise; "scaled" is times
    the scaling factor, as the diffusion model sees it. sample.py clamps its estimate of the
    scaled x_0 to +-c; if that cuts many values of real latents, it costs contrast.
    """
    channels = data.meta["latent_shape"][0]
    scaling = data.meta["scaling_factor"]
    # Of each channel: the mean, the mean square, and the share beyond each clamp.
    averages = torch.zeros(2 + len(CLAMPS), channels, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for i in tqdm(range(len(data)), desc="latents", unit="img"):
        mean, std = data.moments(i)                                  # (C, h, w)
        x_0 = mean + std * torch.randn(mean.shape, generator=generator)
        x_0 = x_0.flatten(1).double()                                # (C, h * w)
        beyond = [(x_0.abs() * scaling > clamp).double() for clamp in CLAMPS]
        values = torch.stack([x_0, x_0.square(), *beyond])           # (2 + clamps, C, h * w)
        averages += values.mean(2) / len(data)
    mean = averages[0]                                               # (C,)
    deviation = (averages[1] - mean.square()).sqrt()                 # (C,)
    beyond = averages[2:]                                            # (clamps, C)

    print(f"{'unscaled':>29}{'scaled':>20}{'share of |scaled| beyond':>30}")
    titles = ["mean", "deviation", "mean", "deviation", *(f"{clamp:g}" for clamp in CLAMPS)]
    print("  channel" + "".join(f"{title:>10}" for title in titles))
    row = "  {:7}" + "{:10.2f}" * 4 + "{:10.1%}" * len(CLAMPS)
    for c in range(channels):
        moments = [mean[c], deviation[c], scaling * mean[c], scaling * deviation[c]]
        print(row.format(c, *moments, *beyond[:, c]))
    print(("      all" + " " * 40 + "{:10.1%}" * len(CLAMPS)).format(*beyond.mean(1)))


def draw_four(data):
    """Draw check.png: four images, decoded, with their captions. Raises UserError."""
    vae = load_vae(data.meta["vae"])
    if fingerprint([vae.config], vae.state_dict().items()) != data.meta.get("autoencoder"):
        raise UserError(f"{data.meta['vae']}: not the autoencoder that {data.folder} was made with")
    pictures = []
    texts = []
    for i in np.linspace(0, len(data) - 1, min(len(data), 4)).astype(int).tolist():
        mean, _ = data.moments(i)                                    # (C, h, w)
        picture = to_images(vae.decode(mean[None]))[0]
        pictures.append(picture.resize((256, 256), Image.Resampling.BOX))
        texts.append(": ".join(data.sample(i)))
    lines = 2 + max(len(text) for text in texts) // 36
    sheet = contact_sheet(pictures, texts, columns=4, lines=lines)
    with complete(data.folder / "check.png") as temporary:
        sheet.save(temporary, "PNG")
    print(f"  {data.folder / 'check.png'}: {len(pictures)} of them, decoded")


# --------------------------------------------------------------------------------------
# The command

def arguments(argv):
    """Return the checked options of the command line. Raises UserError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--images", metavar="FOLDER", help="images: <class>/<file>, or all in one flat folder")
    add("--captions", nargs="+", metavar="FILE", help="JSONL, CSV or TSV; a later file wins")
    add("--out", metavar="FOLDER", type=Path, help="where the shards go")
    add("--vae", default="stabilityai/sd-vae-ft-ema", help="hub repository or diffusers folder")
    add("--text-encoder", default="google/flan-t5-xl", help="hub repository or folder of a T5")
    add("--size", type=int, default=256, help="side of the images, in pixels")
    add("--max-tokens", type=int, default=256, help="longer captions lose their end")
    add("--text-dtype", default="bfloat16", choices=["bfloat16", "float8"], help="on the disk")
    add("--shard-images", type=int, default=1600, help="images a shard; 1600 are about 1 GiB")
    add("--batch-size", type=int, default=64, help="images, or captions, encoded at once")
    add("--workers", type=int, default=default_workers(), help="processes that decode images; 0: just this")
    add("--check", metavar="FOLDER", help="verify this data set instead, and draw check.png")
    args = parser.parse_args(argv)
    if not args.check and not (args.images and args.captions and args.out):
        raise UserError("needs --images, --captions and --out (or --check FOLDER)")
    at_least(args, size=8, max_tokens=1, shard_images=1, batch_size=1, workers=0)
    return args


def main(argv=None):
    args = arguments(argv)
    if args.check:
        return check(args.check)
    rank, world = rank_and_world()

    captions = {}
    for path in args.captions:
        captions.update(read_captions(path))
    pairs, skipped = pair_up(list_images(args.images), captions)
    if not pairs:
        first_caption = next(iter(captions), "nothing")
        raise UserError(f"no image of {args.images} has a caption: images are named like "
                        f"{skipped[0]['file']}, in the captions like {first_caption} "
                        f"({skipped[-1]['reason']})")

    # What encodes it. On CUDA T5 runs in bfloat16. The autoencoder does not, because its means
    # would be 1.0 to 1.2% off (in TF32, CUDA's way to multiply float32, 0.2 to 0.5%).
    device = local_device()
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    vae = load_vae(args.vae, device)
    tokenizer, t5 = load_text_encoder(args.text_encoder, device, precision)
    if args.size % vae.downscale:
        raise UserError(f"--size {args.size}: this autoencoder needs a multiple of {vae.downscale}")

    # Everything that changes a byte of the shards. The same encoders may have another path.
    settings = {
        "version": VERSION,
        "size": args.size,
        "max_tokens": args.max_tokens,
        "text_dtype": args.text_dtype,
        "images_per_shard": args.shard_images,
        "precision_of_T5": str(t5.dtype),
        "autoencoder": fingerprint([vae.config], vae.state_dict().items()),
        "T5": fingerprint_of_t5(tokenizer, t5),
        "list_of_images_and_captions": fingerprint(pairs),
    }
    with only_command(args.out):
        make_data_set(args, settings, pairs, skipped, vae, tokenizer, t5, rank, world)


def make_data_set(args, settings, pairs, skipped, vae, tokenizer, t5, rank, world):
    """Write this rank's shards; the last rank to end describes all of them in meta.json.

    settings: all that the bytes of the shards depend on. pairs: the images with their captions.
    skipped: images and captions without a partner, for skipped.jsonl. Raises UserError.
    """
    out = args.out
    begin_or_resume(out / "settings.json", out, settings)

    parts = split(pairs, args.shard_images)
    count = len(parts)
    needed = ["null.safetensors", *[shard_name(k) for k in range(count)]]
    there = set(os.listdir(out))
    if there.issuperset([*needed, "meta.json"]):
        print(f"{out}: complete already")
        return

    # This rank's share: every world-th shard that is not there yet.
    mine = [k for k in range(rank, count, world) if shard_name(k) not in there]
    total = sum(len(parts[k]) for k in mine)
    with tqdm(total=total, desc="encode", unit="img", disable=rank > 0) as bar:
        make_shards(args, settings, parts, mine, vae, tokenizer, t5, bar)
    null, mask = encode_text(tokenizer, t5, [""])                    # (1, 1, D), (1, 1)
    with complete(out / "null.safetensors", durable=True) as temporary:
        tensors = store_text(null[mask].cpu(), "bfloat16")
        temporary.write_bytes(save(tensors, {"settings": json.dumps(settings)}))
    if not is_last_rank(rank, [out / name for name in needed], out / "meta.json"):
        return

    # The last rank to end finds all shards, and describes them.
    description, broken = describe_shards(out, settings, parts)
    if description["count"] == 0:
        raise UserError(f"{out}: none of the {len(broken)} images could be read "
                        f"({broken[0]['reason']}); delete it, and try again with other images")
    side = args.size // vae.downscale
    meta = {
        **settings,
        "vae": args.vae,
        "text_encoder": args.text_encoder,
        "latent_shape": [vae.config["latent_channels"], side, side],
        "text_dim": null.shape[-1],
        "scaling_factor": vae.scaling_factor,
        "null_hash": hash_of_header(out / "null.safetensors"),
        "cutmix": cutmix_settings(args.images),
        **description,
    }
    for k in range(count):
        open_shard(out, meta, k)
    write_jsonl(out / "skipped.jsonl", skipped + broken)
    with complete(out / "meta.json", durable=True) as temporary:
        temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    print(f"{out}: {meta['count']} pictures in {count} shards, {len(skipped) + len(broken)} skipped "
          "(see skipped.jsonl)")


if __name__ == "__main__":
    command_line(main)
