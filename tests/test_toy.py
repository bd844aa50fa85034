"""The toy paper: the whole line in seconds, and the claims that its report stands on."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, refused, run
from PIL import Image
from scipy import ndimage

import common
import cutmix
import encode
from common import read_jsonl
from toy import (autoencoder, detector, estimate, experiments, prompts, score, side_by_side,
                 tables_page, world)

MANY = 60           # pictures on which the detector is measured


# --------------------------------------------------------------------------------------------
# The whole line

def test_one_command_runs_the_whole_line_and_says_what_it_runs(toy_paper):
    out, printed = toy_paper
    commands = re.findall(r"^\$ python (\w+)\.py", printed, re.MULTILINE)
    assert commands == ["cutmix", "caption", "cutmix", "encode", "encode", "train", "sample", "sample"]
    assert re.search(r"takes about \d+", printed)
    assert "overall" in printed and str(out / "report.html") in printed
    captions = read_jsonl(out / "captions-aio.jsonl")
    assert len(captions) == len(read_jsonl(out / "captions-cutmix.jsonl")) == 36
    assert captions[0]["caption"].startswith("An image of ")


def test_the_report_is_one_page_with_everything_in_it(toy_paper):
    out, _ = toy_paper
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<svg" in page
    # The long and the short prompts of the six tasks, eight originals, eight composites.
    assert page.count("<figure>") == 6 + 6 + 8 + 8


def test_the_same_command_again_makes_nothing_again(toy_paper):
    out, _ = toy_paper
    made = [*out.rglob("*.safetensors"), *out.glob("samples-*/*/samples/*.png")]
    times = {path: path.stat().st_mtime_ns for path in made}
    assert len(made) > 5 + 12
    run("-m", "toy", "--out", out, *TOY, check=True)
    assert times == {path: path.stat().st_mtime_ns for path in made}


def test_mistakes_end_in_one_line(toy_paper, tmp_path, monkeypatch):
    out, _ = toy_paper
    assert "other settings" in refused("toy", "--out", out, *TOY, "--seed", "1")
    assert "--images" in refused("toy", "--out", tmp_path / "x", "--images", "3")
    (tmp_path / "file").write_text("")
    assert refused("toy", "--out", tmp_path / "file", *TOY)
    assert "--seed" in refused("toy", "--out", tmp_path / "x", "--seed", 10 ** 20)
    monkeypatch.setattr(common, "patience", lambda holder: 0)
    with common.only_command(out):
        assert "another command" in refused("toy", "--out", out, *TOY)
    Image.new("RGB", (256, 256)).save(tmp_path / "large.png")
    with pytest.raises(common.UserError, match="256 x 256"):
        score.open_picture(tmp_path / "large.png")


# --------------------------------------------------------------------------------------------
# The world

def test_captions_of_originals_are_true(toy_paper):
    out, _ = toy_paper
    captions = {row["file"]: row["caption"] for row in read_jsonl(out / "captions.jsonl")}
    for scene in read_jsonl(out / "scenes.jsonl"):
        text = captions[scene["file"]]
        for thing in scene["objects"]:
            assert thing["shape"] in text
            if not text.startswith("a photo of"):
                assert f"{thing['color']} {thing['shape']}" in text
        corner = re.search("(top|bottom) (left|right)", text)
        if corner and len(scene["objects"]) == 1:
            thing = scene["objects"][0]
            assert corner[1] == ("top" if thing["y"] < 32 else "bottom")
            assert corner[2] == ("left" if thing["x"] < 32 else "right")


def test_captions_of_composites_name_what_was_pasted_and_where():
    base = one_object("star", "red")
    paste = one_object("circle", "blue")
    seen = world.seen_in_composite(base, paste, (32, 0, 64, 32), "1/4")
    text = world.long_caption(seen, base, random.Random(0))
    assert "a large red star" in text and "a blue circle top right" in text
    seen = world.seen_in_composite(base, paste, (32, 0, 64, 64), "1/2")
    text = world.long_caption(seen, base, random.Random(0))
    assert "half a large red star left" in text and "half a large blue circle right" in text


@pytest.mark.parametrize("name, other", [
    ("pasted_place", lambda rng, setting, radius: (radius / 2, 16, 16)),
    ("KINDS", {**world.KINDS, "large": 0.43, "corners": 0.34}),
    ("BACKGROUNDS", ["plain", "striped"]),
    ("PLACES", {**world.PLACES, (0, 0): "upper left"}),
    ("seen_in_composite", lambda base, paste, box, setting: []),
])
def test_another_world_has_another_fingerprint(monkeypatch, name, other):
    before = world.world_fingerprint()
    assert world.world_fingerprint() == before
    monkeypatch.setattr(world, name, other)
    assert world.world_fingerprint() != before


def test_every_original_shows_one_class():
    rng = random.Random("classes")
    for _ in range(200):
        scene = world.random_scene(rng)
        assert len({thing["shape"] for thing in scene["objects"]}) == 1
        assert detector.has_one_background(world.draw(scene))


def test_prompts_ask_for_what_genevals_six_tasks_ask_for(toy_paper):
    out, _ = toy_paper
    short = read_jsonl(out / "prompts-short.jsonl")
    long = read_jsonl(out / "prompts-long.jsonl")
    assert [row["tag"] for row in short] == prompts.TASKS
    for brief, detailed in zip(short, long):
        assert brief["include"] == detailed["include"]
        for clause in brief["include"]:
            for word in (clause["class"], clause.get("color", "")):
                assert word in brief["prompt"] and word in detailed["prompt"]
    long_words = sum(len(row["prompt"].split()) for row in long)
    assert long_words > 1.5 * sum(len(row["prompt"].split()) for row in short)


# --------------------------------------------------------------------------------------------
# The detector, on ground truth and on deliberately broken pictures

def one_object(shape, color, radius=25, x=32, y=32, grey="light"):
    thing = {"shape": shape, "color": color, "radius": radius, "x": x, "y": y}
    return {"objects": [thing], "grey": grey, "background": "plain"}


def large_pairs(name):
    """Return MANY pairs of scenes of one large object each, of two shapes."""
    rng = random.Random(name)
    pairs = []
    for _ in range(MANY):
        one, two = rng.sample(world.SHAPES, 2)
        pairs.append((world.random_scene(rng, one, "large"), world.random_scene(rng, two, "large")))
    return pairs


def finds(image, *scenes):
    """Tell whether the detector finds every object of the scenes, in its colour."""
    found = detector.detect(image)
    for scene in scenes:
        for thing in scene["objects"]:
            colors = [one["color"] for one in found.get(thing["shape"], [])]
            if thing["color"] not in colors:
                return False
    return True


def composite(one, two, setting, number):
    rng = np.random.default_rng(number)
    return cutmix.mix(world.draw(one), world.draw(two), setting, 64, rng)[0]


@pytest.mark.parametrize("kind", list(world.KINDS))
def test_the_detector_finds_every_object_of_an_original(kind):
    rng = random.Random(kind)
    scenes = [world.random_scene(rng, kind=kind) for _ in range(MANY)]
    assert np.mean([finds(world.draw(scene), scene) for scene in scenes]) >= 0.95


@pytest.mark.parametrize("setting", ["1/4", "1/9", "1/16"])
def test_the_detector_finds_both_objects_of_a_composite_also_half_hidden_ones(setting):
    right = [finds(composite(one, two, setting, number), one, two)
             for number, (one, two) in enumerate(large_pairs(setting))]
    assert np.mean(right) >= 0.95


def test_the_detector_counts_objects():
    rng = random.Random("counts")
    for many in (1, 2, 3, 4):
        shape = rng.choice(world.SHAPES)
        places = [world.corner_place(rng, corner) for corner in world.CORNERS[:many]]
        things = [world.make_object(shape, "green", place) for place in places]
        image = world.draw({"objects": things, "grey": "dark", "background": "plain"})
        assert len(detector.detect(image)[shape]) == many


def test_the_detector_finds_no_object_where_two_melted_into_one():
    right = [finds(Image.blend(world.draw(one), world.draw(two), 0.5), one, two)
             for one, two in large_pairs("melted")]
    assert np.mean(right) <= 0.05


def cut(left, right):
    """Return a picture of the left half of one scene and the right half of another."""
    image = world.draw(left)
    image.paste(world.draw(right).crop((32, 0, 64, 64)), (32, 0))
    return image


def test_the_detector_finds_no_object_that_is_cut_with_the_wrong_half():
    of_two_colors = []
    of_one_color = []
    for one, two in large_pairs("cut"):
        of_two_colors.append(finds(cut(one, two), one, two))
        two["objects"][0]["color"] = one["objects"][0]["color"]
        of_one_color.append(finds(cut(one, two), one) or finds(cut(one, two), two))
    assert np.mean(of_two_colors) <= 0.05
    assert np.mean(of_one_color) <= 0.1


def test_the_detector_finds_no_object_where_one_is_drawn_twice_and_a_bit_apart():
    right = []
    for number, (one, _) in enumerate(large_pairs("doubled")):
        thing = one["objects"][0]
        angle = number
        other = {**thing,
                 "x": thing["x"] + 0.6 * thing["radius"] * math.cos(angle),
                 "y": thing["y"] + 0.6 * thing["radius"] * math.sin(angle)}
        doubled = {**one, "objects": [thing, other]}
        right.append(finds(world.draw(doubled), one))
    assert np.mean(right) <= 0.05


def bitten(scene, share, number):
    """Return the picture of an object of which a disc around one of its pixels is missing."""
    image = np.array(world.draw(scene))
    mask = np.asarray(world.mask_of(scene["objects"][0])) > 0
    rows, columns = mask.nonzero()
    middle = np.random.default_rng(number).integers(len(rows))
    y, x = np.indices(mask.shape)
    distance = np.hypot(y - rows[middle], x - columns[middle])
    # As large a disc as takes this share of the object away.
    radius = np.sort(distance[mask])[int(share * mask.sum())]
    image[distance <= radius] = world.GREYS[scene["grey"]]
    return Image.fromarray(image)


@pytest.mark.parametrize("radius", [12, 17, 25])
@pytest.mark.parametrize("fault", ["bitten", "doubled", "two"])
def test_the_detector_forgives_no_bite_and_no_lump_at_any_size(fault, radius):
    rng = random.Random(f"{fault} {radius}")
    right = []
    for number in range(MANY // 2):
        shape, other_shape = rng.sample(world.SHAPES, 2)
        scene = one_object(shape, "blue", radius)
        thing = scene["objects"][0]
        if fault == "bitten":
            right.append(finds(bitten(scene, 0.15, number), scene))
            continue
        # The same object again, or a smaller one of another shape, at one side.
        other = {**thing,
                 "x": 32 + 0.7 * radius * math.cos(number),
                 "y": 32 + 0.7 * radius * math.sin(number)}
        if fault == "two":
            other = {**other, "shape": other_shape, "radius": 0.8 * radius}
        right.append(finds(world.draw({**scene, "objects": [thing, other]}), scene))
    assert np.mean(right) <= 0.3


def test_the_detector_knows_a_shape_with_a_wobbly_edge():
    right = []
    for number, shape in enumerate(world.SHAPES * 8):
        scene = one_object(shape, "blue", 12)
        image = np.array(world.draw(scene))
        mask = np.asarray(world.mask_of(scene["objects"][0])) > 0
        # Every other stretch of the edge, a few pixels long, is missing.
        edge = mask & ~ndimage.binary_erosion(mask)
        y, x = np.indices(mask.shape)
        stretches = np.sin(6 * np.arctan2(y - 32, x - 32) + number) > 0
        image[edge & stretches] = world.GREYS[scene["grey"]]
        right.append(finds(Image.fromarray(image), scene))
    assert np.mean(right) >= 0.8


@pytest.mark.parametrize("fault", ["two colours", "a third missing behind a blob"])
def test_only_a_whole_object_hides_a_part_of_another_one(fault):
    rng = random.Random(fault)
    right = []
    for number in range(MANY):
        color, other_color = rng.sample(list(world.COLORS), 2)
        radius = rng.uniform(*[(11, 14), (22, 28)][number % 2])
        scene = one_object(rng.choice(world.SHAPES), color, radius)
        image = world.draw(scene)
        columns = (np.asarray(world.mask_of(scene["objects"][0])) > 0).sum(0)
        # The column behind which a third of the object lies.
        x = int(np.searchsorted(columns.cumsum(), columns.sum() * 2 / 3)) + 1
        if fault == "two colours":
            other = one_object(scene["objects"][0]["shape"], other_color, radius)
            image.paste(world.draw(other).crop((x, 0, 64, 64)), (x, 0))
        else:
            image.paste((world.GREYS[scene["grey"]],) * 3, (x, 0, 64, 64))
            image.paste(world.COLORS[other_color], (x + 2, 30, x + 6, 34))
        right.append(finds(image, scene))
    assert np.mean(right) <= 0.05


@pytest.mark.parametrize("setting", list(cutmix.SETTINGS))
def test_the_seam_of_every_setting_is_seen_also_after_the_autoencoder(setting):
    rng = random.Random(f"seams {setting}")
    composites = []
    originals = []
    for number in range(MANY):
        greys = rng.sample(list(world.GREYS), 2)
        one, two = [{**world.random_scene(rng, kind="large"), "grey": grey} for grey in greys]
        composites.append(composite(one, two, setting, number))
        originals.append(world.draw(world.random_scene(rng)))
    for image in originals + decoded(originals):
        assert detector.has_one_background(image)
    for images in (composites, decoded(composites)):
        assert np.mean([detector.has_one_background(image) for image in images]) <= 0.05


def decoded(images):
    """Return pictures as they come back from the toy's autoencoder."""
    vae = encode.load_vae(autoencoder.VAE)
    with torch.no_grad():
        mean, _ = vae.encode(autoencoder.to_tensor(images))
        return common.to_images(vae.decode(mean))


def test_objects_survive_the_autoencoder():
    """Of the objects of 6 pixels' radius or more, alone or pasted, 90% are found after the round trip."""
    images = []
    wanted = []
    for number, (one, two) in enumerate(large_pairs("autoencoder")):
        images.append(world.draw(one))
        wanted.append(one)
        for setting, side in (("1/4", 2), ("1/9", 3), ("1/16", 4)):
            if two["objects"][0]["radius"] / side >= 6:
                images.append(composite(one, two, setting, number))
                wanted.append(two)
    right = [finds(image, scene) for image, scene in zip(decoded(images), wanted)]
    assert np.mean(right) >= 0.9
    size = sum(path.stat().st_size for path in (ROOT / "toy/weights").iterdir())
    assert size <= 1.5 * 2 ** 20


# --------------------------------------------------------------------------------------------
# The experiments

TABLES = ["--table", "fig5", "--images", "36", "--val", "10", "--small", "12", "--steps", "2",
          "--prompts", "1", "--seeds", "1"]


def test_killed_experiments_go_on_and_end_with_every_score(tmp_path):
    words = [sys.executable, "-m", "toy", "tables", "--out", str(tmp_path), *TABLES, "--jobs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # Killed when the first command of the first model has ended.
    while not list(tmp_path.glob("runs/*/done.json")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "tables.html").exists()

    done = run("-m", "toy", "tables", "--out", tmp_path, *TABLES, "--jobs", "2", check=True)
    assert "models to train, sample and score" in done.stdout
    page = (tmp_path / "tables.html").read_text()
    assert "not yet" not in page
    # Each score leads to its pictures.
    links = set(re.findall(r'href="(runs/[^#"]+)#', page))
    assert len(links) == 4          # two models, short and long prompts
    for link in links:
        assert (tmp_path / link).exists()

    # The page grows: a command for another table keeps what is there.
    settings = {"steps": 2, "images": 36, "prompts": 1, "seed": 0}
    tables_page.write_tables(tmp_path, ["tau"], range(1), settings)
    page = (tmp_path / "tables.html").read_text()
    assert tables_page.TITLES["fig5"] in page and tables_page.TITLES["tau"] in page

    # Pictures are judged again where the detector was another one.
    one = tmp_path / "runs" / "dit-long-small-seed0"
    scores = (one / "scores-long.jsonl").read_text()
    pictures = (one / "pictures-long.html").read_text()
    done = json.loads((one / "done.json").read_text())
    judged = [line for line in done if "judge" in line]
    assert len(judged) >= 2
    (one / "done.json").write_text(json.dumps([line for line in done if line not in judged]
                                              + [line[:-12] + "another one." for line in judged]))
    (one / "scores-long.jsonl").write_text(scores.replace("false", "true"))
    (one / "pictures-long.html").unlink()
    run("-m", "toy", "tables", "--out", tmp_path, *TABLES, "--jobs", "2", check=True)
    assert (one / "scores-long.jsonl").read_text() == scores
    assert (one / "pictures-long.html").read_text() == pictures

    # Seeds that an earlier command made stay, too.
    shutil.copytree(one, tmp_path / "runs" / "dit-long-small-seed1")
    tables_page.write_tables(tmp_path, ["fig5"], range(1), settings)
    assert "&plusmn;" in (tmp_path / "tables.html").read_text().split("<h2>")[-2]


def test_a_job_that_was_stopped_has_not_ended(tmp_path, monkeypatch):
    job = side_by_side.Job("one", tmp_path, [side_by_side.Command("train", "--steps 5")])

    def stopped(job):
        side_by_side.log_of(job).write_text("train.py: stopped by SIGTERM\n")
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(side_by_side, "start", stopped)
    with pytest.raises(common.UserError, match="stopped by SIGTERM"):
        side_by_side.run_side_by_side([job], 1, print)


def test_the_time_of_jobs_side_by_side_is_that_of_a_schedule():
    # The third job takes the place of the second, and the fourth that of the first.
    assert estimate.end_times([5, 2, 4, 1], places=2) == [5, 2, 6, 6]
    assert estimate.end_times([5, 2, 4, 1], places=1) == [5, 7, 11, 12]


def test_a_seed_without_a_right_pair_does_not_remove_the_others(tmp_path, monkeypatch):
    lines = experiments.lines_of("tau", range(2))[:1]
    row = {"tag": "two_object", "one_background": True}
    # The first seed has one of two pairs right, the second one none.
    for run_of_seed, right in zip(lines[0].runs, (True, False)):
        rows = [{**row, "right": right}, {**row, "right": False}]
        common.write_jsonl(tables_page.scores_file(tmp_path, run_of_seed, "long"), rows)
    drawn = []
    monkeypatch.setattr(tables_page, "line_chart", lambda curves, *labels: drawn.append(curves))
    tables_page.trade_chart(tmp_path, lines)
    assert list(drawn[0].values()) == [[(1.0, 0.25)]]


def test_a_copy_of_a_run_is_no_seed(tmp_path):
    for name in ("dit-long-seed0", "dit-long-seed12", "dit-long-seed3.bak", "dit-long-seed"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert tables_page.seeds_there(tmp_path) == {0, 12}
