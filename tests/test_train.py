"""Algorithm 1 and the equations, the optimiser, and what a run promises whatever happens to it."""

import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, refused, run
from safetensors.torch import load_file, save_file

import encode
import model_cad
import train
from common import UserError, only_command, pad_text, padded_length, read_jsonl
from encode import Encoded

# A run of seconds. Six samples a step, so that two and three ranks can share them.
SMALL = ["--preset", "toy", "--batch-size", "6", "--warmup", "2", "--log-every", "2",
         "--save-every", "4", "--sample-every", "0", "--seed", "3"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def data(toy_paper):
    """Return the options that name the toy's encoded sets."""
    toy = toy_paper[0]
    return ["--data", str(toy / "encoded"), "--augmented", str(toy / "encoded-cutmix")]


def batches(toy_paper, *words, rank=0, world=1):
    """Return the loader of a rank, for batches of six."""
    args = train.arguments([*data(toy_paper), "--out", "unused", "--batch-size", "6", *words])
    original, augmented, _ = train.open_data(args)
    return train.Batches(original, augmented, args, rank, world)


def losses(out):
    """Return the losses in the log of a run."""
    return [row["loss"] for row in read_jsonl(out / "log.jsonl") if "loss" in row]


def make_encoded(folder, count=8, channels=4, size=8, text_dim=24, **meta):
    """Write an encoded data set of random numbers, in one shard."""
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    lengths = torch.arange(2, 2 + count)
    latents = (count, channels, size, size)
    shard = {"mean": torch.randn(latents, generator=rng).half(),
             "std": torch.rand(latents, generator=rng).half(),
             "text": torch.randn(int(lengths.sum()), text_dim, generator=rng).bfloat16(),
             "offset": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])}
    samples = {"files": [f"{i}.png" for i in range(count)],
               "captions": [f"picture {i}" for i in range(count)], "skipped": []}
    save_file(shard, folder / encode.shard_name(0), {"samples": json.dumps(samples)})
    save_file({"text": torch.zeros(1, text_dim).bfloat16()}, folder / "null.safetensors")
    whole = {"version": 1, "size": 8 * size, "shards": 1, "counts": [count], "count": count,
             "latent_shape": [channels, size, size], "text_dim": text_dim,
             "text_dtype": "bfloat16", "longest": int(lengths.max()), "vae": "none",
             "text_encoder": "none", "scaling_factor": 0.5, **meta}
    (folder / "meta.json").write_text(json.dumps(whole))
    return folder


# --------------------------------------------------------------------------------------
# The method

def test_gamma_is_one_minus_t_and_never_zero():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert train.gamma(t).tolist() == pytest.approx([1.0, 0.75, 1e-9])


def test_composites_come_only_where_t_is_above_tau_and_there_with_probability_p():
    t = np.random.default_rng(1).random(40_000)
    chosen = train.choose(t, np.random.default_rng(2), 0.4, 0.3)
    assert chosen.dtype == bool
    assert not chosen[t <= 0.4].any()
    # Four standard errors.
    assert chosen[t > 0.4].mean() == pytest.approx(0.3, abs=0.012)
    near, far = chosen[(t > 0.4) & (t < 0.5)], chosen[t > 0.9]
    assert abs(near.mean() - far.mean()) < 0.05
    assert not train.choose(t, np.random.default_rng(2), 0.4, 0.0).any()
    assert (train.choose(t, np.random.default_rng(2), 0.4, 1.0) == (t > 0.4)).all()


def test_the_loss_is_the_mean_squared_error_of_the_noise_in_x_t():
    t = torch.tensor([0.1, 0.7])
    x_0 = torch.randn(2, 3, 4, 4)
    eps = torch.randn(2, 3, 4, 4)
    seen = {}

    def model(x, gamma, text, mask, coherence, coin):
        seen.update(x=x, gamma=gamma)
        return 0.5 * x

    found = train.diffusion_losses(model, t, x_0, eps, None, None, None, None)
    for k, s in enumerate((0.1, 0.7)):
        x_t = math.sqrt(1 - s) * x_0[k] + math.sqrt(s) * eps[k]
        assert torch.allclose(seen["x"][k], x_t, atol=1e-6)
        assert found[k].item() == pytest.approx((0.5 * x_t - eps[k]).square().mean().item(), rel=1e-5)
    assert torch.allclose(seen["gamma"], 1 - t)


def test_only_the_chosen_picture_is_read(toy_paper, monkeypatch):
    loader = batches(toy_paper, "--p", "0.5", "--drop", "0")
    read = []
    real = Encoded.moments
    monkeypatch.setattr(Encoded, "moments", lambda self, i: read.append(self) or real(self, i))
    taken = {"originals": 0, "composites": 0}
    for step in range(30):
        read.clear()
        batch = loader[step]
        # One reading a sample.
        assert len(read) == 6
        for ds, t in zip(read, batch["t"].tolist()):
            taken["composites" if ds is loader.augmented else "originals"] += 1
            assert ds is loader.original or t > 0.4
    assert taken["composites"] > 20
    assert taken["originals"] > 20


def test_x_0_is_drawn_anew_from_the_stored_mean_and_std_and_scaled(toy_paper):
    loader = batches(toy_paper, "--p", "0")
    ds = loader.original
    scale = ds.meta["scaling_factor"]
    draws = {i: [] for i in range(36)}
    for step in range(300):
        x_0 = train.draw_inputs(loader[step], scale, torch.device("cpu"))["x_0"]
        for index in range(6):
            epoch, position = divmod(6 * step + index, 36)
            draws[int(train.epoch_order(0, 0, epoch, 36)[position])].append(x_0[index])
    # Every picture once in every epoch.
    assert {len(x) for x in draws.values()} == {50}
    z = []
    for i, x in draws.items():
        mean, std = ds.moments(i)
        z.append((torch.stack(x) / scale - mean) / std)
    z = torch.stack(z)
    assert abs(z.mean().item()) < 0.01
    assert z.std().item() == pytest.approx(1, abs=0.01)


def test_a_tenth_of_the_captions_become_the_null_prompt_without_coherence(toy_paper):
    loader = batches(toy_paper)
    dropped, kept = [], []
    for step in range(200):
        batch = loader[step]
        for coherence, length in zip(batch["coherence"].tolist(), batch["lengths"].tolist()):
            (kept if coherence else dropped).append(length)
    assert len(dropped) / 1200 == pytest.approx(0.1, abs=0.035)
    assert set(dropped) == {1}
    assert min(kept) > 1


def test_a_batch_is_a_function_of_seed_and_step_and_ranks_share_it(toy_paper):
    def inputs(step, *words, **ranks):
        batch = batches(toy_paper, *words, **ranks)[step]
        return train.draw_inputs(batch, 0.5, torch.device("cpu"))

    whole, again = inputs(7), inputs(7)
    thirds = [inputs(7, rank=rank, world=3) for rank in range(3)]
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name])
        for rank, third in enumerate(thirds):
            share = tensor[2 * rank:2 * rank + 2]
            # Text is padded to the longest caption of the rank.
            if name in ("text", "mask"):
                share = share[:, :third[name].shape[1]]
            assert torch.equal(share, third[name]), name
    assert not torch.equal(whole["eps"], inputs(8)["eps"])
    assert not torch.equal(whole["eps"], inputs(7, "--seed", "1")["eps"])
    assert len(set(whole["coin"].tolist())) == 6


def test_captions_are_padded_to_a_multiple_of_32_of_the_batch_and_masked():
    texts = [torch.randn(n, 4) for n in (3, 1, 33)]
    lengths = torch.tensor([3, 1, 33])
    assert padded_length(lengths) == 64
    assert padded_length(lengths[:2]) == 32
    text, mask = pad_text(torch.cat(texts), lengths, 64)
    assert text.shape == (3, 64, 4)
    for row, present, tokens in zip(text, mask, texts):
        n = len(tokens)
        assert torch.equal(row[:n], tokens)
        assert not row[n:].any()
        assert present.tolist() == [True] * n + [False] * (64 - n)


# --------------------------------------------------------------------------------------
# The optimiser

def lamb_in_float64(x, gradients, lr, decay, trust, betas=(0.9, 0.999), eps=1e-8):
    """Return the weights after steps of LAMB as its paper writes it (AdamW without `trust`)."""
    m = v = 0.0
    for step, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g ** 2
        u = (m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + eps) + decay * x
        ratio = np.linalg.norm(x) / np.linalg.norm(u) if trust else 1.0
        x = x - lr * ratio * u
    return x


def lamb_update(ws, *others):
    """Make train.py's LAMB step in memory that holds anything."""
    gs, ms, vs, *numbers = others
    train.lamb_update(ws, gs, ms, vs, [torch.full_like(w, math.nan) for w in ws], *numbers)


@pytest.mark.parametrize("rule, trust", [(lamb_update, True), (train.adamw_update, False)])
def test_every_tensors_step_equals_the_formula_in_float64(rule, trust):
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(5, 7)), 3 * rng.normal(size=11)]
    gradients = [[1e-5 * rng.normal(size=x.shape) for x in xs] for _ in range(6)]
    ws = [torch.tensor(x, dtype=torch.float32) for x in xs]
    ms = [torch.zeros_like(w) for w in ws]
    vs = [torch.zeros_like(w) for w in ws]
    for step, gs in enumerate(gradients, 1):
        gs = [torch.tensor(g, dtype=torch.float32) / 0.25 for g in gs]
        values = (0.02, 0.25, 1.0, float(step))
        numbers = train.Numbers(*(torch.tensor(value) for value in values))
        rule(ws, gs, ms, vs, numbers, 0.9, 0.999, 1e-8, 0.1)
    for number, (x, w) in enumerate(zip(xs, ws)):
        of_this_one = [gs[number] for gs in gradients]
        expected = lamb_in_float64(x, of_this_one, 0.02, 0.1, trust)
        assert np.allclose(w.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_without_trust_ratio_the_optimiser_is_torchs_adamw():
    torch.manual_seed(0)
    ours = torch.randn(4, 3, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    lamb = train.Lamb([ours], lr=0.01, trust_ratio=False)
    adamw = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.01)
    for _ in range(5):
        ours.grad = torch.randn(4, 3)
        theirs.grad = ours.grad.clone()
        lamb.step()
        adamw.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_lamb_takes_adams_steps_where_there_is_no_weight_decay():
    torch.manual_seed(0)
    ours = torch.randn(7, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    lamb = train.Lamb([{"params": [ours], "weight_decay": 0.0}], lr=0.02)
    adam = torch.optim.Adam([theirs], lr=0.02)
    for _ in range(5):
        ours.grad = torch.randn(7)
        theirs.grad = ours.grad.clone()
        lamb.step()
        adam.step()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_changes_nothing_even_if_it_is_the_first():
    w, average = torch.randn(6), torch.randn(6)
    m, v = torch.zeros(6), torch.zeros(6)
    before = [tensor.clone() for tensor in (w, average, m, v)]
    numbers = train.Numbers(*(torch.tensor(value) for value in (0.1, math.nan, 0.0, 0.0)))
    g = torch.tensor([math.nan, math.inf, 1, 2, 3, 4])
    for rule in (lamb_update, train.adamw_update):
        rule([w], [g], [m], [v], numbers, 0.9, 0.999, 1e-8, 0.1)
    train.update_averages({w: average}, torch.tensor(0.0))
    for old, new in zip(before, (w, average, m, v)):
        assert torch.equal(old, new)

    parameter = torch.randn(3, requires_grad=True)
    start = parameter.detach().clone()
    parameter.grad = torch.full((3,), math.nan)
    optimizer = train.Lamb([parameter])
    optimizer.step(scale=torch.tensor(math.nan), go=False)
    assert torch.equal(parameter, start)
    # The next step is the first one.
    parameter.grad = torch.ones(3)
    other = start.clone().requires_grad_()
    other.grad = torch.ones(3)
    optimizer.step()
    train.Lamb([other]).step()
    assert torch.equal(parameter, other)


def test_a_matrix_that_starts_at_zero_takes_adams_steps():
    args = train.arguments(["--data", "x", "--out", "y", "--lr", "0.01"])
    layer = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(layer.weight)
    optimizer = train.make_optimizer(layer, args)
    layer.weight.grad = torch.ones(4, 4)
    layer.bias.grad = torch.ones(4)
    optimizer.step()
    assert torch.allclose(layer.weight, torch.full((4, 4), -0.01), rtol=1e-4)


def test_biases_and_norms_have_neither_weight_decay_nor_trust_ratio():
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)
            self.norm = torch.nn.LayerNorm(3)
            self.scale = torch.nn.Parameter(torch.ones(3))

    model = Small()
    args = train.arguments(["--data", "x", "--out", "y"])
    decayed, plain = train.make_optimizer(model, args).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model.layer.weight), id(model.scale)}
    assert (decayed["weight_decay"], decayed["trust_ratio"]) == (0.01, True)
    assert len(plain["params"]) == 3
    assert (plain["weight_decay"], plain["trust_ratio"]) == (0.0, False)


def test_the_learning_rate_warms_up_and_falls_along_a_share_of_the_cosine():
    def lr(step):
        return train.lr_at(step, 1e-3, 5000, 500_000, 0.7)
    assert [lr(0), lr(2500), lr(5000)] == pytest.approx([0, 5e-4, 1e-3])
    s = (250_000 - 5000) / 495_000
    assert lr(250_000) == pytest.approx(0.5e-3 * (1 + math.cos(0.7 * math.pi * s)))
    assert lr(500_000) == lr(600_000) == pytest.approx(0.5e-3 * (1 + math.cos(0.7 * math.pi)))


def test_gradients_are_clipped_and_the_average_follows_its_formula():
    args = train.arguments(["--data", "x", "--out", "y", "--clip", "0.5", "--ema", "0.2",
                            "--lr", "0.1", "--warmup", "0"])
    layer = torch.nn.Linear(3, 3)
    average = [p.detach().clone() for p in layer.parameters()]
    averages = dict(zip(layer.parameters(), average))
    expected = average[0].double()
    optimizer = train.make_optimizer(layer, args)
    for step in range(4):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in layer.parameters()))
        gradient = layer.weight.grad.clone()
        outcome = train.finish_step(optimizer, averages, torch.tensor(2.0), step, args)
        assert outcome.tolist() == pytest.approx([2.0, norm, 1, 0])
        decay = min(0.2, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
        if step == 0:
            first = 0.1 * gradient * 0.5 / norm
            m = optimizer.state[layer.weight]["m"]
            assert torch.allclose(m, first, rtol=1e-4, atol=1e-7)
    assert torch.allclose(averages[layer.weight].double(), expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------
# What a run learns and leaves behind

@pytest.mark.parametrize("model", ["dit", "cad"])
def test_each_model_learns_with_the_optimiser_it_takes_by_itself(toy_paper, tmp_path, model):
    train.main([*data(toy_paper), "--out", str(tmp_path), "--model", model, "--preset", "toy",
                "--batch-size", "8", "--steps", "80", "--warmup", "5", "--log-every", "20",
                "--save-every", "1000", "--sample-every", "0"])
    assert losses(tmp_path)[-1] < 0.5


def test_cad_as_deep_as_the_real_one_learns_from_the_start(toy_paper, tmp_path, monkeypatch):
    # As the release starts it, it stays at a loss of 1 for 200 steps and more.
    deep = {**model_cad.PRESETS["toy"], "depth": 4, "layers": 4}
    monkeypatch.setitem(model_cad.PRESETS, "toy", deep)
    train.main([*data(toy_paper), "--out", str(tmp_path), "--model", "cad", "--preset", "toy",
                "--batch-size", "8", "--steps", "40", "--warmup", "5", "--log-every", "20",
                "--save-every", "1000", "--sample-every", "0"])
    assert losses(tmp_path)[-1] < 0.7


def test_a_run_leaves_a_checkpoint_lasting_copies_a_grid_and_a_page_to_look_at(toy_paper, tmp_path):
    toy = toy_paper[0]
    train.main([*data(toy_paper), *SMALL, "--out", str(tmp_path), "--steps", "5",
                "--keep-every", "2", "--sample-every", "5", "--sample-steps", "2",
                "--val", str(toy / "encoded"), "--val-every", "3"])
    for step in (2, 4):
        kept = tmp_path / f"step-{step:07d}"
        assert json.loads((kept / "config.json").read_text())["training"]["steps"] == step
        assert (kept / "model.safetensors").exists()
    training = json.loads((tmp_path / "config.json").read_text())["training"]
    assert (training["TA"], training["p"], training["tau"]) == (True, 0.5, 0.4)
    assert (training["images"], training["composites"]) == (36, 36)
    card = (tmp_path / "README.md").read_text()
    assert "36 of CutMix" in card
    assert "sample.py --checkpoint" in card
    page = (tmp_path / "progress.html").read_text()
    assert page.count("<svg") == 3
    assert "samples/0000005.png" in page
    assert (tmp_path / "samples/0000005.png").exists()


def test_the_saved_weights_are_the_average_and_not_those_that_are_trained(toy_paper):
    state = torch.load(toy_paper[0] / "dit/state.pt", weights_only=True)
    saved = load_file(toy_paper[0] / "dit/model.safetensors")
    assert all(torch.equal(saved[name], state["ema"][name]) for name in saved)
    assert any(not torch.equal(saved[name], state["model"][name]) for name in saved)


def test_validation_measures_the_averaged_weights_in_ten_bins_of_t(toy_paper, tmp_path):
    toy = toy_paper[0]
    train.main([*data(toy_paper), *SMALL, "--out", str(tmp_path), "--steps", "4",
                "--val", str(toy / "encoded"), "--val-every", "2"])
    rows = [row for row in read_jsonl(tmp_path / "log.jsonl") if "val_loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert len(rows[0]["val_bins"]) == 10

    # A network that predicts nothing: its loss is known.
    class Known(torch.nn.Module):
        def forward(self, x, gamma, text, mask, coherence, coin):
            return torch.zeros_like(x)

    args = train.arguments([*data(toy_paper), "--out", "unused", "--micro-batch", "7"])
    val = Encoded(toy / "encoded")
    run = train.Run(args, rank=0, world=1, device=torch.device("cpu"), original=val, augmented=None,
                    val=val, vae=None, model=None, ema=Known(), optimizer=None, first=0, sums=None)
    bins = train.validation_losses(run)
    # Predicting nothing costs the variance of the noise, 1, whatever t is.
    assert bins == pytest.approx([1.0] * 10, abs=0.1)
    assert bins == train.validation_losses(run)


def test_bf16_on_a_cpu_computes_nearly_the_same_losses(toy_paper, tmp_path):
    for precision in ("fp32", "bf16"):
        train.main([*data(toy_paper), *SMALL, "--out", str(tmp_path / precision), "--steps", "4",
                    "--precision", precision])
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


@pytest.mark.parametrize("model", ["dit", "cad"])
def test_small_micro_batches_give_the_same_losses(toy_paper, tmp_path, model):
    for out, micro in (("whole", 6), ("parts", 4)):
        train.main([*data(toy_paper), *SMALL, "--model", model, "--steps", "4",
                    "--out", str(tmp_path / out), "--micro-batch", str(micro)])
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-6)


@pytest.mark.parametrize("model", ["dit", "cad"])
def test_two_ranks_and_micro_batches_give_the_losses_of_one(toy_paper, tmp_path, model):
    words = [*data(toy_paper), *SMALL, "--model", model, "--steps", "6"]
    train.main([*words, "--out", str(tmp_path / "one")])
    run(*TORCHRUN, 2, "train.py", *words, "--micro-batch", "2", "--workers", "1",
        "--out", tmp_path / "two", check=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def test_three_ranks_go_on_with_the_bits_of_a_run_that_was_never_stopped(toy_paper, tmp_path):
    def trained(out, steps):
        run(*TORCHRUN, 3, "train.py", *data(toy_paper), *SMALL, "--schedule-steps", "40", "--steps", steps,
            "--save-every", "2", "--out", tmp_path / out, check=True)

    trained("whole", 4)
    trained("parts", 2)
    trained("parts", 4)
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_says_if_its_warm_up_is_longer_than_itself(toy_paper, tmp_path, capsys):
    for warmup, said in ((4, "reaches 0.00075, not 0.001"), (2, "")):
        train.main([*map(str, data(toy_paper)), *SMALL, "--warmup", str(warmup), "--steps", "3",
                    "--out", str(tmp_path / str(warmup))])
        printed = capsys.readouterr().out
        assert said in printed
        assert ("is not over" in printed) == bool(said)


def test_a_rank_that_is_refused_ends_the_others_at_once(toy_paper, tmp_path):
    with only_command(tmp_path):
        done = run(*TORCHRUN, 2, "train.py", *data(toy_paper), *SMALL, "--out", tmp_path, "--steps", "4")
    assert "another command is writing" in done.stderr
    # torchrun kills what does not end.
    assert "SIGKILL" not in done.stderr and "exitcode: -9" not in done.stderr
    assert "train.py: rank 1: another rank has ended" in done.stderr


def test_a_missing_autoencoder_ends_all_ranks_and_leaves_the_log_as_it_was(tmp_path):
    encoded = make_encoded(tmp_path / "encoded", vae=str(tmp_path / "nothing"))
    out = tmp_path / "out"
    out.mkdir()
    log = '{"step": 2, "loss": 0.5}\n'
    (out / "log.jsonl").write_text(log)
    # Only rank 0 draws grids, and needs the autoencoder.
    done = run(*TORCHRUN, 2, "train.py", "--data", encoded, *SMALL, "--out", out, "--steps", "4",
               "--sample-every", "2")
    assert f"train.py: {tmp_path / 'nothing'}" in done.stderr
    assert "train.py: rank 1: another rank has ended" in done.stderr
    assert (out / "log.jsonl").read_text() == log


def test_benchmark_says_where_the_time_goes_in_one_line_of_json(capsys):
    train.main(["--benchmark", "--model", "dit", "--preset", "toy", "--batch-size", "4"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = ("seconds_data", "seconds_forward_backward", "seconds_optimizer_clipping_ema")
    assert sum(result[part] for part in parts) == pytest.approx(result["seconds"])
    assert result["images_per_second"] == pytest.approx(4 / result["seconds"])
    share = result["flops_per_image"] * result["images_per_second"] / result["peak_flops"]
    assert result["share_of_peak"] == pytest.approx(share)
    assert result["peak_memory_bytes"] > 0


# --------------------------------------------------------------------------------------
# Starting from a checkpoint

@pytest.mark.parametrize("size", [8, 16])
def test_fine_tuning_starts_from_a_released_checkpoint_at_another_size(tmp_path, size):
    folder = make_encoded(tmp_path / "encoded", size=size)
    train.main(["--data", str(folder), "--out", str(tmp_path / "out"), "--batch-size", "4",
                "--init", str(FIXTURES / "cad_tiny"), "--steps", "1", "--lr", "0",
                "--sample-every", "0"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model"] == "cad"
    assert config["args"]["size"] == size
    released = load_file(FIXTURES / "cad_tiny/model.safetensors")
    ours = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(ours["text_embed.weight"], released["map_text_tokens.weight"])
    assert len(ours["position"]) == (size // 2) ** 2
    # The model card says so.
    assert "beginning with the weights of" in (tmp_path / "out/README.md").read_text()


def test_fine_tuning_refuses_data_of_another_text_encoder(tmp_path):
    folder = make_encoded(tmp_path / "encoded", text_dim=16)
    line = refused("train.py", "--data", folder, "--out", tmp_path / "out", "--init",
                   FIXTURES / "cad_tiny", "--sample-every", "0")
    assert "text_dim is 24, the data's is 16" in line


# --------------------------------------------------------------------------------------
# Kills, signals, failures

def start(*words):
    """Start train.py in the background."""
    return subprocess.Popen([sys.executable, "train.py", *map(str, words)], cwd=ROOT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_rows(log, count):
    """Wait until a log has `count` rows."""
    while not log.exists() or len(read_jsonl(log)) < count:
        time.sleep(0.02)


def same_end(one, two):
    """Check that two runs ended with the same bytes."""
    for name in ("log.jsonl", "model.safetensors", "config.json", "README.md"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    a, b = (torch.load(out / "state.pt", weights_only=True)["model"] for out in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model, optimizer", [("dit", "lamb"), ("cad", "lamb"), ("dit", "adamw")])
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(toy_paper, tmp_path, model, optimizer):
    def words(out, steps=16):
        return ["--model", model, "--optimizer", optimizer, *data(toy_paper), *SMALL,
                "--out", str(tmp_path / out), "--steps", str(steps), "--schedule-steps", "16"]
    train.main(words("whole"))
    killed = start(*words("killed", 100_000))
    # Step 6: a state was saved at 4, and none yet at 8.
    wait_for_rows(tmp_path / "killed/log.jsonl", 3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    # What a kill may leave.
    with (tmp_path / "killed/log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')
    first = torch.load(tmp_path / "killed/state.pt", weights_only=True)["step"]
    assert 0 < first < 16
    train.main(words("killed"))
    same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_with_0(toy_paper, tmp_path, number):
    def words(out, steps=16):
        return [*data(toy_paper), *SMALL, "--out", str(tmp_path / out), "--steps", str(steps),
                "--schedule-steps", "16", "--save-every", "1000", "--workers", "1"]
    stopped = start(*words("stopped", 100_000))
    wait_for_rows(tmp_path / "stopped/log.jsonl", 2)
    stopped.send_signal(number)
    stdout, stderr = stopped.communicate(timeout=60)
    assert stopped.returncode == 0, stderr
    assert "Traceback" not in stderr
    step = torch.load(tmp_path / "stopped/state.pt", weights_only=True)["step"]
    line = stdout.splitlines()[-1]
    assert f"stopped by {number.name}, saved after step {step}" in line
    if step < 16:
        train.main(words("whole"))
        train.main(words("stopped"))
        same_end(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_during_the_start_ends_the_run_at_once(toy_paper, tmp_path, monkeypatch, capsys):
    real = train.make_network

    def slow_start(*values):
        signal.raise_signal(signal.SIGTERM)
        return real(*values)

    monkeypatch.setattr(train, "make_network", slow_start)
    with pytest.raises(SystemExit) as ended:
        train.main([*data(toy_paper), *SMALL, "--out", str(tmp_path), "--steps", "4"])
    assert ended.value.code == 0
    assert "stopped by SIGTERM before its first step, nothing to save" in capsys.readouterr().out
    assert not (tmp_path / "state.pt").exists()


def test_a_kill_while_the_state_is_written_loses_no_grid_and_no_lasting_copy(toy_paper, tmp_path,
                                                                             monkeypatch):
    words = [*data(toy_paper), *SMALL, "--out", str(tmp_path), "--steps", "4", "--keep-every", "4",
             "--sample-every", "4", "--sample-steps", "1"]

    def killed(*values):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(words)
    assert (tmp_path / "step-0000004/model.safetensors").exists()
    assert (tmp_path / "samples/0000004.png").exists()
    assert not (tmp_path / "state.pt").exists()


def spoil(monkeypatch, *steps):
    """Make the losses of these steps of the next run, counted from 1, NaN."""
    real = train.add_gradient
    calls = []

    def add_gradient(network, inputs, args):
        calls.append(1)
        return real(network, inputs, args) * (math.nan if len(calls) in steps else 1)

    monkeypatch.setattr(train, "add_gradient", add_gradient)


def test_steps_that_are_not_finite_are_skipped_and_counted(toy_paper, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, 3, 7, 8)
    train.main([*data(toy_paper), *SMALL, "--out", str(tmp_path), "--steps", "10"])
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert [row.get("skipped") for row in rows] == [None, 1, None, 2, None]
    # Of two steps that were both skipped no loss is known.
    assert ["loss" in row for row in rows] == [True, True, True, False, True]
    assert all(math.isfinite(loss) for loss in losses(tmp_path))
    assert all(w.isfinite().all() for w in load_file(tmp_path / "model.safetensors").values())
    assert "step 8: 2 steps were skipped" in capsys.readouterr().out


def test_ten_bad_steps_in_a_row_end_the_run_also_if_nobody_looked_at_the_tenth(
        toy_paper, tmp_path, monkeypatch):
    # The log looks after steps 10 and 20, and 13 is good.
    spoil(monkeypatch, *range(3, 13))
    with pytest.raises(UserError, match="for 10 steps in a row"):
        train.main([*data(toy_paper), *SMALL, "--out", str(tmp_path), "--steps", "40", "--log-every", "100",
                    "--save-every", "100"])


def test_an_infinite_number_in_the_data_spoils_its_step_alone(toy_paper, tmp_path, monkeypatch):
    real = train.draw_inputs
    calls = []

    def infinite_at_last(*words):
        calls.append(1)
        inputs = real(*words)
        if len(calls) == 4:
            inputs["x_0"][0, 0, 0, 0] = math.inf
        return inputs

    monkeypatch.setattr(train, "draw_inputs", infinite_at_last)
    train.main([*data(toy_paper), *SMALL, "--out", str(tmp_path), "--steps", "4"])
    assert read_jsonl(tmp_path / "log.jsonl")[-1]["skipped"] == 1
    assert (tmp_path / "state.pt").exists()


def test_a_batch_that_never_comes_ends_the_run_in_one_line(toy_paper, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "DATA_TIMEOUT", 1)
    monkeypatch.setattr(train.Batches, "__getitem__", lambda self, step: time.sleep(60))
    with pytest.raises(UserError, match="is /dev/shm full"):
        train.main([*data(toy_paper), *SMALL, "--out", str(tmp_path), "--steps", "4", "--workers", "1"])


def test_ten_bad_steps_in_a_row_end_the_run_and_a_lower_rate_goes_on(toy_paper, tmp_path, monkeypatch):
    words = [*data(toy_paper), *SMALL, "--out", tmp_path, "--schedule-steps", "40"]
    train.main([*map(str, words), "--steps", "4"])
    good = (tmp_path / "state.pt").read_bytes()

    real = train.diffusion_losses
    with monkeypatch.context() as patch:
        patch.setattr(train, "diffusion_losses",
                      lambda *values, **names: real(*values, **names) * math.inf)
        line = refused("train.py", *words, "--steps", "40")
    assert "steps in a row" in line
    assert (tmp_path / "state.pt").read_bytes() == good

    train.main([*map(str, words), "--steps", "8", "--lr", "1e-4"])
    assert {"step": 4, "lr_changed": [1e-3, 1e-4]} in read_jsonl(tmp_path / "log.jsonl")


def test_a_rate_far_too_high_never_replaces_a_good_state(toy_paper, tmp_path):
    words = [*data(toy_paper), *SMALL, "--out", tmp_path, "--schedule-steps", "40"]
    train.main([*map(str, words), "--steps", "4"])
    good = (tmp_path / "state.pt").read_bytes()
    assert "lower --lr" in refused("train.py", *words, "--steps", "40", "--lr", "1e6")
    assert (tmp_path / "state.pt").read_bytes() == good


def test_weights_that_one_step_spoilt_never_replace_a_good_state(toy_paper, tmp_path):
    """The loss of the step after which a state is due is that of the weights before it."""
    words = [*data(toy_paper), *SMALL, "--out", tmp_path, "--schedule-steps", "40"]
    train.main([*map(str, words), "--steps", "4"])
    good = (tmp_path / "state.pt").read_bytes()
    refused("train.py", *words, "--steps", "40", "--lr", "1e6", "--save-every", "1")
    assert (tmp_path / "state.pt").read_bytes() == good
    # What comes after it can be trained.
    train.main([*map(str, words), "--steps", "6", "--lr", "1e-4"])


def test_a_run_without_any_state_says_so_when_it_diverges(toy_paper, tmp_path):
    line = refused("train.py", *data(toy_paper), *SMALL, "--out", tmp_path, "--lr", "1e6",
                   "--steps", "40", "--save-every", "100")
    assert "nothing has been saved" in line


def test_a_step_that_is_skipped_keeps_no_state_from_being_saved(toy_paper, tmp_path, monkeypatch):
    spoil(monkeypatch, 4)
    words = [*data(toy_paper), *SMALL, "--keep-every", "4", "--out", str(tmp_path)]
    train.main([*words, "--steps", "4"])
    assert (tmp_path / "state.pt").exists()
    assert (tmp_path / "step-0000004/model.safetensors").exists()


def test_a_run_that_began_from_anothers_state_goes_on_from_its_own(toy_paper, tmp_path, capsys):
    words = [*data(toy_paper), *SMALL, "--schedule-steps", "40"]
    train.main([*words, "--out", str(tmp_path / "first"), "--steps", "4"])
    more = [*words, "--out", str(tmp_path / "second"), "--resume", str(tmp_path / "first/state.pt")]
    train.main([*more, "--steps", "6"])
    assert "steps 4 to 6" in capsys.readouterr().out
    train.main([*more, "--steps", "8"])
    assert "steps 6 to 8" in capsys.readouterr().out
    assert "is of step 8 already" in refused("train.py", *more, "--steps", "7")


def test_a_run_is_not_resumed_on_data_of_other_encoders(toy_paper, tmp_path):
    words = [*SMALL, "--out", tmp_path / "out", "--steps", "4"]
    train.main([*data(toy_paper), *map(str, words)])
    for name in ("encoded", "encoded-cutmix"):
        shutil.copytree(toy_paper[0] / name, tmp_path / name)
        meta = tmp_path / name / "meta.json"
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "autoencoder": "another"}))
    others = ["--data", tmp_path / "encoded", "--augmented", tmp_path / "encoded-cutmix"]
    line = refused("train.py", *others, *SMALL, "--out", tmp_path / "out", "--steps", "6")
    assert "another" in line
    line = refused("train.py", *others, *SMALL[2:], "--out", tmp_path / "tuned", "--steps", "6",
                   "--init", tmp_path / "out")
    assert "its autoencoder is not the data's" in line
    line = refused("train.py", *data(toy_paper), *SMALL, "--out", tmp_path / "tuned", "--steps", "6",
                   "--init", tmp_path / "out")
    assert "--preset" in line


def test_a_state_in_which_a_bit_has_flipped_is_refused(toy_paper, tmp_path):
    words = [*data(toy_paper), *SMALL, "--out", tmp_path]
    train.main([*map(str, words), "--steps", "4"])
    state = bytearray((tmp_path / "state.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (tmp_path / "state.pt").write_bytes(state)
    assert "not a training state" in refused("train.py", *words, "--steps", "6")


def test_the_logged_loss_of_a_prolonged_run_is_a_mean_over_its_own_steps(toy_paper, tmp_path,
                                                                        monkeypatch):
    words = [*data(toy_paper), *SMALL, "--out", str(tmp_path), "--schedule-steps", "9",
             "--log-every", "4"]
    seen = []
    real = train.finish_step

    def finish_step(*values):
        outcome = real(*values)
        seen.append(float(outcome[0]))
        return outcome

    monkeypatch.setattr(train, "finish_step", finish_step)
    train.main([*words, "--steps", "5"])
    train.main([*words, "--steps", "9"])
    means = [np.mean(seen[:4]), seen[4], np.mean(seen[5:8]), seen[8]]
    assert losses(tmp_path) == pytest.approx(means, rel=1e-6)


def test_a_prolonged_run_stays_on_the_schedule_that_it_was_begun_with(toy_paper, tmp_path):
    def words(out, *more):
        return [*data(toy_paper), *SMALL, "--out", str(tmp_path / out), *more]
    train.main(words("twice", "--steps", "4"))
    train.main(words("twice", "--steps", "8"))
    train.main(words("once", "--steps", "8", "--schedule-steps", "8"))
    rates = [[row["lr"] for row in read_jsonl(tmp_path / out / "log.jsonl")] for out in ("twice", "once")]
    assert rates[0] == rates[1]
    # Another schedule is refused, also the one that a new run of this length would take by itself.
    assert "schedule steps" in refused("train.py", *words("once", "--steps", "9", "--schedule-steps", "18"))


def test_ranks_that_find_different_states_are_refused(toy_paper, tmp_path):
    train.main([*data(toy_paper), *SMALL, "--out", str(tmp_path / "0"), "--steps", "4"])
    # As on two nodes, whose folders of one name are two.
    each = "import os, sys, train, common; sys.argv[0] = 'train.py'; " \
           "common.command_line(lambda: train.main(sys.argv[1:] + " \
           "['--out', os.path.join(%r, os.environ['RANK'])]))" % str(tmp_path)
    (tmp_path / "each.py").write_text(each)
    done = run(*TORCHRUN, 2, tmp_path / "each.py", *data(toy_paper), *SMALL, "--steps", 8,
               PYTHONPATH=str(ROOT))
    assert "all nodes must share --out" in done.stderr
    assert not (tmp_path / "1/log.jsonl").exists()


def test_a_full_disk_leaves_the_last_state_whole_and_is_told_in_one_line(toy_paper, tmp_path):
    words = [*data(toy_paper), *SMALL, "--out", str(tmp_path), "--schedule-steps", "8"]
    train.main([*words, "--steps", "4"])
    good = (tmp_path / "state.pt").read_bytes()
    # As if the disk ended here: the weights still fit, the state does not.
    limit = len(good) // 2
    done = subprocess.run([sys.executable, "train.py", *words, "--steps", "8"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "state.pt: cannot be written" in done.stderr.splitlines()[-1]
    assert (tmp_path / "state.pt").read_bytes() == good
    assert not list(tmp_path.glob(".state.pt*"))


def test_two_runs_on_one_folder_the_second_is_refused_and_a_stale_lock_is_not(toy_paper, tmp_path):
    words = [*data(toy_paper), *SMALL, "--out", tmp_path, "--steps", "2"]
    with only_command(tmp_path):
        assert "another command is writing" in refused("train.py", *words)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / ".lock.0").write_text("left by a kill")
    train.main([*map(str, words)])
    assert (tmp_path / "state.pt").exists()


def test_damaged_data_is_one_line_from_a_worker_too(toy_paper, tmp_path, monkeypatch):
    def broken(self, i):
        raise UserError("00000.safetensors: damaged, delete it")
    monkeypatch.setattr(Encoded, "moments", broken)
    for workers in ("0", "1"):
        line = refused("train.py", *data(toy_paper), *SMALL, "--out", tmp_path / workers,
                       "--workers", workers)
        assert line == "train.py: 00000.safetensors: damaged, delete it"
        # A worker that was left alone would keep the command from ending.
        assert not multiprocessing.active_children()


def test_a_rank_that_dies_ends_the_others_with_one_line_each(toy_paper, tmp_path):
    code = ("import os, sys, train; from common import UserError, command_line\n"
            "def fail(self, step): raise UserError('bad data on rank 1')\n"
            "if os.environ['RANK'] == '1': train.Batches.__getitem__ = fail\n"
            "command_line(lambda: train.main(sys.argv[1:]))\n")
    script = tmp_path / "ranks.py"
    script.write_text(code)
    begun = time.monotonic()
    done = run(*TORCHRUN, 2, script, *data(toy_paper), *SMALL, "--out", tmp_path / "out",
               "--steps", "1000", PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert time.monotonic() - begun < 60
    # Rank 0's progress bar may stand on the same line.
    assert done.stderr.count("ranks.py: bad data on rank 1") == 1
    assert done.stderr.count("ranks.py: rank 0: another rank has ended") <= 1
    assert done.stderr.count("ranks.py: ") <= 2


# --------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("words", [
    ["--p", "1.5"], ["--tau", "-1"], ["--drop", "nan"], ["--lr", "nan"], ["--lr", "-1"],
    ["--seed", "-1"], ["--betas", "1", "1"], ["--betas", "nan", "0"], ["--clip", "0"],
    ["--clip", "inf"], ["--workers", "-1"], ["--warmup", "-1"], ["--schedule-steps", "-5"],
    ["--schedule-steps", "0"], ["--weight-decay", "-1"], ["--guidance", "nan"], ["--clamp", "nan"],
    ["--rate", "2"], ["--steps", "0"], ["--micro-batch", "0"], ["--keep-every", "0"],
    ["--sample-every", "-1"], ["--seed", str(2 ** 70)]], ids=" ".join)
def test_a_number_that_means_nothing_is_refused(words):
    assert refused("train.py", "--data", "x", "--out", "y", *words).startswith(f"train.py: {words[0]}")


def test_mistakes_end_in_one_line_and_exit_code_2(toy_paper, tmp_path):
    toy = toy_paper[0]
    out = tmp_path / "out"
    words = [*data(toy_paper), "--out", out, *SMALL, "--steps", "2"]
    assert "no-such" in refused("train.py", "--data", "no-such", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "not an encoded data set" in refused("train.py", "--data", tmp_path / "empty", "--out", out)
    assert "--preset XL" in refused("train.py", *words, "--preset", "XL")
    line = refused("train.py", *words, "--model", "cad", "--resume", toy / "dit/state.pt")
    assert "(model dit, now cad)" in line
    assert "no such file" in refused("train.py", *words, "--resume", tmp_path / "nothing.pt")
    assert not out.exists()


def test_data_of_other_encoders_is_refused(toy_paper, tmp_path):
    toy = toy_paper[0]

    def changed(name, **values):
        shutil.copytree(toy / "encoded-cutmix", tmp_path / name)
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        (tmp_path / name / "meta.json").write_text(json.dumps({**meta, **values}))
        args = train.arguments(["--data", str(toy / "encoded"), "--out", "unused",
                                "--augmented", str(tmp_path / name)])
        train.open_data(args)

    for key in ("autoencoder", "T5"):
        with pytest.raises(UserError, match=f"differ in {key}"):
            changed(key, **{key: "another"})


@pytest.mark.parametrize("damage", ["empty", "text", "keys", "cut", "other network"])
def test_a_damaged_state_is_refused_in_one_line(toy_paper, tmp_path, damage):
    path = tmp_path / "state.pt"
    whole = (toy_paper[0] / "dit/state.pt").read_bytes()
    state = torch.load(toy_paper[0] / "dit/state.pt", weights_only=True)
    if damage == "keys":
        torch.save({"settings": state["settings"]}, path)
    elif damage == "other network":
        state["model"] = {}
        torch.save(state, path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello\n", "cut": whole[:-1000]}[damage])
    command = re.search(r"train\.py (.*)", toy_paper[1])[1].split()
    line = refused("train.py", *command, "--resume", path, "--out", tmp_path / "out")
    assert "not a training state" in line or "does not fit" in line
