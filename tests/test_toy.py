"""The toy paper: the whole line in seconds, and the claims that its report stands on."""

import json
import random
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, refused, run
from PIL import Image

import common
import cutmix
import encode
from common import read_jsonl
from toy import autoencoder, detector, world


def test_one_command_runs_the_whole_line_and_says_what_it_runs(toy_paper):
    out, printed = toy_paper
    commands = re.findall(r"^\$ python (\w+)\.py", printed, re.MULTILINE)
    assert commands == ["cutmix", "cutmix", "caption", "encode", "encode", "train", "sample", "sample"]
    assert "overall" in printed and str(out / "report.html") in printed
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "<svg" in page     # nothing outside of the page
    assert page.count("<figure>") == 6 + 8 + 8
    assert len(read_jsonl(out / "captions-aio.jsonl")) == len(read_jsonl(out / "captions-cutmix.jsonl")) == 36
    assert read_jsonl(out / "captions-aio.jsonl")[0]["caption"] == "An image of a circle"


def test_the_same_command_again_makes_nothing_again(toy_paper):
    out, _ = toy_paper
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    pictures = {path: path.stat().st_mtime_ns for path in out.glob("samples-*/*/samples/*.png")}
    assert len(files) > 5 and len(pictures) == 12
    done = run("-m", "toy", "--out", out, *TOY)
    assert done.returncode == 0, done.stderr
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert pictures == {path: path.stat().st_mtime_ns for path in pictures}
    assert "other settings" in refused("toy", "--out", out, *TOY, "--seed", "1")


def test_captions_are_true(toy_paper):
    """Every caption names the shapes and colours that were drawn, and the place where the box lies."""
    out, _ = toy_paper
    scenes = {scene["file"]: scene for scene in read_jsonl(out / "scenes.jsonl")}
    for row in read_jsonl(out / "captions.jsonl"):
        assert f"{scenes[row['file']]['color']} {scenes[row['file']]['shape']}" in row["caption"]
    captions = {row["file"]: row["caption"] for row in read_jsonl(out / "captions-cutmix.jsonl")}
    for row in read_jsonl(out / "cutmix/cutmix.jsonl"):
        text, (x0, y0, x1, y1) = captions[row["file"]], row["box"]
        for file in (row["base"], row["paste"]):
            assert f"{scenes[file]['color']} {scenes[file]['shape']}" in text
        if "corner" in text:
            assert ("left" in text) == (x0 + x1 < 64) and ("top" in text) == (y0 + y1 < 64)


def pairs(count, seed):
    rng = random.Random(seed)
    return [(world.random_scene(rng, one), world.random_scene(rng, two))
            for one, two in (rng.sample(world.SHAPES, 2) for _ in range(count))]


def found(image, *scenes):
    objects = detector.detect(image)
    colors = {shape: [one["color"] for one in some] for shape, some in objects.items()}
    return all(scene["color"] in colors.get(scene["shape"], []) for scene in scenes)


def mixed(one, two, setting, n):
    return cutmix.mix(world.draw(one), world.draw(two), setting, 64, np.random.default_rng(n))[0]


@pytest.mark.parametrize("setting", ["1/4", "1/9", "1/16"])
def test_the_detector_knows_both_objects_of_a_composite_also_half_hidden_ones(setting):
    right = [found(mixed(one, two, setting, n), one, two) for n, (one, two) in enumerate(pairs(60, setting))]
    assert np.mean(right) >= 0.95


def test_the_detector_sees_no_object_where_two_melted_into_one():
    melts = [(Image.blend(world.draw(one), world.draw(two), 0.5), one, two)
             for one, two in pairs(60, "melted")]
    assert np.mean([found(*melt) for melt in melts]) <= 0.05


def test_objects_survive_the_autoencoder():
    """Of the objects of 6 pixels' radius or more, alone or pasted, 90% are found after the round trip."""
    vae, images, wanted = encode.load_vae(autoencoder.VAE), [], []
    for n, (one, two) in enumerate(pairs(160, "autoencoder")):
        images.append(world.draw(one))
        wanted.append(one)
        for setting, shrunk in (("1/4", 1 / 2), ("1/9", 21 / 64), ("1/16", 1 / 4)):
            if two["radius"] * shrunk >= 6:
                images.append(mixed(one, two, setting, n))
                wanted.append(two)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        back = common.to_images(vae.decode(vae.encode(pixels)[0]))
    right = np.array([found(image, scene) for image, scene in zip(back, wanted)])
    assert right.mean() >= 0.9, right.mean()
    size = sum(path.stat().st_size for path in (ROOT / "toy/weights").iterdir())
    assert size <= 1.5 * 2 ** 20


def test_prompts_ask_for_what_genevals_six_tasks_ask_for(toy_paper):
    short, long = (read_jsonl(toy_paper[0] / f"prompts-{kind}.jsonl") for kind in ("short", "long"))
    assert [row["tag"] for row in short] == world.TASKS
    for brief, detailed in zip(short, long):
        assert brief["include"] == detailed["include"] and len(brief["prompt"]) < len(detailed["prompt"])
        for clause in brief["include"]:
            for word in (clause["class"], clause.get("color", "")):
                assert word in brief["prompt"] and word in detailed["prompt"]


def test_mistakes_end_in_one_line(tmp_path):
    assert "--images" in refused("toy", "--out", tmp_path / "x", "--images", "3")
    (tmp_path / "file").write_text("")
    assert refused("toy", "--out", tmp_path / "file", *TOY)
    assert json.loads((ROOT / "toy/weights/config.json").read_text())["latent_channels"] == 8
