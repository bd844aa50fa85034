"""What every stage shares: one line for a mistake, whole files, one way in and one way out.

In: `reading` turns whatever goes wrong with a user's file into one line that names it. Out:
`make_together` makes an output file by file, by any number of ranks, as often as it takes,
and refuses to mix two kinds of data in one. Beside them: images as they come, pictures to
look at, models from a folder or the hub. Torch is imported only where it is needed.
"""

import argparse
import collections
import contextlib
import errno
import fcntl
import functools
import hashlib
import html
import importlib.util
import itertools
import json
import math
import os
import stat
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

# --------------------------------------------------------------------------------------
# Mistakes

class UserError(Exception):
    """A mistake of the user's: a path, a number, a file. It is reported in one line."""


def command_line(main):
    """Run a stage's `main()`. A mistake becomes one line and exit code 2, and so do a failing
    file system, too little GPU memory and a lost rank.
    """
    # A terminal that cannot show a letter, and a file name that is no text, end no run.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, OSError) as error:
        end_with(one_line(error, 500))
    except RuntimeError as error:
        # By its name, because this file does without torch.
        if type(error).__name__ == "OutOfMemoryError":
            end_with(f"{one_line(error)} A smaller --batch-size (of train.py: --micro-batch, "
                     f"--checkpoint-activations) needs less")
        signs = ("gloo", "NCCL", "Connection", "peer")
        if rank_and_world()[1] == 1 or not any(sign in str(error) for sign in signs):
            raise
        end_with(f"another rank has ended, see its line, or is lost ({one_line(error)})")
    except KeyboardInterrupt:
        end_with("interrupted", 130)


def end_with(message, code=2):
    """End the program with a message in one line, and an exit code."""
    # The line of an open progress bar would be continued by the message.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()

    path = Path(sys.argv[0])
    name = path.parent.name if path.name == "__main__.py" else path.name
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(code)


def one_line(error, length=200):
    """Return an exception's message as one line of at most `length` characters."""
    text = str(error)
    # Python's own words would be "[Errno 2] No such file or directory: 'x'".
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split())[:length] or type(error).__name__


def end_quietly(kind, error, trace):
    """Show no traceback where Ctrl-C comes while a stage still imports torch."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = end_quietly


@contextlib.contextmanager
def reading(path, what):
    """Make whatever goes wrong while a file is read one line: "x: not COCO's captions (why)"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or one_line(error)}") from None
    except UserError:
        raise
    # Bytes of any kind: damaged, of another program, with text where a number should be.
    except Exception as error:  # noqa: BLE001
        kind = type(error).__name__
        why = f"no {error}" if kind == "KeyError" else f"{kind}: {one_line(error)}"
        raise UserError(f"{path}: not {what} ({lfs_pointer(path) or why})") from None


def lfs_pointer(path):
    """Return what to say of a file that is git-lfs's note of where its content is, else ""."""
    # A named pipe would be waited for for ever.
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        if not file.read(40).startswith(b"version https://git-lfs"):
            return ""
    return "a git-lfs pointer, not the file itself: git lfs pull fetches it"


# --------------------------------------------------------------------------------------
# Command lines

class Options(argparse.ArgumentParser):
    """A command's options: its docstring and the defaults in --help, a mistake in one line."""

    def __init__(self, description=None, **more):
        # The docstring as it is written.
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def add(self, name, meaning, default=None, kind=str, **more):
        """Add an option; `kind` makes a value of its text."""
        if default not in (None, "", []):
            meaning += " (default: %(default)s)"
        self.add_argument(name, help=meaning, default=default, type=kind, **more)

    def flag(self, name, meaning):
        self.add_argument(name, help=meaning, action="store_true")

    def error(self, message):
        raise UserError(message)


def number(kind, low, high=10 ** 9):
    """Return what turns an option's text into an int or float from `low` to `high`, not NaN."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            bound = f"at most {high}" if value > high else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text}: must be {bound}")
        return value
    # argparse names it where the text is no number at all.
    convert.__name__ = "whole number" if kind is int else "number"
    return convert


# Of options that several commands have.
COUNT = number(int, 1)
SEED = number(int, 0, 2 ** 62)
BATCH_SIZE = number(int, 1, 10_000)
THREADS = number(int, 0, 1024)


def keep_apart(out, *inputs):
    """Raise UserError if an output is an input, or lies in one (None: one that was not given)."""
    place = Path(out).resolve()
    for given in inputs:
        if given and place.is_relative_to(Path(given).resolve()):
            raise UserError(f"--out {out}: is {given} or lies in it, and that is an input: "
                            f"choose another")


# --------------------------------------------------------------------------------------
# Ranks, threads, devices

def rank_and_world():
    """Return (rank, number of ranks) as torchrun sets them, (0, 1) without. Raises UserError."""
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(f"RANK {rank}, WORLD_SIZE {world} in the environment: not a rank below "
                        f"their number")
    return int(rank), int(world)


def default_workers():
    """Return the number of threads that read for a rank: its part of the machine's cores."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Cores that this process may use: a container may have fewer than the machine.
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return max(1, cores // ranks_here)


def ahead(function, items, threads):
    """Yield function(item) for all items, in order, while threads compute those that come next.

    At most 2 x threads results wait to be taken. Without threads, each is computed when asked for.
    """
    if not threads:
        yield from map(function, items)
        return
    waiting = collections.deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def progress(items, total, unit, title=None):
    """Yield the items of an iterable under a progress bar, which rank 0 alone shows."""
    with tqdm(total=total, unit=unit, desc=title, disable=rank_and_world()[0] > 0) as bar:
        for item in items:
            bar.update()
            yield item


def in_batches(items, size):
    """Return a list as a list of lists of `size` items; the last one may be shorter."""
    return [items[start:start + size] for start in range(0, len(items), size)]


def local_device():
    """Return this process's device: the GPU of its rank on this node, or the CPU."""
    import torch
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if rank >= count:
        raise UserError(f"rank {rank} of this node has no GPU: there are {count} "
                        f"(torchrun --nproc-per-node {count})")
    return torch.device("cuda", rank)


# --------------------------------------------------------------------------------------
# Whole files

@contextlib.contextmanager
def complete(path):
    """Yield a temporary path to write to, and rename it when its bytes are on the disk.

    Its name is the same at the next attempt (and another for each rank): running the same
    command again clears away what a kill left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{rank_and_world()[0]}.tmp")
    try:
        with naming(path):
            yield temporary
            # A crash of the machine may leave an empty file. (It may be a folder: no open().)
            descriptor = os.open(temporary, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            os.replace(temporary, path)
    finally:
        # Only what failed is still there, and its error is the one to report.
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def naming(path):
    """Give an OSError that names no file this one, and Pillow's a reason: which disk is full?"""
    try:
        yield
    except OSError as error:
        why = error.strerror or f"cannot be written ({one_line(error)})"
        raise OSError(error.errno or errno.EIO, why, error.filename or str(path)) from error


def write_file(path, content):
    """Write bytes to a file."""
    with complete(path) as temporary:
        temporary.write_bytes(content)


def read_json(path, what):
    """Return the object in a JSON file. Raises UserError: "path: not WHAT (why)"."""
    with reading(path, what):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    return value


def write_json(path, value):
    """Write an object to a JSON file."""
    write_file(path, f"{json.dumps(value, indent=1)}\n".encode())


def read_jsonl(path):
    """Return the objects of a JSONL file, one a line.

    A last line without its newline was torn by a kill and is left out. Raises UserError.
    """
    rows = []
    # Bytes, because a torn line may end inside a character, and lines end at \n only.
    with reading(path, "JSONL"), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                # Editors put a mark (BOM) before the first line.
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    print(f"{path}: its last line is torn, and left out", file=sys.stderr)
                    break
                why = lfs_pointer(path) or getattr(error, "msg", error)
                raise UserError(f"{path} line {number}: not JSON ({why})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number}: not a JSON object")
            rows.append(row)
    return rows


def write_jsonl(path, rows):
    """Write objects to a JSONL file."""
    write_file(path, jsonl(rows).encode())


def jsonl(rows):
    """Return objects as lines of JSON, in ASCII: even a file name that is not UTF-8 survives."""
    return "".join(json.dumps(row) + "\n" for row in rows)


@functools.cache
def sha256(path):
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(rows, weights=()):
    """Return 16 hexadecimal digits that tell lists of JSON values, and networks, apart.

    weights: (name, tensor) of a network.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode())
    # The first values will do: whoever trains a network further changes all of its tensors.
    for name, tensor in weights:
        digest.update(f"{name} {tensor.flatten()[:256].tolist()}".encode())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------
# An output that is made of files

@contextlib.contextmanager
def only_command(folder):
    """Keep a folder for this command (this rank of it). Raises UserError if another has it.

    The system frees it at the end, also after kill -9. It is a record lock, because a fork
    does not inherit that: processes that outlive a killed command hold nothing.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".lock.{rank_and_world()[0]}"
    with open(path, "w") as file:
        taken = False
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # It may also be a file system without locks.
            taken = isinstance(error, (BlockingIOError, PermissionError))
        # One that has just ended may have removed the file that was opened here.
        if taken or os.fstat(file.fileno()).st_nlink == 0:
            raise UserError(f"{folder}: another command is writing to it; wait for its end, or "
                            f"choose another --out")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            # A command that made nothing leaves nothing.
            with contextlib.suppress(OSError):
                folder.rmdir()


def refuse_other_settings(output, before, now):
    """Raise UserError if an output was begun with other settings, {name: value}."""
    for key in {**before, **now}:
        old = before.get(key)
        new = now.get(key)
        # Of a table, name the line that has changed.
        if isinstance(old, dict) and isinstance(new, dict):
            refuse_other_settings(output, old, new)
        elif old != new:
            change = f"{key.replace('_', ' ')} {shorten(old)}, now {shorten(new)}"
            raise UserError(f"{output}: begun with other settings ({change}): use the same, "
                            f"or another --out, or delete it")


def refuse_to_replace(path):
    """Raise UserError for somebody else's file in the place of a command's own."""
    raise UserError(f"{path}: not made by this command, which would replace it: choose another "
                    f"--out")


def shorten(value):
    """Return a value as text, cut after 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def has_content(path):
    """Tell whether a file is there. An empty one is what a crashed or full disk left."""
    return path.is_file() and path.stat().st_size > 0


def make_together(out, settings, units, make, is_whole=has_content, products=()):
    """Make this rank's share of the files of an output that are not there yet.

    out: its folder. settings: all that its files depend on, as JSON has it (no tuples); they
    bind from the first file on. units: {name of a file in `out`: what it is made from}.
    make([what, ...]) yields the bytes of these files in the same order, so it may read ahead.
    is_whole(path) tells whether a file need not be made. products: paths of what the caller
    writes in the end. Files of these names without settings.json are somebody else's.

    Returns whether all files are there now. If so, it is for this rank, which ended last, to
    describe them (or for two that end together, who then write the same). Ranks never wait for
    each other, and their number may be another one next time. Raises UserError.
    """
    out = Path(out)
    rank, world = rank_and_world()
    record = out / "settings.json"
    with only_command(out):
        missing = {name for name in units if not is_whole(out / name)}
        # Before settings.json is looked for, which another rank may be writing just now: it does
        # so before its first file.
        named = [*products, *(out / name for name in units)]
        found = next(filter(os.path.lexists, named), None)
        if record.exists():
            before = read_json(record, "the settings of this output")
            refuse_other_settings(out, before, settings)
        elif found:
            refuse_to_replace(found)

        # Of all files, not of the missing ones: ranks need not look at the same time.
        mine = [name for name in list(units)[rank::world] if name in missing]
        # Left by a killed command that had another number of ranks.
        for path in out.rglob(".*.tmp"):
            if str(path.relative_to(out).with_name(path.name[1:].rsplit(".", 2)[0])) in mine:
                path.unlink()
        made = make([units[name] for name in mine]) if mine else ()
        for name, content in zip(mine, made, strict=True):
            # Only now: a command that fails before leaves nothing.
            if not record.exists():
                write_json(record, settings)
            write_file(out / name, content)
    whole = all(is_whole(out / name) for name in missing)
    if not whole:
        print(f"rank {rank}: its share is done; the rank that ends last completes {out}")
    return whole


def make_rows(out, settings, units, rows_of, products=()):
    """Make JSONL files, as `make_together` makes files, and return whether all are there now.

    units: {name of a file: items}. rows_of([items, ...]) yields a row for each item of the files
    that are missing, in order, so that it may read ahead.
    """
    def make(parts):
        rows = progress(rows_of(parts), sum(map(len, parts)), "row")
        for part in parts:
            yield jsonl(itertools.islice(rows, len(part))).encode()

    return make_together(out, settings, units, make, products=products)


def join_rows(folder, units, product, skipped):
    """Join JSONL files of a folder to `product`, but rows {"file", "reason"} to `skipped`.

    Others may hold a "reason" of somebody's own. Raises UserError if there are none in `product`.
    """
    good, bad = [], []
    for name in units:
        for row in read_jsonl(folder / name):
            (bad if row.keys() == {"file", "reason"} else good).append(row)
    if not good:
        refuse_nothing(folder, units, product, bad)

    # The product is the sign that all is done, so it comes last.
    write_jsonl(skipped, bad)
    write_jsonl(product, good)
    print(f"{len(good)} rows in {product}, {len(bad)} skipped (named in {skipped})")


def refuse_nothing(folder, units, product, skipped):
    """Raise UserError: all files were skipped. What `make_together` made goes, for another try."""
    for name in (*units, "settings.json"):
        (folder / name).unlink(missing_ok=True)
    raise UserError(f"{product}: nothing could be made of {len(skipped)} files; the first: "
                    f"{skipped[0]['file']}: {skipped[0]['reason']}")


# --------------------------------------------------------------------------------------
# Images

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def list_images(folder):
    """Return all images below `folder`, as sorted paths relative to it with forward slashes.

    Only names are read, no file is opened. Hidden files and folders are passed over. Raises
    UserError if there are none, OSError if there is no such folder.
    """
    files = []

    def walk(here, prefix, above):
        """List one folder; `above` are the folders that are being walked, as links resolve."""
        this = os.path.realpath(here)
        # A link may lead back up: its photos would be listed again and again.
        if this in above:
            return
        for entry in os.scandir(here):
            if entry.name.startswith("."):
                continue
            # Of a link that leads to itself, is_dir() fails.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                walk(entry.path, f"{prefix}{entry.name}/", {*above, this})
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                files.append(prefix + entry.name)

    walk(str(folder), "", set())
    if not files:
        raise UserError(f"{folder}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)})")
    return sorted(files)


def rgb(image):
    """Return a PIL image in RGB, itself if it is RGB already: a copy takes time."""
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(path, size):
    """Return any image file as an upright RGB PIL image.

    Its shorter side is at least `size` if the file has as much. Understands grey, CMYK, palette,
    16-bit, alpha (put on white) and EXIF rotation. Raises OSError with `filename` and `strerror`.
    """
    being_opened.path = path
    try:
        # A named pipe would be waited for for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with Image.open(path) as image:
            # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size: cheaper than shrinking it.
            image.draft(None, (size, size))
            image.load()
            # A damaged EXIF block does not spoil the pixels.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            # 16-bit grey, which convert() would clip at 255. Older Pillow calls PNG's "I".
            is_png = image.format == "PNG"
            if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
                levels = np.asarray(image)
                # 8 to 12 bits in 16: little but black would be left.
                if 0 < levels.max() < 4096:
                    raise ValueError("16 bits a pixel, none above 4095: which number is white "
                                     "is not known")
                image = Image.fromarray((levels // 256).astype(np.uint8))
            # Is 1 white, or 255, or the largest number in it?
            if image.mode in ("I", "F"):
                raise ValueError("32 bits a pixel: which number is white is not known")
            # Alpha, or a transparent palette entry or key colour.
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return rgb(image)
    # Pillow raises almost any exception on broken bytes.
    except Exception as error:  # noqa: BLE001
        # Pillow's messages often name the path.
        words = one_line(error).replace(repr(str(path)), "").strip()
        reason = lfs_pointer(path) or getattr(error, "strerror", None) or words
        raise OSError(errno.EIO, f"not a readable image ({reason})", str(path)) from None
    finally:
        being_opened.path = None


# Pillow remarks on odd files without saying which. Each thread remembers what it opens.
being_opened = threading.local()
format_warning = warnings.formatwarning


def name_the_image(message, *where):
    """Return a warning in one line with the name of the image that is being opened, if any."""
    path = getattr(being_opened, "path", None)
    return f"{path}: {one_line(message)}\n" if path else format_warning(message, *where)


warnings.formatwarning = name_the_image


def resize_and_crop(image, size, part=None, resample=Image.Resampling.LANCZOS):
    """Return a PIL image as size x size pixels: shorter side to `size`, then centre crop.

    `part` (x0, y0, x1, y1), in pixels of the result, computes only this box of it.
    """
    side = min(image.size)
    # The crop begins at a whole pixel: no blur where nothing is scaled.
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    x0, y0, x1, y1 = part or (0, 0, size, size)
    box = (left + x0 * side / size,
           top + y0 * side / size,
           left + x1 * side / size,
           top + y1 * side / size)
    if side < size:
        resample = Image.Resampling.BICUBIC
    return image.resize((x1 - x0, y1 - y0), resample, box=box)


def load_image(path, size):
    """Return an image file as size x size RGB pixels, a PIL image. Raises OSError."""
    # Decoded at twice the size, because JPEG decoders average crudely when they shrink.
    return resize_and_crop(open_image(path, 2 * size), size)


# --------------------------------------------------------------------------------------
# Pictures to look at

def contact_sheet(images, captions=None, columns=None, gap=4, lines=3):
    """Return PIL images of one size as a grid, each above the first `lines` lines of its caption.

    Without `columns`, the grid is square.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    width = max(width, 96) if captions else width
    text_height = 12 * lines if captions else 0
    step_x = width + gap
    step_y = height + text_height + gap
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x = gap + column * step_x
        y = gap + row * step_y
        sheet.paste(image, (x + (width - image.width) // 2, y))
        if captions:
            text = textwrap.wrap(captions[i], width // 6)[:lines]        # 6 pixels a letter
            pen.multiline_text((x, y + height), "\n".join(text), fill="black", spacing=1)
    return sheet


def save_png(image, path):
    """Save a PIL image as PNG."""
    with complete(path) as temporary:
        image.save(temporary, "PNG")


def line_chart(curves, x_label, y_label, log=False):
    """Return curves {name: [(x, y), ...]} as an SVG picture, for a page or a file alone.

    `log` makes the y axis logarithmic. Points that have no place on the axes are left out.
    """
    height_of = math.log10 if log else float
    drawn = {}
    for name, points in curves.items():
        drawn[name] = [(x, height_of(y)) for x, y in points
                       if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)]
    corners = list(itertools.chain(*drawn.values())) or [(0, 1)]
    xs, ys = map(axis, zip(*corners))
    width, height = 720, 300
    left, right, top, bottom = 72, width - 16, 12, height - 42

    def place(x, y):
        across = np.interp(x, [xs[0], xs[-1]], [left, right])
        up = np.interp(y, [ys[0], ys[-1]], [bottom, top])
        return f"{across:.1f},{up:.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
             f'height="{height}" font-family="sans-serif" font-size="11">',
             '<rect width="100%" height="100%" fill="white"/>']

    def write(place, words, more='text-anchor="middle"'):
        words = html.escape(words)
        parts.append(f'<text transform="translate({place})" {more}>{words}</text>')

    # Numbers along both axes, and a thin line across the picture at each height.
    for x in xs:
        write(place(x, ys[0]), f"{x:.4g}", 'dy="16" text-anchor="middle"')
    for y in ys:
        line = f"{place(xs[0], y)} {place(xs[-1], y)}"
        parts.append(f'<polyline points="{line}" stroke="#ddd"/>')
        value = 10 ** y if log else y
        write(place(xs[0], y), f"{value:.3g}", 'dx="-6" dy="4" text-anchor="end"')
    write(f"{(left + right) / 2},{height - 8}", x_label)
    write(f"14,{(top + bottom) / 2}) rotate(-90", y_label)

    # The curves, and a legend in the upper right corner.
    for k, (name, points) in enumerate(drawn.items()):
        color = f"hsl({360 * k // len(drawn)} 75% 40%)"
        line = " ".join(place(x, y) for x, y in points)
        # Round ends make a dot of a line without length.
        is_dot = len(points) == 1
        parts.append(f'<polyline points="{line} {line if is_dot else ""}" fill="none" '
                     f'stroke="{color}" stroke-width="{6 if is_dot else 2}" '
                     f'stroke-linecap="round"/>')
        write(f"{right - 4},{top + 12 + 14 * k}", name, f'text-anchor="end" fill="{color}"')
    return "\n".join([*parts, "</svg>"])


def axis(values):
    """Return round numbers, equally far apart, between the ends of which all values lie."""
    low, high = min(values), max(values)
    if low == high:
        margin = 0.5 * abs(high) or 1.0
        low, high = low - margin, high + margin
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(k * power for k in (1, 2, 5, 10) if (high - low) / (k * power) <= 6)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


# --------------------------------------------------------------------------------------
# Models, from a folder or from the Hugging Face hub

def fetch(path_or_repo, *names):
    """Return the path of the first of `names` in a local folder or in a hub repository.

    The hub is asked only where there is no such folder, and then for a copy. Raises UserError.
    """
    folder = Path(path_or_repo)
    for name in names:
        if (folder / name).is_file():
            # A tokenizer that is one would be passed over in silence.
            for path in sorted(folder.iterdir()):
                if lfs_pointer(path):
                    raise UserError(f"{path}: {lfs_pointer(path)}")
            return folder / name

    # "out/dit" beside an existing "out" is a mistyped path, not a repository.
    mistyped = folder.parent != Path(".") and folder.parent.exists()
    if folder.exists() or mistyped:
        raise UserError(f"{folder}: no such folder, or no {' or '.join(names)} in it")

    import huggingface_hub as hub
    repo = str(path_or_repo)
    # What was downloaded before needs no network.
    for name in names:
        with contextlib.suppress(Exception):
            return Path(hub.hf_hub_download(repo, name, local_files_only=True))

    # No such repository, a licence to accept, no network, ...
    try:
        # Asked once: without a network, a download would try again and again.
        hub.get_session().head(hub.constants.ENDPOINT, timeout=10)
        for name in names:
            with contextlib.suppress(hub.errors.RemoteEntryNotFoundError):
                return Path(hub.hf_hub_download(repo, name))
        raise LookupError(f"no {' or '.join(names)} in it")
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{repo}: no such folder, and not on the hub ({one_line(error)})")


def weights_hash(name):
    """Return the sha256 of the weights of a model folder or hub id (or of their index)."""
    return sha256(fetch(name, "model.safetensors", "pytorch_model.bin",
                        "model.safetensors.index.json"))


def pretrained(name, kind, companion=None, device=None, **options):
    """Return (model, companion) of a folder or hub id, the model in eval mode on a device.

    kind: a class of transformers; companion: that of its tokenizer or processor, None for none.
    device: without, this process's. options: of the model's `from_pretrained`. Raises UserError.
    """
    import transformers
    from transformers.utils import logging
    # transformers would print up to 79 lines of its own above ours.
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()

    # Another kind of model may have weights of the same names, and some more.
    found = read_json(fetch(name, "config.json"), "a configuration").get("model_type")
    # An Auto class takes any.
    config_class = getattr(getattr(transformers, kind), "config_class", None)
    wanted = getattr(config_class, "model_type", found)
    # mT5's encoder is T5's.
    if found not in (None, wanted) and (found, wanted) != ("mt5", "t5"):
        raise UserError(f"{name}: not {wanted}, but {found}")
    try:
        model, report = getattr(transformers, kind).from_pretrained(
            name, output_loading_info=True, **options)
        companion = companion and getattr(transformers, companion).from_pretrained(name)
    # transformers raises almost any exception if the folder is wrong.
    except Exception as error:  # noqa: BLE001
        hint = needs_sentencepiece(name) or one_line(error)
        raise UserError(f"{name}: does not load as {kind} ({hint})") from None
    # What the file lacks, transformers fills with random numbers.
    lacking = sorted(dict(model.named_parameters()).keys() & report["missing_keys"])
    if lacking:
        raise UserError(f"{name}: not the weights of a {type(model).__name__} ({len(lacking)} "
                        f"are missing, {lacking[0]} first)")
    if companion:
        refuse_strange_tokenizer(name, getattr(companion, "tokenizer", companion), model.config)
    model = model.eval().requires_grad_(False).to(device or local_device())
    refuse_not_finite(name, model.named_parameters())
    return model, companion


def refuse_not_finite(path, weights):
    """Raise UserError if one of a network's weights, (name, tensor), is not finite."""
    import torch
    for name, tensor in weights:
        # NaN and infinity survive a sum, the cheapest look at all numbers.
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise UserError(f"{path}: {name} is not finite")


def needs_sentencepiece(name):
    """Return what to do where a folder's tokenizer is of a package that is missing, or ""."""
    files = {path.name for path in Path(name).glob("*")}
    of_sentencepiece = {"spiece.model", "tokenizer.model"} & files
    is_there = "tokenizer.json" in files or importlib.util.find_spec("sentencepiece")
    if is_there or not of_sentencepiece:
        return ""
    return "its tokenizer needs pip install sentencepiece, or a tokenizer.json beside it"


def refuse_strange_tokenizer(name, tokenizer, config):
    """Raise UserError if a tokenizer is not the model's own."""
    # Without its files, transformers invents one of some hundred words, and says nothing.
    vocabulary = getattr(config.get_text_config(), "vocab_size", 0)
    tokens = tokenizer("The image shows a photo of a red dog and an apple.").input_ids
    # The invented one knows the space before each word, and no letter.
    known = tokenizer.convert_ids_to_tokens(tokens, skip_special_tokens=True)
    knows_english = any(letter.isalpha() for letter in "".join(known))
    fits = vocabulary / 2 <= len(tokenizer) and max(tokens) < vocabulary
    if vocabulary and not (fits and knows_english):
        hint = needs_sentencepiece(name) or "are its tokenizer's files missing?"
        raise UserError(f"{name}: a tokenizer of {len(tokenizer)} words for a model of "
                        f"{vocabulary}: {hint}")
