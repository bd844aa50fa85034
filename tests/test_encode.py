"""Stage 3: the encoders against their references, the encoded data set, and what goes wrong."""

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
from conftest import FIXTURES, ROOT, photo, refused, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import common
import encode
from common import UserError, load_image

VAE = FIXTURES / "vae_tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WORDS = ["a", "red", "blue", "circle", "square", "star", "cat", "on", "the", "left", "of", ",",
         ".", "two"]
COUNT = 24


def sentence(seed):
    """Return a caption of 2 to 29 of the words."""
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, int(rng.integers(2, 30))))


def contents(folder):
    """Return {name: bytes} of a folder's files."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    """Make a T5 with its decoder, as flan-t5-xl's folder has it, in several files.

    Its tokenizer knows whole words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
    folder = tmp_path_factory.mktemp("t5")
    vocabulary = {}
    for word in ["<pad>", "</s>", "<unk>", *WORDS]:
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>",
                                   eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=2,
                      num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


class Data:
    """24 images in 3 classes with their captions, and the command that encodes them."""

    def __init__(self, folder, t5_folder):
        self.folder = folder
        self.t5_folder = t5_folder
        self.rows = []
        for i in range(COUNT):
            file = f"class{i // 8}/{i:02d} é.png"
            path = folder / "images" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(i, (70, 64)).save(path)
            self.rows.append({"file": file, "caption": sentence(i)})
        # In another order than the images.
        self.write(self.rows[::-1])

    def write(self, rows, name="captions.jsonl"):
        """Write a file of captions."""
        lines = [json.dumps(row) + "\n" for row in rows]
        (self.folder / name).write_text("".join(lines))

    def arguments(self, out="out", captions="captions.jsonl", **options):
        """Return encode.py's arguments: small sizes, unless options say otherwise."""
        options = {"vae": VAE, "text_encoder": self.t5_folder, "size": 32, "shard_images": 5,
                   "batch_size": 3, "workers": 0, **options, "images": self.folder / "images",
                   "captions": self.folder / captions, "out": self.folder / out}
        return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]

    def encode(self, out="out", **options):
        """Encode in this process and return the folder."""
        encode.main(self.arguments(out, **options))
        return self.folder / out


@pytest.fixture
def data(tmp_path, t5_folder):
    return Data(tmp_path, t5_folder)


@pytest.fixture(scope="session")
def encoded_once(tmp_path_factory, t5_folder):
    return Data(tmp_path_factory.mktemp("encoded"), t5_folder).encode()


@pytest.fixture
def encoded(encoded_once, tmp_path):
    """Return a copy of an encoded data set, to be damaged."""
    return shutil.copytree(encoded_once, tmp_path / "encoded")


# --------------------------------------------------------------------------------------
# The encoders

def test_the_autoencoder_equals_diffusers():
    vae = encode.load_vae(VAE)
    recorded = load_file(VAE / "io.safetensors")
    mean, std = vae.encode(recorded["image"])
    assert relative(mean, recorded["mean"]) < 1e-5
    assert relative(std, recorded["std"]) < 1e-5
    assert relative(vae.decode(recorded["latent"]), recorded["decoded"]) < 1e-5


def test_an_old_diffusers_folder_gives_equal_latents(tmp_path):
    config = json.loads((VAE / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in load_file(VAE / WEIGHTS).items():
        for new, old in old_names.items():
            if f".{new}." in name:
                name = name.replace(new, old)
                if tensor.ndim == 2:
                    tensor = tensor[:, :, None, None].contiguous()
        weights[name] = tensor
    save_file(weights, tmp_path / WEIGHTS)

    vae = encode.load_vae(tmp_path)
    image = load_file(VAE / "io.safetensors")["image"]
    assert vae.scaling_factor == 0.18215
    for ours, reference in zip(vae.encode(image), encode.load_vae(VAE).encode(image)):
        assert torch.equal(ours, reference)


OTHER_WIDTH = (VAE / "config.json").read_text().replace("16", "24").encode()


@pytest.mark.parametrize("file, content, message", [
    ("config.json", b"{", "no AutoencoderKL of diffusers"),
    ("config.json", None, "no config.json in it"),
    ("config.json", OTHER_WIDTH, "size mismatch"),
    (WEIGHTS, None, f"no {WEIGHTS} in it"),
    (WEIGHTS, b"half", "no AutoencoderKL of diffusers"),
])
def test_a_folder_that_is_no_autoencoder_ends_in_one_line(tmp_path, file, content, message):
    for name in ("config.json", WEIGHTS):
        if name != file:
            shutil.copyfile(VAE / name, tmp_path / name)
        elif content:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        encode.load_vae(tmp_path)
    assert "\n" not in str(error.value)


def test_captions_in_a_batch_are_encoded_as_each_alone(t5_folder):
    from transformers import AutoTokenizer, T5ForConditionalGeneration
    captions = ["a red circle", "", sentence(3), "blue " * 300]
    text, mask = encode.encode_text(*encode.load_text_encoder(t5_folder), captions)
    assert text.shape[:2] == mask.shape == (4, 256)
    assert mask.dtype == torch.bool
    assert mask[1].sum() == 1 and mask[3].all()
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    whole = T5ForConditionalGeneration.from_pretrained(t5_folder)
    for i, caption in enumerate(captions):
        ids = tokenizer(caption).input_ids
        if len(ids) > 256:
            ids = [*ids[:255], 1]
        alone = whole.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].detach()
        assert relative(text[i][mask[i]], alone) < 1e-5


def test_weights_that_are_missing_are_not_replaced_by_random_ones(tmp_path, t5_folder):
    from transformers import AutoTokenizer, T5EncoderModel
    t5 = T5EncoderModel.from_pretrained(t5_folder)
    AutoTokenizer.from_pretrained(t5_folder).save_pretrained(tmp_path)
    t5.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="encoder.block.1.layer.0.SelfAttention.q.weight is missing"):
        encode.load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a T5 with its tokenizer"):
        encode.load_text_encoder(tmp_path)


def test_t5_has_one_fingerprint_in_float32_and_bfloat16_and_another_t5_has_another(t5_folder):
    tokenizer, t5 = encode.load_text_encoder(t5_folder)
    _, rounded = encode.load_text_encoder(t5_folder, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    fingerprint = encode.fingerprint_of_t5(tokenizer, t5)
    assert encode.fingerprint_of_t5(tokenizer, rounded) == fingerprint
    t5.encoder.block[1].layer[1].DenseReluDense.wo.weight.data *= 1.01
    assert encode.fingerprint_of_t5(tokenizer, t5) != fingerprint


def test_float8_keeps_a_token_to_three_percent_and_outliers_exactly_in_range():
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    # T5's features are of very different size.
    x[:50, 7] *= 300
    x[3] = 0
    stored = encode.store_text(x, "float8")
    y = encode.restore_text(**stored)
    assert y.dtype == torch.bfloat16
    assert y[3].eq(0).all()
    assert relative(y[50:], x[50:]) < 0.03
    assert relative(y[:50], x[:50]) < 0.03
    # Half a step of float8 is 2^-4; bfloat16's rounding comes on top.
    outlier = x[:, 7] != 0
    assert (y[outlier, 7] / x[outlier, 7] - 1).abs().max() < 0.07
    plain = encode.store_text(x, "bfloat16")["text"]
    assert sum(tensor.nbytes for tensor in stored.values()) < 0.51 * plain.nbytes


def test_the_table_of_float8_gives_what_torchs_cast_gives():
    stored = encode.store_text(torch.randn(30, 64), "float8")
    cast = (stored["text"].float() * stored["scale"]).bfloat16()
    assert torch.equal(encode.restore_text(**stored), cast)


# --------------------------------------------------------------------------------------
# The data set

@pytest.mark.parametrize("text_dtype, size, bound", [
    ("bfloat16", 32, 0.005), ("float8", 32, 0.04), ("bfloat16", 64, 0.005)])
def test_what_is_read_is_what_the_encoders_give(data, t5_folder, text_dtype, size, bound):
    out = data.encode(text_dtype=text_dtype, max_tokens=20, size=size)
    ds = encode.Encoded(out)
    vae = encode.load_vae(VAE)
    tokenizer, t5 = encode.load_text_encoder(t5_folder)
    assert len(ds) == COUNT
    assert ds.null.shape == (1, 32) and ds.null.dtype == torch.bfloat16
    assert relative(ds.null, encode.encode_text(tokenizer, t5, [""])[0][0]) < 0.005

    lengths = []
    for i, row in enumerate(data.rows):
        assert ds.sample(i) == (row["file"], row["caption"])
        picture = load_image(data.folder / "images" / row["file"], size)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        mean, std = vae.encode(pixels / 127.5 - 1)
        assert ds.moments(i)[0].dtype == torch.float32
        assert relative(ds.moments(i)[0], mean[0]) < 0.001
        assert relative(ds.moments(i)[1], std[0]) < 0.001
        text = encode.encode_text(tokenizer, t5, [row["caption"]], 20)[0][0]
        assert ds.text(i).shape == text.shape
        assert ds.text(i).dtype == torch.bfloat16
        assert relative(ds.text(i), text) < bound
        lengths.append(len(text))

    known = {"count": COUNT, "shards": 5, "counts": [5, 5, 5, 5, 4], "text_dim": 32,
             "latent_shape": [4, size // 8, size // 8], "longest": 20, "max_tokens": 20,
             "scaling_factor": 0.18215, "text_dtype": text_dtype, "size": size,
             "images_per_shard": 5, "vae": str(VAE), "text_encoder": str(t5_folder),
             "version": 2, "captions": "long", "cutmix": None,
             "mean_tokens": round(sum(lengths) / COUNT, 2)}
    assert ds.meta.items() >= known.items()


def test_meta_says_which_composites_and_which_kind_of_captions_these_are(data):
    settings = ["1/4", "1/16", "1/4"]
    rows = [{"file": "x.jpg", "setting": setting} for setting in settings]
    with open(data.folder / "images" / "cutmix.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    short = [{**row, "caption": "An image of star"} for row in data.rows]
    data.write(short, "aio.jsonl")
    meta = encode.Encoded(data.encode(captions="aio.jsonl")).meta
    assert meta["captions"] == "aio"
    assert meta["cutmix"] == ["1/16", "1/4"]


class Sums(torch.utils.data.Dataset):
    """What a training process reads of each sample, as numbers that can be compared."""

    def __init__(self, ds):
        self.ds = ds

    def __len__(self):
        return len(self.ds)

    def __getitem__(self, i):
        return i, self.ds.text(i).float().sum().item(), self.ds.moments(i)[0].sum().item()


def test_a_data_set_is_pickled_without_its_maps_and_works_in_forked_workers(encoded_once):
    ds = encode.Encoded(encoded_once)
    before = [Sums(ds)[i] for i in range(COUNT)]
    pickled = pickle.dumps(ds)
    assert len(pickled) < 5000
    again = Sums(pickle.loads(pickled))
    assert [again[i] for i in range(COUNT)] == before
    loader = DataLoader(Sums(ds), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(tuple(row) for row in loader) == before


def test_reading_samples_opens_no_file_and_keeps_none_open(encoded_once, monkeypatch):
    ds = encode.Encoded(encoded_once)

    def opened(*args, **kwargs):
        raise AssertionError("a file is opened again")

    monkeypatch.setattr(encode, "safe_open", opened)
    monkeypatch.setattr("builtins.open", opened)
    for i in range(COUNT):
        ds.text(i)
        ds.moments(i)
    monkeypatch.undo()
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    open_files = [os.readlink(link) for link in links if os.path.islink(link)]
    assert not any("safetensors" in name for name in open_files)


def test_text_in_bfloat16_is_a_view_into_the_file_and_not_a_copy(encoded_once):
    ds = encode.Encoded(encoded_once)
    for i in range(COUNT):
        k, _ = ds.locate(i)
        whole = ds.shards[k]["text"].untyped_storage()
        assert ds.text(i).untyped_storage().data_ptr() == whole.data_ptr()


# --------------------------------------------------------------------------------------
# Damaged data is refused where it enters

def change_meta(folder, **changes):
    """Change keys of a data set's meta.json; ... removes one."""
    meta = json.loads((folder / "meta.json").read_text())
    for key, value in changes.items():
        meta[key] = value
        if value is ...:
            del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("changes, message", [
    ({"count": 23}, "counts adds up to 24 and count is 23"),
    ({"counts": [5, 5, 5, 5, -4], "count": 16}, "not numbers of images"),
    ({"counts": [5, 5, 5, 5, 4.0]}, "not numbers of images"),
    ({"counts": [5, 5, 5, 5], "count": 20}, "4 entries for 5 shards"),
    ({"shards": 4}, "5 entries for 4 shards"),
    ({"shards": "5"}, "shards is 5"),
    ({"counts": [6, 4, 5, 5, 4]}, "00000.safetensors: damaged .mean is"),
    ({"latent_shape": ...}, "latent_shape is None"),
    ({"latent_shape": [4, 4, 5]}, "00000.safetensors: damaged .mean is"),
    ({"latent_shape": [4, 4]}, r"latent_shape is \[4, 4\]"),
    ({"text_dim": 31}, "null.safetensors: damaged .text is"),
    ({"text_dtype": "float8"}, "00000.safetensors: damaged .text is"),
    ({"text_dtype": "int8"}, "text_dtype is int8"),
    ({"longest": 3}, "captions of 1 to 3 tokens"),
    ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
    ({"vae": None}, "vae is None"),
    ({"shard_hashes": ["0"]}, "shard_hashes is"),
    ({"version": 3}, "made by a newer encode.py"),
    ({"count": 0, "counts": [0] * 5}, "count is 0"),
])
def test_a_description_that_does_not_add_up_is_refused(encoded, changes, message):
    change_meta(encoded, **changes)
    with pytest.raises(UserError, match=message) as error:
        encode.Encoded(encoded)
    assert "\n" not in str(error.value)
    assert refused("encode.py", "--check", encoded)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b"{}"])
def test_a_file_that_is_no_description_is_refused_in_one_line(encoded, content):
    (encoded / "meta.json").write_bytes(content)
    line = refused("encode.py", "--check", encoded)
    assert "meta.json" in line
    with pytest.raises(UserError, match="meta.json"):
        encode.Encoded(encoded)


def test_a_shard_of_another_data_set_is_refused_even_if_all_shapes_agree(encoded, data):
    other = [{**row, "caption": row["caption"].replace("star", "cat")} for row in data.rows]
    data.write(other, "other.jsonl")
    others = data.encode(captions="other.jsonl")
    shutil.copyfile(others / "00001.safetensors", encoded / "00001.safetensors")
    line = refused("encode.py", "--check", encoded)
    assert "1 of 5 shards are damaged" in line
    with pytest.raises(UserError, match="00001.safetensors.*another list of images and captions"):
        encode.Encoded(encoded)


def test_the_same_command_does_not_accept_a_shard_of_another_data_set(data):
    other = [{**row, "caption": row["caption"].replace("star", "cat")} for row in data.rows]
    data.write(other, "other.jsonl")
    others = data.encode("others", captions="other.jsonl")
    out = data.encode()
    shutil.copyfile(others / "00001.safetensors", out / "00001.safetensors")
    (out / "meta.json").unlink()
    with pytest.raises(UserError, match="00001.safetensors.*another list of images and captions"):
        data.encode()


def test_files_that_other_encoders_made_of_the_same_images_are_refused(encoded, data, tmp_path):
    """Their names, captions and shapes are all the same."""
    vae = shutil.copytree(VAE, tmp_path / "vae")
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    weights["quant_conv.bias"] += 1
    save_file(weights, vae / "diffusion_pytorch_model.safetensors")
    others = data.encode("others", vae=vae)
    for name in ("00001.safetensors", "null.safetensors"):
        own = (encoded / name).read_bytes()
        shutil.copyfile(others / name, encoded / name)
        with pytest.raises(UserError, match=f"{name}.*or of other encoders"):
            encode.Encoded(encoded)
        (encoded / name).write_bytes(own)
    # Neither does the command itself take such a shard for its own.
    shutil.copyfile(encoded / "00001.safetensors", others / "00001.safetensors")
    (others / "meta.json").unlink()
    with pytest.raises(UserError, match="00001.safetensors.*or of other encoders"):
        data.encode("others", vae=vae)


@pytest.mark.parametrize("damage", ["torn", "empty", "short", "gap", "no samples"])
def test_a_damaged_shard_is_refused_in_one_line(encoded, damage):
    path = encoded / "00002.safetensors"
    tensors = load_file(path)
    samples = {"samples": json.dumps(encode.samples_of(path))}
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "short":
        save_file({**tensors, "mean": tensors["mean"][:-1]}, path, samples)
    elif damage == "gap":
        tensors["offset"][1] = tensors["offset"][2]
        save_file(tensors, path, samples)
    else:
        save_file(tensors, path)
    with pytest.raises(UserError, match="00002.safetensors: damaged") as error:
        encode.Encoded(encoded)
    assert "\n" not in str(error.value)
    assert "1 of 5 shards are damaged" in refused("encode.py", "--check", encoded)


def test_a_data_set_of_the_version_before_is_still_read(encoded):
    change_meta(encoded, version=1, captions=..., cutmix=..., mean_tokens=..., shard_hashes=...)
    ds = encode.Encoded(encoded)
    assert len(ds) == COUNT
    encode.main(["--check", str(encoded)])


class Refusing(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, i):
        raise UserError("00000.safetensors: damaged (torn): delete it")


def test_an_error_in_a_loaders_worker_reaches_the_user_as_its_own_line():
    loader = DataLoader(Refusing(), batch_size=None, num_workers=1)
    with pytest.raises(UserError) as error:
        list(loader)
    assert "Traceback" in str(error.value)
    line = common.one_line(error.value, 500)
    assert line == "00000.safetensors: damaged (torn): delete it"


# --------------------------------------------------------------------------------------
# Encoders are told apart

@pytest.mark.parametrize("key, value, message", [
    ("autoencoder", "0123456789abcdef", "differ in autoencoder"),
    ("T5", "0123456789abcdef", "differ in T5"),
    ("scaling_factor", 0.13025, "differ in scaling_factor"),
])
def test_data_of_other_encoders_is_refused(encoded_once, encoded, key, value, message):
    original = encode.Encoded(encoded_once)
    encode.refuse_other_encoders(original, encode.Encoded(encoded))
    change_meta(encoded, **{key: value})
    with pytest.raises(UserError, match=message):
        encode.refuse_other_encoders(original, encode.Encoded(encoded))


def test_t5_in_another_precision_is_no_other_encoder(encoded_once, encoded):
    change_meta(encoded, precision_of_T5="torch.bfloat16")
    encode.refuse_other_encoders(encode.Encoded(encoded_once), encode.Encoded(encoded))


def test_fingerprints_that_depend_on_the_precision_are_compared_only_where_it_agrees(
        encoded_once, encoded):
    new = encode.Encoded(encoded_once)
    change_meta(encoded, version=1, T5="of version 1", precision_of_T5="torch.bfloat16")
    old = encode.Encoded(encoded)
    encode.refuse_other_encoders(new, old)
    change_meta(encoded, T5="of another T5")
    with pytest.raises(UserError, match="differ in T5"):
        encode.refuse_other_encoders(old, encode.Encoded(encoded))
    change_meta(encoded, precision_of_T5="torch.float32")
    encode.refuse_other_encoders(old, encode.Encoded(encoded))


# --------------------------------------------------------------------------------------
# Kills, ranks, full disks

def test_two_ranks_and_any_workers_give_the_files_of_one_process(data, monkeypatch, capsys):
    one = data.encode("one")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        two = data.encode("two", workers=2)
    assert "its share is done" in capsys.readouterr().out
    assert contents(one) == contents(two)
    names = {"settings.json", "meta.json", "skipped.jsonl", "null.safetensors"}
    assert contents(one).keys() == names | {f"0000{k}.safetensors" for k in range(5)}


def test_a_killed_run_ends_with_the_same_bytes_and_keeps_whole_shards(data):
    whole = data.encode("whole", shard_images=1)
    out = data.folder / "killed"
    options = data.arguments("killed", shard_images=1, workers=1)
    for least in (1, 8):
        process = subprocess.Popen([sys.executable, ROOT / "encode.py", *options],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.glob("0*.safetensors"))) < least and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {file: file.stat().st_mtime_ns for file in out.glob("0*.safetensors")}
    assert len(done) >= 8
    # Unless this process had to wait for long.
    if not (out / "meta.json").exists():
        with pytest.raises(UserError, match="not a finished one"):
            encode.Encoded(out)
    data.encode("killed", shard_images=1)
    assert contents(out) == contents(whole)
    assert done == {file: file.stat().st_mtime_ns for file in done}


def test_a_second_command_on_the_same_folder_is_refused(data):
    with common.only_command(data.folder / "out"):
        with pytest.raises(UserError, match="another command is writing"):
            data.encode()
    data.encode()


def test_a_full_disk_names_the_file_and_the_same_command_goes_on(data, encoded_once, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        write(path, content[:100])
        if "00002" in path.name:
            # As the operating system says it: without a name.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device: .*00002.safetensors"):
        data.encode()
    monkeypatch.undo()
    there = contents(data.folder / "out").keys()
    assert there == {"00000.safetensors", "00001.safetensors", "settings.json"}
    assert contents(data.encode()) == contents(encoded_once)


def test_shards_and_what_describes_them_are_on_the_disk_before_they_get_their_names(
        data, monkeypatch):
    flushed = []
    monkeypatch.setattr(common, "flush_to_disk", lambda path: flushed.append(Path(path).name))
    data.encode()
    for name in ["00000.safetensors", "null.safetensors", "meta.json"]:
        assert any(name in path for path in flushed)


def test_a_limit_on_files_ends_in_one_line_and_never_waits(data):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    command = [sys.executable, ROOT / "encode.py", *data.arguments(size=64, workers=1)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120,
                          preexec_fn=limit)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("encode.py: [Errno 27] File too large")
    assert "00000.safetensors" in last
    assert contents(data.folder / "out").keys() == {"settings.json"}


# --------------------------------------------------------------------------------------
# Images and captions that do not fit together

def test_what_cannot_be_used_is_named_and_the_rest_is_encoded(data, capsys):
    rows = data.rows
    paths = [data.folder / "images" / row["file"] for row in rows]
    paths[2].write_bytes(b"")
    paths[7].write_bytes(paths[7].read_bytes()[:100])
    # A whole shard.
    for path in paths[15:20]:
        path.write_text("not an image")
    paths[23].unlink()
    data.write([row for i, row in enumerate(rows) if i != 12])
    out = data.encode()

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


def test_a_shard_of_broken_images_only_is_empty(data):
    for row in data.rows[5:10]:
        (data.folder / "images" / row["file"]).write_bytes(b"")
    ds = encode.Encoded(data.encode(text_dtype="float8"))
    assert ds.meta["counts"] == [5, 0, 5, 5, 4]
    assert [ds.sample(i)[0] for i in (4, 5)] == [data.rows[4]["file"], data.rows[10]["file"]]
    encode.main(["--check", str(ds.folder)])


def test_a_data_set_without_a_readable_image_is_refused(data):
    for row in data.rows:
        (data.folder / "images" / row["file"]).write_bytes(b"")
    with pytest.raises(UserError, match="none of the 24 images could be read"):
        data.encode()
    assert not (data.folder / "out/meta.json").exists()


def test_captions_without_folders_go_to_the_only_image_of_that_name():
    files = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg", "b/4.jpg"]
    captions = {"2.jpg": "two", "1.jpg": "which?", "b/3.jpg": "three", "9.jpg": "none",
                "4.jpg": ""}
    pairs, skipped = encode.pair_up(files, captions)
    assert pairs == [("a/2.jpg", "two"), ("b/3.jpg", "three")]
    assert {row["file"]: row["reason"] for row in skipped} == {
        "a/1.jpg": "no caption",
        "b/1.jpg": "no caption",
        "b/4.jpg": "no caption",
        "1.jpg": "caption, but images of this name in several folders",
        "9.jpg": "caption, but no such image",
    }
    assert encode.pair_up(["1.jpg", "a/1.jpg"], {"1.jpg": "flat"})[0] == [("1.jpg", "flat")]


def test_captions_as_the_authors_write_and_publish_them_give_the_same_shards(data, encoded_once):
    tsv = [f"{Path(row['file']).name}\t{row['caption']}\n" for row in data.rows]
    (data.folder / "captions.tsv").write_text("".join(tsv))
    csv = [f'{row["file"]},"{row["caption"]}"\n' for row in data.rows]
    (data.folder / "captions.csv").write_text("image_path,caption\n" + "".join(csv))
    for name in ["captions.tsv", "captions.csv"]:
        out = data.encode(name.replace(".", "-"), captions=name)
        assert contents(out) == contents(encoded_once)


def test_a_later_captions_file_replaces_what_an_earlier_one_says(data):
    data.write([{"file": data.rows[0]["file"], "caption": "a big star"}], "more.jsonl")
    both = [str(data.folder / "captions.jsonl"), str(data.folder / "more.jsonl")]
    encode.main([*data.arguments(), "--captions", *both])
    ds = encode.Encoded(data.folder / "out")
    assert len(ds) == COUNT
    assert ds.caption(0) == "a big star"
    assert ds.caption(1) == data.rows[1]["caption"]


# --------------------------------------------------------------------------------------
# An output belongs to its settings

def another_vae(folder):
    """Make an autoencoder that differs in one tensor."""
    folder.mkdir()
    shutil.copyfile(VAE / "config.json", folder / "config.json")
    weights = load_file(VAE / WEIGHTS)
    weights["decoder.conv_out.bias"] += 0.1
    save_file(weights, folder / WEIGHTS)
    return folder


def another_t5(folder, t5_folder):
    """Make a T5 whose tokenizer knows another word."""
    shutil.copytree(t5_folder, folder)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"star"', '"moon"'))
    return folder


def test_changed_settings_are_refused_and_nothing_is_touched(data, t5_folder):
    before = contents(data.encode())
    data.write([{**row, "caption": row["caption"] + " ."} for row in data.rows], "other.jsonl")
    changes = [
        ({"size": 40}, r"size 32, now 40\)"),
        ({"text_dtype": "float8"}, "text dtype"),
        ({"max_tokens": 9}, "max tokens"),
        ({"shard_images": 6}, "images per shard"),
        ({"captions": "other.jsonl"}, "list of images and captions"),
        ({"vae": another_vae(data.folder / "vae")}, "autoencoder"),
        ({"text_encoder": another_t5(data.folder / "t5", t5_folder)}, "T5 "),
    ]
    for change, message in changes:
        with pytest.raises(UserError, match=message):
            data.encode(**change)
    assert contents(data.folder / "out") == before


def test_the_precision_of_t5_belongs_to_the_settings(encoded, data):
    settings = json.loads((encoded / "settings.json").read_text())
    assert settings["precision_of_T5"] == "torch.float32"
    settings["precision_of_T5"] = "torch.bfloat16"
    (encoded / "settings.json").write_text(json.dumps(settings))
    (encoded / "00003.safetensors").unlink()
    shutil.move(encoded, data.folder / "out")
    with pytest.raises(UserError, match="precision of T5 torch.bfloat16, now torch.float32"):
        data.encode()


def test_the_same_encoders_at_another_path_go_on(data, t5_folder, capsys):
    out = data.encode()
    shutil.copytree(t5_folder, data.folder / "t5")
    (out / "00003.safetensors").unlink()
    before = contents(out)
    data.encode(text_encoder=data.folder / "t5")
    assert contents(out).keys() - before.keys() == {"00003.safetensors"}
    data.encode(text_encoder=data.folder / "t5")
    assert "complete already" in capsys.readouterr().out


# --------------------------------------------------------------------------------------
# --check

def test_check_says_what_is_there_and_draws_four_images(encoded, data, capsys):
    encode.main(["--check", str(encoded)])
    said = capsys.readouterr().out
    longest = max(len(row["caption"].split()) for row in data.rows) + 1
    assert "24 pictures of 32 pixels, 5 shards" in said
    assert "latents 4 x 4 x 4" in said
    assert "32 wide, bfloat16" in said
    assert f"at most {longest} tokens" in said

    # The sheet has a margin of 4 pixels. One image of 32 pixels is enlarged to 256.
    sheet = np.asarray(Image.open(encoded / "check.png"))
    mean, _ = encode.Encoded(encoded).moments(0)
    first = encode.load_vae(VAE).decode(mean[None])[0].permute(1, 2, 0).numpy()
    levels = (first * 127.5 + 127.5).clip(0, 255)
    assert np.abs(sheet[8:260:8, 8:260:8] - levels).max() <= 1
    # Below it is the caption.
    assert (sheet[260:, :260] < 128).any()


def test_check_reports_the_distribution_of_latents_that_training_sees(encoded, capsys):
    # One channel is known: mean 10, deviation 2 within an image and none between them.
    for path in encoded.glob("0*.safetensors"):
        tensors = load_file(path)
        tensors["mean"][:, 1] = 10
        tensors["std"][:, 1] = 2
        save_file(tensors, path, {"samples": json.dumps(encode.samples_of(path))})
    encode.main(["--check", str(encoded)])
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.split()[:1] == ["1"])
    mean, deviation, scaled_mean, scaled_deviation = map(float, row[1:5])
    shares = [float(share.rstrip("%")) / 100 for share in row[5:]]

    # 24 images of 16 values: five standard errors of the mean are 0.5.
    assert mean == pytest.approx(10, abs=0.5)
    assert deviation == pytest.approx(2, abs=0.4)
    assert scaled_mean == pytest.approx(0.18215 * mean, abs=0.01)
    assert scaled_deviation == pytest.approx(0.18215 * deviation, abs=0.01)
    normal = torch.distributions.Normal(10 * 0.18215, 2 * 0.18215)
    for share, clamp in zip(shares, [1.0, 1.2, 3.0]):
        expected = 1 - normal.cdf(torch.tensor(clamp)).item()
        assert share == pytest.approx(expected, abs=0.06)


def test_check_names_damaged_shards_which_the_same_command_then_makes_again(data, capsys):
    def write(k, tensors):
        file = out / f"0000{k}.safetensors"
        save_file(tensors, file, {"samples": json.dumps(encode.samples_of(file))})

    out = data.encode()
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
    assert "00000" not in said
    for k in (1, 2, 3, 4):
        assert f"0000{k}.safetensors: " in said
    assert data.rows[11]["file"] + " are not finite" in said

    for name in ("00001", "00002", "00003", "00004", "null"):
        (out / f"{name}.safetensors").unlink()
    with pytest.raises(UserError, match="null.safetensors is missing"):
        encode.Encoded(out)
    data.encode()
    assert contents(out) == before


def test_check_refuses_an_autoencoder_that_is_not_the_datas(encoded, tmp_path):
    change_meta(encoded, vae=str(another_vae(tmp_path / "vae")))
    assert "not the autoencoder that" in refused("encode.py", "--check", encoded)


# --------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("change, message", [
    ({"size": 36}, "a multiple of 8"),
    ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
    ({"vae": "/no/vae"}, "/no/vae: no such folder"),
    ({"text_encoder": VAE}, "not a T5 with its tokenizer"),
    ({"captions": "none.jsonl"},
     "like class0/00 é.png, in the captions like x.png .caption, but no such"),
])
def test_a_mistake_of_the_user_ends_in_one_line(data, change, message):
    data.write([{"file": "x.png", "caption": "a star"}], "none.jsonl")
    with pytest.raises(UserError, match=message) as error:
        data.encode(**change)
    assert "\n" not in str(error.value)
    assert not (data.folder / "out").exists()


def test_a_folder_that_is_no_data_set_is_refused(data):
    with pytest.raises(UserError, match="not an encoded data set"):
        encode.Encoded(data.folder / "images")
    with pytest.raises(UserError, match="needs --images, --captions and --out"):
        encode.main(["--out", "x"])
