"""The samplers against exact solutions, and the command as people use it."""

import copy
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, refused
from PIL import Image
from scipy.integrate import solve_ivp

import evaluate
import sample
from common import UserError, only_command, read_json, read_jsonl, write_jsonl

# --------------------------------------------------------------------------------------
# Models whose answers are known

class Known:
    """The best `denoise` for x_0 ~ N(mean, std^2); the caption says the mean."""

    def __init__(self, std=0.0):
        self.std = std

    def condition(self, text, mask, coherence):
        mean = (text.mean(2) * mask).sum(1) / mask.sum(1)
        return mean[:, None, None, None]

    def denoise(self, x, gamma, context, state=None):
        x = x.double()
        g = gamma.double()[:, None, None, None]
        variance = g * self.std ** 2 + 1 - g
        eps = (1 - g).sqrt() * (x - g.sqrt() * context) / variance
        return eps, None


class Spy(Known):
    """`Known`, but it has a state, and it notes what it is called with."""

    def __init__(self, std=0.5):
        super().__init__(std)
        self.rows = []
        self.states = []

    def denoise(self, x, gamma, context, state=None):
        eps, _ = super().denoise(x, gamma, context)
        self.rows.append(len(x))
        self.states.append(state)
        # Each row's state tells in which call it was made, and where in the batch.
        call = torch.full((len(x),), float(len(self.rows)))
        return eps, torch.stack([call, torch.arange(len(x)).float()], 1)


WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([-1.2, 1.0])
STDS = np.array([0.8, 0.6])


def mixture(x, g):
    """Return E[x_0 | x_t] and the score of two Gaussians, for x (N,) at signal level g."""
    apart = x[:, None] - np.sqrt(g) * MEANS                     # (N, 2)
    variances = g * STDS ** 2 + 1 - g
    density = WEIGHTS * np.exp(-0.5 * apart ** 2 / variances) / np.sqrt(variances)
    share = density / density.sum(1, keepdims=True)
    x_0 = MEANS + np.sqrt(g) * STDS ** 2 / variances * apart
    return (share * x_0).sum(1), (share * -apart / variances).sum(1)


class Mixture:
    """The `denoise` of that mixture."""

    def condition(self, text, mask, coherence):
        return None

    def denoise(self, x, gamma, context, state=None):
        g = float(gamma[0].double())
        _, score = mixture(x.double().numpy().ravel(), g)
        return torch.from_numpy(-np.sqrt(1 - g) * score).view(x.shape), None


def texts(value, batch=3, length=4):
    """Return a text of which `Known` understands that the mean is `value`, and its mask."""
    text = torch.full((batch, length, 5), value)
    mask = torch.ones(batch, length, dtype=torch.bool)
    return text, mask


# --------------------------------------------------------------------------------------
# The samplers

@pytest.mark.parametrize("solver", sample.SOLVERS.values())
def test_a_solver_finds_the_only_picture_there_is_whatever_the_steps(solver):
    noise = torch.randn(3, 2, 4, 4)
    for steps in (1, 2, 7):
        x_0 = solver(Known(), noise, texts(0.25), texts(0.0), steps, guidance=0)
        assert torch.allclose(x_0, torch.full_like(x_0, 0.25), atol=1e-4)


def test_ddim_with_many_steps_transports_noise_to_a_gaussian():
    """The probability-flow map from N(0, 1) to N(mean, std^2) is x_0 = mean + std * noise."""
    noise = torch.randn(3, 2, 4, 4).clamp(-2, 2)
    x_0 = sample.ddim(Known(0.3), noise, texts(0.1), texts(0.0), 2000, 0, clamp=None)
    assert torch.allclose(x_0, 0.1 + 0.3 * noise, atol=5e-3)


def walk(x, times, w, clamp, means=(0.2, -0.1), std=0.5):
    """DDIM in a few lines, from times[0] to times[-1], with guidance w for `Known(std)`."""
    for t, t_next in zip(times, times[1:]):
        g = max(1 - t, 1e-9)
        g_next = 1 - t_next
        variance = g * std ** 2 + 1 - g
        scale = (1 - g) ** 0.5 / variance
        cond = scale * (x - g ** 0.5 * means[0])
        null = scale * (x - g ** 0.5 * means[1])
        eps = cond + w * (cond - null)
        x_0 = ((x - (1 - g) ** 0.5 * eps) / g ** 0.5).clamp(-clamp, clamp)
        eps = (x - g ** 0.5 * x_0) / (1 - g) ** 0.5
        x = g_next ** 0.5 * x_0 + (1 - g_next) ** 0.5 * eps
    return x


def test_guidance_moves_on_from_the_null_prediction_by_w_except_at_the_first_step():
    noise = torch.randn(2, 1, 2, 2)
    cond = texts(0.2, 2)
    null = texts(-0.1, 1, 1)
    x_0 = sample.ddim(Known(0.5), noise, cond, null, 3, 1.5, clamp=0.4)
    x = walk(noise.double(), [1, 2 / 3], 0, clamp=0.4)
    x = walk(x, [2 / 3, 1 / 3, 0], 1.5, clamp=0.4)
    assert torch.allclose(x_0.double(), x, atol=1e-5)


def test_captions_and_nulls_share_a_batch_and_each_goes_on_from_its_own_state():
    model = Spy()
    sample.ddim(model, torch.randn(2, 1, 2, 2), texts(0.2, 2), texts(-0.1, 1, 1), 3, 1.5)
    assert model.rows == [2, 4, 4]
    assert model.states[0] is None
    # The first step has no guidance: its state serves both halves.
    assert model.states[1].tolist() == [[1, 0], [1, 1], [1, 0], [1, 1]]
    assert model.states[2].tolist() == [[2, 0], [2, 1], [2, 2], [2, 3]]


def test_no_guidance_costs_one_pass_a_step():
    model = Spy()
    sample.ddim(model, torch.randn(2, 1, 2, 2), texts(0.2, 2), texts(0.0, 1), 4, guidance=0)
    assert model.rows == [2, 2, 2, 2]


def test_outside_the_guidance_interval_ddim_is_that_without_guidance():
    noise = torch.randn(2, 1, 2, 2)
    cond = texts(0.2, 2)
    null = texts(-0.1, 1, 1)
    x_0 = sample.ddim(Known(0.5), noise, cond, null, 10, 1.5, 0.4, interval=(0.25, 0.75))
    t = [1 - i / 10 for i in range(11)]
    # Steps that begin in the interval, at .7, .6, .5, .4 and .3, are guided.
    x = walk(noise.double(), t[0:4], 0, clamp=0.4)
    x = walk(x, t[3:9], 1.5, clamp=0.4)
    x = walk(x, t[8:], 0, clamp=0.4)
    assert torch.allclose(x_0.double(), x, atol=1e-5)


@pytest.mark.parametrize("solver", sample.SOLVERS.values())
def test_after_the_guidance_interval_the_captions_go_on_from_their_own_state(solver):
    model = Spy()
    noise = torch.randn(2, 1, 2, 2)
    solver(model, noise, texts(0.2, 2), texts(-0.1, 1, 1), 5, 1.5, interval=(0.5, 0.9))
    assert model.rows == [2, 4, 4, 2, 2]
    assert model.states[3].tolist() == [[3, 0], [3, 1]]
    assert model.states[4].tolist() == [[4, 0], [4, 1]]


@pytest.mark.parametrize("spacing", sample.SPACINGS)
def test_dpm_solver_takes_the_steps_of_its_paper(spacing):
    """Lu et al. 2022, Algorithm 2, from its formulas, with guidance and a clamp."""
    noise = torch.randn(2, 1, 2, 2)
    cond = texts(0.2, 2)
    null = texts(-0.1, 1, 1)
    x_0 = sample.dpm_solver(Known(0.5), noise, cond, null, 6, 1.5, 0.4, spacing)

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
        eps = eps_cond
        if i > 1:
            eps = eps_cond + 1.5 * (eps_cond - eps_null)
        estimates.append(np.clip((x - s * eps) / a, -0.4, 0.4))
        h = lam[i] - lam[i - 1]
        D = estimates[-1]
        if 1 < i < 6:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * estimates[-1] - 1 / (2 * r) * estimates[-2]
        x = sigma[i] / s * x - alpha[i] * (np.exp(-h) - 1) * D
    assert np.allclose(x_0, x, atol=1e-5)


def test_dpm_solver_converges_to_the_exact_flow_with_order_two_and_ddim_with_order_one():
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def flow(angle, x):
        """The probability-flow ODE, with x_t = cos(angle) x_0 + sin(angle) eps."""
        x_0, score = mixture(x, np.cos(angle) ** 2)
        eps = -np.sin(angle) * score
        return np.cos(angle) * eps - np.sin(angle) * x_0

    # From the angle of the release's first step to that of its last one.
    begin = np.pi / 2 * 1.0002 / 1.00025
    end = np.pi / 2 * 0.0002 / 1.00025
    start = noise.double().numpy().ravel()
    exact = solve_ivp(flow, (begin, end), start, rtol=1e-9, atol=1e-11).y[:, -1]

    def error(solver, steps):
        none = texts(0.0, 1)
        x_0 = solver(Mixture(), noise, none, none, steps, 0, None, "cosine")
        return np.abs(x_0.numpy().ravel() - exact).mean()

    def order(solver):
        return np.log(error(solver, 8) / error(solver, 128)) / np.log(128 / 8)

    assert 1.7 < order(sample.dpm_solver) < 2.3
    assert 0.9 < order(sample.ddim) < 1.1


def test_with_guidance_dpm_solver_is_of_first_order_because_the_first_step_has_none():
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = texts(0.2, 1)
    null = texts(-0.1, 1)

    def end(steps):
        return sample.dpm_solver(Known(0.5), noise, cond, null, steps, 1.5, None, "cosine")

    exact = end(8192)
    errors = [float((end(steps) - exact).abs().mean()) for steps in (16, 128)]
    assert 0.9 < np.log(errors[0] / errors[1]) / np.log(128 / 16) < 1.2


@pytest.mark.parametrize("steps", [10, 20, 40])
def test_rounding_does_not_take_an_end_from_the_guidance_interval(steps):
    model = Spy()
    noise = torch.randn(2, 1, 2, 2)
    sample.ddim(model, noise, texts(0.2, 2), texts(-0.1, 1, 1), steps, interval=(0.0, 0.3))
    # The steps that begin at t = 0.3 and below.
    assert model.rows.count(4) == 3 * steps // 10


def test_a_clamp_of_zero_is_none():
    noise = torch.randn(2, 1, 2, 2)
    free, none = [sample.ddim(Known(0.3), noise, texts(0.1, 2), texts(0.0, 1), 4, clamp=clamp)
                  for clamp in (0, None)]
    assert torch.equal(free, none)
    assert free.abs().max() > 0


def test_an_unknown_spacing_is_refused():
    with pytest.raises(UserError, match="'quadratic': must be one of linear, cosine"):
        sample.times(4, "quadratic")


def test_the_cosine_spacing_is_that_of_the_release():
    t = sample.times(250, "cosine")
    u = torch.arange(250, -1, -1, dtype=torch.float64) / 250
    signal = torch.cos((u + 2e-4) / (1 + 2.5e-4) * torch.pi / 2) ** 2
    assert torch.allclose(sample.gamma(t), signal, rtol=1e-7, atol=0)


@pytest.mark.parametrize("solver", sample.SOLVERS.values())
def test_a_caller_sees_every_step_and_the_last_one_is_the_result(solver):
    seen = []

    def look(step, x, x_0):
        seen.append((step, x, x_0))

    noise = torch.randn(2, 1, 2, 2)
    result = solver(Known(0.3), noise, texts(0.1, 2), texts(0.0, 1), 4, 0, on_step=look)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    _, x, x_0 = seen[-1]
    assert torch.equal(x.float(), result)
    assert torch.allclose(x_0, x)


# --------------------------------------------------------------------------------------
# The registry of models

def test_a_model_that_is_half_added_is_refused_at_once():
    class NoDenoise(torch.nn.Module):
        def condition(self, text, mask, coherence):
            return None

        def forward(self, x, gamma, text, mask, coherence, coin=None):
            return x

    with pytest.raises(TypeError, match="no `denoise`"):
        sample.check_model_family("new", sample.ModelFamily(NoDenoise, {"S": {}}, "S"))
    network = sample.MODELS["dit"].network
    with pytest.raises(TypeError, match="default preset 'M'"):
        sample.check_model_family("new", sample.ModelFamily(network, {"S": {}}, "M"))
    with pytest.raises(TypeError):
        sample.ModelFamily(network, {"S": {}})


# --------------------------------------------------------------------------------------
# Checkpoints, and `generate`

@pytest.fixture(scope="module")
def pipeline(toy_paper):
    return sample.load_pipeline(toy_paper[0] / "dit", device=torch.device("cpu"))


def same(images, others):
    """Tell whether two lists of images are equal, up to rounding of a pixel."""
    a = np.stack([np.asarray(image) for image in images]).astype(int)
    b = np.stack([np.asarray(image) for image in others]).astype(int)
    return a.shape == b.shape and np.abs(a - b).max() <= 1


def test_generate_makes_the_images_of_the_command(toy_paper, tmp_path, pipeline):
    out = tmp_path / "out"
    sample.main(options(toy_paper, out, "--prompt", "a red star", "--prompt", "ring",
                        "--solver", "dpm++", "--spacing", "cosine",
                        "--guidance-interval", 0.2, 0.8))
    images = sample.generate(pipeline, ["a red star", "ring"], steps=3, guidance=2,
                             solver="dpm++", spacing="cosine", guidance_interval=(0.2, 0.8))
    assert same(images, [Image.open(out / "000000.png"), Image.open(out / "000001.png")])


def test_an_image_depends_on_its_seed_and_not_on_its_batch(pipeline):
    three = sample.generate(pipeline, ["ring", "a star", "ring"], seeds=[5, 6, 6], steps=2)
    one = sample.generate(pipeline, ["ring"], seeds=[6], steps=2)
    assert same(one, three[2:])
    assert not same(one, three[:1])


def test_the_negative_prompt_is_the_null_prompt_unless_it_is_given(pipeline):
    def ring(**options):
        return sample.generate(pipeline, ["ring"], steps=3, **options)

    assert same(ring(), ring(negative_prompts=[""]))
    assert not same(ring(), ring(negative_prompts=["a star"]))


def test_one_text_in_place_of_a_list_of_prompts_is_refused(pipeline):
    with pytest.raises(TypeError, match="lists"):
        sample.generate(pipeline, "ring", steps=3)


@pytest.mark.parametrize("wrong, words", [
    ({"prompts": []}, "0 prompts"),
    ({"seeds": [1, 2]}, "2 seeds"),
    ({"negative_prompts": ["a", "b"]}, "2 negative prompts"),
    ({"negative_prompts": []}, "0 negative prompts"),
    ({"steps": 0}, "at least 1"),
    ({"max_tokens": 0}, "at least 1"),
    ({"guidance": -1}, "at least 0"),
    ({"guidance": float("nan")}, "at least 0"),
    ({"clamp": -1}, "at least 0"),
    ({"guidance_interval": (0.8, 0.2)}, "the lower first"),
    ({"solver": "euler"}, "one of ddim, dpm"),
    ({"spacing": "quadratic"}, "one of linear, cosine"),
    ({"precision": "fp16"}, "one of auto, fp32, bf16"),
])
def test_generate_refuses_what_means_nothing(pipeline, wrong, words):
    with pytest.raises(UserError, match=words) as error:
        sample.generate(pipeline, **{"prompts": ["ring"], "steps": 2, **wrong})
    assert "\n" not in str(error.value)


def test_a_prompt_of_too_many_tokens_loses_its_end(pipeline):
    # One token a word, and the end-of-text token.
    long = sample.generate(pipeline, ["a large red circle"], steps=2, max_tokens=3)
    short = sample.generate(pipeline, ["a large"], steps=2)
    assert same(long, short)


def test_random_negative_prompts_are_letters_that_depend_on_the_seed():
    assert sample.random_letters(3) == sample.random_letters(3)
    assert sample.random_letters(3) != sample.random_letters(4)
    for seed in range(20):
        assert re.fullmatch("[a-z]{3,7}( [a-z]{3,7}){2,5}", sample.random_letters(seed))


def copy_checkpoint(toy_paper, folder):
    """Copy the toy's checkpoint, so that a test can damage it."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((toy_paper[0] / "dit" / name).read_bytes())
    return folder


def trained_with(folder, **fingerprints):
    """Change what a checkpoint says of its training; None is not said."""
    config = read_json(folder / "config.json", "a checkpoint's config.json")
    for key, value in fingerprints.items():
        config["training"].pop(key)
        if value:
            config["training"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("key, option, name", [
    ("vae_fingerprint", "--vae", "vae"), ("T5", "--text-encoder", "text_encoder")])
def test_other_encoders_than_the_checkpoints_are_refused_unless_they_are_named(
        toy_paper, tmp_path, key, option, name):
    folder = copy_checkpoint(toy_paper, tmp_path / "checkpoint")
    config = trained_with(folder, **{key: "0123456789abcdef"})
    line = refused("sample.py", *options(toy_paper, tmp_path / "out", "--prompt", "ring",
                                         "--checkpoint", folder))
    assert "0123456789abcdef" in line and option in line
    assert not (tmp_path / "out").exists()
    assert sample.load_pipeline(folder, **{name: config[name]})
    # A checkpoint from before there were fingerprints.
    trained_with(folder, **{key: None})
    assert sample.load_pipeline(folder)


def test_the_precision_of_t5_does_not_make_it_another_one(pipeline):
    t5 = copy.deepcopy(pipeline.text_encoder).bfloat16()
    assert sample.fingerprints(pipeline._replace(text_encoder=t5)) == sample.fingerprints(pipeline)


def test_the_encoders_fingerprints_belong_to_the_folder(toy_paper, tmp_path):
    folder = copy_checkpoint(toy_paper, tmp_path / "checkpoint")
    config = trained_with(folder)
    out = tmp_path / "out"
    words = options(toy_paper, out, "--prompt", "ring", "--checkpoint", folder)
    sample.main(words)
    path = out / "settings.json"
    settings = read_json(path, "settings")
    assert settings["vae_fingerprint"] == config["training"]["vae_fingerprint"]
    assert settings["T5"] == config["training"]["T5"]
    # As if the rest had been made with other weights below the same path.
    path.write_text(json.dumps({**settings, "T5": "0123456789abcdef"}))
    (out / "000000.png").unlink()
    assert "other settings (T5" in refused("sample.py", *words)


TINY = {"dim": 8, "heads": 2, "depth": 1, "text_dim": 8}


@pytest.mark.parametrize("change", [
    {"model": 0}, {"model": ["dit"]}, {"model": "unet"}, {"latents_dim": 0}, {"args": 5},
    {"args": {**TINY, "depth": "four"}}, {"args": {**TINY, "heads": 0}},
    {"args": {**TINY, "patch": 0}}, {"args": {**TINY, "size": -8}}, {"args": {"colour": 1}},
    {"vae": 5}, {"text_encoder": [1]}])
def test_a_config_that_means_nothing_is_refused_in_one_line(toy_paper, tmp_path, change):
    folder = copy_checkpoint(toy_paper, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    line = refused("sample.py", "--checkpoint", folder, "--prompt", "a",
                   "--out", tmp_path / "out")
    assert "config.json" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, content, message", [
    ("config.json", "[1]", "no JSON object"),
    ("config.json", '{"model', "not the config.json"),
    ("model.safetensors", "", "damaged")])
def test_a_damaged_checkpoint_is_refused(toy_paper, tmp_path, name, content, message):
    folder = copy_checkpoint(toy_paper, tmp_path / "checkpoint")
    (folder / name).write_text(content)
    assert message in refused("sample.py", "--checkpoint", folder, "--prompt", "a",
                              "--out", tmp_path / "out")


def test_weights_that_do_not_fit_the_config_are_refused(toy_paper, tmp_path):
    folder = copy_checkpoint(toy_paper, tmp_path / "checkpoint")
    weights = (FIXTURES / "cad_tiny/model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights)
    assert "does not fit" in refused("sample.py", "--checkpoint", folder, "--prompt", "a",
                                     "--out", tmp_path / "out")


# --------------------------------------------------------------------------------------
# The command

WORDS = ["a large red circle", "a star", "ring", "a",
         "a small blue cross above a large green ring . it is grey ."]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": prompt, "tag": "x", "extra": [1]} for prompt in WORDS]
    write_jsonl(path, rows)
    return path


def options(toy_paper, out, *words):
    """Return the options of a short command, as strings."""
    checkpoint = toy_paper[0] / "dit"
    start = ["--checkpoint", checkpoint, "--out", out, "--steps", 3, "--guidance", 2]
    return [str(word) for word in [*start, *words]]


def test_a_command_goes_on_after_a_kill_with_any_batch_size(toy_paper, tmp_path, prompts):
    one = tmp_path / "one"
    many = tmp_path / "many"
    again = options(toy_paper, one, "--prompts", prompts, "--batch-size", 1, "--seed", 7)
    sample.main(again)
    sample.main(options(toy_paper, many, "--prompts", prompts, "--batch-size", 4,
                        "--seed", 7))
    files = [f"{n:06d}.png" for n in range(5)]
    for file in files:
        assert same([Image.open(one / file)], [Image.open(many / file)])
    rows = read_jsonl(one / "samples.jsonl")
    assert [row["seed"] for row in rows] == [7, 8, 9, 10, 11]
    assert [row["prompt"] for row in rows] == WORDS
    # The list of samples is that of the prompts' images: no sheet, no grid.
    assert [row["file"] for row in rows] == files

    before = {file: (one / file).read_bytes() for file in files}
    stamp = (one / files[0]).stat().st_mtime_ns
    # As if it had been killed.
    for file in (files[1], files[3], "samples.jsonl"):
        (one / file).unlink()
    sample.main(again)
    assert (one / files[0]).stat().st_mtime_ns == stamp
    assert {file: (one / file).read_bytes() for file in files} == before
    assert read_jsonl(one / "samples.jsonl") == rows
    assert Image.open(one / "sheet.png").size[0] > 96


def test_ranks_share_the_prompts_and_the_last_one_finishes(toy_paper, tmp_path, prompts,
                                                           monkeypatch):
    words = options(toy_paper, tmp_path / "two", "--prompts", prompts, "--batch-size", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        sample.main(words)
        assert (tmp_path / "two/samples.jsonl").exists() == (rank == "0")
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    sample.main(options(toy_paper, tmp_path / "one", "--prompts", prompts, "--batch-size", 1))
    for n in range(5):
        file = f"{n:06d}.png"
        alone = (tmp_path / "one" / file).read_bytes()
        assert (tmp_path / "two" / file).read_bytes() == alone


def test_whatever_changes_an_image_belongs_to_the_folder(toy_paper, tmp_path, prompts):
    begun = options(toy_paper, tmp_path / "out", "--prompts", prompts)
    sample.main(begun)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for change in ["--images-per-prompt 2", "--solver dpm++", "--spacing cosine", "--steps 4",
                   "--guidance 3", "--guidance-interval 0.1 1", "--negative-prompt x",
                   "--random-negative-prompt", "--clamp 0", "--max-tokens 9", "--seed 8",
                   "--precision bf16", "--prompt more", "--limit 2", "--format geneval",
                   f"--text-encoder {tmp_path}", f"--vae {tmp_path}"]:
        assert "other settings" in refused("sample.py", *begun, *change.split()), change
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_of_samples_tells_which_checkpoint_made_them(toy_paper, tmp_path):
    sample.main(options(toy_paper, tmp_path / "out", "--prompt", "ring"))
    config = (toy_paper[0] / "dit/config.json").read_bytes()
    assert (tmp_path / "out/checkpoint.json").read_bytes() == config


def test_a_command_that_failed_leaves_nothing_and_the_corrected_one_works(toy_paper, tmp_path):
    out = tmp_path / "out"
    right = options(toy_paper, out, "--prompt", "ring")
    # The text encoder is 128 wide, the tiny CAD wants 24. This comes out while loading.
    line = refused("sample.py", "--checkpoint", FIXTURES / "cad_tiny", "--prompt", "a",
                   "--text-encoder", toy_paper[0] / "t5", "--vae", FIXTURES / "vae_tiny",
                   "--out", out)
    assert "24" in line
    assert not out.exists()
    for wrong in [f"--seed {2 ** 70}", "--seed -1", "--guidance nan", "--guidance inf",
                  "--clamp nan", "--clamp -1", "--steps 0", "--batch-size 0",
                  "--max-tokens 0", "--limit 0", "--guidance-interval 0.8 0.2",
                  "--guidance-interval nan 1", "--prompt half-a-character-\ud83d",
                  "--negative-prompt \ud83d", "--format dpg",
                  "--negative-prompt x --random-negative-prompt"]:
        refused("sample.py", *right, *wrong.split())
        assert not out.exists(), wrong
    sample.main(right)
    assert (out / "000000.png").exists()


def test_images_of_which_nobody_knows_how_they_were_made_are_not_adopted(toy_paper, tmp_path):
    out = tmp_path / "out"
    words = options(toy_paper, out, "--prompt", "ring")
    sample.main(words)
    (out / "settings.json").unlink()
    before = (out / "000000.png").read_bytes()
    line = refused("sample.py", *options(toy_paper, out, "--prompt", "a star"))
    assert "000000.png is there, but no settings.json" in line
    assert (out / "000000.png").read_bytes() == before
    assert not (out / "settings.json").exists()


def test_the_settings_remember_which_prompt_has_which_name(toy_paper, tmp_path):
    path = tmp_path / "prompts.jsonl"
    out = tmp_path / "out"
    words = options(toy_paper, out, "--prompts", path, *DPG)
    write_jsonl(path, [{"prompt": "ring", "name": "a"}, {"prompt": "ring"}])
    sample.main(words)
    write_jsonl(path, [{"prompt": "ring"}, {"prompt": "ring", "name": "a"}])
    assert "other settings (names" in refused("sample.py", *words)


def test_a_limit_without_a_file_of_prompts_is_refused(toy_paper, tmp_path):
    line = refused("sample.py", *options(toy_paper, tmp_path / "out", "--prompt", "ring",
                                         "--limit", 1))
    assert "--limit" in line and "--prompts" in line


def test_a_second_command_on_the_same_folder_is_refused(toy_paper, tmp_path):
    out = tmp_path / "out"
    with only_command(out):
        line = refused("sample.py", *options(toy_paper, out, "--prompt", "ring"))
    assert "another command" in line


def test_a_command_that_was_killed_does_not_lock_the_folder(toy_paper, tmp_path):
    out = tmp_path / "out"
    code = ("import common, sys, time\n"
            "with common.only_command(sys.argv[1]):\n"
            "    print('in', flush=True)\n"
            "    time.sleep(600)")
    words = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as killed:
        assert killed.stdout.readline() == b"in\n"
        killed.send_signal(signal.SIGKILL)
    sample.main(options(toy_paper, out, "--prompt", "ring"))
    names = sorted(path.name for path in out.iterdir())
    assert names == ["000000.png", "checkpoint.json", "samples.jsonl", "settings.json",
                     "sheet.png"]


# --------------------------------------------------------------------------------------
# Prompts and layouts

def test_geneval_folders_keep_the_metadata_of_their_prompts(toy_paper, tmp_path, prompts):
    sample.main(options(toy_paper, tmp_path, "--prompts", prompts, "--format", "geneval",
                        "--images-per-prompt", 2))
    row = json.loads((tmp_path / "00002/metadata.jsonl").read_text())
    assert row == read_jsonl(prompts)[2]
    assert row["extra"] == [1]
    assert (tmp_path / "00004/samples/0001.png").exists()


DPG = ("--format", "dpg", "--images-per-prompt", 4)


def test_dpg_grids_have_the_names_of_their_prompts(toy_paper, tmp_path):
    folder = tmp_path / "dpg-prompts"
    folder.mkdir()
    # macOS puts such files beside those of other file systems.
    for name in ("12", "COCO_7", "._12"):
        (folder / f"{name}.txt").write_text("a red circle\n")
    out = tmp_path / "out"
    sample.main(options(toy_paper, out, "--prompts", folder, *DPG))
    assert {path.name for path in out.glob("*.png")} == {"12.png", "COCO_7.png"}
    assert Image.open(out / "12.png").size == (128, 128)


def test_a_refused_name_of_a_prompt_names_its_file(toy_paper, tmp_path):
    folder = tmp_path / "dpg-prompts"
    folder.mkdir()
    (folder / "sheet.txt").write_text("a red circle\n")
    words = options(toy_paper, tmp_path / "out", "--prompts", folder, *DPG)
    assert str(folder / "sheet.txt") in refused("sample.py", *words)


@pytest.mark.parametrize("name", ["../../escaped", "a/b", "a\\b", "..", ".hidden", "", " ",
                                  None, 5, "\0", "new\nline", "x" * 300, "\ud83d", ["a"]])
def test_a_name_that_is_no_file_name_is_refused(toy_paper, tmp_path, name):
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"prompt": "ring", "name": name}])
    out = tmp_path / "in/out"
    line = refused("sample.py", *options(toy_paper, out, "--prompts", path, *DPG))
    assert "name" in line
    assert [file.name for file in tmp_path.rglob("*")] == ["prompts.jsonl"]


def test_two_prompts_of_one_name_are_refused(toy_paper, tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"prompt": "ring", "name": "a"}, {"prompt": "a star"},
                       {"prompt": "a star", "name": "a"}])
    out = tmp_path / "out"
    line = refused("sample.py", *options(toy_paper, out, "--prompts", path, *DPG))
    assert "prompt 3" in line


def coco_file(path, captions):
    """Write annotations like COCO's: `captions` maps an image's id to its captions."""
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in captions]
    annotations = []
    for i, lines in captions.items():
        for line in lines:
            annotations.append({"id": len(annotations), "image_id": i, "caption": line})
    path.write_text(json.dumps({"images": images, "annotations": annotations}, indent=1))


def test_cocos_captions_give_each_image_the_name_of_its_photo(toy_paper, tmp_path):
    path = tmp_path / "captions_val2014.json"
    coco_file(path, {7: ["a red star", "ring"], 3: ["une étoile à côté"], 9: ["a star"]})
    out = tmp_path / "out"
    sample.main(options(toy_paper, out, "--prompts", path))
    rows = read_jsonl(out / "samples.jsonl")
    assert [row["file"] for row in rows] == [f"COCO_val2014_{i:012d}.png" for i in (3, 7, 9)]
    assert [row["prompt"] for row in rows] == ["une étoile à côté", "a red star", "a star"]
    assert all((out / row["file"]).exists() for row in rows)
    # By these names evaluate.py compares them with the photos that were asked for.
    asked_for = [f"COCO_val2014_{i:012d}" for i in (3, 7, 9)]
    assert list(evaluate.sample_names(out).values()) == asked_for

    # Prompts that `caption.py extend` made of them keep the names.
    long = tmp_path / "coco-long.jsonl"
    prompts = [{**row, "prompt": f"{row['prompt']} on dark ground"} for row in sample.read_prompts(path)]
    write_jsonl(long, prompts)
    sample.main(options(toy_paper, tmp_path / "long", "--prompts", long))
    assert list(evaluate.sample_names(tmp_path / "long").values()) == asked_for


def test_a_limit_takes_a_part_that_the_seed_chooses(tmp_path):
    coco = tmp_path / "captions.json"
    coco_file(coco, {i: [f"caption {i}"] for i in range(40)})
    lines = tmp_path / "prompts.txt"
    lines.write_text("".join(f"caption {i:02d}\n" for i in range(40)))
    for path in (coco, lines):
        rows = sample.read_prompts(path)
        some = sample.read_prompts(path, 10, seed=1)
        assert len(some) == 10
        # In the file's order.
        assert some == [row for row in rows if row in some]
        assert some == sample.read_prompts(path, 10, seed=1)
        assert some != sample.read_prompts(path, 10, seed=2)


def test_captions_of_encoded_images_are_prompts_too(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text('{"file": "n01/a.JPEG", "caption": "A tench."}\n')
    assert sample.read_prompts(path)[0]["prompt"] == "A tench."


def test_the_mark_that_an_editor_puts_before_a_text_is_not_part_of_a_prompt(tmp_path):
    text = tmp_path / "prompts.txt"
    text.write_bytes(b"\xef\xbb\xbfa star\nring\n")
    lines = tmp_path / "prompts.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"prompt": "a star"}\n')
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "0.txt").write_bytes(b"\xef\xbb\xbfa star\n")
    for path in (text, lines, folder):
        assert sample.read_prompts(path)[0]["prompt"] == "a star"


def test_mistakes_with_prompts_end_in_one_line(toy_paper, tmp_path):
    files = {
        "bad.jsonl": (b'{"prompt": "a"}\nnot json\n', "line 2"),
        "number.jsonl": (b'{"prompt": 5}\n', "line 1"),
        "half.jsonl": (b'{"prompt": "\\ud83d"}\n', "not UTF-8"),
        "list.json": (b"[1]\n", "not a JSON object"),
        "coco.json": (b'{"annotations": 5}', "COCO"),
        "empty.txt": (b"\n", "no prompts in it"),
        "latin.txt": ("prüfung\n".encode("latin-1"), "not UTF-8"),
        "latin.jsonl": ('{"prompt": "prüfung"}\n'.encode("latin-1"), "line 1"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        assert message in refused("sample.py", *options(toy_paper, tmp_path / "out"),
                                  "--prompts", tmp_path / name), name
    words = options(toy_paper, tmp_path / "out")
    assert "no prompts" in refused("sample.py", *words)
    assert "no such file" in refused("sample.py", *words, "--prompts", tmp_path / "none.txt")
    checkpoint = toy_paper[0] / "dit"
    assert "--out" in refused("sample.py", "--checkpoint", checkpoint, "--prompt", "a")
    assert "no such folder" in refused("sample.py", "--checkpoint", tmp_path / "checkpoint",
                                       "--prompt", "a", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------
# Speed

def test_the_benchmark_counts_evaluations_and_its_parts_add_up(toy_paper, capsys):
    sample.main(["--benchmark", "--checkpoint", str(toy_paper[0] / "dit"), "--steps", "6",
                 "--batch-size", "2", "--guidance-interval", "0.3", "0.7"])
    line, numbers = capsys.readouterr().out.splitlines()
    result = json.loads(numbers)
    # Six steps, of which those at t = 2/3, 1/2 and 1/3 have guidance.
    assert result["evaluations"] == 9 and "9 evaluations" in line
    parts = sum(result[f"seconds_{part}"] for part in ("text", "network", "decoder"))
    assert parts == pytest.approx(result["seconds_per_image"])
    assert result["images_per_second"] == pytest.approx(1 / parts)
    assert result["flops_per_image"] > 0 and result["share_of_peak"] > 0


def test_the_progress_bar_shows_images_a_second(toy_paper, tmp_path, capsys):
    sample.main(options(toy_paper, tmp_path / "out", "--prompt", "ring"))
    bar = capsys.readouterr().err
    assert "images/s" in bar and "s/image" in bar
