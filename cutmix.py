"""Stage 1, pixel augmentation (paper 3.2): every photo becomes a CutMix composite with a photo of another class.

    python cutmix.py --images imagenet/train --out cutmix-all --setting all

(first part: what every stage uses to read images, JSONL and to report a user's mistake)
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from PIL import Image, ImageOps

IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


# ---------------------------------------------------------------------------------------------------------------
# What every stage shares: errors, complete files, JSONL, images

class UserError(Exception):
    """A mistake of the user's (a path, a number, a file): one line, no traceback, exit code 2."""


def command_line(main):
    """Runs a stage's `main()`; a UserError or a failing file system ends in one line and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def complete(path):
    """Gives a temporary path to write to; only a complete file gets the final name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_jsonl(path):
    """The objects of a JSONL file. A last line without its newline was torn by a kill: it is left out.

    Raises UserError (file, line) for anything else that is not a JSON object."""
    rows = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                break
            raise UserError(f"{path} line {number}: not JSON ({error.msg})")
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: not a JSON object")
        rows.append(row)
    return rows


def list_images(folder):
    """All images below `folder`, as sorted paths relative to it with forward slashes. Raises UserError."""
    folder = str(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    files = []
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(here, folder).replace(os.sep, "/")
        files += [name if inside == "." else f"{inside}/{name}" for name in names
                  if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    if not files:
        raise UserError(f"{folder}: no images in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(files)


def load_image(path, size):
    """Any image file -> RGB PIL image of size x size: shorter side to `size`, centre crop, nothing squashed."""
    with Image.open(path) as image:
        image.draft("RGB", (size, size))                # JPEG: decode at reduced scale, never below size x size
        image = ImageOps.exif_transpose(image).convert("RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
