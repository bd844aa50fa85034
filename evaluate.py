"""Stage 6, evaluation (paper 4.1): the numbers of its tables, as each reference gives them.

    python evaluate.py quality --real imagenet/val --fake out/samples

`quality` and `clip` make Table 1, `geneval` Table 2, `dpg` Table 3. Each prints its table in
Markdown and adds a section to results.json beside the images. `compare` sets several
results.json side by side, with --paper as Tables 1 to 5; `curve` draws Fig. 5, a score
against training steps. `evaluate.py COMMAND --help` says what a command needs.
"""

import argparse
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import (HelpFormatter, UserError, append_jsonl, at_least, between, command_line, complete,
                    is_last_rank, list_images, load_ahead, local_device, open_image, pretrained,
                    rank_and_world, read_json, read_jsonl, report_skipped, resize_and_crop,
                    sha256, weights_hash, write_jsonl)
from metrics.charts import line_chart
from metrics.distances import frechet_distance, mean_prdc, prdc  # noqa: F401
from metrics.geneval import geneval_verdict, relations  # noqa: F401
from metrics.inception import INCEPTION, Inception, resize_tf1
from metrics.tables import (PUBLISHED, TASKS, Row, disagreement, joined,
                            print_tables, read_csv, read_row, results_files, scores_of, write_csv)

DEVICE = local_device()
CLIP = "openai/clip-vit-large-patch14"
DETECTOR = "facebook/mask2former-swin-small-coco-instance"

# Mean and standard deviation of the pixels that networks were trained with.
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))      # DINOv2, Mask2Former
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


# Images are read in full. `encode.py` lets the JPEG decoder shrink large photos, which is
# faster and moves their pixels a little; a figure beside the paper's has to be exact.
open_full = functools.partial(open_image, size=1 << 16)


# --------------------------------------------------------------------------------------
# Models from outside, and what they say of images

def pixels_of(image):
    """Return an RGB PIL image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalised(pixels, mean, std):
    """Return pixels (..., 3, H, W), 0..255, as float32 less `mean` and divided by `std`.

    Both are those of the network's training data, for pixels of 0..1.
    """
    mean = torch.tensor(mean, device=pixels.device)[:, None, None]
    std = torch.tensor(std, device=pixels.device)[:, None, None]
    return (pixels.float() / 255 - mean) / std


def stamp(folder, file):
    """Return a file's size and time as text, "" where there is none."""
    try:
        status = os.stat(Path(folder, file))
    except OSError:
        return ""
    return f"{status.st_size}:{status.st_mtime_ns}"


def cached_answers(folder, files, log, weights, ask_models, given=None, extra=None):
    """Yield (file, image, row), where row holds what models say of the image.

    A row comes from the JSONL file `given` by the user. Without one it is {"file": file,
    **ask_models(file, image)} and is kept in folder/log, so that a killed run goes on
    there. It is made again where the image has changed, `weights`, {name: hash} of the
    models, or `extra`, {file: dict of what else the answers depend on}.
    """
    path = Path(given or Path(folder, log))
    extra = extra or {}
    made_of = {}
    for file in files:
        made_of[file] = {"models": list(weights.values()), "stamp": stamp(folder, file),
                         **extra.get(file, {})}

    # What is known already.
    rows = {}
    for row in read_jsonl(path) if given or path.exists() else []:
        file = row.get("file")
        if not isinstance(file, str):
            raise UserError(f'{path}: "file" is {file!r}, which is not the name of an image')
        if file in made_of and (given or made_of[file].items() <= row.items()):
            rows[file] = row
    missing = [file for file in files if file not in rows]
    if given and missing:
        raise UserError(f"{given}: no line for {missing[0]} and {len(missing) - 1} more images")
    # Without a line that a kill has torn.
    if not given:
        write_jsonl(path, rows.values())

    skipped = {}
    for batch in load_ahead(folder, [[file] for file in files], open_full, skipped):
        # Of one image, or none if it cannot be read.
        for file, image in batch:
            if file not in rows:
                rows[file] = {"file": file, **ask_models(file, image)}
                append_jsonl(path, [{**rows[file], **made_of[file]}])
            yield file, image, rows[file]
    report_skipped(folder, skipped, len(files))


# --------------------------------------------------------------------------------------
# `quality`, Table 1: features of two folders, which are kept beside the images

NETWORKS = ("inception", "dino")
PART = 256              # images whose features are saved together; a kill loses no more
BATCH = 64              # images that go through the networks at once


def read_samples(path):
    """Return the lines of a samples.jsonl as dicts, each with a "file". Raises UserError."""
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path}: no samples in it")
    for row in rows:
        file = row.get("file")
        if not isinstance(file, str):
            raise UserError(f'{path}: every line needs a "file"')
        if not isinstance(row.get("name"), str | None):
            raise UserError(f'{path}: the "name" of {file} is not text')
        # Half a character, or the one that no file name may contain.
        try:
            valid = b"\0" not in os.fsencode(file)
        except UnicodeEncodeError:
            valid = False
        if not valid:
            raise UserError(f'{path}: "file" is {file!r}, which no file can be called')
    return rows


def are_cocos(rows):
    """Tell whether samples are those of COCO's prompts: each bears the name of an image."""
    return all(row.get("name") for row in rows)


def sample_names(folder):
    """Return {file: name or None} of the images of a folder that count, in order of files.

    samples.jsonl is the list where sample.py wrote one; samples of COCO's prompts bear
    the names of COCO's images. Else it is every image but sample.py's sheet.png.
    """
    path = Path(folder, "samples.jsonl")
    if path.exists():
        rows = read_samples(path)
    else:
        rows = [{"file": file} for file in list_images(folder) if file != "sheet.png"]
    if not rows:
        raise UserError(f"{folder}: no samples in it")
    named = are_cocos(rows)
    names = {row["file"]: row["name"] if named else None for row in rows}
    return dict(sorted(names.items()))


def asked_for(source, files, names):
    """Return those real `files` that the samples are named after; all, without names.

    Raises UserError if there are none, or two of one name.
    """
    wanted = {name for name in names if name}
    if not wanted:
        return files
    chosen = {}
    for file in files:
        name = Path(file).stem
        if name in wanted and name in chosen:
            raise UserError(f"{source}: {chosen[name]} and {file} have the same name: which of them "
                            "was asked for?")
        if name in wanted:
            chosen[name] = file
    if not chosen:
        raise UserError(f"{source}: none of its images was asked for: the samples are named "
                        f"after {min(wanted)} and {len(wanted) - 1} more")
    return list(chosen.values())


@functools.cache
def load_dinov2(name):
    """Return DINOv2 with the positions that torch.hub's `dinov2_vitl14` has at 224 x 224.

    Its 37 x 37 trained positions become 16 x 16, bicubic and without antialias, with the
    scale (16 + 0.1) / 37 of the original code; transformers takes 16 / 37.
    """
    model, _ = pretrained(name, "Dinov2Model")
    positions = model.embeddings.position_embeddings.data              # (1, 1 + 37 * 37, D)
    side = math.isqrt(positions.shape[1] - 1)
    patches = 224 // model.config.patch_size
    if side != patches:
        grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = (patches + 0.1) / side
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        grid = grid.flatten(2).transpose(1, 2)                         # (1, 16 * 16, D)
        model.embeddings.position_embeddings.data = torch.cat([positions[:, :1], grid], 1)
    return model


@functools.cache
def load_inception(weights):
    """Return FID's network on this process's device."""
    return Inception(weights).to(DEVICE)


def load_pixels(path, size):
    """Return an image file as uint8 pixels for Inception and for DINOv2, (3, 224, 224).

    Its shorter side becomes `size`, and the centre is cropped. With None it stays as it
    is, and is resized for Inception already here, because the next one has another size.
    """
    image = open_full(path)
    if size is not None:
        image = resize_and_crop(image, size)
    pixels = pixels_of(image)                                          # (3, size, size)
    if size is None:
        pixels = resize_tf1(pixels[None].float())[0]                   # (3, 299, 299)
    return pixels, pixels_of(image.resize((224, 224), Image.Resampling.BICUBIC))


class FeatureFolder:
    """The features of images, in parts of 256 images below the folder's .features/.

    A part is named after its files, their stamps and the weights, so another run or rank
    that needs the same one finds it. An image that cannot be read is not tried again
    before it changes.
    """

    def __init__(self, folder, files, made_with):
        self.folder = folder
        self.count = len(files)
        place = Path(folder, ".features")
        # Features of a read-only data set are kept among the temporary files.
        if not os.access(folder, os.W_OK):
            place = Path(tempfile.gettempdir(), "evaluate-features")
        self.parts = {}
        for start in range(0, len(files), PART):
            part = files[start:start + PART]
            about = [os.path.abspath(folder), made_with, [(f, stamp(folder, f)) for f in part]]
            key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
            self.parts[place / f"{key}.safetensors"] = part

    def missing(self):
        """Return the paths of the parts that nobody has computed yet.

        A part that a full disk or a failing machine has cut is removed: it is missing.
        """
        missing = []
        for path in self.parts:
            try:
                # Checks that the file is as long as its header says.
                with safe_open(path, "pt"):
                    continue
            except FileNotFoundError:
                pass
            except SafetensorError:
                path.unlink(missing_ok=True)
            missing.append(path)
        return missing

    @torch.no_grad()
    def compute(self, args, rank, world):
        """Compute this rank's share of the parts that are missing."""
        missing = set(self.missing())
        todo = [path for path in list(self.parts)[rank::world] if path in missing]
        load = functools.partial(load_pixels, size=None if args.no_crop else args.size)
        skipped = {}
        batches = load_ahead(self.folder, [self.parts[path] for path in todo], load, skipped)
        for path, images in zip(todo, batches):
            found = {network: [] for network in NETWORKS}
            for start in range(0, len(images), BATCH):
                pixels, small = zip(*[pair for _, pair in images[start:start + BATCH]])
                x = torch.stack(pixels).to(DEVICE)                     # (B, 3, size, size)
                y = normalised(torch.stack(small).to(DEVICE), *IMAGENET_PIXELS)
                found["inception"].append(load_inception(args.inception)(x).cpu())
                tokens = load_dinov2(args.dino)(y).last_hidden_state   # (B, 1 + 16 * 16, D)
                found["dino"].append(tokens[:, 0].cpu())               # the class token
            tables = {network: torch.cat(rows) for network, rows in found.items() if rows}
            unread = {file: skipped[file] for file in self.parts[path] if file in skipped}
            about = {"files": json.dumps([file for file, _ in images]),
                     "skipped": json.dumps(unread)}
            with complete(path) as temporary:
                save_file(tables, temporary, about)

    def read(self):
        """Return ({network: (N, D) float32}, files) of all images that could be read."""
        files = []
        skipped = {}
        tables = {network: [] for network in NETWORKS}
        for path in self.parts:
            with safe_open(path, "pt") as stored:
                about = stored.metadata()
                files += json.loads(about["files"])
                skipped.update(json.loads(about["skipped"]))
                for network in stored.keys():
                    tables[network].append(stored.get_tensor(network))
        report_skipped(self.folder, skipped, self.count)
        return {network: torch.cat(parts) for network, parts in tables.items()}, files


def read_statistics(path, made_with):
    """Return (tables, files) of what --save-stats wrote. Raises UserError."""
    try:
        with safe_open(path, "pt") as stored:
            about = {key: json.loads(text) for key, text in stored.metadata().items()}
            tables = {network: stored.get_tensor(network) for network in NETWORKS}
        made_before, files = about["made_with"], about["files"]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, AttributeError):
        raise UserError(f"{path}: not a file that --save-stats wrote") from None
    if made_before != made_with:
        raise UserError(f"{path}: made with other weights, --size or --no-crop than this run's")
    return tables, files


def inception_file(given):
    """Return the path of FID's weights: `given`, or downloaded once. Raises UserError."""
    path = given or os.path.join(torch.hub.get_dir(), "checkpoints", INCEPTION)
    if not given and not os.path.exists(path):
        url = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION}"
        try:
            torch.hub.load_state_dict_from_url(url, weights_only=True, check_hash=True)
        except OSError:
            raise UserError(f"{url}: out of reach, give the file with --inception") from None
    return path


def quality(args):
    """Table 1: FID, FID-DINOv2, precision, recall, density, coverage of --fake against --real"""
    at_least(args, k=1, size=1, chunk=0, seed=0)
    between(args, 1, 4096, "size")
    between(args, 0, 2 ** 62, "k", "chunk", "seed")
    if 0 < args.chunk <= args.k:
        raise UserError(f"--chunk {args.chunk}: must be larger than --k {args.k}, or 0 for all "
                        "images at once")
    if not (args.fake or args.save_stats):
        raise UserError("give --fake, or --save-stats: --real alone has nothing to be compared "
                        "with")
    rank, world = rank_and_world()
    real_is_file = args.real.endswith(".safetensors")
    # Wrong paths are reported before anything is downloaded.
    names = sample_names(args.fake) if args.fake else {}
    if not real_is_file:
        real_files = asked_for(args.real, list(sample_names(args.real)), names.values())
    if args.fake:
        read_results(args.fake)
    args.inception = inception_file(args.inception)
    weights = {args.inception: sha256(args.inception), args.dino: weights_hash(args.dino)}
    # "full": earlier versions let the decoder shrink large photos.
    made_with = [*weights.values(), None if args.no_crop else args.size, "full"]

    # Every rank computes its share; the one that ends last measures.
    folders = []
    if not real_is_file:
        folders.append(FeatureFolder(args.real, real_files, made_with))
    if args.fake:
        folders.append(FeatureFolder(args.fake, list(names), made_with))
    if rank > 0 and not any(folder.missing() for folder in folders):
        return
    for folder in folders:
        folder.compute(args, rank, world)
    needed = [path for folder in folders for path in folder.parts]
    if not is_last_rank(rank, needed, "results.json"):
        return

    real, files = read_statistics(args.real, made_with) if real_is_file else folders[0].read()
    if args.save_stats:
        about = {"made_with": json.dumps(made_with), "files": json.dumps(files)}
        with complete(args.save_stats) as path:
            save_file(real, path, about)
    if not args.fake:
        return

    if real_is_file:
        chosen = set(asked_for(args.real, files, names.values()))
        rows = torch.tensor([file in chosen for file in files])
        real = {network: table[rows] for network, table in real.items()}
    fake, _ = folders[-1].read()
    scores, note = compare_features(real, fake, args)

    count_real = len(real["dino"])
    count_fake = len(fake["dino"])
    counts = {"real": count_real, "fake": count_fake, "skipped": len(names) - count_fake}
    notes = [note]
    asked = {name for name in names.values() if name}
    if count_real < len(asked):
        notes.append(f"{len(asked) - count_real} of the {len(asked)} real images that were asked "
                     f"for are not in {args.real}")
    finish(args.fake, args, scores, weights, counts, notes, "COCO" if asked else "ImageNet")


def compare_features(real, fake, args):
    """Return ({score: value}, note) of two sets of features {network: (N, D)}.

    The note says what the scores depend on beside the images.
    """
    real_inception = real["inception"].to(DEVICE)                      # (N, 2048)
    fake_inception = fake["inception"].to(DEVICE)                      # (M, 2048)
    real_dino = real["dino"].to(DEVICE)                                # (N, D)
    fake_dino = fake["dino"].to(DEVICE)                                # (M, D)

    scores, chunks, sizes = mean_prdc(real_dino, fake_dino, args.k, args.chunk, args.seed)
    scores["fid"] = frechet_distance(real_inception, fake_inception)
    scores["fid_dino"] = frechet_distance(real_dino, fake_dino)

    note = (f"FID: {len(fake_dino)} images against {len(real_dino)}. P, R, D, C: mean over "
            f"{chunks} chunks of {sizes[1]} images against {sizes[0]}, k = {args.k}, seed "
            f"{args.seed}. All depend on these numbers")
    return scores, note


# --------------------------------------------------------------------------------------
# `clip`, Table 1: does the image show what the prompt says?

@torch.no_grad()
def clip_images(clip_name, images):
    """Return the unit vectors (B, D), on the CPU, that a CLIP gives PIL images."""
    model, _ = pretrained(clip_name, "CLIPModel", "AutoTokenizer")
    size = model.config.vision_config.image_size                       # 224
    prepared = []
    for image in images:
        # Shorter side to 224, then centre crop, rounded as torchvision does for OpenAI's
        # CLIP and GenEval's open_clip; transformers rounds the crop down.
        short = min(image.size)
        sides = [int(size * side / short) for side in image.size]
        image = image.resize(sides, Image.Resampling.BICUBIC)
        left, top = [round((side - size) / 2) for side in sides]
        prepared.append(pixels_of(image.crop((left, top, left + size, top + size))))
    pixels = normalised(torch.stack(prepared).to(DEVICE), *CLIP_PIXELS)
    pooled = model.vision_model(pixels).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1).cpu()


@torch.no_grad()
def clip_texts(clip_name, texts):
    """Return the unit vectors (B, D), on the CPU, of texts, cut after 77 tokens."""
    model, tokenizer = pretrained(clip_name, "CLIPModel", "AutoTokenizer")
    length = model.config.text_config.max_position_embeddings          # 77
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt",
                       max_length=length).to(DEVICE)
    pooled = model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1).cpu()


def clip(args):
    """Table 1: CLIPScore, and for prompts beyond CLIP's 77 tokens the Jina score, of --samples"""
    folder = Path(args.samples).parent
    read_results(folder)
    rows = read_samples(args.samples)
    prompts = {}
    for row in rows:
        if not isinstance(row.get("prompt"), str):
            raise UserError(f'{args.samples}: every line needs a "prompt"')
        prompts[row["file"]] = row["prompt"]

    notes = []
    weights = {args.clip: weights_hash(args.clip)}
    encoders = {"clip": (functools.partial(clip_images, args.clip),
                         functools.partial(clip_texts, args.clip))}
    if args.trust_remote_code:
        jina, _ = pretrained(args.jina, "AutoModel", trust_remote_code=True)
        encoders["jina"] = (jina.encode_image, jina.encode_text)
        weights[args.jina] = weights_hash(args.jina)
    else:
        notes.append(f"Jina score left out: {args.jina} brings its own code "
                     "(--trust-remote-code runs it)")

    skipped = {}
    cosines = {name: [] for name in encoders}
    files = list(prompts)
    parts = [files[start:start + 32] for start in range(0, len(files), 32)]
    for batch in load_ahead(folder, parts, open_full, skipped):
        images = [image for _, image in batch]
        texts = [prompts[file] for file, _ in batch]
        for name, (of_images, of_texts) in encoders.items():
            if batch:
                x = torch.as_tensor(of_images(images)).double().cpu()  # (B, D)
                y = torch.as_tensor(of_texts(texts)).double().cpu()    # (B, D)
                cosines[name].append(F.cosine_similarity(x, y))
    report_skipped(folder, skipped, len(prompts))

    # The mean of the cosines, of which negative ones count as 0, and its standard error.
    scores = {}
    for name, values in cosines.items():
        score = 100 * torch.cat(values).clamp(min=0)
        scores[name] = float(score.mean())
        deviation = float(score.std(correction=int(len(score) > 1)))
        scores[f"{name}_error"] = deviation / len(score) ** 0.5
    counts = {"samples": len(prompts) - len(skipped), "skipped": len(skipped)}
    data = "COCO" if are_cocos(rows) else "ImageNet"
    finish(folder, args, scores, weights, counts, notes, data)


# --------------------------------------------------------------------------------------
# Table 2, `geneval`: the objects that are seen, their places and colours

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

# GenEval's constants, by the names that it gives them.
THRESHOLD = 0.3             # a detection counts if its score is higher
COUNTING_THRESHOLD = 0.9    # the same in the task "counting"
MAX_OBJECTS = 16            # of one class, the most confident ones

# COCO's classes, with the names that GenEval gives to some of them.
COCO = """\
person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,
backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,
baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,
fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,
cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,
tv remote,computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,
clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")


@torch.no_grad()
def detect(detector_name, image):
    """Return what Mask2Former sees: {class: [{"box", "score", "mask" (H, W) bool}, ...]}.

    As in mmdet, with which GenEval was made: the 100 best (query, class) pairs; the score
    is the probability of the class times the mean probability of the mask's pixels; masks
    may overlap; boxes are drawn around them, right and bottom exclusive.
    """
    model, _ = pretrained(detector_name, "Mask2FormerForUniversalSegmentation")
    class_names = COCO if len(model.config.id2label) == 80 else model.config.id2label
    scale = min(800 / min(image.size), 1333 / max(image.size))
    w = int(image.width * scale + 0.5)
    h = int(image.height * scale + 0.5)
    resized = pixels_of(image.resize((w, h), Image.Resampling.BILINEAR))
    x = normalised(resized, *IMAGENET_PIXELS)
    x = F.pad(x, (0, -w % 32, 0, -h % 32))[None].to(DEVICE)            # (1, 3, H', W')
    output = model(pixel_values=x)
    classes = output.class_queries_logits[0].float().softmax(-1)[:, :-1]    # (Q, C)
    best, which = classes.flatten().topk(min(100, classes.numel()))

    # Resize those masks to the image's own size. The mask can only lower a score, so pairs
    # below the threshold are left out beforehand.
    found = {}
    for probability, index in zip(best[best > THRESHOLD].tolist(), which.tolist()):
        query, label = divmod(index, classes.shape[1])
        logits = output.masks_queries_logits[0, query].float()[None, None]
        logits = F.interpolate(logits, x.shape[2:], mode="bilinear")[:, :, :h, :w]
        logits = F.interpolate(logits, (image.height, image.width), mode="bilinear")[0, 0]
        mask = logits > 0                                              # (H, W)
        score = probability * float(logits.sigmoid()[mask].sum() / (mask.sum() + 1e-6))
        if score > THRESHOLD:
            ys = mask.any(1).nonzero().flatten().tolist()
            xs = mask.any(0).nonzero().flatten().tolist()
            found.setdefault(class_names[label], []).append({
                "box": [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], "score": score,
                "mask": mask.cpu().numpy()})
    return found


@functools.cache
def color_texts(clip_name, class_name):
    """Return the ten colours of a thing of a class as embeddings (10, D)."""
    means = []
    for color in COLORS:
        texts = [f"a photo of a {color} {class_name}", f"a photo of a {color}-colored {class_name}",
                 f"a photo of a {color} object"]
        means.append(clip_texts(clip_name, texts).mean(0))
    return F.normalize(torch.stack(means), dim=-1)


def color_of_object(clip_name, image, thing, class_name):
    """Return the colour of an object, kept as thing["color"], that CLIP finds most likely.

    It sees the object's box alone, grey (#999) outside its mask.
    """
    if not thing.get("color"):
        if "mask" in thing:
            grey = Image.new("RGB", image.size, "#999")
            image = Image.composite(image, grey, Image.fromarray(thing["mask"]))
        x0, y0, x1, y1 = map(round, thing["box"][:4])
        box = (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))
        vector = clip_images(clip_name, [image.crop(box)])[0]          # (D,)
        likeness = color_texts(clip_name, class_name) @ vector         # (10,)
        thing["color"] = COLORS[int(likeness.argmax())]
    return thing["color"]


def read_geneval(folder):
    """Return {file: metadata} of GenEval's folders: 00000/samples/0000.png, ..."""
    images = {}
    for path in sorted(path for path in Path(folder).glob("*/") if path.name.isdigit()):
        file = path / "metadata.jsonl"
        if not file.exists():
            raise UserError(f"{path}: no metadata.jsonl in it, which says what its images should "
                            "show")
        metadata = (read_jsonl(file) or [{}])[0]
        kinds = {"tag": str, "prompt": str, "include": list}
        if not all(isinstance(metadata.get(key), kind) for key, kind in kinds.items()):
            raise UserError(f"{file}: not a line of GenEval's (tag, prompt, include)")
        found = sorted(image.name for image in path.glob("samples/*.png") if image.stem.isdigit())
        if not found:
            raise UserError(f"{path}: no images in it (samples/0000.png, ...)")
        images.update({f"{path.name}/samples/{name}": metadata for name in found})
    if not images:
        raise UserError(f"{folder}: no 00000/metadata.jsonl, ... in it, as sample.py --format "
                        "geneval writes")
    return images


def verdict_on(objects, metadata, image, clip_name):
    """Return geneval_verdict of those detected objects that are confident enough."""
    threshold = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    seen = {}
    for class_name, things in objects.items():
        things = sorted(things, key=lambda thing: -thing["score"])
        confident = [thing for thing in things if thing["score"] > threshold]
        seen[class_name] = confident[:MAX_OBJECTS]
    return geneval_verdict(seen, metadata, functools.partial(color_of_object, clip_name, image))


def judge_folder(folder, args, weights, detections):
    """Write geneval.jsonl, a verdict for each image, and return ({task: score}, counts)."""
    images = read_geneval(folder)
    # Which colours are told depends on the metadata.
    extra = {file: {"metadata": metadata} for file, metadata in images.items()}

    def look(file, image):
        objects = detect(args.detector, image)
        # Colours are told now, because masks are not kept.
        verdict_on(objects, images[file], image, args.clip)
        for thing in itertools.chain(*objects.values()):
            del thing["mask"]
        return {"objects": objects}

    verdicts = []
    right = {}
    for file, image, row in cached_answers(folder, list(images), "detections.jsonl", weights,
                                           look, detections, extra):
        metadata = images[file]
        try:
            correct, reason = verdict_on(row["objects"], metadata, image, args.clip)
        # A box can be infinite, or larger than any picture.
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError,
                Image.DecompressionBombError) as error:
            raise UserError(f"{Path(folder, file)}: its metadata.jsonl or detections lack "
                            f"something ({type(error).__name__}: {error})") from None
        right.setdefault(metadata["tag"], []).append(correct)
        verdicts.append({"filename": file, "tag": metadata["tag"], "prompt": metadata["prompt"],
                         "correct": correct, "reason": reason})
    write_jsonl(Path(folder, "geneval.jsonl"), verdicts)
    # A task's score is the mean over its images, the overall score that over the tasks.
    tasks = {tag: float(np.mean(values)) for tag, values in right.items()}
    prompts = {file.split("/")[0] for file in images}
    counts = {"prompts": len(prompts), "images": len(verdicts),
              "skipped": len(images) - len(verdicts)}
    return {"overall": float(np.mean(list(tasks.values()))), **tasks}, counts


def geneval(args):
    """Table 2: GenEval's six tasks, on --images (original prompts, ◇) and --extended (extended ones, ★)"""
    folders = {"original": args.images}
    if args.extended:
        folders["extended"] = args.extended
    given = args.detections or [None] * len(folders)
    if len(given) != len(folders):
        raise UserError("--detections: one file for --images, a second one for --extended if it "
                        "is given")
    read_results(args.images)
    if args.detections:
        weights = {file: sha256(file) for file in args.detections}
        notes = [f"objects: detections of {args.detector or 'an unnamed detector'}, from "
                 f"{' and '.join(args.detections)}"]
    else:
        args.detector = args.detector or DETECTOR
        weights = {name: weights_hash(name) for name in (args.detector, args.clip)}
        notes = [f"objects: {args.detector}. On the hub that is Meta's own training of "
                 "Mask2Former, not the checkpoint of mmdet that the benchmark uses"]
    scores = {}
    counts = {}
    for (prompts, folder), detections in zip(folders.items(), given):
        scores[prompts], counts[prompts] = judge_folder(folder, args, weights, detections)
        absent = [tag for tag in TASKS if tag not in scores[prompts]]
        if absent:
            notes.append(f"{folder}: no prompts of {', '.join(absent)}, overall is without them")
    finish(args.images, args, scores, weights, counts, notes)


# --------------------------------------------------------------------------------------
# Table 3, `dpg`: yes-or-no questions, some meaningful only where others are answered yes

def dpg_score(answers, dependency):
    """Return the share of questions that are answered yes, and whose parents are too.

    answers: {id: bool}; dependency: {id: [ids of parents]}, 0 for none. Questions are
    taken in ascending order of ids, so that a no reaches grandchildren.
    """
    score = {question: float(answer) for question, answer in answers.items()}
    for question in sorted(score):
        parents = [parent for parent in dependency.get(question, ()) if parent != 0]
        if any(score.get(parent, 1) == 0 for parent in parents):
            score[question] = 0.0
    return sum(score.values()) / len(score)


class Question(NamedTuple):
    text: str
    parents: list           # ids of questions; 0 is none
    category: str           # level 1: "attribute" of "attribute - color (car, red)"


def read_questions(path):
    """Return {prompt id: {question id: Question}} of all lines of dpg_bench.csv.

    (The official script passes over the first question.) Raises UserError.
    """
    needed = {"item_id", "proposition_id", "dependency", "tuple", "question_natural_language"}
    prompts = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            missing = needed.difference(reader.fieldnames or ())
            if missing:
                raise UserError(f"{path}: no column {', '.join(sorted(missing))}")
            for row in reader:
                questions = prompts.setdefault(row["item_id"], {})
                number = int(row["proposition_id"])
                if number in questions:
                    raise UserError(f"{path} line {reader.line_num}: prompt {row['item_id']} has "
                                    f"two questions {number}")
                questions[number] = Question(
                    row["question_natural_language"],
                    [int(parent) for parent in row["dependency"].split(",")],
                    re.split("[(-]", row["tuple"])[0].strip())
        except (ValueError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(f"{path} line {reader.line_num}: not a question of DPG-Bench "
                            f"({error})") from None
    if not prompts:
        raise UserError(f"{path}: no questions in it")
    return prompts


@torch.no_grad()
def ask(vqa_name, image, questions):
    """Return [bool]: does a VQA model say yes to the questions about an image?"""
    model, processor = pretrained(vqa_name, "AutoModelForVisualQuestionAnswering", "AutoProcessor")
    inputs = processor([image] * len(questions), questions, padding=True, return_tensors="pt")
    inputs = inputs.to(DEVICE)
    # BLIP says words, ViLT chooses a label.
    if model.can_generate():
        tokens = model.generate(**inputs, max_new_tokens=10)
        said = processor.batch_decode(tokens, skip_special_tokens=True)
    else:
        labels = model(**inputs).logits.argmax(-1).tolist()
        said = [model.config.id2label[label] for label in labels]
    return [re.match(r"\W*yes\b", text, re.IGNORECASE) is not None for text in said]


def quarters(grid):
    """Return the four images of a 2 x 2 grid, row by row."""
    half = grid.width // 2
    corners = [(0, 0), (half, 0), (0, half), (half, half)]
    return [grid.crop((x, y, x + half, y + half)) for x, y in corners]


def grids_of(folder, files, prompts):
    """Return those image files that are named after one of `prompts`. Raises UserError."""
    grids = {}
    for file in files:
        prompt = Path(file).stem
        # One prompt must not count twice.
        if prompt in grids:
            raise UserError(f"{folder}: {grids[prompt]} and {file} are both named after prompt "
                            f"{prompt}: leave one of them there")
        if prompt in prompts:
            grids[prompt] = file
    return list(grids.values())


def answers_of(row, questions, source):
    """Return [{question id: bool}] of a grid's images, from its row's "answers".

    Raises UserError, which names the file `source`.
    """
    wanted = (f'{source}: "answers" of {row["file"]} must list, for each image, '
              f"{{question id: true or false}}, with ids {', '.join(map(str, questions))}")
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers:
        raise UserError(wanted)

    found = []
    for of_image in answers:
        try:
            texts = {number: str(of_image[str(number)]).lower() for number in questions}
        except (KeyError, TypeError):
            raise UserError(wanted) from None
        found.append({number: text in ("true", "yes", "1") for number, text in texts.items()})
    return found


def dpg(args):
    """Table 3: DPG-Bench on 2 x 2 grids named after their prompts' ids"""
    prompts = read_questions(args.questions)
    files = list_images(args.images)
    known = grids_of(args.images, files, prompts)
    if not known:
        raise UserError(f"{args.images}: no image is named after a prompt of {args.questions}, "
                        f"like {min(prompts)}.png")
    read_results(args.images)
    weights = {args.questions: sha256(args.questions)}
    if args.answers:
        # A judge without a name is known by the hash of the file of answers.
        args.judge = args.judge or args.answers
        weights[args.answers] = sha256(args.answers)
    else:
        args.judge = args.vqa
        weights[args.vqa] = weights_hash(args.vqa)
    sizes = set()

    def ask_about_grid(file, grid):
        sizes.add(grid.size)
        if grid.width != grid.height or grid.width % 2 or len(sizes) > 1:
            raise UserError(f"{Path(args.images, file)}: {grid.width} x {grid.height} pixels are "
                            "not a 2 x 2 grid of square images, as large as the others "
                            "(sample.py --format dpg makes them)")
        questions = prompts[Path(file).stem]
        texts = [question.text for question in questions.values()]
        ids = [str(number) for number in questions]
        answers = [dict(zip(ids, ask(args.vqa, image, texts))) for image in quarters(grid)]
        return {"answers": answers}

    values = {"overall": []}
    source = args.answers or Path(args.images, "answers.jsonl")
    for file, _, row in cached_answers(args.images, known, "answers.jsonl", weights,
                                       ask_about_grid, args.answers):
        questions = prompts[Path(file).stem]
        parents = {number: question.parents for number, question in questions.items()}
        of_images = []
        for yes in answers_of(row, questions, source):
            of_images.append(dpg_score(yes, parents))
            # Categories count answers as they are, whatever their parents'.
            for number, question in questions.items():
                values.setdefault(question.category, []).append(yes[number])
        values["overall"].append(np.mean(of_images))

    notes = [f"judge: {args.judge}. The paper's is mPLUG-large; only numbers of one judge compare",
             "categories count all images of a grid; the official script counts the last one"]
    if len(known) < len(prompts) or len(known) < len(files):
        notes.append(f"{len(prompts) - len(known)} of {len(prompts)} prompts have no image, "
                     f"{len(files) - len(known)} of {len(files)} images no prompt")
    counts = {"prompts": len(values["overall"]), "skipped": len(known) - len(values["overall"])}
    scores = {name: 100 * float(np.mean(each)) for name, each in values.items()}
    finish(args.images, args, scores, weights, counts, notes)


# --------------------------------------------------------------------------------------
# results.json, the paper's tables, Fig. 5

def read_results(folder):
    """Return the sections of a folder's results.json, {} without one. Raises UserError."""
    path = Path(folder, "results.json")
    return read_json(path, "a results.json of evaluate.py") if path.exists() else {}


def finish(folder, args, scores, weights, counts, notes, data=None):
    """Put a command's section into <folder>/results.json and print its table."""
    import transformers
    section = {
        "scores": scores, "settings": {key: vars(args)[key] for key in vars(args) if key != "run"},
        "weights": weights, "counts": counts, "notes": notes, "data": data,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    # How the samples were made, as sample.py says it.
    for key, name in (("checkpoint", "checkpoint.json"), ("sampling", "settings.json")):
        path = Path(folder, name)
        section[key] = read_json(path, f"sample.py's {name}") if path.exists() else {}
    # Tens of thousands of texts that say nothing about the scores.
    for long_list in ("prompts", "names"):
        section["sampling"].pop(long_list, None)
    path = Path(folder, "results.json")
    command = args.run.__name__
    results = {**read_results(folder), command: section}
    with complete(path) as temporary:
        text = json.dumps(results, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
    row = Row(Path(folder).resolve().name, scores_of(path, command, section), {})
    # With the notes below it.
    print_tables([row], paper=False)
    print(f"\n- all of it in {path}")


def compare(args):
    """Several results.json side by side as the paper's tables, the best in bold"""
    # A file that is named twice, whatever its name looks like, is one row.
    paths = {}
    for place in args.results:
        for path in results_files(place):
            paths.setdefault(path.resolve(), path)
    rows = joined([read_row(path) for path in paths.values()])
    if args.csv:
        write_csv(args.csv, rows)
    if args.paper:
        rows += read_csv(PUBLISHED)
    if args.published:
        rows += read_csv(args.published)
    print_tables(rows, args.paper)


def run_and_steps(path):
    """Return the folder of the run that a path is of, and the steps that its name says.

    Checkpoints of one run lie in one folder, and are called step-0050000. The steps are
    None for a path that is in no such folder; then the run is the path.
    """
    path = Path(os.path.abspath(path))
    for folder in (path, *path.parents):
        named = re.match(r"step-(\d+)", folder.name)
        if named:
            return folder.parent, int(named[1])
    return path, None


def curve(args):
    """Fig. 5: a score of checkpoints against their training steps, as SVG and JSONL"""
    # Another ending could be that of the points, which would replace the picture.
    if Path(args.out).suffix.lower() != ".svg":
        raise UserError(f"--out {args.out!r}: must be a file that ends in .svg")
    scores = {}
    for place in args.results:
        folder = Path(place).parent if Path(place).is_file() else Path(place)
        run, _ = run_and_steps(folder)
        # Short where it can be, because the picture's legend shows it.
        if run.is_relative_to(Path.cwd()):
            run = run.relative_to(Path.cwd())
        run = str(run)
        for row in [read_row(path) for path in results_files(place)]:
            steps = row.steps or run_and_steps(row.name)[1]
            if args.score not in row.scores:
                continue
            if steps is None:
                raise UserError(f"{row.name}: neither its checkpoint nor its name says after how "
                                "many steps")
            if (run, steps) in scores:
                raise UserError(f"{row.name}: a second {args.score} of {run} after {steps} steps")
            scores[run, steps] = row.scores[args.score]
    if not scores:
        raise UserError(f"no score {args.score!r} in these results")
    difference = disagreement(list(scores.values()))
    if difference:
        raise UserError(f"these results do not compare, they were measured with another {difference}")

    rows = []
    curves = {}
    for (run, steps), score in sorted(scores.items(), key=lambda item: item[0]):
        rows.append({"run": run, "steps": steps, args.score: score.value})
        curves.setdefault(run, []).append((steps, score.value))
    with complete(args.out) as temporary:
        temporary.write_text(line_chart(curves, "training steps", args.score), encoding="utf-8")
    write_jsonl(Path(args.out).with_suffix(".jsonl"), rows)
    print(f"{args.out}: {len(rows)} checkpoints of {len(curves)} runs, and the same as JSONL")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run):
        sub = commands.add_parser(run.__name__, formatter_class=HelpFormatter, help=run.__doc__,
                                  description=run.__doc__)
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command(quality)
    add("--real", required=True, metavar="FOLDER|FILE",
        help="real images, or a file of --save-stats")
    add("--fake", metavar="FOLDER", help="generated images")
    add("--size", type=int, default=256,
        help="both sides: shorter side to this, then centre crop")
    add("--no-crop", action="store_true", help="leave the images as they are")
    add("--k", type=int, default=3,
        help="a sample's ball reaches to this neighbour; 3 is our choice")
    add("--chunk", type=int, default=10_000,
        help="P, R, D, C: mean over chunks of so many; 0: all; 10,000 is our choice")
    add("--seed", type=int, default=0, help="how the images are shuffled into chunks")
    add("--save-stats", metavar="FILE",
        help="keep the features of --real in one .safetensors file")
    add("--inception", metavar="FILE",
        help="FID's weights, pytorch-fid's or torch-fidelity's")
    add("--dino", default="facebook/dinov2-large", help="DINOv2: folder or hub id")
    add = command(clip)
    add("--samples", required=True, metavar="FILE",
        help="samples.jsonl of sample.py, beside its images")
    add("--clip", default=CLIP, help="CLIP: folder or hub id")
    add("--jina", default="jinaai/jina-clip-v2", help="Jina CLIP: folder or hub id")
    add("--trust-remote-code", action="store_true",
        help="run the code that comes with --jina")
    add = command(geneval)
    add("--images", required=True, metavar="FOLDER",
        help="from sample.py --format geneval, original prompts")
    add("--extended", metavar="FOLDER", help="the same from extended prompts")
    add("--detections", metavar="FILE", nargs="+",
        help="instead of a detector, JSONL (for --images, for "
        '--extended): {"file": "00000/samples/0000.png", "objects": {class: [{"box": [x0, y0, x1, y1], '
        '"score": 0.9}]}}, with "color" where CLIP is not to tell it')
    add("--detector",
        help=f"folder or hub id (default: {DETECTOR}); with --detections, who made them, and "
             "only those of one detector are ranked (default: each file is one)")
    add("--clip", default=CLIP, help="CLIP, which tells colours: folder or hub id")
    add = command(dpg)
    add("--images", required=True, metavar="FOLDER", help="from sample.py --format dpg")
    add("--questions", required=True, metavar="FILE",
        help="the benchmark's dpg_bench.csv")
    add("--vqa", default="Salesforce/blip-vqa-capfilt-large",
        help="the judge, a VQA model: folder or hub id")
    add("--answers", metavar="FILE",
        help='instead of a judge, lines {"file": "12.png", "answers": '
        '[{"1": true, "2": false}, ...]}, one list entry for each image of the grid')
    add("--judge",
        help="who gave --answers; only scores of one judge are ranked (default: the file)")
    add = command(compare)
    add("results", nargs="+", metavar="RESULTS", help="results.json, or folders with one")
    add("--paper", action="store_true",
        help="Tables 1 to 5 in the paper's columns, with published rows")
    add("--csv", metavar="FILE", help="write the rows with all their scores")
    add("--published", metavar="FILE",
        help="rows to show, unranked, from a file like that of --csv")
    add = command(curve)
    add("results", nargs="+", metavar="CHECKPOINT",
        help="folders with results.json in them or below")
    add("--score", default="fid",
        help='as results.json names it; "COCO fid", "original overall", ...')
    add("--out", default="curve.svg", metavar="FILE.svg",
        help="the picture; FILE.jsonl holds its points")
    args = parser.parse_args(argv)
    # Only the features of `quality` are shared by the ranks of torchrun.
    rank, _ = rank_and_world()
    if rank == 0 or args.run is quality:
        args.run(args)


if __name__ == "__main__":
    command_line(main)
