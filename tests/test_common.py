"""What all stages share: mistakes, whole files, outputs that ranks make together, images, the hub."""

import errno
import io
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import photo, refusal, run
from PIL import Image
from tqdm import tqdm

import common
from common import UserError

# ---- Mistakes and options

@pytest.mark.parametrize("error, line", [
    (UserError("--lr 7: must be small,\n  much smaller"), "--lr 7: must be small, much smaller"),
    (torch.OutOfMemoryError("CUDA out of memory.\nGPU 0"), "CUDA out of memory. .*--micro-batch")])
def test_an_error_is_one_line_that_no_progress_bar_touches(capsys, monkeypatch, error, line):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py"])

    def main():
        bar = iter(tqdm(range(3)))
        next(bar)
        raise error

    with pytest.raises(SystemExit) as stop:
        common.command_line(main)
    assert stop.value.code == 2
    *_, last, nothing = capsys.readouterr().err.split("\n")
    assert re.match(f"train.py: {line}", last) and not nothing


def test_what_a_terminal_cannot_show_ends_no_run(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    common.command_line(lambda: print("caf\xe9 \udcff", flush=True))
    assert terminal.buffer.getvalue() == b"caf\\xe9 \\udcff\n"


@pytest.mark.parametrize("content, why", [
    (b"\xff", "UnicodeDecodeError"), (b"{", "JSONDecodeError"), (b"[" * 100_000, "Recursion"),
    (b"[3]", "no JSON object"), (b"", "JSONDecodeError"), (b"version https://git-lfs.x", "git-lfs")])
def test_whatever_is_wrong_with_a_file_is_one_line_with_its_name(tmp_path, content, why):
    (tmp_path / "car.json").write_bytes(content)
    line = refusal(common.read_json, tmp_path / "car.json", "the settings of a car")
    assert "car.json: not the settings of a car (" in line and why in line and len(line) < 500
    assert "none: No such file" in refusal(common.read_json, tmp_path / "none", "a car")


def test_an_output_that_is_an_input_or_lies_in_one_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for out in ("photos", "photos/out", "link/out", "photos/../photos"):
        assert "choose another" in refusal(common.keep_apart, tmp_path / out, None, tmp_path / "photos")
    common.keep_apart(tmp_path / "photos-2", None, tmp_path / "photos")


# ---- Files

def test_what_failed_half_made_is_not_there_and_a_full_disk_is_told_with_the_files_name(tmp_path):
    path = tmp_path / "new" / "out"
    with pytest.raises(OSError, match="No space left.*new/out"):
        with common.complete(path) as temporary:
            temporary.write_text("half")
            assert not path.exists()
            raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(path.parent.iterdir())
    with common.complete(path) as temporary:
        temporary.write_text("whole")
    assert [file.name for file in path.parent.iterdir()] == ["out"]
    assert path.read_text() == "whole"


def test_jsonl_keeps_every_name_and_a_torn_last_line_is_left_out(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    # A name that is not UTF-8; U+2028 is no end of a line.
    rows = [{"file": "latin-\udce4.jpg"}, {"file": "ä\u2028\n"}]
    common.write_jsonl(path, rows)
    # A mark in front; torn inside a character.
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + '\n{"a": "x\u2028y"}\n{"a": "ä'.encode()[:-1])
    assert common.read_jsonl(path) == [*rows, {"a": "x\u2028y"}]
    assert "torn" in capsys.readouterr().err


# ---- An output that is made of files

UNITS = {f"{k}.txt": k for k in range(7)}


def make(out, settings=None, units=UNITS, maker=None):
    return common.make_together(out, settings or {"size": 3, "box": [1, 2]}, units, maker)


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_any_number_of_ranks_makes_what_a_kill_left_and_the_last_one_learns_that_all_is_there(
        tmp_path, monkeypatch, world):
    asked = []

    def tenfold(numbers):
        for k in numbers:
            asked.append(k)
            yield str(10 * k).encode()

    def killed(numbers):
        yield from tenfold(numbers[:3])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, maker=killed)
    assert asked == [0, 1, 2]
    (tmp_path / "0.txt").write_bytes(b"")
    # What a rank of another number of ranks was killed over.
    (tmp_path / ".3.txt.7.tmp").write_text("half")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    ended = []
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        ended.append(make(tmp_path, maker=tenfold))
    assert ended == [False] * (world - 1) + [True]
    assert sorted(asked[3:]) == [0, 3, 4, 5, 6]
    (tmp_path / "settings.json").unlink()
    content = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert content == {name: str(10 * k) for name, k in UNITS.items()}


def test_settings_bind_as_soon_as_one_unit_is_there(tmp_path):
    with pytest.raises(ZeroDivisionError):
        make(tmp_path, {"size": 1}, maker=lambda numbers: (1 / k for k in numbers))
    assert make(tmp_path, {"size": 3, "cuts": {"1/2": 1}}, {"0.txt": 0}, lambda _: [b"0"])
    for other, words in [({"size": 4, "cuts": {"1/2": 1}}, "size 3, now 4"),
                         ({"size": 3, "cuts": {"1/2": 1, "1/25": 5}}, "1/25 None, now 5"),
                         ({"size": 3}, "cuts {'1/2': 1}, now None")]:
        assert f"other settings ({words}" in refusal(make, tmp_path, other, {"0.txt": 0})
    (tmp_path / "settings.json").unlink()
    assert "0.txt: not made by this command" in refusal(make, tmp_path)
    (tmp_path / "0.txt").unlink()
    (tmp_path / "settings.json").write_text('{"of": "another command"}')
    assert "other settings (of another command, now None)" in refusal(make, tmp_path)


def test_while_a_command_is_at_work_nobody_else_is_and_a_kill_leaves_no_lock(tmp_path):
    def slow(numbers):
        yield b"0"
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=make, args=(tmp_path, None, UNITS, slow))
    process.start()
    while not (tmp_path / "0.txt").exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert "another command is writing" in refusal(make, tmp_path)
    process.kill()
    process.join()
    assert make(tmp_path, maker=lambda numbers: [b"1"] * len(numbers))


def test_rows_are_joined_in_order_and_an_output_of_nothing_is_tried_again(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "0").write_text('{"file": "a", "reason": "broken"}\n')
    (tmp_path / "1").touch()
    products = (tmp_path / "rows.jsonl", tmp_path / "skipped.jsonl")
    line = refusal(common.join_rows, tmp_path, ["0", "1"], *products)
    assert "rows.jsonl: nothing could be made of 1 files; the first: a: broken" in line
    assert not list(tmp_path.iterdir())
    (tmp_path / "0").write_text('{"file": "a", "reason": "broken"}\n{"file": "b"}\n')
    (tmp_path / "1").write_text('{"file": "c"}\n')
    common.join_rows(tmp_path, ["0", "1"], *products)
    assert "2 rows in" in capsys.readouterr().out
    assert [row["file"] for row in common.read_jsonl(products[0])] == ["b", "c"]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_reading_ahead_keeps_the_order_hands_on_errors_and_does_not_run_far_ahead(threads):
    begun = []

    def function(k):
        begun.append(k)
        time.sleep(0.001 * (k % 3))
        return 1 / (50 - k)

    results = common.ahead(function, range(100), threads)
    assert next(results) == 1 / 50
    time.sleep(0.05)
    assert len(begun) <= 2 * threads + 1
    assert [next(results) for _ in range(49)] == [1 / (50 - k) for k in range(1, 50)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_rank_that_is_none_or_has_no_gpu_of_its_own_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("2", "-1", "x"):
        monkeypatch.setenv("RANK", rank)
        assert f"RANK {rank}, WORLD_SIZE 2" in refusal(common.rank_and_world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert common.local_device() == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "4")
    assert "--nproc-per-node 4" in refusal(common.local_device)


def test_ctrl_c_while_torch_is_imported_shows_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    done = run("encode.py", PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="")
    assert done.returncode == -signal.SIGINT and not done.stderr.strip(), done.stderr


# ---- Images

def test_images_are_listed_in_order_and_none_twice_where_a_link_leads_back_up(tmp_path):
    for file in ("b/2.JPG", "b/10.png", "a.webp", "b/text.txt", ".hidden/1.png", "b/.2.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "b/up").symlink_to(tmp_path)
    (tmp_path / "b/self").symlink_to(tmp_path / "b")
    # It cannot be read, and will be named where it is opened.
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    # A folder beside is entered by both its names, but not again below itself.
    (tmp_path / "c").symlink_to(tmp_path / "b")
    expected = ["a.webp", "b/10.png", "b/2.JPG", "c/10.png", "c/2.JPG", "loop.png"]
    assert common.list_images(tmp_path) == expected


def test_every_kind_of_picture_becomes_the_same_rgb(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))
    grey = Image.fromarray(ramp)
    alpha = Image.merge("RGBA", [grey, grey, grey, Image.new("L", (64, 64), 255)])
    sixteen = Image.fromarray(ramp.astype(np.uint16) * 257)
    kinds = {"l.png": grey, "1.gif": grey, "p.png": grey.convert("P"), "rgba.png": alpha,
             "la.png": alpha.convert("LA"), "i16.png": sixteen, "i16.tif": sixteen,
             "cmyk.tif": grey.convert("RGB").convert("CMYK")}
    for name, image in kinds.items():
        image.save(tmp_path / name)
        got = common.load_image(tmp_path / name, 64)
        assert got.mode == "RGB", name
        assert np.abs(np.asarray(got).astype(int) - ramp[..., None]).max() <= 1, name


@pytest.mark.parametrize("mode, color, more, level", [
    ("RGBA", (200, 0, 0, 0), {}, 255), ("P", 0, {"transparency": 0}, 255), ("LA", (0, 128), {}, 127)])
def test_transparent_parts_are_white(tmp_path, mode, color, more, level):
    Image.new(mode, (20, 20), color).save(tmp_path / "a.png", **more)
    assert common.load_image(tmp_path / "a.png", 16).getpixel((8, 8)) == (level,) * 3


def test_a_file_that_is_no_picture_or_whose_white_is_unknown_is_named_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.zeros((8, 8), np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "12bits.tif")
    for name, why in [("text.png", "identify"), ("none.png", "No such file"), ("pipe.png", "regular"),
                      ("pointer.png", "git-lfs pointer"), ("float.tif", "32 bits"), ("int.tif", "32 bits"),
                      ("12bits.tif", "16 bits")]:
        with pytest.raises(OSError, match=f"not a readable image .*{why}") as error:
            common.open_image(tmp_path / name, 64)
        assert common.one_line(error.value).startswith(f"{tmp_path / name}: not a readable image")


@pytest.mark.parametrize("size", [31, 85, 256])
def test_a_part_of_a_cropped_picture_is_that_part(size):
    for source in [(500, 375), (333, 500), (51, 77)]:
        whole = common.resize_and_crop(photo(9, source), size)
        for box in [(size // 2, 0, size, size), (0, size // 2, size, size)]:
            part = np.asarray(common.resize_and_crop(photo(9, source), size, box))
            expected = np.asarray(whole.crop(box)).astype(int)
            assert np.abs(expected - part).max() <= 2


def test_exif_rotation_is_applied_and_a_damaged_exif_block_is_told_with_the_files_name(tmp_path, monkeypatch):
    told = []
    # As outside of pytest, which collects warnings.
    monkeypatch.setattr(warnings, "showwarning",
                        lambda *about: told.append(warnings.formatwarning(*about[:4])))
    upright = photo(3, (64, 64))
    # The camera lay on its side: turn by 270 degrees to see it.
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    damaged = b"Exif\x00\x00MM\x00\x2a\x00\x00\xff\xff\x00\x01"
    for name, image, block in [("side.jpg", turned, exif), ("broken.jpg", upright, damaged)]:
        image.save(tmp_path / name, quality=95, exif=block)
        got = np.asarray(common.load_image(tmp_path / name, 64)).astype(int)
        assert np.abs(got - np.asarray(upright)).mean() < 4, name
    assert told
    for line in told:
        assert line.startswith(f"{tmp_path}/broken.jpg: ") and line.count("\n") == 1


def test_decoding_a_jpeg_at_reduced_scale_loses_nothing_that_can_be_seen(tmp_path):
    # The spectrum of a natural photo: octaves of noise, each half as strong as the last.
    rng = np.random.default_rng(0)
    levels = 0
    for k in range(8):
        noise = Image.fromarray(rng.integers(0, 256, (5 << k, 6 << k, 3), dtype=np.uint8))
        levels = levels + np.asarray(noise.resize((1504, 1200)), np.float32) / 2 ** (k + 1)
    Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "big.jpg", quality=95)
    # A quarter of 1504 x 1200 is still large enough.
    assert common.open_image(tmp_path / "big.jpg", 256).size == (376, 300)
    with Image.open(tmp_path / "big.jpg") as image:
        full = np.asarray(common.resize_and_crop(image.convert("RGB"), 128)).astype(float)
    error = np.asarray(common.load_image(tmp_path / "big.jpg", 128)) - full
    # 53 decibels; decoded at this size at once, the file would give 51.
    assert (error ** 2).mean() < 255 ** 2 / 10 ** 5.3


# ---- Charts

def test_a_chart_has_round_numbers_around_all_values_leaves_out_what_has_no_place_and_escapes_names():
    assert common.axis([-2e-7, 5e9]) == [0, 1e9, 2e9, 3e9, 4e9, 5e9]
    assert common.axis([0.12, 0.37]) == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])
    curves = {"<a>": [(0, 1.0), (1, float("nan")), (2, 0.1)], "b": [(1, -1)]}
    chart = common.line_chart(curves, "x", "y", log=True)
    assert "nan" not in chart and "&lt;a&gt;" in chart and "<a>" not in chart
    assert chart.count('stroke-linecap="round"') == 2
    assert common.line_chart({}, "x", "y").endswith("</svg>")


# ---- The hub

def test_fetch_asks_the_hub_only_for_what_may_be_there(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
    not_cached = LocalEntryNotFoundError("not in the cache")
    absent = RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
    download = mock.Mock(side_effect=[not_cached, not_cached, absent, tmp_path / "b"])
    session = mock.Mock()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    # First what was downloaded before, then the hub.
    assert common.fetch("some/repo", "a", "b") == tmp_path / "b"
    expected = [mock.call("some/repo", name, local_files_only=True) for name in "ab"]
    assert download.mock_calls == expected + [mock.call("some/repo", name) for name in "ab"]
    download.side_effect = [not_cached, not_cached, absent, absent]
    assert "not on the hub (no a or c in it)" in refusal(common.fetch, "some/repo", "a", "c")
    download.side_effect = [not_cached]
    session.head.side_effect = OSError("no connection\nsecond line")
    assert "not on the hub (no connection second line)" in refusal(common.fetch, "some/repo", "b")
    # What a folder holds, and a path that is mistyped, are not asked for.
    (tmp_path / "c").write_text("")
    assert common.fetch(tmp_path, "a", "c") == tmp_path / "c"
    download.side_effect = AssertionError
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for mistyped in ("runs/mine", "../mine", tmp_path / "mine"):
        assert "no such folder, or" in refusal(common.fetch, mistyped, "b")
