"""Stage 1, pixel augmentation (paper 3.2): every photo becomes a CutMix composite with one of another class.

    python cutmix.py --images imagenet/train --out cutmix-all --setting all

A composite holds two things in one picture, which photos of a single object never do. Its seams are wrong, so
training uses it only where noise hides them (train.py, t > tau). There are four ways to cut, named after the
share of the picture that the second photo gets: 1/2, 1/4, 1/9, 1/16; `all` is exactly a quarter of each.

Makes OUT/00000/000000000.jpg, ... (1,000 a folder; composite i has photo i as its base), OUT/cutmix.jsonl
(what is where) and OUT/skipped.jsonl (photos that could not be read). --preview draws one sheet of examples,
--noise the same under more and more noise, to choose tau by eye. For several nodes start it under torchrun,
or with RANK and WORLD_SIZE set. Killed, it goes on with the same command.
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common import (HelpFormatter, UserError, at_least, begin_or_resume, class_of, command_line,
                    complete, default_workers, is_last_rank, list_images, open_image,
                    rank_and_world, resize_and_crop, rgb)

# ----------------------------------------------------------------------------------------------------------
# The composite (paper 3.2, "Image augmentation")

SIDE = {"1/2": 1, "1/4": 2, "1/9": 3, "1/16": 4}        # the second photo is scaled to size // SIDE
SETTINGS = tuple(SIDE)


def paste_box(setting, size, rng):
    """Where the second photo goes: (x0, y0, x1, y1) in pixels, right and bottom exclusive.

    `rng` has a method random() -> [0, 1): a numpy Generator or a random.Random. Raises UserError."""
    if setting not in SETTINGS or size < 16:
        raise UserError(f"setting {setting!r}, size {size}: {', '.join(SETTINGS)} exist, and at least 16")
    side = size // SIDE[setting]
    end, middle = size - side, (size - side) // 2
    if setting == "1/2":                                # the right or the bottom half
        return [(size // 2, 0, size, size), (0, size // 2, size, size)][int(rng.random() * 2)]
    if setting == "1/4":                                # one of the four corners
        x, y = [(0, 0), (end, 0), (0, end), (end, end)][int(rng.random() * 4)]
    elif setting == "1/9":                              # the middle of a border, so centre and corners stay
        x, y = [(middle, 0), (middle, end), (0, middle), (end, middle)][int(rng.random() * 4)]
    else:                                               # anywhere in [5%, 95%] that does not touch [40%, 60%]
        low, high = -(-size // 20), size * 19 // 20 - side          # first and last place, inclusive
        while True:                                     # a bit more than half of the draws are good
            x, y = (low + int(rng.random() * (high - low + 1)) for _ in "xy")
            if not all(5 * place <= 3 * size and 5 * (place + side) >= 2 * size for place in (x, y)):
                break
    return x, y, x + side, y + side


def mix(base, paste, setting, size, rng):
    """Two PIL images of any size -> (the composite, size x size RGB, and the box of the second one in it)."""
    base, paste = rgb(base), rgb(paste)
    fast = Image.Resampling.HAMMING     # half of Lanczos's time, 36-45 dB from it: seen under noise only
    picture, box = Image.new("RGB", (size, size)), paste_box(setting, size, rng)
    x0, y0, x1, y1 = box                                # the base: only what will be seen of it is resampled
    for part in ((0, 0, size, y0), (0, y0, x0, y1), (x1, y0, size, y1), (0, y1, size, size)):
        if part[0] < part[2] and part[1] < part[3]:
            picture.paste(resize_and_crop(base, size, part, fast), part)
    if setting == "1/2":                                # both at full resolution, each half where it was
        picture.paste(resize_and_crop(paste, size, box, fast), box)
    else:                                               # all of the second, smaller
        picture.paste(resize_and_crop(paste, x1 - x0, None, fast), box)
    return picture, box


# ----------------------------------------------------------------------------------------------------------
# The data set: composite i is a function of (seed, i), whoever makes it and whenever. `args` are the options,
# and args.files (n,) bytes: an array, because forked workers share that, but would copy Python strings

A_FOLDER = 1000


def same_class(a, b):
    """Whether two files must not be mixed; without a folder, every photo is a class of its own."""
    return a == b or class_of(a) == class_of(b) != ""


@lru_cache(maxsize=1)
def shuffled_settings(seed, four):
    return [SETTINGS[k] for k in np.random.default_rng((seed, four, 1)).permutation(4)]


def setting_of(args, index):
    """`all` is a quarter of each to within one image: every four neighbours share the four out by chance."""
    return shuffled_settings(args.seed, index // 4)[index % 4] if args.setting == "all" else args.setting


def partner(files, base, rng):
    """A photo from all those of other classes, each as likely as the other -> its file."""
    while same_class(base, file := os.fsdecode(files[int(rng.random() * len(files))])):
        pass
    return file


def composite(args, index, setting):
    """-> (PIL image, its line in cutmix.jsonl), or (None, its line in skipped.jsonl) if its base is broken.

    A partner that cannot be read is replaced by the next draw: it is named when its turn as a base comes."""
    rng, base = np.random.default_rng((args.seed, index)), os.fsdecode(args.files[index % len(args.files)])
    try:
        base_image = open_image(f"{args.images}/{base}", int(1.4 * args.size))      # 1.4: see load_image
    except OSError as error:
        return None, {"file": base, "reason": str(error).removeprefix(f"{args.images}/{base}: ")}
    for _ in range(100):
        paste = partner(args.files, base, rng)
        with contextlib.suppress(OSError):
            paste_image = open_image(f"{args.images}/{paste}", int(1.4 * args.size) // SIDE[setting])
            picture, box = mix(base_image, paste_image, setting, args.size, rng)
            return picture, {"file": f"{index // A_FOLDER:05d}/{index:09d}.jpg", "setting": setting,
                             "box": box, "base": base, "paste": paste,
                             "base_class": class_of(base), "paste_class": class_of(paste)}
    return None, {"file": base, "reason": "no photo of another class could be read (100 tried)"}


def make(args, index):
    """Makes composite `index`, if it is not there -> its line of the manifest, or of skipped.jsonl.

    Each JPEG carries its line as a comment: a run that goes on in a half-made folder neither makes again what
    is there nor guesses which partner a broken file forced upon it."""
    path = args.out / f"{index // A_FOLDER:05d}" / f"{index:09d}.jpg"
    if path.exists():                                   # after a crash of the whole machine it may be empty
        with contextlib.suppress(OSError, KeyError), Image.open(path) as image:
            return image.info["comment"].decode()
    picture, row = composite(args, index, setting_of(args, index))
    line = json.dumps(row)                              # ASCII: any file name survives, even if not UTF-8
    if picture:
        jpeg = io.BytesIO()                             # 4:4:4, or colours would bleed over the seam
        picture.save(jpeg, "JPEG", quality=95, subsampling=0, comment=line.encode())
        with complete(path) as temporary:               # at once: Pillow would write it in small pieces
            temporary.write_bytes(jpeg.getbuffer())
    return line


def start_worker(args):
    """In a worker: the options came by fork, not through a pipe; and it does not outlive its parent."""
    global job
    job = args
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is the parent's
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_job(index):
    return make(job, index)


def make_folders(args, folders, bar):
    """Makes sub-folders of composites, and after each its part of the manifest, the sign that it is whole.

    args.workers processes (0: this one) share every folder; the next ones are on their way already, so that
    nobody waits. Raises UserError if one fails or is killed."""
    fork = multiprocessing.get_context("fork")          # shares the list of files without a copy
    pool = ProcessPoolExecutor(args.workers, fork, start_worker, (args,)) if args.workers else None

    def begin(folder):
        indices = range(folder * A_FOLDER, min((folder + 1) * A_FOLDER, len(args.files) * args.times))
        lines = pool.map(make_job, indices, chunksize=16) if pool else map(partial(make, args), indices)
        return folder, lines

    try:
        begun = map(begin, folders)
        coming = deque(islice(begun, 2 + args.workers // 16))
        while coming:
            folder, lines = coming.popleft()
            part = []
            for line in lines:
                part.append(line + "\n")
                bar.update()
            with complete(args.out / "parts" / f"{folder:05d}.jsonl") as temporary:
                temporary.write_text("".join(part))
            coming.extend(islice(begun, 1))
    except (OSError, BrokenProcessPool) as error:       # a full disk, say
        why = error if isinstance(error, OSError) else "a worker process was killed (enough memory?)"
        raise UserError(f"{why}; what is made stays, the same command goes on from there") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def merge(args, parts):
    """The parts of all ranks, in order -> skipped.jsonl and then, as the sign of the end, cutmix.jsonl."""
    composites, skipped = 0, {}                         # a dict: a photo once, though tried --times times
    with complete(args.out / "cutmix.jsonl") as temporary, open(temporary, "w") as manifest:
        for line in (line for part in parts for line in part.read_text().splitlines(keepends=True)):
            if "reason" in (row := json.loads(line)):
                skipped.setdefault(row["file"], line)
            else:
                composites += 1
                manifest.write(line)
        with complete(args.out / "skipped.jsonl") as beside:
            beside.write_text("".join(skipped.values()))
    print(f"{composites} composites in {args.out}, {len(skipped)} photos skipped (named in skipped.jsonl)")


# ----------------------------------------------------------------------------------------------------------
# Sheets to look at

def sheet(rows, titles=(), mark=None):
    """Pictures, a row for each setting, a title above each column; and, with mark = (column, text), a red
    line left of that column, with its text below the pictures."""
    size, font = max(192, rows[0][0].width), ImageFont.load_default(size=13)
    left, top, step = 50, 26, size + 6
    picture = Image.new("RGB", (left + len(rows[0]) * step, top + len(rows) * step + 20), "white")
    draw = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        draw.text((left - 8, top + r * step + size // 2), SETTINGS[r], "black", font, anchor="rm")
        for c, image in enumerate(row):
            picture.paste(image.resize((size, size), Image.Resampling.BOX), (left + c * step, top + r * step))
    for c, title in enumerate(titles):
        draw.text((left + c * step + size // 2, top // 2), title, "black", font, anchor="mm")
    if mark:
        x = left + mark[0] * step - 3
        draw.line([(x, 0), (x, picture.height)], "red", 3)
        draw.text((x - 6, picture.height - 13), mark[1], "red", font, anchor="rm")
    return picture


def examples(args, setting, count=6):
    """`count` composites of one setting, spread over the data set -> PIL images. Raises UserError."""
    n, found = len(args.files), []
    for k in range(4 * count):                          # more than are needed: some photos may be broken
        picture, _ = composite(args, (k % count * n // count + k // count) % n, setting)
        found += [picture] * (picture is not None)
        if len(found) == count:
            return found
    raise UserError(f"{args.images}: too many broken photos")


def noise_sheet(rows, tau, seed):
    """The paper's Fig. 7: a picture of each setting at t = 0, 0.1 ... 1; a red line where t passes tau.

    gamma = 1 - t as in training. Training adds the noise to latents, one for 8 x 8 pixels; independent noise
    on every pixel would average out in the eye and leave the seams too clear: 8 x 8 pixels share theirs."""
    times, rng, strips = [i / 10 for i in range(11)], np.random.default_rng(seed), []
    for k, row in enumerate(rows):
        x = np.asarray(row[k], np.float32) / 127.5 - 1                                          # (H, H, 3)
        eps = rng.standard_normal((len(x) // 8 + 1, len(x) // 8 + 1, 3))
        eps = eps.repeat(8, axis=0).repeat(8, axis=1)[:len(x), :len(x)]                         # (H, H, 3)
        x_t = np.stack([np.sqrt(1 - t) * x + np.sqrt(t) * eps for t in times])              # (11, H, H, 3)
        strips.append([Image.fromarray(x) for x in (127.5 + 127.5 * x_t).clip(0, 255).astype(np.uint8)])
    return sheet(strips, [f"t = {t:g}" for t in times], (sum(t <= tau for t in times), f"tau = {tau:g}"))


# ----------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--images", required=True, metavar="FOLDER", help="photos: <class>/<file>, or all in one flat folder")
    add("--out", required=True, metavar="FOLDER", type=Path, help="where the composites go")
    add("--setting", default="all", choices=[*SETTINGS, "all"], help="the share of the second photo")
    add("--size", type=int, default=256, help="side of a composite, in pixels")
    add("--times", type=int, default=1, help="composites that each photo is the base of")
    add("--seed", type=int, default=0, help="another seed, other partners and places")
    add("--workers", type=int, default=default_workers(), help="processes; 0: just this")
    add("--preview", action="store_true", help="only draw OUT/preview.png, examples of each setting")
    add("--noise", action="store_true", help="only draw OUT/noise.png, each setting at t = 0, 0.1 ... 1")
    add("--tau", type=float, default=0.4, help="where --noise draws its line")
    args = parser.parse_args(argv)
    at_least(args, size=16, times=1, seed=0, workers=0)
    if args.out.resolve().is_relative_to(Path(args.images).resolve()):
        raise UserError(f"--out {args.out} is inside --images: the next run would take composites for photos")
    warnings.filterwarnings("ignore", module="PIL")     # remarks on odd EXIF blocks, one a photo
    rank, world = rank_and_world()
    files = list_images(args.images)
    if all(same_class(files[0], file) for file in files):
        raise UserError(f"{args.images}: one class only, and partners come from another (give two or more "
                        f"class folders, or one flat folder of two or more images)")
    args.files = np.array([os.fsencode(file) for file in files])
    del files
    if args.preview or args.noise:
        rows = [examples(args, setting) for setting in SETTINGS]
        for name, picture in (("preview", sheet(rows)), ("noise", noise_sheet(rows, args.tau, args.seed))):
            if getattr(args, name):
                with complete(args.out / f"{name}.png") as temporary:
                    picture.save(temporary, "PNG")
                print(args.out / f"{name}.png")
        return

    photos = hashlib.sha256(args.files.tobytes()).hexdigest()
    settings = {"setting": args.setting, "size": args.size, "times": args.times, "seed": args.seed,
                "photos": photos[:16]}
    begin_or_resume(args.out / "parts" / "settings.json", args.out, settings)
    if (args.out / "cutmix.jsonl").exists():
        print(f"{args.out}: complete already")
        return
    count = len(args.files) * args.times
    parts = [args.out / "parts" / f"{folder:05d}.jsonl" for folder in range(-(-count // A_FOLDER))]
    folders = [folder for folder in range(rank, len(parts), world) if not parts[folder].exists()]
    total = sum(min(count - folder * A_FOLDER, A_FOLDER) for folder in folders)
    with tqdm(total=total, desc="cutmix", unit="img", disable=rank > 0) as bar:
        make_folders(args, folders, bar)
    if is_last_rank(rank, parts, args.out / "cutmix.jsonl"):
        merge(args, parts)


if __name__ == "__main__":
    command_line(main)
