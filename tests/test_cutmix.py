"""Stage 1: geometry, the data set of composites, and what happens when things go wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, photo, refused, run
from PIL import Image

import common
import cutmix

SETTINGS = ("1/2", "1/4", "1/9", "1/16")

# cutmix.py as a command, with folders of 40 composites and some rest after each: so a
# test can kill it in the middle without making thousands.
SLOW = """
import signal, sys, time, common, cutmix
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
    """Run cutmix.py in this process, and in no other unless the options ask for it."""
    cutmix.main(["--workers", "0", *map(str, options)])


def start(*options, **environment):
    """Start the slow cutmix.py and return the running process."""
    return subprocess.Popen([sys.executable, "-c", SLOW, *map(str, options)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            env={**os.environ, **environment})


def data_set(images, **options):
    """Return cutmix.py's data set for a folder of photos."""
    files = cutmix.photos_of_two_classes(images)
    settings = {"out": images, "setting": "all", "size": 32, "times": 1, "seed": 0}
    return cutmix.Composites(images=images, files=files, **{**settings, **options})


def tree(folder):
    """Return every file below a folder with its bytes, hidden and temporary ones too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def times_of(folder):
    """Return when each composite below a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/*.jpg")}


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


@pytest.mark.parametrize("size", [16, 37, 40, 64, 100, 255, 256])
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
    drawn = [cutmix.paste_box("1/16", 24, rng) for _ in range(40 * len(permitted))]
    counts = Counter(drawn)
    chi2 = sum((counts[box] - 40) ** 2 / 40 for box in permitted)
    assert chi2 < len(permitted) + 5 * (2 * len(permitted)) ** 0.5


def test_one_ninth_leaves_the_centre_and_the_corners_whole():
    rng = random.Random(0)
    for _ in range(50):
        x0, y0, x1, y1 = cutmix.paste_box("1/9", 256, rng)
        assert not (x0 < 128 < x1 and y0 < 128 < y1)
        corners = [(x, y) for x in (0, 255) for y in (0, 255)]
        assert not any(x0 <= x < x1 and y0 <= y < y1 for x, y in corners)


@pytest.mark.parametrize("make_rng", [np.random.default_rng, random.Random])
def test_both_kinds_of_random_generator_work(make_rng):
    first = cutmix.paste_box("1/16", 256, make_rng(3))
    assert first == cutmix.paste_box("1/16", 256, make_rng(3))


def test_an_unknown_setting_and_a_tiny_size_are_refused():
    with pytest.raises(common.UserError, match="1/5"):
        cutmix.paste_box("1/5", 256, random.Random(0))
    with pytest.raises(common.UserError, match="at least 16"):
        cutmix.paste_box("1/16", 8, random.Random(0))


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
# A new setting

def with_new_line(folder, line):
    """Copy cutmix.py into a folder, with one more line in its table of settings."""
    for name in ("cutmix.py", "common.py"):
        source = (ROOT / name).read_text()
        (folder / name).write_text(source)
    table = 'CUTS = {\n'
    assert source.count("CUTS") == 0 and (ROOT / "cutmix.py").read_text().count(table) == 1
    changed = (ROOT / "cutmix.py").read_text().replace(table, f"{table}    {line}\n")
    (folder / "cutmix.py").write_text(changed)
    return folder / "cutmix.py"


def test_one_line_adds_a_setting_to_the_options_to_all_and_to_the_sheets(tmp_path):
    script = with_new_line(tmp_path, '"1/25": Cut(scale=5, place=corner),')
    options = ["--images", photos(tmp_path / "photos", each=5), "--size", 50,
               "--workers", 0, "--out"]
    run(script, *options, tmp_path / "new", "--setting", "1/25", check=True)
    for row in common.read_jsonl(tmp_path / "new/cutmix.jsonl"):
        x0, y0, x1, y1 = row["box"]
        assert x0 in (0, 40) and y0 in (0, 40) and x1 - x0 == y1 - y0 == 10
    run(script, *options, tmp_path / "all", check=True)
    drawn = [row["setting"] for row in common.read_jsonl(tmp_path / "all/cutmix.jsonl")]
    assert Counter(drawn) == {setting: 4 for setting in ("1/25", *SETTINGS)}
    run(script, *options, tmp_path, "--preview", "--noise", check=True)
    make(*options[:2], "--out", tmp_path / "four", "--size", 50, "--preview")
    five = Image.open(tmp_path / "preview.png").height
    assert five - Image.open(tmp_path / "four/preview.png").height == 192 + 6


def test_a_setting_without_its_rule_stops_everything_at_once(tmp_path):
    script = with_new_line(tmp_path, '"1/25": Cut(scale=5),')
    done = run(script, "--help")
    assert done.returncode == 1 and "missing" in done.stderr and "place" in done.stderr


# --------------------------------------------------------------------------------------
# The data set

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Make 24 photos of 4 classes, and the composites `all` of 3 passes over them."""
    folder = tmp_path_factory.mktemp("small")
    photos(folder / "photos")
    make("--images", folder / "photos", "--out", folder / "out", "--size", 32,
         "--times", 3)
    return folder


def test_each_photo_is_the_base_once_a_pass_and_its_partner_is_of_another_class(small):
    files = common.list_images(small / "photos")
    rows = common.read_jsonl(small / "out/cutmix.jsonl")
    assert [row["base"] for row in rows] == files * 3
    for i, row in enumerate(rows):
        assert row["file"] == f"00000/{i:09d}.jpg"
        assert row["base_class"] == row["base"].split("/")[0]
        assert row["paste_class"] == row["paste"].split("/")[0]
        assert row["base_class"] != row["paste_class"]
        assert tuple(row["box"]) in permitted_boxes(row["setting"], 32)
    pairs = {(row["base"], row["paste"]) for row in rows}
    assert len(pairs) > 60, "each pass should find other partners"


def test_the_manifest_tells_what_is_in_the_picture(small):
    for row in common.read_jsonl(small / "out/cutmix.jsonl")[::5]:
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


@pytest.mark.parametrize("count", [24, 25, 26, 27])
def test_all_is_a_quarter_of_each_setting_to_within_one(tmp_path, count):
    composites = data_set(photos(tmp_path / "photos", classes=2, each=1), seed=7)
    for times in (1, 2, 3, 5):
        counts = Counter(composites.setting_of(i) for i in range(count * times))
        assert set(counts) == set(SETTINGS)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_all_draws_the_settings_that_it_always_drew(tmp_path):
    """The order of every four is a permutation that seed and number determine."""
    composites = data_set(photos(tmp_path / "photos", classes=2, each=1), seed=3)
    for four in range(6):
        order = np.random.default_rng((3, four, 1)).permutation(4)
        drawn = [composites.setting_of(4 * four + k) for k in range(4)]
        assert drawn == [SETTINGS[k] for k in order]


def test_partners_are_uniform_over_the_images_of_other_classes(tmp_path):
    # A frequent class is drawn more often than a rare one.
    for c, each in enumerate([3, 1, 5, 2]):
        (tmp_path / f"class{c}").mkdir()
        for k in range(each):
            (tmp_path / f"class{c}" / f"{k}.png").touch()
    composites = data_set(tmp_path)
    rng = np.random.default_rng(0)
    counts = Counter(composites.partner("class2/1.png", rng) for _ in range(6000))
    files = common.list_images(tmp_path)
    assert set(counts) == {file for file in files if not file.startswith("class2/")}
    assert all(abs(n - 1000) < 150 for n in counts.values())


def test_a_flat_folder_works_and_no_photo_meets_itself(tmp_path):
    (tmp_path / "photos").mkdir()
    for k in range(3):
        photo(k).save(tmp_path / "photos" / f"{k}.png")
    make("--images", tmp_path / "photos", "--out", tmp_path / "out", "--size", 16,
         "--times", 20)
    rows = common.read_jsonl(tmp_path / "out/cutmix.jsonl")
    assert len(rows) == 60
    assert all(row["base"] != row["paste"] and row["base_class"] == "" for row in rows)


# --------------------------------------------------------------------------------------
# Workers and ranks

def test_neither_workers_nor_ranks_change_a_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(cutmix, "A_FOLDER", 5)
    options = ["--images", photos(tmp_path / "photos"), "--size", 16, "--out"]
    make(*options, tmp_path / "one")
    one = tree(tmp_path / "one")
    assert len(one) == 24 + 5 + 3
    make(*options, tmp_path / "three", "--workers", 3)
    assert tree(tmp_path / "three") == one
    make(*options, tmp_path / "more_workers_than_photos", "--workers", 40)
    assert tree(tmp_path / "more_workers_than_photos") == one

    # One rank after the other, because no rank waits for another.
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        make(*options, tmp_path / "ranks")
        assert (tmp_path / "ranks/cutmix.jsonl").exists() == (rank == 0)
    assert tree(tmp_path / "ranks") == one


def test_more_folders_than_a_pool_gets_at_once_are_all_made(tmp_path, monkeypatch):
    monkeypatch.setattr(cutmix, "A_FOLDER", 1)
    options = ["--images", photos(tmp_path / "photos"), "--size", 16, "--times", 9]
    make(*options, "--out", tmp_path / "out", "--workers", 2)
    rows = common.read_jsonl(tmp_path / "out/cutmix.jsonl")
    assert [row["file"] for row in rows] == [f"{i:05d}/{i:09d}.jpg" for i in range(216)]


def test_even_a_single_folder_of_composites_is_shared_by_the_workers(tmp_path, monkeypatch):
    compose = cutmix.Composites.compose

    def watched(*arguments):
        (tmp_path / f"worker{os.getpid()}").touch()
        time.sleep(0.005)
        return compose(*arguments)

    monkeypatch.setattr(cutmix.Composites, "compose", watched)
    images = photos(tmp_path / "photos", each=24)
    make("--images", images, "--out", tmp_path / "out", "--size", 16, "--workers", 3)
    assert len(list(tmp_path.glob("worker*"))) == 3


def test_two_ranks_at_once_give_the_files_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cutmix, "A_FOLDER", 40)
    images = photos(tmp_path / "photos", each=50, size=(20, 16))
    make("--images", images, "--out", tmp_path / "one", "--size", 16)
    options = ["--images", images, "--out", tmp_path / "two", "--size", 16, "--workers", 1]
    ranks = [start(*options, RANK=rank, WORLD_SIZE="2") for rank in "01"]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


# --------------------------------------------------------------------------------------
# Kills, damage, mistakes

@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_to_the_same_bytes_and_redoes_nothing(tmp_path, workers,
                                                                   monkeypatch):
    monkeypatch.setattr(cutmix, "A_FOLDER", 40)
    images = photos(tmp_path / "photos", each=60, size=(20, 16))
    # A broken photo: which one stood in for it must be remembered too.
    (images / "class1/7.png").write_bytes(b"")
    make("--images", images, "--out", tmp_path / "whole", "--size", 16)

    out = tmp_path / "out"
    options = ["--images", images, "--out", out, "--size", 16, "--workers", workers]
    before = {}
    kills = 0
    for goal in (10, 70, 150):
        process = start(*options)
        while process.poll() is None and len(times_of(out)) < goal:
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.wait()
        # Nothing that was whole is made again, and orphaned workers end by themselves.
        wait_until_still(out)
        now = times_of(out)
        assert before.items() <= now.items()
        before = now
    assert kills >= 2
    make(*options)
    assert tree(out) == tree(tmp_path / "whole")
    assert before.items() <= times_of(out).items()


def wait_until_still(folder):
    """Wait until no composite has appeared for half a second (a minute at most)."""
    for _ in range(120):
        before = times_of(folder)
        time.sleep(0.5)
        if times_of(folder) == before:
            return
    raise AssertionError("composites still appear a minute after the kill")


def test_a_second_run_says_that_all_is_there(small, capsys):
    make("--images", small / "photos", "--out", small / "out", "--size", 32, "--times", 3)
    assert "complete already" in capsys.readouterr().out


def test_a_second_command_on_the_same_folder_is_refused(tmp_path):
    images, out = photos(tmp_path / "photos"), tmp_path / "out"
    with common.only_command(out):
        with pytest.raises(common.UserError, match="another command is writing"):
            make("--images", images, "--out", out, "--size", 32)
    make("--images", images, "--out", out, "--size", 32)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    images = photos(tmp_path / "photos", each=60, size=(20, 16))
    process = start("--images", images, "--out", tmp_path / "out", "--size", 16,
                    "--workers", 2)
    while not times_of(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    # The workers inherited its end of this pipe: it closes when the last one has ended.
    process.communicate(timeout=60)


def test_ctrl_c_ends_a_run_without_a_traceback(tmp_path):
    images = photos(tmp_path / "photos", each=60, size=(20, 16))
    process = subprocess.Popen([sys.executable, "-c", SLOW, "--images", images, "--out",
                                tmp_path / "out", "--workers", "2"], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    while not times_of(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.01)
    # A terminal sends it to the command and to its workers.
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in said, said
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_composite_that_a_crash_left_empty_is_made_again(tmp_path):
    options = ["--images", photos(tmp_path / "photos"), "--out", tmp_path / "out",
               "--size", 16]
    make(*options)
    whole = tree(tmp_path / "out")
    for name in ("cutmix.jsonl", "parts/00000.jsonl"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out/00000/000000007.jpg").write_bytes(b"")
    make(*options)
    assert tree(tmp_path / "out") == whole


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

    make("--images", images, "--out", tmp_path / "out", "--size", 16, "--times", 4,
         "--workers", 2)
    rows = common.read_jsonl(tmp_path / "out/cutmix.jsonl")
    assert len(rows) == 4 * 26
    assert not broken & {row[key] for row in rows for key in ("base", "paste")}
    assert odd <= {row["base"] for row in rows}
    assert all((tmp_path / "out" / row["file"]).exists() for row in rows)
    skipped = common.read_jsonl(tmp_path / "out/skipped.jsonl")
    assert len(skipped) == 4 and {row["file"] for row in skipped} == broken
    assert all(row["reason"] and str(tmp_path) not in row["reason"] for row in skipped)
    assert "4 photos skipped" in capsys.readouterr().out


def test_mistakes_end_in_one_line(tmp_path, monkeypatch):
    one = photos(tmp_path / "one", classes=1)
    two = photos(tmp_path / "two", classes=2)
    (tmp_path / "empty").mkdir()
    begun = ["--images", two, "--out", tmp_path / "begun", "--size"]
    make(*begun, 16)
    out = ["--out", tmp_path / "out"]
    for options, expected in [
            (["--images", tmp_path / "nowhere", *out], "no such folder"),
            (["--images", tmp_path / "empty", *out], "no images in it"),
            (["--images", one, *out], "one class only"),
            (["--images", two, *out, "--size", 4], "--size 4"),
            (["--images", two, *out, "--times", 0], "--times 0"),
            (["--images", two, *out, "--tau", "nan"], "--tau nan"),
            (["--images", two, "--out", two / "out"], "inside --images"),
            ([*begun, 32], "size 16")]:
        assert expected in refused("cutmix.py", *options)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK 2" in refused("cutmix.py", *begun, 16)
    assert not (tmp_path / "out").exists()


# cutmix.py as a command, in which no file may grow beyond 2 kB: the first composite that
# does is where the disk is full.
FULL_DISK = """
import resource, common, cutmix
make = cutmix.Composites.make
def make_on_full_disk(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    return make(*arguments)
cutmix.Composites.make = make_on_full_disk
common.command_line(cutmix.main)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fills_up_ends_in_one_line_and_loses_nothing(tmp_path, workers):
    images = photos(tmp_path / "photos", each=10)
    # Noise does not compress: the composites of this photo are the large ones.
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "class2/3.png")
    out = tmp_path / "out"
    options = ["--images", images, "--out", out, "--size", 32, "--workers", workers]
    done = run("-c", FULL_DISK, *options)
    assert done.returncode == 2
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "cutmix.jsonl").exists() and not list(out.rglob("*.tmp"))
    kept = times_of(out)
    assert kept
    make(*options)
    make("--images", images, "--out", tmp_path / "whole", "--size", 32)
    assert tree(out) == tree(tmp_path / "whole")
    assert kept.items() <= times_of(out).items()


def test_a_worker_that_is_killed_is_reported(tmp_path, monkeypatch):
    images = photos(tmp_path / "photos", classes=2)

    def die(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(cutmix.Composites, "compose", die)
    with pytest.raises(common.UserError, match="a worker process was killed"):
        make("--images", images, "--out", tmp_path / "out", "--workers", 1)


# --------------------------------------------------------------------------------------
# Sheets, help

def test_the_sheets_show_every_setting_and_mark_tau(small, tmp_path):
    make("--images", small / "photos", "--out", tmp_path, "--size", 32, "--preview",
         "--noise", "--tau", 0.35)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise.png", "preview.png"]
    preview = Image.open(tmp_path / "preview.png")
    assert preview.height >= 4 * 32 and preview.width >= 6 * 32

    # The column of t = 0.3 ends, and that of t = 0.4 begins, at a line that is red from
    # top to bottom. A column is 192 pixels wide, and 6 more separate it from the next.
    noise = pixels(Image.open(tmp_path / "noise.png"))
    is_red = (noise == (255, 0, 0)).all(axis=(0, 2))
    assert abs(np.flatnonzero(is_red).mean() - (50 + 4 * 198 - 3)) <= 1

    # t = 0 is the picture itself, six times enlarged; t = 1 is nothing but noise.
    picture, _ = data_set(small / "photos").compose(0, "1/2")
    shown = noise[26:26 + 192:6, 50:50 + 192:6]
    assert np.abs(shown - pixels(picture)).max() <= 1
    last = 50 + 10 * 198
    assert noise[26:218, last:last + 192].std() > 80


def test_a_broken_photo_leaves_no_hole_in_the_sheets(tmp_path):
    images = photos(tmp_path / "photos")
    (images / "class0/0.png").write_bytes(b"")
    six = cutmix.example_composites(data_set(images), "1/4")
    assert len(six) == 6


def test_the_help_shows_the_command_and_the_default_of_every_option():
    said = run("cutmix.py", "--help", check=True).stdout
    assert "python cutmix.py --images imagenet/train --out cutmix-all --setting all" in said
    for option, default in [("--setting", "all"), ("--size", 256), ("--times", 1),
                            ("--seed", 0), ("--workers", os.cpu_count()), ("--tau", 0.4)]:
        description = " ".join(said.split(f"  {option} ")[1].split("  --")[0].split())
        assert f"(default: {default})" in description, option


def test_importing_cutmix_does_not_import_torch():
    code = "import sys, cutmix; sys.exit('torch' in sys.modules)"
    assert run("-c", code).returncode == 0


def test_a_row_of_the_manifest_is_in_its_picture_too(small):
    for row in common.read_jsonl(small / "out/cutmix.jsonl")[:5]:
        comment = Image.open(small / "out" / row["file"]).info["comment"]
        assert json.loads(comment) == row
