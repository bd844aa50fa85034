"""The samplers against exact solutions, and the command as people use it."""

import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import FIXTURES, refused, stopped
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import sample
from common import UserError, read_json, read_jsonl, write_json, write_jsonl

# ---- The samplers

class Known:
    """The best `denoise` for x_0 ~ N(mean, std^2); the caption says the mean. It notes its batches."""

    def __init__(self, std):
        self.std = std
        self.rows = []

    def condition(self, text, mask, coherence):
        mean = (text.mean(2) * mask).sum(1) / mask.sum(1)
        return mean[:, None, None, None]

    def denoise(self, x, gamma, context, state=None):
        self.rows.append(len(x))
        x = x.double()
        g = gamma.double()[:, None, None, None]
        return (1 - g).sqrt() * (x - g.sqrt() * context) / (g * self.std ** 2 + 1 - g), None


# Texts of which `Known` understands that the mean is 0.2 or -0.1, and their masks.
CAPTION = torch.full((2, 4, 5), 0.2), torch.ones(2, 4, dtype=torch.bool)
NULL = torch.full((1, 1, 5), -0.1), torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize("solver", sample.SOLVERS.values())
@pytest.mark.parametrize("spacing", sample.SPACINGS)
def test_a_solver_takes_the_steps_of_its_paper_with_guidance_after_the_first_step(solver, spacing):
    """Song et al. 2021, eq. 12, and Lu et al. 2022, Algorithm 2, from their formulas."""
    model = Known(0.5)
    noise = torch.randn(2, 1, 2, 2)
    x_0 = solver(model, noise, CAPTION, NULL, 6, 1.5, 0.4, spacing)
    # Captions and null prompts share a batch.
    assert model.rows == [2, 4, 4, 4, 4, 4]

    g = np.maximum(1 - sample.times(6, spacing).numpy(), 1e-9)
    alpha = np.sqrt(g)
    sigma = np.sqrt(1 - g)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha / sigma)
    x = noise.double().numpy()
    estimates = []
    for i in range(1, 7):
        a, s = alpha[i - 1], sigma[i - 1]
        eps_cond = s * (x - a * 0.2) / (a ** 2 * 0.5 ** 2 + s ** 2)
        eps_null = s * (x + a * 0.1) / (a ** 2 * 0.5 ** 2 + s ** 2)
        eps = eps_cond + (1.5 if i > 1 else 0) * (eps_cond - eps_null)
        estimates.append(np.clip((x - s * eps) / a, -0.4, 0.4))
        D = estimates[-1]
        h = lam[i] - lam[i - 1]
        if solver == sample.ddim:
            x = alpha[i] * D + sigma[i] * (x - a * D) / s
            continue
        if 1 < i < 6:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2]
        x = sigma[i] / s * x - alpha[i] * (np.exp(-h) - 1) * D
    assert np.allclose(x_0, x, atol=1e-5)


def test_the_solvers_converge_to_the_exact_flow_dpm_solver_with_order_two_and_ddim_with_order_one():
    noise = torch.randn(2, 2, 8, 8)
    # For x_0 ~ N(0.2, 1.5^2) the exact flow scales the noise.
    exact = 0.2 + 1.5 * noise

    def error(solver, steps, spacing="cosine", guidance=0, exact=exact):
        x_0 = solver(Known(1.5), noise, CAPTION, NULL, steps, guidance, None, spacing)
        return float((x_0 - exact).abs().mean())

    def order(solver, **how):
        return np.log2(error(solver, 8, **how) / error(solver, 64, **how)) / 3

    assert 1.6 < order(sample.dpm_solver) < 2.1
    assert 0.9 < order(sample.ddim) < 1.1
    # With guidance the first step, which has none, is an error of the size of a step.
    end = sample.dpm_solver(Known(1.5), noise, CAPTION, NULL, 1024, 1.5, None)
    assert 0.9 < order(sample.dpm_solver, guidance=1.5, exact=end) < 1.4
    # At few steps, too, and by itself: that is a matter of its own spacing.
    assert error(sample.dpm_solver, 16, None) < 0.2 * error(sample.ddim, 16, None)
    assert error(sample.dpm_solver, 16, None) < error(sample.dpm_solver, 16, "linear") / 3


def test_the_cosine_spacing_is_that_of_the_release():
    u = torch.arange(250, -1, -1, dtype=torch.float64) / 250
    signal = torch.cos((u + 2e-4) / (1 + 2.5e-4) * torch.pi / 2) ** 2
    assert torch.allclose(sample.gamma(sample.times(250, "cosine")), signal, rtol=1e-7, atol=0)


def test_a_model_that_is_half_added_is_refused_at_once():
    network = sample.MODELS["dit"].network
    with pytest.raises(TypeError, match="default preset 'M'"):
        sample.check_models({"new": sample.ModelFamily(network, {"S": {}}, "M")})
    with pytest.raises(TypeError, match="Linear has no `condition`"):
        sample.check_models({"new": sample.ModelFamily(torch.nn.Linear, {"S": {}}, "S")})


# ---- Checkpoints, and `generate`

@pytest.fixture(scope="module")
def pipeline(toy_paper):
    return sample.load_pipeline(toy_paper[0] / "dit", device=torch.device("cpu"))


@pytest.fixture
def checkpoint(toy_paper, tmp_path):
    """Return a copy of the toy's checkpoint, which a test may damage."""
    return shutil.copytree(toy_paper[0] / "dit", tmp_path / "checkpoint")


def options(checkpoint, out, *words):
    """Return the options of a short command, as strings."""
    return [str(word) for word in ["--checkpoint", checkpoint, "--out", out, "--steps", 3, *words]]


def change(checkpoint, **entries):
    """Change entries of a checkpoint's config.json, and return all of them."""
    config = {**read_json(checkpoint / "config.json", ""), **entries}
    write_json(checkpoint / "config.json", config)
    return config


def same(images, others):
    """Tell whether two lists of images are equal, up to rounding of a pixel."""
    a, b = [np.stack([np.asarray(image) for image in images]).astype(int) for images in (images, others)]
    return a.shape == b.shape and np.abs(a - b).max() <= 1


def test_an_image_depends_on_its_seed_and_prompt_and_not_on_its_batch(pipeline):
    three = sample.generate(pipeline, ["ring", "a star", "ring"], seeds=[5, 6, 6], steps=2)
    one = sample.generate(pipeline, ["ring"], seeds=[6], steps=2, negative_prompts=[""])
    assert same(one, three[2:])
    assert not same(one, three[:1])
    # Guidance leads away from the null prompt unless another one is given.
    star = sample.generate(pipeline, ["ring"], seeds=[6], steps=2, negative_prompts=["a star"])
    assert not same(one, star)
    # One token a word, and the end-of-text token.
    long = sample.generate(pipeline, ["a large red circle"], steps=2, max_tokens=3)
    assert same(long, sample.generate(pipeline, ["a large"], steps=2))


@pytest.mark.parametrize("wrong", [
    {"prompts": []}, {"prompts": "ring"}, {"seeds": [1, 2]}, {"negative_prompts": ["a", "b"]}, {"steps": 0},
    {"guidance": float("nan")}, {"clamp": -1}, {"solver": "euler"}, {"precision": "fp16"}, {"spacing": "x"}])
def test_generate_refuses_what_means_nothing(pipeline, wrong):
    with pytest.raises(UserError, match="needs a list of prompts|one of linear, cosine"):
        sample.generate(pipeline, **{"prompts": ["ring"], "steps": 2, **wrong})


def test_random_negative_prompts_are_letters_that_depend_on_the_seed():
    # As the first version made them: other letters would be other images.
    assert sample.random_letters(3) == "ojpqbav oesoo qdqwnt eyb"
    assert sample.random_letters(4) == "ckebk utfnh vgya ufiqt"


@pytest.mark.parametrize("key, option", [("vae_fingerprint", "--vae"), ("T5", "--text-encoder")])
def test_other_encoders_than_the_checkpoints_are_refused_unless_they_are_named(
        checkpoint, tmp_path, key, option):
    config = change(checkpoint)
    words = options(checkpoint, tmp_path / "out", "--prompt", "ring")
    change(checkpoint, training={**config["training"], key: "0123456789abcdef"})
    line = refused("sample.py", *words)
    assert "0123456789abcdef" in line and option in line
    assert not (tmp_path / "out").exists()
    sample.main([*words, option, config[option[2:].replace("-", "_")]])
    # A checkpoint from before there were fingerprints is taken as it is.
    change(checkpoint, training={**config["training"], key: None})
    sample.load_pipeline(checkpoint)


@pytest.mark.parametrize("entries, words", [
    ({"model": "unet"}, "no 'unet'"), ({"training": [1]}, "training is no JSON object"),
    ({"args": {"dim": 8, "colour": 1}}, "unexpected keyword argument 'colour'"),
    ({"args": {"dim": 8, "depth": 10 ** 6}}, "a size above 4,096"),
    ({"args": {"dim": 8, "heads": 2, "depth": 1, "text_dim": 8}}, "weights of the DiT"),
    ({"scaling_factor": float("nan")}, "its scaling_factor is not a positive number")])
def test_a_config_that_means_nothing_or_fits_no_weights_is_refused_in_one_line(
        checkpoint, tmp_path, entries, words):
    change(checkpoint, **entries)
    assert words in refused("sample.py", *options(checkpoint, tmp_path / "out", "--prompt", "a"))
    assert not (tmp_path / "out").exists()


def test_damaged_foreign_and_infinite_weights_are_refused_by_name(checkpoint, tmp_path):
    words = options(checkpoint, tmp_path / "out", "--prompt", "ring")
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    line = refused("sample.py", *words, "--vae", FIXTURES / "vae_tiny")
    assert "its encoder has changed (8 channels" in line and "now 4" in line
    weights["out.weight"][0] = torch.inf
    save_file(weights, path)
    assert "out.weight is not finite" in refused("sample.py", *words)
    path.write_bytes(b"")
    assert "model.safetensors: not the weights" in refused("sample.py", *words)
    assert not (tmp_path / "out").exists()


# ---- The command

@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = ["a large red circle", "a star", "ring", "a", "a small blue cross above a large green ring"]
    write_jsonl(path, [{"prompt": prompt, "extra": [1]} for prompt in words])
    return path


def test_a_killed_command_goes_on_with_other_ranks_and_batches_and_its_images_are_those_of_generate(
        toy_paper, tmp_path, prompts, monkeypatch, pipeline):
    one, two = tmp_path / "one", tmp_path / "two"
    words = options(toy_paper[0] / "dit", one, "--prompts", prompts, "--seed", 7, "--images-per-prompt", 4)
    sample.main(words)
    # The prompts' images with all that their rows held: no sheet.
    files = [f"{n:06d}.png" for n in range(20)]
    rows = read_jsonl(prompts)
    expected = [{"file": file, "seed": 7 + i, **rows[i // 4]} for i, file in enumerate(files)]
    assert read_jsonl(one / "samples.jsonl") == expected
    own = sample.generate(pipeline, [rows[4]["prompt"]] * 4, [23, 24, 25, 26], steps=3)
    assert same(own, [Image.open(one / file) for file in files[16:]])
    assert (one / "checkpoint.json").read_bytes() == (toy_paper[0] / "dit/config.json").read_bytes()

    words += ["--out", str(two), "--batch-size", "1"]
    # The settings come first, then three images.
    assert stopped(signal.SIGKILL, common, "complete", 5, lambda: sample.main(words)) == -signal.SIGKILL
    # As a full disk and a crash of the machine leave them.
    (two / files[0]).write_bytes(b"")
    (two / files[1]).write_bytes((two / files[1]).read_bytes()[:-20])
    Image.new("RGB", (64, 64)).save(two / files[2], "JPEG")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert not (two / "samples.jsonl").exists()
        monkeypatch.setenv("RANK", rank)
        sample.main([*words, "--batch-size", "3"])
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert all((two / file).read_bytes().endswith(b"IEND\xaeB`\x82") for file in files)
    assert same([Image.open(one / file) for file in files], [Image.open(two / file) for file in files])
    before = (two / "samples.jsonl").read_bytes()
    assert before == (one / "samples.jsonl").read_bytes()
    # A folder that is complete needs no networks to be described again.
    (two / "samples.jsonl").unlink()
    monkeypatch.setattr(sample, "load_pipeline", None)
    sample.main(words)
    assert (two / "samples.jsonl").read_bytes() == before


def test_whatever_changes_an_image_belongs_to_the_folder_and_foreign_images_are_not_adopted(
        checkpoint, prompts):
    # Below the checkpoint's folder, which is allowed.
    out = checkpoint / "step-0050000/val"
    begun = options(checkpoint, out, "--prompts", prompts)
    sample.main(begun)
    for change in ["--solver dpm++", "--spacing cosine", "--guidance 3", "--random-negative-prompt",
                   "--max-tokens 9", "--seed 8", "--precision bf16", "--prompt more", "--vae elsewhere"]:
        assert "other settings" in refused("sample.py", *begun, *change.split()), change
    # As if the other images had been made with other weights below the same path.
    settings = read_json(out / "settings.json", "")
    settings["encoders"]["T5"] = "0123456789abcdef"
    write_json(out / "settings.json", settings)
    (out / "000000.png").unlink()
    assert "other settings (T5" in refused("sample.py", *begun)


def test_skipped_prompts_and_words_that_the_text_encoder_does_not_know_are_told(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "一"}\n{"prompt": " "}\n{"prompt": "a star"}\n')
    sample.main(options(checkpoint, tmp_path / "out", "--prompts", tmp_path / "prompts.jsonl",
                        "--negative-prompt", "二"))
    stderr = capsys.readouterr().err
    assert "2 of 3 prompts hold words that the text encoder does not know; the first: '二'" in stderr
    assert "1 prompts skipped" in stderr and "prompts.jsonl row 2" in stderr
    assert [row["file"] for row in read_jsonl(tmp_path / "out/skipped.jsonl")] == ["prompts.jsonl row 2"]


# ---- Layouts

def test_coco_and_the_tools_of_geneval_and_dpg_find_what_they_expect(toy_paper, tmp_path, prompts):
    def make(out, prompts, *layout):
        sample.main(options(toy_paper[0] / "dit", tmp_path / out, "--prompts", prompts, *layout))
        return tmp_path / out

    out = make("geneval", prompts, "--format", "geneval", "--images-per-prompt", 2)
    assert read_jsonl(out / "00002/metadata.jsonl") == [read_jsonl(prompts)[2]]
    assert (out / "00004/samples/0001.png").exists()
    # A grid a prompt, and no other picture in sight.
    (tmp_path / "COCO_7.txt").write_text("a red circle\n")
    out = make("dpg", tmp_path, "--format", "dpg", "--images-per-prompt", 4)
    assert [path.name for path in out.glob("*.png")] == ["COCO_7.png"]
    assert Image.open(out / "COCO_7.png").size == (128, 128)
    # By the names of COCO's photos evaluate.py finds them.
    content = {"images": [{"id": 3, "file_name": "COCO_3.jpg"}],
               "annotations": [{"id": 0, "image_id": 3, "caption": "une étoile"}]}
    write_json(tmp_path / "captions.json", content)
    assert read_jsonl(make("coco", tmp_path / "captions.json") / "samples.jsonl") == [
        {"file": "COCO_3.png", "prompt": "une étoile", "seed": 0, "name": "COCO_3"}]


def test_a_name_that_is_no_file_name_or_comes_twice_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    words = options(FIXTURES / "cad_tiny", tmp_path / "in/out", "--prompts", path, "--format", "dpg",
                    "--images-per-prompt", 4)
    for name in ["../../escaped", "a\\b", "..", "", " ", None, 5, "new\nline", "x" * 300, "\ud83d", "sheet"]:
        write_jsonl(path, [{"prompt": "ring", "name": name}])
        assert "has the name" in refused("sample.py", *words)
    write_jsonl(path, [{"prompt": "ring", "name": "a"}, {"prompt": "a star"}, {"prompt": "a", "name": "a"}])
    assert "prompt 3" in refused("sample.py", *words)
    assert [file.name for file in tmp_path.rglob("*")] == ["prompts.jsonl"]
