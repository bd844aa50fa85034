"""Stage 3: the encoders against their references, the encoded data set, and what goes wrong."""

import copy
import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, contents, photo, refused, relative, stopped
from PIL import Image
from safetensors.torch import load, load_file, save, save_file

import encode
from common import UserError, load_image, read_jsonl, write_json, write_jsonl
from cutmix import CUTS
from toy.text_encoder import make_text_encoder

VAE = FIXTURES / "vae_tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WORDS = "a red blue circle square star cat on the left of , . two".split()
COUNT = 24


def sentence(number):
    """Return a caption of 2 to 39 of the words."""
    return " ".join(WORDS[number % 12:] * (1 + number % 3))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """Make a T5 with its decoder, in several files, as flan-t5-xl's folder has it."""
    from transformers import T5Config, T5ForConditionalGeneration
    folder = tmp_path_factory.mktemp("t5")
    make_text_encoder(folder, WORDS, seed=0, dim=32)
    (folder / "model.safetensors").unlink()
    t5 = T5ForConditionalGeneration(T5Config.from_pretrained(folder))
    t5.save_pretrained(folder, max_shard_size="20KB")
    return folder


class Data:
    """24 images in 3 classes with their captions, and the words of a command that encodes them."""

    def __init__(self, folder, t5_folder):
        self.folder = folder
        self.rows = [{"file": f"class{i // 8}/{i:02d} é.png", "caption": sentence(i)} for i in range(COUNT)]
        self.paths = [folder / "images" / row["file"] for row in self.rows]
        for i, path in enumerate(self.paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(i, (70, 64)).save(path)
        # In another order than the images.
        captions = self.write(self.rows[::-1])
        self.words = ["--images", folder / "images", "--captions", captions, "--vae", VAE, "--text-encoder",
                      t5_folder, "--size", 32, "--shard-images", 5, "--batch-size", 3, "--workers", 0]

    def write(self, rows, name="captions.jsonl"):
        """Write a JSONL file and return its path."""
        write_jsonl(self.folder / name, rows)
        return self.folder / name

    def encode(self, out, *more):
        """Encode in this process and return the folder."""
        words = [*self.words, "--out", self.folder / out, *more]
        encode.main([str(word) for word in words])
        return self.folder / out


@pytest.fixture
def data(tmp_path, t5_folder):
    return Data(tmp_path, t5_folder)


@pytest.fixture
def encoded(data):
    return data.encode("encoded")


# ---- The encoders

def test_the_autoencoder_equals_diffusers_also_from_an_old_folder_if_its_weights_are_numbers(tmp_path):
    config = json.loads((VAE / "config.json").read_text())
    del config["scaling_factor"]
    write_json(tmp_path / "config.json", config)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in load_file(VAE / WEIGHTS).items():
        if ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None].contiguous()
        for new, old in old_names.items():
            name = name.replace(f".{new}.", f".{old}.")
        weights[name] = tensor
    save_file(weights, tmp_path / WEIGHTS)

    recorded = load_file(VAE / "io.safetensors")
    for folder in (VAE, tmp_path):
        vae = encode.load_vae(folder)
        mean, std = vae.encode(recorded["image"])
        assert relative(mean, recorded["mean"]) < 1e-5
        assert relative(std, recorded["std"]) < 1e-5
        assert relative(vae.decode(recorded["latent"]), recorded["decoded"]) < 1e-5
    assert vae.scaling_factor == 0.18215
    weights["decoder.conv_out.bias"] += math.nan
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="not finite"):
        encode.load_vae(tmp_path)


@pytest.mark.parametrize("encoder, files, change, words", [
    ("vae", "config.json", {"shift_factor": 0.1159}, "shift_factor = 0.1159 is another network"),
    ("vae", "config.json", {"act_fn": "relu"}, "act_fn = relu is another network"),
    ("vae", "config.json", {"down_block_types": ["DownEncoderBlock2D", "Attn"]}, "down_block_types = "),
    ("vae", "config.json", {"layers_per_block": 10 ** 6}, "layers_per_block = 1000000 is another"),
    ("vae", "config.json", {"block_out_channels": [8, 16, 16, 64]}, "not an AutoencoderKL of diffusers"),
    ("vae", "config.json", {"norm_num_groups": 0}, "not an AutoencoderKL of diffusers"),
    ("vae", "config.json", {"scaling_factor": math.nan}, "not a positive number"),
    ("vae", "config.json", {"scaling_factor": 0}, "not a positive number"),
    # Its weights have T5's names, and some more.
    ("text_encoder", "config.json", {"model_type": "umt5"}, "not t5, but umt5"),
    ("text_encoder", "tokenizer.json", {"post_processor": None}, "not T5's tokenizer"),
    ("text_encoder", "*token*", None, "tokenizer's files")])
def test_an_encoder_of_another_kind_or_without_its_own_tokenizer_is_refused(
        t5_folder, tmp_path, encoder, files, change, words):
    shutil.copytree(VAE if encoder == "vae" else t5_folder, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob(files):
        content = path.read_text()
        path.unlink()
        if change:
            write_json(path, {**json.loads(content), **change})
    with pytest.raises(UserError, match=words):
        getattr(encode, f"load_{encoder}")(tmp_path)


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
        if len(ids) > 256:
            ids = [*ids[:255], 1]
        alone = whole.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].detach()
        assert relative(text[i][mask[i]], alone) < 1e-5


def test_t5_has_one_fingerprint_in_float32_and_bfloat16_and_another_t5_has_another(t5_folder):
    tokenizer, t5 = encode.load_text_encoder(t5_folder)
    rounded = copy.deepcopy(t5).bfloat16()
    fingerprint = encode.fingerprint_of_t5(tokenizer, t5)
    assert encode.fingerprint_of_t5(tokenizer, rounded) == fingerprint
    t5.encoder.block[1].layer[1].DenseReluDense.wo.weight.data *= 1.01
    assert encode.fingerprint_of_t5(tokenizer, t5) != fingerprint


def test_padded_texts_are_the_captions_and_zeros():
    lengths = torch.tensor([3, 1, 33])
    captions = torch.randn(37, 5).split(lengths.tolist())
    text, mask = encode.pad_text(torch.cat(captions), lengths, encode.padded_length(lengths))
    for i, caption in enumerate(captions):
        assert torch.equal(text[i], torch.cat([caption, torch.zeros(64 - len(caption), 5)]))
        assert mask[i].tolist() == [True] * len(caption) + [False] * (64 - len(caption))


# ---- The data set

@pytest.mark.parametrize("text_dtype, size, bound", [("bfloat16", 64, 0.005), ("float8", 32, 0.03)])
def test_what_is_read_is_what_the_encoders_give(data, t5_folder, text_dtype, size, bound):
    ds = encode.Encoded(data.encode("out", "--text-dtype", text_dtype, "--max-tokens", 20, "--size", size))
    vae = encode.load_vae(VAE)
    tokenizer, t5 = encode.load_text_encoder(t5_folder)
    assert ds.null.shape == (1, 32) and ds.null.dtype == torch.bfloat16
    assert relative(ds.null, encode.encode_text(tokenizer, t5, [""])[0][0]) < bound

    for i, row in enumerate(data.rows):
        assert ds.sample(i) == (row["file"], row["caption"])
        pixels = torch.from_numpy(np.array(load_image(data.paths[i], size))).permute(2, 0, 1)[None]
        for ours, moment in zip(ds.moments(i), vae.encode(pixels / 127.5 - 1)):
            assert ours.dtype == torch.float32 and relative(ours, moment[0]) < 0.001
        text = encode.encode_text(tokenizer, t5, [row["caption"]], 20)[0][0]
        assert ds.text(i).shape == text.shape and ds.text(i).dtype == torch.bfloat16
        assert relative(ds.text(i), text) < bound
    known = {"count": COUNT, "shards": 5, "text_dtype": text_dtype, "vae": str(VAE), "captions": "long",
             "latent_shape": [4, size // 8, size // 8], "cutmix": None}
    assert ds.meta.items() >= known.items()


def test_a_float8_shard_with_scales_as_made_before_is_still_read(encoded):
    path = encoded / "00000.safetensors"
    tensors, samples = encode.open_shard(path, encode.Encoded(encoded).meta)
    scale = tensors["text"].float().abs().amax(1, keepdim=True) / 448
    stored = (tensors["text"] / scale).to(torch.float8_e4m3fn)
    start, end = tensors["offset"][3:5].tolist()
    # It did not say its settings and its name.
    samples = {key: samples[key] for key in ("files", "captions", "skipped")}
    path.write_bytes(save({**tensors, "text": stored, "scale": scale}, {"samples": json.dumps(samples)}))
    ds = encode.Encoded(encoded)
    assert torch.equal(ds.text(3), (stored.float() * scale)[start:end].bfloat16())
    assert ds.sample(3) == (samples["files"][3], samples["captions"][3])


def test_a_data_set_of_composites_names_its_settings_and_an_example_of_each(data):
    captions = data.write([{**row, "caption": "An image of star"} for row in data.rows], "aio.jsonl")

    def encoded_with(*cuts):
        """Return meta.json where the first images are composites of these settings."""
        rows = [{"file": row["file"], "setting": cut, "box": [0, 0, 8, 8]}
                for row, cut in zip(data.rows, cuts)]
        data.write(rows, "images/cutmix.jsonl")
        return encode.Encoded(data.encode("out", "--captions", captions)).meta

    meta = encoded_with("1/4", "1/16", "1/4")
    assert meta["captions"] == "aio" and meta["cutmix"] == ["1/16", "1/4"]
    assert meta["examples"] == {"1/4": 2, "1/16": 1}
    # train.py need not know which settings there are.
    assert encoded_with(*CUTS)["cutmix"] == ["all"]


# ---- What goes wrong

def test_missing_cut_foreign_swapped_and_spoilt_files_are_refused(encoded, data):
    captions = data.write([{**row, "caption": "a cat"} for row in data.rows], "other.jsonl")
    others = data.encode("others", "--captions", captions)
    one, null = "00001.safetensors", "null.safetensors"
    own = contents(encoded)
    samples = encode.open_shard(encoded / one, encode.Encoded(encoded).meta)[1]

    def with_nan(name, shard=one):
        """Return the bytes of a shard whose last image's numbers are not finite."""
        tensors = load(own[shard])
        tensors[name][-1] = math.nan
        return save(tensors, {"samples": json.dumps({**samples, "shard": shard})})

    for name, wrong, words in [
            (one, own[one][:-10], "not a shard"),
            (one, contents(others)[one], "of other images"),
            (one, own["00002.safetensors"], "in another's place"),
            (null, contents(others)[null], "of other images"),
            (one, with_nan("mean"), samples["files"][-1]),
            (one, with_nan("text"), samples["files"][-1]),
            (null, with_nan("text", null), "not finite"),
            ("meta.json", b'{"version": 1}', "not the description")]:
        (encoded / name).write_bytes(wrong)
        line = refused("encode.py", "--check", encoded)
        assert name in line and words in line
        (encoded / name).write_bytes(own[name])
    (encoded / one).unlink()
    assert f"{one}: No such file" in refused("encode.py", "--check", encoded)
    # Neither does the command take another set's shard for its own.
    (others / one).write_bytes(own[one])
    line = refused("encode.py", *data.words, "--out", others, "--captions", captions)
    assert one in line and "delete it and run its encode.py" in line


def test_changed_settings_are_refused_and_nothing_is_touched(data, t5_folder):
    before = contents(data.encode("out"))
    captions = data.write([{**row, "caption": "a cat"} for row in data.rows], "other.jsonl")
    for option, value, message in [
            ("--size", 36, "takes multiples of 8"), ("--size", 40, r"size 32, now 40\)"),
            ("--text-dtype", "float8", "text dtype"), ("--shard-images", 6, "images per shard"),
            ("--vae", ROOT / "toy/weights", "autoencoder"), ("--captions", captions, "list of images")]:
        with pytest.raises(UserError, match=message):
            data.encode("out", option, value)
    assert contents(data.folder / "out") == before
    # The same encoder in another place is the same.
    data.encode("out", "--text-encoder", shutil.copytree(t5_folder, data.folder / "t5"))


def test_a_killed_run_goes_on_with_other_ranks_and_ends_in_the_same_bytes(data, monkeypatch, capsys):
    data.words += ["--shard-images", 1]
    whole = contents(data.encode("whole"))
    out = data.folder / "killed"
    assert stopped(signal.SIGKILL, encode, "save", 9, lambda: data.encode(out)) == -9
    assert len(list(out.glob("0*.safetensors"))) == 7
    # What a crash of the machine may do to one of them.
    (out / "00002.safetensors").write_bytes(whole["00002.safetensors"][:-10])

    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("2", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        data.encode(out, "--workers", 2)
    assert "its share is done" in capsys.readouterr().out
    assert contents(out) == whole


def test_what_cannot_be_used_is_named_and_the_rest_is_encoded(data, capsys):
    rows = data.rows
    # A whole shard of them; and the toy's autoencoder folds pixels, which takes no empty batch.
    why = {2: "no caption", 12: "no caption", 23: "no such image"}
    for i in (7, *range(15, 20)):
        data.paths[i].write_bytes(data.paths[i].read_bytes()[:100])
        why[i] = "not a readable"
    data.paths[23].unlink()
    captions = data.write([*rows[:2], {**rows[2], "caption": " "}, *rows[3:12], *rows[13:]])
    # A later file replaces what an earlier one says.
    rows[9]["caption"] = "一只 红色的 cat"
    more = data.write([rows[9]], "more.jsonl")
    ds = encode.Encoded(data.encode("out", "--vae", ROOT / "toy/weights", "--captions", captions, more))

    said = capsys.readouterr().out
    assert "1 captions hold tokens that this text encoder does not know, such as '一只 红色的 cat'" in said
    assert "9 skipped" in said
    kept = [(row["file"], row["caption"]) for i, row in enumerate(rows) if i not in why]
    assert [ds.sample(i) for i in range(len(ds))] == kept
    skipped = {row["file"]: row["reason"] for row in read_jsonl(ds.folder / "skipped.jsonl")}
    assert skipped.keys() == {rows[i]["file"] for i in why}
    assert all(reason in skipped[rows[i]["file"]] for i, reason in why.items())
    encode.main(["--check", str(ds.folder)])


def test_where_nothing_can_be_read_the_same_command_works_later(data, encoded):
    photos = [path.read_bytes() for path in data.paths]
    for path in data.paths:
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "a git-lfs pointer" in refused("encode.py", *data.words, "--out", data.folder / "out")
    assert not contents(data.folder / "out")
    for path, content in zip(data.paths, photos):
        path.write_bytes(content)
    assert contents(data.encode("out")) == contents(encoded)


def test_check_draws_four_images_and_fig_7(encoded):
    meta = json.loads((encoded / "meta.json").read_text())
    (encoded / "meta.json").write_text(json.dumps({**meta, "examples": {"1/4": 5, "1/9": 0}}))
    encode.main(["--check", str(encoded)])
    mean, _ = encode.Encoded(encoded).moments(0)
    vae = encode.load_vae(VAE)

    def assert_shows(name, x, y, latents):
        """Assert that a sheet shows the image of these latents: 32 pixels, enlarged to 256."""
        shown = np.asarray(Image.open(encoded / name))[y:y + 256, x:x + 256]
        levels = vae.decode(latents[None])[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
        assert np.abs(shown[4::8, 4::8] - levels.clip(0, 255)).max() <= 1

    # Sheets have gaps of 4 pixels, and 12 for each line of text.
    assert_shows("check.png", 4, 4, mean)
    rng = torch.Generator().manual_seed(0)
    _, eps = [torch.randn(mean.shape, generator=rng) for _ in range(2)]
    for k in (0, 3, 10):
        x_t = math.sqrt(1 - k / 10) * mean * 0.18215 + math.sqrt(k / 10) * eps
        assert_shows("fig7.png", 4 + k * 260, 4 + 256 + 12 + 4, x_t / 0.18215)
