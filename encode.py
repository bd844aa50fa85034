"""Stage 3, encoding (paper 4.1, Appendix A): images -> VAE moments, captions -> T5 tokens, once, in shards.

    python encode.py --images imagenet/train --captions captions.jsonl --out encoded/train

Training reads every picture some 200 times, so the work of the two frozen encoders is done once. Kept are
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
from functools import partial
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

from common import (HelpFormatter, UserError, at_least, begin_or_resume, command_line, complete,
                    default_workers, fetch, is_last_rank, list_images, load_image, local_device,
                    one_line, rank_and_world, read_jsonl, write_jsonl)

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

def load_vae(path_or_repo, device="cpu", dtype=torch.float32):
    """A folder or hub repository in diffusers' format -> AutoencoderKL in eval mode. Raises UserError.
    Old: without `scaling_factor`, attention query/key/value/proj_attn or of 1 x 1 convolutions."""
    config = fetch(path_or_repo, "config.json")
    weights = fetch(path_or_repo, "diffusion_pytorch_model.safetensors")
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}      # today's names
    try:
        known, config = inspect.signature(AutoencoderKL).parameters, json.loads(config.read_text())
        vae = AutoencoderKL(**{name: value for name, value in config.items() if name in known})
        vae.load_state_dict({re.sub(r"\.(query|key|value|proj_attn)\.", lambda old: f".{new[old[1]]}.", name):
                             tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor
                             for name, tensor in load_file(weights).items()})
    except Exception as error:  # noqa: BLE001           half a download, other shapes, text for numbers, ...
        raise UserError(f"{path_or_repo}: no AutoencoderKL of diffusers ({one_line(error)})")
    return vae.eval().requires_grad_(False).to(device, dtype)


def load_text_encoder(path_or_repo, device="cpu", dtype=torch.float32):
    """A folder or hub repository with a T5 -> (tokenizer, its encoder in eval mode). Raises UserError."""
    from transformers import AutoTokenizer, T5EncoderModel
    fetch(path_or_repo, "config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_repo)
        t5, report = T5EncoderModel.from_pretrained(path_or_repo, dtype=dtype, output_loading_info=True)
    except Exception as error:  # noqa: BLE001           transformers raises almost anything on a wrong folder
        raise UserError(f"{path_or_repo}: not a T5 with its tokenizer ({one_line(error)})")
    for name in [*report["missing_keys"], *report["mismatched_keys"]]:   # they would be random numbers
        raise UserError(f"{path_or_repo}: not a T5 encoder's weights ({name} is missing or does not fit)")
    return tokenizer, t5.eval().requires_grad_(False).to(device)


@torch.no_grad()
def encode_text(tokenizer, t5, captions, max_tokens=256):
    """B captions -> text (B, L, D), the last hidden states, and mask (B, L) bool, True where a token is.
    A caption of more than `max_tokens` (paper: 256) loses its end. The empty prompt is one token, </s>."""
    tokens = tokenizer(list(captions), padding=True, truncation=True, max_length=max_tokens,
                       return_tensors="pt").to(t5.device)                                             # (B, L)
    text = t5(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return text, tokens.attention_mask.bool()


# ------------------------------------------------------------------------------------------------------------
# Reading an encoded data set

shard_name = "{:05d}.safetensors".format


def open_shard(path):
    """-> {name: tensor}, views into the file's memory map: only what is looked at is read. The file is closed
    again, as two data sets of 800 shards would exceed the usual 1,024 open files. Raises UserError."""
    try:
        with safe_open(path, "pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118   it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, delete it and run its encode.py command again ({error})")


def samples_of(path):
    """-> {"files", "captions", "skipped"}: a shard's lists, beside its tensors."""
    with safe_open(path, "pt") as shard:
        return json.loads(shard.metadata()["samples"])


def pack(text, text_dtype):
    """(n, D) tokens -> the tensors that a shard stores. float8: half the disk, 2.7% error (root mean square);
    e4m3 with one scale a token, so that a token with a large value costs only itself precision."""
    if text_dtype == "bfloat16":
        return {"text": text.bfloat16()}
    scale = text.float().abs().amax(1, keepdim=True).clamp(min=1e-20) / 448     # (n, 1); e4m3 ends at 448
    return {"text": (text.float() / scale).to(torch.float8_e4m3fn), "scale": scale}


E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()    # what each byte stands for


def unpack(text, scale=None):
    """What `pack` made -> (n, D) bfloat16. Looked up in a table: a quarter of the time of torch's cast."""
    if scale is None:
        return text
    return (E4M3.index_select(0, text.view(torch.uint8).int().flatten()).view(text.shape) * scale).bfloat16()


class Encoded:
    """An encoded data set, read through memory maps: a sample costs its bytes. May be pickled and forked.
    `len(ds)`, `ds.meta` (dict), `ds.null` (1, D) bfloat16, and for a sample's number i the methods below.
    Raises UserError for a folder that is none, is not finished, or lacks a shard."""

    def __init__(self, folder):
        self.folder, self.shards = Path(folder), {}     # those that were opened
        if not (self.folder / "meta.json").is_file():
            raise UserError(f"{folder}: not an encoded data set, or not a finished one (no meta.json)")
        self.meta = json.loads((self.folder / "meta.json").read_text())
        needed = {"null.safetensors", *map(shard_name, range(self.meta["shards"]))}
        for missing in sorted(needed - set(os.listdir(folder))):
            raise UserError(f"{folder}: {missing} is missing, run its encode.py command again")
        self.null = open_shard(self.folder / "null.safetensors")["text"].clone()
        self.ends = np.cumsum(self.meta["counts"])      # a shard with broken pictures is shorter

    def __getstate__(self):
        return {**self.__dict__, "shards": {}}

    def __len__(self):
        return self.meta["count"]

    def locate(self, i):
        """-> number of the shard, its tensors, number of the sample in it."""
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
        samples = samples_of(self.folder / shard_name(k))
        return samples["files"][j], samples["captions"][j]

    def caption(self, i):
        return self.sample(i)[1]


# ------------------------------------------------------------------------------------------------------------
# Making one

def read_captions(path):
    """captions.jsonl, or the .tsv of the paper's own captioner (file without its folder) -> {file: caption}.

    Raises UserError for a line without file or caption, or a file with two captions."""
    if Path(path).suffix == ".tsv":
        try:                                            # a last line without a tab was torn by a kill
            with open(path, encoding="utf-8", newline="\n") as lines:
                rows = [line.partition("\t") for line in lines if "\t" in line or line.endswith("\n")]
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8")
        rows = [(file, caption.strip()) for file, _, caption in rows]
    else:
        rows = [(row.get("file"), row.get("caption")) for row in read_jsonl(path)]
    captions = {}
    for number, (file, caption) in enumerate(rows, 1):
        if not (isinstance(file, str) and isinstance(caption, str) and file and caption):
            raise UserError(f"{path}, caption {number}: needs a file and a caption")
        if captions.setdefault(file, caption) != caption:
            raise UserError(f"{path}, caption {number}: {file} had another caption before (a name in two "
                            f"folders? then the captions must name the folder too)")
    return captions


def pair_up(files, captions):
    """Images' files and {file: caption} -> [(file, caption)] in the files' order, and rows of skipped.jsonl.
    A caption that names a file without its folder (the paper's .tsv) goes to the only image of that name."""
    pairs, skipped, used = [], [], set()
    count = Counter(map(os.path.basename, files))
    for file in files:
        name = os.path.basename(file)
        used.add(key := name if count[name] == 1 and file not in captions else file)
        if captions.get(key):
            pairs.append((file, captions[key]))
        else:
            skipped.append({"file": file, "reason": "no caption"})
    for file in [file for file in captions if file not in used]:
        reason = "images of this name in several folders" if count[file] > 1 else "no such image"
        skipped.append({"file": file, "reason": f"caption, but {reason}"})
    return pairs, skipped


def load_batch(args, pairs):
    """The workers' part: [(file, caption)] -> pixels (n, S, S, 3) uint8, their pairs, rows of skipped.jsonl.
    Arrays come through a pipe; tensors need shared memory, and where that is full they wait for ever."""
    pictures, kept, skipped = [], [], []
    for file, caption in pairs:
        try:
            pictures.append(np.asarray(load_image(f"{args.images}/{file}", args.size)))
            kept.append((file, caption))
        except OSError as error:
            skipped.append({"file": file, "reason": str(error).removeprefix(f"{args.images}/{file}: ")})
    return np.array(pictures, np.uint8).reshape(-1, args.size, args.size, 3), kept, skipped


def encode_captions(tokenizer, t5, captions, args):
    """The captions of a shard -> the tensors that keep their tokens: offset, text and, in float8, scale.
    In batches of about the same length, so that little is padded, and each different caption once ('An image
    of a tench' comes 1,300 times). Batches depend on nothing but the shard, so neither do its bytes."""
    different, tokens = sorted(set(captions), key=lambda caption: (len(caption), caption)), {}
    for i in range(0, len(different), args.batch_size):
        batch = different[i:i + args.batch_size]
        text, mask = encode_text(tokenizer, t5, batch, args.max_tokens)
        tokens.update(zip(batch, text[mask].cpu().split(mask.sum(1).tolist())))         # each (L_i, D)
    texts = [torch.empty(0, t5.config.d_model), *(tokens[caption] for caption in captions)]
    packed = [pack(text, args.text_dtype) for text in texts]
    return {"offset": torch.tensor([len(text) for text in texts]).cumsum(0),
            **{name: torch.cat([tensors[name] for tensors in packed]) for name in packed[0]}}


@torch.no_grad()
def make_shards(args, pairs, shards, vae, tokenizer, t5, bar):
    """Makes the given shards one after the other, while the workers decode the pictures of the next."""
    S, B, device = args.shard_images, args.batch_size, vae.quant_conv.weight.device
    batches = {k: [pairs[i:min(i + B, (k + 1) * S)] for i in range(k * S, min((k + 1) * S, len(pairs)), B)]
               for k in shards}
    pictures = iter(DataLoader([batch for k in shards for batch in batches[k]], batch_size=None,
                               collate_fn=partial(load_batch, args), num_workers=args.workers))
    for k in shards:
        moments, kept, skipped = [], [], []
        for batch in batches[k]:
            pixels, readable, broken = next(pictures)
            x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 127.5 - 1       # (n, 3, size, size)
            moments.append([m.half().contiguous().cpu() for m in vae.encode(x)])          # 2 x (n, C, h, w)
            kept, skipped = kept + readable, skipped + broken
            bar.update(len(batch))
        files, captions = [file for file, _ in kept], [caption for _, caption in kept]
        mean, std = map(torch.cat, zip(*moments))
        tensors = {"mean": mean, "std": std, **encode_captions(tokenizer, t5, captions, args)}
        # One entry: safetensors writes several in random order, and a shard made again must be the same.
        samples = json.dumps({"files": files, "captions": captions, "skipped": skipped})
        with complete(args.out / shard_name(k)) as temporary:
            temporary.write_bytes(save(tensors, {"samples": samples}))


def fingerprint(rows, model=None):
    """Tells lists, and encoders, apart by what they are: the same encoder may come from another path."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    for name, tensor in model.state_dict().items() if model else ():
        digest.update(f"{name} {tensor.flatten()[:256].tolist()}".encode())
    return digest.hexdigest()[:16]


def check(folder):
    """Verifies every number of every shard; draws four pictures, decoded, with their captions."""
    ds, damaged = Encoded(folder), 0
    meta, count, latents = ds.meta, len(ds), ds.meta["latent_shape"]
    for k, n in enumerate(tqdm(meta["counts"], desc="check", unit="shard")):
        try:
            shard, end = open_shard(ds.folder / shard_name(k)), int(ds.ends[k])
            lengths = shard["offset"].diff().tolist()
            wanted = {"mean": [n, *latents], "std": [n, *latents], "offset": [n + 1],
                      "text": [sum(lengths), meta["text_dim"]]}
            if (any(list(shard[name].shape) != shape for name, shape in wanted.items()) or shard["offset"][0]
                    or not all(1 <= length <= meta["longest"] for length in lengths)):
                raise UserError("shapes or offsets that differ from what meta.json says")
            for i in range(end - n, end):
                if not all(tensor.isfinite().all() for tensor in (*ds.moments(i), ds.text(i))):
                    raise UserError(f"values of {ds.sample(i)[0]} are not finite")
        except (UserError, KeyError) as error:
            damaged += 1
            print(f"{shard_name(k)}: {error}")
    if damaged:
        raise UserError(f"{folder}: {damaged} of {meta['shards']} shards are damaged: delete them and run "
                        f"its encode.py command again")
    gib = sum(file.stat().st_size for file in ds.folder.glob("*.safetensors")) / 2 ** 30
    print(f"{folder}: {count} pictures of {meta['size']} pixels, {meta['shards']} shards, {gib:.2f} GiB\n"
          f"  latents {' x '.join(map(str, latents))}, from {meta['vae']}\n"
          f"  text    {meta['text_dim']} wide, {meta['text_dtype']}, at most {meta['longest']} tokens, "
          f"from {meta['text_encoder']}\n  {ds.folder / 'check.png'}: four of them, decoded")
    vae, sheet = load_vae(meta["vae"]), Image.new("RGB", (820, 4 * 264), "white")
    for row, i in enumerate(np.linspace(0, count - 1, min(count, 4)).astype(int).tolist()):
        pixels = vae.decode(ds.moments(i)[0][None])[0].permute(1, 2, 0) * 127.5 + 127.5            # (S, S, 3)
        picture = Image.fromarray(pixels.round().clamp(0, 255).byte().numpy())
        sheet.paste(picture.resize((256, 256), Image.Resampling.BOX), (0, 264 * row))
        text = "\n".join(textwrap.wrap(": ".join(ds.sample(i)), 75))
        ImageDraw.Draw(sheet).text((266, 264 * row), text, "black", ImageFont.load_default(size=14))
    with complete(ds.folder / "check.png") as temporary:
        sheet.save(temporary, "PNG")


# ------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--images", metavar="FOLDER", help="pictures: <class>/<file>, or all in one flat folder")
    add("--captions", nargs="+", metavar="FILE", help="captions.jsonl or the paper's .tsv; a later file wins")
    add("--out", metavar="FOLDER", type=Path, help="where the shards go")
    add("--vae", default="stabilityai/sd-vae-ft-ema", help="hub repository or folder, in diffusers' format")
    add("--text-encoder", default="google/flan-t5-xl", help="hub repository or folder of a T5")
    add("--size", type=int, default=256, help="side of the pictures, in pixels")
    add("--max-tokens", type=int, default=256, help="longer captions lose their end")
    add("--text-dtype", default="bfloat16", choices=["bfloat16", "float8"], help="float8 is half the disk")
    add("--shard-images", type=int, default=1600, help="pictures a shard; 1600 are 1 GiB with 2048-wide text")
    add("--batch-size", type=int, default=64, help="pictures, or captions, encoded at once")
    add("--workers", type=int, default=default_workers(), help="that decode; 0: none")
    add("--check", metavar="FOLDER", help="verify this data set instead, and draw its check.png")
    args = parser.parse_args(argv)
    if args.check:
        return check(args.check)
    if not (args.images and args.captions and args.out):
        raise UserError("needs --images, --captions and --out (or --check FOLDER)")
    at_least(args, size=8, max_tokens=1, shard_images=1, batch_size=1, workers=0)
    rank, world = rank_and_world()
    captions = {file: text for path in args.captions for file, text in read_captions(path).items()}
    pairs, skipped = pair_up(list_images(args.images), captions)
    if not pairs:
        raise UserError(f"no image of {args.images} has a caption: images are named like "
                        f"{skipped[0]['file']}, in the captions like {next(iter(captions), 'nothing')} "
                        f"({skipped[-1]['reason']})")
    # On CUDA T5 runs in bfloat16. The VAE does not: its means would be 1.0 to 1.2% off (0.2 to 0.5% with the
    # bits of float16, which are those of TF32, the form in which CUDA multiplies in float32 convolutions).
    cuda = torch.cuda.is_available()
    device = local_device()
    vae = load_vae(args.vae, device)
    tokenizer, t5 = load_text_encoder(args.text_encoder, device, torch.bfloat16 if cuda else torch.float32)
    out, count = args.out, -(-len(pairs) // args.shard_images)
    if args.size % vae.downscale:
        raise UserError(f"--size {args.size}: this autoencoder needs a multiple of {vae.downscale}")
    settings = {"version": 1, "size": args.size, "max_tokens": args.max_tokens, "text_dtype": args.text_dtype,
                "images_per_shard": args.shard_images, "precision_of_T5": str(t5.dtype),
                "autoencoder": fingerprint([vae.config], vae),
                "T5": fingerprint(sorted(tokenizer.get_vocab().items()), t5),
                "list_of_images_and_captions": fingerprint(pairs)}
    begin_or_resume(out / "settings.json", out, settings)

    needed, there = {"null.safetensors", *map(shard_name, range(count))}, set(os.listdir(out))
    if needed | {"meta.json"} <= there:
        print(f"{out}: complete already")
        return
    mine = [k for k in range(rank, count, world) if shard_name(k) not in there]
    total = sum(min(args.shard_images, len(pairs) - k * args.shard_images) for k in mine)
    with tqdm(total=total, desc="encode", unit="img", disable=rank > 0) as bar:
        make_shards(args, pairs, mine, vae, tokenizer, t5, bar)
    null, mask = encode_text(tokenizer, t5, [""])                       # (1, 1, D)
    with complete(out / "null.safetensors") as temporary:
        temporary.write_bytes(save(pack(null[mask].cpu(), "bfloat16")))
    if not is_last_rank(rank, [out / name for name in needed], out / "meta.json"):
        return
    lengths = [open_shard(out / shard_name(k))["offset"].diff().tolist() for k in range(count)]
    skipped += [row for k in range(count) for row in samples_of(out / shard_name(k))["skipped"]]
    counts = [len(shard) for shard in lengths]          # pictures in each shard
    meta = {**settings, "vae": args.vae, "text_encoder": args.text_encoder, "shards": count, "counts": counts,
            "latent_shape": [vae.config["latent_channels"], *[args.size // vae.downscale] * 2],
            "text_dim": null.shape[-1], "longest": max(itertools.chain([1], *lengths)),
            "count": sum(counts), "scaling_factor": vae.scaling_factor}
    write_jsonl(out / "skipped.jsonl", skipped)
    with complete(out / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1))
    print(f"{out}: {sum(counts)} pictures in {count} shards, {len(skipped)} skipped (see skipped.jsonl)")


if __name__ == "__main__":
    command_line(main)
