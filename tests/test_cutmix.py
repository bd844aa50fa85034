"""Stage 1: geometry, the data set of composites, and what happens when things go wrong."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, photo, run
from PIL import Image

import common
import cutmix

# Those of the paper. The table may have more.
SETTINGS = ("1/2", "1/4", "1/9", "1/16")

# cutmix.py as a command, with folders of 40 composites, slowly: so a test can kill it in
# the middle without making thousands.
SLOW = """
import signal, time, common, cutmix
# A shell starts what it runs in the background deaf to Ctrl-C, and so are these tests then.
signal.signal(signal.SIGINT, signal.default_int_handler)
cutmix.A_FOLDER = 40
compose = cutmix.Composites.compose
def compose_slowly(*arguments):
    time.sleep(0.01)
    return compose(*arguments)
cutmix.Composites.compose = compose_slowly
common.command_line(cutmix.main)
"""


def photos(folder, classes=4, each=6, suffix="png", size=(60, 45)):
    """Make class folders of photos, all different, and return their folder."""
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for k in range(each):
            photo(1000 * c + k, size).save(folder / f"class{c}" / f"{k}.{suffix}")
    return folder


def make(*options):
    """Run cutmix.py in this process, one composite after the other unless the options say more."""
    cutmix.main(["--workers", "0", *map(str, options)])


def start(*options, **environment):
    """Start the slow cutmix.py and return the running process."""
    return subprocess.Popen([sys.executable, "-c", SLOW, *map(str, options)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **environment})


def data_set(images, **options):
    """Return cutmix.py's data set for a folder of photos."""
    settings = {"out": images, "setting": "all", "size": 32, "seed": 0, **options}
    return cutmix.Composites(images=images, files=common.list_images(images), **settings)


def tree(folder):
    """Return every file below a folder with its bytes, hidden and temporary ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def pixels(image):
    return np.asarray(image).astype(int)


# --------------------------------------------------------------------------------------
# Geometry: against the paper's words, written down again in another way

def permitted_boxes(setting, size):
    """Return all boxes that the paper's description of a setting permits."""
    if setting == "1/2":
        return {(size // 2, 0, size, size), (0, size // 2, size, size)}
    side = size // {"1/4": 2, "1/9": 3, "1/16": 4}[setting]
    far = size - side
    middle = far // 2
    if setting == "1/4":
        places = {(0, 0), (0, far), (far, 0), (far, far)}
    elif setting == "1/9":
        places = {(0, middle), (far, middle), (middle, 0), (middle, far)}
    else:
        places = {(x, y) for x in range(size) for y in range(size)
                  if is_off_centre(x, y, side, size)}
    return {(x, y, x + side, y + side) for x, y in places}


def is_off_centre(x, y, side, size):
    """Tell whether a square lies in [5%, 95%] and does not touch [40%, 60%]."""
    tiny = 1e-9
    inside = all(v >= 0.05 * size - tiny and v + side <= 0.95 * size + tiny for v in (x, y))
    touches = all(v <= 0.6 * size + tiny and v + side >= 0.4 * size - tiny for v in (x, y))
    return inside and not touches


@pytest.mark.parametrize("size", [16, 37, 64, 255, 256])
@pytest.mark.parametrize("setting", SETTINGS)
def test_boxes_are_those_of_the_paper_and_all_of_them_occur(setting, size):
    permitted = permitted_boxes(setting, size)
    rng = np.random.default_rng(0)
    seen = {cutmix.paste_box(setting, size, rng) for _ in range(4000)}
    assert seen <= permitted
    if len(permitted) < 300:
        assert seen == permitted
        return
    # At 256 pixels there are thousands of places: their whole extent is reached.
    for k in range(4):
        assert abs(min(box[k] for box in seen) - min(box[k] for box in permitted)) <= 2
        assert abs(max(box[k] for box in seen) - max(box[k] for box in permitted)) <= 2


def test_one_sixteenth_is_uniform_over_the_permitted_places():
    rng = random.Random(1)
    permitted = sorted(permitted_boxes("1/16", 24))
    counts = Counter(cutmix.paste_box("1/16", 24, rng) for _ in range(40 * len(permitted)))
    chi2 = sum((counts[box] - 40) ** 2 / 40 for box in permitted)
    assert chi2 < len(permitted) + 5 * (2 * len(permitted)) ** 0.5


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_composite_is_the_base_outside_the_box_and_the_second_photo_inside(setting):
    half = setting == "1/2"
    base = photo(1, (90, 64))
    paste = photo(2, (64, 130) if half else (64, 64))
    picture, box = cutmix.mix(base, paste, setting, 64, random.Random(5))
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


# --------------------------------------------------------------------------------------
# The data set

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Make 24 photos of 4 classes, and their composites."""
    folder = tmp_path_factory.mktemp("small")
    photos(folder / "photos")
    make("--images", folder / "photos", "--out", folder / "out", "--size", 32)
    return folder


def test_each_photo_is_the_base_once_and_the_manifest_tells_what_is_in_the_picture(small):
    rows = common.read_jsonl(small / "out/cutmix.jsonl")
    assert [row["base"] for row in rows] == common.list_images(small / "photos")
    for i, row in enumerate(rows):
        assert row["file"] == f"00000/{i:09d}.jpg"
        assert row["base_class"] == row["base"].split("/")[0]
        assert row["paste_class"] == row["paste"].split("/")[0] != row["base_class"]
        x0, y0, x1, y1 = row["box"]
        expected = pixels(common.load_image(small / "photos" / row["base"], 32))
        if row["setting"] == "1/2":
            paste = common.load_image(small / "photos" / row["paste"], 32).crop(row["box"])
        else:
            paste = common.load_image(small / "photos" / row["paste"], x1 - x0)
        expected[y0:y1, x0:x1] = pixels(paste)
        picture = pixels(Image.open(small / "out" / row["file"]))
        assert np.abs(picture - expected).mean() < 4, row


def test_colours_do_not_bleed_over_a_seam(tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"photos/{colour}/0.png")
    make("--images", tmp_path / "photos", "--out", tmp_path / "out", "--size", 60,
         "--setting", "1/9")
    row = common.read_jsonl(tmp_path / "out/cutmix.jsonl")[0]
    assert row["base_class"] == "blue"
    expected = np.zeros((60, 60, 3), int)
    expected[..., 2] = 255
    x0, y0, x1, y1 = row["box"]
    expected[y0:y1, x0:x1] = (255, 0, 0)
    picture = pixels(Image.open(tmp_path / "out" / row["file"]))
    assert np.abs(picture - expected).max() < 40


def test_all_is_an_equal_share_of_every_setting_in_an_order_that_seed_and_number_determine(tmp_path):
    composites = data_set(photos(tmp_path / "photos", classes=2, each=1), seed=3)
    count = len(cutmix.CUTS)
    for made in (count, 6 * count, 6 * count + 1, 7 * count - 1):
        counts = Counter(composites.setting_of(i) for i in range(made))
        assert set(counts) == set(cutmix.CUTS)
        assert max(counts.values()) - min(counts.values()) <= 1
    for group in range(6):
        order = np.random.default_rng((3, group, 1)).permutation(count)
        drawn = [composites.setting_of(count * group + k) for k in range(count)]
        assert drawn == [list(cutmix.CUTS)[k] for k in order]


def test_partners_are_uniform_over_the_images_of_other_classes(tmp_path):
    # A frequent class is drawn more often than a rare one.
    for c, each in enumerate([3, 1, 5, 2]):
        (tmp_path / f"class{c}").mkdir()
        for k in range(each):
            (tmp_path / f"class{c}" / f"{k}.png").touch()
    composites = data_set(tmp_path)
    rng = np.random.default_rng(0)
    counts = Counter(composites.partner("class2/1.png", rng) for _ in range(6000))
    assert set(counts) == {file for file in composites.files if not file.startswith("class2/")}
    assert all(abs(n - 1000) < 150 for n in counts.values())


# --------------------------------------------------------------------------------------
# A new setting

def with_fifth_setting(monkeypatch):
    """Add a line to the table of settings."""
    cut = cutmix.Cut(scale=5, place=cutmix.corner)
    monkeypatch.setitem(cutmix.CUTS, "1/25", cut)


def test_one_line_adds_a_setting_to_the_options_to_all_and_to_the_sheet(tmp_path, monkeypatch):
    with_fifth_setting(monkeypatch)
    options = ["--images", photos(tmp_path / "photos", each=5), "--size", 50, "--out"]
    make(*options, tmp_path / "new", "--setting", "1/25")
    for row in common.read_jsonl(tmp_path / "new/cutmix.jsonl"):
        x0, y0, x1, y1 = row["box"]
        assert x0 in (0, 40) and y0 in (0, 40) and x1 - x0 == y1 - y0 == 10
    make(*options, tmp_path / "all")
    drawn = Counter(row["setting"] for row in common.read_jsonl(tmp_path / "all/cutmix.jsonl"))
    assert set(drawn) == set(cutmix.CUTS)
    make(*options, tmp_path, "--preview")
    with_it = Image.open(tmp_path / "preview.png").height
    monkeypatch.undo()
    make(*options, tmp_path, "--preview")
    assert with_it - Image.open(tmp_path / "preview.png").height == 50 + 12 + 4


def test_a_new_setting_does_not_mix_into_a_data_set_that_was_begun_without_it(tmp_path, monkeypatch):
    options = ["--images", photos(tmp_path / "photos"), "--out", tmp_path / "out", "--size", 16]
    make(*options)
    with_fifth_setting(monkeypatch)
    with pytest.raises(common.UserError, match="1/25 None, now"):
        make(*options)


# --------------------------------------------------------------------------------------
# Threads, ranks, kills, damage

def test_a_killed_run_resumes_with_other_ranks_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(cutmix, "A_FOLDER", 40)
    images = photos(tmp_path / "photos", each=60, size=(20, 16))
    # A broken photo: which one stood in for it depends on nothing but its number.
    (images / "class1/7.png").write_bytes(b"")
    make("--images", images, "--out", tmp_path / "whole", "--size", 16)

    out = tmp_path / "out"
    options = ["--images", images, "--out", out, "--size", 16, "--workers", 2]
    process = start(*options)
    while process.poll() is None and len(list(out.glob("parts/*.jsonl"))) < 2:
        time.sleep(0.002)
    process.kill()
    process.wait()
    whole = {path: path.stat().st_mtime_ns for path in out.glob("parts/*.jsonl")}
    assert 2 <= len(whole) < 6
    ranks = [start(*options, RANK=rank, WORLD_SIZE="3") for rank in "012"]
    for rank in ranks:
        assert rank.communicate() and rank.returncode == 0
    assert tree(out) == tree(tmp_path / "whole")
    # What was whole is not made again.
    assert all(path.stat().st_mtime_ns == before for path, before in whole.items())


def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path):
    images = photos(tmp_path / "photos", each=60, size=(20, 16))
    process = start("--images", images, "--out", tmp_path / "out", "--workers", 2)
    while not list(tmp_path.glob("out/*/*.jpg")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in said, said


def test_broken_photos_are_named_counted_and_never_used(tmp_path, capsys):
    images = photos(tmp_path / "photos", suffix="jpg")
    whole = (images / "class0/0.jpg").read_bytes()
    (images / "class0/zero.jpg").write_bytes(b"")
    (images / "class1/cut.jpg").write_bytes(whole[:len(whole) // 2])
    (images / "class2/text.png").write_text("not an image")
    (images / "class3/gone.jpg").symlink_to(tmp_path / "nowhere")
    broken = {"class0/zero.jpg", "class1/cut.jpg", "class2/text.png", "class3/gone.jpg"}
    # A space, a comma and a letter that is not ASCII; and a name that is not even UTF-8.
    odd = {"class3/ein Bär, 0.jpg", os.fsdecode(b"class3/latin-\xe4.png")}
    for file in odd:
        photo(len(file)).save(os.fsencode(images / file))

    make("--images", images, "--out", tmp_path / "out", "--size", 16, "--workers", 2)
    rows = common.read_jsonl(tmp_path / "out/cutmix.jsonl")
    assert len(rows) == 26
    assert not broken & {row[key] for row in rows for key in ("base", "paste")}
    assert odd <= {row["base"] for row in rows}
    assert all((tmp_path / "out" / row["file"]).exists() for row in rows)
    skipped = common.read_jsonl(tmp_path / "out/skipped.jsonl")
    assert {row["file"] for row in skipped} == broken
    assert all(row["reason"] and str(tmp_path) not in row["reason"] for row in skipped)
    assert "4 photos skipped" in capsys.readouterr().out


def test_a_disk_that_fills_up_ends_in_one_line_and_loses_nothing(tmp_path, monkeypatch):
    options = ["--images", photos(tmp_path / "photos"), "--size", 16, "--out"]
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n" + SLOW
    done = run("-c", script, *options, tmp_path / "out")
    assert done.returncode == 2
    assert "File too large" in done.stderr and ".jpg" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out/cutmix.jsonl").exists()
    for out in ("out", "whole"):
        make(*options, tmp_path / out)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


