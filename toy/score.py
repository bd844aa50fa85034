"""The toy's scores: GenEval's verdicts with the toy's detector, distances on its autoencoder's features.

    python -m toy score --samples out/toy/samples-long --out scores.jsonl
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import encode
import evaluate
from common import HelpFormatter, UserError, complete, list_images, open_image, write_jsonl
from toy.autoencoder import VAE, to_tensor
from toy.detector import detect, has_one_background
from toy.prompts import TASKS
from toy.world import SIZE


# --------------------------------------------------------------------------------------------
# GenEval in miniature

def score(folder):
    """Return a row for each prompt's picture in a folder of GenEval's layout.

    {"file", "tag", "prompt", "right", "reason", "one_background"}; `file` is relative to the folder.
    """
    rows = []
    for file, metadata in tqdm(evaluate.read_geneval(folder).items(), desc="scoring", unit="img"):
        # GenEval's own rules judge; only the detector and the colours are the toy's.
        image = open_picture(Path(folder) / file)
        right, reason = evaluate.geneval_verdict(detect(image), metadata, color_of)
        rows.append({"file": file,
                     "tag": metadata["tag"],
                     "prompt": metadata["prompt"],
                     "right": bool(right),
                     "reason": reason,
                     "one_background": has_one_background(image)})
    return rows


def open_picture(path):
    """Return one of the toy's pictures, RGB. Raises UserError if it has another size."""
    # Twice the size: a larger JPEG is then not decoded at just the toy's.
    image = open_image(path, 2 * SIZE)
    if image.size != (SIZE, SIZE):
        raise UserError(f"{path}: {image.width} x {image.height} pixels; the toy's pictures have "
                        f"{SIZE} x {SIZE}")
    return image


def color_of(thing, shape):
    """Return the colour of a detected object, which the toy's detector says itself."""
    return thing["color"]


def task_scores(rows):
    """Return {task: share of right pictures}, and "overall": the mean over the tasks."""
    scores = {}
    for task in TASKS:
        scores[task] = mean_of([row["right"] for row in rows if row["tag"] == task])
    scores["overall"] = mean_of(list(scores.values()))
    return scores


def one_background(rows):
    """Return the share of right pictures of two objects that have one background.

    Among all pictures it would prove nothing: those in which two objects have melted into one
    have it, too. NaN where no picture is right.
    """
    return mean_of([row["one_background"] for row in rows
                    if row["tag"] in TWO_OBJECTS and row["right"]])


TWO_OBJECTS = ("two_object", "position", "color_attr")


def mean_of(values):
    """Return the mean of numbers, NaN for none."""
    return float(np.mean(values)) if values else float("nan")


# --------------------------------------------------------------------------------------------
# Table 1 in small

def features(folder):
    """Return what the autoencoder says of each picture in a folder: (N, 64) float32.

    The latents' means over each quarter of the picture, and their deviations in it.
    """
    vae = encode.load_vae(VAE)
    files = list_images(folder)
    # sample.py adds an overview of its pictures, which is not one of them.
    files = [file for file in files if file != "sheet.png"]

    # Pictures go through the autoencoder in
    # batches: a whole folder would fill the memory.
    parts = []
    for start in range(0, len(files), 64):
        images = [open_picture(Path(folder) / file) for file in files[start:start + 64]]
        with torch.no_grad():
            mean, _ = vae.encode(to_tensor(images))                                 # (B, 8, 8, 8)
        # Averages over quarters keep roughly where things are, and forget exact
        # positions. Two pictures of like scenes are then close to each other.
        quarters = mean.unfold(2, 4, 4).unfold(3, 4, 4)                             # (B, 8, 2, 2, 4, 4)
        average = quarters.mean((4, 5)).flatten(1)                                  # (B, 32)
        deviation = quarters.flatten(4).std(4).flatten(1)                           # (B, 32)
        parts.append(torch.cat([average, deviation], 1))
    return torch.cat(parts).numpy()


def quality(real, fake):
    """Return {"distance", "precision", "recall", "density", "coverage"} of two folders of pictures."""
    real_features = features(real)
    fake_features = features(fake)
    # Both measures use the same features, which are computed once.
    scores = {"distance": evaluate.frechet_distance(real_features, fake_features)}
    scores.update(evaluate.prdc(real_features, fake_features))
    return {name: float(value) for name, value in scores.items()}


# --------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m toy score", description=__doc__,
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--samples", required=True, metavar="FOLDER", help="pictures of sample.py")
    add("--real", metavar="FOLDER", help="measure the distance to these pictures instead")
    add("--out", required=True, metavar="FILE", type=Path, help="where the scores go")
    args = parser.parse_args(argv)
    # A distance is one result for a whole folder,
    # GenEval's verdicts are a line for each picture.
    if args.real:
        scores = quality(args.real, args.samples)
        with complete(args.out) as path:
            path.write_text(json.dumps(scores))
    else:
        write_jsonl(args.out, score(args.samples))
