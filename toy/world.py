"""The toy world: what is drawn, and the captioner that writes down what was drawn.

A *scene* says what is in a picture: {"objects": [...], "grey": "dark"}, the grey of its
ground. Each *object* is {"shape", "color", "radius", "x", "y"}, lengths in pixels, the
front one last. As with ImageNet, a picture shows things of one class, which is their
shape: mostly a large one, often some smaller ones. Colours, sizes and backgrounds vary
and are not in the class name.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

import cutmix
from common import progress, read_jsonl, write_jsonl

SIZE = 64           # pixels of a picture's side
SHAPES = ["circle", "cross", "square", "star", "triangle"]
COLORS = {
    "red": (222, 40, 40),
    "yellow": (240, 205, 30),
    "green": (30, 165, 60),
    "blue": (45, 75, 225),
    "purple": (160, 50, 185),
}
LEAST_IMAGES = 2 * len(SHAPES)  # with fewer there is little to be mixed
GREYS = {"dark": 60, "grey": 128, "light": 205}
LARGE = 18                       # a larger radius, in pixels, fills the frame


# --------------------------------------------------------------------------------------------
# Drawing

def polar(radius, turns):
    """Return the point at `radius` from the centre, `turns` of a full turn clockwise from the top."""
    # In pictures y points down, so the top is at a negative y.
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
    grey = GREYS[scene["grey"]]
    image = Image.new("RGB", (SIZE * scale, SIZE * scale), (grey, grey, grey))
    # The last object covers the others.
    for thing in scene["objects"]:
        image.paste(COLORS[thing["color"]], (0, 0), mask_of(thing, scale))
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


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
        radius = 0.92 * radius          # a circle of radius 1 would look larger than a square
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    return mask


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
CORNERS = [(16, 16), (48, 16), (16, 48), (48, 48)]      # the centres of the quarters


def large_place(rng):
    """Return (radius, x, y) of an object that fills the frame."""
    return rng.uniform(22, 28), 32 + rng.uniform(-2, 2), 32 + rng.uniform(-2, 2)


def corner_place(rng, corner):
    """Return (radius, x, y) of an object in a quarter of the picture."""
    x, y = corner
    return rng.uniform(11, 14), x + rng.uniform(-1, 1), y + rng.uniform(-1, 1)


def pasted_place(rng, setting, radius):
    """Return (radius, x, y) of an object as small and in such a place as CutMix pastes a large one."""
    x0, y0, x1, y1 = cutmix.paste_box(setting, SIZE, rng)
    x = (x0 + x1) / 2 + rng.uniform(-1, 1)
    y = (y0 + y1) / 2 + rng.uniform(-1, 1)
    return radius / cutmix.CUTS[setting].scale, x, y


def random_scene(rng, shape=None, kind=None):
    """Return a random scene of one class and of one of KINDS."""
    kind = kind or rng.choices(list(KINDS), KINDS.values())[0]
    if kind == "corners":
        many = rng.choices([1, 2, 3], [0.4, 0.4, 0.2])[0]
        places = [corner_place(rng, corner) for corner in rng.sample(CORNERS, many)]
    else:
        places = [large_place(rng)]

    # The small object has the size that the large one would have after CutMix shrank its
    # picture. The front one is last in a scene, so it is never hidden by the large one.
    if kind in cutmix.CUTS:
        radius = places[0][0]
        places.append(pasted_place(rng, kind, radius))

    # `sample` never draws a colour twice: colours tell objects of one shape apart.
    shape = shape or rng.choice(SHAPES)
    colors = rng.sample(list(COLORS), len(places))
    things = [make_object(shape, color, place) for color, place in zip(colors, places)]
    return {"objects": things, "grey": rng.choice(list(GREYS))}


def make_object(shape, color, place):
    """Return an object at a place (radius, x, y)."""
    radius, x, y = place
    return {"shape": shape, "color": color,
            "radius": round(radius, 1), "x": round(x, 1), "y": round(y, 1)}


def make_world(out, count, seed):
    """Draw OUT/images, in ImageNet's layout, and write OUT/scenes.jsonl, what is in each picture."""
    # It is written last: where it is, all pictures are.
    if (out / "scenes.jsonl").exists():
        return
    scenes = []
    for i in progress(range(count), count, "img", "drawing"):
        # Classes take turns, so all have the same number of pictures, up to one.
        shape = SHAPES[i % len(SHAPES)]
        file = f"{shape}/{shape}_{i:05d}.png"
        scene = random_scene(random.Random(f"{seed} {i}"), shape)
        (out / "images" / shape).mkdir(parents=True, exist_ok=True)
        draw(scene).save(out / "images" / file)
        scenes.append({"file": file, **scene})
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


def cell_of(thing):
    """Return the cell of an object's centre; one that fills the frame is in the middle."""
    if thing["radius"] > LARGE:
        return (1, 1)
    return (int(3 * thing["x"] / SIZE), int(3 * thing["y"] / SIZE))


def seen_in_original(scene):
    """Return the objects of an original as the captioner sees them."""
    return [{**thing, "visible": 1.0, "cell": cell_of(thing)} for thing in scene["objects"]]


def seen_in_composite(base, paste, box, setting):
    """Return the objects of two scenes that can still be seen in their composite, the largest three."""
    x0, y0, x1, y1 = box
    inside = np.zeros((SIZE, SIZE), bool)
    inside[y0:y1, x0:x1] = True

    # What is pasted covers the base, so an object is seen only on its own side of the
    # box. CM 1/2 pastes at full size, where it was; all other settings shrink.
    scale = cutmix.CUTS[setting].scale
    seen = [look_at(thing, ~inside) for thing in base["objects"]]
    for thing in paste["objects"]:
        if scale > 1:
            thing = shrink(thing, x0, y0, scale)
        seen.append(look_at(thing, inside))

    # A captioner would not recognise slivers and specks. Three
    # objects are enough: longer captions would be lists.
    seen = [thing for thing in seen if thing["visible"] > 0.2 and thing["radius"] >= 4]
    seen.sort(key=lambda thing: -thing["visible"] * thing["radius"])
    return seen[:3]


def shrink(thing, x0, y0, side):
    """Return an object as CutMix pastes it: 1 / `side` as large, its picture's corner at (x0, y0)."""
    return {**thing,
            "radius": thing["radius"] / side,
            "x": x0 + thing["x"] / side,
            "y": y0 + thing["y"] / side}


def look_at(thing, region):
    """Return an object with `visible` and `cell`, of which only `region` (64, 64) bool can be seen."""
    mask = np.asarray(mask_of(thing)) > 0
    rows, columns = (mask & region).nonzero()
    visible = len(rows) / mask.sum()

    cell = cell_of(thing)
    if thing["radius"] > LARGE and 0 < visible <= HALF:
        # A half of a large object is where its middle is, seen from the middle of the
        # picture.
        x = columns.mean() - SIZE / 2
        y = rows.mean() - SIZE / 2
        if abs(x) > abs(y):
            cell = (0 if x < 0 else 2, 1)
        else:
            cell = (1, 0 if y < 0 else 2)
    return {**thing, "visible": visible, "cell": cell}


# --------------------------------------------------------------------------------------------
# The captioner, in LLaVA's stead: it knows what is seen and writes it down, at length or
# briefly

NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
# Shares of brief captions: the less there is to tell, the more often a caption is brief.
BRIEF_FOR_ONE = 0.5
BRIEF_FOR_SEVERAL = 0.15


def plural(shape):
    return shape + ("es" if shape == "cross" else "s")


def join(phrases):
    """Return phrases as one: "a , b and c"."""
    if len(phrases) == 1:
        return phrases[0]
    return f"{' , '.join(phrases[:-1])} and {phrases[-1]}"


def cell_relations(one, two):
    """Return the words for where the first object is, seen from the second: none, one or two."""
    words = []

    # Cells are compared, not pixels: a slight difference
    # within a row or a column is no relation.
    column, row = one["cell"]
    other_column, other_row = two["cell"]
    if column < other_column:
        words.append("left of")
    if column > other_column:
        words.append("right of")
    if row < other_row:
        words.append("above")
    if row > other_row:
        words.append("below")
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

    # A relation is said only of two whole objects, neither of which
    # fills the frame: one that does is nowhere in particular.
    whole = all(thing["visible"] > HALF for thing in things)
    none_large = all(thing["radius"] < LARGE for thing in things)
    one_class = len({thing["shape"] for thing in things}) == 1

    text = join([describe_object(thing) for thing in things])
    if len(things) == 2 and whole and none_large and rng.random() < 0.4:
        words = cell_relations(*things)
        if words:
            first, second = [describe_object(thing) for thing in things]
            text = f"{first} , {rng.choice(words)} {second}"

    # A number counts whole objects of one class:
    # "two stars" would be wrong for two halves.
    if len(things) > 1 and one_class and whole:
        text = f"{NUMBERS[len(things)]} {plural(things[0]['shape'])} , {text}"
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

    counts = {}
    for thing in things:
        counts[thing["shape"]] = counts.get(thing["shape"], 0) + 1

    # Between two objects of one shape a relation
    # would say nothing: both have the same name.
    if len(things) == len(counts) == 2 and rng.random() < 0.5:
        words = cell_relations(*things)
        if words:
            first, second = things
            return f"a photo of a {first['shape']} {rng.choice(words)} a {second['shape']}"

    names = []
    for shape, count in counts.items():
        name = plural(shape) if count > 1 else shape
        names.append(f"{NUMBERS[count]} {name}")
    return f"a photo of {join(names)}"


def caption_of(things, scene, rng):
    """Return a caption of what is seen, a long or a brief one."""
    share = BRIEF_FOR_ONE if len(things) == 1 else BRIEF_FOR_SEVERAL
    if rng.random() < share:
        return brief_caption(things, rng)
    return long_caption(things, scene, rng)


def caption_of_composite(base, paste, box, setting, rng):
    """Return a caption of the composite of two scenes; `box` is where the second one was pasted."""
    things = seen_in_composite(base, paste, box, setting)
    # Each half of CM 1/2 has its background: the caption names one of them.
    ground = base if cutmix.CUTS[setting].scale > 1 else rng.choice([base, paste])
    if not things:
        return f"nothing {describe_background(ground, rng)}"
    # Never a brief one: "a photo of a star" is no caption for a part of a star.
    if len(things) == 1:
        return long_caption(things, ground, rng)
    return caption_of(things, ground, rng)


def caption_originals(out, seed):
    """Write OUT/captions.jsonl, a caption for each original."""
    rows = []
    for scene in read_jsonl(out / "scenes.jsonl"):
        # Seeded by the file's name, a caption does not depend on the other pictures.
        rng = random.Random(f"{seed} {scene['file']}")
        text = caption_of(seen_in_original(scene), scene, rng)
        rows.append({"file": scene["file"], "caption": text})
    write_jsonl(out / "captions.jsonl", rows)


def caption_composites(out, kind, seed):
    """Write OUT/captions`kind`.jsonl, a caption for each composite in the folder of that kind.

    The captioner knows from cutmix.jsonl what was pasted where.
    """
    scenes = {scene["file"]: scene for scene in read_jsonl(out / "scenes.jsonl")}
    rows = []
    for row in read_jsonl(out / kind.removeprefix("-") / "cutmix.jsonl"):
        rng = random.Random(f"{seed} {row['file']}")
        base = scenes[row["base"]]
        paste = scenes[row["paste"]]
        text = caption_of_composite(base, paste, row["box"], row["setting"], rng)
        rows.append({"file": row["file"], "caption": text})
    write_jsonl(out / f"captions{kind}.jsonl", rows)
