"""Stage 3, encoding (paper 4.1, Appendix A): images to VAE moments, captions to T5 tokens.

    python encode.py --images imagenet/train --captions captions.jsonl --out encoded/train

Training reads every image many dozens of times, so the work of the two frozen encoders is
done once, here. What is kept of an image is the mean and the standard deviation of its
latents: training draws x_0 from them, anew each time. What is kept of a caption is the
last hidden states of T5's encoder, at most 256 tokens, without padding. There are no flipped
copies, because captions say left and right.

The folder OUT gets 00000.safetensors, ... (shards of images in sorted order),
null.safetensors (the empty prompt), skipped.jsonl (what was left out, and why) and at
last meta.json. Under torchrun, processes and nodes share the work; a killed command goes
on when it is started again. `--check encoded/train` looks for numbers that are not finite,
and draws check.png (four images with their captions) and fig7.png (the paper's Fig. 7: how
much noise hides a composite's seams).
"""

import functools
import inspect
import itertools
import json
import math
from bisect import bisect_right
from pathlib import Path

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (BATCH_SIZE, COUNT, THREADS, Options, UserError, ahead, command_line,
                    contact_sheet, default_workers, fetch, fingerprint, in_batches, keep_apart,
                    list_images, load_image, local_device, make_together, number, pretrained,
                    progress, reading, refuse_not_finite, refuse_nothing, save_png, shorten,
                    write_json, write_jsonl)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from caption import match, read_captions, read_composites
from cutmix import CUTS

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
    """The layers of one resolution, in order: lists, named as in diffusers' files."""

    def forward(self, x):
        for layers in self.values():
            for layer in layers:
                x = layer(x)
        return x


def make_levels(widths, blocks, groups, step, steps_name):
    """Return a Level for each width, all but the last with a `step` to the next resolution."""
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
    """Pixels (B, c_in, H, W) to moments (B, c_out, h, w); `widths`, finest first."""

    def __init__(self, c_in, c_out, widths, blocks, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.down_blocks = make_levels(widths, blocks, groups, Downsample, "downsamplers")
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
    """Latents (B, c_in, h, w) to pixels (B, c_out, H, W); `widths`, coarsest first."""

    def __init__(self, c_in, c_out, widths, blocks, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.up_blocks = make_levels(widths, blocks, groups, Upsample, "upsamplers")
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


def to_images(pixels):
    """Return PIL images for pixels (B, 3, H, W) in about [-1, 1]."""
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte()
    arrays = levels.permute(0, 2, 3, 1).cpu().numpy()                     # (B, H, W, 3)
    return [Image.fromarray(array) for array in arrays]


# What the parts of the attention were called in diffusers before version 0.17.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Keys of diffusers' config.json that choose between networks, with the choice that is built
# here (in lists: of every entry), and keys that change no number.
VAE_CHOICES = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "mid_block_add_attention": True,
    "use_quant_conv": True, "use_post_quant_conv": True,
    "down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
VAE_HARMLESS = {"_diffusers_version", "_name_or_path", "force_upcast", "sample_size"}


def load_vae(path_or_repo, device="cpu"):
    """Return an AutoencoderKL in eval mode from a folder or hub repository of diffusers.

    Reads old ones too: without `scaling_factor`, with other names in the attention, and with
    1 x 1 convolutions in place of its linear layers. Raises UserError.
    """
    config = fetch(path_or_repo, "config.json")
    weights = fetch(path_or_repo, "diffusion_pytorch_model.safetensors")
    with reading(path_or_repo, "an AutoencoderKL of diffusers"):
        vae = AutoencoderKL(**vae_arguments(json.loads(config.read_text())))
        vae.load_state_dict(translate_vae(load_file(weights)))
        refuse_not_finite(path_or_repo, vae.state_dict().items())
        if not 0 < vae.scaling_factor < math.inf:
            raise ValueError("its scaling_factor is not a positive number")
    return vae.eval().requires_grad_(False).to(device)


def vae_arguments(config):
    """Return AutoencoderKL's arguments. Raises ValueError for another network's config."""
    arguments = inspect.signature(AutoencoderKL).parameters.keys()
    for key, value in config.items():
        # An unknown option that is off (0 as well, which equals False) does no harm.
        known = key in arguments | VAE_HARMLESS or value in (None, False)
        if key in VAE_CHOICES:
            entries = value if isinstance(value, list) else [value]
            known = all(entry == VAE_CHOICES[key] for entry in entries)
        # Blocks by the million would take hours.
        too_large = key not in VAE_HARMLESS and isinstance(value, int) and value > 10_000
        if not known or too_large:
            raise ValueError(f"{key} = {shorten(value)} is another network than this one")
    return {key: value for key, value in config.items() if key in arguments}


def translate_vae(weights):
    """Return a state dict of diffusers, old or new, with today's names and shapes."""
    translated = {}
    for name, tensor in weights.items():
        parts = [OLD_ATTENTION_NAMES.get(part, part) for part in name.split(".")]
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]                              # (C, C, 1, 1) -> (C, C)
        translated[".".join(parts)] = tensor
    return translated


# --------------------------------------------------------------------------------------
# T5's tokens

def load_text_encoder(path_or_repo, device="cpu"):
    """Return (tokenizer, T5's encoder in eval mode), local or from the hub. Raises UserError."""
    # In bfloat16 on CUDA. Not in float16, in which T5's activations overflow.
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    t5, tokenizer = pretrained(path_or_repo, "T5EncoderModel", "AutoTokenizer", device,
                               dtype=dtype)
    # Another model's adds other tokens or none, and a text of no tokens cannot be encoded.
    if tokenizer("").input_ids != [t5.config.eos_token_id]:
        raise UserError(f"{path_or_repo}: not T5's tokenizer: it does not end a text with </s>")
    return tokenizer, t5


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


def with_unknown_words(tokenizer, texts):
    """Return those of some texts that hold tokens which a tokenizer does not know."""
    # CLIP's calls its end token the unknown one too, and knows all bytes.
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.eos_token_id}
    return [text for text in texts if unknown.intersection(tokenizer(text).input_ids)]


def fingerprint_of_t5(tokenizer, t5):
    """Return a text encoder's fingerprint, the same in float32 (CPU) and bfloat16 (CUDA)."""
    rounded = [(name, tensor.flatten()[:256].bfloat16())
               for name, tensor in t5.state_dict().items()]
    return fingerprint(sorted(tokenizer.get_vocab().items()), rounded)


# How a shard keeps tokens. float8 (e4m3) takes half the disk, for an error of 2.7% (root
# mean square): T5's states, of 0.1 on average and 10 at most, lie in its 0.016 to 448.
TEXT_DTYPES = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


def pad_text(tokens, lengths, length):
    """Return text (B, length, D), zero behind each caption, and its mask (B, length) bool.

    tokens (sum of L_i, D) are all captions one after the other, lengths (B,) those L_i.
    """
    start = lengths.cumsum(0) - lengths                              # (B,)
    position = torch.arange(length, device=tokens.device)            # (length,)
    mask = position < lengths[:, None]                               # (B, length)
    index = (start[:, None] + position).clamp(max=len(tokens) - 1)   # (B, length)
    return tokens[index] * mask[:, :, None], mask


def padded_length(lengths):
    """Return the length of the longest caption, rounded up to a multiple of 32.

    torch.compile makes a version of the network for each length: eight for up to 256 tokens.
    """
    return 32 * math.ceil(int(lengths.max()) / 32)


# --------------------------------------------------------------------------------------
# An encoded data set

VERSION = 2
NULL = "null.safetensors"
REMEDY = "delete it and run its encode.py command again"

# What two data sets of one training run must have in common, of their meta.json.
SAME_ENCODERS = ("latent_shape", "text_dim", "scaling_factor", "autoencoder", "T5")
# What else training and sampling need to know.
NEEDED = {"shards", "vae", "text_encoder", "list_of_images_and_captions", *SAME_ENCODERS}


def shard_name(k):
    """Return the name of the file of shard k."""
    return f"{k:05d}.safetensors"


class Encoded:
    """An encoded data set, read through memory maps: a sample costs little more than its bytes.

    `len(data)` is its number of images, `data.meta` its meta.json and `data.null` (1, D)
    bfloat16 the tokens of the empty prompt. The methods take a sample's number.

    All shards are opened at once: missing, cut, foreign or swapped ones are refused here, and
    not after hours of training. Raises UserError.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "meta.json"
        if not path.is_file():
            raise UserError(f"{folder}: not an encoded data set, or not a whole one "
                            f"(no meta.json)")
        with reading(path, "the description of an encoded data set"):
            self.meta = json.loads(path.read_text())
            if self.meta["version"] != VERSION or not NEEDED <= self.meta.keys():
                raise ValueError("incomplete, or of another version: encode again")
            self.paths = [self.folder / shard_name(k) for k in range(self.meta["shards"])]
        null, _ = open_shard(self.folder / NULL, self.meta)
        self.null = null["text"].bfloat16()
        self.shards = [open_shard(path, self.meta)[0] for path in self.paths]
        # Indexing a numpy array takes a tenth of the time of indexing a tensor.
        self.offsets = [shard["offset"].numpy() for shard in self.shards]
        # Each shard's first sample. A shard with broken images is shorter than others.
        self.starts = [0, *itertools.accumulate(len(offset) - 1 for offset in self.offsets)]

    def __len__(self):
        return self.starts[-1]

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
        """Return the caption's tokens (L_i, D), a view into the file if that is bfloat16."""
        k, j = self.locate(i)
        shard = self.shards[k]
        start, end = self.offsets[k][j:j + 2]
        text = shard["text"][start:end]
        if text.dtype == torch.float8_e4m3fn:
            # Older shards have a scale for each token, (sum of L_i, 1).
            scale = shard["scale"][start:end] if "scale" in shard else 1.0
            text = (text.float() * scale).bfloat16()
        return text

    def sample(self, i):
        """Return (file, caption). The file is a path relative to the folder of images."""
        k, j = self.locate(i)
        _, samples = open_shard(self.paths[k], self.meta)
        return samples["files"][j], samples["captions"][j]


def open_shard(path, settings):
    """Return the tensors of a shard, views into its memory map, and what it says of them.

    mean, std: (n, C, h, w) float16. text: (sum of L_i, D). offset: (n + 1,) int64, where each
    caption's tokens begin. settings: those of the data set, or its meta.json. Raises
    UserError if the shard is missing, cut, of another data set or in another's place.
    """
    with reading(path, f"a shard of this data set: {REMEDY}"):
        # The file is closed: two data sets of 800 would exceed the usual 1,024 open files.
        with safe_open(path, "pt") as file:
            # Not a dict, although it has keys.
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        # In sets made before, shards do not say their name, and null.safetensors says nothing.
        samples = json.loads(metadata.get("samples", "{}"))
        same_set = samples.get("settings", {}).items() <= settings.items()
        if not same_set or samples.get("shard", path.name) != path.name:
            raise ValueError("of other images, captions, encoders, or in another's place")
    return tensors, samples


def is_whole(path):
    """Tell whether a safetensors file is as long as its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def refuse_other_encoders(original, augmented):
    """Raise UserError if two data sets (Encoded) come from different encoders or sizes.

    The precision in which T5 ran is not compared: rounding is not another encoder.
    """
    # States of training that were saved before do not name the last one.
    for key in (*SAME_ENCODERS, "max_tokens"):
        a = original.meta.get(key)
        b = augmented.meta.get(key)
        if a != b:
            raise UserError(f"{original.folder} and {augmented.folder} differ in {key} "
                            f"({shorten(a)} and {shorten(b)}): encode both in the same way")


# --------------------------------------------------------------------------------------
# Making one

def encode_captions(tokenizer, t5, captions, args):
    """Return the tensors that keep the tokens of a shard's captions, by name, and a list of
    the captions that hold tokens which T5 does not know.

    Captions are encoded in batches of about the same length, so that little is padded, and
    equal ones once ("An image of tench" comes 1,300 times). The batches depend on nothing
    but the shard's captions, and so do its bytes.
    """
    dtype = TEXT_DTYPES[args.text_dtype]
    different = sorted(set(captions), key=lambda caption: (len(caption), caption))
    tokens = {}
    unknown = []
    for batch in in_batches(different, args.batch_size):
        text, mask = encode_text(tokenizer, t5, batch, args.max_tokens)
        unpadded = text[mask].to(dtype).cpu()                        # (sum of L_i, D)
        lengths = mask.sum(1).tolist()
        tokens.update(zip(batch, unpadded.split(lengths)))
        unknown += with_unknown_words(tokenizer, batch)

    # No tokens stand before the first caption, so that the offsets begin with 0.
    texts = [torch.empty(0, t5.config.d_model, dtype=dtype)]
    texts += [tokens[caption] for caption in captions]               # (L_i, D) each
    # Where each caption's tokens begin, and where the last ones end.
    offset = torch.tensor([len(text) for text in texts]).cumsum(0)
    return {"text": torch.cat(texts), "offset": offset}, unknown


def load_images(folder, size, pairs):
    """Return {(file, caption): pixels (size, size, 3) uint8} of the images that can be read,
    and rows of skipped.jsonl for the others.
    """
    pixels = {}
    broken = []
    for file, caption in pairs:
        try:
            pixels[file, caption] = np.asarray(load_image(f"{folder}/{file}", size))
        except OSError as error:
            broken.append({"file": file, "reason": error.strerror})
    return pixels, broken


def make_shards(args, settings, vae, tokenizer, t5, parts):
    """Yield the bytes of shards, parts: [(name, [(file, caption), ...]), ...]."""
    device = vae.quant_conv.weight.device

    # Threads decode whole batches: while one is encoded, there is time for all of the next.
    batches = []
    for _, pairs in parts:
        batches += in_batches(pairs, args.batch_size)
    load = functools.partial(load_images, args.images, args.size)
    loaded = progress(ahead(load, batches, args.workers), len(batches), "batch", "encode")

    for name, pairs in parts:
        # Those of no image come first: null has none, and all of a shard's may be broken.
        moments = [torch.empty(2, 0, *settings["latent_shape"], dtype=torch.float16)]
        kept = []
        skipped = []
        for _ in in_batches(pairs, args.batch_size):
            pixels, broken = next(loaded)
            if pixels:
                x = np.stack(list(pixels.values()))                  # (n, size, size, 3)
                x = torch.from_numpy(x).to(device)
                x = x.permute(0, 3, 1, 2) / 127.5 - 1                # (n, 3, size, size)
                mean_and_std = torch.stack(vae.encode(x))            # (2, n, C, h, w)
                moments.append(mean_and_std.half().cpu())
            kept += pixels
            skipped += broken

        captions = [""] if name == NULL else [caption for _, caption in kept]
        text, unknown = encode_captions(tokenizer, t5, captions, args)
        mean, std = torch.cat(moments, dim=1)                        # (N, C, h, w) each
        tensors = {"mean": mean, "std": std, **text}
        files = [file for file, _ in kept]
        samples = {"shard": name, "settings": settings, "files": files,
                   "captions": captions, "unknown": unknown, "skipped": skipped}

        # One entry of metadata: safetensors writes several in random order, and a shard that
        # is made again must have the same bytes.
        yield save(tensors, {"samples": json.dumps(samples)})


def make_data_set(args, pairs, skipped):
    """Make this rank's shards of (file, caption) pairs; the last rank to end describes all.

    skipped: rows of skipped.jsonl. Raises UserError.
    """
    # A list of composites that is none is refused before the work.
    manifest = Path(args.images, "cutmix.jsonl")
    rows = read_composites(manifest) if manifest.is_file() else []
    composites = {file: setting for file, setting, _ in rows}

    # In bfloat16, in which T5 runs on CUDA, the autoencoder's means would be 1.0 to 1.2% off (in
    # TF32, CUDA's way to multiply float32, 0.2 to 0.5%).
    device = local_device()
    vae = load_vae(args.vae, device)
    tokenizer, t5 = load_text_encoder(args.text_encoder, device)
    side, rest = divmod(args.size, vae.downscale)
    if rest:
        raise UserError(f"--size {args.size}: this autoencoder takes multiples of "
                        f"{vae.downscale}")

    # The paper's short captions are "An image of <class-name>".
    all_aio = all(caption.startswith("An image of ") for _, caption in pairs)

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
        "latent_shape": [vae.config["latent_channels"], side, side],
        "text_dim": t5.config.d_model,
        "scaling_factor": vae.scaling_factor,
        "captions": "aio" if all_aio else "long",
        "list_of_images_and_captions": fingerprint(pairs),
    }
    # The empty prompt is a shard of no images.
    units = {NULL: (NULL, [])}
    for k, part in enumerate(in_batches(pairs, args.shard_images)):
        units[shard_name(k)] = (shard_name(k), part)

    make = functools.partial(make_shards, args, settings, vae, tokenizer, t5)
    products = (args.out / "skipped.jsonl", args.out / "meta.json")
    if make_together(args.out, settings, units, make, is_whole, products):
        write_meta(args, settings, list(units)[1:], skipped, composites)


def write_meta(args, settings, shards, skipped, composites):
    """Write skipped.jsonl and then, as the sign of the end, meta.json.

    shards: their names. skipped: rows of what is in none. composites: {file: CutMix setting}.
    Raises UserError if no image could be read.
    """
    counts = []
    files = []
    unknown = []
    broken = []
    for name in shards:
        _, samples = open_shard(args.out / name, settings)
        counts.append(len(samples["files"]))
        files += samples["files"]
        unknown += samples["unknown"]
        broken += samples["skipped"]

    if not files:
        refuse_nothing(args.out, (NULL, *shards), args.out, broken)

    skipped += broken
    write_jsonl(args.out / "skipped.jsonl", skipped)
    # A composite of each setting, by number, for Fig. 7.
    examples = {composites[file]: i for i, file in enumerate(files) if file in composites}
    write_json(args.out / "meta.json", {
        **settings,
        "vae": args.vae,
        "text_encoder": args.text_encoder,
        "shards": len(shards),
        "counts": counts,
        "count": len(files),
        "cutmix": ["all"] if examples.keys() == CUTS.keys() else sorted(examples) or None,
        "examples": examples,
    })

    if unknown:
        print(f"{len(unknown)} captions hold tokens that this text encoder does not know, "
              f"such as {shorten(unknown[0])!r}")
    print(f"{args.out}: {len(files)} pictures in {len(shards)} shards, {len(skipped)} skipped "
          f"(see skipped.jsonl)")


# --------------------------------------------------------------------------------------
# Checking one

def check(folder):
    """Look at all numbers of a data set, and draw check.png and fig7.png. Raises UserError."""
    data = Encoded(folder)
    if not data.null.isfinite().all():
        raise UserError(f"{data.folder / NULL}: holds numbers that are not finite: {REMEDY}")
    for i in progress(range(len(data)), len(data), "img", "check"):
        numbers = [*data.moments(i), data.text(i)]
        if not all(tensor.isfinite().all() for tensor in numbers):
            path = data.paths[data.locate(i)[0]]
            raise UserError(f"{path}: {data.sample(i)[0]} holds numbers that are not finite: "
                            f"{REMEDY}")

    vae = load_vae(data.meta["vae"])
    four = np.linspace(0, len(data) - 1, min(len(data), 4)).astype(int).tolist()
    pictures = [decoded(vae, data.moments(i)[0]) for i in four]
    texts = [": ".join(data.sample(i)) for i in four]
    # Room for a caption of some 700 characters.
    save_png(contact_sheet(pictures, texts, columns=4, lines=20), data.folder / "check.png")

    # Photos have no settings, and data sets made before do not say where they are.
    examples = data.meta.get("examples") or {f"image {i}": i for i in four}
    save_png(draw_noise(data, vae, examples), data.folder / "fig7.png")
    print(f"{folder}: {len(data)} pictures, whole and finite; see check.png and fig7.png in it")


def decoded(vae, latents):
    """Return unscaled latents (C, h, w) as a PIL image 256 pixels wide."""
    picture = to_images(vae.decode(latents[None]))[0]
    return picture.resize((256, 256), Image.Resampling.BOX)


def draw_noise(data, vae, examples):
    """Return the paper's Fig. 7: images {title: number} at t = 0, 0.1 ... 1, one a row.

    Noise is added to latents, as in training: in noise on pixels, seams would stay visible.
    """
    scaling_factor = data.meta["scaling_factor"]
    rng = torch.Generator().manual_seed(0)
    pictures = []
    titles = []
    for title, i in examples.items():
        mean, _ = data.moments(i)                                    # (C, h, w)
        x_0 = mean * scaling_factor
        eps = torch.randn(x_0.shape, generator=rng)
        for step in range(11):
            t = step / 10
            x_t = math.sqrt(1 - t) * x_0 + math.sqrt(t) * eps        # eq. 1
            pictures.append(decoded(vae, x_t / scaling_factor))
            titles.append(f"{title}, t = {t:g}")
    return contact_sheet(pictures, titles, columns=11, lines=1)


# --------------------------------------------------------------------------------------
# The command

def main(argv=None):
    parser = Options(__doc__)
    add = parser.add
    add("--images", "folder of <class>/<file>, or all in one flat folder")
    add("--captions", "files of JSONL, CSV, TSV; a later one wins", nargs="+")
    add("--out", "folder where the shards go", kind=Path)
    add("--vae", "folder or hub id, diffusers' format", "stabilityai/sd-vae-ft-ema")
    add("--text-encoder", "folder or hub id of a T5", "google/flan-t5-xl")
    add("--size", "side of images, in pixels", 256, number(int, 8, 2048))
    add("--max-tokens", "longer captions are cut", 256, number(int, 1, 4096))
    add("--text-dtype", "of tokens on the disk", "bfloat16", choices=TEXT_DTYPES)
    add("--shard-images", "images in a shard; 1600 are about 1 GiB", 1600, COUNT)
    add("--batch-size", "images or captions at once", 64, BATCH_SIZE)
    add("--workers", "threads that decode images; 0: none", default_workers(), THREADS)
    add("--check", "only check this data set, draw check.png and fig7.png")
    args = parser.parse_args(argv)
    if args.check:
        return check(args.check)
    if not (args.images and args.captions and args.out):
        raise UserError("needs --images, --captions and --out (or --check FOLDER)")
    keep_apart(args.out, args.images, *args.captions, args.vae, args.text_encoder)

    captions = map(read_captions, args.captions)
    matched, skipped = match(list_images(args.images), *captions)
    if not matched:
        raise UserError(f"no image of {args.images} has a caption: they are called like "
                        f"{skipped[0]['file']}, and in the captions {skipped[-1]['file']}")
    make_data_set(args, list(matched.items()), skipped)


if __name__ == "__main__":
    command_line(main)
