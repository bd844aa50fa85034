"""The toy's scores: GenEval's verdicts by its detector, distances on its autoencoder's features.

    python -m toy score --samples out/toy/samples-long --out scores.jsonl
"""

import math
from pathlib import Path

# First: it keeps Ctrl-C quiet while torch is imported.
from common import (Options, UserError, in_batches, keep_apart, open_image, progress,
                    read_jsonl, reading, write_jsonl)

import numpy as np
import torch

import encode
import evaluate
from toy.detector import as_detections, find_objects, has_one_background, is_bitten
from toy.prompts import TASKS
from toy.recipe import VAE
from toy.world import SIZE


# --------------------------------------------------------------------------------------------
# GenEval in miniature

def score(folder):
    """Return a row for each of sample.py's pictures of the toy's prompts in a folder.

    {"file", "tag", "prompt", "right", "reason", "one_background", "bitten"}; `file` is
    relative to the folder. Raises UserError.
    """
    path = folder / "samples.jsonl"
    # Refuses what is no list of samples. A line also has what its prompt asks for.
    evaluate.read_samples(path)
    samples = read_jsonl(path)
    rows = []
    for sample in progress(samples, len(samples), "img", "scoring"):
        image = open_picture(folder / sample["file"])
        with reading(path, "samples for the toy's prompts"):
            objects = find_objects(image)

            # GenEval's own rules judge; only the detector and the colours are the toy's.
            right, reason = evaluate.geneval_verdict(as_detections(objects), sample,
                                                     lambda thing, shape: thing["color"])
            rows.append({"file": sample["file"],
                         "tag": sample["tag"],
                         "prompt": sample["prompt"],
                         "right": right,
                         "reason": reason,
                         "one_background": has_one_background(image),
                         "bitten": is_bitten(image, objects)})
    return rows


def open_picture(path):
    """Return one of the toy's pictures, RGB. Raises UserError if it has another size."""
    # Twice the size: a larger JPEG is then not decoded at just the toy's.
    image = open_image(path, 2 * SIZE)
    if image.size != (SIZE, SIZE):
        raise UserError(f"{path}: {image.width} x {image.height} pixels; "
                        f"the toy's pictures have {SIZE} x {SIZE}")
    return image


TWO_OBJECTS = ("two_object", "position", "color_attr")


def columns_of(rows):
    """Return {column: score} of the rows of a file of scores; NaN where nothing counts.

    Of distances, which are a single row, those. Of verdicts, for each task its share of
    right pictures, and "overall", the mean over the tasks. Then two kinds of seams: "one
    background", the share of right pictures of two objects that have one (among all
    pictures, those in which two objects melted into one would have it, too); and
    "bitten", a share of the pictures in which a small object lies before a large one.
    """
    if "distance" in rows[0]:
        return rows[0]
    scores = {}
    for task in TASKS:
        scores[task] = mean_of(row["right"] for row in rows if row["tag"] == task)
    scores["overall"] = mean_of(scores.values())

    scores["one background"] = mean_of(row["one_background"] for row in rows
                                       if row["tag"] in TWO_OBJECTS and row["right"])
    scores["bitten"] = mean_of(row["bitten"] for row in rows if row["bitten"] is not None)
    return scores


def mean_of(values):
    """Return the mean of numbers, NaN for none."""
    values = list(values)
    return float(np.mean(values)) if values else math.nan


# --------------------------------------------------------------------------------------------
# Table 1 in small

def features(folder):
    """Return what the autoencoder says of each picture in a folder: (N, 64) float32.

    The latents' means over each quarter of the picture, and their deviations in it.
    """
    vae = encode.load_vae(VAE)
    files, _ = evaluate.images_of(folder)
    parts = []
    for batch in in_batches(files, 64):
        images = [open_picture(folder / file) for file in batch]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)     # (B, 3, H, W)
        mean, _ = vae.encode(pixels / 127.5 - 1)                            # (B, 8, 8, 8)

        # Averages over quarters keep roughly where things are, and forget exact
        # positions. Two pictures of like scenes are then close to each other.
        quarters = mean.unfold(2, 4, 4).unfold(3, 4, 4)                     # (B, 8, 2, 2, 4, 4)
        both = torch.stack([quarters.mean((4, 5)), quarters.std((4, 5))], 1)
        parts.append(both.flatten(1))                                       # (B, 64)
    return torch.cat(parts).numpy()


def distances(samples, real):
    """Return one row, the distance and four shares of two folders of pictures (see metrics/)."""
    real = features(real)
    fake = features(samples)
    return [{"distance": evaluate.frechet_distance(real, fake), **evaluate.prdc(real, fake)}]


# --------------------------------------------------------------------------------------------

def main(argv=None):
    parser = Options(__doc__, prog="python -m toy score")
    add = parser.add
    add("--samples", "folder of sample.py's pictures", kind=Path, required=True)
    add("--real", "folder of pictures: measure the distance to these instead", kind=Path)
    add("--out", "file where the scores go", kind=Path, required=True)
    args = parser.parse_args(argv)
    keep_apart(args.out, args.samples, args.real)
    scores = distances(args.samples, args.real) if args.real else score(args.samples)
    write_jsonl(args.out, scores)
