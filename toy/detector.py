"""The toy's detector: which objects are in a picture, found without a network.

Colours first: every pixel is compared with the five colours, and pixels of one colour
that touch form a patch. Then shapes: a patch is compared with every shape in every size,
drawn clean. An object may be partly hidden behind a whole one, as in a composite: then a
rectangle covers a part of it, and the rest must agree. Most distorted, melted or doubled
shapes agree with nothing and count as no object: the README has a table of how many pass.
"""

from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from toy.world import COLORS, SHAPES, SIZE, draw

# The radii of the templates, in pixels: 4.4 to 28. They are closer together where they
# are small, because half a pixel is a larger part of a small object.
RADII = np.linspace(2.1, 5.3, 40) ** 2
THRESHOLD = 0.72            # the score that makes a patch an object
CLEAR = 0.62                # the score that does if the patch resembles no other shape:
MARGIN = 0.3                # if all others have a score that is lower by this much
FORGIVEN = 3                # pixels that may be wrong away from the edge
MOST_HIDDEN = 0.42          # the share of an object that something may cover
HIDDEN_WEIGHT = 0.1         # what `agreement` takes off for the share that is hidden, and
WRONG_WEIGHT = 0.25         # for the wrong pixels in relation to the length of the edge
AROUND = 7                  # pixels by which the square that CutMix pastes may surround its object
SMALL = 300                 # pixels of a small object
SMALLEST_PATCH = 12         # pixels
NEIGHBOURS = np.ones((3, 3), bool)

# The search for the best place of a template. A patch that is smaller, in relation to the
# template, is more than something may hide, with a margin for sizes in between. One that
# is larger is better explained by a larger template.
LEAST_AREA = 0.9 * (1 - MOST_HIDDEN)
MOST_AREA = 1.3
BEST_PLACES = 4             # the search goes on around so many of the places tried
MOST_GAIN = 0.35            # what a move by a pixel and a half adds to a score at most


# --------------------------------------------------------------------------------------------
# Colours

def without_grey(colors):
    """Return RGB colours (..., 3) less their mean over the channels: every grey becomes 0."""
    colors = np.asarray(colors, float)
    return colors - colors.mean(-1, keepdims=True)


CHROMA = without_grey(list(COLORS.values()))                                        # (5, 3)
DIRECTIONS = CHROMA / np.linalg.norm(CHROMA, axis=1, keepdims=True)


def unmix(image):
    """Return each pixel's nearest colour (64, 64), a number, and its share of the pixel (64, 64).

    At an edge a pixel is a mixture of an object's colour and a grey. Greys have no
    chroma, so the share of the colour is how long the pixel's chroma is compared with
    that of the colour.
    """
    pixels = without_grey(image.convert("RGB"))                                     # (64, 64, 3)
    nearest = (pixels @ DIRECTIONS.T).argmax(2)
    chroma = CHROMA[nearest]                                                        # (64, 64, 3)
    share = (pixels * chroma).sum(2) / (chroma ** 2).sum(2)
    return nearest, share


# --------------------------------------------------------------------------------------------
# Shapes

class Template(NamedTuple):
    """A clean object, cropped to its box. Masks are boolean arrays (height, width)."""

    shape: str
    whole: np.ndarray           # the object
    core: np.ndarray            # the object without the pixels at its edge
    edge: np.ndarray            # the pixels at its edge
    area: int                   # pixels of the object


def make_template(shape, radius, x, y):
    """Return the template of a shape whose centre is drawn at (x, y), in pixels."""
    thing = {"shape": shape, "color": "red", "radius": radius, "x": x, "y": y}
    image = draw({"objects": [thing], "grey": "dark"})
    mask = unmix(image)[1] > 0.5
    core = ndimage.binary_erosion(mask, NEIGHBOURS)
    box = as_slices(bounds(mask))
    whole = mask[box]
    core = core[box]
    return Template(shape, whole, core, whole & ~core, np.count_nonzero(whole))


@lru_cache
def templates():
    """Return {shape: [four templates for each radius]}: its centre on a pixel or half-way to the next."""
    table = {}
    for shape in SHAPES:
        table[shape] = []
        for radius in RADII:
            shifted = [make_template(shape, radius, 32 + dx, 32 + dy)
                       for dx, dy in [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)]]
            table[shape].append(shifted)
    return table


def bounds(mask):
    """Return the box (x0, y0, x1, y1) of a mask's True pixels, right and bottom exclusive, or None."""
    return Image.fromarray(mask).getbbox()


def as_slices(box):
    x0, y0, x1, y1 = box
    return slice(y0, y1), slice(x0, x1)


class Patch:
    """Pixels of one colour that may be an object."""

    def __init__(self, color, mask):
        self.color = color
        self.mask = mask                                        # (64, 64) bool
        self.in_front = []                                      # boxes of what may hide a part of it
        self.near = ndimage.binary_dilation(mask, NEIGHBOURS)   # a pixel wider on all sides
        self.core = ndimage.binary_erosion(mask, NEIGHBOURS)    # without the pixels at its edge
        self.area = np.count_nonzero(mask)
        self.box = bounds(mask)


def agreement(template, patch, x, y):
    """Return how well a patch agrees with a template whose upper left corner is at (x, y), at most 1:

        right / (right + wrong) - HIDDEN_WEIGHT hidden - WRONG_WEIGHT wrong / edge - doubt

    right: pixels that are in both. wrong: pixels that are in one of them only. hidden:
    the share of the template that the patch lacks because another object hides it; that
    is not wrong, but what is seen in there is. edge: the length of the template's edge
    that is not hidden, in pixels. doubt: THRESHOLD - CLEAR if a part is hidden, or if
    more than FORGIVEN pixels are wrong away from the edge; otherwise 0.

    Where nothing is hidden or in doubt, this is the intersection over union, less for
    wrong pixels. It is 0 if most of the patch lies outside of the template, or if more
    than MOST_HIDDEN is hidden.
    """
    height, width = template.whole.shape
    here = as_slices((x, y, x + width, y + height))
    seen = template.whole & patch.mask[here]
    lacking = template.whole & ~patch.mask[here]
    both = np.count_nonzero(seen)
    # Most places end here, at little cost.
    if both < CLEAR * patch.area:
        return 0.0

    # In the hidden box nothing of the object must be seen: what is seen there is wrong.
    # The pixels around the box may be seen or not: something's edge runs through them.
    seen_in_box = 0
    covered = 0
    covered_edge = 0
    box = hidden_box(template, patch, x, y)
    if box:
        x0, y0, x1, y1 = box
        around = as_slices((max(0, x0 - 1), max(0, y0 - 1), x1 + 1, y1 + 1))
        seen_in_box = np.count_nonzero(seen[as_slices(box)])
        covered = np.count_nonzero(lacking[around])
        covered_edge = np.count_nonzero(template.edge[around])

    hidden = covered / template.area
    if hidden > MOST_HIDDEN:
        return 0.0

    right = both - seen_in_box
    outside = patch.area - right
    unexplained = np.count_nonzero(lacking) - covered
    wrong = outside + unexplained
    # One more, so that it is never 0.
    edge = np.count_nonzero(template.edge) - covered_edge + 1
    score = right / (right + wrong) - HIDDEN_WEIGHT * hidden - WRONG_WEIGHT * wrong / edge

    # A wobbly edge may be forgiven (see `recognise`). A bite or a lump may not, and that
    # something hides a part is only a guess: then the rest must agree all the better.
    bite = np.count_nonzero(template.core & ~patch.near[here])
    lump = np.count_nonzero(patch.core) - np.count_nonzero(template.whole & patch.core[here])
    if box or bite + lump > FORGIVEN:
        score -= THRESHOLD - CLEAR
    return score


def hidden_box(template, patch, x, y):
    """Return the box, in the template's own pixels, that another object hides of it, or None.

    It is the smallest one around all pixels that the patch clearly lacks.
    """
    height, width = template.whole.shape
    here = as_slices((x, y, x + width, y + height))
    clearly_lacking = template.core & ~patch.near[here]
    box = bounds(clearly_lacking)
    if box is None:
        return None
    x0, y0, x1, y1 = box

    # A few lacking pixels are not hidden, they are wrong. At a large object a paste may
    # graze them.
    least = 3 if width >= 32 else 10
    if max(x1 - x0, y1 - y0) <= least:
        return None

    # Nothing hides an object but another one, which must be seen there, and whole. In a
    # composite its square hides, too.
    for left, top, right, bottom in patch.in_front:
        if (left - AROUND <= x + x0 and x + x1 <= right + AROUND
                and top - AROUND <= y + y0 and y + y1 <= bottom + AROUND):
            return box
    return None


def guesses(patch):
    """Return (score, shape, place) of each shape's template that a patch agrees with best, the best last.

    place: the template, and the x and y of its upper left corner; None if nothing agrees.
    """
    found = []
    for shape, sizes in templates().items():
        score, place = best_agreement(sizes, patch)
        found.append((score, shape, place))
    return sorted(found, key=lambda guess: guess[:2])


def recognise(patch):
    """Return the best guess (score, shape, place) for a patch, None if it is no object."""
    *_, second, best = guesses(patch)
    # Drawn in a wobbly way, a star is still a star, as long as it might not be a cross.
    is_clear = best[0] > CLEAR and best[0] - second[0] > MARGIN
    return best if best[0] > THRESHOLD or is_clear else None


def best_agreement(sizes, patch):
    """Return (score, place) of a patch with one shape: all sizes, then small moves of the best ones."""
    rough = []
    for number, shifted in enumerate(sizes):
        # Half a pixel matters to small objects only.
        tried = [shifted[0], shifted[3]] if shifted[0].area < SMALL else [shifted[0]]
        for template in tried:
            # Most sizes end here, before any place is tried.
            if not LEAST_AREA < patch.area / template.area < MOST_AREA:
                continue
            for x, y in likely_corners(template, patch.box):
                score = agreement(template, patch, x, y)
                rough.append((score, number, x, y))

    rough.sort(reverse=True)
    best = 0.0
    place = None
    for score, number, x, y in rough[:BEST_PLACES]:
        # However it is moved, this one and those behind it stay below what makes an
        # object.
        if score < CLEAR - MOST_GAIN:
            break
        for template in sizes[number]:
            for dx, dy in MOVES:
                corner = inside_frame(template, x + dx, y + dy)
                score = agreement(template, patch, *corner)
                if score > best:
                    best = score
                    place = (template, *corner)
    return best, place


MOVES = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]


def likely_corners(template, box):
    """Return the upper left corners (x, y) at which a template may explain a patch in this box.

    The object reaches at least as far as its visible patch: it is as large as the box, or
    larger and hidden at the far side; so it begins or ends where the box does.
    """
    x0, y0, x1, y1 = box
    height, width = template.whole.shape
    if width < x1 - x0 - 2 or height < y1 - y0 - 2:
        return set()
    left, right = x0, x1 - width
    top, bottom = y0, y1 - height
    return {inside_frame(template, x, y)
            for x in (left, right, (left + right) // 2)
            for y in (top, bottom)}


def inside_frame(template, x, y):
    """Return the corner nearest to (x, y) at which the whole template lies inside the picture."""
    height, width = template.whole.shape
    return min(max(x, 0), SIZE - width), min(max(y, 0), SIZE - height)


# --------------------------------------------------------------------------------------------
# Objects

class Found(NamedTuple):
    """An object in a picture: the best guess for a patch (see `guesses`), and the patch."""

    score: float
    shape: str
    place: tuple
    patch: Patch


def find_objects(image):
    """Return the objects (Found) of an RGB picture, 64 x 64, most confident first."""
    nearest, share = unmix(image)
    colored = share > 0.5
    # A clean object is faint at its edge only. Such areas are what melted objects are
    # made of.
    faint = ndimage.binary_erosion((share > 0.2) & (share < 0.65), NEIGHBOURS)
    patches = []
    for number, color in enumerate(COLORS):
        for mask in groups(colored & (nearest == number)):
            patch = Patch(color, mask)
            if np.count_nonzero(faint[as_slices(patch.box)]) < 0.1 * patch.area:
                patches.append(patch)

    # First what is whole. Only that can hide a part of something else: a shape of two
    # colours is not two objects, and a blob before a torn shape does not mend it.
    guesses = [recognise(patch) for patch in patches]
    whole = [patch for guess, patch in zip(guesses, patches) if guess]
    found = []
    for guess, patch in zip(guesses, patches):
        patch.in_front = [other.box for other in whole if not (other.mask & patch.mask).any()]
        if patch.in_front:
            guess = recognise(patch)
        if guess:
            found.append(Found(*guess, patch))
    found.sort(key=lambda one: -one.score)

    # The best explanation of a pixel counts, and no other.
    objects = []
    used = np.zeros((SIZE, SIZE), bool)
    for one in found:
        if not (one.patch.mask & used).any():
            used |= one.patch.mask
            objects.append(one)
    return objects


def detect(image):
    """Return the objects of an RGB picture, 64 x 64, as GenEval's detector does.

    {shape: [{"box": [x0, y0, x1, y1], "score", "color"}, ...]}, most confident first. The
    box, in pixels, right and bottom exclusive, is that of the visible part.
    """
    return as_detections(find_objects(image))


def as_detections(found):
    """Return objects (Found) as `detect` does."""
    objects = {}
    for one in found:
        thing = {"box": list(one.patch.box), "score": float(one.score), "color": one.patch.color}
        objects.setdefault(one.shape, []).append(thing)
    return objects


def groups(mask, largest=3, most=8):
    """Return masks of what may be one object each: connected patches, alone or together.

    Two or three patches may be one object with something across it. This is tried with
    the `largest` ones; of single patches up to `most` are looked at.
    """
    labels, _ = ndimage.label(mask, NEIGHBOURS)
    areas = np.bincount(labels.ravel())
    areas[0] = 0                                                # label 0: not of this colour
    order = np.argsort(-areas)
    patches = [label for label in order[:most] if areas[label] >= SMALLEST_PATCH]
    together = [[label] for label in patches]
    for many in (2, 3):
        together += combinations(patches[:largest], many)
    return [np.isin(labels, group) for group in together]


# --------------------------------------------------------------------------------------------
# Seams

LARGE_AREA = 400            # pixels of a large object, at least, also where a part of it is hidden
OTHER_GREY = 25             # levels by which a pixel differs from the background around it
SEAM = 10                   # pixels of a seam that touch, from which on it is seen


def largest_area(mask):
    """Return the number of pixels of the largest connected part of a mask."""
    labels, _ = ndimage.label(mask, NEIGHBOURS)
    # Label 0 is what is not in the mask.
    return np.bincount(labels.ravel())[1:].max(initial=0)


def has_one_background(image):
    """Tell whether the background has one grey: no seam between two greys is seen.

    The background is every pixel that touches nothing coloured; False if there is none.
    """
    _, share = unmix(image)
    background = ~ndimage.binary_dilation(share > 0.2, NEIGHBOURS)
    if not background.any():
        return False
    levels = np.asarray(image.convert("L"), float)
    usual = np.median(levels[background])

    # A small paste shows little of its own background, just the corners that its object
    # leaves. So any patch of another grey counts, and not its share of the picture.
    other = background & (np.abs(levels - usual) > OTHER_GREY)
    return bool(largest_area(other) < SEAM)


def is_bitten(image, objects):
    """Tell whether background lies between a large object and a smaller one in front of it.

    In originals the large one is seen up to the edge of the small one. In composites the
    square that was pasted bites into it, which is a seam even where both backgrounds have
    the same grey.

    objects: what `find_objects` finds. Returns None where none of them lies before a large
    one, which need not be among them: many are too badly bitten to be recognised.
    """
    nearest, share = unmix(image)
    colored = share > 0.5
    answer = None
    for small, number in product(objects, range(len(COLORS))):
        large = Patch("", colored & (nearest == number) & ~small.patch.mask)
        if large.area < max(LARGE_AREA, small.patch.area):
            continue
        large.in_front = [small.patch.box]
        _, _, place = guesses(large)[-1]
        if place is None:
            continue

        # Where the large one should be, without its edge.
        template, x, y = place
        height, width = template.core.shape
        should_be = np.zeros((SIZE, SIZE), bool)
        should_be[as_slices((x, y, x + width, y + height))] = template.core
        if should_be[as_slices(small.patch.box)].any():
            near = ndimage.binary_dilation(small.patch.mask, NEIGHBOURS, AROUND)
            # At a shared edge two colours make a grey that is a pixel or two wide: that
            # is no gap.
            gap = ndimage.binary_opening(should_be & near & ~colored, NEIGHBOURS)
            answer = bool(answer or largest_area(gap) >= SEAM)
    return answer
