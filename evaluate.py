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
import json
import os
import re
import sys
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

from cutmix import Help, UserError, command_line, complete, list_images, load_image, open_image, read_jsonl
from encode import fetch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # mean, deviation of pixels: DINOv2, Mask2Former
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)              # CLIP


# ------------------------------------------------------------------------------------------------------------
# Table 1: two sets of features -> Fréchet distance; precision, recall, density, coverage

def spread(x):
    """Features (N, D) -> mean (D,), factor (min(N, D), D); factor^T factor is their covariance. Float64."""
    if x.ndim != 2 or len(x) < 2:
        raise UserError(f"a Fréchet distance needs at least 2 images on each side, here is {len(x)}")
    mean = x.mean(0, dtype=torch.float64)
    if not mean.isfinite().all():
        raise UserError("a Fréchet distance needs finite features, here are NaN or infinite ones")
    if len(x) <= x.shape[1]:                                # the samples themselves are the factor
        return mean, (x.double() - mean) / (len(x) - 1) ** 0.5
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(8192):                              # all 50,000 x 2048 in float64 would be 800 MB
        part = (part.double() - mean) / (len(x) - 1) ** 0.5
        covariance.addmm_(part.T, part)
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
    ball reaches to the k-th neighbour in its own set, itself not counted; its border is outside. Works on 128
    rows at a time, so memory grows with N + M, not N x M. Float32 distances decide; the few pairs too close
    to a border for float32 are computed again in float64. Raises UserError for k samples or fewer."""
    real, fake = (x if x.dtype == torch.float64 else x.float() for x in map(torch.as_tensor, (real, fake)))
    if not 1 <= k < min(len(real), len(fake)):
        raise UserError(f"k = {k} neighbours need more than k images: real {len(real)}, fake {len(fake)}")
    r, f = ((x - real.mean(0)).float() for x in (real, fake))               # float32 is finer near the origin
    rr, ff = (x.square().sum(1, keepdim=True) for x in (r, f))
    doubt = 1e-5 * (rr.max() + ff.max())                    # above the rounding of a float32 squared distance

    def exact(x, y):                                        # squared distances of pairs, float64
        return (x.double() - y.double()).square().sum(-1)

    def products(left, right):                              # left_i . right_j, 128 rows at a time
        buffer = torch.empty(128, len(right), device=right.device)
        for rows in torch.arange(len(left), device=left.device).split(128):
            yield rows, torch.mm(left[rows], right.T, out=buffer[:len(rows)])

    def radii(x, z, zz):                                    # (N,) squared, float64
        left = torch.cat([-2 * z, torch.ones_like(zz)], 1)              # . right = |z_i - z_j|^2 - |z_i|^2
        right = F.pad(torch.cat([z, zz], 1), (0, 0, 0, -len(z) % 16))
        right[len(z):, -1] = torch.inf
        column = torch.arange(len(right), device=z.device).view(16, -1)
        radius = torch.empty(len(z), dtype=torch.float64, device=z.device)
        for rows, d in products(left, right):                               # (128, N)
            d[torch.arange(len(rows)), rows] = torch.inf                    # nobody is his own neighbour
            # The m nearest are in the m of N / 16 groups whose nearest is nearest: far less to sort.
            group = d.view(len(rows), 16, -1).amin(1).topk(min(k + 8, column.shape[1]), largest=False).indices
            near = column[:, group].transpose(0, 1).flatten(1)              # (128, 16 m)
            best = d.gather(1, near).topk(min(k + 8, len(z) - 1), largest=False).indices
            near = near.gather(1, best)                                     # and 8 that float32 may misplace
            radius[rows] = exact(x[rows, None], x[near]).kthvalue(k).values
        return radius

    R, Q = radii(real, r, rr), radii(fake, f, ff)
    left = torch.cat([-2 * r, rr - R[:, None], torch.ones_like(rr)], 1).float()
    right = torch.cat([f, torch.ones_like(ff), ff], 1)                    # . left = |r_i - f_j|^2 - R_i
    precise, recalled, covered, pairs = *(torch.zeros(n, dtype=torch.bool, device=real.device)
                                          for n in (len(fake), len(real), len(real))), 0
    for rows, margin in products(left, right):                              # (128, M)
        i, j = (margin < doubt).nonzero(as_tuple=True)                    # f_j in the ball of r_i, or nearly
        held = margin[i, j] < -doubt
        for n in (~held).nonzero().flatten().split(4096):
            held[n] = exact(real[rows[i[n]]], fake[j[n]]) < R[rows[i[n]]]
        precise[j[held]] = covered[rows[i[held]]] = True
        pairs += int(held.sum())
        depth = margin.sub_(Q.float()).amin(1) + R[rows].float()            # r_i in the ball of some f_j
        recalled[rows] = depth < -doubt
        for i in (depth.abs() <= doubt).nonzero().flatten().tolist():
            j = (margin[i] + R[rows[i]] <= doubt).nonzero().flatten()
            recalled[rows[i]] = (exact(real[rows[i]], fake[j]) < Q[j]).any()
    precision, recall, coverage = (float(x.double().mean()) for x in (precise, recalled, covered))
    density = pairs / (k * len(fake))
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


# ------------------------------------------------------------------------------------------------------------
# Inception-v3 of 2015-12-05, the network of FID, its parts named as torchvision's

class Conv(nn.Module):
    def __init__(self, width, out, kernel=1, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, padding if stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches {name: [step, ...]} side by side; a step is (out, kernel, stride), or two that fork."""

    def __init__(self, width, pool, **branches):
        super().__init__()
        self.pool, self.branches = pool, {}
        for name, steps in branches.items():
            self.branches[name], channels = [], width
            for n, step in enumerate(steps, 1):
                twins = step if isinstance(step, list) else [step]
                parts = [name + (f"_{n}" if len(steps) > 1 else "") + "ab"[i] * (len(twins) > 1)
                         for i in range(len(twins))]                    # branch3x3, branch3x3_1, branch3x3_2a
                for part, twin in zip(parts, twins):
                    self.add_module(part, Conv(channels, *twin))
                self.branches[name].append(parts)
                channels = twins[0][0]

    def forward(self, x):
        outputs = []
        for name, steps in self.branches.items():
            h = self.pool(x) if name == "branch_pool" else x
            for parts in steps:
                h = torch.cat([self.get_submodule(part)(h) for part in parts], 1)
            outputs.append(h)
        return torch.cat(outputs, 1)


# TensorFlow's average does not count the padding. Mixed_7c takes the maximum instead: a slip of the graph of
# 2015 that every FID since has kept.
average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = functools.partial(F.max_pool2d, kernel_size=3, stride=2)


def mixed_5(width, pooled):                                                 # 35 x 35
    return Mixed(width, average, branch1x1=[(64,)], branch5x5=[(48,), (64, 5)],
                 branch3x3dbl=[(64,), (96, 3), (96, 3)], branch_pool=[(pooled,)])


def mixed_6(c):                                                             # 17 x 17
    return Mixed(768, average, branch1x1=[(192,)], branch7x7=[(c,), (c, (1, 7)), (192, (7, 1))],
                 branch7x7dbl=[(c,), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
                 branch_pool=[(192,)])


def mixed_7(width, pool):                                                   # 8 x 8
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(width, pool, branch1x1=[(320,)], branch3x3=[(384,), fork],
                 branch3x3dbl=[(448,), (384, 3), fork], branch_pool=[(192,)])


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


class Inception(nn.Module):
    """FID's Inception-v3: images (B, 3, H, W) of any size, values 0..255 (uint8) -> features (B, 2048).

    `weights`: the file pt_inception-2015-12-05-6726825d.pth or torch-fidelity's; without, random ones until
    `load_state_dict`, with or without the classifier's. Raises UserError for another file."""

    def __init__(self, weights=None):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80), Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = mixed_5(192, 32), mixed_5(256, 64), mixed_5(288, 64)
        self.Mixed_6a = Mixed(288, halve, branch3x3=[(384, 3, 2)], branch3x3dbl=[(64,), (96, 3), (96, 3, 2)],
                              branch_pool=[])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(mixed_6, (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, halve, branch3x3=[(192,), (320, 3, 2)],
                              branch7x7x3=[(192,), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], branch_pool=[])
        self.Mixed_7b, self.Mixed_7c = mixed_7(1280, average), mixed_7(2048, maximum)
        self.register_load_state_dict_pre_hook(self.drop_classifier)
        self.eval().requires_grad_(False)
        if weights is not None:
            try:
                self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
            except OSError as error:
                raise UserError(f"{weights}: {error.strerror}") from None
            except Exception:  # noqa: BLE001               a wrong file fails in any of a dozen ways
                raise UserError(f"{weights}: not the Inception weights of FID "
                                "(pt_inception-2015-12-05-6726825d.pth or torch-fidelity's)") from None

    @staticmethod
    def drop_classifier(module, state, *_):
        for name in [name for name in state if name.startswith(("fc.", "AuxLogits."))]:
            del state[name]

    @torch.no_grad()
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)             # TF32 would move the third digit
    def forward(self, images):
        x = (resize_tf1(images.float()) - 128) / 128                                        # (B, 3, 299, 299)
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))            # (B, 64, 73, 73)
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                                # (B, 192, 35, 35)
        for name, part in self.named_children():
            x = part(x) if name.startswith("Mixed") else x                                  # (B, 2048, 8, 8)
        return x.mean((2, 3))


# ------------------------------------------------------------------------------------------------------------
# Images and models from outside

def read(path):
    return open_image(path, 1 << 16)                        # no JPEG is so large that it gets reduced


def normalised(image, mean, std):
    """RGB PIL image -> (3, H, W) float32, shifted and scaled as a network was trained with."""
    x = torch.from_numpy(np.array(image)).float() / 255
    return ((x - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)


def batches(paths, load, size, skipped):
    """Yields ([number], [load(path)]) of up to `size` paths, while threads load the next ones. Files that are
    not readable are left out and put into `skipped` {path: why}."""
    def attempt(n):
        try:
            return load(paths[n])
        except OSError as error:
            skipped[str(paths[n])] = str(error)
    parts = [range(i, min(i + size, len(paths))) for i in range(0, len(paths), size)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        ahead = pool.map(attempt, parts[0]) if parts else ()
        for part, after in zip(tqdm(parts, disable=len(parts) < 3), [*parts[1:], ()]):
            loaded, ahead = zip(part, list(ahead)), pool.map(attempt, after)
            loaded = {n: item for n, item in loaded if item is not None}
            if loaded:
                yield list(loaded), list(loaded.values())


def report(skipped, total, folder):
    """A broken image must not stop a run, nor silently shrink it: skipped.jsonl names all, stderr one."""
    if skipped:
        first = skipped[min(skipped)]
        if len(skipped) == total:
            raise UserError(f"{folder}: none of its {total} images is readable; the first: {first}")
        print(f"evaluate.py: skipped {len(skipped)} of {total} images in {folder}, see its skipped.jsonl; "
              f"the first: {first}", file=sys.stderr)
        with contextlib.suppress(OSError):                  # a folder that is read-only
            write_jsonl(Path(folder, "skipped.jsonl"),
                        [{"file": file, "error": skipped[file]} for file in sorted(skipped)])


def write_jsonl(path, rows):
    with complete(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@functools.cache
def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hash(name):
    """sha256 of the weights of a model folder or hub id (of their index, where they are in several files)."""
    return sha256(fetch(name, "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"))


def from_hub(kind, name, **options):
    """`kind.from_pretrained` of transformers on a folder or hub id; what goes wrong is a UserError."""
    weights_hash(name)                                      # says so where there is no such model
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{name}: does not load as {kind.__name__} ({reason})") from None


def pretrained(kind, name, **options):
    """The model of a folder or hub id, in eval mode on DEVICE. UserError for the weights of another class."""
    model, info = from_hub(kind, name, output_loading_info=True, **options)
    if len(info["missing_keys"]) > len(model.state_dict()) / 10:
        raise UserError(f"{name}: these are not the weights of a {type(model).__name__}")
    return model.eval().to(DEVICE)


def stamp(path):
    status = os.stat(path)
    return f"{status.st_size}:{status.st_mtime_ns}"


class Log:
    """A JSONL file of one line an image, so that a killed run goes on: `rows` {file: row}. A torn last line
    and lines whose image or models (hashes) have changed since are dropped."""

    def __init__(self, path, models):
        self.path, self.models, self.rows = Path(path), models, {}
        for row in read_jsonl(path) if self.path.exists() else []:
            image = self.path.parent / row.get("file", "")
            if row.get("models") == models and image.is_file() and row.get("stamp") == stamp(image):
                self.rows[row["file"]] = row
        write_jsonl(path, self.rows.values())

    def add(self, file, **row):
        image = self.path.parent / file
        self.rows[file] = {"file": file, **row, "stamp": stamp(image), "models": self.models}
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(json.dumps(self.rows[file]) + "\n")


# ------------------------------------------------------------------------------------------------------------
# Table 1, `quality`: features of every image, kept beside the images

NETWORKS, SAVE_EVERY = ("inception", "dino"), 8192         # images


def features(source, args, models, skipped):
    """A folder of images, or a file of --save-stats -> {"inception": (N, 2048), "dino": (N, 1024)} float32.

    A folder's are kept in its .features/, a file for each `models` (hashes, crop): a later run computes only
    the images that are new or changed. Raises UserError."""
    if source.endswith(".safetensors"):
        try:
            with safe_open(source, "pt") as stored:
                if json.loads(stored.metadata()["models"]) != models:
                    raise UserError(f"{source}: made with other weights or another --crop than this run's")
                return {name: stored.get_tensor(name) for name in NETWORKS}
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            raise UserError(f"{source}: not a file that --save-stats wrote") from None
    files, tables, old = list_images(source), {}, {}
    stamps = {file: stamp(Path(source, file)) for file in files}
    key = hashlib.sha256(json.dumps(models).encode()).hexdigest()[:16]
    path = Path(source, ".features", f"{key}.safetensors")
    if path.exists():
        with safe_open(path, "pt") as stored:
            old = json.loads(stored.metadata()["stamps"])
            tables = [stored.get_tensor(name) for name in NETWORKS]
    rows = {file: [x[n] for x in tables] for n, file in enumerate(old) if stamps.get(file) == old[file]}

    def table(write):
        kept = [file for file in files if file in rows]
        found = dict(zip(NETWORKS, map(torch.stack, zip(*map(rows.get, kept)))))
        try:
            if write:
                with complete(path) as temporary:
                    save_file(found, temporary, {"stamps": json.dumps({file: stamps[file] for file in kept})})
        except OSError as error:                            # a read-only data set is no reason to stop
            print(f"evaluate.py: the features of {source} are not kept ({error})", file=sys.stderr)
        return found

    def load(path):                                         # resized one by one, as their sizes differ
        image = load_image(path, args.crop) if args.crop else read(path)
        return (resize_tf1(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float())[0],
                normalised(image.resize((224, 224), Image.Resampling.BICUBIC), *IMAGENET))

    todo, unsaved = [file for file in files if file not in rows], len(old) - len(rows)
    if todo:
        from transformers import Dinov2Model
        inception, dino = Inception(args.inception).to(DEVICE), pretrained(Dinov2Model, args.dino)
    for numbers, images in batches([Path(source, file) for file in todo], load, 64, skipped):
        x, y = (torch.stack(part).to(DEVICE) for part in zip(*images))  # (B, 3, 299, 299), (B, 3, 224, 224)
        with torch.no_grad():
            found = inception(x).cpu(), dino(y).last_hidden_state[:, 0].float().cpu()   # its class tokens
        rows.update(zip((todo[n] for n in numbers), zip(*found)))
        unsaved += len(numbers)
        if unsaved >= SAVE_EVERY:
            table(write=True)
            unsaved = 0
    report(skipped, len(files), source)
    return table(write=unsaved > 0)


def quality(args):
    """Table 1: FID, FID-DINOv2, precision, recall, density, coverage of --fake against --real"""
    if not args.fake and not args.save_stats:
        raise UserError("give --fake, or --save-stats: --real alone has nothing to be compared with")
    if not args.inception:
        name = "pt_inception-2015-12-05-6726825d.pth"
        args.inception = Path(torch.hub.get_dir(), "checkpoints", name)
        if not args.inception.exists():
            args.inception.parent.mkdir(parents=True, exist_ok=True)
            url = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{name}"
            torch.hub.download_url_to_file(url, str(args.inception), hash_prefix="6726825d")
    weights = {str(args.inception): sha256(args.inception), args.dino: weights_hash(args.dino)}
    models, skipped = [*weights.values(), args.crop], {}
    real = features(args.real, args, models, {})
    if args.save_stats:
        with complete(args.save_stats) as path:
            save_file(real, path, {"models": json.dumps(models)})
    if args.fake:
        fake = features(args.fake, args, models, skipped)
        real, fake = ({name: x.to(DEVICE) for name, x in side.items()} for side in (real, fake))
        scores = {**prdc(real["dino"], fake["dino"], args.k),
                  "fid_dino": frechet_distance(real["dino"], fake["dino"]),
                  "fid": frechet_distance(real["inception"], fake["inception"])}
        finish(args.fake, "quality", scores, {"real": args.real, "k": args.k, "crop": args.crop}, weights,
               {"real": len(real["dino"]), "fake": len(fake["dino"]), "skipped": len(skipped)}, [])


# ------------------------------------------------------------------------------------------------------------
# Table 1, `clip`: does the image show what the prompt says?

class Clip:
    """A CLIP of transformers: pictures and texts -> unit vectors (B, D), on the CPU."""

    def __init__(self, name):
        from transformers import AutoTokenizer, CLIPModel
        self.model, self.tokenizer = pretrained(CLIPModel, name), from_hub(AutoTokenizer, name)
        self.size = self.model.config.vision_config.image_size                              # 224
        self.length = self.model.config.text_config.max_position_embeddings                 # 77

    def prepare(self, image):                               # PIL -> (3, 224, 224): shorter side, centre crop
        short, size = min(image.size), self.size
        image = image.resize([int(size * side / short) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in image.size)
        return normalised(image.crop((left, top, left + size, top + size)), *OPENAI)

    @torch.no_grad()
    def pictures(self, prepared):
        pooled = self.model.vision_model(torch.stack(prepared).to(DEVICE)).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts):
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.length,
                                return_tensors="pt").to(DEVICE)
        pooled = self.model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1).cpu()


def clip(args):
    """Table 1: CLIPScore, and for prompts beyond CLIP's 77 tokens the Jina score, of --samples"""
    rows, folder = read_jsonl(args.samples), Path(args.samples).parent
    if not rows:
        raise UserError(f"{args.samples}: no samples in it")
    if not all(isinstance(row.get(key), str) for row in rows for key in ("file", "prompt")):
        raise UserError(f'{args.samples}: every line needs a "file" and a "prompt"')
    model, weights, notes = Clip(args.clip), {args.clip: weights_hash(args.clip)}, []
    measures = {"clip": (lambda path: model.prepare(read(path)), model.pictures, model.texts)}
    if args.trust_remote_code:
        from transformers import AutoModel
        jina = pretrained(AutoModel, args.jina, trust_remote_code=True)
        weights[args.jina] = weights_hash(args.jina)

        def unit(encode):
            return lambda x: F.normalize(torch.as_tensor(encode(x)).float().cpu(), dim=-1)
        measures["jina"] = read, unit(jina.encode_image), unit(jina.encode_text)
    else:
        notes.append(f"Jina score left out: {args.jina} brings its own code (--trust-remote-code runs it)")
    scores, skipped = {}, {}
    for name, (load, pictures, texts) in measures.items():
        cosines, paths = [], [folder / row["file"] for row in rows]
        for numbers, images in batches(paths, load, 32, skipped):
            cosines.append((pictures(images) * texts([rows[n]["prompt"] for n in numbers])).sum(-1))
        if name == "clip":
            report(skipped, len(set(paths)), folder)
        score = 100 * torch.cat(cosines).double().clamp(min=0)
        scores[name] = float(score.mean())
        scores[f"{name}_error"] = float(score.std(correction=int(len(score) > 1)) / len(score) ** 0.5)
    finish(folder, "clip", scores, {}, weights, {"samples": len(score), "skipped": len(skipped)}, notes)


# ------------------------------------------------------------------------------------------------------------
# Table 2, `geneval`: the objects that are seen, their places and colours, against what the prompt asks for

TASKS = "single_object", "two_object", "counting", "colors", "position", "color_attr"
COLORS = "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
CONFIDENT, CONFIDENT_COUNTING, MOST = 0.3, 0.9, 16          # detections above this, at most so many a class
NEAR, TURN = 0.1, 0.5                                       # share of both sizes; of the offset, on one axis
COCO = """
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,
backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,
baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,
banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,
cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,
hair drier,toothbrush""".replace("\n", "").split(",")


def relations(a, b):
    """Where box `a` lies relative to box `b` ([x0, y0, x1, y1], y downwards) -> set of relation names."""
    a, b = np.asarray(a[:4], float).reshape(2, 2), np.asarray(b[:4], float).reshape(2, 2)
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
    wrong, matched = [], []                                 # matched: a clause's objects, None if it failed
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        found, faults = objects.get(name, [])[:count], []
        if len(found) < count:
            faults.append(f"expected {name}>={count}, found {len(found)}")
        elif "color" in clause:
            colors = [color_of(thing, name) for thing in found]
            if colors.count(clause["color"]) < count:
                faults.append(f"expected {clause['color']} {name}>={count}, found {', '.join(colors)}")
        if "position" in clause and not faults:
            relation, target = clause["position"]
            if matched[target] is None:
                faults.append(f"no target for {name} to be {relation}")
            elif not all(relation in relations(thing["box"], other["box"])
                         for thing in found for other in matched[target]):
                faults.append(f"expected {name} {relation} {metadata['include'][target]['class']}")
        matched.append(None if faults else found)
        wrong += faults
    for clause in metadata.get("exclude", []):
        found = len(objects.get(clause["class"], []))
        if found >= clause["count"]:
            wrong.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return not wrong, "; ".join(wrong)


@torch.no_grad()
def detect(model, image):
    """Mask2Former on an RGB PIL image -> {class: [{"box", "score", "mask" (H, W) bool}, ...]}.

    As in mmdet, with which GenEval was made: the 100 best (query, class) pairs; score = class probability x
    mean probability of the mask's pixels; masks may overlap; boxes around them, right, bottom exclusive."""
    names = model.config.id2label
    if len(names) == 80 and names[0] in ("person", "LABEL_0"):          # COCO's, but GenEval says "tv remote"
        names = COCO
    (width, height), scale = image.size, min(800 / min(image.size), 1333 / max(image.size))
    w, h = int(width * scale + 0.5), int(height * scale + 0.5)
    x = normalised(image.resize((w, h), Image.Resampling.BILINEAR), *IMAGENET)
    x = F.pad(x, (0, -w % 32, 0, -h % 32))[None].to(DEVICE)                                 # (1, 3, H', W')
    output = model(pixel_values=x)
    classes = output.class_queries_logits[0].float().softmax(-1)[:, :-1]                    # (Q, C)
    best, which = classes.flatten().topk(min(100, classes.numel()))
    found = {}
    for probability, index in zip(best.tolist(), which.tolist()):
        if probability > CONFIDENT:                                         # the mask can only lower it
            query, label = divmod(index, classes.shape[1])
            logits = output.masks_queries_logits[0, query].float()[None, None]
            logits = F.interpolate(logits, x.shape[2:], mode="bilinear")[:, :, :h, :w]
            logits = F.interpolate(logits, (height, width), mode="bilinear")[0, 0]          # (H, W)
            mask = logits > 0
            score = probability * float(logits.sigmoid()[mask].sum() / (mask.sum() + 1e-6))
            if score > CONFIDENT:
                y, x_ = (mask.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
                found.setdefault(names[label], []).append({
                    "box": [x_[0], y[0], x_[-1] + 1, y[-1] + 1], "score": score, "mask": mask.cpu().numpy()})
    return found


def color_judge(clip):
    """clip() -> Clip makes color(image, object, class) -> one of ten, by CLIP zero-shot on the object alone:
    what is outside its mask painted #999, then cropped to its box."""
    @functools.cache
    def classifier(name):                                                                   # (10, D)
        templates = "a photo of a {} " + name, "a photo of a {}-colored " + name, "a photo of a {} object"
        texts = [clip().texts([template.format(color) for template in templates]).mean(0) for color in COLORS]
        return F.normalize(torch.stack(texts), dim=-1)

    def color(image, thing, name):
        if "mask" in thing:
            grey = Image.new("RGB", image.size, "#999")
            image = Image.composite(image, grey, Image.fromarray(thing["mask"]))
        x0, y0, x1, y1 = map(round, thing["box"][:4])
        picture = clip().prepare(image.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))))
        return COLORS[int((classifier(name) @ clip().pictures([picture])[0]).argmax())]
    return color


def read_geneval(folder):
    """GenEval's layout, 00000/metadata.jsonl and 00000/samples/0000.png, ... -> [(file, metadata)]."""
    images = []
    for path in sorted(Path(folder).glob("*")):
        if path.is_dir() and path.name.isdigit():
            if not (path / "metadata.jsonl").exists():
                raise UserError(f"{path}: no metadata.jsonl in it, which says what its images should show")
            metadata = (read_jsonl(path / "metadata.jsonl") or [{}])[0]
            if not {"tag", "prompt", "include"} <= set(metadata):
                raise UserError(f"{path / 'metadata.jsonl'}: not a line of GenEval's (tag, prompt, include)")
            files = sorted(file.name for file in path.glob("samples/*.png") if file.stem.isdigit())
            if not files:
                raise UserError(f"{path}: no images in it (samples/0000.png, ...)")
            images += [(f"{path.name}/samples/{file}", metadata) for file in files]
    if not images:
        raise UserError(f"{folder}: no 00000/metadata.jsonl, ... in it, as sample.py --format geneval writes")
    return images


def geneval_folder(folder, detections, args, detector, color):
    """A folder of images -> scores, counts. Writes detections.jsonl, and geneval.jsonl in GenEval's form."""
    images, skipped, verdicts = read_geneval(folder), {}, []
    if detections:
        rows = {row.get("file"): row for row in read_jsonl(detections)}
        missing = [file for file, _ in images if "objects" not in rows.get(file, {})]
        if missing:
            raise UserError(f'{detections}: no "objects" for {missing[0]} and {len(missing) - 1} more')
    else:
        log = Log(Path(folder, "detections.jsonl"), [weights_hash(args.detector), weights_hash(args.clip)])
        rows = log.rows
    for [n], [image] in batches([Path(folder, file) for file, _ in images], read, 1, skipped):
        file, metadata = images[n]
        fresh = file not in rows
        objects = detect(detector(), image) if fresh else rows[file]["objects"]

        def color_of(thing, name, image=image):
            thing["color"] = thing.get("color") or color(image, thing, name)
            return thing["color"]
        try:
            floor = CONFIDENT_COUNTING if metadata["tag"] == "counting" else CONFIDENT
            seen = {name: sorted((thing for thing in things if thing["score"] > floor),
                                 key=lambda thing: -thing["score"])[:MOST]
                    for name, things in objects.items()}
            correct, reason = geneval_verdict(seen, metadata, color_of)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise UserError(f"{Path(folder, file)}: its metadata.jsonl or detections lack something "
                            f"({type(error).__name__}: {error})") from None
        verdicts.append({"filename": file, "tag": metadata["tag"], "prompt": metadata["prompt"],
                         "correct": correct, "reason": reason})
        if fresh:
            for things in objects.values():
                for thing in things:
                    del thing["mask"]
            log.add(file, objects=objects)
    report(skipped, len(images), folder)
    write_jsonl(Path(folder, "geneval.jsonl"), verdicts)
    right = {}
    for row in verdicts:
        right.setdefault(row["tag"], []).append(row["correct"])
    scores = {tag: float(np.mean(values)) for tag, values in right.items()}     # a task: mean over its images
    counts = {"prompts": len({Path(file).parts[0] for file, _ in images}), "images": len(verdicts),
              "skipped": len(skipped)}
    return {"overall": float(np.mean(list(scores.values()))), **scores}, counts # overall: mean over tasks


def geneval(args):
    """Table 2: GenEval's six tasks, on --images (original prompts, ◇) and --extended (extended ones, ★)"""
    from transformers import Mask2FormerForUniversalSegmentation
    detector = functools.cache(lambda: pretrained(Mask2FormerForUniversalSegmentation, args.detector))
    color = color_judge(functools.cache(lambda: Clip(args.clip)))           # both are loaded when needed
    folders = {"original": args.images, **({"extended": args.extended} if args.extended else {})}
    detections = args.detections or [None] * len(folders)
    if len(detections) != len(folders):
        raise UserError("--detections: one file for --images, a second one for --extended if it is given")
    scores, counts, notes = {}, {}, []
    for (name, folder), given in zip(folders.items(), detections):
        scores[name], counts[name] = geneval_folder(folder, given, args, detector, color)
        absent = [tag for tag in TASKS if tag not in scores[name]]
        if absent:
            notes.append(f"{folder}: no prompts of {', '.join(absent)}, overall is without them")
    weights = {} if args.detections else {name: weights_hash(name) for name in (args.detector, args.clip)}
    settings = {"detections": args.detections, "extended": args.extended}
    finish(args.images, "geneval", scores, settings, weights, counts, notes)


# ------------------------------------------------------------------------------------------------------------
# Table 3, `dpg`: yes-or-no questions about each image, some meaningful only where others are answered yes

CATEGORIES = "global", "entity", "attribute", "relation", "other"


def dpg_score(answers, dependency):
    """answers {id: bool}, dependency {id: [parent ids]} (0: none) -> share of questions answered yes, where a
    question counts as no if a parent does; in ascending order of ids, so that a no reaches grandchildren."""
    score = {question: float(answer) for question, answer in answers.items()}
    for question in sorted(score):
        if any(parent != 0 and score.get(parent, 1) == 0 for parent in dependency.get(question, ())):
            score[question] = 0.0
    return sum(score.values()) / len(score)


def read_questions(path):
    """dpg_bench.csv -> {prompt id: {question id: (question, [parent ids], level-1 category)}}, all lines
    (the official script passes over the first question). Raises UserError."""
    needed, prompts = {"item_id", "proposition_id", "dependency", "tuple", "question_natural_language"}, {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            missing = needed.difference(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path}: no column {', '.join(sorted(missing))}")
            for row in reader:
                category = re.split("[(-]", row["tuple"])[0].strip()        # "attribute - color (car, red)"
                parents = [int(parent) for parent in row["dependency"].split(",")]
                prompts.setdefault(row["item_id"], {})[int(row["proposition_id"])] = (
                    row["question_natural_language"], parents, category)
        except (ValueError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(f"{path} line {reader.line_num}: not a question of DPG-Bench ({error})") from None
    if not prompts:
        raise UserError(f"{path}: no questions in it")
    return prompts


def vqa_judge(name):
    """Folder or hub id of a VQA model -> ask(PIL image, questions) -> [bool]."""
    from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor
    model = pretrained(AutoModelForVisualQuestionAnswering, name)
    processor = from_hub(AutoProcessor, name)

    @torch.no_grad()
    def ask(image, questions):
        inputs = processor([image] * len(questions), questions, padding=True, return_tensors="pt").to(DEVICE)
        if model.can_generate():                            # BLIP says words, ViLT chooses a label
            tokens = model.generate(**inputs, max_new_tokens=10)
            said = processor.batch_decode(tokens, skip_special_tokens=True)
        else:
            said = [model.config.id2label[int(n)] for n in model(**inputs).logits.argmax(-1)]
        return [re.match(r"\W*yes\b", text, re.IGNORECASE) is not None for text in said]
    return ask


def dpg(args):
    """Table 3: DPG-Bench on 2 x 2 grids named after their prompts' ids"""
    prompts, files = read_questions(args.questions), list_images(args.images)
    known = [file for file in files if Path(file).stem in prompts]
    if not known:
        raise UserError(f"{args.images}: no image is named after a prompt of {args.questions}, "
                        f"like {min(prompts)}.png")
    if args.answers:
        judge, weights, rows = args.answers, {}, {row.get("file"): row for row in read_jsonl(args.answers)}
    else:
        judge, weights = args.vqa, {args.vqa: weights_hash(args.vqa)}
        log = Log(Path(args.images, "answers.jsonl"), [weights[args.vqa], sha256(args.questions)])
        rows, ask = log.rows, functools.cache(lambda: vqa_judge(args.vqa))
    scores, categories, size, skipped = [], {}, None, {}
    for [n], [grid] in batches([Path(args.images, file) for file in known], read, 1, skipped):
        file, size = known[n], size or grid.size
        if grid.size != size or size[0] != size[1] or size[0] % 2:
            first = f", as the first's {size[0]} x {size[1]}" if grid.size != size else ""
            raise UserError(f"{Path(args.images, file)}: {grid.width} x {grid.height} pixels are not a 2 x 2 "
                            f"grid of square images{first} (sample.py --format dpg makes them)")
        questions, half = prompts[Path(file).stem], size[0] // 2
        if file not in rows and args.answers:
            raise UserError(f"{args.answers}: no answers for {file}")
        if file not in rows:
            images = [grid.crop((x, y, x + half, y + half)) for y in (0, half) for x in (0, half)]
            said = [ask()(image, [text for text, *_ in questions.values()]) for image in images]
            log.add(file, answers=[dict(zip(map(str, questions), one)) for one in said])
        answers = rows[file].get("answers") or [{}]
        try:
            answers = [{q: str(one[str(q)]).lower() in ("true", "yes", "1") for q in questions}
                       for one in answers]
        except (KeyError, TypeError):
            raise UserError(f'{judge}: "answers" of {file} must list, for each image, {{question id: true or '
                            f"false}}, with ids {', '.join(map(str, questions))}") from None
        dependency = {q: parents for q, (_, parents, _) in questions.items()}
        scores.append(np.mean([dpg_score(one, dependency) for one in answers]))     # over a prompt's images
        for q, (*_, category) in questions.items():
            categories.setdefault(category, []).extend(one[q] for one in answers)   # uncorrected
    report(skipped, len(known), args.images)
    notes = [f"judge: {judge}. The paper's is mPLUG-large; only numbers of one judge compare",
             "categories count all images of a grid; the official script counts the last one"]
    if len(known) < len(prompts) or len(known) < len(files):
        notes.append(f"{len(prompts) - len(known)} of {len(prompts)} prompts have no image, "
                     f"{len(files) - len(known)} of {len(files)} images no prompt")
    means = {"overall": np.mean(scores), **{name: np.mean(values) for name, values in categories.items()}}
    finish(args.images, "dpg", {name: 100 * float(value) for name, value in means.items()},
           {"judge": judge, "questions": sha256(args.questions)}, weights,
           {"prompts": len(scores), "skipped": len(skipped)}, notes)


# ------------------------------------------------------------------------------------------------------------
# Tables in the paper's order, results.json, command line

TABLES = {                                                  # (section, score, title, what is best, decimals)
    "Table 1: image quality, alignment": [
        ("quality", "fid", "FID Inc. ↓", min, 2), ("quality", "fid_dino", "FID DINOv2 ↓", min, 2),
        ("quality", "precision", "P ↑", max, 3), ("quality", "recall", "R ↑", max, 3),
        ("quality", "density", "D ↑", max, 3), ("quality", "coverage", "C ↑", max, 3),
        ("clip", "clip", "CLIPScore ↑", max, 2), ("clip", "jina", "Jina ↑", max, 2)],
    "Table 2: GenEval (◇ original prompts, ★ extended prompts)": [
        ("geneval", name, title, max, 2) for name, title in zip(("overall", *TASKS), (
            "Overall ↑", "One obj. ↑", "Two obj. ↑", "Count. ↑", "Col. ↑", "Pos. ↑", "Col. attr. ↑"))],
    "Table 3: DPG-Bench": [
        ("dpg", name, f"{name.capitalize()} ↑", max, 2) for name in (*CATEGORIES, "overall")]}


def print_tables(results):
    """[(name, contents of results.json)]: the paper's tables in Markdown, the best of several in bold."""
    for heading, columns in TABLES.items():
        rows = []                                           # (name, {section: scores})
        for name, result in results:
            scores = {section: part["scores"] for section, part in result.items()}
            prompts = scores.pop("geneval", {})
            rows += [(name, scores)] + [(f"{name} {mark}", {"geneval": prompts[key]}) for key, mark in
                                        (("original", "◇"), ("extended", "★")) if key in prompts]
        columns = [part for part in columns if any(part[1] in row.get(part[0], {}) for _, row in rows)]
        rows = [pair for pair in rows if any(column[1] in pair[1].get(column[0], {}) for column in columns)]
        if rows:
            print(f"\n{heading}\n\n| | {' | '.join(column[2] for column in columns)} |")
            print(f"|---|{'--:|' * len(columns)}")
        for name, row in rows:
            cells = []
            for section, key, _, best, decimals in columns:
                values = [other[section][key] for _, other in rows if key in other.get(section, {})]
                mine = row.get(section, {})
                cell = f"{mine[key]:.{decimals}f}" if key in mine else ""
                cell += f" ± {mine[f'{key}_error']:.{decimals}f}" if f"{key}_error" in mine else ""
                cells.append(f"**{cell}**" if len(values) > 1 and mine.get(key) == best(values) else cell)
            print(f"| {name} | {' | '.join(cells)} |")


def finish(folder, section, scores, settings, weights, counts, notes):
    """Puts one section into <folder>/results.json and prints its table."""
    import transformers
    path = Path(folder, "results.json")
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        results[section] = {
            "scores": scores, "settings": settings, "weights": weights, "counts": counts, "notes": notes,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    except (ValueError, TypeError):
        raise UserError(f"{path}: not JSON as evaluate.py writes it; move it away") from None
    with complete(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print_tables([(Path(folder).resolve().name, {section: results[section]})])
    print("\n" + "\n".join(f"- {note}" for note in [*notes, f"all of it in {path}"]))


def compare(args):
    """Several results.json side by side as the paper's tables, the best in bold"""
    results = []
    for path in args.results:
        try:
            result = json.loads(Path(path).read_text(encoding="utf-8"))
            result = {key: {"settings": {}, **part, "scores": part["scores"]} for key, part in result.items()}
            results.append((str(Path(path).parent), result))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}: not a results.json of evaluate.py") from None
    print_tables(results)
    judges = {result["dpg"]["settings"].get("judge") for _, result in results if "dpg" in result}
    if len(judges) > 1:
        names = ", ".join(sorted(map(str, judges)))
        print(f"\n- the judges of Table 3 differ ({names}): its rows do not compare")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run):
        about = run.__doc__
        sub = commands.add_parser(run.__name__, help=about, description=about, formatter_class=Help)
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command(quality)
    add("--real", required=True, metavar="FOLDER|FILE", help="real images, or a file of --save-stats")
    add("--fake", metavar="FOLDER", help="generated images")
    add("--k", type=int, default=3, help="a sample's ball reaches to this neighbour")
    add("--crop", type=int, metavar="SIZE", help="first scale and crop each image to such a square, as "
        "photos are for training; otherwise what is not square gets squashed")
    add("--save-stats", metavar="FILE", help="keep the features of --real in one .safetensors file")
    add("--inception", metavar="FILE", help="FID's weights, pytorch-fid's or torch-fidelity's")
    add("--dino", default="facebook/dinov2-large", help="DINOv2: folder or hub id")
    add = command(clip)
    add("--samples", required=True, metavar="FILE", help="samples.jsonl of sample.py, beside its images")
    add("--clip", default="openai/clip-vit-large-patch14", help="CLIP: folder or hub id")
    add("--jina", default="jinaai/jina-clip-v2", help="Jina CLIP: folder or hub id")
    add("--trust-remote-code", action="store_true", help="run the code that comes with --jina")
    add = command(geneval)
    add("--images", required=True, metavar="FOLDER", help="from sample.py --format geneval, original prompts")
    add("--extended", metavar="FOLDER", help="the same from extended prompts")
    add("--detections", metavar="FILE", nargs="+", help='instead of a detector, lines {"file": '
        '"00000/samples/0000.png", "objects": {class: [{"box": [x0, y0, x1, y1], "score": 0.9}]}}; with '
        '"color" where CLIP is not to tell it; a second file for --extended')
    add("--detector", default="facebook/mask2former-swin-small-coco-instance", help="folder or hub id")
    add("--clip", default="openai/clip-vit-large-patch14", help="CLIP, which tells colours: folder or hub id")
    add = command(dpg)
    add("--images", required=True, metavar="FOLDER", help="from sample.py --format dpg")
    add("--questions", required=True, metavar="FILE", help="the benchmark's dpg_bench.csv")
    add("--vqa", default="Salesforce/blip-vqa-capfilt-large", help="the judge, a VQA model: folder or hub id")
    add("--answers", metavar="FILE", help='instead of a judge, lines {"file": "12.png", "answers": '
        '[{"1": true, "2": false}, ...]}, one list entry for each image of the grid')
    add = command(compare)
    add("results", nargs="+", metavar="results.json", help="files of other runs")
    args = parser.parse_args(argv)
    if os.environ.get("RANK", "0") == "0":                  # other ranks of torchrun would only repeat it
        args.run(args)


if __name__ == "__main__":
    command_line(main)
