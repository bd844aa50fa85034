"""COCO's captions as prompts, one for each image: what COCO's FID and CLIPScore are measured on."""

import hashlib
import json
from pathlib import Path

from common import UserError, read_json, shorten


def is_coco(path):
    """Tell whether `path` is a file of COCO's: one JSON object with `annotations`."""
    path = Path(path)
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        content = json.loads(path.read_bytes())
    # JSONL in a file called .json.
    except ValueError:
        return False
    return isinstance(content, dict) and "annotations" in content


def read_coco_captions(path, limit=None, seed=0):
    """Return COCO's captions (captions_val2014.json) as prompts, one for each image.

    Returns dicts {"prompt", "name", "file"} in order of the images' ids; `name` is the
    file's name without its suffix. Of an image's captions, the one with the smallest id
    that is not blank becomes the prompt; an image without any is left out.

    `limit` takes at most so many images. Each image draws a lot that depends on nothing but
    `seed` and its id, and the lowest lots are taken: a lower limit gives a part of what a
    higher one gives. Raises UserError if the file is not such a file, or damaged.
    """
    data = read_json(path, "COCO's captions")
    images = coco_entries(path, data, "images", {"id": int, "file_name": str})
    fields = {"id": int, "image_id": int, "caption": str}
    annotations = coco_entries(path, data, "annotations", fields)
    files = {image["id"]: image["file_name"] for image in images}
    captions = {}
    for annotation in sorted(annotations, key=lambda annotation: annotation["id"]):
        image_id = annotation["image_id"]
        caption = annotation["caption"].strip()
        if image_id not in files:
            raise UserError(f"{path}: annotation {annotation['id']} describes image "
                            f"{image_id}, which is not among its images")
        if caption:
            captions.setdefault(image_id, caption)

    def lot(image_id):
        return hashlib.sha256(f"{seed} {image_id}".encode()).digest()

    chosen = sorted(captions, key=lot)[:limit]
    prompts = []
    for image_id in sorted(chosen):
        file = files[image_id]
        name = Path(file).stem
        # Samples are saved under this name, so it must be one.
        if not name or name.startswith(".") or "\0" in name:
            raise UserError(f"{path}: image {image_id} is called {file!r}: no file name")
        prompts.append({"prompt": captions[image_id], "name": name, "file": file})
    if not prompts:
        raise UserError(f"{path}: no image in it has a caption")
    names = {prompt["name"] for prompt in prompts}
    if len(names) < len(prompts) or len(files) < len(images):
        raise UserError(f"{path}: two images have the same id or the same name")
    return prompts


def coco_entries(path, data, key, fields):
    """Return the list `data[key]` of an annotation file, after a look at every entry.

    fields: {name: type}, what each entry must have. Raises UserError.
    """
    entries = data.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{path}: not COCO's captions (no list of {key!r})")
    for number, entry in enumerate(entries, 1):
        for name, kind in fields.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if type(value) is not kind:
                wanted = "whole number" if kind is int else "text"
                raise UserError(f"{path}: entry {number} of {key!r} needs {name!r}, a "
                                f"{wanted}, and has {shorten(value)}")
    return entries
