"""The toy's detector: patches of colour against all shapes in all sizes, also half hidden ones."""

from functools import lru_cache
from itertools import combinations, product

import numpy as np
from PIL import Image
from scipy import ndimage

from toy.world import COLORS, SHAPES, SIZE, draw

CHROMA = np.array(list(COLORS.values()), float) @ (np.eye(3) - 1 / 3)             # colours without their grey
RADII = np.linspace(2.1, 5.3, 40) ** 2
THRESHOLD = 0.7
BOX3 = np.ones((3, 3))
U = np.uint64             # a mask's row is one 64-bit word, bit i is column i: 64 pixels are compared at once


def pack(mask):
    return np.packbits(mask, -1, bitorder="little").view(U)[..., 0]               # (..., 64, 64) -> (..., 64)


def count(words):
    return np.bitwise_count(words).sum(-1, dtype=int)


def bounds(mask):
    return Image.fromarray(mask).getbbox()                                        # x0, y0, x1, y1


def grow(words):
    """Masks, a pixel wider in all eight directions."""
    w = np.pad(words | words << U(1) | words >> U(1), [(0, 0), (1, 1)])
    return w[:, :-2] | w[:, 1:-1] | w[:, 2:]


def unmix(image):
    """Each pixel's nearest palette colour and its share of the pixel (linear: greys have no chroma)."""
    x = np.asarray(image.convert("RGB"), float) @ (np.eye(3) - 1 / 3)
    color = (x @ (CHROMA / np.linalg.norm(CHROMA, axis=1, keepdims=True)).T).argmax(2)
    return color, (x * CHROMA[color]).sum(2) / (CHROMA ** 2).sum(1)[color]


@lru_cache
def templates():
    """All shapes and sizes at the upper left, 4 half-pixel shifts of each -> masks, eroded masks, shapes,
    widths, heights, areas."""
    scenes = [dict(shape=shape, radius=radius, y=y, x=x, color="red", grey="dark", background="plain")
              for shape, radius, y, x in product(SHAPES, RADII, (32, 32.5), (32, 32.5))]
    masks = [unmix(draw(scene))[1] > 0.5 for scene in scenes]
    x0, y0, x1, y1 = np.array([bounds(mask) for mask in masks]).T
    masks = np.array([np.roll(mask, (-y, -x), (0, 1)) for mask, x, y in zip(masks, x0, y0)])
    eroded = ndimage.binary_erosion(masks, BOX3[None])
    shapes = np.array([SHAPES.index(scene["shape"]) for scene in scenes])
    return pack(masks), pack(eroded), shapes, x1 - x0, y1 - y0, masks.sum((1, 2))


def compare(mask, t, x, y):
    """Scores of the templates number t (n,) with corners at x, y (n,) for a mask: their IoU outside of a
    rectangle that may hide a part of the object, less for hiding much and for wrong edges."""
    words, eroded, _, width, height, _ = templates()
    x, y = x.clip(0, SIZE - width[t])[:, None].astype(U), y.clip(0, SIZE - height[t])
    at, t = np.arange(SIZE) - y[:, None], t[:, None]            # above the object: a row from the empty end
    whole, core = words[t, at] << x, eroded[t, at] << x                 # (n, 64)
    missing = core & ~grow(mask[None])      # what the mask lacks, as one rectangle: from its first row ...
    rows = np.logical_or.accumulate(missing, 1) & np.logical_or.accumulate(missing[:, ::-1], 1)[:, ::-1]
    columns = np.maximum(np.bitwise_or.reduce(missing, 1), U(1))[:, None]
    columns = (U(2) << np.log2(columns).astype(U)) - (columns & -columns)         # ... and column to its last
    longest = np.maximum(rows.sum(1, keepdims=True), np.bitwise_count(columns))
    hidden = np.where(rows & (longest > np.where(width[t] < 32, 10, 3)), columns, U(0))
    around = grow(hidden)
    right = count(whole & mask & ~hidden)
    wrong = count(mask & (~whole | hidden)) + count(whole & ~mask & ~around)
    share, edge = count(whole & around & ~mask) / count(whole), count(whole & ~core & ~around) + 1
    return right / (right + wrong) - 0.1 * share - 0.25 * wrong / edge - (share > 0.78)


def fit(mask):
    """A patch of colour -> (score, shape): templates at its corners, then near the best ones."""
    _, _, shapes, width, height, area = templates()
    (x0, y0, x1, y1), words = bounds(mask), pack(mask)
    part, shift = mask.sum() / area, np.arange(len(area)) % 4
    t = (width > x1 - x0 - 3) & (height > y1 - y0 - 3) & (part > 0.2) & (part < 1.3)
    t = np.nonzero(t & (shift % np.where(area < 300, 3, 4) == 0))[0]
    if not len(t):
        return 0.0, ""
    t, i = np.repeat(t, 6), np.tile(np.arange(6), len(t))
    x = np.choose(i % 3, (x0, x1 - width[t], (x0 + x1 - width[t]) // 2))
    y = np.where(i < 3, y0, y1 - height[t])
    scores = compare(words, t, x, y).reshape(-1, 6)
    best = (6 * np.arange(len(scores)) + scores.argmax(1))[np.argsort(-scores.max(1))]
    best = np.concatenate([best[shapes[t[best]] == shape][:3] for shape in range(len(SHAPES))])
    (t, x, y), i = (np.repeat(v[best], 36) for v in (t // 4 * 4, x, y)), np.tile(np.arange(36), len(best))
    scores = compare(words, t + i // 9, x + i % 3 - 1, y + i // 3 % 3 - 1)
    return float(scores.max()), SHAPES[shapes[t[scores.argmax()]]]


def detect(image):
    """RGB image, 64 x 64 -> {shape: [{"box": [x0, y0, x1, y1] of what is visible, "score", "color"}, ...]},
    most confident first, as GenEval's. Two patches of a colour may be one object with something across it."""
    (color, share), found, objects, used = unmix(image), [], {}, np.zeros((SIZE, SIZE), bool)
    for number, name in enumerate(COLORS):
        labels = ndimage.label((color == number) & (share > 0.5), BOX3)[0]
        area = np.bincount(labels.ravel())
        patches = [i for i in np.argsort(-area) if i and area[i] >= 12][:3]
        masks = [np.isin(labels, some) for n in (1, 2, 3) for some in combinations(patches, n)]
        found += [(*fit(mask), name, mask) for mask in masks]
    pale = ndimage.binary_erosion((share > 0.2) & (share < 0.65), BOX3)    # a clean object has no faint areas
    for score, shape, name, mask in sorted(found, key=lambda one: -one[0]):
        x0, y0, x1, y1 = bounds(mask)
        if score > THRESHOLD and not (mask & used).any() and pale[y0:y1, x0:x1].sum() < 0.1 * mask.sum():
            used |= mask
            objects.setdefault(shape, []).append({"box": [x0, y0, x1, y1], "score": score, "color": name})
    return objects
