"""Stage 1, pixel augmentation (paper 3.2): make CutMix composites of two photos each.

    python cutmix.py --images imagenet/train --out cutmix-all --setting all

A composite holds two things in one picture, which photos of a single object never do.
Its seams are wrong, so training uses it only where noise hides them (train.py, t >
tau). There are four ways to cut, named after the share of the picture that the second
photo gets: 1/2, 1/4, 1/9 and 1/16; `all` makes a quarter of the data set each way.

Writes OUT/00000/000000000.jpg, ... (1,000 a folder; composite i has photo i as its
base), OUT/cutmix.jsonl (what is where) and OUT/skipped.jsonl (photos that could not be
read). `--preview` only draws a sheet of examples, `--noise` the same under more and
more noise, to choose tau by eye. On several nodes, start it under torchrun, or with
RANK and WORLD_SIZE set. If it was killed, start it again: it goes on where it was.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common import (HelpFormatter, UserError, at_least, begin_or_resume, between,
                    class_of, command_line, complete, default_workers, grid_left,
                    is_last_rank, labelled_grid, list_images, only_command, open_image,
                    rank_and_world, resize_and_crop, rgb)

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
SETTINGS = tuple(CUTS)

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


@dataclass(frozen=True)
class Composites:
    """A data set of composites.

    Number i is a function of the photos, `seed` and i, whoever makes it and whenever.
    """
    images: str             # the folder of photos
    files: np.ndarray       # (n,) bytes: forked processes share an array, not strings
    out: Path
    setting: str
    size: int
    times: int              # how many composites each photo is the base of
    seed: int

    def __len__(self):
        return len(self.files) * self.times

    def indices(self, folder):
        """Return the numbers of the composites in sub-folder number `folder`."""
        return range(folder * A_FOLDER, min((folder + 1) * A_FOLDER, len(self)))

    def part_file(self, folder):
        """Return the path of a sub-folder's part of the manifest."""
        return self.out / "parts" / f"{folder:05d}.jsonl"

    def setting_of(self, index):
        """Return the setting of a composite.

        With `all`, every group of neighbours, as many as there are settings, has each
        setting once, in an order drawn at random: so all get the same share.
        """
        if self.setting != "all":
            return self.setting
        group, position = divmod(index, len(SETTINGS))
        return shuffled_settings(self.seed, group)[position]

    def partner(self, base, rng):
        """Return the file of a photo of another class, each as likely as the others."""
        while True:
            file = os.fsdecode(self.files[int(rng.random() * len(self.files))])
            if may_be_mixed(base, file):
                return file

    def compose(self, index, setting):
        """Return composite number `index` as a PIL image, and its row of cutmix.jsonl.

        If its base cannot be read, returns None and a row of skipped.jsonl. A partner
        that cannot be read is replaced by the next draw; it is reported when it is a
        base itself.
        """
        rng = np.random.default_rng((self.seed, index))
        base = os.fsdecode(self.files[index % len(self.files)])
        # Decoded larger than needed, as JPEG decoders average crudely when they shrink.
        detail = int(1.4 * self.size)
        paste_detail = detail // CUTS[setting].scale
        try:
            base_image = open_image(f"{self.images}/{base}", detail)
        except OSError as error:
            reason = str(error).removeprefix(f"{self.images}/{base}: ")
            return None, {"file": base, "reason": reason}

        for _ in range(100):
            paste = self.partner(base, rng)
            try:
                paste_image = open_image(f"{self.images}/{paste}", paste_detail)
            except OSError:
                continue
            picture, box = mix(base_image, paste_image, setting, self.size, rng)
            return picture, {
                "file": composite_file(index), "setting": setting, "box": box,
                "base": base, "paste": paste,
                "base_class": class_of(base), "paste_class": class_of(paste)}
        reason = "no photo of another class could be read (100 tried)"
        return None, {"file": base, "reason": reason}

    def make(self, index):
        """Save composite number `index`, if it is not there; return its row as JSON.

        Each JPEG carries its row as a comment. So a run that goes on in a half-made
        folder need not make again what is there, or guess which partner a broken file
        led to.
        """
        path = self.out / composite_file(index)
        if path.exists():
            # After a crash of the whole machine it may be empty; then it is made again.
            with contextlib.suppress(OSError, KeyError), Image.open(path) as image:
                return image.info["comment"].decode()
        picture, row = self.compose(index, self.setting_of(index))
        # JSON in ASCII: any file name survives, even one that is not UTF-8.
        line = json.dumps(row)
        if picture:
            jpeg = io.BytesIO()
            # 4:4:4: pixels that share a colour would carry it over the seam.
            picture.save(jpeg, "JPEG", quality=95, subsampling=0, comment=line.encode())
            # At once: Pillow would write a file in small pieces.
            with complete(path) as temporary:
                temporary.write_bytes(jpeg.getbuffer())
        return line


# Remembered, because the composites of a group are made one after the other.
@functools.lru_cache(maxsize=1)
def shuffled_settings(seed, group):
    """Return all settings, in an order that depends on `seed` and `group` only."""
    order = np.random.default_rng((seed, group, 1)).permutation(len(SETTINGS))
    return [SETTINGS[k] for k in order]


def may_be_mixed(a, b):
    """Tell whether two files are different photos, of different classes.

    A photo in no class folder is a class of its own.
    """
    without_class = class_of(a) == class_of(b) == ""
    return a != b and (without_class or class_of(a) != class_of(b))


def composite_file(index):
    """Return the path of a composite below --out: "00001/000001234.jpg"."""
    return f"{index // A_FOLDER:05d}/{index:09d}.jpg"


# --------------------------------------------------------------------------------------
# Making it, in several processes
#
# A pool sends tasks to its workers through a pipe, and a list of a million files must
# not go through it with each of them. So a task is just a number, and a worker finds
# all else in this variable: it is set when the worker starts, from an argument that a
# fork hands over as it is.

composites_of_worker = None


def start_worker(composites):
    """Prepare a worker process: it gets its data set, and will end with its parent."""
    global composites_of_worker
    composites_of_worker = composites
    # Ctrl-C reaches all processes; the parent stops its workers, they need not complain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A killed parent cannot stop its workers, and they would wait for tasks for ever.
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """End this process as soon as its parent has ended, however that came about."""
    multiprocessing.parent_process().join()
    os._exit(1)


def make_in_worker(index):
    """Make one composite in a worker process; see Composites.make."""
    return composites_of_worker.make(index)


GOES_ON = "what is made stays, the same command goes on from there"


def make_folders(composites, folders, workers, bar):
    """Make sub-folders of composites, and after each its part of the manifest.

    A part is the sign that a sub-folder is whole. `workers` processes (0: only this
    one) share every sub-folder. Raises UserError if a composite cannot be saved or a
    worker is killed.
    """
    pool = None
    if workers:
        # A fork shares the list of files without a copy.
        fork = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(workers, fork, start_worker, (composites,))
    try:
        # A pool remembers every task it is given, and there may be millions: so it gets
        # a hundred folders at a time. Within these, no worker waits at a folder's end.
        for start in range(0, len(folders), 100):
            hundred = folders[start:start + 100]
            indices = itertools.chain.from_iterable(map(composites.indices, hundred))
            if pool:
                lines = pool.map(make_in_worker, indices, chunksize=16)
            else:
                lines = map(composites.make, indices)

            # Lines come in the order of the indices.
            for folder in hundred:
                count = len(composites.indices(folder))
                rows = []
                for line in itertools.islice(lines, count):
                    rows.append(line + "\n")
                    bar.update()
                with complete(composites.part_file(folder)) as temporary:
                    temporary.write_text("".join(rows))
    except OSError as error:
        raise UserError(f"{error}; {GOES_ON}")
    except BrokenProcessPool:
        raise UserError(f"a worker process was killed (enough memory?); {GOES_ON}")
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def join_parts(parts, out):
    """Write skipped.jsonl and then, as the sign of the end, cutmix.jsonl.

    parts: the files that hold the rows of both, in order.
    """
    count = 0
    # By file, because a photo that is tried --times times is named once.
    skipped = {}
    with complete(out / "cutmix.jsonl") as temporary, open(temporary, "w") as manifest:
        for part in parts:
            for line in part.read_text().splitlines(keepends=True):
                row = json.loads(line)
                if "reason" in row:
                    skipped.setdefault(row["file"], line)
                else:
                    manifest.write(line)
                    count += 1
        with complete(out / "skipped.jsonl") as beside:
            beside.write_text("".join(skipped.values()))
    print(f"{count} composites in {out}, {len(skipped)} photos skipped (named in "
          "skipped.jsonl)")


# --------------------------------------------------------------------------------------
# Sheets to look at

def example_composites(composites, setting, count=6):
    """Return `count` composites of one setting as PIL images, spread over the data set.

    Raises UserError if too many photos are broken.
    """
    n = len(composites.files)
    found = []
    # Photos 0, n / 6, 2 n / 6 ...; if some are broken, those after them, and so on.
    for attempt in range(4):
        for place in range(count):
            index = (place * n // count + attempt) % n
            picture, _ = composites.compose(index, setting)
            if picture:
                found.append(picture)
            if len(found) == count:
                return found
    raise UserError(f"{composites.images}: too many broken photos")


def noise_sheet(rows, tau, seed):
    """Return the paper's Fig. 7: a picture of each setting at t = 0, 0.1 ... 1.

    A red line stands where t passes tau; gamma = 1 - t, as in training. Training adds
    the noise to latents, of which there is one for 8 x 8 pixels. Independent noise on
    every pixel would average out in the eye and leave the seams too clear: so 8 x 8
    pixels share theirs.
    """
    rng = np.random.default_rng(seed)
    times = [i / 10 for i in range(11)]
    side = rows[0][0].width
    cells = side // 8 + 1
    strips = []
    for k, row in enumerate(rows):
        # Another photo in each row.
        x_0 = np.asarray(row[k % len(row)], np.float32) / 127.5 - 1         # (S, S, 3)
        eps = rng.standard_normal((cells, cells, 3))
        eps = eps.repeat(8, axis=0).repeat(8, axis=1)[:side, :side]         # (S, S, 3)
        strip = []
        for t in times:
            x_t = np.sqrt(1 - t) * x_0 + np.sqrt(t) * eps                   # (S, S, 3)
            levels = (127.5 + 127.5 * x_t).clip(0, 255).astype(np.uint8)
            strip.append(Image.fromarray(levels))
        strips.append(strip)
    sheet = labelled_grid(strips, SETTINGS, [f"t = {t:g}" for t in times])

    # The line stands left of the first t that is greater than tau.
    shown_before = sum(t <= tau for t in times)
    first_after = grid_left(shown_before, max(192, side)) - 3
    pen = ImageDraw.Draw(sheet)
    pen.line([(first_after, 0), (first_after, sheet.height)], "red", 3)
    font = ImageFont.load_default(size=13)
    beside = (first_after - 6, sheet.height - 13)
    pen.text(beside, f"tau = {tau:g}", "red", font, anchor="rm")
    return sheet


def save_picture(picture, path):
    """Save a PIL image as PNG and say where it is."""
    with complete(path) as temporary:
        picture.save(temporary, "PNG")
    print(path)


# --------------------------------------------------------------------------------------

def main(argv=None):
    args = parse_arguments(argv)
    # Pillow would remark on every photo with an odd EXIF block.
    warnings.filterwarnings("ignore", module="PIL")
    rank, world = rank_and_world()
    photos = photos_of_two_classes(args.images)
    composites = Composites(images=args.images, files=photos, out=args.out,
                            setting=args.setting, size=args.size, times=args.times,
                            seed=args.seed)

    if args.preview or args.noise:
        rows = [example_composites(composites, setting) for setting in SETTINGS]
        if args.preview:
            save_picture(labelled_grid(rows, SETTINGS), args.out / "preview.png")
        if args.noise:
            save_picture(noise_sheet(rows, args.tau, args.seed), args.out / "noise.png")
        return

    with only_command(args.out):
        make_composites(args, composites, rank, world)


def make_composites(args, composites, rank, world):
    """Make this rank's composites; the last rank to end lists all of them in cutmix.jsonl."""
    list_of_photos = hashlib.sha256(composites.files.tobytes()).hexdigest()
    settings = {"setting": args.setting, "size": args.size, "times": args.times,
                "seed": args.seed, "photos": list_of_photos[:16]}
    begin_or_resume(args.out / "parts" / "settings.json", args.out, settings)
    if (args.out / "cutmix.jsonl").exists():
        print(f"{args.out}: complete already")
        return

    # Each rank makes every world-th folder, and of these what is not there yet.
    folder_count = math.ceil(len(composites) / A_FOLDER)
    folders = []
    for folder in range(rank, folder_count, world):
        if not composites.part_file(folder).exists():
            folders.append(folder)
    total = sum(len(composites.indices(folder)) for folder in folders)
    with tqdm(total=total, desc="cutmix", unit="img", disable=rank > 0) as bar:
        make_folders(composites, folders, args.workers, bar)
    parts = [composites.part_file(folder) for folder in range(folder_count)]
    if is_last_rank(rank, parts, args.out / "cutmix.jsonl"):
        join_parts(parts, args.out)


def parse_arguments(argv):
    """Return the command's options. Raises UserError for values that make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--images", required=True, metavar="FOLDER",
        help="photos: <class>/<file>, or all in one flat folder")
    add("--out", required=True, metavar="FOLDER", type=Path,
        help="where the composites go")
    add("--setting", default="all", choices=[*SETTINGS, "all"],
        help="the share of the second photo")
    add("--size", type=int, default=256, help="side of a composite, in pixels")
    add("--times", type=int, default=1,
        help="composites that each photo is the base of")
    add("--seed", type=int, default=0, help="another seed, other partners and places")
    add("--workers", type=int, default=default_workers(),
        help="processes; 0: just this")
    add("--preview", action="store_true",
        help="only draw OUT/preview.png, examples of each setting")
    add("--noise", action="store_true",
        help="only draw OUT/noise.png, each setting at t = 0, 0.1 ... 1")
    add("--tau", type=float, default=0.4, help="where --noise draws its line")
    args = parser.parse_args(argv)
    at_least(args, size=16, times=1, seed=0, workers=0)
    between(args, 0, 1, "tau")
    if args.out.resolve().is_relative_to(Path(args.images).resolve()):
        raise UserError(f"--out {args.out} is inside --images: the next run would take "
                        "composites for photos")
    return args


def photos_of_two_classes(folder):
    """Return the photos below a folder as an array (n,) of bytes, sorted by name.

    Raises UserError if there are none, or if they are of one class only.
    """
    files = list_images(folder)
    if not any(may_be_mixed(files[0], file) for file in files):
        raise UserError(f"{folder}: one class only, and partners come from another "
                        "(give two or more class folders, or one flat folder of two or "
                        "more images)")
    return np.array([os.fsencode(file) for file in files])


if __name__ == "__main__":
    command_line(main)
