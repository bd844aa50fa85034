"""The toy paper: the whole line in seconds, and the claims that its report stands on."""

import contextlib
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, refused, relative, stopped
from PIL import Image

import common
import cutmix
import encode
import sample
import train
from model_dit import PRESETS, DiT
from toy import data, detector, prompts, recipe, run, score, tables, tiny, world

MANY = 16           # pictures of each kind on which the detector is measured


# ---- The whole line

def test_one_command_runs_the_whole_line_and_makes_nothing_again_nor_in_another_world(toy_paper, monkeypatch):
    out, printed = toy_paper
    commands = re.findall(r"^\$ python (?:-m toy )?(\w+)", printed, re.MULTILINE)
    assert commands == ["caption", "cutmix", "encode", "encode", "train",
                        "sample", "score", "sample", "score"]
    assert "overall" in printed and str(out / "report.html") in printed
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "progress.html" in page and "<svg" in (out / "dit/progress.html").read_text()
    # The long and the short prompts of the six tasks, eight originals, eight composites.
    assert page.count("<figure>") == 6 + 6 + 8 + 8

    made = [*out.rglob("*.safetensors"), *out.glob("samples-*/*/samples/*.png"), *out.rglob("*.jpg")]
    times = {path: path.stat().st_mtime_ns for path in made}
    assert len(made) > 5 + 12 + 36
    monkeypatch.setattr(score, "find_objects", lambda image: [])            # it takes long
    run.main(["--out", str(out), *TOY])
    assert times == {path: path.stat().st_mtime_ns for path in made}
    assert "seed 0, now 1" in refused("toy", "--out", out, *TOY, "--seed", "1")
    monkeypatch.setitem(world.KINDS, "large", 0.43)
    assert "large 0.42, now 0.43" in refused("toy", "--out", out, *TOY)


@pytest.mark.parametrize("words, given, expected", [
    ([], {}, {"OMP_NUM_THREADS": "1"}),
    (["play"], {}, {"OMP_WAIT_POLICY": "PASSIVE"}),
    ([], {"OMP_NUM_THREADS": "4"}, {"OMP_NUM_THREADS": "4"}),
])
def test_threads_do_not_spin_unless_the_user_says_so(monkeypatch, words, given, expected):
    monkeypatch.setattr(sys, "argv", ["toy", *words, "--help"])
    with mock.patch.dict(os.environ, given, clear=True):
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "toy/__main__.py"))
        assert {name: os.environ[name] for name in os.environ if name.startswith("OMP")} == expected


# ---- The method on one page

@pytest.fixture
def pictures(toy_paper):
    """Return the encoded originals and composites of the toy paper."""
    return [encode.Encoded(toy_paper[0] / name) for name in ("encoded", "encoded-cutmix")]


def test_the_loss_of_the_page_is_that_of_train_py_and_its_pictures_are_those_of_sample_py(pictures):
    photos, composites = pictures
    model = DiT(**PRESETS["toy"]).requires_grad_(False)
    torch.nn.init.normal_(model.out.weight)
    t, x_0, text, mask = tiny.draw_batch(photos, composites)
    eps = torch.randn_like(x_0)
    ones = torch.ones(len(t))
    expected = train.diffusion_losses(model, t, x_0, eps, text, mask, ones, ones).mean()
    assert relative(tiny.loss_of(model, t, x_0, eps, text, mask), expected) < 1e-6

    null = tiny.pad([photos.null] * len(t))
    expected = sample.ddim(model, eps, (text, mask), null, steps=5, guidance=1.5)
    assert relative(tiny.ddim(model, eps, (text, mask), null, steps=5, w=1.5), expected) < 1e-4


def test_the_page_chooses_composites_only_at_high_noise_and_drops_captions(pictures, monkeypatch):
    monkeypatch.setattr(tiny, "BATCH", 3000)
    for value, kind in zip((1.0, 3.0), pictures):
        kind.meta["scaling_factor"] = 1.0
        kind.moments = lambda i, value=value: (torch.tensor(value), torch.tensor(0.0))
    t, x_0, _, mask = tiny.draw_batch(*pictures)
    assert not (x_0 == 3)[t <= recipe.TAU].any()
    assert abs((x_0 == 3)[t > recipe.TAU].float().mean() - recipe.P) < 0.05
    # The null prompt is one token long.
    assert abs((mask.sum(1) == 1).float().mean() - tiny.DROP) < 0.03


def test_the_page_learns_and_draws_a_grid(toy_paper, pictures, tmp_path, monkeypatch):
    model = DiT(**PRESETS["toy"])
    monkeypatch.setattr(tiny, "DiT", lambda **sizes: model)
    tiny.main(["--data", str(toy_paper[0]), "--steps", "30", "--out", str(tmp_path / "tiny.png")])
    assert Image.open(tmp_path / "tiny.png").width > 4 * 96
    losses = []
    for _ in range(10):
        t, x_0, text, mask = tiny.draw_batch(*pictures)
        losses.append(float(tiny.loss_of(model, t, x_0, torch.randn_like(x_0), text, mask).detach()))
    # At the start it is 1.
    assert np.mean(losses) < 0.5


# ---- The world

def one_object(shape, color):
    thing = {"shape": shape, "color": color, "radius": 25, "x": 32, "y": 32}
    return {"objects": [thing], "grey": "light"}


def test_captions_of_originals_are_true_and_name_one_class(toy_paper):
    captions = {row["file"]: row["caption"] for row in common.read_jsonl(toy_paper[0] / "captions.jsonl")}
    for scene in common.read_jsonl(toy_paper[0] / "scenes.jsonl"):
        text = captions[scene["file"]]
        things = scene["objects"]
        assert len({thing["shape"] for thing in things}) == 1
        for thing in things:
            assert thing["shape"] in text
            assert text.startswith("a photo of") or f"{thing['color']} {thing['shape']}" in text
        corner = re.search("(top|bottom) (left|right)", text)
        if corner and len(things) == 1:
            assert (corner[1] == "top") == (things[0]["y"] < 32)
            assert (corner[2] == "left") == (things[0]["x"] < 32)


@pytest.mark.parametrize("setting, box, words", [
    ("1/4", (32, 0, 64, 32), ["a large red star", "a blue circle top right"]),
    ("1/2", (32, 0, 64, 64), ["half a large red star left", "half a large blue circle right"]),
    ("1/25", (0, 0, 12, 12), ["star", "circle"]),
])
def test_captions_of_composites_name_what_was_pasted_and_where(monkeypatch, setting, box, words):
    # A new setting is one line in cutmix.py.
    monkeypatch.setitem(cutmix.CUTS, "1/25", cutmix.Cut(scale=5, place=cutmix.off_centre))
    base = one_object("star", "red")
    seen = world.seen_in_composite(base, one_object("circle", "blue"), box, setting)
    text = world.long_caption(seen, base, random.Random(0))
    assert all(word in text for word in words)


def test_prompts_ask_for_what_genevals_six_tasks_ask_for(toy_paper):
    short, long = [common.read_jsonl(toy_paper[0] / f"prompts-{kind}.jsonl") for kind in ("short", "long")]
    assert [row["tag"] for row in short] == prompts.TASKS
    for brief, detailed in zip(short, long):
        assert brief["include"] == detailed["include"]
        for clause in brief["include"]:
            for word in (clause["class"], clause.get("color", "")):
                assert word in brief["prompt"] and word in detailed["prompt"]


# ---- The detector, on ground truth and on deliberately broken pictures

def large_pairs(name):
    """Return pairs of scenes of one large object each, of two shapes."""
    rng = random.Random(name)
    shapes = [rng.sample(world.SHAPES, 2) for _ in range(MANY)]
    return [[world.random_scene(rng, shape, "large") for shape in pair] for pair in shapes]


def finds(image, *scenes):
    """Tell whether the detector finds every object of the scenes, in its colour."""
    found = detector.as_detections(detector.find_objects(image))
    return all(thing["color"] in [one["color"] for one in found.get(thing["shape"], [])]
               for scene in scenes for thing in scene["objects"])


def composite(one, two, setting, number):
    return cutmix.mix(world.draw(one), world.draw(two), setting, 64, np.random.default_rng(number))[0]


def decoded(images):
    """Return pictures as they come back from the toy's autoencoder."""
    vae = encode.load_vae(recipe.VAE)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return encode.to_images(vae.decode(vae.encode(pixels / 127.5 - 1)[0]))


def test_the_detector_finds_every_object_of_originals_and_composites_also_half_hidden_ones():
    rng = random.Random("kinds")
    right = []
    for kind in world.KINDS:
        scenes = [world.random_scene(rng, rng.choice(world.SHAPES), kind) for _ in range(MANY)]
        right += [finds(world.draw(scene), scene) for scene in scenes]
    for setting in ("1/4", "1/9", "1/16"):
        right += [finds(composite(one, two, setting, number), one, two)
                  for number, (one, two) in enumerate(large_pairs(setting))]
    assert np.mean(right) >= 0.95


def test_the_detector_forgives_no_fault_of_a_large_object():
    right = []
    for one, two in large_pairs("faults"):
        a, b = world.draw(one), world.draw(two)
        # Two that melted into one; one that is drawn twice, a bit apart; the halves of two.
        right.append(finds(Image.blend(a, b, 0.5), one, two))
        thing = one["objects"][0]
        again = {**thing, "x": thing["x"] + 0.4 * thing["radius"], "y": thing["y"] + 0.4 * thing["radius"]}
        right.append(finds(world.draw({**one, "objects": [thing, again]}), one))
        a.paste(b.crop((32, 0, 64, 64)), (32, 0))
        right.append(finds(a, one, two))
    assert np.mean(right) <= 0.05


@pytest.mark.parametrize("setting", ["1/2", "1/4", "1/9", "1/16"])
def test_seams_of_two_greys_are_seen_also_after_the_autoencoder(setting):
    rng = random.Random(setting)
    composites = []
    for number, (one, two) in enumerate(large_pairs(setting)):
        one["grey"], two["grey"] = rng.sample(list(world.GREYS), 2)
        composites.append(composite(one, two, setting, number))
    for images in (composites, decoded(composites)):
        assert np.mean([detector.has_one_background(image) for image in images]) <= 0.1


def test_a_bite_is_seen_in_composites_of_one_grey_and_originals_have_neither_seams_nor_bites():
    rng = random.Random("bites")
    shapes = rng.choices(world.SHAPES, k=MANY)
    originals = [world.draw(world.random_scene(rng, shape, "1/4")) for shape in shapes]
    composites = [composite(one, {**two, "grey": one["grey"]}, "1/4", number)
                  for number, (one, two) in enumerate(large_pairs("bites"))]
    for images, expected in ((originals, False), (composites, True)):
        for shown in (images, decoded(images)):
            answers = [detector.is_bitten(image, detector.find_objects(image)) for image in shown]
            judged = [answer for answer in answers if answer is not None]
            # Of originals that come back from the autoencoder one in twelve is taken for bitten.
            right = np.mean([answer == expected for answer in judged])
            assert right >= (1 if shown is images else 0.8) and len(judged) > 0.7 * MANY
            # Of one grey, both look like one picture.
            assert all(map(detector.has_one_background, shown))


# ---- The experiments

def test_the_tables_make_every_score_and_the_page_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "find_objects", lambda image: [])            # it takes long
    # In this process, which has imported torch already, and one after the other.
    monkeypatch.setattr(tables, "run_aside", lambda command, log, running: data.run(command))
    monkeypatch.setattr(tables, "ahead", lambda make, models, threads: map(make, models))
    monkeypatch.setattr(tables, "SMALL", 12)
    monkeypatch.setattr(tables, "VALIDATION", 10)
    words = ["--out", str(tmp_path), "--images", "36", "--steps", "2", "--prompts", "1", "--seeds", "1"]
    tables.main([*words, "--table", "fig5"])
    page = (tmp_path / "tables.html").read_text()
    assert "not yet" not in page and page.count("<svg") == 2
    for link in re.findall(r'href="(runs/[^"]+)"', page):
        assert (tmp_path / link).exists()

    # A copy of a model is no seed, a model of an earlier command is one.
    runs = tmp_path / "runs"
    (runs / "dit-long-small-seed0.bak").symlink_to(runs / "dit-long-small-seed0")
    (runs / "dit-long-small-seed7").symlink_to(runs / "dit-long-small-seed0")
    # So is one of another table, which then is on the page, its other lines without scores.
    (runs / "dit-long-cutmix-p0.5-tau0.8-seed0").symlink_to(runs / "dit-long-small-seed0")
    tables.write_tables(tables.arguments(words))
    page = (tmp_path / "tables.html").read_text()
    assert tables.TITLES["fig5"] in page and tables.TITLES["tau"] in page and "not yet" in page
    assert "&plusmn;" in page and ".bak" not in page
    assert tables.TABLES["4"].keys() == {f"CM {setting}" for setting in [*cutmix.CUTS, "all"]}


def commands_at_work():
    """Yield the command lines of this Linux, which needs no `ps`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        # Some end in between.
        with contextlib.suppress(OSError):
            yield path.read_bytes()


def test_a_command_that_fails_is_one_line_and_none_outlives_the_tables(tmp_path):
    with pytest.raises(common.UserError, match="^it is broken .more in .*log"):
        tables.run_aside("-c 'raise SystemExit(\"a bar\\rit is broken\")'", tmp_path / "log", [])

    asleep = f"-c 'import time; time.sleep(60)' {tmp_path}"
    ended = stopped(signal.SIGKILL, subprocess.Popen, "wait", 1,
                    lambda: tables.run_aside(asleep, tmp_path / "log", []))
    assert ended == -signal.SIGKILL
    end = time.monotonic() + 20
    while any(os.fsencode(tmp_path) in command for command in commands_at_work()):
        assert time.monotonic() < end
