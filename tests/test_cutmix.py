"""Stage 1: geometry, the data set of composites, and what happens when things go wrong."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import common
import cutmix

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = ("1/2", "1/4", "1/9", "1/16")


def photo(seed, size=(60, 45)):
    """A picture that no other seed gives: smooth colours, so that JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def photos(folder, classes=4, each=6, suffix="png", size=(60, 45)):
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for k in range(each):
            photo(100 * c + k, size).save(folder / f"class{c}" / f"{k}.{suffix}")
    return folder


def main(*args):
    """In this process, unless the arguments ask for workers."""
    cutmix.main(["--workers", "0", *map(str, args)])


def run(*args, check=True, **env):
    done = subprocess.run([sys.executable, ROOT / "cutmix.py", *map(str, args)], check=False, text=True,
                          capture_output=True, env={**os.environ, **env})
    assert not check or done.returncode == 0, done.stderr
    return done


def tree(folder):
    """Every file below a folder with its bytes, hidden and temporary ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(out):
    return [json.loads(line) for line in (out / "cutmix.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------
# Geometry: against the paper's words, written down again in another way

def allowed(setting, size):
    """All boxes that the paper's description of a setting permits, by brute force."""
    boxes = set()
    if setting == "1/2":
        return {(size // 2, 0, size, size), (0, size // 2, size, size)}
    side = size // {"1/4": 2, "1/9": 3, "1/16": 4}[setting]
    far, mid = size - side, (size - side) // 2
    if setting == "1/4":
        places = {(0, 0), (0, far), (far, 0), (far, far)}
    elif setting == "1/9":
        places = {(0, mid), (far, mid), (mid, 0), (mid, far)}
    else:
        span = [v for v in range(size) if v >= 0.05 * size - 1e-9 and v + side <= 0.95 * size + 1e-9]
        places = {(x, y) for x in span for y in span
                  if not (x <= 0.6 * size + 1e-9 and x + side >= 0.4 * size - 1e-9
                          and y <= 0.6 * size + 1e-9 and y + side >= 0.4 * size - 1e-9)}
    for x, y in places:
        boxes.add((x, y, x + side, y + side))
    return boxes


@pytest.mark.parametrize("size", [16, 37, 40, 64, 100, 255, 256])
@pytest.mark.parametrize("setting", SETTINGS)
def test_boxes_are_those_of_the_paper_and_all_of_them_occur(setting, size):
    permitted = allowed(setting, size)
    rng = np.random.default_rng(0)
    seen = {cutmix.paste_box(setting, size, rng) for _ in range(4000)}
    assert seen <= permitted
    if len(permitted) < 300:
        assert seen == permitted
    else:                         # at 256 pixels there are thousands of places: their whole extent is reached
        for side in range(4):
            assert abs(min(box[side] for box in seen) - min(box[side] for box in permitted)) <= 2
            assert abs(max(box[side] for box in seen) - max(box[side] for box in permitted)) <= 2


def test_one_sixteenth_is_uniform_over_the_permitted_places():
    rng, permitted = random.Random(1), sorted(allowed("1/16", 24))
    counts = Counter(cutmix.paste_box("1/16", 24, rng) for _ in range(40 * len(permitted)))
    chi2 = sum((counts[box] - 40) ** 2 / 40 for box in permitted)
    assert chi2 < len(permitted) + 5 * (2 * len(permitted)) ** 0.5


def test_one_ninth_leaves_the_centre_and_the_corners_whole():
    for box in allowed("1/9", 256):
        assert not (box[0] < 128 < box[2] and box[1] < 128 < box[3])
        assert not any(box[0] <= x < box[2] and box[1] <= y < box[3] for x in (0, 255) for y in (0, 255))


@pytest.mark.parametrize("make_rng", [np.random.default_rng, random.Random])
def test_both_kinds_of_random_generator_work(make_rng):
    assert cutmix.paste_box("1/16", 256, make_rng(3)) == cutmix.paste_box("1/16", 256, make_rng(3))


def test_an_unknown_setting_and_a_tiny_size_are_refused():
    with pytest.raises(common.UserError, match="1/5"):
        cutmix.paste_box("1/5", 256, random.Random(0))
    with pytest.raises(common.UserError, match="at least 16"):
        cutmix.paste_box("1/16", 8, random.Random(0))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_composite_is_the_base_outside_the_box_and_the_second_photo_inside(setting):
    base, paste = photo(1, (90, 64)), photo(2, (64, 130) if setting == "1/2" else (64, 64))
    picture, box = cutmix.mix(base, paste, setting, 64, random.Random(5))
    assert picture.size == (64, 64) and picture.mode == "RGB"
    x0, y0, x1, y1 = box
    base64 = base.crop((13, 0, 77, 64))                 # centre crops, nothing to scale
    paste64 = paste.crop((0, 33, 64, 97)) if setting == "1/2" else paste
    inside = np.asarray(picture)[y0:y1, x0:x1]
    if setting == "1/2":
        assert np.array_equal(inside, np.asarray(paste64.crop(box)))           # full resolution, its own half
    else:
        smaller = paste64.resize((x1 - x0, y1 - y0), Image.Resampling.HAMMING)
        assert np.array_equal(inside, np.asarray(smaller))
    outside = np.ones((64, 64), bool)
    outside[y0:y1, x0:x1] = False
    assert np.array_equal(np.asarray(picture)[outside], np.asarray(base64)[outside])


# ----------------------------------------------------------------------------------------------------------
# Reading images, writing files

@pytest.mark.parametrize("folder", [False, True])
def test_what_failed_half_made_is_not_there_and_the_failure_is_what_is_told(tmp_path, folder):
    for attempt in ("fails", "is whole"):
        with contextlib.suppress(ZeroDivisionError), common.complete(tmp_path / "out") as temporary:
            if folder:
                temporary.mkdir(exist_ok=True)
            (temporary / "file" if folder else temporary).write_text(attempt)
            assert not (tmp_path / "out").exists()
            if attempt == "fails":
                raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/file" if folder else tmp_path / "out").read_text() == "is whole"


def test_every_kind_of_picture_becomes_the_same_rgb(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    grey = Image.fromarray(ramp)
    alpha = Image.merge("RGBA", [grey, grey, grey, Image.new("L", (64, 64), 255)])
    kinds = {"l.png": grey, "rgba.png": alpha, "la.png": alpha.convert("LA"), "1.gif": grey, "i16.png": None,
             "i.tif": Image.fromarray(ramp.astype(np.int32) * 257),
             "p.png": grey.convert("P"), "cmyk.tif": Image.merge("RGB", [grey] * 3).convert("CMYK")}
    for name, image in kinds.items():
        if image is None:
            image = Image.fromarray(ramp.astype(np.uint16) * 257)
        image.save(tmp_path / name)
        got = common.load_image(tmp_path / name, 64)
        assert got.mode == "RGB", name
        assert np.abs(np.asarray(got).astype(int) - ramp[..., None]).max() <= 1, name


def test_transparent_parts_are_white(tmp_path):
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(tmp_path / "alpha.png")
    Image.new("P", (20, 20), 0).save(tmp_path / "palette.png", transparency=0)
    half = Image.new("LA", (20, 20), (0, 128))
    half.save(tmp_path / "half.png")
    assert common.load_image(tmp_path / "alpha.png", 16).getpixel((8, 8)) == (255, 255, 255)
    assert common.load_image(tmp_path / "palette.png", 16).getpixel((8, 8)) == (255, 255, 255)
    assert common.load_image(tmp_path / "half.png", 16).getpixel((8, 8)) == (127, 127, 127)


@pytest.mark.parametrize("size", [31, 64, 85, 256])
def test_a_part_of_a_fitted_picture_is_that_part(size):
    for source in [(500, 375), (333, 500), (51, 77)]:
        whole = common.resize_and_crop(photo(9, source), size)
        for box in [(size // 2, 0, size, size), (0, size // 2, size, size)]:
            part = common.resize_and_crop(photo(9, source), size, box)
            assert np.abs(np.asarray(whole.crop(box)).astype(int) - np.asarray(part)).max() <= 2


def test_exif_rotation_is_applied_and_a_damaged_exif_block_ignored(tmp_path):
    upright = photo(3, (64, 64))
    exif = Image.Exif()
    exif[0x0112] = 6                               # the camera lay on its side: turn by 270 degrees to see it
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.jpg", quality=95, exif=exif)
    upright.save(tmp_path / "broken.jpg", quality=95, exif=b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff\x00\x01")
    for name in ("side.jpg", "broken.jpg"):
        got = np.asarray(common.load_image(tmp_path / name, 64)).astype(int)
        assert np.abs(got - np.asarray(upright)).mean() < 4, name


def test_nothing_is_squashed(tmp_path):
    circle = np.hypot(*np.ogrid[-100:100, -150:150]) < 80
    Image.fromarray((circle * 255).astype(np.uint8)).save(tmp_path / "circle.png")
    got = np.asarray(common.load_image(tmp_path / "circle.png", 100))[..., 0] > 127
    width, height = got.any(0).sum(), got.any(1).sum()
    assert abs(int(width) - 80) <= 1 and abs(int(height) - 80) <= 1


def test_decoding_a_jpeg_at_reduced_scale_loses_nothing_that_can_be_seen(tmp_path):
    rng = np.random.default_rng(0)
    octaves = [np.asarray(Image.fromarray(rng.integers(0, 256, (5 << k, 6 << k, 3), dtype=np.uint8))
                          .resize((1504, 1200), Image.Resampling.BICUBIC), np.float32) / 2 ** k
               for k in range(8)]
    big = Image.fromarray((sum(octaves) / 2).astype(np.uint8))                  # a natural photo's spectrum
    big.save(tmp_path / "big.jpg", quality=95)
    with Image.open(tmp_path / "big.jpg") as image:
        full = np.asarray(common.resize_and_crop(image.convert("RGB"), 128)).astype(float)
    assert common.open_image(tmp_path / "big.jpg", 256).size == (376, 300)      # 1/4, and still large enough
    error = np.asarray(common.load_image(tmp_path / "big.jpg", 128)) - full
    assert 10 * np.log10(255 ** 2 / (error ** 2).mean()) > 40                   # dB


# ----------------------------------------------------------------------------------------------------------
# The data set

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """24 photos of 4 classes, and the composites `all` of 3 passes over them."""
    folder = tmp_path_factory.mktemp("small")
    photos(folder / "photos")
    main("--images", folder / "photos", "--out", folder / "out", "--size", 32, "--times", 3)
    return folder


def test_each_photo_is_the_base_once_a_pass_and_its_partner_is_of_another_class(small):
    files, rows = common.list_images(small / "photos"), rows_of(small / "out")
    assert [row["base"] for row in rows] == files * 3
    for i, row in enumerate(rows):
        assert row["file"] == f"00000/{i:09d}.jpg"
        assert row["base_class"] == row["base"].split("/")[0]
        assert row["paste_class"] == row["paste"].split("/")[0]
        assert row["base_class"] != row["paste_class"]
        assert tuple(row["box"]) in allowed(row["setting"], 32)
    assert len({(row["base"], row["paste"]) for row in rows}) > 60              # another partner in each pass


def test_the_manifest_tells_what_is_in_the_picture(small):
    for row in rows_of(small / "out")[::5]:
        picture = np.asarray(Image.open(small / "out" / row["file"])).astype(float)
        base = np.asarray(common.load_image(small / "photos" / row["base"], 32))
        x0, y0, x1, y1 = row["box"]
        full = row["setting"] == "1/2"
        paste = common.load_image(small / "photos" / row["paste"], 32 if full else x1 - x0)   # Lanczos
        expected = base.copy()
        expected[y0:y1, x0:x1] = np.asarray(paste.crop(row["box"]) if full else paste)
        assert np.abs(picture - expected).mean() < 3, row


def test_colours_do_not_bleed_over_a_seam(tmp_path):
    for colour in ("red", "blue"):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(tmp_path / "photos" / colour / "0.png")
    main("--images", tmp_path / "photos", "--out", tmp_path / "out", "--size", 60, "--setting", "1/9")
    row = rows_of(tmp_path / "out")[0]
    picture = np.asarray(Image.open(tmp_path / "out" / row["file"])).astype(int)
    x0, y0, x1, y1 = row["box"]
    expected = np.zeros((60, 60, 3), int)
    expected[..., 2], expected[y0:y1, x0:x1] = 255, (255, 0, 0)
    assert row["base_class"] == "blue" and np.abs(picture - expected).max() < 40


@pytest.mark.parametrize("count", [24, 25, 26, 27])
def test_all_is_a_quarter_of_each_setting_to_within_one(count):
    for times in (1, 2, 3, 5):
        args = SimpleNamespace(setting="all", seed=7)
        counts = Counter(cutmix.setting_of(args, i) for i in range(count * times))
        assert set(counts) == set(SETTINGS) and max(counts.values()) - min(counts.values()) <= 1


def test_partners_are_uniform_over_the_images_of_other_classes():
    sizes = [3, 1, 5, 2]                                # a frequent class is drawn more often than a rare one
    files = np.array([f"class{c}/{k}.png".encode() for c, size in enumerate(sizes) for k in range(size)])
    rng = np.random.default_rng(0)
    counts = Counter(cutmix.partner(files, "class2/1.png", rng) for _ in range(6000))
    assert set(counts) == {os.fsdecode(file) for file in files if not file.startswith(b"class2/")}
    assert all(abs(n - 1000) < 150 for n in counts.values())


def test_a_flat_folder_works_and_no_photo_meets_itself(tmp_path):
    (tmp_path / "photos").mkdir()
    for k in range(3):
        photo(k).save(tmp_path / "photos" / f"{k}.png")
    main("--images", tmp_path / "photos", "--out", tmp_path / "out", "--size", 16, "--times", 20)
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 60 and all(row["base"] != row["paste"] and row["base_class"] == "" for row in rows)


def test_neither_workers_nor_ranks_change_a_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(cutmix, "A_FOLDER", 5)
    common = ["--images", photos(tmp_path / "photos"), "--size", 16, "--out"]
    main(*common, tmp_path / "one")
    main(*common, tmp_path / "three", "--workers", 3)
    main(*common, tmp_path / "many", "--workers", 40)                           # more workers than photos
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):                                 # one after the other: no rank waits for another
        monkeypatch.setenv("RANK", str(rank))
        main(*common, tmp_path / "ranks")
        assert (tmp_path / "ranks" / "cutmix.jsonl").exists() == (rank == 0)
    one = tree(tmp_path / "one")
    assert len(one) == 24 + 5 + 3 and one == tree(tmp_path / "three") == tree(tmp_path / "many")
    assert one == tree(tmp_path / "ranks")


def test_even_a_single_folder_of_composites_is_shared_by_the_workers(tmp_path, monkeypatch):
    def watched(*job):
        (tmp_path / f"worker{os.getpid()}").touch()
        time.sleep(0.005)
        return composite(*job)

    composite = cutmix.composite
    monkeypatch.setattr(cutmix, "composite", watched)
    images = photos(tmp_path / "photos", each=24)
    main("--images", images, "--out", tmp_path / "out", "--size", 16, "--workers", 3)
    assert len(list(tmp_path.glob("worker*"))) == 3


def test_two_ranks_at_once_give_the_files_of_one(tmp_path):
    images = photos(tmp_path / "photos", each=500, size=(20, 16))
    run("--images", images, "--out", tmp_path / "one", "--size", 16, "--workers", 0)
    command = [sys.executable, ROOT / "cutmix.py", "--images", images, "--out", tmp_path / "two"]
    ranks = [subprocess.Popen([*command, "--size", "16", "--workers", "1"], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL,
                              env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"}) for rank in "01"]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_to_the_same_bytes_and_redoes_nothing(tmp_path, workers):
    images = photos(tmp_path / "photos", each=600, size=(20, 16))
    (images / "class1" / "7.png").write_bytes(b"")      # a broken photo: its stand-ins must be remembered too
    run("--images", images, "--out", tmp_path / "whole", "--size", 16, "--workers", 0)
    out, before, kills = tmp_path / "out", {}, 0
    command = [sys.executable, ROOT / "cutmix.py", "--images", images, "--out", out, "--size", "16",
               "--workers", str(workers)]
    for goal in (50, 700, 1500):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("*/*.jpg"))) < goal:
            time.sleep(0.005)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.3)                                 # orphaned workers notice and end by themselves
        now = {path: path.stat().st_mtime_ns for path in out.glob("*/*.jpg")}
        time.sleep(0.2)
        assert now == {path: path.stat().st_mtime_ns for path in out.glob("*/*.jpg")}
        assert all(now[path] == when for path, when in before.items())      # nothing that was whole is redone
        before = now
    assert kills >= 2
    run(*command[2:])
    assert tree(out) == tree(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert "complete already" in run(*command[2:]).stdout


def test_a_composite_that_a_crash_left_empty_is_made_again(tmp_path):
    common = ["--images", photos(tmp_path / "photos"), "--out", tmp_path / "out", "--size", 16]
    main(*common)
    whole = tree(tmp_path / "out")
    for name in ("cutmix.jsonl", "parts/00000.jsonl"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "00000" / "000000007.jpg").write_bytes(b"")
    main(*common)
    assert tree(tmp_path / "out") == whole


def test_broken_photos_are_named_counted_and_never_used(tmp_path, capsys):
    images = photos(tmp_path / "photos", suffix="jpg")
    whole = (images / "class0" / "0.jpg").read_bytes()
    (images / "class0" / "zero.jpg").write_bytes(b"")
    (images / "class1" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "class2" / "text.png").write_text("not an image")
    (images / "class3" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    broken = {"class0/zero.jpg", "class1/cut.jpg", "class2/text.png", "class3/gone.jpg"}
    photo(77).save(images / "class3" / "ein Bär, 0.jpg")                        # a space, a comma, not ASCII
    photo(78).save(os.fsencode(images / "class3") + b"/latin-\xe4.png")         # not even UTF-8
    main("--images", images, "--out", tmp_path / "out", "--size", 16, "--times", 4, "--workers", 2)
    rows = rows_of(tmp_path / "out")
    skipped = common.read_jsonl(tmp_path / "out" / "skipped.jsonl")
    assert {row["file"] for row in skipped} == broken and len(skipped) == 4
    assert all(row["reason"] and str(tmp_path) not in row["reason"] for row in skipped)
    assert len(rows) == 4 * 26 and not broken & {row[k] for row in rows for k in ("base", "paste")}
    assert {"class3/ein Bär, 0.jpg", os.fsdecode(b"class3/latin-\xe4.png")} <= {row["base"] for row in rows}
    assert all((tmp_path / "out" / row["file"]).exists() for row in rows)
    assert "4 photos skipped" in capsys.readouterr().out


def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path):
    photos(tmp_path / "one", classes=1)
    photos(tmp_path / "two", classes=2)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    begun = ["--images", tmp_path / "two", "--out", tmp_path / "begun", "--size"]
    main(*begun, 16)
    for args, said in [(["--images", tmp_path / "nowhere", "--out", out], "no such folder"),
                       (["--images", tmp_path / "empty", "--out", out], "no images in it"),
                       (["--images", tmp_path / "one", "--out", out], "one class only"),
                       (["--images", tmp_path / "two", "--out", out, "--size", 4], "--size 4"),
                       (["--images", tmp_path / "two", "--out", out, "--times", 0], "--times 0"),
                       (["--images", tmp_path / "two", "--out", tmp_path / "two" / "out"], "inside --images"),
                       ([*begun, 32], "size 16")]:
        done = run(*args, check=False)
        assert done.returncode == 2 and said in done.stderr, (args, done.stderr)
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert run(*begun, 16, check=False, RANK="2", WORLD_SIZE="2").returncode == 2
    assert not out.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fills_up_ends_in_one_line_and_loses_nothing(tmp_path, workers):
    """No file may grow beyond 2 kB: the first composite that does is the full disk."""
    images = photos(tmp_path / "photos", each=10)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    noise.save(images / "class2" / "3.png")             # noise does not compress
    out = tmp_path / "out"
    limited = ("import resource as r, sys; sys.path.insert(0, sys.argv[1])\n"
               "import common, cutmix; make = cutmix.make\n"
               "def full(*job): r.setrlimit(r.RLIMIT_FSIZE, (2000, 2000)); return make(*job)\n"
               "cutmix.make = full; common.command_line(lambda: cutmix.main(sys.argv[2:]))")
    args = ["--images", str(images), "--out", str(out), "--size", "32", "--workers", str(workers)]
    done = subprocess.run([sys.executable, "-c", limited, ROOT, *args], check=False,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not (out / "cutmix.jsonl").exists() and not list(out.rglob("*.tmp"))
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*.jpg")}
    assert kept
    run(*args)
    run("--images", images, "--out", tmp_path / "whole", "--size", 32, "--workers", 0)
    assert tree(out) == tree(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


def test_a_dead_worker_is_reported(tmp_path, monkeypatch):
    images = photos(tmp_path / "photos", classes=2)
    monkeypatch.setattr(cutmix, "composite", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(common.UserError, match="killed"):
        main("--images", images, "--out", tmp_path / "out", "--workers", 1)


# ----------------------------------------------------------------------------------------------------------
# Sheets, JSONL, speed

def test_the_sheets_show_every_setting_and_mark_tau(small, tmp_path):
    main("--images", small / "photos", "--out", tmp_path, "--size", 32, "--preview", "--noise", "--tau", 0.35)
    preview, noise = Image.open(tmp_path / "preview.png"), Image.open(tmp_path / "noise.png")
    assert preview.height >= 4 * 32 and preview.width >= 6 * 32
    red = (np.asarray(noise) == (255, 0, 0)).all(-1).all(0)          # columns that are red from top to bottom
    assert abs(np.flatnonzero(red).mean() - (50 + 4 * 198 - 3)) <= 1            # between t = 0.3 and t = 0.4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["noise.png", "preview.png"]
    args = SimpleNamespace(images=small / "photos", size=32, seed=0)
    args.files = np.array([os.fsencode(file) for file in common.list_images(small / "photos")])
    picture = np.asarray(cutmix.composite(args, 0, "1/2")[0]).astype(int)
    shown = np.asarray(noise)[26:26 + 192:6, 50:50 + 192:6].astype(int)         # six times enlarged
    assert np.abs(shown - picture).max() <= 1                                   # t = 0: no noise
    assert np.asarray(noise)[26:218, 50 + 1980:242 + 1980].std() > 80           # t = 1: nothing else


def test_jsonl_with_a_torn_last_line_is_read_and_other_damage_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "x\u2028y"}\n\n{"a": "ä'.encode()[:-1])              # torn inside a character
    assert common.read_jsonl(path) == [{"a": "x\u2028y"}]
    path.write_text('{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(common.UserError, match="line 2: not JSON"):
        common.read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(common.UserError, match="line 1: not a JSON object"):
        common.read_jsonl(path)
    with pytest.raises(common.UserError, match="No such file"):
        common.read_jsonl(tmp_path / "none.jsonl")


def test_the_help_shows_a_command_that_works_and_every_default():
    said = run("--help").stdout
    assert "python cutmix.py --images imagenet/train --out cutmix-all --setting all" in said
    assert said.count("(default:") == 6 and "None)" not in said


def test_importing_cutmix_does_not_import_torch():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import cutmix; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, ROOT], check=False).returncode == 0
