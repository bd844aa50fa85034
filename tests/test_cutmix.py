"""Stage 1: geometry, the data set of composites, and what happens when things go wrong."""

import itertools
import os
import resource
import signal
from collections import Counter

import numpy as np
import pytest
from conftest import contents, photo, stopped
from PIL import Image

import common
import cutmix

# Those of the paper. The table may have more.
SETTINGS = ("1/2", "1/4", "1/9", "1/16")


def photos(folder, each, size=(60, 45)):
    """Make 4 class folders of photos, all different, and return their folder."""
    for c in range(4):
        (folder / f"class{c}").mkdir(parents=True)
        for k in range(each):
            photo(1000 * c + k, size).save(folder / f"class{c}" / f"{k}.png")
    return folder


def make(*options):
    """Run cutmix.py in this process, one composite after the other unless the options say more."""
    cutmix.main(["--workers", "0", *map(str, options)])


def pixels(image):
    return np.asarray(image).astype(int)


# ---- Geometry: against the paper's words, written down again in another way

def permitted_boxes(setting, size):
    """Return all boxes that the paper's description of a setting permits."""
    if setting == "1/2":
        return {(size // 2, 0, size, size), (0, size // 2, size, size)}
    side = size // {"1/4": 2, "1/9": 3, "1/16": 4}[setting]
    far = size - side

    def is_permitted(x, y):
        at_border = [v in (0, far) for v in (x, y)]
        if setting == "1/4":
            return all(at_border)
        if setting == "1/9":
            return any(at_border) and far // 2 in (x, y)
        inside = all(20 * v >= size and 20 * (v + side) <= 19 * size for v in (x, y))
        touches_the_centre = all(10 * v <= 6 * size and 10 * (v + side) >= 4 * size for v in (x, y))
        return inside and not touches_the_centre

    return {(x, y, x + side, y + side) for x in range(size) for y in range(size) if is_permitted(x, y)}


@pytest.mark.parametrize("size", [16, 24, 37, 255, 256])
@pytest.mark.parametrize("setting", SETTINGS)
def test_boxes_are_those_of_the_paper_each_as_likely_as_the_others(setting, size):
    permitted = permitted_boxes(setting, size)
    rng = np.random.default_rng(0)
    counts = Counter(cutmix.paste_box(setting, size, rng) for _ in range(4000))
    assert set(counts) <= permitted
    expected = 4000 / len(permitted)
    chi2 = sum((counts[box] - expected) ** 2 / expected for box in permitted)
    assert chi2 < len(permitted) + 5 * (2 * len(permitted)) ** 0.5
    # At 256 pixels there are thousands of places: their whole extent is reached.
    if len(permitted) < 300:
        assert set(counts) == permitted
    for seen, possible in zip(zip(*counts), zip(*permitted)):
        assert abs(min(seen) - min(possible)) <= 2 and abs(max(seen) - max(possible)) <= 2


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_composite_is_the_base_outside_the_box_and_the_second_photo_inside(setting):
    half = setting == "1/2"
    base = photo(1, (90, 64))
    paste = photo(2, (64, 130) if half else (64, 64))
    picture, box = cutmix.mix(base, paste, setting, 64, np.random.default_rng(5))
    assert picture.size == (64, 64) and picture.mode == "RGB"
    x0, y0, x1, y1 = box

    # The central squares of both photos have 64 pixels: nothing of the base is scaled.
    inside = pixels(picture)[y0:y1, x0:x1]
    if half:
        expected = paste.crop((0, 33, 64, 97)).crop(box)
    else:
        expected = paste.resize((x1 - x0, y1 - y0), Image.Resampling.HAMMING)
    assert np.array_equal(inside, pixels(expected))
    outside = np.ones((64, 64), bool)
    outside[y0:y1, x0:x1] = False
    expected = pixels(base.crop((13, 0, 77, 64)))
    assert np.array_equal(pixels(picture)[outside], expected[outside])


# ---- The data set

def test_each_photo_is_the_base_once_or_named_and_the_manifest_tells_what_is_in_the_picture(tmp_path, capsys):
    # A space, a comma and a letter that is not ASCII; and a name that is not even UTF-8.
    files = ["a/0.png", "a/1.png", "a/broken.png", "b/ein Bär, 0.png", os.fsdecode(b"b/latin-\xe4.png"),
             "c/0.png", "d/0.png", "d/1.png"]
    colours = dict(zip(files, itertools.product((0, 255), repeat=3)))
    for file, colour in colours.items():
        path = tmp_path / "photos" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), colour).save(os.fsencode(path))
    (tmp_path / "photos/a/broken.png").write_text("no picture")
    del colours["a/broken.png"]

    make("--images", tmp_path / "photos", "--out", tmp_path / "out", "--size", 60, "--workers", 2)
    assert "1 skipped" in capsys.readouterr().out
    [skipped] = common.read_jsonl(tmp_path / "out/skipped.jsonl")
    assert skipped["file"] == "a/broken.png" and str(tmp_path) not in skipped["reason"]
    rows = common.read_jsonl(tmp_path / "out/cutmix.jsonl")
    assert [row["base"] for row in rows] == list(colours)
    for row in rows:
        assert row["file"] == f"00000/{files.index(row['base']):09d}.jpg"
        assert row["base_class"] == row["base"].split("/")[0]
        assert row["paste_class"] == row["paste"].split("/")[0] != row["base_class"]
        expected = np.full((60, 60, 3), colours[row["base"]])
        x0, y0, x1, y1 = row["box"]
        expected[y0:y1, x0:x1] = colours[row["paste"]]
        # Neither do colours bleed over the seam.
        picture = pixels(Image.open(tmp_path / "out" / row["file"]))
        assert np.abs(picture - expected).max() < 60, row


def test_partners_are_uniform_over_the_images_of_other_classes():
    # A frequent class is drawn more often than a rare one.
    others = ["a/1.png", "a/2.png", "a/3.png", "b/1.png", "d/1.png", "d/2.png"]
    files = [*others, "c/1.png", "c/2.png", "c/3.png"]
    composites = cutmix.Composites("photos", files, "out", "all", 32, seed=0)
    rng = np.random.default_rng(0)
    counts = Counter(composites.partner("c/2.png", rng) for _ in range(6000))
    assert counts.keys() == set(others)
    assert all(abs(n - 1000) < 150 for n in counts.values())


def test_one_line_adds_a_setting_to_the_options_to_equal_shares_and_to_the_sheet(tmp_path, monkeypatch):
    options = ["--images", photos(tmp_path / "photos", each=5), "--size", 50, "--out"]
    make(*options, tmp_path / "before")
    make(*options, tmp_path, "--preview")
    before = Image.open(tmp_path / "preview.png").height
    monkeypatch.setitem(cutmix.CUTS, "1/25", cutmix.Cut(scale=5, place=cutmix.corner))
    make(*options, tmp_path / "new", "--setting", "1/25")
    for row in common.read_jsonl(tmp_path / "new/cutmix.jsonl"):
        x0, y0, x1, y1 = row["box"]
        assert x0 in (0, 40) and y0 in (0, 40) and x1 - x0 == y1 - y0 == 10
    make(*options, tmp_path / "all")
    drawn = Counter(row["setting"] for row in common.read_jsonl(tmp_path / "all/cutmix.jsonl"))
    assert set(drawn) == set(cutmix.CUTS)
    assert max(drawn.values()) - min(drawn.values()) <= 1
    make(*options, tmp_path, "--preview")
    assert Image.open(tmp_path / "preview.png").height - before == 50 + 12 + 4
    with pytest.raises(common.UserError, match="1/25 None, now"):
        make(*options, tmp_path / "before")


# ---- Threads, ranks, kills, damage

def test_a_run_that_ctrl_c_or_a_kill_ends_resumes_with_other_ranks_to_the_same_bytes(
        tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cutmix, "A_FOLDER", 40)
    images = photos(tmp_path / "photos", each=60, size=(20, 16))
    # A broken photo: which one stood in for it depends on nothing but its number.
    (images / "class1/7.png").write_bytes(b"")
    options = ["--images", images, "--size", 16, "--out"]
    make(*options, tmp_path / "whole")

    out = tmp_path / "out"
    for number, code in [(signal.SIGINT, 130), (signal.SIGKILL, -9)]:
        ended = stopped(number, cutmix.Composites, "save", 90,
                        lambda: common.command_line(lambda: make(*options, out, "--workers", 2)))
        assert ended == code
    assert "Traceback" not in capfd.readouterr().err
    whole = {path: path.stat().st_mtime_ns for path in out.glob("parts/*.jsonl")}
    assert 2 <= len(whole) < 6
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in "201":
        monkeypatch.setenv("RANK", rank)
        make(*options, out)
    assert contents(out) == contents(tmp_path / "whole")
    # What was whole is not made again.
    assert all(path.stat().st_mtime_ns == before for path, before in whole.items())


def test_a_disk_that_fills_up_in_the_middle_of_a_composite_ends_the_command(tmp_path):
    photos(tmp_path / "photos", each=1)
    # Of the first composite, which is larger, the system takes the beginning and says nothing.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(OSError, match="is the disk full.*000000000.jpg"):
            make("--images", tmp_path / "photos", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
