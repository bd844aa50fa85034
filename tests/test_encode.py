"""Stage 3: the encoders against their references, the encoded data set, what happens when things go wrong."""

import errno
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import common
import encode
from common import UserError, load_image

ROOT = Path(__file__).resolve().parent.parent
VAE = Path(__file__).parent / "fixtures" / "vae_tiny"
WORDS = ["a", "red", "blue", "circle", "square", "star", "cat", "on", "the", "left", "of", ",", ".", "two"]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """A T5 with its decoder, as in flan-t5-xl's folder, in several files; and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
    folder = tmp_path_factory.mktemp("t5")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                      decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def sentence(i):
    rng = np.random.default_rng(i)
    return " ".join(rng.choice(WORDS, int(rng.integers(2, 30))))


def photo(i, size=(70, 64)):
    pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path, t5_folder):
    """24 pictures in 3 classes and their captions -> a function that encodes them, in this process."""
    rows = []
    for i in range(24):
        file = f"class{i // 8}/{i:02d} é.png"
        (tmp_path / "images" / file).parent.mkdir(parents=True, exist_ok=True)
        photo(i).save(tmp_path / "images" / file)
        rows.append({"file": file, "caption": sentence(i)})

    def arguments(out="out", captions="captions.jsonl", **options):
        options = {"vae": VAE, "text_encoder": t5_folder, "size": 32, "shard_images": 5, "batch_size": 3,
                   "workers": 0, **options, "images": tmp_path / "images", "captions": tmp_path / captions,
                   "out": tmp_path / out}
        return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]

    def run(*args, **options):
        encode.main(arguments(*args, **options))
        return tmp_path / (args[0] if args else options.get("out", "out"))

    run.folder, run.rows, run.arguments = tmp_path, rows, arguments
    run.write = lambda rows, name="captions.jsonl": (tmp_path / name).write_text(
        "".join(json.dumps(row) + "\n" for row in rows))
    run.write(rows[::-1])                                # any order
    return run


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# -----------------------------------------------------------------------------------------------------------
# The encoders

def test_the_autoencoder_equals_diffusers():
    vae, io = encode.load_vae(VAE), load_file(VAE / "io.safetensors")
    mean, std = vae.encode(io["image"])
    assert max(relative(mean, io["mean"]), relative(std, io["std"])) < 1e-5
    assert relative(vae.decode(io["latent"]), io["decoded"]) < 1e-5


def test_an_old_diffusers_folder_gives_equal_latents(tmp_path):
    config = json.loads((VAE / "config.json").read_text())
    del config["scaling_factor"]
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in load_file(VAE / "diffusion_pytorch_model.safetensors").items():
        for new, old in names.items():
            if f".{new}." in name:
                name = name.replace(new, old)
                tensor = tensor[:, :, None, None].contiguous() if tensor.ndim == 2 else tensor
        weights[name] = tensor
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    vae, image = encode.load_vae(tmp_path), load_file(VAE / "io.safetensors")["image"]
    assert vae.scaling_factor == 0.18215
    for ours, reference in zip(vae.encode(image), encode.load_vae(VAE).encode(image)):
        assert torch.equal(ours, reference)


CONFIG = (VAE / "config.json").read_text()


@pytest.mark.parametrize("file, content, message", [
    ("config.json", b"{", "no AutoencoderKL of diffusers"), ("config.json", None, "no config.json in it"),
    ("config.json", CONFIG.replace("16", "24").encode(), "size mismatch"),
    ("diffusion_pytorch_model.safetensors", None, "no diffusion_pytorch_model.safetensors in it"),
    ("diffusion_pytorch_model.safetensors", b"half", "no AutoencoderKL of diffusers")])
def test_a_folder_that_is_no_autoencoder_ends_in_one_line(tmp_path, file, content, message):
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        if name != file or content:
            (tmp_path / name).write_bytes(content if name == file else (VAE / name).read_bytes())
    with pytest.raises(UserError, match=message) as error:
        encode.load_vae(tmp_path)
    assert "\n" not in str(error.value)


def test_fetch_asks_the_hub_only_for_what_may_be_there(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
    asked, online = [], True

    def download(repo, name, local_files_only):
        asked.append((repo, name, local_files_only))
        if local_files_only or not online:
            raise LocalEntryNotFoundError("no connection\nsecond line")
        if name != "b":
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return tmp_path / name

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert common.fetch("some/repo", "a", "b") == tmp_path / "b"
    assert asked == [("some/repo", name, cached) for cached in (True, False) for name in "ab"]
    with pytest.raises(UserError, match="some/repo: no such folder, or no a or c in it"):
        common.fetch("some/repo", "a", "c")
    asked, online = [], False
    with pytest.raises(UserError, match=r"some/repo: no such .* hub \(no connection second line\)$"):
        common.fetch("some/repo", "b")
    asked = []
    for typo in ("runs/mine", "../mine", tmp_path / "mine"):
        with pytest.raises(UserError, match="no such folder"):
            common.fetch(typo, "b")
    assert not asked


def test_captions_in_a_batch_are_encoded_as_each_alone(t5_folder):
    from transformers import AutoTokenizer, T5ForConditionalGeneration
    captions = ["a red circle", "", sentence(3), "blue " * 300]
    text, mask = encode.encode_text(*encode.load_text_encoder(t5_folder), captions)
    assert text.shape[:2] == mask.shape == (4, 256) and mask.dtype == torch.bool
    assert mask[1].sum() == 1 and mask[3].all()
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    whole = T5ForConditionalGeneration.from_pretrained(t5_folder)
    for i, caption in enumerate(captions):
        ids = tokenizer(caption).input_ids
        ids = torch.tensor([ids if len(ids) <= 256 else [*ids[:255], 1]])
        alone = whole.encoder(input_ids=ids).last_hidden_state[0].detach()
        assert relative(text[i][mask[i]], alone) < 1e-5


def test_weights_that_are_missing_are_not_replaced_by_random_ones(tmp_path, t5_folder):
    from transformers import AutoTokenizer, T5EncoderModel
    t5 = T5EncoderModel.from_pretrained(t5_folder)
    AutoTokenizer.from_pretrained(t5_folder).save_pretrained(tmp_path)
    t5.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"encoder.block.1.layer.0.SelfAttention.q.weight is missing"):
        encode.load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a T5 with its tokenizer"):
        encode.load_text_encoder(tmp_path)


def test_float8_keeps_a_token_to_three_percent_and_outliers_exactly_in_range():
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    x[:50, 7] *= 300                                     # T5's features are of very different size
    x[3] = 0
    packed = encode.pack(x, "float8")
    y = encode.unpack(**packed)
    assert y.dtype == torch.bfloat16 and y[3].eq(0).all()
    assert relative(y[50:], x[50:]) < 0.03 and relative(y[:50], x[:50]) < 0.03
    assert ((y[:, 7] / x[:, 7])[x[:, 7] != 0] - 1).abs().max() < 0.07        # 2^-4, and bfloat16's rounding
    assert sum(t.nbytes for t in packed.values()) < 0.51 * encode.pack(x, "bfloat16")["text"].nbytes


# -----------------------------------------------------------------------------------------------------------
# The data set

@pytest.mark.parametrize("text_dtype, bound", [("bfloat16", 0.005), ("float8", 0.04)])
def test_what_is_read_is_what_the_encoders_give(data, t5_folder, text_dtype, bound):
    ds = encode.Encoded(data(text_dtype=text_dtype, max_tokens=20))
    vae, t5 = encode.load_vae(VAE), encode.load_text_encoder(t5_folder)
    assert len(ds) == 24 and ds.null.shape == (1, 32) and ds.null.dtype == torch.bfloat16
    assert relative(ds.null, encode.encode_text(*t5, [""])[0][0]) < 0.005
    for i, row in enumerate(data.rows):
        assert ds.sample(i) == (row["file"], row["caption"])
        pixels = torch.from_numpy(np.asarray(load_image(data.folder / "images" / row["file"], 32)).copy())
        mean, std = vae.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1)
        assert relative(ds.moments(i)[0], mean[0]) < 0.001 and relative(ds.moments(i)[1], std[0]) < 0.001
        assert ds.moments(i)[0].dtype == torch.float32
        text = encode.encode_text(*t5, [row["caption"]], 20)[0][0]
        assert ds.text(i).shape == text.shape and ds.text(i).dtype == torch.bfloat16
        assert relative(ds.text(i), text) < bound
    known = {"count": 24, "shards": 5, "counts": [5, 5, 5, 5, 4], "latent_shape": [4, 4, 4], "text_dim": 32,
             "longest": 20, "max_tokens": 20, "scaling_factor": 0.18215, "text_dtype": text_dtype, "size": 32,
             "images_per_shard": 5, "vae": str(VAE), "text_encoder": str(t5_folder), "version": 1}
    assert ds.meta.items() >= known.items()


class Texts:
    def __init__(self, ds):
        self.ds = ds

    def __len__(self):
        return len(self.ds)

    def __getitem__(self, i):
        return i, self.ds.text(i).float().sum().item(), self.ds.moments(i)[0].sum().item()


def test_a_data_set_is_pickled_without_its_maps_and_works_in_forked_workers(data):
    ds = encode.Encoded(data())
    before = [Texts(ds)[i] for i in range(24)]           # opened here
    assert len(pickle.dumps(ds)) < 5000
    assert [Texts(pickle.loads(pickle.dumps(ds)))[i] for i in range(24)] == before
    loader = DataLoader(Texts(ds), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(tuple(row) for row in loader) == before


def test_a_sample_costs_its_bytes_and_no_open_file(data):
    ds = encode.Encoded(data(shard_images=1))
    for i in range(24):
        ds.text(i), ds.moments(i)
    open_files = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                  if os.path.islink(f"/proc/self/fd/{fd}")]
    assert not any("safetensors" in name for name in open_files)
    start = time.perf_counter()
    for _ in range(50):
        for i in range(24):
            ds.text(i), ds.moments(i)
    assert (time.perf_counter() - start) / 1200 < 500e-6      # some 20 us; opening a shard again costs 500


def test_two_ranks_and_any_workers_give_the_files_of_one_process(data, monkeypatch, capsys):
    one = data("one")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        two = data("two", workers=2)
    assert "its share is done" in capsys.readouterr().out
    assert contents(one) == contents(two)
    names = {"settings.json", "meta.json", "skipped.jsonl", "null.safetensors"}
    assert contents(one).keys() == names | {f"0000{k}.safetensors" for k in range(5)}


def test_a_killed_run_ends_with_the_same_bytes_and_keeps_whole_shards(data):
    whole, out = data("whole", shard_images=1), data.folder / "killed"
    command = [sys.executable, ROOT / "encode.py", *data.arguments("killed", shard_images=1, workers=1)]
    for least in (1, 8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.glob("0*.safetensors"))) < least and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {file: file.stat().st_mtime_ns for file in out.glob("0*.safetensors")}
    assert 8 <= len(done)
    if not (out / "meta.json").exists():                # unless this process had to wait for long
        with pytest.raises(UserError, match="not a finished one"):
            encode.Encoded(out)
    data("killed", shard_images=1)
    assert contents(out) == contents(whole)
    assert done == {file: file.stat().st_mtime_ns for file in done}


def test_a_full_disk_ends_in_one_error_and_the_same_command_goes_on(data, monkeypatch):
    whole, write = data("whole"), Path.write_bytes

    def full(path, content):
        write(path, content[:100])
        if "00002" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        data()
    monkeypatch.undo()
    assert contents(data.folder / "out").keys() == {"00000.safetensors", "00001.safetensors", "settings.json"}
    assert contents(data()) == contents(whole)


def test_a_limit_on_files_ends_in_one_line_and_never_waits(data):
    command = [sys.executable, ROOT / "encode.py", *data.arguments(size=64, workers=1)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("encode.py: [Errno 27] File too large")
    assert contents(data.folder / "out").keys() == {"settings.json"}


def test_what_cannot_be_used_is_named_and_the_rest_is_encoded(data, capsys):
    images, rows = data.folder / "images", data.rows
    (images / rows[2]["file"]).write_bytes(b"")
    bytes_ = (images / rows[7]["file"]).read_bytes()
    (images / rows[7]["file"]).write_bytes(bytes_[:len(bytes_) // 2])
    for row in rows[15:20]:                              # a whole shard
        (images / row["file"]).write_text("not an image")
    (images / rows[23]["file"]).unlink()
    data.write([row for i, row in enumerate(rows) if i != 12])
    out = data()
    ds = encode.Encoded(out)
    gone = {2, 7, 12, 23, *range(15, 20)}
    kept = [(row["file"], row["caption"]) for i, row in enumerate(rows) if i not in gone]
    assert [ds.sample(i) for i in range(len(ds))] == kept
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in skipped) == sorted(rows[i]["file"] for i in gone)
    reasons = {row["file"]: row["reason"] for row in skipped}
    assert reasons[rows[12]["file"]] == "no caption"
    assert reasons[rows[23]["file"]] == "caption, but no such image"
    assert reasons[rows[2]["file"]].startswith("not a readable image")
    assert "9 skipped" in capsys.readouterr().out
    assert sum(ds.meta["counts"]) == len(ds) == 15
    encode.main(["--check", str(out)])


def test_a_shard_of_broken_pictures_only_is_empty(data):
    for row in data.rows[5:10]:
        (data.folder / "images" / row["file"]).write_bytes(b"")
    ds = encode.Encoded(data(text_dtype="float8"))
    assert ds.meta["counts"] == [5, 0, 5, 5, 4]
    assert [ds.sample(i)[0] for i in (4, 5)] == [data.rows[4]["file"], data.rows[10]["file"]]
    encode.main(["--check", str(ds.folder)])


def test_captions_without_folders_go_to_the_only_image_of_that_name():
    files = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg", "b/4.jpg"]
    captions = {"2.jpg": "two", "1.jpg": "which?", "b/3.jpg": "three", "9.jpg": "none", "4.jpg": ""}
    pairs, skipped = encode.pair_up(files, captions)
    assert pairs == [("a/2.jpg", "two"), ("b/3.jpg", "three")]
    assert {row["file"]: row["reason"] for row in skipped} == {
        "a/1.jpg": "no caption", "b/1.jpg": "no caption", "b/4.jpg": "no caption",
        "1.jpg": "caption, but images of this name in several folders", "9.jpg": "caption, but no such image"}
    assert encode.pair_up(["1.jpg", "a/1.jpg"], {"1.jpg": "flat"})[0] == [("1.jpg", "flat")]


def test_the_captions_of_the_papers_own_captioner_are_read(data):
    lines = [f"{Path(row['file']).name}\t{row['caption']}\n" for row in data.rows]
    (data.folder / "captions.tsv").write_text("".join(lines))
    tsv, jsonl = encode.Encoded(data("tsv", captions="captions.tsv")), encode.Encoded(data("jsonl"))
    assert [tsv.sample(i) for i in range(24)] == [jsonl.sample(i) for i in range(24)]


def test_a_later_captions_file_replaces_what_an_earlier_one_says(data):
    data.write([{"file": data.rows[0]["file"], "caption": "a big star"}], "more.jsonl")
    both = [str(data.folder / "captions.jsonl"), str(data.folder / "more.jsonl")]
    encode.main([*data.arguments(), "--captions", *both])
    ds = encode.Encoded(data.folder / "out")
    assert len(ds) == 24 and [ds.caption(i) for i in (0, 1)] == ["a big star", data.rows[1]["caption"]]


@pytest.mark.parametrize("change, message", [
    ({"size": 40}, "size 32, now 40\\)"), ({"text_dtype": "float8"}, "text dtype"),
    ({"max_tokens": 9}, "max tokens"), ({"shard_images": 6}, "images per shard"),
    ({"captions": "other.jsonl"}, "list of images and captions"), ({"vae": 1}, "autoencoder"),
    ({"text_encoder": ""}, "T5 ")])
def test_changed_settings_are_refused_and_nothing_is_touched(data, t5_folder, change, message):
    before = contents(data())
    data.write([{**row, "caption": row["caption"] + " ."} for row in data.rows], "other.jsonl")
    if "vae" in change:
        change = {"vae": data.folder / "vae"}
        shutil.copytree(VAE, change["vae"], copy_function=shutil.copyfile)
        change["vae"].chmod(0o755)
        weights = load_file(VAE / "diffusion_pytorch_model.safetensors")
        weights["decoder.conv_out.bias"] += 0.1
        save_file(weights, change["vae"] / "diffusion_pytorch_model.safetensors")
    if "text_encoder" in change:
        change = {"text_encoder": data.folder / "t5"}
        shutil.copytree(t5_folder, change["text_encoder"])
        file = change["text_encoder"] / "tokenizer.json"
        file.write_text(file.read_text().replace('"star"', '"moon"'))
    with pytest.raises(UserError, match=message):
        data(**change)
    assert contents(data.folder / "out") == before


def test_the_same_encoders_at_another_path_go_on(data, t5_folder, capsys):
    data()
    shutil.copytree(t5_folder, data.folder / "t5")
    (data.folder / "out" / "00003.safetensors").unlink()
    before = contents(data.folder / "out")
    data(text_encoder=data.folder / "t5")
    after = contents(data.folder / "out")
    assert after.keys() - before.keys() == {"00003.safetensors"}
    data(text_encoder=data.folder / "t5")
    assert "complete already" in capsys.readouterr().out


def test_check_says_what_is_there_and_draws_four_pictures(data, capsys):
    out = data()
    encode.main(["--check", str(out)])
    said = capsys.readouterr().out
    longest = max(len(row["caption"].split()) for row in data.rows) + 1
    assert "24 pictures of 32 pixels, 5 shards" in said and "latents 4 x 4 x 4" in said
    assert "32 wide, bfloat16" in said and f"at most {longest} tokens" in said
    sheet = np.asarray(Image.open(out / "check.png"))
    vae, ds = encode.load_vae(VAE), encode.Encoded(out)
    first = vae.decode(ds.moments(0)[0][None])[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
    assert np.abs(sheet[4:256:8, 4:256:8] - first.clip(0, 255)).max() <= 1            # 32 pixels, enlarged
    assert (sheet[:32, 264:] < 128).any()                 # the caption


def test_check_names_damaged_shards_which_the_same_command_then_makes_again(data, capsys):
    def write(k, tensors):
        file = out / f"0000{k}.safetensors"
        save_file(tensors, file, {"samples": json.dumps(encode.samples_of(file))})

    out = data()
    before = contents(out)
    (out / "00001.safetensors").write_bytes(before["00001.safetensors"][:-10])
    shard = load_file(out / "00002.safetensors")
    shard["mean"][1, 0, 0, 0] = float("nan")
    write(2, shard)
    shard = load_file(out / "00003.safetensors")
    write(3, {**shard, "text": shard["text"][:-1]})
    save_file({}, out / "00004.safetensors")
    with pytest.raises(UserError, match="4 of 5 shards are damaged"):
        encode.main(["--check", str(out)])
    said = capsys.readouterr().out
    assert "00000" not in said and all(f"0000{k}.safetensors: " in said for k in (1, 2, 3, 4))
    assert data.rows[11]["file"] + " are not finite" in said
    for name in ("00001", "00002", "00003", "00004", "null"):
        (out / f"{name}.safetensors").unlink()
    with pytest.raises(UserError, match="00001.safetensors is missing"):
        encode.Encoded(out)
    data()
    assert contents(out) == before
    (out / "null.safetensors").unlink()
    data()
    assert contents(out) == before


@pytest.mark.parametrize("change, message", [
    ({"size": 36}, "a multiple of 8"), ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
    ({"vae": "/no/vae"}, "/no/vae: no such folder"), ({"text_encoder": VAE}, "not a T5 with its tokenizer"),
    ({"captions": "none.jsonl"}, "like class0/00 é.png, in the captions like x.png .caption, but no such")])
def test_a_mistake_of_the_user_ends_in_one_line(data, change, message):
    data.write([{"file": "x.png", "caption": "a star"}], "none.jsonl")
    with pytest.raises(UserError, match=message) as error:
        data(**change)
    assert "\n" not in str(error.value) and not (data.folder / "out").exists()
    with pytest.raises(UserError, match="not an encoded data set"):
        encode.Encoded(data.folder / "images")
    with pytest.raises(UserError, match="needs --images, --captions and --out"):
        encode.main(["--out", "x"])
