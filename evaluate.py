"""Stage 6, evaluation (paper 4.1): the numbers of its tables, as their references give them.

    python evaluate.py quality --real imagenet/val --fake out/samples

`quality` and `clip` make Table 1, `geneval` Table 2, `dpg` Table 3. Each prints its table and
adds a section to results.json beside the images. `compare` sets checkpoints beside each other
and beside the paper's own numbers; `curve` draws Fig. 5, a score against training steps.

What networks say of images is kept below SAMPLES/measured, so a killed command goes on there
and the ranks of torchrun share the work. `evaluate.py COMMAND --help` says what each one needs.
"""

import csv
import functools
import itertools
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (Options, UserError, ahead, command_line, complete, default_workers,
                    fingerprint, has_content, in_batches, jsonl, line_chart, list_images,
                    local_device, make_together, number, open_image, pretrained, progress,
                    rank_and_world, read_json, read_jsonl, reading, reason_without,
                    resize_and_crop, sha256, weights_hash, write_json, write_jsonl)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save, save_file

from metrics.distances import frechet_distance, mean_prdc, prdc  # noqa: F401
from metrics.geneval import (CLASSES, IMAGENET_PIXELS, clip_images, clip_texts, color_of_object,
                             confident, detect, geneval_verdict, normalised, pixels_of)
from metrics.inception import INCEPTION, Inception

# Images are read in full. `encode.py` lets the JPEG decoder shrink large photos, which is
# faster and moves their pixels a little; a figure beside the paper's has to be exact.
open_full = functools.partial(open_image, size=1 << 16)

CLIP = "openai/clip-vit-large-patch14"
DETECTOR = "facebook/mask2former-swin-small-coco-instance"

# A network is loaded once.
load_once = functools.cache(pretrained)


# --------------------------------------------------------------------------------------
# `quality`, Table 1: do the images look like the real ones?

NETWORKS = ("inception", "dino")


@functools.cache
def load_inception(weights):
    """Return FID's network on this process's device."""
    return Inception(weights).to(local_device())


@functools.cache
def load_dinov2(name):
    """Return DINOv2 with the positions that torch.hub's `dinov2_vitl14` has at 224 x 224.

    Its 37 x 37 trained positions become 16 x 16, bicubic and without antialias, with the
    scale (16 + 0.1) / 37 of the original code; transformers takes 16 / 37.
    """
    model, _ = load_once(name, "Dinov2Model")
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


def load_pixels(path, size):
    """Return an image file as uint8 pixels: (3, size, size), and for DINOv2 (3, 224, 224).

    Its shorter side becomes `size`, and the centre is cropped.
    """
    image = resize_and_crop(open_full(path), size)
    return pixels_of(image), pixels_of(image.resize((224, 224), Image.Resampling.BICUBIC))


@torch.no_grad()
def features_of(args, files, images):
    """Return {network: (N, D) on the CPU} of images that `load_pixels` has prepared."""
    device = local_device()
    found = {network: [] for network in NETWORKS}
    for batch in in_batches(images, 64):
        pixels, small = zip(*batch)
        x = torch.stack(pixels).to(device)                             # (B, 3, size, size)
        y = normalised(torch.stack(small).to(device), *IMAGENET_PIXELS)
        tokens = load_dinov2(args.dino)(y).last_hidden_state           # (B, 1 + 16 * 16, D)
        found["inception"].append(load_inception(args.inception)(x).cpu())
        found["dino"].append(tokens[:, 0].cpu())                       # the class token
    return {network: torch.cat(tables) for network, tables in found.items() if tables}


def as_safetensors(files, tables, skipped):
    """Return the bytes of a unit of `quality`."""
    about = {"files": json.dumps(files), "skipped": json.dumps(skipped)}
    return save(tables or {}, about)


def read_features(folder, paths, made_with):
    """Return ({network: (N, D) float32}, files, skipped rows) of units or of --save-stats.

    Raises UserError if it was made with other weights or at another size.
    """
    parts = {network: [] for network in NETWORKS}
    about = {"files": [], "skipped": [], "made_with": []}
    for path in paths:
        with reading(path, "features of this command"), safe_open(path, "pt") as stored:
            for key, text in stored.metadata().items():
                about[key] += json.loads(text)
            for network in stored.keys():
                parts[network].append(stored.get_tensor(network))
    if about["made_with"] not in ([], made_with):
        raise UserError(f"{folder}: made with other weights or another --size")
    refuse_unreadable(folder, about["files"], about["skipped"])
    tables = {network: torch.cat(tables) for network, tables in parts.items()}
    return tables, about["files"], about["skipped"]


def read_samples(path, *keys):
    """Return the rows of a samples.jsonl, in which `keys` are text. Raises UserError."""
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path}: no samples in it")
    for line, row in enumerate(rows, 1):
        with reading(f"{path} line {line}", "a sample"):
            # Fails for half a character. A file's name may hold bytes that are not UTF-8.
            os.fsencode(row["file"])
            for key in keys:
                row[key].encode()
    return rows


def coco_names(rows):
    """Return {file: name of COCO's image} of samples of COCO's prompts, {} for others."""
    # Prompts that were files, such as DPG-Bench's, have names of another kind.
    if all(row.get("name") and "prompt_file" not in row for row in rows):
        return {row["file"]: str(row["name"]) for row in rows}
    return {}


def list_samples(folder):
    """Return (files, names) of the images of a folder that count: names of COCO's, if any.

    samples.jsonl is the list where sample.py wrote one. Else it is every image but sample.py's
    sheet.png.
    """
    path = Path(folder, "samples.jsonl")
    if not path.exists():
        return [file for file in list_images(folder) if file != "sheet.png"], set()
    rows = read_samples(path)
    return sorted({row["file"] for row in rows}), set(coco_names(rows).values())


def asked_for(source, files, names):
    """Return those real `files` that bear one of `names`; all, without names."""
    chosen = [file for file in files if not names or Path(file).stem in names]
    if names and not 0 < len(chosen) <= len(names):
        raise UserError(f"{source}: {len(chosen)} of its images bear the {len(names)} names that "
                        f"the samples ask for, such as {min(names)}: one for each is needed")
    return chosen


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
    if 0 < args.chunk <= args.k:
        raise UserError(f"--chunk {args.chunk}: must be larger than --k {args.k}, or 0 for all")
    if not (args.fake or args.save_stats):
        raise UserError("--real alone has nothing to be compared with: --fake or --save-stats")
    # Wrong paths are reported before anything is downloaded.
    generated, names = list_samples(args.fake) if args.fake else ([], set())
    real_is_file = Path(args.real).is_file()
    for path, is_file in ((args.real, real_is_file), (args.save_stats, args.save_stats)):
        if is_file and not path.endswith(".safetensors"):
            raise UserError(f"{path}: must end in .safetensors, as files of --save-stats do "
                            f"(npz is neither read nor written here)")
    photos = []
    if not real_is_file:
        photos = asked_for(args.real, list_samples(args.real)[0], names)
    args.inception = inception_file(args.inception)
    weights = {args.inception: sha256(args.inception), args.dino: weights_hash(args.dino)}
    # "full": earlier versions let the decoder shrink large photos.
    made_with = [*weights.values(), args.size, "full"]
    for path in (args.real, args.save_stats):
        if path and Path(path).is_file():
            read_features(path, [path], made_with)

    jobs = []
    for folder, files in ((args.real, photos), (args.fake, generated)):
        if files:
            measure = functools.partial(features_of, args)
            load = functools.partial(load_pixels, size=args.size)
            jobs.append(plan(folder, "quality", files, 256, made_with, measure, load,
                             as_safetensors, ".safetensors"))
    paths = share(jobs)
    if paths is None:
        return

    of_real = [args.real] if real_is_file else paths[0]
    real, files, unread = read_features(args.real, of_real, made_with)
    if args.save_stats:
        about = {"made_with": json.dumps(made_with), "files": json.dumps(files)}
        with complete(args.save_stats) as path:
            save_file(real, path, about)
        print(f"{args.save_stats}: {len(files)} images, {len(unread)} skipped")
    if not args.fake:
        return
    # Statistics may be those of more images.
    chosen = set(asked_for(args.real, files, names))
    rows = torch.tensor([file in chosen for file in files])
    fake, _, unread_fake = read_features(args.fake, paths[-1], made_with)
    device = local_device()
    real = {network: table[rows].to(device) for network, table in real.items()}     # (N, D)
    fake = {network: table.to(device) for network, table in fake.items()}           # (M, D)

    scores, chunks, (of_real, of_fake) = mean_prdc(real["dino"], fake["dino"], args.k, args.chunk,
                                                   args.seed)
    scores["fid"] = frechet_distance(real["inception"], fake["inception"])
    scores["fid_dino"] = frechet_distance(real["dino"], fake["dino"])
    counts = {"real": len(real["dino"]), "fake": len(fake["dino"]),
              "skipped": len(unread) + len(unread_fake)}
    notes = [f"FID: {counts['fake']} images against {counts['real']}. P, R, D, C: mean over "
             f"{chunks} chunks of {of_fake} images against {of_real}, k = {args.k}, seed "
             f"{args.seed}. All depend on these numbers"]
    absent = len(names) - counts["real"]
    if absent > 0:
        notes.append(f"{absent} of the {len(names)} real images that were asked for are not in "
                     f"{args.real}")
    skipped = {args.real: unread, args.fake: unread_fake}
    finish(args.fake, args, scores, weights, counts, notes, skipped, coco=bool(names))


# --------------------------------------------------------------------------------------
# `clip`, Table 1: does the image show what the prompt says?

def clip(args):
    """Table 1: CLIPScore, and for prompts beyond CLIP's 77 tokens the Jina score, of --samples"""
    folder = Path(args.samples).parent
    samples = read_samples(args.samples, "prompt")
    prompts = {row["file"]: row["prompt"] for row in samples}
    notes = []
    weights = {args.clip: weights_hash(args.clip)}
    network = load_once(args.clip, "CLIPModel", "AutoTokenizer")
    encoders = {"clip": (functools.partial(clip_images, network),
                         functools.partial(clip_texts, network))}
    if args.trust_remote_code:
        jina, _ = load_once(args.jina, "AutoModel", trust_remote_code=True)
        encoders["jina"] = (jina.encode_image, jina.encode_text)
        weights[args.jina] = weights_hash(args.jina)
    else:
        notes.append(f"Jina score left out: {args.jina} brings its own code "
                     "(--trust-remote-code runs it)")

    def cosines(files, images):
        """Return a row for each image: how like its prompt it is."""
        rows = [{} for _ in files]
        texts = [prompts[file] for file in files]
        for name, (of_images, of_texts) in encoders.items():
            x = torch.as_tensor(of_images(images)).double().cpu()      # (B, D)
            y = torch.as_tensor(of_texts(texts)).double().cpu()        # (B, D)
            for row, cosine in zip(rows, F.cosine_similarity(x, y).tolist()):
                row[name] = cosine
        return rows

    about = [*weights.values(), prompts]
    paths = share([plan(folder, "clip", list(prompts), 32, about, cosines)])
    if paths is None:
        return
    rows, skipped = read_rows(folder, paths[0])

    # The mean of the cosines, of which negative ones count as 0, and its standard error.
    scores = {}
    for name in encoders:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        score = 100 * values.clamp(min=0)
        scores[name] = float(score.mean())
        deviation = float(score.std(correction=int(len(score) > 1)))
        scores[f"{name}_error"] = deviation / len(score) ** 0.5
    counts = {"samples": len(rows), "skipped": len(skipped)}
    finish(folder, args, scores, weights, counts, notes, {folder: skipped},
           coco=bool(coco_names(samples)))


# --------------------------------------------------------------------------------------
# `geneval`, Table 2: the objects that are seen, their places and colours

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def read_geneval(folder):
    """Return {file: metadata} of GenEval's folders: 00000/samples/0000.png, ..."""
    images = {}
    for path in sorted(path for path in Path(folder).glob("*/") if path.name.isdigit()):
        file = path / "metadata.jsonl"
        with reading(file, "a line of GenEval's (tag, prompt, include)"):
            [metadata, *_] = read_jsonl(file)
            for key in ("tag", "prompt"):
                metadata[key].encode()
            # Looks at all clauses.
            geneval_verdict({}, metadata, None)
        names = [image.name for image in path.glob("samples/*.png") if image.stem.isdigit()]
        if not names:
            raise UserError(f"{path}: no images in it (samples/0000.png, ...)")
        images.update({f"{path.name}/samples/{name}": metadata for name in sorted(names)})
    if not images:
        raise UserError(f"{folder}: no 00000/metadata.jsonl, ... in it, as sample.py --format "
                        "geneval writes")
    return images


def judge(folder, images, args, weights, detections):
    """Plan the verdicts on {file: metadata}: the rows of geneval.jsonl, and the objects.

    detections: a file of objects, None for those of --detector. Raises UserError.
    """
    if detections:
        given = read_given(detections, images)
        with reading(detections, "detections"):
            seen = set().union(*[row["objects"] for row in given.values()])
        if not seen <= set(CLASSES):
            unknown = ", ".join(sorted(seen.difference(CLASSES)))
            raise UserError(f"{detections}: classes that GenEval does not know: {unknown}. Its "
                            f"names are COCO's, but computer mouse, tv remote, computer keyboard")
    else:
        detector, _ = load_once(args.detector, "Mask2FormerForUniversalSegmentation")
        if len(detector.config.id2label) != len(CLASSES):
            raise UserError(f"{args.detector}: not a detector of COCO's {len(CLASSES)} classes")
    # Only if a colour is asked for that the detections do not name.
    load_clip = functools.partial(load_once, args.clip, "CLIPModel", "AutoTokenizer")

    def look(file, image):
        """Return the row of an image. Colours are told now, because masks are not kept."""
        metadata = images[file]
        objects = given[file]["objects"] if detections else detect(detector, image)
        with reading(Path(folder, file), "in accord with its metadata.jsonl and detections"):
            seen = {}
            for name, things in objects.items():
                seen[name] = confident(things, metadata["tag"])
            color_of = functools.partial(color_of_object, load_clip, image)
            correct, reason = geneval_verdict(seen, metadata, color_of)
        for thing in itertools.chain(*objects.values()):
            thing.pop("mask", None)
        return {"tag": metadata["tag"], "prompt": metadata["prompt"], "correct": correct,
                "reason": reason, "objects": objects}

    about = [*weights.values(), images, detections and args.clip]
    measure = functools.partial(map, look)
    return plan(folder, "geneval", list(images), 64, about, measure)


def geneval(args):
    """Table 2: GenEval's tasks, on --images (original prompts) and --extended (extended ones)"""
    folders = {"original": args.images}
    if args.extended:
        folders["extended"] = args.extended
    given = args.detections or [None] * len(folders)
    if len(given) != len(folders):
        raise UserError("--detections: one file for --images, a second one for --extended if it "
                        "is given")
    images = [read_geneval(folder) for folder in folders.values()]
    if args.detections:
        weights = {file: sha256(file) for file in args.detections}
        notes = [f"objects: detections of {args.detector or 'an unnamed detector'}, from "
                 f"{' and '.join(args.detections)}"]
    else:
        args.detector = args.detector or DETECTOR
        weights = {name: weights_hash(name) for name in (args.detector, args.clip)}
        notes = [f"objects: {args.detector}. On the hub that is Meta's own training of "
                 "Mask2Former, not the checkpoint of mmdet that the benchmark uses"]
    jobs = []
    for folder, files, detections in zip(folders.values(), images, given):
        jobs.append(judge(folder, files, args, weights, detections))
    paths = share(jobs)
    if paths is None:
        return

    scores, counts, skipped = {}, {}, {}
    for (prompts, folder), units in zip(folders.items(), paths):
        rows, bad = read_rows(folder, units)
        numbers = {row["file"].split("/")[0] for row in (*rows, *bad)}
        right = {}
        verdicts = []
        for row in rows:
            right.setdefault(row["tag"], []).append(row["correct"])
            del row["objects"]
            verdicts.append({"filename": row.pop("file"), **row})
        write_jsonl(Path(folder, "geneval.jsonl"), verdicts)
        # A task's score is the mean over its images, the overall score that over the tasks.
        tasks = {tag: float(np.mean(values)) for tag, values in right.items()}
        scores[prompts] = {"overall": float(np.mean(list(tasks.values()))), **tasks}
        counts[prompts] = {"prompts": len(numbers), "images": len(rows), "skipped": len(bad)}
        skipped[folder] = bad
        absent = ", ".join(tag for tag in TASKS if tag not in tasks)
        if absent:
            notes.append(f"{folder}: no prompts of {absent}, overall is without them")
    finish(args.images, args, scores, weights, counts, notes, skipped)


# --------------------------------------------------------------------------------------
# `dpg`, Table 3: yes-or-no questions, some meaningful only where others are answered yes

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

    The official script passes over the file's first question, and then fails on a prompt in
    which others depend on it: it scores 1,064 of the 1,065 prompts. Raises UserError.
    """
    prompts = {}
    with (reading(path, "dpg_bench.csv"),
          open(path, encoding="utf-8-sig", newline="") as file):
        reader = csv.DictReader(file)
        for row in reader:
            with reading(f"{path} line {reader.line_num}", "a question of DPG-Bench"):
                questions = prompts.setdefault(row["item_id"], {})
                identity = int(row["proposition_id"])
                if identity in questions:
                    raise ValueError(f"prompt {row['item_id']} has two questions {identity}")
                questions[identity] = Question(
                    row["question_natural_language"],
                    [int(parent) for parent in row["dependency"].split(",")],
                    re.split("[(-]", row["tuple"])[0].strip())
    if not prompts:
        raise UserError(f"{path}: no questions in it")
    return prompts


@torch.no_grad()
def ask(vqa_name, image, questions):
    """Return [bool]: does a VQA model say yes to the questions about an image?"""
    model, processor = load_once(vqa_name, "AutoModelForVisualQuestionAnswering", "AutoProcessor")
    inputs = processor([image] * len(questions), questions, padding=True, return_tensors="pt")
    inputs = inputs.to(model.device)
    # BLIP says words, ViLT chooses a label.
    if model.can_generate():
        tokens = model.generate(**inputs, max_new_tokens=10)
        said = processor.batch_decode(tokens, skip_special_tokens=True)
    else:
        labels = model(**inputs).logits.argmax(-1).tolist()
        said = [model.config.id2label[label] for label in labels]
    return [re.match(r"\W*yes\b", text, re.IGNORECASE) is not None for text in said]


YES_OR_NO = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def quarters(path, grid):
    """Return the four images of a 2 x 2 grid, row by row. Raises UserError."""
    if grid.width != grid.height or grid.width % 2:
        raise UserError(f"{path}: {grid.width} x {grid.height} pixels are not a 2 x 2 grid of "
                        "square images (sample.py --format dpg makes them)")
    half = grid.width // 2
    corners = [(0, 0), (half, 0), (0, half), (half, half)]
    return [grid.crop((x, y, x + half, y + half)) for x, y in corners]


def dpg(args):
    """Table 3: DPG-Bench, on 2 x 2 grids (or images) that are named after their prompts' ids"""
    prompts = read_questions(args.questions)
    files = list_images(args.images)
    known = {}
    for file in files:
        prompt = Path(file).stem
        # One prompt must not count twice.
        if prompt in known:
            raise UserError(f"{args.images}: {known[prompt]} and {file} are both named after "
                            f"prompt {prompt}: leave one of them there")
        if prompt in prompts:
            known[prompt] = file
    if not known:
        raise UserError(f"{args.images}: no image is named after a prompt of {args.questions}, "
                        f"like {min(prompts)}.png")
    # A square picture need not be a grid: sample.py or the user says what is one.
    if made_by_sample(args.images, "settings.json").get("format") == "dpg":
        args.grid = True
    weights = {args.questions: sha256(args.questions)}
    if args.answers:
        given = read_given(args.answers, known.values())
        # A judge without a name is known by the hash of the file of answers.
        args.judge = args.judge or args.answers
        weights[args.answers] = sha256(args.answers)
    else:
        args.judge = args.vqa
        weights[args.vqa] = weights_hash(args.vqa)

    def look(file, picture):
        """Return the row of a picture: for each image in it {question id: is the answer yes?}."""
        questions = prompts[Path(file).stem]
        found = []
        if args.answers:
            with reading(f"{args.answers}: {file}", "answers to all questions on each image"):
                for answers in given[file]["answers"]:
                    texts = {identity: str(answers[str(identity)]).lower() for identity in questions}
                    found.append({identity: YES_OR_NO[text] for identity, text in texts.items()})
                if len(found) != 4 and (args.grid or len(found) != 1):
                    raise ValueError(f"{len(found)} images")
            return {"answers": found}
        texts = [question.text for question in questions.values()]
        path = Path(args.images, file)
        for image in quarters(path, picture) if args.grid else [picture]:
            found.append(dict(zip(questions, ask(args.vqa, image, texts))))
        return {"answers": found}

    about = [*weights.values(), args.grid]
    measure = functools.partial(map, look)
    paths = share([plan(args.images, "dpg", list(known.values()), 64, about, measure)])
    if paths is None:
        return
    rows, skipped = read_rows(args.images, paths[0])

    values = {"overall": []}
    for row in rows:
        questions = prompts[Path(row["file"]).stem]
        parents = {identity: question.parents for identity, question in questions.items()}
        of_images = []
        for answers in row["answers"]:
            yes = {identity: answers[str(identity)] for identity in questions}
            of_images.append(dpg_score(yes, parents))
            # Categories count answers as they are, whatever their parents'.
            for identity, question in questions.items():
                values.setdefault(question.category, []).append(yes[identity])
        values["overall"].append(np.mean(of_images))

    notes = [f"judge: {args.judge}. The paper's is mPLUG-large; only numbers of one judge compare",
             "categories count all images of a grid; the official script counts the last one"]
    if len(known) < len(prompts) or len(known) < len(files):
        notes.append(f"{len(prompts) - len(known)} of {len(prompts)} prompts have no image, "
                     f"{len(files) - len(known)} of {len(files)} images no prompt")
    counts = {"prompts": len(rows), "skipped": len(skipped)}
    scores = {name: 100 * float(np.mean(each)) for name, each in values.items()}
    finish(args.images, args, scores, weights, counts, notes, {args.images: skipped})


# --------------------------------------------------------------------------------------
# What networks say of images, kept and shared

def as_jsonl(files, rows, skipped):
    """Return the bytes of a unit of rows; each gets its "file"."""
    rows = [{"file": file, **row} for file, row in zip(files, rows)]
    return jsonl([*rows, *skipped]).encode()


def plan(folder, kind, files, size, about, measure, load=open_full, encode=as_jsonl,
         suffix=".jsonl"):
    """Return what `make_together` needs for a measurement of `size` images at a time.

    measure(files, [load(path), ...]) says something of images; encode(files, that, rows of those
    that cannot be read) returns the bytes of a unit. Units go to FOLDER/measured/KIND-HASH: the
    hash of `about`, for JSON, and of the images' sizes and times. An image that cannot be read
    is not tried again before it changes.
    """
    stamps = []
    for file in files:
        path = Path(folder, file)
        status = os.stat(path) if path.exists() else None
        stamps.append([file, status and f"{status.st_size}:{status.st_mtime_ns}"])
    made_of = fingerprint([about, stamps])
    measured = Path(folder, "measured")
    # What a read-only data set gives is kept among the temporary files.
    if not os.access(folder, os.W_OK):
        whose = fingerprint([os.getuid(), os.path.abspath(folder)])
        measured = Path(tempfile.gettempdir(), f"measured-{whose}")

    def attempt(file):
        path = Path(folder, file)
        try:
            return load(path), None
        except OSError as error:
            return None, reason_without(path, error)

    def make(parts):
        """Yield the units of lists of files, while threads read the images that come next."""
        files = list(itertools.chain(*parts))
        loaded = progress(ahead(attempt, files, default_workers()), len(files), "img")
        for part in parts:
            good, images, skipped = [], [], []
            # The part first: at its end, nothing is taken of what is loaded.
            for file, (image, reason) in zip(part, loaded):
                if reason:
                    skipped.append({"file": file, "reason": reason})
                else:
                    good.append(file)
                    images.append(image)
            yield encode(good, measure(good, images) if good else (), skipped)

    units = {f"{k:05}{suffix}": part for k, part in enumerate(in_batches(files, size))}
    return measured / f"{kind}-{made_of}", {"made of": made_of}, units, make


def share(jobs):
    """Make this rank's share of what `plan` returned, and return the paths of each job's units.

    Returns None if another rank goes on: that which ends last, or rank 0 where all was there.
    """
    paths = [[out / name for name in units] for out, _, units, _ in jobs]
    all_paths = list(itertools.chain(*paths))
    if rank_and_world()[0] > 0 and all(map(has_content, all_paths)):
        return None
    for job in jobs:
        make_together(*job)
    return paths if all(map(has_content, all_paths)) else None


def read_rows(folder, paths):
    """Return (rows, rows of what could not be read) of units of JSONL."""
    good, skipped = [], []
    for row in itertools.chain(*map(read_jsonl, paths)):
        (skipped if row.keys() == {"file", "reason"} else good).append(row)
    refuse_unreadable(folder, good, skipped)
    return good, skipped


def refuse_unreadable(folder, good, skipped):
    """Raise UserError if none of a folder's images could be read."""
    if not good:
        raise UserError(f"{folder}: none of its {len(skipped)} images is readable; the first: "
                        f"{skipped[0]['file']}: {skipped[0]['reason']}")


def read_given(path, files):
    """Return {file: row} of the lines of a JSONL file that a user gives. Raises UserError."""
    with reading(path, 'lines with a "file"'):
        rows = {row["file"]: row for row in read_jsonl(path)}
    missing = [file for file in files if file not in rows]
    if missing:
        raise UserError(f"{path}: no line for {missing[0]} and {len(missing) - 1} more images")
    return {file: rows[file] for file in files}


# --------------------------------------------------------------------------------------
# results.json, the paper's tables, Fig. 5

RESULTS = "a results.json of evaluate.py"
TABLES = {"1": "image quality, alignment (ImageNet, where COCO is not named)",
          "2": "GenEval (original and extended prompts)",
          "3": "DPG-Bench",
          "4": "settings of CutMix (CM), p = 0.5",
          "5": "probability p of composites, CM 1/4"}


def made_by_sample(folder, name):
    """Return the object in a JSON file of sample.py beside its images, {} without one."""
    path = Path(folder, name)
    return read_json(path, f"sample.py's {name}") if path.exists() else {}


def finish(folder, args, scores, weights, counts, notes, skipped, coco=None):
    """Put a command's section into <folder>/results.json, and print its table.

    skipped: {folder: rows of its images that could not be read}, for <folder>/skipped.jsonl.
    coco: whether the images are of COCO's prompts or of ImageNet's, None for others.
    """
    import transformers
    command = args.run.__name__
    section = {
        "scores": scores,
        "settings": {key: value for key, value in vars(args).items() if key != "run"},
        "weights": weights, "counts": counts, "notes": notes,
        "data": {True: "COCO", False: "ImageNet", None: None}[coco],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        # How the samples were made.
        "checkpoint": made_by_sample(folder, "checkpoint.json"),
        "sampling": made_by_sample(folder, "settings.json")}
    # Tens of thousands of texts that say nothing about the scores.
    for long_list in ("prompts", "names"):
        section["sampling"].pop(long_list, None)
    path = Path(folder, "results.json")
    with reading(path, "scores that are numbers"):
        ours = {Path(folder).resolve().name: (scores_of(command, section), {})}
    before = read_json(path, RESULTS) if path.exists() else {}
    write_json(path, {**before, command: section})

    bad = []
    for source, rows in skipped.items():
        for row in rows:
            # Of another folder's image, the whole path.
            file = row["file"] if source == folder else f"{source}/{row['file']}"
            bad.append({**row, "file": file})
    if bad:
        write_jsonl(Path(folder, "skipped.jsonl"), bad)
        print(f"{folder}: {len(bad)} images could not be read, see its skipped.jsonl; the first: "
              f"{bad[0]['file']}: {bad[0]['reason']}", file=sys.stderr)
    print_tables(ours)
    print(f"\n- all of it in {path}")


class Score(NamedTuple):
    value: float
    text: str               # as a table shows it
    measured: str           # what it depends on beside the images
    note: str               # what is to be said wherever it is printed


def scores_of(command, section):
    """Return a section of results.json as {name of the score: Score}."""
    found = section["scores"]
    # GenEval has scores of two kinds of prompts, one level deeper than the others.
    if command == "geneval":
        found = {}
        for prompts, tasks in section["scores"].items():
            for task, value in tasks.items():
                found[f"{prompts} {task}"] = value
    # A prefix keeps apart what has the same name on two data sets, or in two tables.
    prefix = "COCO " if section.get("data") == "COCO" else ""
    label = f"{prefix}{command}"
    if command == "dpg":
        prefix = "dpg "

    measured = dict(section.get("counts", {}))
    for key, value in section.get("settings", {}).items():
        if type(value) is int or key in ("detector", "judge") and value:
            measured[key] = value
    # A network is known by the hash of its weights, whatever its folder is called.
    measured["weights"] = [value[:8] for value in section.get("weights", {}).values()]
    measured = json.dumps(measured).translate(str.maketrans("", "", '{}[]"'))
    note = ". ".join([f"{label}: {measured}", *section.get("notes", [])])

    scores = {}
    for name, value in found.items():
        # JSON in Python may hold NaN, and True counts as an int: neither is a score.
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{command}: {name} is {value!r}, which is not a number")
        # Shares between 0 and 1 have three digits.
        digits = 3 if name in ("precision", "recall", "density", "coverage") else 2
        text = f"{value:.{digits}f}"
        # A standard error belongs to its score and is none itself.
        if f"{name}_error" in found:
            text += f" ± {found[f'{name}_error']:.2f}"
        if not name.endswith("_error"):
            scores[prefix + name] = Score(value, text, measured, note)
    return scores


def read_row(place):
    """Return ({name: Score}, training) of a checkpoint; training is that of its config.json.

    place: a results.json, or a folder with such files in it and in its folders. Raises
    UserError if there is none, if two hold the same score, or if they are of two checkpoints.
    """
    place = Path(place)
    paths = [place]
    if not place.is_file():
        paths = [*place.glob("results.json"), *sorted(place.glob("*/results.json"))]
    scores, training, holds = {}, {}, {}
    checkpoints = set()
    for path in paths:
        with reading(path, RESULTS):
            for command, section in read_json(path, RESULTS).items():
                for name, score in scores_of(command, section).items():
                    if holds.setdefault(name, path) != path:
                        raise UserError(f"{place}: {holds[name]} and {path} both hold {name}: "
                                        f"give each as an argument of its own")
                    scores[name] = score
                # A section that does not know the checkpoint erases nothing.
                training.update((section.get("checkpoint") or {}).get("training") or {})
                checkpoints.add((section.get("sampling") or {}).get("weights"))
    if len(checkpoints - {None}) > 1:
        raise UserError(f"{place}: results of several checkpoints: give each as an argument of "
                        f"its own")
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
        for line in csv.DictReader(file):
            cells = published[line["table"]].setdefault(line["row"], {})
            cells[line["column"]] = line["value"]

    for table, title in TABLES.items():
        columns = dict.fromkeys(itertools.chain(*published[table].values()))
        lines = list(published[table].items()) if paper else []
        notes = {}
        for name, (scores, training) in ours.items():
            name_here, cells = place_in_table(table, name, training)
            of_table = {column: scores[column] for column in columns if column in scores}
            if name_here and of_table:
                for column, score in of_table.items():
                    cells[column] = score.text
                    # A dict and not a set, because it keeps the order.
                    notes.setdefault(score.note, {})[name] = None
                lines.append((name_here.replace("|", "\\|"), cells))
        if not lines:
            continue
        shown = [column for column in columns if any(column in cells for _, cells in lines)]
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


def run_and_steps(place):
    """Return the run that a checkpoint's folder is of, and the steps that its name says.

    Checkpoints of one run lie in one folder, and are called step-0050000. Of another folder
    the steps are None.
    """
    path = Path(os.path.abspath(place))
    for folder in (path, *path.parents):
        named = re.match(r"step-(\d+)", folder.name)
        if named:
            return os.path.relpath(folder.parent), int(named[1])
    return os.path.relpath(path), None


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
    found = {}
    ways = set()
    for place in args.results:
        scores, training = read_row(place)
        run, steps = run_and_steps(Path(place).parent if Path(place).is_file() else place)
        steps = training.get("steps", steps)
        if args.score not in scores:
            raise UserError(f"{place}: no score {args.score!r}, but {', '.join(scores)}")
        if steps is None:
            raise UserError(f"{place}: neither its checkpoint nor its name says after how many "
                            f"steps")
        if (run, steps) in found:
            raise UserError(f"{place}: a second {args.score} of {run} after {steps} steps")
        found[run, steps] = scores[args.score].value
        ways.add(scores[args.score].measured)
    if len(ways) > 1:
        raise UserError(f"these results do not compare, they were measured in several ways: "
                        f"{' / '.join(sorted(ways))}")

    rows = []
    curves = {}
    for (run, steps), value in sorted(found.items()):
        rows.append({"run": run, "steps": steps, args.score: value})
        curves.setdefault(run, []).append((steps, value))
    with complete(out) as path:
        path.write_text(line_chart(curves, "training steps", args.score), encoding="utf-8")
    write_jsonl(points, rows)
    print(f"{out}: {len(rows)} checkpoints of {len(curves)} runs, and the same as JSONL")


# --------------------------------------------------------------------------------------

def main(argv=None):
    parser = Options(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run):
        sub = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command(quality)
    add("--real", required=True, metavar="FOLDER|FILE",
        help="real images, or a file of --save-stats")
    add("--fake", metavar="FOLDER", help="generated images")
    add("--size", type=number(int, 1, 4096), default=256, help="side of the centre crop")
    add("--k", type=number(int, 1), default=3, help="reach of a ball; 3 is our choice")
    add("--chunk", type=number(int, 0, 2 ** 62), default=10_000,
        help="P, R, D, C: mean over chunks of so many; 0: all; 10,000 is our choice")
    add("--seed", type=number(int, 0, 2 ** 62), default=0, help="how chunks are drawn")
    add("--save-stats", metavar="FILE", help="keep the features of --real, .safetensors")
    add("--inception", metavar="FILE", help="FID's weights (pytorch-fid, torch-fidelity)")
    add("--dino", default="facebook/dinov2-large", help="DINOv2: folder or hub id")
    add = command(clip)
    add("--samples", required=True, metavar="FILE", help="a samples.jsonl")
    add("--clip", default=CLIP, help="CLIP: folder or hub id")
    add("--jina", default="jinaai/jina-clip-v2", help="Jina CLIP: folder or hub id")
    add("--trust-remote-code", action="store_true", help="run the code of --jina")
    add = command(geneval)
    add("--images", required=True, metavar="FOLDER",
        help="from sample.py --format geneval, original prompts")
    add("--extended", metavar="FOLDER", help="the same from extended prompts")
    add("--detections", metavar="FILE", nargs="+",
        help="instead of a detector, JSONL (for --images, for --extended): "
        '{"file": "00000/samples/0000.png", "objects": {class: [{"box": [x0, y0, x1, y1], '
        '"score": 0.9}]}}, with "color" where CLIP is not to tell it')
    add("--detector",
        help=f"folder or hub id (default: {DETECTOR}); with --detections, who made them")
    add("--clip", default=CLIP, help="CLIP, which tells colours: folder or hub id")
    add = command(dpg)
    add("--images", required=True, metavar="FOLDER", help="from sample.py --format dpg")
    add("--grid", action="store_true",
        help="each image is a 2 x 2 grid (known where sample.py --format dpg made it)")
    add("--questions", required=True, metavar="FILE", help="dpg_bench.csv")
    add("--vqa", default="Salesforce/blip-vqa-capfilt-large",
        help="the judge, a VQA model: folder or hub id")
    add("--answers", metavar="FILE",
        help='instead of a judge, lines {"file": "12.png", "answers": '
        '[{"1": true, "2": false}, ...]}, one list entry for each image of the grid')
    add("--judge", help="who gave --answers")
    add = command(compare)
    add("results", nargs="+", metavar="RESULTS",
        help="results.json, or a folder with results in it or in its folders: a row each")
    add("--paper", action="store_true", help="all five tables, with the paper's own rows")
    add = command(curve)
    add("results", nargs="+", metavar="CHECKPOINT", help="as RESULTS of compare")
    add("--score", default="fid",
        help='as results.json names it; "COCO fid", "original overall", ...')
    add("--out", default="curve.svg", metavar="FILE.svg",
        help="the picture; FILE.jsonl holds its points")
    args = parser.parse_args(argv)
    # Ranks share what is measured; tables are one rank's.
    if rank_and_world()[0] == 0 or args.run not in (compare, curve):
        args.run(args)


if __name__ == "__main__":
    command_line(main)
