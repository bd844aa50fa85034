"""Stage 6, evaluation (paper 4.1): the numbers of its tables, as the benchmarks' own code has them.

    python evaluate.py quality --real imagenet/val --fake out/samples

`quality` and `clip` make Table 1, `geneval` Table 2, `dpg` Table 3. Each prints its table and
adds a section to results.json beside the images. `compare` sets checkpoints beside each other
and beside the paper's own numbers; `curve` draws Fig. 5, a score against training steps.

What networks say of images is kept below SAMPLES/measured, so a killed command goes on there
and the ranks of torchrun share the work. `evaluate.py COMMAND --help` says what each one needs.
"""

import base64
import csv
import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (COUNT, SEED, Options, UserError, ahead, command_line, complete,
                    default_workers, fingerprint, in_batches, line_chart, list_images,
                    local_device, make_rows, number, open_image, pretrained, read_json,
                    read_jsonl, reading, resize_and_crop, sha256, weights_hash, write_file,
                    write_json, write_jsonl)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from metrics.distances import frechet_distance, mean_prdc, prdc  # noqa: F401
from metrics.geneval import (CLASSES, IMAGENET_PIXELS, clip_images, clip_texts, color_of_object,
                             confident, detect, dpg_score, geneval_verdict, normalised, pixels_of,
                             refuse_strange_clauses)
from metrics.inception import Inception, inception_file, resize_dino_positions

# `encode.py` lets the JPEG decoder shrink large photos, which is faster and moves their pixels a
# little. A figure beside the paper's has to be exact.
open_full = functools.partial(open_image, size=1 << 16)

CLIP = "openai/clip-vit-large-patch14"
DETECTOR = "facebook/mask2former-swin-small-coco-instance"

# A network is loaded once.
load_once = functools.cache(pretrained)


# --------------------------------------------------------------------------------------
# `quality`, Table 1: do the images look like the real ones?

@functools.cache
def load_networks(inception, dino):
    """Return FID's Inception and DINOv2, on this process's device."""
    model, _ = pretrained(dino, "Dinov2Model")
    resize_dino_positions(model)
    with reading(inception, "the Inception weights of FID, pytorch-fid's or torch-fidelity's"):
        network = Inception(inception)
    return network.to(local_device()), model


def load_pixels(path, size):
    """Return an image file as uint8 pixels: (3, size, size), and for DINOv2 (3, 224, 224).

    Its shorter side becomes `size`, and the centre is cropped.
    """
    image = resize_and_crop(open_full(path), size)
    return pixels_of(image), pixels_of(image.resize((224, 224), Image.Resampling.BICUBIC))


def as_texts(features):
    """Return features (B, D) as B texts: float32, as base64 because rows are JSON."""
    return [base64.b64encode(vector).decode() for vector in features.float().cpu().numpy()]


@torch.no_grad()
def features_of(args, files, asked, images):
    """Yield a row {network: features} for each image that `load_pixels` has prepared.

    Nothing else is asked of an image.
    """
    inception, dino = load_networks(args.inception, args.dino)
    device = local_device()
    for batch in in_batches(images, 64):
        pixels, small = zip(*batch)
        x = torch.stack(pixels).to(device)                             # (B, 3, size, size)
        y = normalised(torch.stack(small).to(device), *IMAGENET_PIXELS)
        tokens = dino(y).last_hidden_state                             # (B, 1 + 16 * 16, D)
        for a, b in zip(as_texts(inception(x)), as_texts(tokens[:, 0])):
            yield {"inception": a, "dino": b}


def tables_of(rows):
    """Return ({network: features (N, D) float32}, files) of the rows of `quality`."""
    tables = {}
    for network in ("inception", "dino"):
        raw = b"".join(base64.b64decode(row[network]) for row in rows)
        table = torch.frombuffer(bytearray(raw), dtype=torch.float32)
        tables[network] = table.view(len(rows), -1)                    # (N, D)
    return tables, [row["file"] for row in rows]


def read_stats(path, made_with):
    """Return ({network: features (N, D) float32}, files) of --save-stats. Raises UserError."""
    with reading(path, "a file of --save-stats (npz is not read)"), safe_open(path, "pt") as stored:
        about = stored.metadata()
        if json.loads(about["made_with"]) != made_with:
            raise UserError(f"{path}: made with other weights or another --size")
        return load_file(path), json.loads(about["files"])


def read_samples(path):
    """Return ({file: prompt} of a samples.jsonl, names of the images of COCO that it asks for).

    There are names only if the prompts are COCO's. Raises UserError.
    """
    prompts = {}
    names = []              # of COCO's images
    for line, row in enumerate(read_jsonl(path), 1):
        with reading(f"{path} line {line}", "a sample"):
            prompts[row["file"]] = row["prompt"]
            # Fails for half a character. A file's name may hold bytes that are not UTF-8.
            os.fsencode(row["file"])
            row["prompt"].encode()
        # Other prompts may have names, too, but their samples are not called after them, or
        # they were files, such as DPG-Bench's.
        name = str(row.get("name"))
        is_coco = name.startswith("COCO_") or row["file"].startswith((f"{name}.", f"{name}_"))
        names.append(is_coco and "prompt_file" not in row and name)
    if not prompts:
        raise UserError(f"{path}: no samples in it")
    return prompts, set(names) if all(names) else set()


def images_of(folder):
    """Return (files, names of images of COCO) of the images of a folder that count.

    They are those of its samples.jsonl, or without one all but sample.py's sheet.png.
    """
    path = Path(folder, "samples.jsonl")
    if path.exists():
        prompts, names = read_samples(path)
        return sorted(prompts), names
    return sorted({*list_images(folder)} - {"sheet.png"}), set()


def asked_for(source, files, names):
    """Return those real `files` that bear one of `names`; all, without names."""
    chosen = [file for file in files if not names or Path(file).stem in names]
    if names and not 0 < len(chosen) <= len(names):
        raise UserError(f"{source}: {len(chosen)} of its images bear the {len(names)} names that "
                        f"the samples ask for, such as {min(names)}: one for each is needed")
    return chosen


def quality(args):
    """Table 1: FID, FID-DINOv2, precision, recall, density, coverage of --fake against --real"""
    if args.save_stats and Path(args.save_stats).suffix != ".safetensors":
        raise UserError(f"--save-stats {args.save_stats}: must end in .safetensors (npz is neither "
                        f"written nor read)")
    if not (args.fake or args.save_stats):
        raise UserError("--real alone has nothing to be compared with: --fake or --save-stats")
    # Wrong paths are reported before anything is downloaded.
    generated, names = images_of(args.fake) if args.fake else ([], set())
    photos = []             # none if the real ones are given as a file of --save-stats
    if not os.path.isfile(args.real):
        photos = asked_for(args.real, images_of(args.real)[0], names)
    args.inception = inception_file(args.inception)
    weights = {args.inception: sha256(args.inception), args.dino: weights_hash(args.dino)}

    # "full": earlier versions let the decoder shrink large photos.
    made_with = [*weights.values(), args.size, "full"]
    # Statistics of another kind are neither read nor replaced.
    for path in (args.real, args.save_stats):
        if path and os.path.isfile(path):
            read_stats(path, made_with)

    jobs = [(args.real, dict.fromkeys(photos)), (args.fake, dict.fromkeys(generated))]
    (of_real, of_fake), skipped = measure(
        "quality", args.fake or f"{args.save_stats}.parts", jobs, 256, made_with,
        functools.partial(features_of, args), functools.partial(load_pixels, size=args.size))
    real, files = tables_of(of_real) if photos else read_stats(args.real, made_with)
    if args.save_stats:
        about = {"made_with": json.dumps(made_with), "files": json.dumps(files)}
        with complete(args.save_stats) as path:
            save_file(real, path, about)
        print(f"{args.save_stats}: {len(files)} images, {len(photos) - len(of_real)} skipped")
    if not args.fake:
        shutil.rmtree(f"{args.save_stats}.parts", ignore_errors=True)
        return

    # Statistics may be those of more images.
    chosen = np.isin(files, asked_for(args.real, files, names))        # (N,)
    fake, _ = tables_of(of_fake)
    scores = {}
    for name, network in (("fid", "inception"), ("fid_dino", "dino")):
        real[network] = real[network][chosen].to(local_device())       # (N, D)
        fake[network] = fake[network].to(local_device())               # (M, D)
        scores[name] = frechet_distance(real[network], fake[network])
    scores |= mean_prdc(real["dino"], fake["dino"], args.k, args.chunk, args.seed)

    counts = {"real": len(real["dino"]), "fake": len(of_fake)}
    notes = ["P, R, D, C are means over chunks; all scores depend on the numbers of images"]
    data = "COCO" if names else "ImageNet"
    finish(args.fake, args, scores, weights, counts, notes, skipped, data)


# --------------------------------------------------------------------------------------
# `clip`, Table 1: does the image show what the prompt says?

def clip(args):
    """Table 1: CLIPScore, and for prompts beyond CLIP's 77 tokens the Jina score, of --samples"""
    prompts, names = read_samples(args.samples)
    weights = {args.clip: weights_hash(args.clip)}
    network = load_once(args.clip, "CLIPModel", "AutoTokenizer")
    encoders = {"clip": (functools.partial(clip_images, network),
                         functools.partial(clip_texts, network))}
    if args.trust_remote_code:
        jina, _ = load_once(args.jina, "AutoModel", trust_remote_code=True)
        encoders["jina"] = (jina.encode_image, jina.encode_text)
        weights[args.jina] = weights_hash(args.jina)

    def cosines(files, prompts, images):
        """Return a row for each image: how like its prompt it is."""
        rows = [{} for _ in images]
        for name, (of_images, of_texts) in encoders.items():
            x = torch.as_tensor(of_images(images)).double().cpu()      # (B, D)
            y = torch.as_tensor(of_texts(prompts)).double().cpu()      # (B, D)
            for row, cosine in zip(rows, F.cosine_similarity(x, y).tolist()):
                row[name] = cosine
        return rows

    folder = Path(args.samples).parent
    about = list(weights.values())
    [rows], skipped = measure("clip", folder, [(folder, prompts)], 32, about, cosines)
    # The mean of the cosines, of which negative ones count as 0, and its standard error.
    scores = {}
    for name in encoders:
        cosine = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        score = 100 * cosine.clamp(min=0)
        scores[name] = float(score.mean())
        deviation = float(score.std(correction=int(len(score) > 1)))
        scores[f"{name}_error"] = deviation / len(score) ** 0.5
    data = "COCO" if names else "ImageNet"
    finish(folder, args, scores, weights, {"samples": len(rows)}, [], skipped, data)


# --------------------------------------------------------------------------------------
# `geneval`, Table 2: the objects that are seen, their places and colours

def read_geneval(folder):
    """Return {file: metadata} of GenEval's folders: 00000/samples/0000.png, ..."""
    images = {}
    for path in sorted(Path(folder).glob("*/")):
        if not path.name.isdigit():
            continue
        file = path / "metadata.jsonl"
        with reading(file, "a line of GenEval's (tag, prompt, include)"):
            [metadata, *_] = read_jsonl(file)
            for key in ("tag", "prompt"):
                metadata[key].encode()
            refuse_strange_clauses(metadata)
        found = sorted(path.glob("samples/*.png"))
        if not found:
            raise UserError(f"{path}: no images in it (samples/0000.png, ...)")
        for image in found:
            if image.stem.isdigit():
                images[f"{path.name}/samples/{image.name}"] = metadata
    if not images:
        raise UserError(f"{folder}: no 00000/metadata.jsonl, ... (sample.py --format geneval)")
    return images


def read_detections(path, files):
    """Return {file: {class: [object, ...]}} of --detections. Raises UserError."""
    objects = read_given(path, files, "objects")
    with reading(path, "detections"):
        unknown = set().union(*objects.values()).difference(CLASSES)
    if unknown:
        raise UserError(f"{path}: classes that GenEval does not know: {', '.join(sorted(unknown))}. "
                        f"Its names are COCO's, but computer mouse, tv remote, computer keyboard")
    return objects


def geneval(args):
    """Table 2: GenEval's tasks, on --images (original prompts) and --extended (extended ones)"""
    folders = {"original": args.images}                # the paper's two columns
    if args.extended:
        folders["extended"] = args.extended
    given = args.detections or [None] * len(folders)
    if len(given) != len(folders):
        raise UserError("--detections: one file for --images, a second one for --extended")
    # What is asked of an image: its prompt's metadata, and the objects if they are given.
    jobs = []
    for folder, detections in zip(folders.values(), given):
        images = read_geneval(folder)
        objects = read_detections(detections, images) if detections else {}
        asked = {file: (metadata, objects.get(file)) for file, metadata in images.items()}
        jobs.append((folder, asked))

    if args.detections:
        args.detector = args.detector or " and ".join(args.detections)
        # CLIP tells the colours that they leave out. In a folder it may be replaced.
        weights = {args.clip: weights_hash(args.clip)} if Path(args.clip).is_dir() else {}
        notes = ["Objects are given, not detected here"]
    else:
        args.detector = args.detector or DETECTOR
        detector, _ = load_once(args.detector, "Mask2FormerForUniversalSegmentation")
        labels = detector.config.id2label
        # A configuration without names has LABEL_0 and so on.
        if len(labels) != len(CLASSES) or labels.get(0) not in (CLASSES[0], "LABEL_0"):
            raise UserError(f"{args.detector}: not a detector of COCO's {len(CLASSES)} classes")
        weights = {name: weights_hash(name) for name in (args.detector, args.clip)}
        notes = ["On the hub, the detector is Meta's own training of Mask2Former, not the "
                 "checkpoint of mmdet that the benchmark uses"]
    # Only if a colour is asked for that the detections do not name.
    load_clip = functools.partial(load_once, args.clip, "CLIPModel", "AutoTokenizer")

    def look(file, asked, image):
        """Return the row of an image. Colours are told now, because masks are not kept."""
        metadata, objects = asked
        tag = metadata["tag"]
        if objects is None:
            objects = detect(detector, image)
        with reading(file, "in accord with its metadata.jsonl and detections"):
            seen = {name: confident(things, tag) for name, things in objects.items()}
            color_of = functools.partial(color_of_object, load_clip, image)
            correct, reason = geneval_verdict(seen, metadata, color_of)
        for thing in itertools.chain(*objects.values()):
            thing.pop("mask", None)
        return {"tag": tag, "prompt": metadata["prompt"], "correct": correct, "reason": reason,
                "objects": objects}

    about = [*weights.values(), args.clip]
    measured, skipped = measure("geneval", args.images, jobs, 64, about,
                                functools.partial(map, look))

    scores, counts = {}, {}
    for prompts, (folder, asked), rows in zip(folders, jobs, measured):
        numbers = {file.split("/")[0] for file in asked}
        right = {}          # {task: [whether an image is right]}
        verdicts = []
        for row in rows:
            right.setdefault(row["tag"], []).append(row["correct"])
            del row["objects"]
            verdicts.append({"filename": row.pop("file"), **row})
        write_jsonl(Path(folder, "geneval.jsonl"), verdicts)
        # A task's score is the mean over its images, the overall score that over the tasks.
        tasks = {tag: float(np.mean(values)) for tag, values in right.items()}
        scores[prompts] = {"overall": float(np.mean(list(tasks.values()))), **tasks}
        # A task without prompts is missing in the overall score.
        counts[prompts] = {"prompts": len(numbers), "tasks": len(tasks), "images": len(rows)}
    finish(args.images, args, scores, weights, counts, notes, skipped)


# --------------------------------------------------------------------------------------
# `dpg`, Table 3: yes-or-no questions, some meaningful only where others are answered yes

def read_questions(path):
    """Return {prompt id: (texts, parents, categories)}, each {question id: what it is}.

    A category is that of level 1: "attribute" of "attribute - color (car, red)". The
    official script passes over the file's first question, and then fails on a prompt in
    which others depend on it: it scores 1,064 of 1,065. Raises UserError.
    """
    prompts = {}
    with reading(path, "dpg_bench.csv"), open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            with reading(f"{path} line {reader.line_num}", "a question of DPG-Bench"):
                texts, parents, categories = prompts.setdefault(row["item_id"], ({}, {}, {}))
                key = int(row["proposition_id"])
                texts[key] = row["question_natural_language"]
                parents[key] = [int(parent) for parent in row["dependency"].split(",")]
                categories[key] = re.split("[(-]", row["tuple"])[0].strip()
        if not prompts:
            raise ValueError("no questions in it")
    return prompts


@torch.no_grad()
def ask(vqa_name, image, questions):
    """Return [bool]: does BLIP say yes to the questions about an image?"""
    model, processor = load_once(vqa_name, "BlipForQuestionAnswering", "AutoProcessor")
    inputs = processor([image] * len(questions), questions, padding=True, return_tensors="pt")
    tokens = model.generate(**inputs.to(model.device), max_new_tokens=10)
    said = processor.batch_decode(tokens, skip_special_tokens=True)
    return [re.match(r"\W*yes\b", text, re.IGNORECASE) is not None for text in said]


YES_OR_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def dpg(args):
    """Table 3: DPG-Bench, on 2 x 2 grids (or images) that are named after their prompts' ids"""
    prompts = read_questions(args.questions)
    asked = {}              # {file: {question id: text}}
    file_of = {}            # {prompt: its file}
    for file in list_images(args.images):
        prompt = Path(file).stem
        # One prompt must not count twice.
        if prompt in file_of:
            raise UserError(f"{file_of[prompt]} and {file} are both named after prompt {prompt}")
        if prompt in prompts:
            file_of[prompt] = file
            asked[file], _, _ = prompts[prompt]
    if not asked:
        raise UserError(f"{args.images}: no image is named after a prompt of {args.questions}")
    # A square picture need not be a grid: sample.py or the user says what is one.
    if read_if_there(Path(args.images, "settings.json"), OF_SAMPLE).get("format") == "dpg":
        args.grid = True

    def look(file, texts, picture):
        """Return the row of a picture: for each image in it {question id: is the answer yes?}."""
        images = [picture]
        if args.grid:
            half = picture.width // 2
            if picture.size != (2 * half, 2 * half):
                raise UserError(f"{file}: {picture.width} x {picture.height} pixels are not a "
                                f"2 x 2 grid of square images")
            corners = itertools.product((0, half), repeat=2)
            images = [picture.crop((x, y, x + half, y + half)) for y, x in corners]
        answers = [ask(args.vqa, image, list(texts.values())) for image in images]
        return {"answers": [dict(zip(texts, yes)) for yes in answers]}

    weights = {args.questions: sha256(args.questions)}
    if args.answers:
        args.judge = args.judge or args.answers
        answers, skipped = read_given(args.answers, asked, "answers"), []
    else:
        args.judge = args.vqa
        weights[args.vqa] = weights_hash(args.vqa)
        about = [weights[args.vqa], args.grid]
        [rows], skipped = measure("dpg", args.images, [(args.images, asked)], 64, about,
                                  functools.partial(map, look))
        answers = {row["file"]: row["answers"] for row in rows}

    # Answers have one form, whoever gave them.
    values = {"overall": []}            # and of each category
    for file, images in answers.items():
        texts, parents, categories = prompts[Path(file).stem]
        of_images = []
        with reading(f"{args.answers}: {file}",
                     "answers to all questions on each of 4 images, or of 1"):
            if len(images) not in (1, 4):
                raise ValueError(f"of {len(images)} images")
            for said in images:
                # JSON's keys are text.
                yes = {key: YES_OR_NO[str(said[str(key)]).lower()] for key in texts}
                of_images.append(dpg_score(yes, parents))
                # Categories count answers as they are, whatever their parents'.
                for key, category in categories.items():
                    values.setdefault(category, []).append(yes[key])
        values["overall"].append(np.mean(of_images))
    notes = ["The paper's judge is mPLUG-large; only numbers of one judge compare",
             "Categories count all images of a grid; the official script counts the last one"]
    counts = {"prompts": len(answers), "of": len(prompts)}
    scores = {name: 100 * float(np.mean(each)) for name, each in values.items()}
    finish(args.images, args, scores, weights, counts, notes, skipped)


# --------------------------------------------------------------------------------------
# What networks say of images, kept and shared

def measure(kind, out, jobs, size, about, look, load=open_full):
    """Return ([rows of what networks say of a job's images, ...], rows of unreadable ones).

    jobs: [(folder, {file: what is asked of it}), ...]. look([file, ...], [what is asked, ...],
    [load(path), ...]) yields a row, for JSON, for each image. `size` images at a time make a
    file in OUT/measured/KIND, named after all that its rows depend on: `about`, what is asked,
    the images' sizes and times. So only what has changed is measured again.

    Only the rank that ends last returns; the others exit. Raises UserError.
    """
    units = {}              # {name: what it is made of}
    of_jobs = []            # (folder, its units)
    for folder, asked in jobs:
        items = []
        for file, question in asked.items():
            path = Path(folder, file)
            status = os.stat(path) if path.exists() else None
            stamp = status and (status.st_size, status.st_mtime_ns)
            items.append((path, file, question, stamp))
        of_job = {}
        for part in in_batches(items, size):
            # The folder may be another one, or be called otherwise.
            of_job[f"{fingerprint([about, [item[1:] for item in part]])}.jsonl"] = part
        of_jobs.append((folder, of_job))
        units |= of_job
    place = Path(out, "measured", kind)
    rows_of = functools.partial(rows_of_units, look, load)
    if not make_rows(place, {"kind": kind}, units, rows_of):
        sys.exit()
    return read_units(place, of_jobs)


def rows_of_units(look, load, parts):
    """Yield a row for each (path, file, what is asked, stamp) of the parts, which are lists.

    It is {"file", ...what `look` says}, or {"file", "reason"} for what cannot be read.
    """
    def attempt(path):
        try:
            return load(path)
        except OSError as error:
            return {"reason": error.strerror}

    # Threads read the images that come next.
    paths = [path for path, *_ in itertools.chain(*parts)]
    loaded = ahead(attempt, paths, default_workers())
    for part in parts:
        readable = []       # (file, what is asked of it, image)
        # The part first: at its end, nothing is taken of what is loaded.
        for (_, file, question, _), image in zip(part, loaded):
            if isinstance(image, dict):
                yield {"file": file, **image}
            else:
                readable.append((file, question, image))
        if readable:
            files, asked, images = map(list, zip(*readable))
            for file, row in zip(files, look(files, asked, images)):
                yield {"file": file, **row}


def read_units(place, of_jobs):
    """Return what `measure` returns, from [(folder, names of its units in `place`), ...].

    Raises UserError if none of a folder's images can be read.
    """
    measured, skipped = [], []
    for folder, names in of_jobs:
        rows, unread = [], []
        for name in names:
            for row in read_jsonl(place / name):
                if row.keys() == {"file", "reason"}:
                    unread.append({**row, "file": f"{folder}/{row['file']}"})
                else:
                    rows.append(row)
        if unread and not rows:
            raise UserError(f"{folder}: none of its {len(unread)} images is readable; the first: "
                            f"{unread[0]['file']}: {unread[0]['reason']}")
        measured.append(rows)
        skipped += unread
    return measured, skipped


def read_given(path, files, key):
    """Return {file: value of `key`} of the lines of a user's JSONL file. Raises UserError."""
    with reading(path, f'lines with "file" and "{key}"'):
        given = {row["file"]: row[key] for row in read_jsonl(path)}
    for file in files:
        if file not in given:
            raise UserError(f"{path}: no line for {file}")
    return {file: given[file] for file in files}


# --------------------------------------------------------------------------------------
# results.json, the paper's tables, Fig. 5

OURS = "a results.json of evaluate.py"
OF_SAMPLE = "what sample.py says of its images"
TABLES = {"1": "image quality, alignment (ImageNet, where COCO is not named)",
          "2": "GenEval (original and extended prompts)",
          "3": "DPG-Bench",
          "4": "settings of CutMix (CM), p = 0.5",
          "5": "probability p of composites, CM 1/4"}


def read_if_there(path, what):
    """Return the object in a JSON file, {} without one. Raises UserError."""
    return read_json(path, what) if path.exists() else {}


def finish(folder, args, scores, weights, counts, notes, skipped, data=None):
    """Put a command's section into <folder>/results.json, and print its table.

    skipped: rows of images that could not be read. data: "COCO", "ImageNet" or None.
    """
    folder = Path(folder)
    command = args.run.__name__
    section = {
        "scores": scores,
        "settings": {key: value for key, value in vars(args).items() if key != "run"},
        "weights": weights,
        "counts": {**counts, "skipped": len(skipped)},
        "notes": notes,
        "data": data,
        # How the samples were made.
        "checkpoint": read_if_there(folder / "checkpoint.json", OF_SAMPLE),
        "sampling": read_if_there(folder / "settings.json", OF_SAMPLE)}
    path = folder / "results.json"
    with reading(path, "scores that are numbers"):
        ours = {folder.resolve().name: (scores_of(command, section), {})}
    write_json(path, {**read_if_there(path, OURS), command: section})

    if skipped:
        # Rows that are there already may be prompts that sample.py passed over.
        place = folder / "skipped.jsonl"
        rows = read_jsonl(place) if place.exists() else []
        for row in skipped:
            # An image of this folder is named as its other images are.
            row["file"] = row["file"].removeprefix(f"{folder}/")
            if row not in rows:
                rows.append(row)
        write_jsonl(place, rows)
        print(f"{folder}: {len(skipped)} images could not be read, see its skipped.jsonl",
              file=sys.stderr)
    print_tables(ours)
    print(f"\n- all of it in {path}")


class Score(NamedTuple):
    """A number of the tables."""

    value: float
    text: str               # as a table shows it
    note: str               # how it was measured, which is said wherever it is printed


def scores_of(command, section):
    """Return a section of results.json as {column of the tables: Score}."""
    data = section.get("data") or ""
    # GenEval has two groups; others are named where two would have the same columns.
    group = "dpg" if command == "dpg" else data.removeprefix("ImageNet")
    groups = section["scores"] if command == "geneval" else {group: section["scores"]}

    facts = dict(section.get("counts", {}))
    for key, value in section.get("settings", {}).items():
        # Numbers, but no flags.
        if type(value) is int or key in ("detector", "judge") and value:
            facts[key] = value
    # A network is known by the hash of its weights, whatever its folder is called.
    facts["weights"] = [value[:8] for value in section.get("weights", {}).values()]
    facts = re.sub(r'[{}\[\]"]', "", json.dumps(facts))
    note = ". ".join([f"{data} {command}: {facts}".strip(), *section.get("notes", [])])

    scores = {}
    for group, found in groups.items():
        for name, value in found.items():
            # JSON in Python may hold NaN.
            if not math.isfinite(value):
                raise ValueError(f"{command}: {name} is {value}")
            # A standard error belongs to its score and is none itself.
            if name.endswith("_error"):
                continue
            # Shares between 0 and 1 have three digits.
            digits = 3 if name in ("precision", "recall", "density", "coverage") else 2
            text = f"{value:.{digits}f}"
            if f"{name}_error" in found:
                text += f" ± {found[f'{name}_error']:.2f}"
            scores[f"{group} {name}".strip()] = Score(value, text, note)
    return scores


def read_row(place):
    """Return ({name: Score}, training) of a checkpoint; training is that of its config.json.

    place: a results.json, or a folder with such files in it and in its folders. Raises
    UserError if there is none, two hold the same score, or they are of two checkpoints.
    """
    place = Path(place)
    below = [*place.glob("results.json"), *sorted(place.glob("*/results.json"))]
    scores, training = {}, {}
    holds = {}              # {name of a score: its file}
    checkpoints = set()     # hashes of weights
    for path in [place] if place.is_file() else below:
        with reading(path, OURS):
            for command, section in read_json(path, OURS).items():
                for name, score in scores_of(command, section).items():
                    if holds.setdefault(name, path) != path:
                        raise UserError(f"{holds[name]} and {path} both hold {name}: give each "
                                        f"on its own")
                    scores[name] = score
                # A section that does not know the checkpoint erases nothing.
                training.update(section.get("checkpoint", {}).get("training", {}))
                checkpoints.add(section.get("sampling", {}).get("weights"))
    if len(checkpoints - {None}) > 1:
        raise UserError(f"{place}: results of several checkpoints, give each on its own")
    if not scores:
        raise UserError(f"{place}: no results.json with scores in it")
    return scores, training


def place_in_table(table, name, training):
    """Return what a table calls a checkpoint, and the facts that it tells: {column: text}.

    The name is None where the checkpoint is not of the table.
    """
    # IA is the setting of CutMix; it is empty where a model saw photos only.
    setting, p = training.get("IA"), training.get("p")
    if table == "4":
        return f"{name} CM {setting}" if setting and p == 0.5 else None, {}
    if table == "5":
        return f"{name} p = {p}" if setting == "1/4" else None, {}
    facts = {}
    for fact in ("TA", "IA"):
        if fact in training:
            facts[fact] = "yes" if training[fact] else "no"
    for fact, key in (("Params", "parameters"), ("Images", "images")):
        if training.get(key):
            facts[fact] = f"{training[key] / 1e6:.3g}M"
    return name, facts


def print_tables(ours, paper=False):
    """Print {name: (scores, training)} as the paper's tables, in Markdown, with notes below.

    The columns are the paper's, and called as in results.json. paper: all five tables, with
    the paper's own rows first.
    """
    # {table: {row: {column: text}}}, with as many digits as were published.
    published = {table: {} for table in TABLES}
    with open(Path(__file__).parent / "metrics/published.csv", encoding="utf-8") as file:
        _, *lines = csv.reader(file)
    for table, row, column, value in lines:
        published[table].setdefault(row, {})[column] = value

    for table, title in TABLES.items():
        columns = dict.fromkeys(itertools.chain(*published[table].values()))
        lines = list(published[table].items()) if paper else []
        notes = {}          # {note: the names that it is about}
        for name, (scores, training) in ours.items():
            name_here, cells = place_in_table(table, name, training)
            of_table = {column: scores[column] for column in columns if column in scores}
            if name_here and of_table:
                for column, score in of_table.items():
                    cells[column] = score.text
                    # Not a set, because it keeps no order.
                    notes.setdefault(score.note, {})[name] = None
                lines.append((name_here.replace("|", "\\|"), cells))
        if not lines:
            continue
        filled = set().union(*[cells for _, cells in lines])
        shown = [column for column in columns if column in filled]
        print(f"\nTable {table}: {title}\n\n| | {' | '.join(shown)} |")
        print(f"|---|{'--:|' * len(shown)}")
        for name, cells in lines:
            texts = [name, *[cells.get(column, "") for column in shown]]
            print(f"| {' | '.join(texts)} |")
        for note, names in notes.items():
            print(f"\n- {', '.join(names)}: {note}")


def compare(args):
    """Checkpoints side by side, a row an argument, as the paper's tables"""
    print_tables({place: read_row(place) for place in args.results}, args.paper)


def curve(args):
    """Fig. 5: a score of checkpoints against their training steps, as SVG and JSONL"""
    out = Path(args.out)
    points = out.with_suffix(".jsonl")
    # Another ending could be that of the points, which would replace the picture.
    if out.suffix.lower() != ".svg":
        raise UserError(f"--out {args.out!r}: must be a file that ends in .svg")
    for path, beginning in ((out, b"<svg "), (points, b'{"run": ')):
        if path.exists() and not path.read_bytes().startswith(beginning):
            raise UserError(f"{path}: is there, and not of this command: choose another --out")
    rows = []
    ways = set()            # in which the score was measured
    for place in args.results:
        scores, training = read_row(place)
        score = scores.get(args.score)
        if not score:
            raise UserError(f"{place}: no score {args.score!r}, but {', '.join(scores)}")
        # Checkpoints of one run lie in one folder, and are called step-0050000.
        folder = os.path.abspath(place).removesuffix("/results.json")
        named = re.match(r"(.*)/step-(\d+)", folder)
        steps = training.get("steps", named and int(named[2]))
        if steps is None:
            raise UserError(f"{place}: its checkpoint does not say after how many steps")
        run = os.path.relpath(named[1] if named else folder)
        rows.append({"run": run, "steps": steps, args.score: score.value})
        ways.add(score.note)
    if len(ways) > 1:
        raise UserError(f"measured in several ways: {' / '.join(sorted(ways))}")

    rows.sort(key=lambda row: (row["run"], row["steps"]))
    curves = {}
    for row in rows:
        curves.setdefault(row["run"], []).append((row["steps"], row[args.score]))
    write_file(out, line_chart(curves, "training steps", args.score).encode())
    write_jsonl(points, rows)
    print(f"{out}: {len(rows)} checkpoints of {len(curves)} runs, and the same as JSONL")


# --------------------------------------------------------------------------------------

def main(argv=None):
    parser = Options(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run):
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        return sub

    sub = command(quality)
    sub.add("--real", "real images, or a file of --save-stats", required=True)
    sub.add("--fake", "generated images")
    sub.add("--size", "side of the centre crop", 256, number(int, 1, 4096))
    sub.add("--k", "a ball reaches to the k-th neighbour; 3 is our choice", 3, COUNT)
    sub.add("--chunk", "P, R, D, C: mean over chunks of so many; 0: all", 10_000,
            number(int, 0, 2 ** 62))
    sub.add("--seed", "how chunks are drawn", 0, SEED)
    sub.add("--save-stats", "file.safetensors, which keeps the features of --real")
    sub.add("--inception", "FID's weights (pytorch-fid, torch-fidelity)")
    sub.add("--dino", "DINOv2: folder or hub id", "facebook/dinov2-large")
    sub = command(clip)
    sub.add("--samples", "a samples.jsonl", required=True)
    sub.add("--clip", "CLIP: folder or hub id", CLIP)
    sub.add("--jina", "Jina CLIP: folder or hub id", "jinaai/jina-clip-v2")
    sub.flag("--trust-remote-code", "run --jina's own code, for its score")
    sub = command(geneval)
    sub.add("--images", "from sample.py --format geneval", required=True)
    sub.add("--extended", "the same from extended prompts")
    sub.add("--detections", "instead of a detector, JSONL (for --images, for --extended): "
            '{"file": "00000/samples/0000.png", "objects": {class: [{"box": [x0, y0, x1, y1], '
            '"score": 0.9}]}}, with "color" where CLIP is not to tell it', nargs="+")
    sub.add("--detector", f"folder or hub id ({DETECTOR}), or who made --detections")
    sub.add("--clip", "CLIP, which tells colours: folder or hub id", CLIP)
    sub = command(dpg)
    sub.add("--images", "from sample.py --format dpg", required=True)
    sub.flag("--grid", "images are 2 x 2 grids (sample.py's are known)")
    sub.add("--questions", "dpg_bench.csv", required=True)
    sub.add("--vqa", "BLIP: folder or hub id", "Salesforce/blip-vqa-capfilt-large")
    sub.add("--answers", 'instead of a judge, lines {"file": "12.png", "answers": '
            '[{"1": true, "2": false}, ...]}, one list entry for each image of the grid')
    sub.add("--judge", "who gave --answers")
    sub = command(compare)
    sub.add("results", "results.json, or a folder with some in or below it", nargs="+")
    sub.flag("--paper", "all five tables, with the paper's own rows")
    sub = command(curve)
    sub.add("results", "as of compare", nargs="+")
    sub.add("--score", "a column of compare, such as 'original overall'", "fid")
    sub.add("--out", "the picture; beside it its points as .jsonl", "curve.svg")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    command_line(main)
