"""The toy's detector: which objects are in a picture, found without a network.

Colours first: every pixel is compared with the five colours, and pixels of one colour
that touch form a patch. Then shapes: a patch is compared with every shape in every size,
drawn clean. An object may be partly hidden behind a whole one, as in a composite: then a
rectangle covers a part of it, and the rest must agree. Most distorted, melted or doubled
shapes agree with nothing and count as no object: the README has a table of how many pass.
"""

from functools import cache
from itertools import combinations, product

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

    image: RGB, 64 x 64.

    At an edge a pixel is a mixture of an object's colour and a grey. Greys have no
    chroma, so the share of the colour is how long the pixel's chroma is compared with
    that of the colour.
    """
    pixels = without_grey(image)                                                    # (64, 64, 3)
    nearest = (pixels @ DIRECTIONS.T).argmax(2)
    chroma = CHROMA[nearest]                                                        # (64, 64, 3)
    share = (pixels * chroma).sum(2) / (chroma ** 2).sum(2)
    return nearest, share


# --------------------------------------------------------------------------------------------
# Shapes

class Patch:
    """Pixels of one colour that may be an object.

    A template is a patch, too: that of a clean object, cropped to its box. To all others
    `recognise` adds `score`, `shape` (None: no object) and `expected`, where the pixels of
    what it agrees with best are, without those at its edge.
    """

    def __init__(self, mask, color=None):
        self.color = color
        self.mask = mask                                        # (64, 64) bool
        self.near = ndimage.binary_dilation(mask, NEIGHBOURS)   # a pixel wider on all sides
        self.core = ndimage.binary_erosion(mask, NEIGHBOURS)    # without the pixels at its edge
        self.area = np.count_nonzero(mask)
        self.box = box_around(mask)
        self.in_front = []                                      # boxes of what may hide a part of it


def box_around(mask):
    """Return the box (x0, y0, x1, y1) of a mask's True pixels, right and bottom exclusive."""
    return Image.fromarray(mask).getbbox()


def inside(box, margin=0):
    """Return the slices of a mask that lie in a box, or up to `margin` pixels around it."""
    x0, y0, x1, y1 = box
    return np.s_[max(0, y0 - margin):y1 + margin, max(0, x0 - margin):x1 + margin]


@cache
def templates(shape, radius):
    """Return four templates of a size: the centre on a pixel or half-way to the next."""
    shifted = []
    for y, x in product((32, 32.5), (32, 32.5)):
        thing = {"shape": shape, "color": "red", "radius": radius, "x": x, "y": y}
        _, share = unmix(draw({"objects": [thing], "grey": "dark"}))
        mask = share > 0.5
        shifted.append(Patch(mask[inside(box_around(mask))]))
    return shifted


def placed(mask, x, y):
    """Return a template's mask in the picture (64, 64), its upper left corner at (x, y)."""
    height, width = mask.shape
    picture = np.zeros((SIZE, SIZE), bool)
    picture[y:y + height, x:x + width] = mask
    return picture


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
    whole = placed(template.mask, x, y)
    seen = whole & patch.mask
    right = np.count_nonzero(seen)
    # Places far off end here, at little cost.
    if right < CLEAR * patch.area:
        return 0.0

    core = placed(template.core, x, y)
    bite = core & ~patch.near                           # what it clearly lacks
    edge = whole & ~core
    lacking = whole & ~patch.mask
    hidden = template.area - right

    # In the hidden box nothing of the object must be seen: what is seen there is wrong.
    # The pixels around the box may be seen or not: something's edge runs through them.
    box = hidden_box(bite, patch, template)
    if box:
        edge[inside(box, 1)] = False
        lacking[inside(box, 1)] = False
        right -= np.count_nonzero(seen[inside(box)])
    in_view = np.count_nonzero(lacking)
    hidden = (hidden - in_view) / template.area
    if hidden > MOST_HIDDEN:
        return 0.0

    wrong = patch.area - right + in_view
    # One more, so that the edge's length is never 0.
    score = (right / (right + wrong) - HIDDEN_WEIGHT * hidden
             - WRONG_WEIGHT * wrong / (np.count_nonzero(edge) + 1))

    # A wobbly edge may be forgiven (see `recognise`). A bite or a lump may not, and that
    # something hides a part is only a guess: then the rest must agree all the better.
    lump = patch.core & ~whole
    if box or np.count_nonzero(bite | lump) > FORGIVEN:
        score -= THRESHOLD - CLEAR
    return score


def hidden_box(bite, patch, template):
    """Return the box that another object hides of a patch, or None.

    It is the smallest one around `bite`, all pixels that the patch clearly lacks.
    """
    # Nothing hides an object but another one, which must be seen there, and whole. In a
    # composite its square hides, too.
    lacks = np.count_nonzero(bite)
    behind = [other for other in patch.in_front
              if np.count_nonzero(bite[inside(other, AROUND)]) == lacks]
    if not lacks or not behind:
        return None

    # A few lacking pixels are not hidden, they are wrong. At a large object a paste may
    # graze them.
    x0, y0, x1, y1 = box = box_around(bite)
    _, width = template.mask.shape
    least = 3 if width >= 32 else 10
    return box if max(x1 - x0, y1 - y0) > least else None


def recognise(patch):
    """Find out what a patch agrees with best, and whether it is an object (see Patch)."""
    guesses = [best_agreement(shape, patch) for shape in SHAPES]
    *_, second, best = sorted(guesses, key=lambda guess: guess[0])
    patch.score, shape, patch.expected = best

    # Drawn in a wobbly way, a star is still a star, as long as it might not be a cross.
    is_clear = patch.score > CLEAR and patch.score - second[0] > MARGIN
    patch.shape = shape if patch.score > THRESHOLD or is_clear else None


def best_agreement(shape, patch):
    """Return a patch's (score, shape, expected pixels) for a shape: all sizes, then moves of the best."""
    rough = []
    for radius in RADII:
        shifted = templates(shape, radius)
        # Half a pixel matters to small objects only.
        tried = shifted[::3] if shifted[0].area < SMALL else shifted[:1]
        for template in tried:
            # Most sizes end here, before any place is tried.
            if not LEAST_AREA < patch.area / template.area < MOST_AREA:
                continue
            for x, y in likely_corners(template, patch.box):
                score = agreement(template, patch, x, y)
                rough.append((score, radius, x, y))

    rough.sort(reverse=True)
    best = 0.0, shape, np.zeros((SIZE, SIZE), bool)
    for score, radius, x, y in rough[:BEST_PLACES]:
        # However it is moved, this one and those behind it stay below what makes an
        # object.
        if score < CLEAR - MOST_GAIN:
            break
        for template, dx, dy in product(templates(shape, radius), (-1, 0, 1), (-1, 0, 1)):
            corner = inside_frame(template, x + dx, y + dy)
            score = agreement(template, patch, *corner)
            if score > best[0]:
                best = score, shape, placed(template.core, *corner)
    return best


def likely_corners(template, box):
    """Return the upper left corners (x, y) at which a template may explain a patch in this box.

    The object reaches at least as far as its visible patch: it is as large as the box, or
    larger and hidden at the far side; so it begins or ends where the box does.
    """
    x0, y0, x1, y1 = box
    height, width = template.mask.shape
    if width < x1 - x0 - 2 or height < y1 - y0 - 2:
        return set()
    left = x0
    right = x1 - width
    corners = product((left, right, (left + right) // 2), (y0, y1 - height))
    return {inside_frame(template, x, y) for x, y in corners}


def inside_frame(template, x, y):
    """Return the corner nearest to (x, y) at which the whole template lies inside the picture."""
    height, width = template.mask.shape
    return min(max(x, 0), SIZE - width), min(max(y, 0), SIZE - height)


# --------------------------------------------------------------------------------------------
# Objects

def find_objects(image):
    """Return the objects of an RGB picture, 64 x 64, patches with a shape, most confident first."""
    nearest, share = unmix(image)
    colored = share > 0.5
    # A clean object is faint at its edge only. Such areas are what melted objects are
    # made of.
    faint = ndimage.binary_erosion((share > 0.2) & (share < 0.65), NEIGHBOURS)
    patches = []
    for number, color in enumerate(COLORS):
        for mask in groups(colored & (nearest == number)):
            patch = Patch(mask, color)
            if np.count_nonzero(faint[inside(patch.box)]) < 0.1 * patch.area:
                recognise(patch)
                patches.append(patch)

    # First what is whole. Only that can hide a part of something else: a shape of two
    # colours is not two objects, and a blob before a torn shape does not mend it.
    whole = [patch for patch in patches if patch.shape]
    for patch in patches:
        patch.in_front = [other.box for other in whole if not (other.mask & patch.mask).any()]
        if patch.in_front:
            recognise(patch)

    # The best explanation of a pixel counts, and no other.
    objects = []
    for patch in sorted(patches, key=lambda patch: -patch.score):
        is_new = not any((patch.mask & better.mask).any() for better in objects)
        if patch.shape and is_new:
            objects.append(patch)
    return objects


def as_detections(objects):
    """Return what `find_objects` finds as GenEval's detector does.

    {shape: [{"box": [x0, y0, x1, y1], "score", "color"}, ...]}, most confident first. The
    box, in pixels, right and bottom exclusive, is that of the visible part.
    """
    things = {}
    for one in objects:
        thing = {"box": list(one.box), "score": one.score, "color": one.color}
        things.setdefault(one.shape, []).append(thing)
    return things


def connected(mask, least):
    """Return a mask's connected parts of `least` pixels or more as masks, the largest first."""
    labels, _ = ndimage.label(mask, NEIGHBOURS)
    areas = np.bincount(labels.ravel())
    # The number 0 is what is not in the mask.
    areas[0] = 0
    return [labels == label for label in np.argsort(-areas) if areas[label] >= least]


def groups(mask):
    """Return masks of what may be one object each: connected parts of a mask, alone or together."""
    parts = connected(mask, SMALLEST_PATCH)[:8]
    # Two or three may be one object with something across it. This is tried with the
    # largest three.
    together = [*combinations(parts, 1), *combinations(parts[:3], 2), *combinations(parts[:3], 3)]
    return [np.any(group, 0) for group in together]


# --------------------------------------------------------------------------------------------
# Seams

LARGE_AREA = 400            # pixels of a large object, at least, also where a part of it is hidden
OTHER_GREY = 25             # levels by which a pixel differs from the background around it
SEAM = 10                   # pixels of a seam that touch, from which on it is seen


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
    return not connected(other, SEAM)


def is_bitten(image, objects):
    """Tell whether background lies between a large object and a smaller one in front of it.

    In originals the large one is seen up to the edge of the small one. In composites the
    square that was pasted bites into it, which is a seam even where both backgrounds have
    the same grey.

    objects: those that `find_objects` finds. Returns None where none of them lies before a
    large one, which need not be among them: many are too badly bitten to be recognised.
    """
    nearest, share = unmix(image)
    colored = share > 0.5
    answer = None
    for small, number in product(objects, range(len(COLORS))):
        mask = colored & (nearest == number) & ~small.mask
        if np.count_nonzero(mask) < max(LARGE_AREA, small.area):
            continue
        large = Patch(mask)
        large.in_front = [small.box]
        recognise(large)
        if large.expected[inside(small.box)].any():
            near = ndimage.binary_dilation(small.mask, NEIGHBOURS, AROUND)
            # At a shared edge two colours make a grey that is a pixel or two wide: that
            # is no gap.
            gap = ndimage.binary_opening(large.expected & near & ~colored, NEIGHBOURS)
            answer = answer or bool(connected(gap, SEAM))
    return answer
