"""evaluate.py: which images are compared, chunks, ranks and kills; compare, its tables; curve."""

import csv
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo, refused
from PIL import Image

import evaluate
from common import UserError
from metrics.charts import line_chart

RNG = np.random.default_rng


class Inception(torch.nn.Module):
    """A stand-in for FID's network that takes no time: means of the image's four quarters."""

    def __init__(self, weights=None):
        super().__init__()

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


class Dinov2:
    """A stand-in for DINOv2 likewise, of nine parts."""

    def __call__(self, images):
        tokens = torch.nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)[:, None]
        self.last_hidden_state = tokens
        return self


def use_quick_networks(monkeypatch):
    monkeypatch.setattr(evaluate, "Inception", Inception)
    monkeypatch.setattr(evaluate, "load_inception", lambda weights: Inception())
    monkeypatch.setattr(evaluate, "load_dinov2", lambda name: Dinov2())
    monkeypatch.setattr(evaluate, "weights_hash", lambda name: "hash of " + name)


@pytest.fixture
def quality(monkeypatch, tmp_path):
    use_quick_networks(monkeypatch)
    weights = tmp_path / "inception.pth"
    weights.write_bytes(b"weights")

    def run_quality(*words):
        evaluate.main(["quality", "--inception", str(weights), "--dino", "dino", *map(str, words)])
    return run_quality


def pictures(folder, count, seed=0, names="{:04}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        photo(seed + n, (40, 30)).save(folder / names.format(n))
    return folder


def section(folder, command="quality"):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))[command]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------------
# Which images are compared

def test_a_contact_sheet_is_no_sample(quality, tmp_path):
    real = pictures(tmp_path / "real", 6)
    fake = pictures(tmp_path / "fake", 6, seed=50)
    quality("--real", real, "--fake", fake)
    before = section(fake)["scores"]
    photo(99, (400, 400)).save(fake / "sheet.png")
    quality("--real", real, "--fake", fake)
    assert section(fake)["scores"] == before and section(fake)["counts"]["fake"] == 6


def test_samples_jsonl_is_the_list_of_samples(quality, tmp_path, capsys):
    real = pictures(tmp_path / "real", 6)
    fake = pictures(tmp_path / "fake", 6, seed=50)
    write_lines(fake / "samples.jsonl", [{"file": f"{n:04}.png"} for n in (0, 1, 2, 4, 9)])
    quality("--real", real, "--fake", fake)
    assert section(fake)["counts"] == {"real": 6, "fake": 4, "skipped": 1}
    assert "0009.png" in capsys.readouterr().err
    for row, message in (({"file": ["0000.png"]}, 'every line needs a "file"'),
                         ({"file": "0000.png", "name": ["a"]}, 'the "name" of 0000.png is not text')):
        write_lines(fake / "samples.jsonl", [row])
        with pytest.raises(UserError, match=message):
            quality("--real", real, "--fake", fake)


def test_coco_is_compared_only_where_it_was_asked_for(quality, tmp_path, capsys):
    coco = "COCO_val2014_{:012}.jpg"
    real = pictures(tmp_path / "val2014", 9, names=coco)
    (real / coco.format(3)).rename(real / "COCO_été.jpg")
    fake = pictures(tmp_path / "fake", 6, seed=50)
    names = [Path(coco.format(n)).stem for n in (0, 1, 2, 5)] + ["COCO_été", "COCO_absent"]
    rows = [{"file": f"{n:04}.png", "prompt": "é", "name": name} for n, name in enumerate(names)]
    write_lines(fake / "samples.jsonl", rows)
    quality("--real", real, "--fake", fake, "--save-stats", tmp_path / "asked.safetensors")
    found = section(fake)
    assert found["counts"] == {"real": 5, "fake": 6, "skipped": 0} and found["data"] == "COCO"
    assert "1 of the 6 real images that were asked for are not in" in capsys.readouterr().out

    chosen = tmp_path / "chosen"
    chosen.mkdir()
    for name in names[:-1]:
        shutil.copy(real / f"{name}.jpg", chosen)
    (fake / "samples.jsonl").unlink()
    quality("--real", chosen, "--fake", fake)
    assert section(fake)["scores"] == found["scores"] and section(fake)["data"] == "ImageNet"

    # The same from saved features of the whole folder.
    quality("--real", real, "--save-stats", tmp_path / "all.safetensors")
    write_lines(fake / "samples.jsonl", rows)
    quality("--real", tmp_path / "all.safetensors", "--fake", fake)
    assert section(fake)["scores"] == found["scores"]
    with pytest.raises(UserError, match="none of its images was asked for"):
        quality("--real", pictures(tmp_path / "other", 5), "--fake", fake)


def test_samples_of_which_only_some_bear_names_are_not_cocos(quality, tmp_path):
    real = pictures(tmp_path / "real", 6)
    fake = pictures(tmp_path / "fake", 5, seed=50)
    rows = [{"file": f"{n:04}.png", "prompt": "a", "name": f"{n:04}"} for n in range(5)]
    del rows[2]["name"]
    write_lines(fake / "samples.jsonl", rows)
    quality("--real", real, "--fake", fake)
    assert section(fake)["data"] == "ImageNet" and section(fake)["counts"]["real"] == 6


def test_results_keep_the_settings_of_sampling_and_no_long_lists(quality, tmp_path):
    real = pictures(tmp_path / "real", 5)
    fake = pictures(tmp_path / "fake", 5, seed=50)
    settings = {"steps": 250, "prompts": ["a"] * 5, "names": ["b"] * 5}
    (fake / "settings.json").write_text(json.dumps(settings))
    quality("--real", real, "--fake", fake)
    assert section(fake)["sampling"] == {"steps": 250}


def test_two_real_images_of_one_name_are_not_both_taken(quality, tmp_path):
    real = tmp_path / "real"
    pictures(real / "a", 5)
    pictures(real / "b", 1)
    fake = pictures(tmp_path / "fake", 5, seed=50)
    rows = [{"file": f"{n:04}.png", "name": f"{n:04}"} for n in range(5)]
    write_lines(fake / "samples.jsonl", rows)
    with pytest.raises(UserError, match="a/0000.png and b/0000.png have the same name"):
        quality("--real", real, "--fake", fake)


@pytest.mark.parametrize("file", ["a\0.png", "\ud800.png"])
def test_a_name_that_no_file_can_have_ends_in_one_line(tmp_path, file):
    write_lines(tmp_path / "samples.jsonl", [{"file": file, "prompt": "a dog"}])
    for words in (["quality", "--real", tmp_path, "--fake", tmp_path],
                  ["clip", "--samples", tmp_path / "samples.jsonl"]):
        assert "which no file can be called" in refused("evaluate.py", *words)


def test_a_large_photo_is_decoded_in_full_before_it_is_resized(tmp_path):
    path = tmp_path / "large.jpg"
    fine = RNG(0).integers(0, 256, (1400, 1200, 3), dtype=np.uint8)
    Image.fromarray(fine).save(path, quality=95)
    with Image.open(path) as image:
        expected = image.resize((64, 64), Image.Resampling.LANCZOS, (0, 100, 1200, 1300))
    pixels, _ = evaluate.load_pixels(path, 64)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_prdc_is_the_mean_over_chunks_that_the_seed_fixes(quality, tmp_path, capsys):
    real = RNG(0).normal(size=(230, 6)).astype(np.float32)
    fake = RNG(1).normal(size=(250, 6)).astype(np.float32) * 1.1
    found, count, sizes = evaluate.mean_prdc(torch.tensor(real), torch.tensor(fake), 3, 100, 7)
    assert (count, sizes) == (2, (100, 100))
    rng = torch.Generator().manual_seed(7)
    of_real = torch.randperm(230, generator=rng)
    of_fake = torch.randperm(250, generator=rng)
    parts = [evaluate.prdc(real[of_real[part]], fake[of_fake[part]], 3)
             for part in (slice(0, 100), slice(100, 200))]
    assert found == {name: pytest.approx(np.mean([part[name] for part in parts])) for name in found}
    whole, count, _ = evaluate.mean_prdc(torch.tensor(real), torch.tensor(fake), 3, 0, 7)
    assert count == 1 and whole == pytest.approx(evaluate.prdc(real, fake, 3))

    quality("--real", pictures(tmp_path / "real", 11), "--chunk", 5,
            "--fake", pictures(tmp_path / "fake", 12, seed=50))
    assert "mean over 2 chunks of 5 images against 5" in capsys.readouterr().out


# --------------------------------------------------------------------------------------
# Features that are kept

def test_features_are_computed_once_and_again_only_for_parts_that_changed(quality, tmp_path,
                                                                          monkeypatch):
    seen = []

    class Counting(Inception):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)
    monkeypatch.setattr(evaluate, "load_inception", lambda weights: Counting())
    monkeypatch.setattr(evaluate, "PART", 2)
    real = pictures(tmp_path / "real", 5)
    fake = pictures(tmp_path / "fake", 5, seed=50)
    quality("--real", real, "--fake", fake)
    first = section(fake)["scores"]
    assert seen == [2, 2, 1, 2, 2, 1]
    quality("--real", real, "--fake", fake)
    assert section(fake)["scores"] == first and len(seen) == 6
    pictures(fake, 1, seed=99)                              # 0000.png is another picture now
    quality("--real", real, "--fake", fake)
    assert seen[6:] == [2] and section(fake)["scores"]["fid"] != first["fid"]
    (fake / "0004.png").unlink()
    quality("--real", real, "--fake", fake)
    assert len(seen) == 7 and section(fake)["counts"]["fake"] == 4
    quality("--real", real, "--fake", fake, "--size", 200)
    assert sum(seen[7:]) == 5 + 4                           # at another size, all of them


def test_saved_statistics_replace_the_real_images(quality, tmp_path):
    real = pictures(tmp_path / "real", 5)
    fake = pictures(tmp_path / "fake", 5, seed=50)
    stats = tmp_path / "stats.safetensors"
    quality("--real", real, "--save-stats", stats)
    quality("--real", real, "--fake", fake)
    first = section(fake)["scores"]
    quality("--real", stats, "--fake", fake)
    assert section(fake)["scores"] == first
    (tmp_path / "other.pth").write_bytes(b"other weights")
    for words in (["--inception", tmp_path / "other.pth"], ["--size", 200], ["--no-crop"]):
        with pytest.raises(UserError, match="made with other weights, --size or --no-crop"):
            quality("--real", stats, "--fake", fake, *words)
    stats.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="stats.safetensors: not a file"):
        quality("--real", stats, "--fake", fake)


def test_a_corrupt_image_is_named_and_counted_and_stops_nothing(quality, tmp_path, capsys):
    real, fake = pictures(tmp_path / "real", 5), pictures(tmp_path / "fake", 6, seed=50)
    whole = (fake / "0003.png").read_bytes()
    (fake / "0003.png").write_bytes(whole[:100])
    for _ in range(2):                                      # also when the others' features are kept already
        quality("--real", real, "--fake", fake)
        errors = capsys.readouterr().err.strip().splitlines()
        assert [line for line in errors if "skipped 1 of 6" in line and "0003.png" in line]
        assert section(fake)["counts"]["skipped"] == 1
        assert json.loads((fake / "skipped.jsonl").read_text())["file"].endswith("0003.png")
    for path in fake.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 6 images is readable"):
        quality("--real", real, "--fake", fake)


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_features_that_were_cut_on_the_disk_are_computed_again(quality, tmp_path, kept):
    real = pictures(tmp_path / "real", 5)
    fake = pictures(tmp_path / "fake", 5, seed=50)
    quality("--real", real, "--fake", fake)
    first = section(fake)["scores"]
    for folder in real, fake:
        [part] = folder.glob(".features/*.safetensors")
        part.write_bytes(part.read_bytes()[:kept])
    quality("--real", real, "--fake", fake)
    assert section(fake)["scores"] == first


# --------------------------------------------------------------------------------------
# Ranks, kills, bad options

def quality_in_a_process(words, rank, world, delay):
    """Run `quality` as one rank of torchrun, with networks that wait `delay` seconds a batch."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    patch = pytest.MonkeyPatch()
    use_quick_networks(patch)
    patch.setattr(evaluate, "PART", 4)

    class Slow(Inception):
        def forward(self, images):
            time.sleep(delay)
            return super().forward(images)
    patch.setattr(evaluate, "load_inception", lambda weights: Slow())
    evaluate.main(["quality", *map(str, words)])


def started(words, rank=0, world=1, delay=0.0):
    process = multiprocessing.get_context("fork").Process(
        target=quality_in_a_process, args=(words, rank, world, delay))
    process.start()
    return process


def test_ranks_share_the_images_and_the_last_one_measures(quality, tmp_path):
    real = pictures(tmp_path / "real", 14)
    fake = pictures(tmp_path / "fake", 13, seed=50)
    alone = shutil.copytree(fake, tmp_path / "alone")
    words = ["--real", real, "--inception", tmp_path / "inception.pth", "--dino", "dino", "--fake"]
    for rank in (1, 0):
        process = started([*words, fake], rank, 2)
        process.join()
        assert process.exitcode == 0
        # After the first rank half of the parts is there, and no result yet.
        assert (fake / "results.json").exists() == (rank == 0)
    quality("--real", real, "--fake", alone)
    assert section(fake)["scores"] == section(alone)["scores"]


def test_a_killed_run_goes_on_where_it_was(quality, tmp_path):
    real = pictures(tmp_path / "real", 6)
    fake = pictures(tmp_path / "fake", 40, seed=50)
    alone = shutil.copytree(fake, tmp_path / "alone")
    words = ["--real", real, "--inception", tmp_path / "inception.pth", "--dino", "dino", "--fake"]
    process = started([*words, fake], delay=0.2)
    while len(list(fake.glob(".features/*.safetensors"))) < 3:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = {path: path.stat().st_mtime_ns for path in fake.glob(".features/*.safetensors")}
    assert 3 <= len(kept) < 10 and not (fake / "results.json").exists()
    process = started([*words, fake])
    process.join()
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    quality("--real", real, "--fake", alone)
    assert section(fake)["scores"] == section(alone)["scores"]


@pytest.mark.parametrize("option, value", [("--size", 0), ("--chunk", -1), ("--k", 0), ("--seed", -1)])
def test_options_out_of_bounds_end_in_one_line(tmp_path, option, value):
    line = refused("evaluate.py", "quality", "--real", tmp_path, "--fake", tmp_path, option, value)
    assert f"{option} {value}: must be at least" in line


@pytest.mark.parametrize("option, value", [("--size", 2 ** 40), ("--chunk", 2 ** 70),
                                           ("--seed", 2 ** 64), ("--k", 2 ** 70)])
def test_numbers_that_no_tensor_can_hold_end_in_one_line(tmp_path, option, value):
    line = refused("evaluate.py", "quality", "--real", tmp_path, "--fake", tmp_path, option, value)
    assert f"{option} {value}: must be in [" in line


def test_a_chunk_without_k_neighbours_is_refused_before_any_work(tmp_path):
    line = refused("evaluate.py", "quality", "--real", "absent", "--fake", tmp_path, "--chunk", 3)
    assert "--chunk 3: must be larger than --k 3" in line


# --------------------------------------------------------------------------------------
# `compare`

def write_results(folder, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(sections), encoding="utf-8")
    return folder


def quality_section(fid, weights=None, training=None, data="ImageNet", precision=0.5, size=256):
    return {"scores": {"fid": fid, "precision": precision}, "data": data,
            "settings": {"inception": "i.pth", "dino": "d", "size": size, "chunk": 10000},
            "weights": {"i.pth": "1" * 64, "d": "2" * 64}, "counts": {"real": 50000, "fake": 49990},
            "checkpoint": {"model": "dit", "training": training} if training else {},
            "sampling": {"weights": weights} if weights else {}}


def compared(capsys, *words):
    evaluate.main(["compare", *map(str, words)])
    return capsys.readouterr().out


def test_compare_marks_the_best_and_the_second_best_of_each_column(tmp_path, capsys):
    for name, fid, clip in ("a", 10.0, 30.0), ("b", 12.0, 31.0), ("c", 11.0, 29.0):
        write_results(tmp_path / name, quality={"scores": {"fid": fid, "precision": 0.5}},
                      clip={"scores": {"clip": clip, "clip_error": 0.1}})
    out = compared(capsys, tmp_path / "a", tmp_path / "b/results.json", tmp_path / "c")
    assert f"| {tmp_path}/a | **10.00** | **0.500** | <u>30.00 ± 0.10</u> |" in out
    assert f"| {tmp_path}/b | 12.00 | **0.500** | **31.00 ± 0.10** |" in out
    assert f"| {tmp_path}/c | <u>11.00</u> | **0.500** | 29.00 ± 0.10 |" in out


def test_compare_ranks_original_and_extended_prompts_apart(tmp_path, capsys):
    for name, short, long in ("a", 0.4, 0.5), ("b", 0.3, 0.7):
        write_results(tmp_path / name, geneval={"scores": {"original": {"overall": short},
                                                           "extended": {"overall": long}}})
    out = compared(capsys, tmp_path / "a", tmp_path / "b")
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith(f"| {tmp_path}")]
    assert [row[1].strip(" |") for row in rows] == ["**0.40**", "<u>0.30</u>", "<u>0.50</u>", "**0.70**"]
    assert [row[0][-1] for row in rows] == ["◇", "◇", "★", "★"]


def test_what_was_measured_differently_is_not_ranked_and_the_reason_is_said(tmp_path, capsys):
    write_results(tmp_path / "a", quality=quality_section(10.0))
    write_results(tmp_path / "b", quality=quality_section(12.0, size=512))
    write_results(tmp_path / "c", dpg={"scores": {"overall": 70}, "settings": {"judge": "x"}})
    write_results(tmp_path / "d", dpg={"scores": {"overall": 80}, "settings": {"judge": "y"}})
    out = compared(capsys, *[tmp_path / name for name in "abcd"])
    assert "**" not in out and "<u>" not in out
    assert "- not ranked: FID Inc. ↓, P ↑; measured with another size (256, 512)" in out
    assert "- not ranked: Overall ↑; measured with another judge (x, y)" in out
    # The same weights in another folder are the same; other weights are not.
    other = quality_section(12.0)
    other["settings"]["dino"] = "elsewhere"
    other["weights"] = {"i.pth": "1" * 64, "elsewhere": "2" * 64}
    write_results(tmp_path / "b", quality=other)
    assert "not ranked" not in compared(capsys, tmp_path / "a", tmp_path / "b")
    other["weights"]["i.pth"] = "3" * 64
    write_results(tmp_path / "b", quality=other)
    out = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert "- not ranked: FID Inc. ↓; measured with another inception (111111111111, 333" in out
    other = quality_section(9.0)
    other["counts"]["fake"] = 1000
    write_results(tmp_path / "b", quality=other)
    out = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert "measured with another number of fake images (1000, 50000)" in out


def of_clip(samples, skipped=0, **settings):
    return {"clip": {"scores": {"clip": 30.0}, "counts": {"samples": samples, "skipped": skipped},
                     "settings": settings}}


def of_dpg(prompts, judge="x"):
    return {"dpg": {"scores": {"overall": 70.0}, "counts": {"prompts": prompts, "skipped": 0},
                    "settings": {"judge": judge}}}


def of_geneval(prompts=553, images=2212, tasks=("colors",), weights=None, **settings):
    scores = {"overall": 0.5, **dict.fromkeys(tasks, 0.5)}
    return {"geneval": {"scores": {"original": scores}, "settings": settings,
                        "weights": weights or {},
                        "counts": {"original": {"prompts": prompts, "images": images}}}}


def of_quality(chunk=10000, seed=0):
    found = quality_section(10.0)
    found["settings"].update(chunk=chunk, seed=seed)
    return {"quality": found}


# Twelve characters alike, and different.
LONG = "judges/of-our-own/"


@pytest.mark.parametrize("one, other, difference", [
    (of_dpg(9, LONG + "a"), of_dpg(9, LONG + "b"), f"judge ({LONG}a, {LONG}b)"),
    (of_dpg(9), of_dpg(8), "number of prompts (8, 9)"),
    (of_clip(9), of_clip(8), "number of prompts (8, 9)"),
    (of_clip(9), of_clip(8, skipped=1), ""),
    (of_geneval(553), of_geneval(552), "number of prompts (552, 553)"),
    (of_geneval(images=2212), of_geneval(images=553), "number of images (2200, 550)"),
    (of_geneval(images=2212), of_geneval(images=2211), ""),
    (of_geneval(tasks=["colors"]), of_geneval(tasks=["colors", "counting"]),
     "set of tasks (colors, colors + counting)"),
    (of_geneval(detections=["a"], weights={"a": "1" * 64}),
     of_geneval(detections=["b"], weights={"b": "2" * 64}), "detector (111111111111, 222222222222)"),
    (of_geneval(detections=["a"], weights={"a": "1" * 64}),
     of_geneval(detections=["b"], weights={"b": "1" * 64}), ""),
    (of_geneval(detections=["a"], detector="mmdet", weights={"a": "1" * 64}),
     of_geneval(detections=["b"], detector="mmdet", weights={"b": "2" * 64}), ""),
    (of_geneval(detector="d", weights={"d": "1" * 64}),
     of_geneval(detections=["b"], weights={"b": "2" * 64}), "detector (111111111111, 222222222222)"),
    (of_quality(seed=0), of_quality(seed=1), "seed (0, 1)"),
    (of_quality(chunk=0, seed=0), of_quality(chunk=0, seed=1), ""),
    (of_quality(chunk=50000, seed=0), of_quality(chunk=50000, seed=1), "")])
def test_numbers_that_depend_on_something_are_ranked_only_where_it_is_the_same(
        tmp_path, capsys, one, other, difference):
    write_results(tmp_path / "a", **one)
    write_results(tmp_path / "b", **other)
    out = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert ("not ranked" in out) == bool(difference)
    assert not difference or f"measured with another {difference}\n" in out


def test_compare_says_below_each_table_what_is_not_the_papers(tmp_path, capsys):
    for name, images in ("a", 100), ("b", 100), ("c", 99):
        write_results(
            tmp_path / name,
            quality={**quality_section(10.0), "notes": [f"FID: {images} images"]},
            dpg={**of_dpg(9)["dpg"], "notes": ["judge: x"]})
    out = compared(capsys, *[tmp_path / name for name in "abc"])
    table_1, table_3 = out.split("Table 3")
    assert "judge" not in table_1 and "FID:" not in table_3
    assert table_3.count("- judge: x\n") == 1
    assert f"- {tmp_path}/a, {tmp_path}/b: FID: 100 images\n" in table_1
    assert f"- {tmp_path}/c: FID: 99 images\n" in table_1


def test_samples_of_one_checkpoint_with_another_guidance_are_another_row(tmp_path, capsys):
    sampling = {"weights": "same", "guidance": 8.0, "steps": 250, "seed": 0, "format": "flat",
                "names": ["a"]}
    other = {**sampling, "format": "geneval", "images_per_prompt": 4, "names": []}
    training = {"steps": 1000, "TA": True, "IA": "all", "p": 0.5}
    write_results(tmp_path / "a", quality={**quality_section(10.0), "sampling": sampling})
    write_results(tmp_path / "b", clip={**of_clip(9)["clip"], "sampling": other,
                                        "checkpoint": {"training": training}})
    write_results(tmp_path / "c", clip={**of_clip(9)["clip"], "sampling": {**other, "guidance": 1.0}})
    rows = [evaluate.read_row(tmp_path / name / "results.json") for name in "abc"]
    one, two = evaluate.joined(rows)
    assert set(one.scores) == {"fid", "precision", "clip"} and set(two.scores) == {"clip"}
    # What only the second one knew of the checkpoint.
    assert one.steps == 1000 and one.facts["p"] == "0.5"
    out = compared(capsys, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert f"| {tmp_path}/a + {tmp_path}/b |" in out and f"\n| {tmp_path}/c |" in out


def test_a_file_that_is_named_twice_is_one_row(tmp_path, capsys):
    write_results(tmp_path / "a", **of_clip(9))
    out = compared(capsys, tmp_path / "a", f"{tmp_path}/a/../a", tmp_path / "a/results.json")
    assert out.count("30.00") == 1


def test_compare_paper_is_the_table_typed_by_hand(tmp_path, capsys):
    def training(IA, p, millions=396.0):
        return {"TA": True, "IA": IA, "p": p, "parameters": int(millions * 1e6), "images": 1281167,
                "steps": 250000}
    models = {"ta": (None, 0.0), "half": ("1/2", 0.5), "all": ("all", 0.5)}
    for k, (name, (IA, p)) in enumerate(models.items()):
        weights = f"weights of {name}"
        write_results(tmp_path / f"{name}-val",
                      quality=quality_section(20.0 + k, weights, training(IA, p), precision=0.5 + k / 10))
        write_results(tmp_path / f"{name}-coco",
                      quality=quality_section(40.0 - k, weights, training(IA, p), data="COCO"))
    out = compared(capsys, "--paper", *sorted(tmp_path.glob("*-*")))
    table = out.split("Table 1")[1].split("Table 4")[0].strip().splitlines()[2:]
    path = str(tmp_path)
    assert table[:5] == [
        "| | TA | IA | COCO FID Inc. ↓ | COCO P ↑ | FID Inc. ↓ | P ↑ |",
        "|---|---|---|--:|--:|--:|--:|",
        f"| {path}/all-coco + {path}/all-val | yes | yes | **38.00** | **0.500** | 22.00 | **0.700** |",
        f"| {path}/half-coco + {path}/half-val | yes | yes | <u>39.00</u> | **0.500** | "
        "<u>21.00</u> | <u>0.600</u> |",
        f"| {path}/ta-coco + {path}/ta-val | yes | no | 40.00 | **0.500** | **20.00** | 0.500 |"]
    table = out.split("Table 4")[1].split("Table 5")[0]
    assert [line.split(" | ")[1:3] for line in table.splitlines() if line.startswith(f"| {path}")] == [
        ["all", "22.00 |"], ["1/2", "<u>21.00</u> |"], ["none", "**20.00** |"]]
    table = out.split("Table 5")[1]
    assert [line.split(" | ")[1] for line in table.splitlines() if line.startswith(f"| {path}")] == [
        "0.5", "0.5", "0.0"]
    assert "Table 2" not in out                             # nothing of ours is in it
    write_results(tmp_path / "geneval", geneval={
        "scores": {"original": {"overall": 0.5}}, "checkpoint": {"training": training("all", 0.5)}})
    out = compared(capsys, "--paper", tmp_path / "geneval")
    assert f"| {path}/geneval ◇ | 396M | 1.28M | yes | yes | 0.50 |" in out
    assert "| Stable Diffusion XL (published) ◇ |  |  |  |  | 0.55 | 0.98 |" in out


def test_published_rows_stand_beside_ours_and_are_not_ranked(tmp_path, capsys):
    write_results(tmp_path / "a", quality=quality_section(10.0))
    write_results(tmp_path / "b", quality=quality_section(12.0))
    table = tmp_path / "rows.csv"
    compared(capsys, tmp_path / "a", tmp_path / "b", "--csv", table)
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [(row["model"], float(row["fid"])) for row in rows] == [
        (str(tmp_path / "a"), 10.0), (str(tmp_path / "b"), 12.0)]
    table.write_text("model,TA,fid\nTheirs,yes,1.5\n")
    out = compared(capsys, tmp_path / "a", tmp_path / "b", "--paper", "--published", table)
    assert "| Theirs (published) | yes |  | 1.50 |  |" in out and "**10.00**" in out
    # The paper's own, as far as they are known, with their source below the table.
    assert "| DiT-I with CutMix (arXiv 2502.21318) (published) | yes | yes | 7.30 |  |" in out
    assert "from a later version of the paper as quoted in a public review" in out
    for content in "fid\n3\n", "model,fid\nTheirs,good\n":
        table.write_text(content)
        with pytest.raises(UserError, match="not a table as compare --csv writes it"):
            compared(capsys, tmp_path / "a", "--published", table)


@pytest.mark.parametrize("content, message", [
    (b"model,FID\nTheirs,3\n", "line 2: .*no score or fact 'FID'"),
    (b"model,fid\nTheirs,nan\n", "line 2: .*fid is 'nan', which is not a number"),
    (b"model,fid\nOurs,3\nTheirs,1e999\n", "line 3: .*fid is '1e999', which is not a number"),
    ("model,fid\nGénéral,3\n".encode("latin-1"), "can't decode byte 0xe9"),
    (b"model,fid\n" + b"x" * 200_000 + b",3\n", "field larger than field limit")])
def test_published_rows_that_are_none_end_in_one_line(tmp_path, capsys, content, message):
    write_results(tmp_path / "a", quality=quality_section(10.0))
    table = tmp_path / "rows.csv"
    table.write_bytes(content)
    with pytest.raises(UserError, match="rows.csv .*" + message):
        compared(capsys, tmp_path / "a", "--published", table)


def test_two_results_of_one_checkpoint_stay_apart_if_they_have_the_same_score(tmp_path, capsys):
    write_results(tmp_path / "a", quality=quality_section(10.0, "same"))
    write_results(tmp_path / "b", quality=quality_section(12.0, "same"))
    out = compared(capsys, tmp_path / "a", tmp_path / "b")
    assert f"| {tmp_path}/a | **10.00**" in out and f"| {tmp_path}/b | <u>12.00</u>" in out


@pytest.mark.parametrize("content, message", [
    ("[1, 2]", "not a results.json"), ("nonsense", "not a results.json"),
    ('{"quality": {"fid": 1}}', "not a results.json"), ('{"quality": {"scores": 3}}', "not a results.json"),
    ('{"quality": 3}', "not a results.json"), ('{"other": {"scores": {}}}', "not a results.json"),
    ('{"quality": {"scores": {"fid": null}}}', "quality: fid is None, which is not a number"),
    ('{"quality": {"scores": {"fid": "1"}}}', "quality: fid is '1', which is not a number"),
    ('{"quality": {"scores": {"fid": 1, "fid_error": []}}}', r"fid_error is \[\], which is not"),
    ('{"geneval": {"scores": {"original": 0.5}}}', "not a results.json"),
    ('{"geneval": {"scores": {"original": {"overall": true}}}}', "original overall is True"),
    ('{"quality": {"scores": {"fid": NaN}}}', "quality: fid is nan, which is not a number"),
    ('{"quality": {"scores": {"fid": 1}, "checkpoint": 3}}', "not a results.json"),
    ('{"quality": {"scores": {}, "checkpoint": {"training": {"steps": "x"}}}}', "not a results.json"),
    ('{"quality": {"scores": {"fid": 1}, "settings": []}}', "not a results.json"),
    ('{"quality": {"scores": {"fid": 1}, "notes": "one"}}', "its notes are no list"),
    ('{"quality": {"scores": {"fid": 1' + "0" * 400 + '}}}', "not a results.json"),
    ('{"quality": {"scores": {}, "checkpoint": {"training": {"steps": Infinity}}}}',
     "not a results.json")])
def test_results_that_are_none_end_in_one_line(tmp_path, capsys, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        compared(capsys, tmp_path)
    with pytest.raises(UserError, match="No such file|no results.json"):
        compared(capsys, tmp_path / "absent.json")


# --------------------------------------------------------------------------------------
# `curve`

def test_curve_draws_each_run_against_the_steps_of_its_checkpoints(tmp_path, capsys):
    expected = []
    for run in "dit", "cad":
        for steps, fid in (50000, 30.0), (9000, 80.0), (100000, 25.0):
            training = {"steps": steps} if run == "dit" else None
            write_results(tmp_path / run / f"step-{steps:07}" / "samples",
                          quality=quality_section(fid, training=training))
            expected.append({"run": str(tmp_path / run), "steps": steps, "fid": fid})
    picture = tmp_path / "fig5.svg"
    evaluate.main(["curve", *map(str, sorted(tmp_path.glob("*/step-*"))), "--out", str(picture)])
    rows = [json.loads(line) for line in (tmp_path / "fig5.jsonl").read_text().splitlines()]
    assert rows == sorted(expected, key=lambda row: (row["run"], row["steps"]))
    assert picture.read_text().count("<polyline") == 2
    assert "6 checkpoints of 2 runs" in capsys.readouterr().out

    with pytest.raises(UserError, match="no score 'clip'"):
        evaluate.main(["curve", str(tmp_path / "dit/step-0009000"), "--score", "clip"])
    write_results(tmp_path / "dit/step-0009000/more", quality=quality_section(80.0))
    with pytest.raises(UserError, match="a second fid"):
        evaluate.main(["curve", str(tmp_path / "dit/step-0009000")])
    write_results(tmp_path / "dit/step-0009000", quality=quality_section(80.0, size=64))
    with pytest.raises(UserError, match=r"do not compare, .* another size \(256, 64\)"):
        evaluate.main(["curve", *map(str, (tmp_path / "dit").glob("step-*"))])
    write_results(tmp_path / "final", quality=quality_section(10.0))
    with pytest.raises(UserError, match="after how many steps"):
        evaluate.main(["curve", str(tmp_path / "final")])


def test_curve_knows_checkpoints_of_one_run_however_they_are_named(tmp_path, monkeypatch, capsys):
    for steps in 1000, 2000:
        write_results(tmp_path / f"dit/step-{steps:07}", quality=quality_section(30.0))
    monkeypatch.chdir(tmp_path / "dit/step-0001000")
    evaluate.main(["curve", ".", "../step-0002000", "--out", "../fig5.svg"])
    assert "2 checkpoints of 1 runs" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "dit/fig5.jsonl").read_text().splitlines()]
    assert {row["run"] for row in rows} == {str(tmp_path / "dit")}
    monkeypatch.chdir(tmp_path)
    evaluate.main(["curve", "dit/step-0001000", "--out", "fig5.svg"])
    assert json.loads((tmp_path / "fig5.jsonl").read_text())["run"] == "dit"


@pytest.mark.parametrize("out", ["", ".", "fig.jsonl", "fig"])
def test_curve_writes_only_what_is_called_svg(tmp_path, out):
    write_results(tmp_path / "dit/step-0001000", quality=quality_section(30.0))
    line = refused("evaluate.py", "curve", tmp_path / "dit/step-0001000", "--out", out)
    assert f"--out {out!r}: must be a file that ends in .svg" in line


def test_ten_curves_have_ten_colours():
    picture = line_chart({f"t {k}": [(0, k), (1, k)] for k in range(10)}, "step", "loss")
    assert len(set(re.findall('stroke="(#[0-9a-f]{6})"', picture))) == 10


# --------------------------------------------------------------------------------------
# What GenEval and DPG refuse

def test_given_detections_are_known_by_their_file_or_by_the_name_of_their_detector(tmp_path, capsys):
    pictures(tmp_path / "00000/samples", 1, names="{:01}.png")
    write_lines(tmp_path / "00000/metadata.jsonl", [{"tag": "colors", "prompt": "a", "include": []}])
    given = write_lines(tmp_path / "given.jsonl", [{"file": "00000/samples/0.png", "objects": {}}])
    words = ["geneval", "--images", str(tmp_path), "--detections", str(given)]
    evaluate.main(words)
    row = evaluate.read_row(tmp_path / "results.json")
    assert row.scores["original overall"].made_with["detector"] == evaluate.sha256(given)
    assert f"- objects: detections of an unnamed detector, from {given}" in capsys.readouterr().out
    evaluate.main([*words, "--detector", "mmdet"])
    row = evaluate.read_row(tmp_path / "results.json")
    assert row.scores["original overall"].made_with["detector"] == "mmdet"
    assert f"- objects: detections of mmdet, from {given}" in capsys.readouterr().out


QUESTIONS = ("item_id,proposition_id,dependency,tuple,question_natural_language\n"
             "a,1,0,entity - whole (dog),A dog?\n")


def test_given_answers_are_known_by_their_content_or_by_the_name_of_their_judge(
        tmp_path, monkeypatch, capsys):
    (tmp_path / "dpg.csv").write_text(QUESTIONS)
    contents = {}
    for name, answer in ("one", True), ("two", False):
        folder = tmp_path / name
        folder.mkdir()
        photo(0, (40, 40)).save(folder / "a.png")
        given = write_lines(folder / "answers.jsonl", [{"file": "a.png", "answers": [{"1": answer}]}])
        contents[name] = hashlib.sha256(given.read_bytes()).hexdigest()

    # Two judges wrote their answers to files of one name.
    def run_dpg(name, *options):
        monkeypatch.chdir(tmp_path / name)
        evaluate.sha256.cache_clear()
        evaluate.main(["dpg", "--images", ".", "--questions", "../dpg.csv",
                       "--answers", "answers.jsonl", *options])
        row = evaluate.read_row(Path("results.json"))
        return row.scores["dpg overall"].made_with["judge"]
    assert {name: run_dpg(name) for name in contents} == contents
    out = compared(capsys, tmp_path / "one", tmp_path / "two")
    assert "- not ranked: Entity ↑, Overall ↑; measured with another judge" in out

    assert run_dpg("one", "--judge", "mplug") == run_dpg("two", "--judge", "mplug") == "mplug"
    assert "not ranked" not in compared(capsys, tmp_path / "one", tmp_path / "two")


def test_two_grids_of_one_prompt_are_refused(tmp_path):
    for file in "a.png", "old/a.png":
        (tmp_path / file).parent.mkdir(exist_ok=True)
        photo(0, (40, 40)).save(tmp_path / file)
    (tmp_path / "dpg.csv").write_text(QUESTIONS)
    line = refused("evaluate.py", "dpg", "--images", tmp_path, "--questions", tmp_path / "dpg.csv")
    assert "a.png and old/a.png are both named after prompt a" in line


@pytest.mark.parametrize("side", [float("inf"), 1e300, 1e5])
def test_a_box_larger_than_any_picture_ends_in_one_line(tmp_path, side):
    pictures(tmp_path / "00000/samples", 1)
    (tmp_path / "00000/samples/0000.png").rename(tmp_path / "00000/samples/1.png")
    dog = {"class": "dog", "count": 1, "color": "red"}
    write_lines(tmp_path / "00000/metadata.jsonl",
                [{"tag": "colors", "prompt": "a red dog", "include": [dog]}])
    objects = {"dog": [{"box": [0, 0, side, side], "score": 0.9}]}
    detections = write_lines(tmp_path / "detections.jsonl",
                             [{"file": "00000/samples/1.png", "objects": objects}])
    line = refused("evaluate.py", "geneval", "--images", tmp_path, "--detections", detections)
    assert "1.png: its metadata.jsonl or detections lack something" in line


@pytest.mark.parametrize("answers", [5, True, "yes", [], [5], {"1": True}])
def test_answers_that_are_no_list_end_in_one_line(tmp_path, answers):
    photo(0, (40, 40)).save(tmp_path / "a.png")
    questions = tmp_path / "dpg.csv"
    questions.write_text(QUESTIONS)
    given = write_lines(tmp_path / "given.jsonl", [{"file": "a.png", "answers": answers}])
    line = refused("evaluate.py", "dpg", "--images", tmp_path, "--questions", questions,
                   "--answers", given, "--judge", "us")
    assert 'given.jsonl: "answers" of a.png must list' in line


def test_a_tag_or_a_file_that_is_a_list_ends_in_one_line(tmp_path):
    pictures(tmp_path / "00000/samples", 1)
    metadata = {"tag": ["colors"], "prompt": "a dog", "include": []}
    write_lines(tmp_path / "00000/metadata.jsonl", [metadata])
    detections = write_lines(tmp_path / "detections.jsonl", [{"file": ["a"], "objects": {}}])
    words = ["geneval", "--images", tmp_path, "--detections", detections]
    assert "not a line of GenEval's" in refused("evaluate.py", *words)
    write_lines(tmp_path / "00000/metadata.jsonl", [{**metadata, "tag": "colors"}])
    assert "\"file\" is ['a'], which is not the name of an image" in refused("evaluate.py", *words)


def test_two_questions_of_one_number_are_refused(tmp_path):
    path = tmp_path / "dpg.csv"
    header = "item_id,proposition_id,dependency,tuple,question_natural_language\n"
    path.write_text(header + "a,1,0,entity - whole (dog),A dog?\na,1,0,entity - whole (cat),A cat?\n")
    line = refused("evaluate.py", "dpg", "--images", tmp_path, "--questions", path)
    assert "dpg.csv line 3: prompt a has two questions 1" in line
