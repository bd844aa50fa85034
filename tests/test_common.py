"""What all stages share: errors, files that are whole, captions, settings, ranks, images."""

import argparse
import contextlib
import csv
import errno
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image
from tqdm import tqdm

import common
from common import UserError
from metrics.coco import read_coco_captions

# --------------------------------------------------------------------------------------
# Errors and options

def test_an_error_is_one_line_that_no_progress_bar_touches(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])

    def main():
        bar = tqdm(range(3))
        next(iter(bar))
        raise UserError("--lr 7: must be small,\n  much smaller")

    with pytest.raises(SystemExit) as stop:
        common.command_line(main)
    assert stop.value.code == 2
    last = capsys.readouterr().err.split("\n")[-2:]
    assert last == ["train.py: --lr 7: must be small, much smaller", ""]


def test_options_out_of_bounds_are_named_and_not_a_number_is_out_of_bounds():
    args = argparse.Namespace(batch_size=0, p=float("nan"), clip=None)
    with pytest.raises(UserError, match="--batch-size 0: must be at least 1"):
        common.at_least(args, batch_size=1)
    with pytest.raises(UserError, match="--p nan"):
        common.at_least(args, p=0)
    with pytest.raises(UserError, match="--p nan: must be in"):
        common.between(args, 0, 1, "p")
    # An option that was not given, and one that this command does not have.
    common.at_least(args, clip=0, steps=1)


# --------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("durable", [False, True])
def test_what_failed_half_made_is_not_there(tmp_path, durable):
    path = tmp_path / "new" / "out"
    with pytest.raises(ZeroDivisionError):
        with common.complete(path, durable) as temporary:
            temporary.write_text("half")
            assert not path.exists()
            raise ZeroDivisionError
    assert not list(path.parent.iterdir())
    with common.complete(path, durable) as temporary:
        temporary.write_text("whole")
    assert [file.name for file in path.parent.iterdir()] == ["out"]
    assert path.read_text() == "whole"


def test_a_folder_that_failed_half_made_is_completed_by_the_next_attempt(tmp_path):
    for attempt in ("fails", "is whole"):
        with contextlib.suppress(ZeroDivisionError):
            with common.complete(tmp_path / "out") as temporary:
                temporary.mkdir(exist_ok=True)
                (temporary / "file").write_text(attempt)
                assert not (tmp_path / "out").exists()
                if attempt == "fails":
                    raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/file").read_text() == "is whole"


def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left.*captions.jsonl"):
        with common.complete(tmp_path / "captions.jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")

    # A device that is always full.
    with pytest.raises(OSError, match="No space left.*/dev/full"):
        common.append_jsonl("/dev/full", [{"step": 1}])


def test_jsonl_with_a_torn_last_line_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    # Torn inside a character; and U+2028 is no end of a line.
    path.write_bytes('{"a": "x\u2028y"}\n\n{"a": "ä'.encode()[:-1])
    assert common.read_jsonl(path) == [{"a": "x\u2028y"}]


def test_jsonl_with_other_damage_is_refused_and_the_line_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        common.read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(UserError, match="line 1: not a JSON object"):
        common.read_jsonl(path)
    with pytest.raises(UserError, match="No such file"):
        common.read_jsonl(tmp_path / "none.jsonl")


def test_jsonl_keeps_every_name_even_one_that_is_not_utf8(tmp_path):
    rows = [{"file": "latin-\udce4.jpg"}, {"file": "ä\u2028\n"}]
    common.write_jsonl(tmp_path / "a.jsonl", rows)
    assert common.read_jsonl(tmp_path / "a.jsonl") == rows


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
def test_json_that_is_no_object_is_refused_and_named(tmp_path, content):
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(UserError, match="meta.json: not the settings of a car"):
        common.read_json(tmp_path / "meta.json", "the settings of a car")


# --------------------------------------------------------------------------------------
# Captions

def test_our_captions_and_those_of_the_authors_captioner_are_read(tmp_path):
    ours = tmp_path / "a.jsonl"
    ours.write_bytes('{"file": "n1/ä b.jpg", "caption": "x\u2028y"}\n{"file": "c", '.encode())
    assert common.read_captions(ours) == {"n1/ä b.jpg": "x\u2028y"}
    theirs = tmp_path / "a.tsv"
    theirs.write_text('n1_1.JPEG\tA dog. It "sits".\nn1_2.JPEG\tA cat\twith a tab.\nn1_3')
    assert common.read_captions(theirs) == {"n1_1.JPEG": 'A dog. It "sits".',
                                            "n1_2.JPEG": "A cat\twith a tab."}


def test_the_authors_published_captions_are_read_as_they_are(tmp_path):
    captions = {"n01440764_10026.JPEG": 'A fish, a "tench".\nIt is green.',
                "n01440764_10027.JPEG": "Un élève\u2028et un poisson"}
    rows = [{"image_path": file, "caption": text} for file, text in captions.items()]
    common.write_jsonl(tmp_path / "a.jsonl", rows)
    assert common.read_captions(tmp_path / "a.jsonl") == captions
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["", "image_path", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    assert common.read_captions(tmp_path / "a.csv") == captions


@pytest.mark.parametrize("name, content, expected", [
    ("a.tsv", b"1.jpg\tA dog.\n1.jpg\tA cat.\n", "two folders"),
    ("a.tsv", b"1.jpg A dog.\n", "caption 1: needs a file and a caption"),
    ("a.tsv", b"1.jpg\t\xff\n", "not UTF-8"),
    ("a.jsonl", b'{"file": "a"}\n', "needs a file and a caption"),
    ("a.jsonl", b'{"file": "a", "caption": 3}\n', "needs a file and a caption"),
    ("a.jsonl", b'{"image_path": "", "caption": "x"}\n', "needs a file and a caption"),
    ("a.jsonl", b"what\n", "not JSON"),
    ("a.csv", b"file,caption\n1.jpg,A dog.\n2.jpg\n", "caption 2: needs a file"),
    ("a.csv", b"image,text\n1.jpg,A dog.\n", "must name the columns.*is image, text"),
    ("a.csv", b"", "must name the columns.*is empty"),
    ("a.csv", b"file,caption\n1.jpg,\xff\n", "not UTF-8"),
    ("a.csv", b"file,caption\n1.jpg," + 200_000 * b"x", "line 2: not CSV"),
    ("a.parquet", b"PAR1", "Parquet is not read here")])
def test_a_bad_captions_file_is_refused_with_the_reason(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        common.read_captions(tmp_path / name)


def coco_file(path, numbers, changes=None):
    """Write an annotation file of COCO's kind, with 3 captions an image, all shuffled.

    numbers: the ids of its images; changes: entries of the file to replace.
    """
    data = {"info": {}, "images": [], "annotations": []}
    for k in numbers:
        file = f"COCO_val2014_{k:012d}.jpg"
        data["images"].append({"id": k, "file_name": file, "height": 480})
        for i in range(3):
            text = f"Bild {k}: {'eins zwei drei'.split()[i]}, schön"
            data["annotations"].append({"id": 100 * i + k, "image_id": k, "caption": text})
    random.Random(0).shuffle(data["images"])
    random.Random(0).shuffle(data["annotations"])
    path.write_text(json.dumps({**data, **(changes or {})}))
    return path


def test_cocos_prompts_are_each_images_first_caption_in_order(tmp_path):
    prompts = read_coco_captions(coco_file(tmp_path / "coco.json", range(50)))
    assert len(prompts) == 50
    for k, prompt in enumerate(prompts):
        name = f"COCO_val2014_{k:012d}"
        assert prompt == {"prompt": f"Bild {k}: eins, schön", "name": name,
                          "file": f"{name}.jpg"}


def test_a_limit_of_cocos_images_chooses_by_seed_and_nothing_else(tmp_path):
    path = coco_file(tmp_path / "coco.json", range(50))
    ten = read_coco_captions(path, limit=10)
    files = [prompt["file"] for prompt in ten]
    assert len(set(files)) == 10 and files == sorted(files)
    assert ten == read_coco_captions(path, limit=10, seed=0)
    assert ten != read_coco_captions(path, limit=10, seed=1)

    # A lower limit takes a part of it; one above the number of images takes all.
    five = read_coco_captions(path, limit=5)
    assert len(five) == 5 and all(prompt in ten for prompt in five)
    assert len(read_coco_captions(path, limit=99)) == 50

    # In a file of these ten only, the same five are taken.
    numbers = [int(prompt["name"][-12:]) for prompt in ten]
    few = coco_file(tmp_path / "few.json", numbers)
    assert read_coco_captions(few, limit=5) == five


def test_cocos_images_without_a_caption_are_left_out(tmp_path):
    blank = {"id": 1, "image_id": 1, "caption": " \n"}
    other = {"id": 2, "image_id": 1, "caption": "a "}
    path = coco_file(tmp_path / "coco.json", range(2), {"annotations": [blank, other]})
    assert [prompt["prompt"] for prompt in read_coco_captions(path)] == ["a"]


@pytest.mark.parametrize("changes, expected", [
    ({"images": None}, "no list of 'images'"),
    ({"images": [3]}, "entry 1 of 'images' needs 'id'"),
    ({"images": [{"id": 0, "file_name": 3}]}, "needs 'file_name', a text, and has 3"),
    ({"images": [{"id": k, "file_name": ".."} for k in range(2)]}, "no file name"),
    ({"images": [{"id": k, "file_name": "a.jpg"} for k in range(2)]}, "same name"),
    ({"images": []}, r"describes image [01], which is not among its images"),
    ({"annotations": []}, "no image in it has a caption"),
    ({"annotations": [{"id": 1, "image_id": 7, "caption": "x"}]}, "describes image 7"),
    ({"annotations": [{"id": 1, "image_id": 0, "caption": 3}]}, "a text, and has 3"),
    ({"annotations": [{"id": 1, "image_id": "0", "caption": "x"}]}, "a whole number")])
def test_a_damaged_annotation_file_is_refused_with_the_reason(tmp_path, changes, expected):
    path = coco_file(tmp_path / "coco.json", range(2), changes)
    with pytest.raises(UserError, match=expected) as error:
        read_coco_captions(path)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------
# Settings, ranks

def test_an_output_goes_on_with_the_settings_it_was_begun_with(tmp_path):
    settings = {"size": 256, "betas": (0.9, 0.99)}
    path = tmp_path / "new" / "settings.json"
    common.begin_or_resume(path, "out", settings)
    common.begin_or_resume(path, "out", settings)
    for other in ({**settings, "size": 512}, {**settings, "more": 1}, {"size": 256}):
        with pytest.raises(UserError, match="out: begun with other settings"):
            common.begin_or_resume(path, "out", other)
    path.write_text("{")
    with pytest.raises(UserError, match="settings.json"):
        common.begin_or_resume(path, "out", settings)


def test_two_commands_do_not_write_to_one_folder_at_once(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    with common.only_command(folder):
        with pytest.raises(UserError, match="another command is writing to it"):
            with common.only_command(folder):
                pass
        # Ranks of one command do.
        monkeypatch.setenv("RANK", "1")
        with common.only_command(folder):
            (folder / "file").touch()
    with common.only_command(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_full_disk_does_not_keep_a_folder_from_being_locked(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with common.only_command(tmp_path):
        with pytest.raises(UserError, match="another command is writing to it"):
            with common.only_command(tmp_path):
                pass
    # Nothing is left behind.
    assert not tmp_path.exists()


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert common.local_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="--nproc-per-node 4"):
        common.local_device()


def test_a_gpu_without_enough_memory_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    with pytest.raises(SystemExit) as ended:
        common.command_line(main)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--micro-batch" in message


def test_a_lock_that_was_deleted_after_it_was_opened_is_opened_again(tmp_path, monkeypatch):
    real = common.try_to_lock
    seen = []

    def deleted_meanwhile(lock):
        if not seen:
            os.unlink(lock.name)
        seen.append(lock.name)
        return real(lock)

    monkeypatch.setattr(common, "try_to_lock", deleted_meanwhile)
    with common.only_command(tmp_path):
        assert len(seen) == 2 and os.path.exists(seen[0])


@pytest.mark.parametrize("rank, world", [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_a_rank_that_is_none_is_refused(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match="RANK"):
        common.rank_and_world()


# --------------------------------------------------------------------------------------
# Images

def test_images_are_listed_in_order_and_nothing_else_is(tmp_path):
    for file in ("b/2.JPG", "b/10.png", "a.webp", "b/text.txt", ".hidden/1.png", "b/.2.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert common.list_images(tmp_path) == ["a.webp", "b/10.png", "b/2.JPG"]
    with pytest.raises(UserError, match="no such folder"):
        common.list_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in it"):
        common.list_images(tmp_path / "empty")


def test_every_kind_of_picture_becomes_the_same_rgb(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    grey = Image.fromarray(ramp)
    opaque = Image.new("L", (64, 64), 255)
    alpha = Image.merge("RGBA", [grey, grey, grey, opaque])
    kinds = {"l.png": grey, "1.gif": grey, "p.png": grey.convert("P"),
             "rgba.png": alpha, "la.png": alpha.convert("LA"),
             "i16.png": Image.fromarray(ramp.astype(np.uint16) * 257),
             "i.tif": Image.fromarray(ramp.astype(np.int32) * 257),
             "cmyk.tif": grey.convert("RGB").convert("CMYK")}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        got = common.load_image(tmp_path / name, 64)
        assert got.mode == "RGB", name
        assert np.abs(np.asarray(got).astype(int) - ramp[..., None]).max() <= 1, name


def test_transparent_parts_are_white(tmp_path):
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(tmp_path / "alpha.png")
    Image.new("P", (20, 20), 0).save(tmp_path / "palette.png", transparency=0)
    Image.new("LA", (20, 20), (0, 128)).save(tmp_path / "half.png")
    for name, level in (("alpha.png", 255), ("palette.png", 255), ("half.png", 127)):
        image = common.load_image(tmp_path / name, 16)
        assert image.getpixel((8, 8)) == (level, level, level), name


@pytest.mark.parametrize("size", [31, 64, 85, 256])
def test_a_part_of_a_cropped_picture_is_that_part(size):
    for source in [(500, 375), (333, 500), (51, 77)]:
        whole = common.resize_and_crop(photo(9, source), size)
        for box in [(size // 2, 0, size, size), (0, size // 2, size, size)]:
            part = np.asarray(common.resize_and_crop(photo(9, source), size, box))
            expected = np.asarray(whole.crop(box)).astype(int)
            assert np.abs(expected - part).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_rotation_is_applied_and_a_damaged_exif_block_ignored(tmp_path):
    upright = photo(3, (64, 64))
    # The camera lay on its side: turn by 270 degrees to see it.
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "side.jpg", quality=95, exif=exif)
    damaged = b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff\x00\x01"
    upright.save(tmp_path / "broken.jpg", quality=95, exif=damaged)
    for name in ("side.jpg", "broken.jpg"):
        got = np.asarray(common.load_image(tmp_path / name, 64)).astype(int)
        assert np.abs(got - np.asarray(upright)).mean() < 4, name


def test_nothing_is_squashed(tmp_path):
    circle = np.hypot(*np.ogrid[-100:100, -150:150]) < 80
    Image.fromarray((circle * 255).astype(np.uint8)).save(tmp_path / "circle.png")
    got = np.asarray(common.load_image(tmp_path / "circle.png", 100))[..., 0] > 127
    width = got.any(0).sum()
    height = got.any(1).sum()
    assert abs(int(width) - 80) <= 1 and abs(int(height) - 80) <= 1


def test_decoding_a_jpeg_at_reduced_scale_loses_nothing_that_can_be_seen(tmp_path):
    # The spectrum of a natural photo: octaves of noise, each half as strong as the last.
    rng = np.random.default_rng(0)
    levels = 0
    for k in range(8):
        noise = rng.integers(0, 256, (5 << k, 6 << k, 3), dtype=np.uint8)
        octave = Image.fromarray(noise).resize((1504, 1200), Image.Resampling.BICUBIC)
        levels = levels + np.asarray(octave, np.float32) / 2 ** k
    big = Image.fromarray((levels / 2).astype(np.uint8))
    big.save(tmp_path / "big.jpg", quality=95)

    # A quarter of 1504 x 1200 is still large enough.
    assert common.open_image(tmp_path / "big.jpg", 256).size == (376, 300)
    with Image.open(tmp_path / "big.jpg") as image:
        full = np.asarray(common.resize_and_crop(image.convert("RGB"), 128)).astype(float)
    error = np.asarray(common.load_image(tmp_path / "big.jpg", 128)) - full
    decibels = 10 * np.log10(255 ** 2 / (error ** 2).mean())
    assert decibels > 40


def test_a_file_that_is_no_image_is_named_in_one_line(tmp_path):
    (tmp_path / "a.png").write_text("text")
    for name in ("a.png", "none.png"):
        with pytest.raises(OSError, match=f"{name}: not a readable image") as error:
            common.open_image(tmp_path / name, 64)
        assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------
# The hub

def test_fetch_asks_the_hub_only_for_what_may_be_there(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
    asked = []
    is_online = True

    def download(repo, name, local_files_only):
        asked.append((repo, name, local_files_only))
        if local_files_only or not is_online:
            raise LocalEntryNotFoundError("no connection\nsecond line")
        if name != "b":
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return tmp_path / name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()

    # First what was downloaded before, then the hub.
    assert common.fetch("some/repo", "a", "b") == tmp_path / "b"
    assert asked == [("some/repo", name, cached) for cached in (True, False)
                     for name in "ab"]
    with pytest.raises(UserError, match="some/repo: no such folder, or no a or c in it"):
        common.fetch("some/repo", "a", "c")
    is_online = False
    with pytest.raises(UserError, match=r"some/repo: .* hub \(no connection second line\)$"):
        common.fetch("some/repo", "b")

    # A path that is mistyped is not asked for.
    asked.clear()
    for mistyped in ("runs/mine", "../mine", tmp_path / "mine"):
        with pytest.raises(UserError, match="no such folder"):
            common.fetch(mistyped, "b")
    assert not asked


def test_fetch_finds_the_first_name_in_a_folder(tmp_path):
    (tmp_path / "b").touch()
    (tmp_path / "c").touch()
    assert common.fetch(tmp_path, "a", "b", "c") == tmp_path / "b"


# --------------------------------------------------------------------------------------
# Signals

def test_a_process_started_while_signals_wait_outlives_those_that_all_processes_get():
    with common.StopRequest() as stop:
        stop.worth_saving = True
        with common.signals_wait():
            helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            signal.raise_signal(signal.SIGTERM)
            assert stop.name == ""
        assert stop.name == "SIGTERM"
    helper.send_signal(signal.SIGTERM)
    helper.send_signal(signal.SIGINT)
    # It ends as it would have, without an error.
    helper.communicate(b"\n", timeout=60)
    assert helper.returncode == 0
