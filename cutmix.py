"""Stage 1, pixel augmentation (paper 3.2): every photo becomes a CutMix composite with a photo of another class.

    python cutmix.py --images imagenet/train --out cutmix-all --setting all

A composite holds two things in one picture, which photos of a single object never do. Its seams are wrong, so
training uses it only where noise hides them (train.py, t > tau). Four ways to cut, named after the share of the
picture that the second photo gets: 1/2, 1/4, 1/9, 1/16; `all` is exactly a quarter of each.

Makes OUT/00000/000000000.jpg, ... (1,000 a folder; composite i has photo i as its base), OUT/cutmix.jsonl (what
is where) and OUT/skipped.jsonl (photos that could not be read). Look before you leap: --preview draws one sheet
of examples, --noise the same under more and more noise, to choose tau by eye. For several nodes start it under
torchrun, or with RANK and WORLD_SIZE set. Killed, it goes on with the same command.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import warnings
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


# ------------------------------------------------------------------------------------------------------------
# What every stage shares: errors, complete files, JSONL, ranks, images

class UserError(Exception):
    """A mistake of the user's (a path, a number, a file): one line, no traceback, exit code 2."""


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """`--help`: the module's docstring as it is written, and every default that is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def command_line(main):
    """Runs a stage's `main()`; a UserError or a failing file system ends in one line and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def rank_and_world():
    """(rank, number of ranks), as torchrun says in the environment; (0, 1) without it. Raises UserError."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise UserError("RANK and WORLD_SIZE in the environment must be numbers")
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank} in the environment is not below WORLD_SIZE {world}")
    return rank, world


@contextlib.contextmanager
def complete(path):
    """Gives a temporary path to write to; only a complete file gets the final name.

    The temporary name is the same at the next attempt (and another for each rank), so that a kill leaves nothing
    behind that running the same command again does not clear away."""
    path = Path(path)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.environ.get('RANK', '0')}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_jsonl(path):
    """The objects of a JSONL file. A last line without its newline was torn by a kill: it is left out.

    Raises UserError (file, line) for anything else that is not a JSON object."""
    rows = []
    try:
        with open(path, "rb") as lines:                 # bytes: a torn line may end inside a character
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:             # not JSON, or not UTF-8
                    if not line.endswith(b"\n"):
                        break
                    raise UserError(f"{path} line {number}: not JSON ({getattr(error, 'msg', error)})")
                if not isinstance(row, dict):
                    raise UserError(f"{path} line {number}: not a JSON object")
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}")
    return rows


def list_images(folder):
    """All images below `folder`, as sorted paths relative to it with forward slashes. Raises UserError."""
    folder = str(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    files = []
    for here, folders, names in os.walk(folder, followlinks=True):   # folders are listed, files are not touched
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(here, folder).replace(os.sep, "/")
        files += [name if inside == "." else f"{inside}/{name}" for name in names
                  if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    if not files:
        raise UserError(f"{folder}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(files)


def rgb(image):
    """PIL image -> RGB; one that is RGB already is not copied, which would cost a quarter of decoding it."""
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path, size):
    """Any image file -> upright RGB PIL image, its shorter side at least `size` if the file has as much.

    Raises OSError, in one line, whatever is wrong with the file."""
    try:
        with Image.open(path) as image:
            image.draft(None, (size, size))             # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the time
            image.load()
            with contextlib.suppress(Exception):        # a damaged EXIF block does not spoil the pixels
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":                   # 16-bit grey, floats: convert() would clip them at 255
                grey = np.asarray(image, np.float32)
                top = 65535 if image.mode[0] == "I" or grey.max() > 255 else 255 if grey.max() > 1 else 1
                image = Image.fromarray((grey * (255 / top) + 0.5).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:             # alpha, or a palette or key colour that is transparent
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return rgb(image)
    except Exception as error:  # noqa: BLE001           Pillow's decoders raise almost anything on broken bytes
        reason = getattr(error, "strerror", None) or str(error).replace(repr(str(path)), "").strip()
        raise OSError(f"{path}: not a readable image ({reason or type(error).__name__})") from None


def fit(image, size, part=None, resample=Image.Resampling.LANCZOS):
    """PIL image -> size x size: shorter side to `size`, centre crop, nothing squashed; or only a box of that."""
    side = min(image.size)
    x, y = (image.width - side) // 2, (image.height - side) // 2   # whole pixels: no blur if nothing is scaled
    x0, y0, x1, y1 = part or (0, 0, size, size)
    box = x + x0 * side / size, y + y0 * side / size, x + x1 * side / size, y + y1 * side / size
    return image.resize((x1 - x0, y1 - y0), resample if side >= size else Image.Resampling.BICUBIC, box=box)


def load_image(path, size):
    """Any image file -> RGB PIL image of size x size: shorter side to `size`, centre crop, nothing squashed.

    Grey, CMYK, palette, 16-bit, alpha (on white) and EXIF rotation are understood. Raises OSError (one line)."""
    return fit(open_image(path, 2 * size), size)        # decoded at 2 x: a JPEG decoder averages rather crudely


# ------------------------------------------------------------------------------------------------------------
# The composite (paper 3.2, "Image augmentation")

SETTINGS = ("1/2", "1/4", "1/9", "1/16")
SIDE = {"1/2": 1, "1/4": 2, "1/9": 3, "1/16": 4}        # the second photo is scaled to size // SIDE


def paste_box(setting, size, rng):
    """Where the second photo goes: (x0, y0, x1, y1) in pixels, right and bottom exclusive.

    `rng` has a method random() -> [0, 1): a numpy Generator or a random.Random. Raises UserError."""
    if setting not in SETTINGS:
        raise UserError(f"setting {setting!r}: there are {', '.join(SETTINGS)}")
    if size < 16:
        raise UserError(f"size {size}: too small to cut, at least 16")
    side = size // SIDE[setting]
    if setting == "1/2":                                # the right or the bottom half
        return [(size // 2, 0, size, size), (0, size // 2, size, size)][int(rng.random() * 2)]
    if setting == "1/4":                                # one of the four corners
        x, y = [(0, 0), (size - side, 0), (0, size - side), (size - side, size - side)][int(rng.random() * 4)]
    elif setting == "1/9":                              # the middle of a border: centre and corners stay whole
        middle, end = (size - side) // 2, size - side
        x, y = [(middle, 0), (middle, end), (0, middle), (end, middle)][int(rng.random() * 4)]
    else:                                               # anywhere in [5%, 95%] that does not touch [40%, 60%]
        low, high = -(-size // 20), size * 19 // 20 - side          # first and last place, inclusive
        while True:                                     # a bit more than half of the draws are good
            x, y = (low + int(rng.random() * (high - low + 1)) for _ in "xy")
            if not all(5 * place <= 3 * size and 5 * (place + side) >= 2 * size for place in (x, y)):
                break
    return x, y, x + side, y + side


def mix(base, paste, setting, size, rng):
    """Two PIL images of any size -> (the composite, size x size RGB, and the box of the second one in it).

    1/2 keeps both at full resolution, each half where it was; the others show all of the second, smaller."""
    x0, y0, _, _ = box = paste_box(setting, size, rng)
    rest, part = ((0, 0, x0 or size, y0 or size), box) if setting == "1/2" else ((0, 0, size, size), None)
    hamming = Image.Resampling.HAMMING                  # a third of Lanczos's time, 36-45 dB from it: good enough
    picture = Image.new("RGB", (size, size))            # for pictures that are only ever seen under noise
    picture.paste(fit(rgb(base), size, rest, hamming), rest)
    picture.paste(fit(rgb(paste), size // SIDE[setting], part, hamming), box)
    return picture, box


# ------------------------------------------------------------------------------------------------------------
# The data set: composite i is a function of (seed, i), whoever makes it and whenever

A_FOLDER = 1000


class Job(NamedTuple):
    """What the workers need to know. `files` is one block of bytes, which forked workers share: Python strings
    would be copied to each of them as soon as they are looked at."""
    images: str
    out: Path
    files: np.ndarray       # (n,) bytes, sorted, so that a class is a range
    starts: np.ndarray      # (classes,) where each class starts; a photo without a folder is a class of its own
    setting: str
    size: int
    times: int
    seed: int

    def file(self, i):
        return os.fsdecode(bytes(self.files[i]))


def class_of(file):
    return file.split("/", 1)[0] if "/" in file else ""


def setting_of(job, index):
    """`all` is a quarter of each to within one image: every four neighbours share the four out by chance."""
    if job.setting != "all":
        return job.setting
    return SETTINGS[np.random.default_rng((job.seed, index // 4, 1)).permutation(4)[index % 4]]


def partner(job, base, rng):
    """A photo from all those of other classes, each as likely as the other -> its number."""
    k = np.searchsorted(job.starts, base, side="right")
    start, end = job.starts[k - 1], job.starts[k] if k < len(job.starts) else len(job.files)
    other = int(rng.random() * (len(job.files) - (end - start)))
    return int(other if other < start else other + end - start)


def composite(job, index, setting):
    """-> (PIL image, its line in cutmix.jsonl), or (None, {"skipped", "reason"}) if its base cannot be read.

    A partner that cannot be read is replaced by the next draw: it is named when its turn as a base comes."""
    number = index % len(job.files)
    base, rng = job.file(number), np.random.default_rng((job.seed, index))
    try:
        base_image = open_image(f"{job.images}/{base}", int(1.4 * job.size))
    except OSError as error:
        return None, {"skipped": base, "reason": str(error).removeprefix(f"{job.images}/{base}: ")}
    for _ in range(100):
        paste = job.file(partner(job, number, rng))
        with contextlib.suppress(OSError):
            paste_image = open_image(f"{job.images}/{paste}", int(1.4 * job.size) // SIDE[setting])
            picture, box = mix(base_image, paste_image, setting, job.size, rng)
            return picture, {"file": f"{index // A_FOLDER:05d}/{index:09d}.jpg", "setting": setting, "box": box,
                             "base": base, "paste": paste,
                             "base_class": class_of(base), "paste_class": class_of(paste)}
    return None, {"skipped": base, "reason": "no photo of another class could be read (100 tried)"}


def part_file(job, folder):
    return job.out / "parts" / f"{folder:05d}.jsonl"


def make_folder(job, folder):
    """Makes one sub-folder of composites and then, as the sign that it is whole, its part of the manifest.

    Each JPEG carries its manifest line as a comment. So a run that goes on in a half-made folder neither makes
    again what is there nor guesses which partner an unreadable file forced upon it. Yields once a composite."""
    lines, where = [], job.out / f"{folder:05d}"
    where.mkdir(parents=True, exist_ok=True)
    there = set(os.listdir(where))
    for index in range(folder * A_FOLDER, min((folder + 1) * A_FOLDER, len(job.files) * job.times)):
        name = f"{index:09d}.jpg"
        if name in there:
            with Image.open(where / name) as image:
                line = image.info.get("comment", b"").decode()
            if not line:
                raise UserError(f"{where / name}: not made by cutmix.py, use another --out")
        else:
            picture, row = composite(job, index, setting_of(job, index))
            line = json.dumps(row)                      # ASCII: any file name survives, even if it is not UTF-8
            if picture:
                with complete(where / name) as temporary:   # 4:4:4, or colours would bleed over the seam
                    picture.save(temporary, "JPEG", quality=95, subsampling=0, comment=line.encode())
        lines.append(line + "\n")
        yield index
    with complete(part_file(job, folder)) as temporary:
        temporary.write_text("".join(lines))


def worker(job, folders, taken, done, parent, errors):
    """A worker process: takes the next sub-folder that nobody has taken, until there are none."""
    try:
        while True:
            with taken.get_lock():
                k, taken.value = taken.value, taken.value + 1
            if k >= len(folders):
                return
            for _ in make_folder(job, folders[k]):
                with done.get_lock():
                    done.value += 1
                if os.getppid() != parent:              # the main process was killed: do not go on alone
                    return
    except KeyboardInterrupt:
        pass
    except Exception as error:  # noqa: BLE001           a full disk, say: the main process reports it, once
        errors.put(str(error) if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: {error}")
        sys.exit(1)


def make(job, folders, workers, bar):
    """Makes the given sub-folders, in this process (workers 0) or with worker processes. Raises UserError."""
    if workers == 0:
        for folder in folders:
            for _ in make_folder(job, folder):
                bar.update()
        return
    # fork shares the list of files without a copy; where there is none (Windows) it is sent to each worker
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    taken, done, errors = context.Value("q", 0), context.Value("q", 0), context.SimpleQueue()
    args, count = (job, folders, taken, done, os.getpid(), errors), min(workers, len(folders))
    processes = [context.Process(target=worker, args=args, daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            wait([process.sentinel for process in processes if process.is_alive()], timeout=0.2)
            bar.update(done.value - bar.n)
            if any(process.exitcode for process in processes):
                break
        bar.update(done.value - bar.n)
        if any(process.exitcode for process in processes):
            why = errors.get() if not errors.empty() else "a worker process was killed (is there enough memory?)"
            raise UserError(f"{why}; what is made stays, the same command goes on from there")
    finally:
        for process in processes:
            if process.pid:
                process.terminate()


def same_settings(job):
    """Composites of two kinds never end in one folder: it remembers how they were made. Raises UserError."""
    settings = {"setting": job.setting, "size": job.size, "times": job.times, "seed": job.seed,
                "images": len(job.files), "names": hashlib.sha256(b"\n".join(job.files.tolist())).hexdigest()}
    path = job.out / "parts" / "settings.json"
    if not path.exists():
        with complete(path) as temporary:
            temporary.write_text(json.dumps(settings))
        return
    for key, before in json.loads(path.read_text()).items():
        if settings.get(key) != before:
            raise UserError(f"{job.out} was begun with another {key} ({before}, now {settings.get(key)}): "
                            f"use another --out, or delete it")


def merge(job, parts):
    """The parts of all ranks, in order -> cutmix.jsonl and skipped.jsonl. Returns how many lines each has."""
    composites, skipped = 0, {}
    with complete(job.out / "cutmix.jsonl") as temporary, open(temporary, "w") as manifest:
        for part in parts:
            for line in part.read_text().splitlines(keepends=True):
                if line.startswith('{"skipped"'):
                    row = json.loads(line)
                    skipped.setdefault(row["skipped"], row["reason"])    # once, though tried --times times
                else:
                    composites += 1
                    manifest.write(line)
        with complete(job.out / "skipped.jsonl") as beside:     # before cutmix.jsonl, the sign of the end
            beside.write_text("".join(json.dumps({"file": file, "reason": reason}) + "\n"
                                      for file, reason in skipped.items()))
    return composites, len(skipped)


# ------------------------------------------------------------------------------------------------------------
# Sheets to look at

def sheet(rows, labels, titles, notes=None, mark=None):
    """Pictures in rows, a label left of each row, a title above each column, a note below each picture; and, with
    mark = (column, text), a red line left of that column."""
    zoom = max(1, 192 // rows[0][0].width)              # small pictures larger, pixel by pixel
    size, font = zoom * rows[0][0].width, ImageFont.load_default(size=13)
    left, top, step = 50, 44, size + (24 if notes else 6)
    picture = Image.new("RGB", (left + len(rows[0]) * (size + 6), top + len(rows) * step), "white")
    draw = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        draw.text((left - 8, top + r * step + size // 2), labels[r], "black", font, anchor="rm")
        for c, image in enumerate(row):
            x, y = left + c * (size + 6), top + r * step
            picture.paste(image.resize((size, size), Image.Resampling.NEAREST), (x, y))
            if notes:
                text = notes[r][c]
                while font.getlength(text) > size:
                    text = text[:-4] + "…"
                draw.text((x, y + size + 3), text, "black", font)
    for c, title in enumerate(titles):
        draw.text((left + c * (size + 6) + size // 2, top - 13), title, "black", font, anchor="mm")
    if mark:
        x = left + mark[0] * (size + 6) - 3
        draw.line([(x, 0), (x, picture.height)], "red", 3)
        draw.text((x - 6, 10), mark[1], "red", font, anchor="rm")
    return picture


def examples(job, setting, count):
    """`count` composites of one setting, spread over the data set -> [(PIL image, row)]. Raises UserError."""
    found, n = [], len(job.files)
    for k in range(4 * count):                          # a few more tries than needed: some photos may be broken
        picture, row = composite(job, (k % count * n // count + k // count) % n, setting)
        if picture:
            found.append((picture, row))
        if len(found) == count:
            return found
    raise UserError(f"{job.images}: too many broken photos, for example {row['skipped']} ({row['reason']})")


def preview(job, count=6):
    """Six examples of each setting, with the classes of base and second photo."""
    lines = [examples(job, setting, count) for setting in SETTINGS]
    notes = [[f"{row['base_class'] or row['base']} + {row['paste_class'] or row['paste']}" for _, row in line]
             for line in lines]
    return sheet([[image for image, _ in line] for line in lines], SETTINGS, [""] * count, notes)


def noise_strips(job, tau):
    """The paper's Fig. 7: each setting at t = 0, 0.1 ... 1, with a red line where t passes tau.

    gamma = 1 - t as in training. Training adds the noise to latents, one for 8 x 8 pixels; independent noise on
    every pixel would average out in the eye and leave the seams too clear, so here 8 x 8 pixels share theirs."""
    times, rows = [i / 10 for i in range(11)], []
    for k, setting in enumerate(SETTINGS):
        picture, _ = examples(job, setting, len(SETTINGS))[k]
        x = np.asarray(picture, np.float32) / 127.5 - 1
        eps = np.random.default_rng((job.seed, k, 2)).standard_normal((-(-job.size // 8), -(-job.size // 8), 3))
        eps = eps.repeat(8, axis=0).repeat(8, axis=1)[:job.size, :job.size]
        noisy = 127.5 + 127.5 * np.stack([np.sqrt(1 - t) * x + np.sqrt(t) * eps for t in times])
        rows.append([Image.fromarray(x_t) for x_t in noisy.round().clip(0, 255).astype(np.uint8)])
    column = next((c for c, t in enumerate(times) if t > tau), len(times))
    return sheet(rows, SETTINGS, [f"t = {t:g}" for t in times], mark=(column, f"tau = {tau:g}"))


# ------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("--images", required=True, metavar="FOLDER", help="photos: <class>/<file>, or all in one flat folder")
    add("--out", required=True, metavar="FOLDER", help="where the composites go")
    add("--setting", default="all", choices=[*SETTINGS, "all"], help="the share of the second photo")
    add("--size", type=int, default=256, help="side of a composite, in pixels")
    add("--times", type=int, default=1, help="composites that each photo is the base of")
    add("--seed", type=int, default=0, help="another seed, other partners and places")
    add("--workers", type=int, default=max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        help="processes; 0 works in this one")
    add("--preview", action="store_true", help="only draw OUT/preview.png, examples of each setting")
    add("--noise", action="store_true", help="only draw OUT/noise.png, each setting at t = 0, 0.1 ... 1")
    add("--tau", type=float, default=0.4, help="where --noise draws its line")
    args = parser.parse_args(argv)
    for name, low in (("size", 16), ("times", 1), ("seed", 0), ("workers", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {low}")
    out, images = Path(args.out), os.path.normpath(args.images)
    if out.resolve().is_relative_to(Path(images).resolve()):
        raise UserError(f"--out {out} lies inside --images: the next run would take composites for photos")
    rank, world = rank_and_world()

    files = list_images(images)
    starts = [i for i, file in enumerate(files)
              if i == 0 or "/" not in file or class_of(file) != class_of(files[i - 1])]
    if len(starts) == 1:
        raise UserError(f"{images}: one class only ({len(files)} images), and partners come from another class "
                        f"(give two or more class folders, or one flat folder of two or more images)")
    job = Job(images, out, np.array([os.fsencode(file) for file in files]), np.array(starts),
              args.setting, args.size, args.times, args.seed)
    del files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # Pillow's remarks on odd EXIF blocks, one a photo
        if args.preview or args.noise:
            for name in ["preview"] * args.preview + ["noise"] * args.noise:
                picture = preview(job) if name == "preview" else noise_strips(job, args.tau)
                with complete(out / f"{name}.png") as temporary:
                    picture.save(temporary, "PNG")
                print(f"{out / name}.png")
            return
        same_settings(job)
        count = len(job.files) * job.times
        parts = [part_file(job, folder) for folder in range(-(-count // A_FOLDER))]
        whole = set(os.listdir(out / "parts"))
        folders = [folder for folder in range(rank, len(parts), world) if parts[folder].name not in whole]
        todo = sum(min(count - folder * A_FOLDER, A_FOLDER) for folder in folders)
        with tqdm(total=todo, desc="cutmix", unit="img", disable=rank > 0) as bar:
            make(job, folders, args.workers, bar)
    # Ranks never wait: who finds all parts there, usually the last one, joins them (two would write the same)
    whole = set(os.listdir(out / "parts"))
    if not all(part.name in whole for part in parts):
        print(f"rank {rank}: its share is done; the last rank to end writes {out / 'cutmix.jsonl'}")
    elif folders or not (out / "cutmix.jsonl").exists():
        composites, skipped = merge(job, parts)
        print(f"{composites} composites in {out}, {skipped} photos skipped"
              + (f" (see {out / 'skipped.jsonl'})" if skipped else ""))
    else:
        print(f"{out}: complete already")


if __name__ == "__main__":
    command_line(main)
