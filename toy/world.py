"""The toy world: what is drawn, and the captioner that writes down what was drawn.

A *scene* says what is in a picture: {"objects": [...], "grey": "dark", "background": "striped"}. Each
*object* is {"shape", "color", "radius", "x", "y"}, lengths in pixels, the front one last. A picture's
class is its shape. Colour, size and background vary and are not in the class name, as with ImageNet.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common import complete, read_jsonl, write_jsonl

SIZE = 64           # pixels of a picture's side
SHAPES = ["circle", "cross", "ring", "square", "star", "triangle"]
COLORS = {
    "red": (222, 40, 40),
    "yellow": (240, 205, 30),
    "green": (30, 165, 60),
    "cyan": (30, 190, 205),
    "blue": (45, 75, 225),
    "purple": (160, 50, 185),
}
GREYS = {"dark": 60, "grey": 128, "light": 205}
BACKGROUNDS = ["plain", "striped", "checkered"]


# --------------------------------------------------------------------------------------------
# Drawing

def polar(radius, turns):
    """Return the point at `radius` from the centre, `turns` of a full turn clockwise from the top."""
    angle = 2 * math.pi * turns
    return radius * math.sin(angle), -radius * math.cos(angle)


# The corners of the shapes in a disc of radius 1, y downwards.
TRIANGLE = [polar(1.08, turn) for turn in (0, 1 / 3, 2 / 3)]
POLYGONS = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    # A triangle's centre of mass lies low: it is drawn a little lower to look centred.
    "triangle": [(x, y + 0.2) for x, y in TRIANGLE],
    "star": [polar(0.5 if i % 2 else 1.0, i / 10) for i in range(10)],
    "cross": [(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
              (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3)],
}


def draw(scene, scale=4):
    """Return the picture of a scene: a 64 x 64 RGB PIL image.

    It is drawn `scale` times as large and shrunk, so that edges are smooth.
    """
    image = draw_background(scene["grey"], scene["background"])
    image = image.resize((SIZE * scale, SIZE * scale), Image.Resampling.NEAREST)
    for thing in scene["objects"]:
        image.paste(COLORS[thing["color"]], (0, 0), mask_of(thing, scale))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_background(grey, pattern):
    """Return a background of 8 x 8 cells as an RGB PIL image of 8 x 8 pixels.

    Every other row, or every other cell, is a little lighter or darker.
    """
    row, column = np.indices((8, 8))
    odd = {"plain": 0 * row, "striped": row % 2, "checkered": (row + column) % 2}[pattern]
    step = 14 if GREYS[grey] < 128 else -14
    cells = GREYS[grey] + step * odd
    return Image.fromarray(cells.astype(np.uint8)).convert("RGB")


def mask_of(thing, scale=1):
    """Return where an object is: a PIL image of mode L of 64 `scale` pixels a side, 255 inside."""
    mask = Image.new("L", (SIZE * scale, SIZE * scale))
    pen = ImageDraw.Draw(mask)
    x = thing["x"] * scale
    y = thing["y"] * scale
    radius = thing["radius"] * scale
    if thing["shape"] in POLYGONS:
        corners = POLYGONS[thing["shape"]]
        pen.polygon([(x + radius * a, y + radius * b) for a, b in corners], fill=255)
    else:
        draw_disc(pen, x, y, 0.92 * radius, 255)
    if thing["shape"] == "ring":
        draw_disc(pen, x, y, 0.42 * radius, 0)
    return mask


def draw_disc(pen, x, y, radius, fill):
    pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)


# --------------------------------------------------------------------------------------------
# Scenes

def random_object(rng, shape=None):
    """Return a random object that fills the frame, as most of ImageNet's do."""
    radius = rng.uniform(22, 28)
    x = 32 + rng.uniform(-2, 2)
    y = 32 + rng.uniform(-2, 2)
    shape = shape or rng.choice(SHAPES)
    color = rng.choice(list(COLORS))
    return {"shape": shape, "color": color,
            "radius": round(radius, 1), "x": round(x, 1), "y": round(y, 1)}


def random_scene(rng, shape=None):
    """Return a random scene of one class."""
    thing = random_object(rng, shape)
    grey = rng.choice(list(GREYS))
    background = rng.choice(BACKGROUNDS)
    return {"objects": [thing], "grey": grey, "background": background}


def make_world(out, count, seed):
    """Draw OUT/images, in ImageNet's layout, and write OUT/scenes.jsonl, what is in each picture."""
    scenes = []
    for i in tqdm(range(count), desc="drawing", unit="img"):
        shape = SHAPES[i % len(SHAPES)]
        file = f"{shape}/{shape}_{i:05d}.png"
        scene = random_scene(random.Random(f"{seed} {i}"), shape)
        path = out / "images" / file
        if not path.exists():
            with complete(path) as temporary:
                draw(scene).save(temporary, "PNG")
        scenes.append({"file": file, **scene})
    write_jsonl(out / "scenes.jsonl", scenes)


# --------------------------------------------------------------------------------------------
# The captioner, in LLaVA's stead: it knows the scene and writes it down in varying words

# The cells of a 3 x 3 grid, (column, row), in words.
PLACES = {
    (0, 0): "in the top left corner",
    (1, 0): "at the top edge",
    (2, 0): "in the top right corner",
    (0, 1): "at the left edge",
    (2, 1): "at the right edge",
    (0, 2): "in the bottom left corner",
    (1, 2): "at the bottom edge",
    (2, 2): "in the bottom right corner",
}
# Where something in such a cell is, seen from something in the middle.
RELATIONS = {(0, 1): "left of", (2, 1): "right of", (1, 0): "above", (1, 2): "below"}
SIZE_WORDS = {"1/4": "small", "1/9": "little", "1/16": "tiny"}


def describe_background(rng, scene):
    """Return words for the background: "on striped dark grey ground ." """
    kind = f"{scene['background']} {scene['grey']} grey".replace("grey grey", "grey")
    return rng.choice([f"before a {kind} wall .", f"on {kind} ground ."])


def describe_original(scene, rng):
    """Return a long caption of an original, a picture of one object."""
    thing = scene["objects"][0]
    if thing["radius"] > 26:
        size = "huge"
    elif thing["radius"] > 24:
        size = "large"
    else:
        size = "big"
    words = f"a {size} {thing['color']} {thing['shape']}"
    text = rng.choice([f"the image shows {words}",
                       f"{words} fills the picture",
                       f"in the center there is {words}",
                       f"a single object , {words}"])
    return f"{text} {describe_background(rng, scene)}"


def describe_composite(base, paste, setting, place, rng):
    """Return a long caption of a composite: `paste` stands at `place` of a 3 x 3 grid on `base`.

    It speaks of one scene, as LLaVA is asked to, not of a composite.
    """
    front = paste["objects"][0]
    back = base["objects"][0]
    one = f"{back['color']} {back['shape']}"
    two = f"{front['color']} {front['shape']}"
    if setting == "1/2":
        side, other = ("left", "right") if place == (2, 1) else ("top", "bottom")
        choices = [f"a {one} on the {side} and a {two} on the {other}",
                   f"the image shows a {two} on the {other} , a {one} on the {side}"]
    else:
        one = f"large {one}"
        two = f"{SIZE_WORDS[setting]} {two}"
        choices = [f"a {one} with a {two} {PLACES[place]}",
                   f"{PLACES[place]} there is a {two} , next to a {one}"]
    if place in RELATIONS:
        choices.append(f"a {two} {RELATIONS[place]} a {one}")
    return f"{rng.choice(choices)} {describe_background(rng, base)}"


def caption_originals(out, seed):
    """Write OUT/captions.jsonl, a long caption for each original."""
    rows = []
    for scene in read_jsonl(out / "scenes.jsonl"):
        rng = random.Random(f"{seed} {scene['file']}")
        rows.append({"file": scene["file"], "caption": describe_original(scene, rng)})
    write_jsonl(out / "captions.jsonl", rows)


def caption_composites(out, composites, captions, seed):
    """Write a long caption for each composite in the folder OUT/`composites` to OUT/`captions`.

    The captioner knows from cutmix.jsonl what was pasted where.
    """
    scenes = {scene["file"]: scene for scene in read_jsonl(out / "scenes.jsonl")}
    rows = []
    for row in read_jsonl(out / composites / "cutmix.jsonl"):
        rng = random.Random(f"{seed} {row['file']}")
        x0, y0, x1, y1 = row["box"]
        column = 3 * (x0 + x1) // (2 * SIZE)
        line = 3 * (y0 + y1) // (2 * SIZE)
        base = scenes[row["base"]]
        paste = scenes[row["paste"]]
        text = describe_composite(base, paste, row["setting"], (column, line), rng)
        rows.append({"file": row["file"], "caption": text})
    write_jsonl(out / captions, rows)
