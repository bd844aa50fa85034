"""Stage 3, encoding (paper 4.1, Appendix A): images -> VAE moments, captions -> T5 tokens, once, in shards.

    python encode.py --images imagenet/train --captions captions.jsonl --out encoded/train

Both encoders are frozen and training reads every picture some 200 times, so their work is done once. Kept are
mean and std of the latents (training draws x_0 from them, anew each time) and the last hidden states of T5's
encoder, at most 256 tokens, unpadded. There are no flipped copies: captions say left and right.

Makes OUT/00000.safetensors, ... (shards of pictures in sorted order), null.safetensors (the empty prompt),
skipped.jsonl (what was left out, and why) and at last meta.json. Several processes or nodes: start it under
torchrun. Killed: start it again. `--check encoded/train` verifies every shard and draws four pictures.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import os
import re
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from cutmix import Help, UserError, command_line, complete, list_images, load_image, rank_and_world

# ------------------------------------------------------------------------------------------------------------
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
    """Self-attention of one head over all positions, at the coarsest level; (B, C, H, W) -> the same."""

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
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution, then (except at the last level) the step to the next one."""

    def __init__(self, c_in, c_out, blocks, groups, step):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out, groups) for i in range(blocks))
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
        x, middle = self.conv_in(x), self.mid_block
        for stage in [middle, *self.up_blocks] if self.up_blocks else [*self.down_blocks, middle]:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's KL autoencoder (Rombach et al. 2022); module names are those of diffusers' files.

    Latents go in and out **unscaled**; `scaling_factor` is what the diffusion model multiplies them with.
    `patch_size` > 1 (the toy's) folds p x p pixels into channels: no convolution runs at full size."""

    def __init__(self, in_channels=3, out_channels=3, latent_channels=4,
                 block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
                 scaling_factor=0.18215, patch_size=1):
        super().__init__()
        widths, p = list(block_out_channels), patch_size
        self.config = {"in_channels": in_channels, "out_channels": out_channels,
                       "latent_channels": latent_channels, "block_out_channels": widths,
                       "layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups,
                       "scaling_factor": scaling_factor, "patch_size": p}
        self.scaling_factor, self.patch_size = scaling_factor, p
        self.downscale = p * 2 ** (len(widths) - 1)                 # pixels per latent, along a side
        self.encoder = Coder(in_channels * p * p, 2 * latent_channels, widths, layers_per_block,
                             norm_num_groups, decoder=False)
        self.decoder = Coder(latent_channels, out_channels * p * p, widths[::-1], layers_per_block + 1,
                             norm_num_groups, decoder=True)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> mean and std of the latents, each (B, C, H / 8, W / 8)."""
        moments = self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.patch_size)))
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()

    def decode(self, latents):
        """(B, C, h, w) unscaled latents -> (B, 3, 8 h, 8 w), about [-1, 1]."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(latents)), self.patch_size)


# ------------------------------------------------------------------------------------------------------------
# Loading encoders, from a folder or from the hub

def fetch(path_or_repo, *names):
    """The first of `names` in a local folder or, where there is no such folder, in a hub repository -> Path.

    Raises UserError: no such folder or repository, hub out of reach, none of the names there."""
    folder, what = Path(path_or_repo), " or ".join(names)
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise UserError(f"{folder}: no {what} in it")
    # What leads into a folder that exists is a mistyped path: asking the hub would only cost time.
    if (not re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(path_or_repo)) or folder.exists()
            or folder.parent != Path(".") and folder.parent.exists()):
        raise UserError(f"{folder}: no such folder")
    from huggingface_hub import errors, hf_hub_download
    for cached, name in itertools.product((True, False), names):    # what is here already needs no network
        try:
            return Path(hf_hub_download(str(path_or_repo), name, local_files_only=cached))
        except Exception as error:  # noqa: BLE001       no such repository, a licence to accept, no network, ...
            absent = isinstance(error, errors.EntryNotFoundError)
            if not cached and (not absent or isinstance(error, errors.LocalEntryNotFoundError)):
                raise UserError(f"{folder}: no such folder, and not on the hub ({one_line(error)})") from None
    raise UserError(f"{folder}: no {what} in this repository of the hub")


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_vae(path_or_repo, device="cpu", dtype=torch.float32):
    """A folder or hub repository in diffusers' format -> AutoencoderKL in eval mode. Raises UserError.

    Reads the older folders too: config without `scaling_factor`, attention named query/key/value/proj_attn or
    made of 1 x 1 convolutions, `.bin` for want of safetensors (read with `weights_only=True`); and those of
    whole pipelines, which have it in `vae/`."""
    config = fetch(path_or_repo, "config.json", "vae/config.json")
    file = fetch(path_or_repo, *(f"{folder}diffusion_pytorch_model.{suffix}"
                                 for suffix in ("safetensors", "bin") for folder in ("", "vae/")))
    try:
        config = json.loads(config.read_text())
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise ValueError(f"it is a {config['_class_name']}")
        known = inspect.signature(AutoencoderKL).parameters
        vae = AutoencoderKL(**{k: v for k, v in config.items() if k in known})
        weights = (load_file(file) if file.suffix == ".safetensors" else
                   torch.load(file, map_location="cpu", weights_only=True))
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        vae.load_state_dict({re.sub(r"\.(query|key|value|proj_attn)\.", lambda old: f".{new[old[1]]}.", name):
                             tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
                             for name, tensor in weights.items()})
    except Exception as error:  # noqa: BLE001           half a download, other shapes, code for numbers, ...
        raise UserError(f"{path_or_repo}: no AutoencoderKL of diffusers ({one_line(error)})") from None
    return vae.eval().requires_grad_(False).to(device, dtype)


def load_text_encoder(path_or_repo, device="cpu", dtype=torch.float32):
    """A folder or hub repository with a T5 -> (tokenizer, its encoder in eval mode). Raises UserError."""
    from transformers import AutoTokenizer, T5EncoderModel
    fetch(path_or_repo, "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_repo)
        t5, report = T5EncoderModel.from_pretrained(path_or_repo, dtype=dtype, output_loading_info=True)
    except Exception as error:  # noqa: BLE001           transformers raises almost anything on a wrong folder
        raise UserError(f"{path_or_repo}: not a T5 with its tokenizer ({one_line(error)})") from None
    for name in [*report["missing_keys"], *report["mismatched_keys"]]:   # they would be random numbers
        raise UserError(f"{path_or_repo}: not a T5 encoder's weights ({name} is missing or does not fit)")
    return tokenizer, t5.eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode_text(tokenizer, t5, captions, max_tokens=256):
    """B captions -> text (B, L, D), the last hidden states, and mask (B, L) bool, True where a token is.

    L is the longest of the batch; a caption of more than `max_tokens` (paper: 256) loses its end. The empty
    prompt is one token, </s>."""
    tokens = tokenizer(list(captions), padding=True, truncation=True, max_length=max_tokens,
                       return_tensors="pt").to(t5.device)                                             # (B, L)
    text = t5(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return text, tokens.attention_mask.bool()


# ------------------------------------------------------------------------------------------------------------
# Reading an encoded data set

VERSION = 1


def shard_name(k):
    return f"{k:05d}.safetensors"


def open_shard(path):
    """-> {name: tensor}, views into the file's memory map: only what is looked at is read. The file is closed
    again, as two data sets of 800 shards would exceed the usual 1,024 open files. Raises UserError."""
    try:
        with safe_open(path, "pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118   it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, delete it and run its encode.py command again ({error})") from None


def samples_of(path):
    """-> {"files", "captions", "skipped"}, lists: a shard's metadata. They are one entry because safetensors
    writes several in random order, and a shard that is made again must have the same bytes."""
    with safe_open(path, "pt") as shard:
        return json.loads((shard.metadata() or {})["samples"])


def pack(text, text_dtype):
    """(n, D) tokens -> the tensors that a shard stores. float8: half the disk, 2.6% error (root mean square);
    e4m3 with one scale a token, so that a token with a large value costs only itself precision."""
    if text_dtype == "bfloat16":
        return {"text": text.bfloat16()}
    scale = text.float().abs().amax(1, keepdim=True).clamp(min=1e-20) / 448     # (n, 1); e4m3 ends at 448
    return {"text": (text.float() / scale).to(torch.float8_e4m3fn), "scale": scale}


def unpack(text, scale=None):
    """What `pack` made -> (n, D) bfloat16."""
    if scale is None:
        return text
    # The bits s eeee mmm, moved into a float16's s 0eeee mmm0000000, are the number / 256: on a CPU six times
    # as fast as torch's own conversion. From int8 to int16 the sign is copied to bit 14 too: take it away.
    bits = (text.view(torch.int8).to(torch.int16) << 7) & ~(1 << 14)
    return (bits.view(torch.float16).float() * (256 * scale)).bfloat16()


class Encoded:
    """An encoded data set, read through memory maps: a sample costs its bytes. May be pickled and forked.

    `len(ds)`, `ds.meta` (dict), `ds.null` (1, D) bfloat16, and for a sample's number i the methods below.
    Raises UserError for a folder that is none, is not finished, or lacks a shard."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise UserError(f"{folder}: not an encoded data set, or not a finished one (no meta.json)")
        self.meta = json.loads((self.folder / "meta.json").read_text())
        if self.meta["version"] != VERSION:
            raise UserError(f"{folder}: format {self.meta['version']}, but this encode.py reads {VERSION}")
        needed = {"null.safetensors", *map(shard_name, range(self.meta["shards"]))}
        if missing := sorted(needed - set(os.listdir(folder))):
            raise UserError(f"{folder}: {missing[0]} is missing, run its encode.py command again")
        self.null = open_shard(self.folder / "null.safetensors")["text"].clone()
        self.ends = np.cumsum(self.meta["counts"])      # a shard with broken pictures is shorter
        self.shards, self.samples = {}, {}              # what was opened

    def __getstate__(self):
        return {**self.__dict__, "shards": {}, "samples": {}}

    def __len__(self):
        return self.meta["count"]

    def locate(self, i):
        """-> number of the shard, its tensors, number of the sample in it."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = int(self.ends.searchsorted(i, "right"))
        if k not in self.shards:
            self.shards[k] = open_shard(self.folder / shard_name(k))
        return k, self.shards[k], int(i - self.ends[k] + self.meta["counts"][k])

    def moments(self, i):
        """-> mean and standard deviation of the unscaled latents, each (C, h, w) float32."""
        _, shard, j = self.locate(i)
        return shard["mean"][j].float(), shard["std"][j].float()

    def text(self, i):
        """-> (L_i, D) bfloat16, the tokens of the caption."""
        _, shard, j = self.locate(i)
        start, end = shard["offset"][j:j + 2].tolist()
        return unpack(*(shard[name][start:end] for name in ("text", "scale") if name in shard))

    def sample(self, i):
        """-> (file, caption); the file as a path relative to the folder of images."""
        k, _, j = self.locate(i)
        if k not in self.samples:
            self.samples[k] = samples_of(self.folder / shard_name(k))
        return self.samples[k]["files"][j], self.samples[k]["captions"][j]

    def file(self, i):
        return self.sample(i)[0]

    def caption(self, i):
        return self.sample(i)[1]


# ------------------------------------------------------------------------------------------------------------
# Making one

def pair_up(files, captions):
    """Images' files and {file: caption} -> [(file, caption)] in the files' order, and rows of skipped.jsonl.

    A caption that names a file without its folder (the paper's .tsv) goes to the only image of that name."""
    pairs, skipped, names = [], [], Counter(file.rsplit("/", 1)[-1] for file in files)
    unused = dict(captions)
    for file in files:
        name = file.rsplit("/", 1)[-1]
        if caption := unused.pop(name if names[name] == 1 and file not in unused else file, None):
            pairs.append((file, caption))
        else:
            skipped.append({"file": file, "reason": "no caption"})
    for file in unused:
        reason = "images of this name in several folders" if names[file] > 1 else "no such image"
        skipped.append({"file": file, "reason": f"caption, but {reason}"})
    return pairs, skipped


class Pictures:
    """The workers' part: [(file, caption)] -> (n, S, S, 3) uint8, their pairs, and rows of skipped.jsonl.

    Arrays come through a pipe; tensors need shared memory, and where that is full they wait for ever."""

    def __init__(self, folder, size):
        self.folder, self.size = folder, size

    def __getitem__(self, pairs):
        pictures, readable, skipped = [np.empty((0, self.size, self.size, 3), np.uint8)], [], []
        for file, caption in pairs:
            try:
                pictures.append(np.asarray(load_image(f"{self.folder}/{file}", self.size))[None])
                readable.append((file, caption))
            except OSError as error:
                skipped.append({"file": file, "reason": str(error).removeprefix(f"{self.folder}/{file}: ")})
        return np.concatenate(pictures), readable, skipped


def encode_captions(tokenizer, t5, captions, args):
    """The captions of a shard -> the tensors that keep their tokens, and the number of tokens of each.

    In batches of about the same length, so that little is padded, and each different caption once ('An image
    of a tench' comes 1,300 times). Batches depend on nothing but the shard, so neither do its bytes."""
    different = sorted(set(captions), key=lambda caption: (len(caption), caption))
    tokens = {}
    for i in range(0, len(different), args.batch_size):
        batch = different[i:i + args.batch_size]
        text, mask = encode_text(tokenizer, t5, batch, args.max_tokens)
        lengths = mask.sum(1).tolist()
        stored = (tensor.cpu().split(lengths) for tensor in pack(text[mask], args.text_dtype).values())
        tokens.update(zip(batch, zip(*stored)))         # caption -> (text,) or (text, scale)
    empty = pack(torch.empty(0, t5.config.d_model), args.text_dtype)
    columns = zip(empty.values(), *(tokens[caption] for caption in captions))
    return dict(zip(empty, map(torch.cat, columns))), [len(tokens[caption][0]) for caption in captions]


@torch.no_grad()
def make_shards(args, pairs, shards, vae, tokenizer, t5, bar):
    """Makes the given shards one after the other, while the workers decode the pictures of the next."""
    S, B, device = args.shard_images, args.batch_size, vae.quant_conv.weight.device
    batches = {k: [pairs[i:min(i + B, (k + 1) * S)] for i in range(k * S, min((k + 1) * S, len(pairs)), B)]
               for k in shards}
    pictures = iter(DataLoader(Pictures(args.images, args.size), num_workers=args.workers, batch_size=None,
                               sampler=[batch for k in shards for batch in batches[k]], collate_fn=tuple))
    for k in shards:
        moments, kept, skipped = [], [], []
        for batch in batches[k]:
            pixels, readable, broken = next(pictures)
            x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 127.5 - 1       # (n, 3, size, size)
            moments.append([m.half().contiguous().cpu() for m in vae.encode(x)])          # 2 x (n, C, h, w)
            kept, skipped = kept + readable, skipped + broken
            bar.update(len(batch))
        files, captions = [file for file, _ in kept], [caption for _, caption in kept]
        tensors, lengths = encode_captions(tokenizer, t5, captions, args)
        mean, std = map(torch.cat, zip(*moments))
        tensors.update(mean=mean, std=std, offset=torch.tensor([0, *lengths]).cumsum(0))
        samples = json.dumps({"files": files, "captions": captions, "skipped": skipped})
        with complete(Path(args.out) / shard_name(k)) as temporary:
            temporary.write_bytes(save(tensors, {"samples": samples}))


def fingerprint(model, *more):
    """Tells two encoders apart by what they are: the same one may come from another path."""
    digest = hashlib.sha256(json.dumps(more).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def same_settings(out, settings):
    """Data of two kinds never end in one folder: it remembers how it was begun. Raises UserError."""
    path = out / "settings.json"
    if not path.exists():
        with complete(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    for key, before in json.loads(path.read_text()).items():
        if settings.get(key) != before:
            raise UserError(f"{out} was begun with another {key.replace('_', ' ')} ({before}, now "
                            f"{settings.get(key)}): use another --out, or delete it")


def finish(out, meta, skipped):
    """All shards are there -> skipped.jsonl and then, as the sign of the end, meta.json."""
    for k in range(meta["shards"]):
        offset = open_shard(out / shard_name(k))["offset"]
        meta["counts"].append(len(offset) - 1)
        meta["longest"] = max([meta["longest"], *offset.diff().tolist()])
        skipped += samples_of(out / shard_name(k))["skipped"]
    meta["count"] = sum(meta["counts"])
    for leftover in out.glob(".[0-9]*.tmp"):            # of killed runs that had more ranks
        leftover.unlink(missing_ok=True)
    for name, text in (("skipped.jsonl", "".join(json.dumps(row) + "\n" for row in skipped)),
                       ("meta.json", json.dumps(meta, indent=1))):
        with complete(out / name) as temporary:
            temporary.write_text(text)
    print(f"{meta['count']} pictures encoded in {out} ({meta['shards']} shards), {len(skipped)} skipped"
          + (f" (see {out / 'skipped.jsonl'})" if skipped else ""))


# ------------------------------------------------------------------------------------------------------------
# Checking one

def check_shard(ds, k):
    """Looks at every number of a shard -> its number of tokens. Raises UserError."""
    shard, samples = open_shard(ds.folder / shard_name(k)), samples_of(ds.folder / shard_name(k))
    n, lengths, meta = ds.meta["counts"][k], shard["offset"].diff(), ds.meta
    tokens = int(lengths.sum())
    shapes = {name: (n, *meta["latent_shape"]) for name in ("mean", "std")}
    shapes.update({"offset": (n + 1,), "text": (tokens, meta["text_dim"])})
    if meta["text_dtype"] == "float8":
        shapes["scale"] = (tokens, 1)
    if ({name: tuple(tensor.shape) for name, tensor in shard.items()} != shapes or shard["offset"][0] != 0
            or not all(1 <= length <= meta["longest"] for length in lengths.tolist())
            or not n == len(samples["files"]) == len(samples["captions"])):
        raise UserError("shapes, offsets or lists that differ from what meta.json says")
    for i in range(int(ds.ends[k]) - n, int(ds.ends[k])):
        if not all(tensor.isfinite().all() for tensor in (*ds.moments(i), ds.text(i))):
            raise UserError(f"values of {ds.file(i)} are not finite")
    return tokens


def check(folder, vae):
    """Verifies every shard; draws four pictures, decoded from their latents, with their captions."""
    ds, tokens, damaged = Encoded(folder), 0, 0
    for k in tqdm(range(ds.meta["shards"]), desc="check", unit="shard"):
        try:
            tokens += check_shard(ds, k)
        except (UserError, KeyError) as error:
            damaged += 1
            print(f"{shard_name(k)}: {'lacks ' if isinstance(error, KeyError) else ''}{error}")
    n, meta, size = len(ds), ds.meta, ds.meta["size"]
    if damaged:
        raise UserError(f"{folder}: {damaged} of {meta['shards']} shards are damaged: delete them, run its "
                        "encode.py command again")
    gib = sum(file.stat().st_size for file in ds.folder.glob("*.safetensors")) / 2 ** 30
    print(f"{folder}: {n} pictures of {size} x {size}, {meta['shards']} shards, {gib:.2f} GiB, all in order\n"
          f"  latents {' x '.join(map(str, meta['latent_shape']))}, from {meta['vae']}\n"
          f"  text    {meta['text_dim']} wide, {meta['text_dtype']}, {tokens / max(n, 1):.1f} tokens each"
          f", {meta['longest']} at most, from {meta['text_encoder']}")
    vae, font = load_vae(vae or meta["vae"]), ImageFont.load_default(size=14)
    side = size * max(1, 192 // size)                   # small pictures are enlarged
    height = max(side, 192) + 8
    sheet = Image.new("RGB", (side + 560, 4 * height), "white")
    for row, i in enumerate(np.linspace(0, n - 1, min(n, 4)).astype(int).tolist()):
        picture = vae.decode(ds.moments(i)[0][None])[0].permute(1, 2, 0)                           # (S, S, 3)
        picture = Image.fromarray(((picture + 1) * 127.5).round().clamp(0, 255).byte().numpy())
        text = "\n".join(textwrap.wrap(f"{ds.file(i)}: {ds.caption(i)}", 75))
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (0, row * height))
        ImageDraw.Draw(sheet).text((side + 10, row * height), text, "black", font)
    with complete(ds.folder / "check.png") as temporary:
        sheet.save(temporary, "PNG")
    print(f"  {ds.folder / 'check.png'}: four of them, decoded")


# ------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--images", metavar="FOLDER", help="pictures: <class>/<file>, or all in one flat folder")
    add("--captions", nargs="+", metavar="FILE", help="captions.jsonl or the paper's .tsv; a later file wins")
    add("--out", metavar="FOLDER", help="where the shards go")
    add("--vae", default="stabilityai/sd-vae-ft-ema", help="hub repository or folder, in diffusers' format")
    add("--text-encoder", default="google/flan-t5-xl", help="hub repository or folder of a T5")
    add("--size", type=int, default=256, help="side of the pictures, in pixels")
    add("--max-tokens", type=int, default=256, help="longer captions lose their end")
    add("--text-dtype", default="bfloat16", choices=["bfloat16", "float8"], help="float8 is half the disk")
    add("--shard-images", type=int, default=1600, help="pictures a shard; 1600 are 1 GiB with 2048-wide text")
    add("--batch-size", type=int, default=64, help="pictures, or captions, encoded at once")
    add("--workers", type=int, default=max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        help="processes that decode pictures; 0 decodes in this one")
    add("--check", metavar="FOLDER", help="verify this data set instead, and draw its check.png")
    args = parser.parse_args(argv)
    if args.check:
        check(args.check, None if args.vae == parser.get_default("vae") else args.vae)
        return
    if not (args.images and args.captions and args.out):
        raise UserError("needs --images, --captions and --out (or --check FOLDER)")
    for name, low in (("size", 8), ("max_tokens", 1), ("shard_images", 1), ("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    from caption import read_captions
    (rank, world), out = rank_and_world(), Path(args.out)
    captions = {file: text for path in args.captions for file, text in read_captions(path).items()}
    pairs, skipped = pair_up(list_images(args.images), captions)
    if not pairs:
        raise UserError(f"no image of {args.images} has a caption: images are named like "
                        f"{skipped[0]['file']}, in the captions like {next(iter(captions), 'nothing')}")
    # On CUDA T5 runs in bfloat16. The VAE does not: its means would be 1.0 to 1.2% off (0.2 to 0.5% with the
    # bits of float16, which are those of TF32, the form in which CUDA multiplies in float32 convolutions).
    cuda = torch.cuda.is_available()
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}" if cuda else "cpu"
    vae = load_vae(args.vae, device)
    tokenizer, t5 = load_text_encoder(args.text_encoder, device, torch.bfloat16 if cuda else torch.float32)
    if args.size % vae.downscale:
        raise UserError(f"--size {args.size}: this autoencoder needs a multiple of {vae.downscale}")
    listed = hashlib.sha256()
    for pair in pairs:
        listed.update(json.dumps(pair).encode())
    settings = {"version": VERSION, "size": args.size, "max_tokens": args.max_tokens,
                "text_dtype": args.text_dtype, "images_per_shard": args.shard_images,
                "precision_of_T5": str(t5.dtype).removeprefix("torch."),
                "autoencoder": fingerprint(vae, vae.config),
                "T5": fingerprint(t5, sorted(tokenizer.get_vocab().items())),
                "list_of_images_and_captions": listed.hexdigest()[:16]}
    same_settings(out, settings)

    shards, there = -(-len(pairs) // args.shard_images), set(os.listdir(out))
    todo = [k for k in range(rank, shards, world) if shard_name(k) not in there]
    if not todo and {"meta.json", "null.safetensors"} <= there:
        print(f"{out}: complete already")
        return
    count = sum(min(args.shard_images, len(pairs) - k * args.shard_images) for k in todo)
    with tqdm(total=count, desc="encode", unit="img", disable=None if rank == 0 else True) as bar:
        make_shards(args, pairs, todo, vae, tokenizer, t5, bar)
    null, mask = encode_text(tokenizer, t5, [""])
    with complete(out / "null.safetensors") as temporary:
        temporary.write_bytes(save({"text": null[mask].bfloat16().cpu()}))
    # Ranks never wait: the one that finds all shards there, usually the last, finishes (two would agree).
    if {shard_name(k) for k in range(shards)} <= set(os.listdir(out)):
        side = args.size // vae.downscale
        finish(out, {**settings, "vae": args.vae, "text_encoder": args.text_encoder, "shards": shards,
                     "counts": [], "latent_shape": [vae.config["latent_channels"], side, side],
                     "scaling_factor": vae.scaling_factor, "text_dim": null.shape[-1],
                     "longest": int(mask.sum())}, skipped)
    else:
        print(f"rank {rank}: its share is done; the last rank to end writes {out / 'meta.json'}")


if __name__ == "__main__":
    command_line(main)
