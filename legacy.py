"""What every stage shares and no stage is about: errors, files, ranks, images, the hub.

Every stage promises its user the same things. A mistake ends in one line, not in a
traceback. A file that bears its final name is whole. A killed command goes on when it is
started again, and refuses to mix two kinds of data in one output. Several processes share
the work, and but for training they need not talk to each other. This file keeps those
promises in one place, and draws the pictures that people look at. It imports no stage, and
torch only where it is needed: cutmix.py works without, and its many worker processes stay
small.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


# --------------------------------------------------------------------------------------
# Errors and command lines

from common import UserError, complete, one_line, only_command, open_image, read_json, read_jsonl, rank_and_world, shorten, refuse_other_settings, write_jsonl, close_progress_bars, default_workers, local_device, autocast  # noqa


def program_name():
    return Path(sys.argv[0]).name














def at_least(args, **bounds):
    """Check options against lower bounds: `at_least(args, steps=1)`.

    An option that this command does not have, or that was not given (None), passes.
    Raises UserError.
    """
    for name, low in bounds.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        if not value >= low or not math.isfinite(value):
            raise UserError(f"{option(name)} {value}: must be at least {low}")


def between(args, low, high, *names):
    """Check that options lie in [low, high]; NaN does not. Raises UserError."""
    for name in names:
        value = getattr(args, name)
        if not low <= value <= high:
            raise UserError(f"{option(name)} {value}: must be in [{low}, {high}]")


def option(name):
    """Return the command-line option that sets `args.name`: "batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------
# Complete files



@contextlib.contextmanager
def errors_name(path):
    """Give an OSError that names no file the name of this one.

    "No space left on device" alone does not tell the user which disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush_to_disk(path):
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)








def append_jsonl(path, rows):
    """Add objects to the end of a JSONL file."""
    lines = [json.dumps(row) + "\n" for row in rows]
    with errors_name(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(lines)


@functools.cache
def sha256(path):
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------
# Captions of images

def read_captions(path):
    """Return {file: caption}; every file is a path below the folder of images.

    The suffix tells the format. JSONL and CSV name the image `file`, as caption.py does,
    or `image_path`, as the captions do that the paper's authors have published. CSV begins
    with a line that names its columns. A `.tsv` is what the authors' captioner writes:
    file, tab, caption, and no such line. Theirs leave out an image's folder.

    Raises UserError: a line without file or caption, a file with two captions.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".tsv":
        rows = read_tsv_captions(path)
    elif suffix == ".csv":
        rows = read_csv_captions(path)
    elif suffix == ".parquet":
        raise UserError(f"{path}: Parquet is not read here; save it as JSONL or CSV, for "
                        'instance with load_dataset(...).to_json("captions.jsonl")')
    else:
        rows = read_jsonl(path)

    captions = {}
    for number, row in enumerate(rows, 1):
        file = row.get("file", row.get("image_path"))
        caption = row.get("caption")
        both_are_text = isinstance(file, str) and isinstance(caption, str)
        if not (both_are_text and file and caption):
            raise UserError(f"{path}, caption {number}: needs a file and a caption")
        if captions.setdefault(file, caption) != caption:
            raise UserError(f"{path}, caption {number}: {file} had another caption before (a "
                            "name in two folders? then the captions must name the folder too)")
    return captions


def read_tsv_captions(path):
    """Return the lines "file<TAB>caption" as dicts. Raises UserError if not UTF-8."""
    rows = []
    try:
        with open(path, encoding="utf-8", newline="\n") as lines:
            for line in lines:
                torn_by_a_kill = "\t" not in line and not line.endswith("\n")
                if torn_by_a_kill:
                    break
                file, _, caption = line.partition("\t")
                rows.append({"file": file, "caption": caption.strip()})
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    return rows


def read_csv_captions(path):
    """Return the rows of a CSV file as dicts, keyed by the names in its first line.

    Raises UserError if it is not UTF-8, not CSV, or has no columns of files and captions.
    """
    try:
        # Spreadsheets begin UTF-8 with an invisible mark (BOM), which "utf-8-sig" removes.
        with open(path, encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            columns = reader.fieldnames or []
            if "caption" not in columns or not {"file", "image_path"} & set(columns):
                raise UserError(f"{path}: its first line must name the columns file (or "
                                "image_path) and caption, and is "
                                f"{shorten(', '.join(columns) or 'empty')}")
            return list(reader)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except csv.Error as error:
        line = reader.reader.line_num
        raise UserError(f"{path} line {line}: not CSV ({error})") from None


# --------------------------------------------------------------------------------------
# An output belongs to the settings it was begun with





def begin_or_resume(path, output, settings):
    """Remember in the file `path` which settings `output` is made with.

    Where the file exists already, check its settings instead. Raises UserError if they differ.
    """
    path = Path(path)
    # As JSON gives it back: a tuple becomes a list, a number as a key becomes a string.
    settings = json.loads(json.dumps(settings))
    if path.exists():
        before = read_json(path, "the settings of an output")
        refuse_other_settings(output, before, settings)
    else:
        with complete(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")










# --------------------------------------------------------------------------------------
# Texts of a batch

def pad_text(tokens, lengths, length):
    """Return text (B, length, D), zero behind each caption, and its mask (B, length) bool.

    tokens (sum of L_i, D) are all captions one after the other, lengths (B,) those L_i.
    """
    import torch
    start = lengths.cumsum(0) - lengths                                  # (B,)
    position = torch.arange(length, device=tokens.device)                # (length,)
    mask = position < lengths[:, None]                                   # (B, length)
    index = (start[:, None] + position).clamp(max=len(tokens) - 1)       # (B, length)
    return tokens[index] * mask[:, :, None], mask


def padded_length(lengths):
    """Return the length of the longest caption, rounded up to a multiple of 32.

    torch.compile makes a version of the network for each length: eight for up to 256 tokens.
    """
    return 32 * math.ceil(int(lengths.max()) / 32)


# --------------------------------------------------------------------------------------
# Ranks and devices



def is_last_rank(rank, paths, product):
    """Tell whether all of `paths` exist, so that this rank has to make `product` of them.

    Ranks never wait for each other. Each makes its share and then looks whether the others'
    shares are there; only the last one to end finds them all.
    """
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        print(f"rank {rank}: its share is done; the last rank to end writes {product}")
    return not missing








# Dense bfloat16 multiplications and additions a second, from the makers' data sheets. The first
# name that is part of the card's own name counts.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device, precision):
    """Return a device's peak in FLOP/s, and in words what it was taken from.

    Cards in PEAK_FLOPS have their maker's figure. Of any other device, a large matrix product
    is timed in the precision that `autocast` takes for `precision`.
    """
    import torch
    from torch.utils.benchmark import Timer
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        for name, peak in PEAK_FLOPS.items():
            if name in card and precision != "fp32":
                return peak, f"the peak of {name}"
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device)
    with autocast(device, precision):
        # A product has the precision that it is made in: then nothing but products is timed.
        a = a @ a
        timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
        seconds = timer.timeit(5).mean
    return 2 * n ** 3 / seconds, f"a {n} x {n} matrix product"


def compile_blocks(model, dynamic=None):
    """Let torch.compile translate a network: the captions' part, then block by block.

    Equal blocks are translated only once. And DDP sends a gradient as soon as it is there:
    those of a compiled block are sent while the backward pass goes on below it. A network
    compiled as a whole hands over all of them at its end, and torch's way of splitting it for
    DDP knows neither activation checkpoints nor CAD's first pass without gradients.

    dynamic: False makes one version for each batch size and length of text; None, torch's
    default, makes a version for all of them when the second one comes.
    """
    import torch
    from torch._inductor.async_compile import AsyncCompile
    # If a signal to the whole job ended torch's compiler processes, the step would wait for ever.
    with signals_wait():
        AsyncCompile.warm_pool()
    # Blocks are small enough for DDP: torch need not cut them up once more.
    torch._dynamo.config.optimize_ddp = False
    # One version for each length of text, with and without gradients.
    torch._dynamo.config.recompile_limit = 64
    model.condition = torch.compile(model.condition, dynamic=dynamic)
    for block in model.blocks:
        block.compile(dynamic=dynamic)


# --------------------------------------------------------------------------------------
# Long runs of several processes: signals, ranks that fail

class StopRequest:
    """Remembers that SIGTERM or Ctrl-C came, so that the step in hand is finished first.

    Use it as a context; `name` is "" until a signal comes. A second signal changes nothing:
    torchrun passes on to its ranks those that they got already. Before `worth_saving` is set
    to True, a signal ends the program: a long start must not be waited for.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.name = ""
        self.worth_saving = False

    def __enter__(self):
        self.before = [signal.signal(number, self.receive) for number in self.SIGNALS]
        return self

    def __exit__(self, *error):
        for number, handler in zip(self.SIGNALS, self.before):
            signal.signal(number, handler)

    def receive(self, number, frame):
        self.name = signal.Signals(number).name
        # `signals_wait` holds back a signal to this thread, but it may have reached another one.
        held = number in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        if self.worth_saving or held:
            return
        if rank_and_world()[0] == 0:
            close_progress_bars()
            print(f"{program_name()}: stopped by {self.name} before its first step, nothing to save")
        sys.exit(0)


@contextlib.contextmanager
def signals_wait():
    """Hold signals back until the block ends. Processes that are started in it never receive them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers(iterator):
    """End the workers of a DataLoader's iterator, also where an error's traceback still holds it.

    Otherwise they would only be ended when Python exits, by a signal that they do not receive.
    """
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down:
        shut_down()
        # One that does not answer would keep the program from ending, too.
        for worker in iterator._workers:
            worker.kill()


def on_any_rank(flag, world):
    """Tell whether `flag` is true on any rank. The ranks' CPUs talk; no GPU is waited for."""
    if world == 1:
        return flag
    import torch
    vote = torch.tensor(float(flag))
    torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX)
    return bool(vote)


@contextlib.contextmanager
def report_lost_rank(rank, world):
    """Raise UserError, one line, for the errors of a rank whose partner or data worker is gone."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise UserError(f"a process that reads data has ended ({one_line(error, 80)}): was there "
                            f"too little memory? Fewer --workers need less") from None
        if "DataLoader timed out" in str(error):
            raise UserError(f"{one_line(error)}: is /dev/shm full? A container needs more of it than "
                            f"64 MB (docker run --shm-size 16g), or --workers 0") from None
        signs = ("Connection", "gloo", "NCCL", "peer")
        if world == 1 or not any(sign in str(error) for sign in signs):
            raise
        raise UserError(f"rank {rank}: another rank has ended, see its line, or cannot be reached "
                        f"({one_line(error, 300)})") from None


# --------------------------------------------------------------------------------------
# Images

def list_images(folder):
    """Return all images below `folder`, as sorted paths relative to it with forward slashes.

    Only names are read, no file is opened. Hidden files and folders are passed over.
    Raises UserError.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    files = []
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(here, folder).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES and not name.startswith("."):
                files.append(prefix + name)
    if not files:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{folder}: no images in it (looked for {known})")
    return sorted(files)


def class_of(file):
    """Return the class of an image, its first folder: "n02099601/7.JPEG" -> "n02099601".

    An image that is in no folder has the class "".
    """
    folder, slash, _ = file.partition("/")
    return folder if slash else ""


def load_ahead(folder, parts, load, skipped):
    """Yield for each part, a list of files, [(file, load(path))] while threads load the next.

    An image that cannot be read is left out, and put into `skipped` as {file: reason}.
    """
    from concurrent.futures import ThreadPoolExecutor

    def attempt(file):
        try:
            return load(Path(folder, file))
        except OSError as error:
            skipped[file] = str(error)
            return None

    loading = {}
    with ThreadPoolExecutor(default_workers()) as pool:
        for number, part in enumerate(tqdm(parts, disable=len(parts) < 3)):
            # This part, where it is the first one, and the two after it.
            for ahead in range(number, min(number + 3, len(parts))):
                if ahead not in loading:
                    loading[ahead] = pool.map(attempt, parts[ahead])
            images = list(loading.pop(number))
            yield [(file, image) for file, image in zip(part, images) if image is not None]


def report_skipped(folder, skipped, total):
    """Name unreadable images, {file: reason}, in the folder's skipped.jsonl and on stderr.

    Raises UserError if they are all `total` images.
    """
    if not skipped:
        return
    first = skipped[min(skipped)]
    if len(skipped) == total:
        raise UserError(f"{folder}: none of its {total} images is readable; the first: {first}")
    close_progress_bars()
    print(f"{program_name()}: skipped {len(skipped)} of {total} images in {folder}, see its "
          f"skipped.jsonl; the first: {first}", file=sys.stderr)
    # The folder may be read-only.
    with contextlib.suppress(OSError):
        rows = [{"file": file, "error": skipped[file]} for file in sorted(skipped)]
        write_jsonl(Path(folder, "skipped.jsonl"), rows)


def rgb(image):
    """Return a PIL image in RGB. It is not copied if it is RGB already, which saves time."""
    return image if image.mode == "RGB" else image.convert("RGB")




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


def to_images(pixels):
    """Return PIL images for pixels (B, 3, H, W) in about [-1, 1]."""
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte()
    arrays = levels.permute(0, 2, 3, 1).cpu().numpy()                     # (B, H, W, 3)
    return [Image.fromarray(array) for array in arrays]


# --------------------------------------------------------------------------------------
# Pictures to look at

def contact_sheet(images, captions=None, columns=None, gap=4, lines=3):
    """Return PIL images of one size as a grid, each with the start of its caption below.

    The grid is square unless `columns` says otherwise. Of each caption, `lines` lines are shown.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    text_height = 0
    if captions:
        width = max(width, 96)
        text_height = 12 * lines
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
            text = wrap_text(captions[i], width, pen)[:lines]
            pen.multiline_text((x, y + height), "\n".join(text), fill="black", spacing=1)
    return sheet


def wrap_text(text, width, pen):
    """Return a text as lines that are at most `width` pixels wide when `pen` draws them."""
    lines = [""]
    for word in text.split():
        if pen.textlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def labelled_grid(rows, row_titles, column_titles=(), cell=192):
    """Return rows of PIL images as one picture, with titles left of rows and above columns.

    Every image is drawn in a square of at least `cell` pixels.
    """
    size = max(cell, rows[0][0].width)
    width = grid_left(len(rows[0]), size)
    height = GRID_TOP + len(rows) * (size + GRID_GAP) + 20
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    for r, (title, row) in enumerate(zip(row_titles, rows)):
        y = GRID_TOP + r * (size + GRID_GAP)
        pen.text((GRID_LEFT - 8, y + size // 2), title, "black", font, anchor="rm")
        for c, image in enumerate(row):
            image = image.resize((size, size), Image.Resampling.BOX)
            picture.paste(image, (grid_left(c, size), y))
    for c, title in enumerate(column_titles):
        middle = grid_left(c, size) + size // 2
        pen.text((middle, GRID_TOP // 2), title, "black", font, anchor="mm")
    return picture


GRID_LEFT, GRID_TOP, GRID_GAP = 50, 26, 6


def grid_left(column, size=192):
    """Return the x coordinate at which a column of `labelled_grid` begins."""
    return GRID_LEFT + column * (size + GRID_GAP)


# --------------------------------------------------------------------------------------
# A checkpoint's encoders

def encoders_of(meta):
    """Return the fingerprints in an encoded set's meta.json, named as in a config.json."""
    return {"vae_fingerprint": meta.get("autoencoder"), "T5": meta.get("T5")}


def changed_encoders(checkpoint, found):
    """Return the keys of fingerprints `found` that the config of a checkpoint contradicts."""
    # Old checkpoints, and those from elsewhere, have no fingerprints.
    training = checkpoint.get("training") or {}
    changed = []
    for key, fingerprint in found.items():
        if fingerprint and training.get(key) and training[key] != fingerprint:
            changed.append(key)
    return changed


# --------------------------------------------------------------------------------------
# Models, from a folder or from the Hugging Face hub

def fetch(path_or_repo, *names):
    """Return the path of the first of `names` in a local folder or in a hub repository.

    The hub is asked only where there is no such folder. Raises UserError: no such folder or
    repository, the hub is out of reach, or none of the names is there.
    """
    folder = Path(path_or_repo)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    # "out/dit" beside an existing "out" is a mistyped path, not a repository.
    mistyped = folder.parent != Path(".") and folder.parent.exists()
    if not folder.exists() and not mistyped:
        downloaded = download(str(path_or_repo), names)
        if downloaded:
            return downloaded
    raise UserError(f"{folder}: no such folder, or no {' or '.join(names)} in it")


def download(repo, names):
    """Return a local copy of the first of `names` that a hub repository has, or None.

    Raises UserError if the repository cannot be read.
    """
    from huggingface_hub import errors, hf_hub_download
    # What was downloaded before needs no network.
    for name in names:
        with contextlib.suppress(Exception):
            return Path(hf_hub_download(repo, name, local_files_only=True))
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, local_files_only=False))
        except errors.RemoteEntryNotFoundError:
            continue
        # No such repository, a licence to accept, no network, ...
        except Exception as error:  # noqa: BLE001
            reason = one_line(error)
            raise UserError(f"{repo}: no such folder, and not on the hub ({reason})") from None
    return None


def weights_hash(name):
    """Return the sha256 of the weights of a model folder or hub id (or of their index)."""
    return sha256(fetch(name, "model.safetensors", "pytorch_model.bin",
                        "model.safetensors.index.json"))


@functools.cache
def pretrained(name, kind, companion=None, **options):
    """Return (model, companion) of a folder or hub id, the model in eval mode on this
    process's device.

    `kind` is a class of transformers, `companion` that of a tokenizer or processor. Raises
    UserError where there is no such model, or the weights are those of another class.
    """
    import transformers
    # Refuses a model that is not there, for which transformers' own words are hard to understand.
    weights_hash(name)
    try:
        model, info = getattr(transformers, kind).from_pretrained(
            name, output_loading_info=True, **options)
        companion = companion and getattr(transformers, companion).from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{name}: does not load as {kind} ({reason})") from None
    if len(info["missing_keys"]) > len(model.state_dict()) / 10:
        raise UserError(f"{name}: these are not the weights of a {type(model).__name__}")
    return model.eval().to(local_device()), companion
