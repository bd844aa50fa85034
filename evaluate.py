"""Stage 6, evaluation (paper 4.1): the numbers of its tables, each as the reference implementation gives it.

    python evaluate.py quality --real imagenet/val --fake samples

`quality` and `clip` make Table 1, `geneval` Table 2, `dpg` Table 3; `compare` sets results side by side.
Each prints its table in Markdown and adds to results.json beside the images (scores, settings, hashes of the
weights, counts, versions). `evaluate.py COMMAND --help` says what a command needs.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import os
import re
import sys
from collections import ChainMap, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from common import (HelpFormatter, UserError, command_line, complete, fetch, list_images,
                    open_image, read_jsonl, sha256, write_jsonl)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # mean, deviation of pixels: DINOv2, Mask2Former
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)              # CLIP
INCEPTION, CLIP = "pt_inception-2015-12-05-6726825d.pth", "openai/clip-vit-large-patch14"


# ------------------------------------------------------------------------------------------------------------
# Table 1: two sets of features -> Fréchet distance; precision, recall, density, coverage

def spread(x):
    """Features (N, D) -> mean (D,), factor (min(N, D), D) with factor^T factor = covariance. Float64."""
    if len(x) < 2:
        raise UserError(f"a Fréchet distance needs at least 2 images on each side, here is {len(x)}")
    mean = x.mean(0, dtype=torch.float64)
    if not mean.isfinite().all():
        raise UserError("a Fréchet distance needs finite features, here are NaN or infinite ones")
    scale = (len(x) - 1) ** 0.5
    if len(x) <= x.shape[1]:                                # the samples themselves are the factor
        return mean, (x.double() - mean) / scale
    # In parts: all 50,000 x 2048 in float64 would be 800 MB.
    covariance = sum(part.T @ part for part in ((part.double() - mean) / scale for part in x.split(8192)))
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return mean, lower.T
    values, vectors = torch.linalg.eigh(covariance)         # a feature is constant: Cholesky has no answer
    return mean, (vectors * values.clamp(min=0).sqrt()).T


def frechet_distance(a, b):
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), with means m and unbiased covariances S of features
    a (N, D) and b (M, D), arrays or tensors -> float. On `Inception`'s features it is FID, as pytorch-fid's.

    With S = F^T F, the nonzero eigenvalues of S_a S_b are those of P P^T, P = F_a F_b^T: symmetric, so there
    is no Schur decomposition as in scipy's sqrtm, nor a loss of digits if N or M is below D."""
    (mean_a, factor_a), (mean_b, factor_b) = (spread(torch.as_tensor(x)) for x in (a, b))
    P = factor_a @ factor_b.T                                                               # (K_a, K_b)
    eigenvalues = torch.linalg.eigvalsh(P @ P.T if P.shape[0] <= P.shape[1] else P.T @ P)
    trace = factor_a.square().sum() + factor_b.square().sum() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return max(float((mean_a - mean_b).square().sum() + trace), 0.0)                    # < 0 only by rounding


def prdc(real, fake, k=3):
    """Precision, recall (Kynkäänniemi et al. 2019), density, coverage (Naeem et al. 2020), as clovaai's prdc.

    real (N, D), fake (M, D), arrays or tensors -> {"precision", "recall", "density", "coverage"}. A sample's
    ball reaches to the k-th neighbour in its own set, itself not counted; its border is outside. 128 rows at
    a time, so memory grows with N + M, not N x M. Distances are float32; the few too close to a border for
    that are computed again in float64. Raises UserError for k samples or fewer."""
    real, fake = (x if x.dtype == torch.float64 else x.float() for x in map(torch.as_tensor, (real, fake)))
    if not 1 <= k < min(len(real), len(fake)):
        raise UserError(f"k = {k} neighbours need more than k images: real {len(real)}, fake {len(fake)}")
    r, f = ((x - real.mean(0)).float() for x in (real, fake))               # float32 is finer near the origin
    rr, ff = (x.square().sum(1, keepdim=True) for x in (r, f))
    doubt = 1e-5 * (rr.max() + ff.max())                    # above the rounding of a float32 squared distance

    def exact(x, y):                                        # squared distances of pairs, float64
        return (x.double() - y.double()).square().sum(-1)

    def distances(a, aa, b, bb):                            # squared: |a|^2 - 2 a.b + |b|^2 as one product
        left, right = torch.cat([-2 * a, aa, aa ** 0], 1), torch.cat([b, bb ** 0, bb], 1)
        buffer = torch.empty(128, len(b), device=b.device)
        for rows in torch.arange(len(a), device=a.device).split(128):
            yield rows, torch.mm(left[rows], right.T, out=buffer[:len(rows)])

    def radii(x, z, zz):                                    # (N,) squared, float64
        radius = torch.empty(len(z), dtype=torch.float64, device=z.device)
        for rows, d in distances(z, zz, z, zz):                             # (128, N)
            d[torch.arange(len(rows)), rows] = torch.inf                    # nobody is his own neighbour
            near = d.topk(min(k + 8, len(z) - 1), largest=False).indices    # 8 more, as float32 may misplace
            radius[rows] = exact(x[rows, None], x[near]).kthvalue(k).values
        return radius

    def inside(rows, d, radius):                            # the pairs (i, j) closer than their ball's radius
        i, j = (d < (radius + doubt).float()).nonzero(as_tuple=True)
        limit = radius.expand_as(d)[i, j]
        held = d[i, j] < limit - doubt
        for n in (~held).nonzero().flatten().split(4096):
            held[n] = exact(real[rows[i[n]]], fake[j[n]]) < limit[n]
        return rows[i[held]], j[held]

    R, Q = radii(real, r, rr), radii(fake, f, ff)
    covered, recalled, precise = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (r, r, f))
    pairs = 0
    for rows, d in distances(r, rr, f, ff):                                 # (128, M)
        i, j = inside(rows, d, R[rows, None])               # f_j in the ball of r_i
        covered[i] = precise[j] = True
        pairs += len(i)
        recalled[inside(rows, d, Q[None])[0]] = True        # r_i in the ball of f_j
    precision, recall, coverage = (float(x.double().mean()) for x in (precise, recalled, covered))
    density = pairs / (k * len(fake))
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


# ------------------------------------------------------------------------------------------------------------
# Inception-v3 of 2015-12-05, the network of FID, its parts named as torchvision's

def conv(width, out, kernel=1, stride=1, padding="same"):
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(width, out, kernel, stride, padding if stride == 1 else 0, bias=False),
        bn=nn.BatchNorm2d(out, eps=0.001), relu=nn.ReLU(inplace=True)))


class Mixed(nn.Module):
    """Branches {name: [(channels, kernel, stride), ...]} side by side; kernel "fork": 1 x 3 beside 3 x 1."""

    def __init__(self, width, pool, **branches):
        super().__init__()
        self.branches = []                                  # lists of steps, lists of what is side by side
        for name, steps in branches.items():
            channels, branch = width, [[pool]] if name == "branch_pool" else []
            for n, (out, kernel, *stride) in enumerate(steps, 1):
                part = f"{name}_{n}" if len(steps) > 1 else name
                parts = {f"{part}a": (1, 3), f"{part}b": (3, 1)} if kernel == "fork" else {part: kernel}
                for part, kernel in parts.items():
                    self.add_module(part, conv(channels, out, kernel, *stride))
                branch.append([self.get_submodule(part) for part in parts])
                channels = out
            self.branches.append(branch)

    def forward(self, x):
        def step(h, parts):
            return torch.cat([part(h) for part in parts], 1)
        return torch.cat([functools.reduce(step, branch, x) for branch in self.branches], 1)


# TensorFlow's average does not count the padding. Mixed_7c takes the maximum instead: a slip of the graph of
# 2015 that every FID since has kept.
average, maximum = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1)
halve = nn.MaxPool2d(3, 2)


def resize_tf1(x, size=299):
    """TensorFlow 1's bilinear resize of (B, C, H, W): pixel i is taken at i x scale, no half-pixel shift,
    between its two neighbours, with no antialias. FID has been computed on images like that ever since."""
    for dim in 2, 3:
        source = torch.arange(size, device=x.device, dtype=torch.float32) * (x.shape[dim] / size)
        low = source.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        weight = (source - low).view(-1, *[1] * (3 - dim))
        x = x.index_select(dim, low).lerp(x.index_select(dim, high), weight)
    return x


class Inception(nn.Sequential):
    """FID's Inception-v3: images (B, 3, H, W) of any size, values 0..255 (uint8) -> features (B, 2048).

    `weights`: the file pt_inception-2015-12-05-6726825d.pth or torch-fidelity's; without, random ones until
    `load_state_dict`, with or without the classifier's. Raises UserError for another file."""

    def __init__(self, weights=None):
        super().__init__()                                                                  # (B, 3, 299, 299)
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = conv(3, 32, 3, 2), conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3, self.maxpool1 = conv(32, 64, 3), halve                          # (B, 64, 73, 73)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = conv(64, 80), conv(80, 192, 3, padding=0)
        self.maxpool2 = halve                                                               # (B, 192, 35, 35)
        for name, width, pooled in ("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64):       # 35 x 35
            self.add_module(f"Mixed_{name}", Mixed(
                width, average, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)]))
        self.Mixed_6a = Mixed(288, halve, branch3x3=[(384, 3, 2)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[])
        for name, c in ("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192):                  # 17 x 17
            self.add_module(f"Mixed_{name}", Mixed(
                768, average, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, (1, 7)), (192, (7, 1))],
                branch7x7dbl=[(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
                branch_pool=[(192, 1)]))
        self.Mixed_7a = Mixed(
            768, halve, branch3x3=[(192, 1), (320, 3, 2)],
            branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], branch_pool=[])
        for name, width, pool in ("7b", 1280, average), ("7c", 2048, maximum):              # (B, 2048, 8, 8)
            self.add_module(f"Mixed_{name}", Mixed(
                width, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, "fork")],
                branch3x3dbl=[(448, 1), (384, 3), (384, "fork")], branch_pool=[(192, 1)]))
        self.eval().requires_grad_(False)
        if weights is not None:
            try:
                self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            except Exception as error:  # noqa: BLE001      a wrong file fails in any of a dozen ways
                reason = getattr(error, "strerror", None) or "not the Inception weights of FID"
                raise UserError(f"{weights}: {reason} ({INCEPTION} or torch-fidelity's)") from None

    def load_state_dict(self, state, *options, **more):
        kept = {name: x for name, x in state.items() if not name.startswith(("fc.", "AuxLogits."))}
        return super().load_state_dict(kept, *options, **more)

    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)             # TF32 would move the third digit
    def forward(self, images):
        return super().forward((resize_tf1(images.float()) - 128) / 128).mean((2, 3))


# ------------------------------------------------------------------------------------------------------------
# Images and models from outside

read = functools.partial(open_image, size=1 << 16)          # no JPEG is so large that it gets reduced


def normalised(image, mean, std):
    """RGB PIL image -> (3, H, W) float32, shifted and scaled as a network was trained with."""
    x = torch.from_numpy(np.array(image)).float() / 255
    return ((x - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)


def batches(folder, files, load, size, total=None):
    """Yields ([file], [load(path)]) of up to `size` files, while threads load the next ones. What cannot be
    read is left out: skipped.jsonl names it, stderr the first; UserError where that is all `total` images."""
    def attempt(file):
        try:
            return file, load(Path(folder, file))
        except OSError as error:
            skipped[file] = str(error)
    skipped, coming, total = {}, (), total or len(files)
    parts = [files[i:i + size] for i in range(0, len(files), size)]
    with ThreadPoolExecutor() as pool:
        for part in tqdm([*parts, []], disable=len(parts) < 3):
            coming, loaded = pool.map(attempt, part), [pair for pair in coming if pair]
            if loaded:
                yield tuple(zip(*loaded))
    if skipped:
        first = skipped[min(skipped)]
        if len(skipped) == total:
            raise UserError(f"{folder}: none of its {total} images is readable; the first: {first}")
        print(f"evaluate.py: skipped {len(skipped)} of {total} images in {folder}, see its skipped.jsonl; "
              f"the first: {first}", file=sys.stderr)
        with contextlib.suppress(OSError):                  # a folder that is read-only
            write_jsonl(Path(folder, "skipped.jsonl"),
                        ({"file": file, "error": skipped[file]} for file in sorted(skipped)))


def stamp(folder, file):
    return "{0.st_size}:{0.st_mtime_ns}".format(os.stat(Path(folder, file)))


def weights_hash(name):
    """sha256 of the weights of a model folder or hub id (of their index, where they are in several files)."""
    return sha256(fetch(name, "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"))


@functools.cache
def pretrained(name, kind, companion=None, **options):
    """Folder or hub id -> (model of transformers' class `kind` in eval mode on DEVICE, its `companion`: a
    tokenizer or processor). UserError where there is none, or the weights are those of another class."""
    import transformers
    weights_hash(name)                                      # says so where there is no such model
    try:
        model, info = getattr(transformers, kind).from_pretrained(name, output_loading_info=True, **options)
        companion = companion and getattr(transformers, companion).from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{name}: does not load as {kind} ({reason})") from None
    if len(info["missing_keys"]) > len(model.state_dict()) / 10:
        raise UserError(f"{name}: these are not the weights of a {type(model).__name__}")
    return model.eval().to(DEVICE), companion


def judged(folder, files, log, weights, judge, given):
    """Yields (file, image, row), a row being what models say of the image: from the JSONL file `given` by the
    user, or else judge(file, image), kept in folder/log with what the caller adds to it, so that a killed run
    goes on there; judged again where the image or the `weights` have changed. Raises UserError."""
    path, rows = Path(given or Path(folder, log)), {}
    models = list(weights.values())                         # hashes
    made_of = {file: {"models": models, "stamp": stamp(folder, file)} for file in files}
    for row in read_jsonl(path) if given or path.exists() else []:
        file = row.get("file")
        if file in made_of and (given or made_of[file].items() <= row.items()):
            rows[file] = row
    if not given:
        write_jsonl(path, rows.values())                    # without a torn line
    elif missing := [file for file in files if file not in rows]:
        raise UserError(f"{given}: no line for {missing[0]} and {len(missing) - 1} more images")
    for [file], [image] in batches(folder, files, read, 1):
        row = rows.get(file) or {"file": file, **judge(file, image)}
        yield file, image, row
        if file not in rows:
            with open(path, "a", encoding="utf-8") as out:
                out.write(json.dumps({**row, **made_of[file]}) + "\n")


# ------------------------------------------------------------------------------------------------------------
# Table 1: `quality`, from features that are kept beside the images; `clip`, does the image show the prompt?

NETWORKS, SAVE_EVERY = ("inception", "dino"), 128           # batches


def features(source, args, models):
    """A folder of images, or a file of --save-stats -> {"inception": (N, 2048), "dino": (N, 1024)} float32.

    A folder's are kept in its .features/, a file for each `models` (hashes): a later run computes only those
    of new or changed images. Raises UserError."""
    if source.endswith(".safetensors"):
        try:
            with safe_open(source, "pt") as stored:
                if json.loads(stored.metadata()["models"]) != models:
                    raise UserError(f"{source}: made with other weights than this run's")
                return {name: stored.get_tensor(name) for name in NETWORKS}
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            raise UserError(f"{source}: not a file that --save-stats wrote") from None
    stamps, rows = {file: stamp(source, file) for file in list_images(source)}, {}  # rows: {file: features}
    key = hashlib.sha256("".join(models).encode()).hexdigest()[:16]
    path = Path(source, ".features", f"{key}.safetensors")
    if path.exists():
        with safe_open(path, "pt") as stored:
            old = json.loads(stored.metadata()["stamps"])
            table = zip(*map(stored.get_tensor, NETWORKS))
        rows = {file: row for file, row in zip(old, table) if stamps.get(file) == old[file]}
    todo = [file for file in stamps if file not in rows]

    def load(path):                                         # resized one by one, as their sizes differ
        image = read(path)
        return (resize_tf1(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float())[0],
                normalised(image.resize((224, 224), Image.Resampling.BICUBIC), *IMAGENET))

    def gather():                                           # what there is, in the order of the file names
        kept = {file: stamps[file] for file in stamps if file in rows}
        table = dict(zip(NETWORKS, map(torch.stack, zip(*map(rows.get, kept)))))
        if todo:
            with contextlib.suppress(OSError, SafetensorError), complete(path) as temporary:     # read-only
                save_file(table, temporary, {"stamps": json.dumps(kept)})
        return table

    if todo:
        inception, dino = Inception(args.inception).to(DEVICE), pretrained(args.dino, "Dinov2Model")[0]
    for count, (names, images) in enumerate(batches(source, todo, load, 64, len(stamps)), 1):
        x, y = (torch.stack(part).to(DEVICE) for part in zip(*images))  # (B, 3, 299, 299), (B, 3, 224, 224)
        with torch.no_grad():
            found = inception(x).cpu(), dino(y).last_hidden_state[:, 0].float().cpu()   # its class tokens
        rows.update(zip(names, zip(*found)))
        if count % SAVE_EVERY == 0:
            gather()
    return gather()


def quality(args):
    """Table 1: FID, FID-DINOv2, precision, recall, density, coverage of --fake against --real"""
    if not args.fake and not args.save_stats:
        raise UserError("give --fake, or --save-stats: --real alone has nothing to be compared with")
    for folder in (args.fake, "" if args.real.endswith(".safetensors") else args.real):
        if folder:
            list_images(folder)                             # wrong paths are told before any download
    if not args.inception:
        args.inception = os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION)
        if not os.path.exists(args.inception):
            url = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"
            try:
                torch.hub.load_state_dict_from_url(url, weights_only=True, check_hash=True)
            except OSError:
                raise UserError(f"{url}: out of reach, give the file with --inception") from None
    weights = {args.inception: sha256(args.inception), args.dino: weights_hash(args.dino)}
    models = list(weights.values())
    real = features(args.real, args, models)
    if args.save_stats:
        with complete(args.save_stats) as path:
            save_file(real, path, {"models": json.dumps(models)})
    if args.fake:
        fake = features(args.fake, args, models)
        (x, u), (y, v) = ([side[name].to(DEVICE) for name in NETWORKS] for side in (real, fake))
        scores = {**prdc(u, v, args.k), "fid": frechet_distance(x, y), "fid_dino": frechet_distance(u, v)}
        counts = {"real": len(x), "fake": len(y), "skipped": len(list_images(args.fake)) - len(y)}
        finish(args.fake, args, scores, weights, counts)


@torch.no_grad()
def clip_images(name, images):
    """PIL images -> unit vectors (B, D) of a CLIP, on the CPU."""
    model, _ = pretrained(name, "CLIPModel", "AutoTokenizer")
    prepared, size = [], model.config.vision_config.image_size                              # 224
    for image in images:                                    # shorter side to 224, then centre crop
        short = min(image.size)
        image = image.resize([int(size * side / short) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in image.size)
        prepared.append(normalised(image.crop((left, top, left + size, top + size)), *OPENAI))
    pooled = model.vision_model(torch.stack(prepared).to(DEVICE)).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1).cpu()


@torch.no_grad()
def clip_texts(name, texts):
    """Texts, cut after 77 tokens -> unit vectors (B, D) of a CLIP, on the CPU."""
    model, tokenizer = pretrained(name, "CLIPModel", "AutoTokenizer")
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                       max_length=model.config.text_config.max_position_embeddings).to(DEVICE)
    pooled = model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1).cpu()


def clip(args):
    """Table 1: CLIPScore, and for prompts beyond CLIP's 77 tokens the Jina score, of --samples"""
    rows, folder, notes = read_jsonl(args.samples), Path(args.samples).parent, []
    if not rows:
        raise UserError(f"{args.samples}: no samples in it")
    if not all(isinstance(row.get(key), str) for row in rows for key in ("file", "prompt")):
        raise UserError(f'{args.samples}: every line needs a "file" and a "prompt"')
    prompts, weights = {row["file"]: row["prompt"] for row in rows}, {args.clip: weights_hash(args.clip)}
    encoders = {"clip": (functools.partial(clip_images, args.clip), functools.partial(clip_texts, args.clip))}
    if args.trust_remote_code:
        jina, _ = pretrained(args.jina, "AutoModel", trust_remote_code=True)
        encoders["jina"], weights[args.jina] = (jina.encode_image, jina.encode_text), weights_hash(args.jina)
    else:
        notes.append(f"Jina score left out: {args.jina} brings its own code (--trust-remote-code runs it)")
    cosines, scores = {name: [] for name in encoders}, {}
    for files, images in batches(folder, list(prompts), read, 32):
        for name, (of_images, of_texts) in encoders.items():
            both = of_images(list(images)), of_texts([prompts[file] for file in files])
            x, y = (torch.as_tensor(vectors).double().cpu() for vectors in both)        # (B, D)
            cosines[name].append(F.cosine_similarity(x, y))
    for name, values in cosines.items():
        score = 100 * torch.cat(values).clamp(min=0)
        scores[name] = float(score.mean())
        scores[f"{name}_error"] = float(score.std(correction=int(len(score) > 1)) / len(score) ** 0.5)
    counts = {"samples": len(score), "skipped": len(prompts) - len(score)}
    finish(folder, args, scores, weights, counts, notes)


# ------------------------------------------------------------------------------------------------------------
# Table 2, `geneval`: the objects that are seen, their places and colours, against what the prompt asks for

TASKS = {"single_object": "One obj. ↑", "two_object": "Two obj. ↑", "counting": "Count. ↑",
         "colors": "Col. ↑", "position": "Pos. ↑", "color_attr": "Col. attr. ↑"}
COLORS = "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
CONFIDENT, CONFIDENT_COUNTING, MOST = 0.3, 0.9, 16          # detections above this, at most so many a class
NEAR, TURN = 0.1, 0.5                                       # share of both sizes; of the offset, on one axis
COCO = """\
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,
handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,
surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,
broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,
laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,
book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")


def relations(a, b):
    """Where box `a` lies relative to box `b` ([x0, y0, x1, y1], y downwards) -> set of relation names."""
    a, b = (np.asarray(box[:4], float).reshape(2, 2) for box in (a, b))     # corners
    offset = a.mean(0) - b.mean(0)                                          # (2,) x, y
    sides = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - NEAR * sides, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)                                  # the norm is the unshrunk one's
    held = {"left of": x < -TURN, "right of": x > TURN, "above": y < -TURN, "below": y > TURN}
    return {name for name, holds in held.items() if holds}


def geneval_verdict(objects, metadata, color_of):
    """GenEval's rules for one image (as in its evaluate_images.py) -> (correct, reason; "" when correct).

    objects: {class: [{"box": [x0, y0, x1, y1], ...}, ...]}, most confident first; metadata: the benchmark's
    line, of "include" and "exclude" clauses; color_of(object, class) -> name of its colour, asked only where
    a clause names a colour and its count is met."""
    faults, matched = [], []                                # matched: a clause's objects, None if it failed
    for clause in metadata.get("include", []):
        name, count, color = clause["class"], clause["count"], clause.get("color")
        found, fault = objects.get(name, [])[:count], ""
        relation, target = clause.get("position", (None, None))
        if len(found) < count:
            fault = f"expected {name}>={count}, found {len(found)}"
        elif color and (colors := [color_of(thing, name) for thing in found]) != [color] * count:
            fault = f"expected {color} {name}>={count}, found {', '.join(colors)}"
        elif relation and matched[target] is None:
            fault = f"no target for {name} to be {relation}"
        elif relation and not all(relation in relations(thing["box"], other["box"])
                                  for thing in found for other in matched[target]):
            fault = f"expected {name} {relation} {metadata['include'][target]['class']}"
        matched.append(None if fault else found)
        faults += [fault] if fault else []
    for clause in metadata.get("exclude", []):
        found = len(objects.get(clause["class"], []))
        if found >= clause["count"]:
            faults.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return not faults, "; ".join(faults)


@torch.no_grad()
def detect(name, image):
    """Mask2Former `name` on an RGB PIL image -> {class: [{"box", "score", "mask" (H, W) bool}, ...]}.

    As in mmdet, with which GenEval was made: the 100 best (query, class) pairs; score = class probability x
    mean probability of the mask's pixels; masks may overlap; boxes around them, right, bottom exclusive."""
    model, _ = pretrained(name, "Mask2FormerForUniversalSegmentation")
    names = COCO if len(model.config.id2label) == 80 else model.config.id2label     # GenEval says "tv remote"
    (width, height), scale = image.size, min(800 / min(image.size), 1333 / max(image.size))
    w, h = int(width * scale + 0.5), int(height * scale + 0.5)
    x = normalised(image.resize((w, h), Image.Resampling.BILINEAR), *IMAGENET)
    x = F.pad(x, (0, -w % 32, 0, -h % 32))[None].to(DEVICE)                                 # (1, 3, H', W')
    output = model(pixel_values=x)
    classes = output.class_queries_logits[0].float().softmax(-1)[:, :-1]                    # (Q, C)
    best, which = classes.flatten().topk(min(100, classes.numel()))
    found = {}
    for probability, index in zip(best[best > CONFIDENT].tolist(), which.tolist()):
        query, label = divmod(index, classes.shape[1])
        logits = output.masks_queries_logits[0, query].float()[None, None]
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear")[:, :, :h, :w]
        logits = F.interpolate(logits, (height, width), mode="bilinear")[0, 0]              # (H, W)
        mask = logits > 0
        score = probability * float(logits.sigmoid()[mask].sum() / (mask.sum() + 1e-6))     # only ever lower
        if score > CONFIDENT:
            ys, xs = (mask.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
            found.setdefault(names[label], []).append({
                "box": [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], "score": score, "mask": mask.cpu().numpy()})
    return found


@functools.cache
def color_texts(clip, name):
    """The ten colours of a thing of class `name`, as embeddings (10, D)."""
    templates = "a photo of a {} " + name, "a photo of a {}-colored " + name, "a photo of a {} object"
    means = [clip_texts(clip, [text.format(color) for text in templates]).mean(0) for color in COLORS]
    return F.normalize(torch.stack(means), dim=-1)


def color_of_object(clip, image, thing, name):
    """One of COLORS, kept as thing["color"]: by CLIP zero-shot on the object alone, #999 outside its mask."""
    if not thing.get("color"):
        if "mask" in thing:
            grey = Image.new("RGB", image.size, "#999")
            image = Image.composite(image, grey, Image.fromarray(thing["mask"]))
        x0, y0, x1, y1 = map(round, thing["box"][:4])
        vector = clip_images(clip, [image.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))])[0]     # (D,)
        thing["color"] = COLORS[int((color_texts(clip, name) @ vector).argmax())]
    return thing["color"]


def read_geneval(folder):
    """GenEval's layout, 00000/metadata.jsonl and 00000/samples/0000.png, ... -> {file: metadata}."""
    images = {}
    for path in sorted(path for path in Path(folder).glob("*/") if path.name.isdigit()):
        file = path / "metadata.jsonl"
        if not file.exists():
            raise UserError(f"{path}: no metadata.jsonl in it, which says what its images should show")
        metadata = (read_jsonl(file) or [{}])[0]
        if not {"tag", "prompt", "include"} <= set(metadata):
            raise UserError(f"{file}: not a line of GenEval's (tag, prompt, include)")
        found = sorted(image.name for image in path.glob("samples/*.png") if image.stem.isdigit())
        if not found:
            raise UserError(f"{path}: no images in it (samples/0000.png, ...)")
        images.update({f"{path.name}/samples/{name}": metadata for name in found})
    if not images:
        raise UserError(f"{folder}: no 00000/metadata.jsonl, ... in it, as sample.py --format geneval writes")
    return images


def geneval(args):
    """Table 2: GenEval's six tasks, on --images (original prompts, ◇) and --extended (extended ones, ★)"""
    folders = [folder for folder in (args.images, args.extended) if folder]
    given = args.detections or [None] * len(folders)
    if len(given) != len(folders):
        raise UserError("--detections: one file for --images, a second one for --extended if it is given")
    weights = {} if args.detections else {name: weights_hash(name) for name in (args.detector, args.clip)}
    scores, counts, notes = {}, {}, []
    for prompts, folder, detections in zip(("original", "extended"), folders, given):
        images, verdicts, right = read_geneval(folder), [], {}
        for file, image, row in judged(folder, list(images), "detections.jsonl", weights,
                                       lambda _, seen: {"objects": detect(args.detector, seen)}, detections):
            metadata, color_of = images[file], functools.partial(color_of_object, args.clip, image)
            try:
                floor = CONFIDENT_COUNTING if metadata["tag"] == "counting" else CONFIDENT
                seen = {name: [thing for thing in sorted(things, key=lambda thing: -thing["score"])
                               if thing["score"] > floor][:MOST] for name, things in row["objects"].items()}
                correct, reason = geneval_verdict(seen, metadata, color_of)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                raise UserError(f"{Path(folder, file)}: its metadata.jsonl or detections lack something "
                                f"({type(error).__name__}: {error})") from None
            for thing in itertools.chain(*row["objects"].values()):
                thing.pop("mask", None)                     # it served for the colours, and is not kept
            right.setdefault(metadata["tag"], []).append(correct)
            verdicts.append({"filename": file, "tag": metadata["tag"], "prompt": metadata["prompt"],
                             "correct": correct, "reason": reason})
        write_jsonl(Path(folder, "geneval.jsonl"), verdicts)                # in the form of GenEval's results
        tasks = {tag: float(np.mean(values)) for tag, values in right.items()}      # over a task's images
        scores[prompts] = {"overall": float(np.mean(list(tasks.values()))), **tasks}    # mean over the tasks
        counts[prompts] = {"prompts": len({file.split("/")[0] for file in images}), "images": len(verdicts),
                           "skipped": len(images) - len(verdicts)}
        if absent := [tag for tag in TASKS if tag not in tasks]:
            notes.append(f"{folder}: no prompts of {', '.join(absent)}, overall is without them")
    finish(args.images, args, scores, weights, counts, notes)


# ------------------------------------------------------------------------------------------------------------
# Table 3, `dpg`: yes-or-no questions about each image, some meaningful only where others are answered yes

def dpg_score(answers, dependency):
    """answers {id: bool}, dependency {id: [parent ids]} (0: none) -> share of questions answered yes, where a
    question counts as no if a parent does; in ascending order of ids, so that a no reaches grandchildren."""
    score = {question: float(answer) for question, answer in answers.items()}
    for question in sorted(score):
        if any(parent != 0 and score.get(parent, 1) == 0 for parent in dependency.get(question, ())):
            score[question] = 0.0
    return sum(score.values()) / len(score)


def read_questions(path):
    """dpg_bench.csv -> {prompt id: ({question id: question}, {id: [parent ids]}, {id: level-1 category})}, of
    all lines (the official script passes over the first question). Raises UserError."""
    prompts, needed = {}, {"item_id", "proposition_id", "dependency", "tuple", "question_natural_language"}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            if missing := needed.difference(reader.fieldnames or ()):
                raise UserError(f"{path}: no column {', '.join(sorted(missing))}")
            for row in reader:
                texts, parents, categories = prompts.setdefault(row["item_id"], ({}, {}, {}))
                q = int(row["proposition_id"])
                categories[q] = re.split("[(-]", row["tuple"])[0].strip()   # "attribute - color (car, red)"
                parents[q] = [int(parent) for parent in row["dependency"].split(",")]
                texts[q] = row["question_natural_language"]
        except (ValueError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(f"{path} line {reader.line_num}: not a question of DPG-Bench ({error})") from None
    if not prompts:
        raise UserError(f"{path}: no questions in it")
    return prompts


@torch.no_grad()
def ask(name, image, questions):
    """What a VQA model (folder or hub id) says to yes-or-no questions about a PIL image -> [bool]."""
    model, processor = pretrained(name, "AutoModelForVisualQuestionAnswering", "AutoProcessor")
    inputs = processor([image] * len(questions), questions, padding=True, return_tensors="pt").to(DEVICE)
    if model.can_generate():                                # BLIP says words, ViLT chooses a label
        tokens = model.generate(**inputs, max_new_tokens=10)
        said = processor.batch_decode(tokens, skip_special_tokens=True)
    else:
        said = [model.config.id2label[int(n)] for n in model(**inputs).logits.argmax(-1)]
    return [re.match(r"\W*yes\b", text, re.IGNORECASE) is not None for text in said]


def dpg(args):
    """Table 3: DPG-Bench on 2 x 2 grids named after their prompts' ids"""
    prompts, files = read_questions(args.questions), list_images(args.images)
    known = [file for file in files if Path(file).stem in prompts]
    if not known:
        raise UserError(f"{args.images}: no image is named after a prompt of {args.questions}, "
                        f"like {min(prompts)}.png")
    args.judge, weights = args.answers or args.vqa, {} if args.answers else {args.vqa: weights_hash(args.vqa)}
    weights[args.questions] = sha256(args.questions)
    sizes, values = set(), {"overall": []}                  # values: and of each category

    def judge(file, grid):
        sizes.add(grid.size)
        (width, height), half, texts = grid.size, grid.width // 2, prompts[Path(file).stem][0]
        if width != height or width % 2 or len(sizes) > 1:
            raise UserError(f"{Path(args.images, file)}: {width} x {height} pixels are not a 2 x 2 grid of "
                            "square images, as large as the others (sample.py --format dpg makes them)")
        quarters = [grid.crop((x, y, x + half, y + half)) for y in (0, half) for x in (0, half)]
        answers = [ask(args.vqa, quarter, list(texts.values())) for quarter in quarters]
        return {"answers": [dict(zip(map(str, texts), said)) for said in answers]}

    for file, _, row in judged(args.images, known, "answers.jsonl", weights, judge, args.answers):
        texts, parents, categories = prompts[Path(file).stem]
        try:
            answers = [{q: str(one[str(q)]).lower() in ("true", "yes", "1") for q in texts}
                       for one in row["answers"] or [{}]]
        except (KeyError, TypeError):
            raise UserError(f'{args.judge}: "answers" of {file} must list, for each image, {{question id: '
                            f"true or false}}, with ids {', '.join(map(str, texts))}") from None
        values["overall"].append(np.mean([dpg_score(one, parents) for one in answers]))
        for q, category in categories.items():
            values.setdefault(category, []).extend(one[q] for one in answers)       # uncorrected
    notes = [f"judge: {args.judge}. The paper's is mPLUG-large; only numbers of one judge compare",
             "categories count all images of a grid; the official script counts the last one"]
    if len(known) < len(prompts) or len(known) < len(files):
        notes.append(f"{len(prompts) - len(known)} of {len(prompts)} prompts have no image, "
                     f"{len(files) - len(known)} of {len(files)} images no prompt")
    counts = {"prompts": len(values["overall"]), "skipped": len(known) - len(values["overall"])}
    scores = {name: 100 * float(np.mean(each)) for name, each in values.items()}
    finish(args.images, args, scores, weights, counts, notes)


# ------------------------------------------------------------------------------------------------------------
# Tables in the paper's order, results.json, command line

TABLES = [                                                  # title, sections, {score: heading}
    ("Table 1: image quality, alignment", ("quality", "clip"), {
        "fid": "FID Inc. ↓", "fid_dino": "FID DINOv2 ↓", "precision": "P ↑", "recall": "R ↑",
        "density": "D ↑", "coverage": "C ↑", "clip": "CLIPScore ↑", "jina": "Jina ↑"}),
    ("Table 2: GenEval (◇ original prompts, ★ extended prompts)", ("geneval",), {
        "overall": "Overall ↑", **TASKS}),
    ("Table 3: DPG-Bench", ("dpg",), {
        name: f"{name.capitalize()} ↑" for name in "global entity attribute relation other overall".split()})]


def print_tables(results):
    """[(name, {section: scores})]: the paper's tables in Markdown, the best of several in bold."""
    for title, sections, columns in TABLES:
        rows = []                                           # (name, {score: value})
        for name, result in results:
            scores = ChainMap(*(result[section] for section in sections if section in result))
            for mark, part in ("", scores), (" ◇", scores.get("original")), (" ★", scores.get("extended")):
                rows += [(name + mark, part)] if part and columns.keys() & part.keys() else []
        shown = {key: [scores[key] for _, scores in rows if key in scores] for key in columns}
        shown = {key: values for key, values in shown.items() if values}
        if rows:
            print(f"\n{title}\n\n| | {' | '.join(map(columns.get, shown))} |\n|---|{'--:|' * len(shown)}")
        for name, scores in rows:
            cells = []
            for key, values in shown.items():
                digits = 3 if key in ("precision", "recall", "density", "coverage") else 2
                best = (min if "↓" in columns[key] else max)(values)
                cell = f"{scores[key]:.{digits}f}" if key in scores else ""
                cell += f" ± {scores[f'{key}_error']:.2f}" if f"{key}_error" in scores else ""
                cells.append(f"**{cell}**" if len(values) > 1 and scores.get(key) == best else cell)
            print(f"| {name} | {' | '.join(cells)} |")


def finish(folder, args, scores, weights, counts, notes=()):
    """Puts a command's section into <folder>/results.json and prints its table."""
    import transformers
    path, section = Path(folder, "results.json"), args.run.__name__
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        results[section] = {
            "scores": scores, "settings": settings, "weights": weights, "counts": counts, "notes": notes,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    except (ValueError, TypeError):
        raise UserError(f"{path}: not JSON as evaluate.py writes it; move it away") from None
    with complete(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print_tables([(Path(folder).resolve().name, {section: scores})])
    print("\n" + "\n".join(f"- {note}" for note in [*notes, f"all of it in {path}"]))


def compare(args):
    """Several results.json side by side as the paper's tables, the best in bold"""
    results, judges = [], set()
    for path in args.results:
        try:
            result = json.loads(Path(path).read_text(encoding="utf-8"))
            scores = {name: dict(part["scores"]) for name, part in result.items()}
            results.append((str(Path(path).parent), scores))
            judges |= {str(result["dpg"]["settings"].get("judge"))} if "dpg" in result else set()
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}: not a results.json of evaluate.py") from None
    print_tables(results)
    if len(judges) > 1:
        print(f"\n- the judges of Table 3 differ ({', '.join(sorted(judges))}): its rows do not compare")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run):
        about = {"help": run.__doc__, "description": run.__doc__}
        sub = commands.add_parser(run.__name__, formatter_class=HelpFormatter, **about)
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command(quality)
    add("--real", required=True, metavar="FOLDER|FILE", help="real images, or a file of --save-stats")
    add("--fake", metavar="FOLDER", help="generated images")
    add("--k", type=int, default=3, help="a sample's ball reaches to this neighbour")
    add("--save-stats", metavar="FILE", help="keep the features of --real in one .safetensors file")
    add("--inception", metavar="FILE", help="FID's weights, pytorch-fid's or torch-fidelity's")
    add("--dino", default="facebook/dinov2-large", help="DINOv2: folder or hub id")
    add = command(clip)
    add("--samples", required=True, metavar="FILE", help="samples.jsonl of sample.py, beside its images")
    add("--clip", default=CLIP, help="CLIP: folder or hub id")
    add("--jina", default="jinaai/jina-clip-v2", help="Jina CLIP: folder or hub id")
    add("--trust-remote-code", action="store_true", help="run the code that comes with --jina")
    add = command(geneval)
    add("--images", required=True, metavar="FOLDER", help="from sample.py --format geneval, original prompts")
    add("--extended", metavar="FOLDER", help="the same from extended prompts")
    add("--detections", metavar="FILE", nargs="+", help="instead of a detector, JSONL (for --images, for "
        '--extended): {"file": "00000/samples/0000.png", "objects": {class: [{"box": [x0, y0, x1, y1], '
        '"score": 0.9}]}}, with "color" where CLIP is not to tell it')
    add("--detector", default="facebook/mask2former-swin-small-coco-instance", help="folder or hub id")
    add("--clip", default=CLIP, help="CLIP, which tells colours: folder or hub id")
    add = command(dpg)
    add("--images", required=True, metavar="FOLDER", help="from sample.py --format dpg")
    add("--questions", required=True, metavar="FILE", help="the benchmark's dpg_bench.csv")
    add("--vqa", default="Salesforce/blip-vqa-capfilt-large", help="the judge, a VQA model: folder or hub id")
    add("--answers", metavar="FILE", help='instead of a judge, lines {"file": "12.png", "answers": '
        '[{"1": true, "2": false}, ...]}, one list entry for each image of the grid')
    command(compare)("results", nargs="+", metavar="results.json", help="files of other runs")
    args = parser.parse_args(argv)
    if os.environ.get("RANK", "0") == "0":                  # other ranks of torchrun would only repeat it
        args.run(args)


if __name__ == "__main__":
    command_line(main)
