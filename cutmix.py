"""Stage 1, pixel augmentation (paper 3.2): make CutMix composites of two photos each.

    python cutmix.py --images imagenet/train --out cutmix-all --setting all

A composite holds two things in one picture, which photos of a single object never do.
Its seams are wrong, so training uses it only where noise hides them (train.py, t >
tau). There are four ways to cut, named after the share of the picture that the second
photo gets: 1/2, 1/4, 1/9 and 1/16; `all` makes a quarter of the data set each way.
`--preview` only draws examples.

OUT gets 00000/000000000.jpg, ... (composite i has photo i as its base), cutmix.jsonl
(what is where) and skipped.jsonl (photos that could not be read). A killed command goes
on when it is started again; under torchrun, or with RANK and WORLD_SIZE set, ranks share
the folders of a thousand composites.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common import (SEED, THREADS, Options, UserError, ahead, command_line, contact_sheet,
                    default_workers, fingerprint, in_batches, join_rows, keep_apart, list_images,
                    make_rows, naming, number, open_image, resize_and_crop, rgb, save_png)

# --------------------------------------------------------------------------------------
# The composite (paper 3.2, "Image augmentation")
#
# The four functions below say where the second photo goes in a composite of `size`
# pixels. `side` is the side of the second photo, once it is scaled down, in pixels; for
# 1/2 it is not, and `side` is `size`. They return a box (x0, y0, x1, y1), right and
# bottom exclusive. `rng` is a numpy Generator or a random.Random: rng.random() is in
# [0, 1).

def one_half(size, side, rng):
    """Return the right or the bottom half."""
    middle = size // 2
    return one_of([(middle, 0, size, size), (0, middle, size, size)], rng)


def corner(size, side, rng):
    """Return one of the four corners."""
    end = size - side
    x, y = one_of([(0, 0), (end, 0), (0, end), (end, end)], rng)
    return x, y, x + side, y + side


def middle_of_border(size, side, rng):
    """Return the middle of a border: the base keeps its centre and its corners."""
    end = size - side
    middle = (size - side) // 2
    x, y = one_of([(middle, 0), (middle, end), (0, middle), (end, middle)], rng)
    return x, y, x + side, y + side


def off_centre(size, side, rng):
    """Return a place between 5% and 95% of the picture that does not touch its centre.

    The centre is what lies between 40% and 60%, across and down.
    """
    first = -(-size // 20)                  # 5%, rounded up
    last = size * 19 // 20 - side           # the box ends at 95%, rounded down

    # start <= 60% and start + side >= 40%, in whole numbers.
    def meets_centre(start):
        return 5 * start <= 3 * size and 5 * (start + side) >= 2 * size

    # A little more than half of the draws are good.
    while True:
        x = first + int(rng.random() * (last - first + 1))
        y = first + int(rng.random() * (last - first + 1))
        if not (meets_centre(x) and meets_centre(y)):
            return x, y, x + side, y + side


def one_of(choices, rng):
    """Return one of the choices, each as likely as the others."""
    return choices[int(rng.random() * len(choices))]


class Cut(NamedTuple):
    """One way to cut: how small the second photo becomes, and where it goes."""
    scale: int              # its side is that of the composite divided by `scale`
    place: Callable         # one of the functions above


# A new setting is one more line here. `--setting` then offers it, `all` draws from it
# and the sheets show it.
CUTS = {
    "1/2": Cut(scale=1, place=one_half),
    "1/4": Cut(scale=2, place=corner),
    "1/9": Cut(scale=3, place=middle_of_border),
    "1/16": Cut(scale=4, place=off_centre),
}

# It takes half of Lanczos's time. The two differ by 36 to 45 dB (PSNR), which cannot be seen under
# noise, and composites are shown to the model under noise only.
RESAMPLE = Image.Resampling.HAMMING


def paste_box(setting, size, rng):
    """Return where the second photo goes: (x0, y0, x1, y1) in pixels of the composite.

    Right and bottom are exclusive. `rng` has a method random() -> [0, 1). Raises
    UserError.
    """
    if setting not in CUTS or size < 16:
        known = ", ".join(CUTS)
        raise UserError(f"setting {setting!r}, size {size}: "
                        f"{known} exist, and at least 16")
    cut = CUTS[setting]
    return cut.place(size, size // cut.scale, rng)


def mix(base, paste, setting, size, rng):
    """Return the composite of two PIL images, and the second one's box (see paste_box).

    The images may have any size; the composite is RGB, `size` x `size`. Nothing is
    squashed: of each image its central square is used.
    """
    base = rgb(base)
    paste = rgb(paste)
    picture = Image.new("RGB", (size, size))
    box = paste_box(setting, size, rng)

    # The base around the box: only what will be seen of it is resampled.
    x0, y0, x1, y1 = box
    above = (0, 0, size, y0)
    left_of = (0, y0, x0, y1)
    right_of = (x1, y0, size, y1)
    below = (0, y1, size, size)
    for part in (above, left_of, right_of, below):
        left, top, right, bottom = part
        is_empty = left == right or top == bottom
        if not is_empty:
            picture.paste(resize_and_crop(base, size, part, RESAMPLE), part)

    # The second photo: all of it, scaled down; or (1/2) its half that lies in the box.
    side = size // CUTS[setting].scale
    is_scaled_down = side < size
    part = None if is_scaled_down else box
    picture.paste(resize_and_crop(paste, side, part, RESAMPLE), box)
    return picture, box


# --------------------------------------------------------------------------------------
# The data set

# Composites in a folder: one with a million files is slow to list.
A_FOLDER = 1000


class Composites(NamedTuple):
    """A data set of composites.

    Number i is a function of the photos, `seed` and i, whoever makes it and whenever.
    """
    images: str             # the folder of photos
    files: list             # their names below it
    out: Path
    setting: str
    size: int
    seed: int

    def setting_of(self, index):
        """Return the setting of a composite.

        With `all`, every group of neighbours, as many as there are settings, has each
        setting once, in an order drawn at random: so all get the same share.
        """
        if self.setting != "all":
            return self.setting
        group, position = divmod(index, len(CUTS))
        order = np.random.default_rng((self.seed, group, 1)).permutation(len(CUTS))
        return list(CUTS)[order[position]]

    def partner(self, base, rng):
        """Return the file of a photo of another class, each as likely as the others."""
        while True:
            file = one_of(self.files, rng)
            if may_be_mixed(base, file):
                return file

    def compose(self, index, setting):
        """Return composite number `index` as a PIL image, and its row of cutmix.jsonl.

        If its base cannot be read, returns None and a row of skipped.jsonl. A partner
        that cannot be read is replaced by the next draw; it is reported when it is a
        base itself.
        """
        rng = np.random.default_rng((self.seed, index))
        base = self.files[index]
        # Decoded larger than needed, as JPEG decoders average crudely when they shrink.
        detail = int(1.4 * self.size)
        paste_detail = detail // CUTS[setting].scale
        try:
            base_image = open_image(f"{self.images}/{base}", detail)
        except OSError as error:
            return None, {"file": base, "reason": error.strerror}

        for _ in range(100):
            paste = self.partner(base, rng)
            try:
                paste_image = open_image(f"{self.images}/{paste}", paste_detail)
            except OSError:
                continue
            picture, box = mix(base_image, paste_image, setting, self.size, rng)
            return picture, {
                "file": f"{index // A_FOLDER:05d}/{index:09d}.jpg",
                "setting": setting, "box": box, "base": base, "paste": paste,
                "base_class": class_of(base), "paste_class": class_of(paste)}
        reason = "no photo of another class could be read (100 tried)"
        return None, {"file": base, "reason": reason}

    def save(self, index):
        """Save composite number `index` and return its row."""
        picture, row = self.compose(index, self.setting_of(index))
        if picture:
            path = self.out / row["file"]
            path.parent.mkdir(exist_ok=True)
            with naming(path):
                # 4:4:4: pixels that share a colour would carry it over the seam.
                picture.save(path, "JPEG", quality=95, subsampling=0)
                # Pillow takes no notice of a disk that fills up in the middle of a file.
                if not path.read_bytes().endswith(b"\xff\xd9"):
                    raise OSError("cut short: is the disk full?")
        return row


def class_of(file):
    """Return the class of an image, its first folder: "n02099601/7.JPEG" -> "n02099601".

    An image that is in no folder has the class "".
    """
    folder, slash, _ = file.partition("/")
    return folder if slash else ""


def may_be_mixed(a, b):
    """Tell whether two photos are of different classes.

    A photo in no class folder is a class of its own.
    """
    return (class_of(a) or a) != (class_of(b) or b)


def make_all(composites, workers):
    """Make this rank's folders of composites; the rank that ends last lists them all.

    A folder's rows, in OUT/parts, are the sign that it is whole. Raises UserError.
    """
    def rows_of(folders):
        """Yield the rows of folders, ranges of numbers, when their JPEGs are there."""
        return ahead(composites.save, itertools.chain(*folders), workers)

    out = composites.out
    folders = in_batches(range(len(composites.files)), A_FOLDER)
    units = {f"{k:05d}.jsonl": numbers for k, numbers in enumerate(folders)}
    # The table is among the settings: with another cut in it, `all` means something else.
    cuts = {name: [cut.scale, cut.place.__name__] for name, cut in CUTS.items()}
    settings = {"setting": composites.setting, "cuts": cuts, "size": composites.size,
                "seed": composites.seed, "photos": fingerprint(composites.files)}
    lists = (out / "cutmix.jsonl", out / "skipped.jsonl")
    if make_rows(out / "parts", settings, units, rows_of, lists):
        join_rows(out / "parts", units, *lists)


# --------------------------------------------------------------------------------------
# Examples to look at

def draw_examples(composites, count=6):
    """Return a sheet with `count` composites of each setting, of photos drawn at random.

    Raises UserError if too many photos are broken.
    """
    shuffled = np.random.default_rng(composites.seed).permutation(len(composites.files))
    # Some may be broken, and there may be fewer than are shown.
    tried = np.resize(shuffled, 4 * count)
    pictures = []
    titles = []
    for setting in CUTS:
        made = (composites.compose(index, setting)[0] for index in tried)
        found = list(itertools.islice(filter(None, made), count))
        if len(found) < count:
            raise UserError(f"{composites.images}: too many broken photos")
        pictures += found
        titles += [setting] * count
    return contact_sheet(pictures, titles, columns=count, lines=1)


# --------------------------------------------------------------------------------------

def main(argv=None):
    parser = Options(__doc__)
    add = parser.add
    add("--images", "folder of photos: <class>/<file>, or all in one flat folder", required=True)
    add("--out", "folder where the composites go", kind=Path, required=True)
    add("--setting", "the share of the second photo", "all", choices=[*CUTS, "all"])
    add("--size", "side of a composite, in pixels", 256, number(int, 16, 8192))
    add("--seed", "of partners and places", 0, SEED)
    add("--workers", "threads; 0: one composite after the other", default_workers(), THREADS)
    parser.flag("--preview", "only draw OUT/preview.png, examples of each setting")
    args = parser.parse_args(argv)

    # A composite inside would be taken for a photo at the next start.
    keep_apart(args.out, args.images)
    files = list_images(args.images)
    if not any(may_be_mixed(files[0], file) for file in files):
        raise UserError(f"{args.images}: one class only, and partners come from another "
                        "(give two or more class folders, or one flat folder of two or "
                        "more images)")
    composites = Composites(args.images, files, args.out, args.setting, args.size, args.seed)

    if args.preview:
        save_png(draw_examples(composites), args.out / "preview.png")
        print(args.out / "preview.png")
    else:
        make_all(composites, args.workers)


if __name__ == "__main__":
    command_line(main)
