"""The toy world: what is drawn, and the captioner that writes down what was drawn.

A *scene* says what is in a picture: {"objects": [...], "grey": "dark"}, the grey of its
ground. Each *object* is {"shape", "color", "radius", "x", "y"}, lengths in pixels, the
front one last. As with ImageNet, a picture shows things of one class, which is their
shape: a large one, some smaller ones, or both. Colours, sizes and backgrounds vary and
are not in the class name.
"""

import math
import random
from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

import cutmix
from common import progress, read_jsonl, write_jsonl

SIZE = 64           # pixels of a picture's side
COLORS = {
    "red": (222, 40, 40),
    "yellow": (240, 205, 30),
    "green": (30, 165, 60),
    "blue": (45, 75, 225),
    "purple": (160, 50, 185),
}
GREYS = {"dark": 60, "grey": 128, "light": 205}
LARGE = 18                       # a larger radius, in pixels, fills the frame


# --------------------------------------------------------------------------------------------
# Drawing

def around(radii, lower=0):
    """Return points around a centre, clockwise from the top, a radius each; y points down."""
    points = []
    for i, radius in enumerate(radii):
        angle = 2 * math.pi * (i / len(radii))
        points.append((radius * math.sin(angle), lower - radius * math.cos(angle)))
    return points


def turned(corners):
    """Return corners, and the same ones after a quarter of a turn, a half, and three quarters."""
    outline = []
    for _ in range(4):
        outline += corners
        corners = [(-y, x) for x, y in corners]
    return outline


# The corners of the shapes in a disc of radius 1.
OUTLINES = {
    # A circle has none: these are those of a square around it. With a radius of 1 it
    # would look larger than a square.
    "circle": [(-0.92, -0.92), (0.92, 0.92)],
    "cross": turned([(-0.3, -0.95), (0.3, -0.95), (0.3, -0.3)]),
    "square": turned([(-0.8, -0.8)]),
    "star": around([1.0, 0.5] * 5),
    # Its centre of mass lies low: it is drawn a little lower to look centred.
    "triangle": around([1.08] * 3, lower=0.2),
}
SHAPES = list(OUTLINES)


def draw(scene):
    """Return the picture of a scene: a 64 x 64 RGB PIL image.

    It is drawn four times as large and shrunk, so that edges are smooth.
    """
    grey = GREYS[scene["grey"]]
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), (grey, grey, grey))
    # The last object covers the others.
    for thing in scene["objects"]:
        draw_object(image, thing, COLORS[thing["color"]])
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_object(image, thing, color):
    """Draw an object into a PIL image of the picture, of whatever size."""
    pen = ImageDraw.Draw(image)
    scale = image.width / SIZE
    corners = []
    for x, y in OUTLINES[thing["shape"]]:
        x = thing["x"] + thing["radius"] * x
        y = thing["y"] + thing["radius"] * y
        corners.append((scale * x, scale * y))

    fill = pen.ellipse if thing["shape"] == "circle" else pen.polygon
    fill(corners, color)


# --------------------------------------------------------------------------------------------
# Scenes

# What composites arrange at high noise must exist in originals, at that size and in that
# kind of place: below tau only originals are seen, and there the details are learned. So
# some originals hold smaller objects, where and as large as CutMix pastes them. All the
# same, no original shows two classes. These are the kinds of originals and their shares.
KINDS = {
    "large": 0.42,      # one object fills the frame, as most of ImageNet's do
    "corners": 0.35,    # one to three objects of half that size, each in a corner
    "1/4": 0.13,        # a large one with a small one, as CutMix's settings would paste it
    "1/9": 0.06,
    "1/16": 0.04,
}
MIDDLE = (32, 32)
CORNERS = [(16, 16), (48, 16), (16, 48), (48, 48)]      # the centres of the quarters


def place_at(rng, centre, size):
    """Return (radius, x, y) of an object that fills a quarter of the picture, or the frame: size 2."""
    x, y = centre
    radius = size * rng.uniform(11, 14)
    return radius, x + size * rng.uniform(-1, 1), y + size * rng.uniform(-1, 1)


def corner_places(rng, count):
    """Return the places of objects in different corners."""
    return [place_at(rng, corner, 1) for corner in rng.sample(CORNERS, count)]


def random_scene(rng, shape, kind):
    """Return a random scene of one class and of one of KINDS."""
    if kind == "corners":
        many = rng.choices([1, 2, 3], [0.4, 0.4, 0.2])[0]
        places = corner_places(rng, many)
    else:
        places = [place_at(rng, MIDDLE, 2)]

    # The small object has the size that the large one would have after CutMix shrank its
    # picture, and stands where CutMix pastes it. The front one is last in a scene, so it is
    # never hidden by the large one.
    if kind in cutmix.CUTS:
        radius, _, _ = places[0]
        x0, y0, x1, y1 = cutmix.paste_box(kind, SIZE, rng)
        x = (x0 + x1) / 2 + rng.uniform(-1, 1)
        y = (y0 + y1) / 2 + rng.uniform(-1, 1)
        places.append((radius / cutmix.CUTS[kind].scale, x, y))

    return make_scene([shape] * len(places), places, rng)


def make_scene(shapes, places, rng):
    """Return a scene of shapes at places (radius, x, y), in random colours on a random grey."""
    # `sample` never draws a colour twice: colours tell objects of one shape apart.
    colors = rng.sample(list(COLORS), len(places))
    things = []
    for shape, color, (radius, x, y) in zip(shapes, colors, places):
        things.append({"shape": shape, "color": color,
                       "radius": round(radius, 1), "x": round(x, 1), "y": round(y, 1)})
    return {"objects": things, "grey": rng.choice(list(GREYS))}


def make_world(out, count, seed):
    """Draw OUT/images, in ImageNet's layout, and write what is in each picture.

    OUT/captions.jsonl says it in words, OUT/scenes.jsonl exactly. The latter is written
    last: where it is, all pictures are.
    """
    if (out / "scenes.jsonl").exists():
        return
    scenes = []
    captions = []
    for i in progress(range(count), count, "img", "drawing"):
        # Classes take turns, so all have the same number of pictures, up to one.
        shape = SHAPES[i % len(SHAPES)]
        file = f"{shape}/{shape}_{i:05d}.png"
        rng = random.Random(f"{seed} {i}")
        kind = rng.choices(list(KINDS), KINDS.values())[0]
        scene = random_scene(rng, shape, kind)
        (out / "images" / shape).mkdir(parents=True, exist_ok=True)
        draw(scene).save(out / "images" / file)
        scenes.append({"file": file, **scene})
        text = caption_of(look_at(scene["objects"]), scene, random.Random(f"{seed} {file}"))
        captions.append({"file": file, "caption": text})
    write_jsonl(out / "captions.jsonl", captions)
    write_jsonl(out / "scenes.jsonl", scenes)


def what_a_world_is_made_by():
    """Return all that decides on a world but its seed and size, by name, for JSON.

    A folder remembers it: in another world its old pictures would get new captions.
    """
    return {"colors": COLORS,
            "greys": GREYS,
            "shapes": SHAPES,
            "kinds of originals": KINDS,
            "brief captions": [BRIEF_FOR_ONE, BRIEF_FOR_SEVERAL],
            "sides of pastes": {setting: cut.scale for setting, cut in cutmix.CUTS.items()}}


# --------------------------------------------------------------------------------------------
# What the captioner sees: objects with two more keys, "visible", the share of the object
# that can be seen, and "cell", where it is: (column, row) of a 3 x 3 grid

HALF = 0.55             # up to this share the caption says "half a star"


def seen_in_composite(base, paste, box, setting):
    """Return the objects of two scenes that can still be seen in their composite, the largest three."""
    x0, y0, x1, y1 = box
    inside = np.zeros((SIZE, SIZE), bool)
    inside[y0:y1, x0:x1] = True

    # What is pasted covers the base, so an object is seen only on its own side of the
    # box. CM 1/2 pastes at full size, where it was; all other settings shrink.
    scale = cutmix.CUTS[setting].scale
    pasted = paste["objects"]
    if scale > 1:
        pasted = [{**thing,
                   "radius": thing["radius"] / scale,
                   "x": x0 + thing["x"] / scale,
                   "y": y0 + thing["y"] / scale} for thing in pasted]
    seen = look_at(base["objects"], ~inside) + look_at(pasted, inside)

    # A captioner would not recognise slivers and specks. Three
    # objects are enough: longer captions would be lists.
    seen = [thing for thing in seen if thing["visible"] > 0.2 and thing["radius"] >= 4]
    seen.sort(key=lambda thing: -thing["visible"] * thing["radius"])
    return seen[:3]


def look_at(things, region=True):
    """Return objects with `visible` and `cell`, of which only `region` (64, 64) bool can be seen."""
    seen = []
    for thing in things:
        mask = Image.new("1", (SIZE, SIZE))
        draw_object(mask, thing, 1)
        mask = np.asarray(mask)
        rows, columns = (mask & region).nonzero()
        visible = len(rows) / mask.sum()

        # Of one that fills the frame, the middle.
        cell = (int(3 * thing["x"] / SIZE), int(3 * thing["y"] / SIZE))
        if thing["radius"] > LARGE and 0 < visible <= HALF:
            # A half of a large object is where its middle is, seen from the middle of the
            # picture.
            x = columns.mean() - SIZE / 2
            y = rows.mean() - SIZE / 2
            if abs(x) > abs(y):
                cell = (0 if x < 0 else 2, 1)
            else:
                cell = (1, 0 if y < 0 else 2)
        seen.append({**thing, "visible": visible, "cell": cell})
    return seen


# --------------------------------------------------------------------------------------------
# The captioner, in LLaVA's stead: it knows what is seen and writes it down, at length or
# briefly

NUMBERS = {1: "a", 2: "two", 3: "three"}
# Shares of brief captions: the less there is to tell, the more often a caption is brief.
BRIEF_FOR_ONE = 0.5
BRIEF_FOR_SEVERAL = 0.15


def counted(count, shape):
    """Return words for a number of objects of a shape: "a star", "two crosses"."""
    ending = "es" if shape == "cross" else "s"
    return f"{NUMBERS[count]} {shape}{ending if count > 1 else ''}"


def join(phrases, link="and"):
    """Return phrases as one, with a word before the last one: "a , b and c"."""
    *others, last = phrases
    return f"{' , '.join(others)} {link} {last}" if others else last


def cell_relations(one, two):
    """Return the words for where the first object is, seen from the second: none, one or two."""
    words = []
    # Cells are compared, not pixels: a slight difference
    # within a row or a column is no relation.
    across, down = np.subtract(one["cell"], two["cell"])
    if across:
        words.append("left of" if across < 0 else "right of")
    if down:
        words.append("above" if down < 0 else "below")
    return words


def place_of(cell):
    """Return words for a cell of the 3 x 3 grid: "top left", "right", "middle"."""
    column, row = cell
    words = f"{['top', '', 'bottom'][row]} {['left', '', 'right'][column]}"
    return words.strip() or "middle"


def describe_object(thing):
    """Return words for one object: "a large red star", "a red star top left"."""
    radius = thing["radius"]
    article = "a"
    place = f" {place_of(thing['cell'])}"
    if thing["visible"] <= HALF:
        article = "half a"
    elif radius > LARGE:
        # It fills the frame: it is everywhere.
        place = ""

    # These words are about the size in the picture: they
    # stay the same where a part of the object is hidden.
    if radius > LARGE:
        size = "large "
    elif radius > 10:
        size = ""
    elif radius > 7:
        size = "small "
    else:
        size = "tiny "
    return f"{article} {size}{thing['color']} {thing['shape']}{place}"


def describe_background(scene, rng):
    """Return words for the background, one way or the other."""
    return rng.choice([f"before a {scene['grey']} wall", f"on {scene['grey']} ground"])


def long_caption(things, scene, rng):
    """Return a caption that says what and where every object is.

    It speaks of one scene, as LLaVA is asked to, not of a composite.
    """
    # The order is random, so that it tells nothing of which object is larger or in front.
    things = rng.sample(things, len(things))
    phrases = [describe_object(thing) for thing in things] or ["nothing"]
    link = "and"

    # A relation is said only of two whole objects, neither of which
    # fills the frame: one that does is nowhere in particular.
    whole = all(thing["visible"] > HALF for thing in things)
    none_large = all(thing["radius"] < LARGE for thing in things)
    if len(things) == 2 and whole and none_large and rng.random() < 0.4:
        words = cell_relations(*things)
        if words:
            link = f", {rng.choice(words)}"
    text = join(phrases, link)

    # A number counts whole objects of one class:
    # "two stars" would be wrong for two halves.
    shapes = {thing["shape"] for thing in things}
    if len(things) > len(shapes) == 1 and whole:
        text = f"{counted(len(things), things[0]['shape'])} , {text}"
    return f"{text} {describe_background(scene, rng)}"


def brief_caption(things, rng):
    """Return a short caption, as a user would write it: LLaVA's vary in length, too."""
    things = rng.sample(things, len(things))

    # Half of the brief captions name colours. Those of
    # three objects never do: they would no longer be brief.
    with_colors = rng.random() < 0.5
    if with_colors and len(things) < 3:
        names = [f"a {thing['color']} {thing['shape']}" for thing in things]
        return f"a photo of {join(names)}"

    counts = Counter(thing["shape"] for thing in things)
    link = "and"
    # Between two objects of one shape a relation
    # would say nothing: both have the same name.
    if len(things) == len(counts) == 2 and rng.random() < 0.5:
        link = rng.choice(cell_relations(*things) or [link])
    names = [counted(count, shape) for shape, count in counts.items()]
    return f"a photo of {join(names, link)}"


def caption_of(things, scene, rng):
    """Return a caption of what is seen, a long or a brief one."""
    share = BRIEF_FOR_ONE if len(things) == 1 else BRIEF_FOR_SEVERAL
    if rng.random() < share:
        return brief_caption(things, rng)
    return long_caption(things, scene, rng)


def caption_composites(out, kind, seed):
    """Write OUT/captions`kind`.jsonl, a caption for each composite in the folder of that kind.

    The captioner knows from cutmix.jsonl what was pasted where.
    """
    scenes = {scene["file"]: scene for scene in read_jsonl(out / "scenes.jsonl")}
    rows = []
    for row in read_jsonl(out / kind.removeprefix("-") / "cutmix.jsonl"):
        # Seeded by the file's name, a caption does not depend on the other pictures.
        rng = random.Random(f"{seed} {row['file']}")
        setting = row["setting"]
        base = scenes[row["base"]]
        paste = scenes[row["paste"]]
        things = seen_in_composite(base, paste, row["box"], setting)

        # Each half of CM 1/2 has its background: the caption names one of them.
        ground = base if cutmix.CUTS[setting].scale > 1 else rng.choice([base, paste])
        # Never a brief one of one object: "a photo of a star" is no caption for a part of it.
        caption = caption_of if len(things) > 1 else long_caption
        rows.append({"file": row["file"], "caption": caption(things, ground, rng)})
    write_jsonl(out / f"captions{kind}.jsonl", rows)
