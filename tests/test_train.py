"""Algorithm 1 and the equations, the optimiser and the schedule, and that no kill changes a run."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, refused, run
from safetensors.torch import load_file

import train
from common import read_jsonl
from encode import Encoded

SMALL = ["--preset", "toy", "--batch-size", "6", "--warmup", "2", "--optimizer", "adamw", "--log-every", "2",
         "--save-every", "4", "--sample-every", "0", "--seed", "3"]


def data(toy_paper):
    return ["--data", toy_paper[0] / "encoded", "--augmented", toy_paper[0] / "encoded-cutmix"]


def batches(toy_paper, *words, rank=0, world=1):
    args = train.arguments([*map(str, data(toy_paper)), "--out", "unused", "--batch-size", "6", *words])
    return train.Batches(*train.open_data(args), args, rank, world)


# ------------------------------------------------------------------------------------------------------------
# The method

def test_gamma_is_one_minus_t_and_never_zero():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert train.gamma(t).tolist() == pytest.approx([1.0, 0.75, 1e-9])


def test_composites_come_only_where_t_is_above_tau_and_there_with_probability_p():
    t = np.random.default_rng(1).random(40_000)
    chosen = train.choose(t, np.random.default_rng(2), 0.4, 0.3)
    assert chosen.dtype == bool and not chosen[t <= 0.4].any()
    assert chosen[t > 0.4].mean() == pytest.approx(0.3, abs=0.012)      # four standard errors
    assert abs(chosen[t > 0.9].mean() - chosen[(t > 0.4) & (t < 0.5)].mean()) < 0.05
    assert not train.choose(t, np.random.default_rng(2), 0.4, 0.0).any()
    assert (train.choose(t, np.random.default_rng(2), 0.4, 1.0) == (t > 0.4)).all()


def test_the_loss_is_the_mean_squared_error_of_the_noise_in_x_t():
    t, x_0, eps = torch.tensor([0.1, 0.7]), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    seen = {}

    def model(x, gamma, text, mask, coherence):
        seen.update(x=x, gamma=gamma)
        return 0.5 * x
    loss = train.diffusion_loss(model, t, x_0, eps, None, None, None)
    x_t = torch.stack([math.sqrt(1 - s) * a + math.sqrt(s) * e for s, a, e in zip((0.1, 0.7), x_0, eps)])
    assert torch.allclose(seen["x"], x_t) and torch.allclose(seen["gamma"], 1 - t)
    assert loss.item() == pytest.approx((0.5 * x_t - eps).square().mean().item(), rel=1e-5)


def test_only_the_chosen_picture_is_read(toy_paper, monkeypatch):
    loader, read = batches(toy_paper, "--p", "0.5", "--drop", "0"), []
    monkeypatch.setattr(
        Encoded, "moments", lambda self, i, real=Encoded.moments: read.append(self) or real(self, i))
    taken = {"originals": 0, "composites": 0}
    for step in range(30):
        read.clear()
        batch = loader[step]
        assert len(read) == 6                                           # one reading a sample
        for ds, t in zip(read, batch["t"].tolist()):
            taken["composites" if ds is loader.augmented else "originals"] += 1
            assert ds is loader.original or t > 0.4
    assert taken["composites"] > 20 and taken["originals"] > 20


def test_x_0_is_drawn_anew_from_the_stored_mean_and_std_and_scaled(toy_paper):
    loader = batches(toy_paper, "--p", "0")
    ds, scale, draws = loader.original, loader.original.meta["scaling_factor"], {i: [] for i in range(36)}
    for step in range(300):
        for index, x_0 in enumerate(loader[step]["x_0"]):
            epoch, position = divmod(6 * step + index, 36)
            draws[int(train.order(0, 0, epoch, 36)[position])].append(x_0)
    assert {len(x) for x in draws.values()} == {50}                     # every picture once in every epoch
    moments = {i: ds.moments(i) for i in draws}
    z = torch.stack([(torch.stack(x) / scale - moments[i][0]) / moments[i][1] for i, x in draws.items()])
    assert abs(z.mean().item()) < 0.01 and z.std().item() == pytest.approx(1, abs=0.01)


def test_a_tenth_of_the_captions_become_the_null_prompt_without_coherence(toy_paper):
    loader = batches(toy_paper)
    drawn = [loader[step] for step in range(200)]
    rows = [(c.item(), m.sum().item()) for batch in drawn for c, m in zip(batch["coherence"], batch["mask"])]
    dropped = [length for coherence, length in rows if coherence == 0]
    assert len(dropped) / len(rows) == pytest.approx(0.1, abs=0.035)
    assert set(dropped) == {1} and min(length for coherence, length in rows if coherence) > 1


def test_a_batch_is_a_function_of_seed_and_step_and_ranks_share_it(toy_paper):
    whole, again = batches(toy_paper)[7], batches(toy_paper)[7]
    halves = [batches(toy_paper, rank=rank, world=2)[7] for rank in (0, 1)]
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, torch.cat([half[name] for half in halves]))
    assert not torch.equal(whole["eps"], batches(toy_paper)[8]["eps"])
    assert not torch.equal(whole["eps"], batches(toy_paper, "--seed", "1")[7]["eps"])


# ------------------------------------------------------------------------------------------------------------
# The optimiser

def test_lamb_equals_its_formula_in_float64_and_adam_where_there_is_no_decay():
    torch.manual_seed(0)
    w, b = torch.randn(5, 7, requires_grad=True), torch.randn(7, requires_grad=True)
    adam = b.detach().clone().requires_grad_()
    lamb = train.Lamb([{"params": [w], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}], lr=0.02)
    reference = torch.optim.Adam([adam], lr=0.02, eps=1e-6)
    x, m, v = w.detach().double().numpy().copy(), 0.0, 0.0
    for step in range(1, 6):
        g = torch.randn(5, 7)
        w.grad, b.grad = g, g.sum(0)
        adam.grad = b.grad.clone()
        lamb.step()
        reference.step()
        g = g.double().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
        update = (m / (1 - 0.9 ** step)) / (np.sqrt(v / (1 - 0.999 ** step)) + 1e-6) + 0.1 * x
        x -= 0.02 * np.linalg.norm(x) / np.linalg.norm(update) * update
    assert np.allclose(w.detach().numpy(), x, rtol=1e-5, atol=1e-6)
    assert torch.allclose(b, adam, rtol=1e-5, atol=1e-6)


def test_biases_and_norms_have_no_weight_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    groups = train.make_optimizer(model, train.arguments(["--data", "x", "--out", "y"])).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.01), (3, 0.0)]


def test_the_learning_rate_warms_up_and_falls_along_a_share_of_the_cosine():
    def lr(step):
        return train.lr_at(step, 1e-3, 5000, 500_000, 0.7)
    assert [lr(0), lr(2500), lr(5000)] == pytest.approx([0, 5e-4, 1e-3])
    s = (250_000 - 5000) / 495_000
    assert lr(250_000) == pytest.approx(0.5e-3 * (1 + math.cos(0.7 * math.pi * s)))
    assert lr(500_000) == lr(600_000) == pytest.approx(0.5e-3 * (1 + math.cos(0.7 * math.pi)))


# ------------------------------------------------------------------------------------------------------------
# The run

@pytest.mark.parametrize("model", ["dit", "cad"])
def test_a_killed_run_ends_with_the_log_and_weights_of_one_that_was_not(toy_paper, tmp_path, model):
    def command(out, steps=16):
        return ["train.py", "--model", model, *map(str, data(toy_paper)), "--out", str(tmp_path / out),
                "--steps", str(steps), "--schedule-steps", "16", *SMALL]
    whole = run(*command("whole"))
    assert whole.returncode == 0, whole.stderr
    killed = subprocess.Popen([sys.executable, *command("killed", 100_000)], cwd=ROOT, stderr=subprocess.PIPE,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "killed/log.jsonl").exists() or len(read_jsonl(tmp_path / "killed/log.jsonl")) < 3:
        time.sleep(0.02)                                                # step 6: saved at 4, not yet at 8
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / "killed/log.jsonl").open("a").write('{"step": 7, "lo')  # what a kill may leave
    first = torch.load(tmp_path / "killed/state.pt", weights_only=True)["step"]
    again = run(*command("killed"))
    assert again.returncode == 0, again.stderr
    assert 0 < first < 16 and f"steps {first} to 16" in again.stdout    # it went on, not from the start
    for name in ("log.jsonl", "model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    states = [torch.load(tmp_path / out / "state.pt", weights_only=True)["model"]
              for out in ("whole", "killed")]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))


def test_two_ranks_under_torchrun_train_the_same_model_as_one(toy_paper, tmp_path):
    words = [*map(str, data(toy_paper)), *SMALL, "--steps", "6", "--lr", "1e-4", "--log-every", "3",
             "--save-every", "2"]
    for out, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2",
                                               "--master-port", "29511"])):
        done = run(*launcher, "train.py", *words, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-3, atol=2e-5), name
    losses = [[row["loss"] for row in read_jsonl(tmp_path / out / "log.jsonl")] for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_small_micro_batches_accumulate_the_same_gradient(toy_paper, tmp_path):
    for out, micro in (("whole", 6), ("parts", 4)):
        train.main([*map(str, data(toy_paper)), *SMALL, "--steps", "2", "--out", str(tmp_path / out),
                    "--micro-batch", str(micro)])
    a, b = (read_jsonl(tmp_path / out / "log.jsonl")[0] for out in ("whole", "parts"))
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_training_lowers_the_loss_and_the_grid_and_checkpoint_are_there(toy_paper):
    out = toy_paper[0] / "dit"
    losses = [row["loss"] for row in read_jsonl(out / "log.jsonl")]
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert list((out / "samples").glob("*.png"))
    assert json.loads((out / "config.json").read_text())["model"] == "dit"


def test_an_average_of_the_weights_is_what_is_saved(toy_paper):
    state = torch.load(toy_paper[0] / "dit/state.pt", weights_only=True)
    saved = load_file(toy_paper[0] / "dit/model.safetensors")
    assert all(torch.equal(saved[name], state["ema"][name]) for name in saved)
    assert any(not torch.equal(saved[name], state["model"][name]) for name in saved)


# ------------------------------------------------------------------------------------------------------------
# Mistakes

def test_mistakes_end_in_one_line_and_exit_code_2(toy_paper, tmp_path):
    toy, out = toy_paper[0], tmp_path / "out"
    cmd = ["train.py", *data(toy_paper), "--out", out, *SMALL, "--steps", "2"]
    assert "--p 1.5" in refused(*cmd, "--p", "1.5")
    assert "--tau -1.0" in refused(*cmd, "--tau", "-1")
    assert "no-such" in refused("train.py", "--data", "no-such", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "not an encoded data set" in refused("train.py", "--data", tmp_path / "empty", "--out", out)
    assert "--preset XL" in refused(*cmd, "--preset", "XL")
    shutil.copytree(toy / "encoded", tmp_path / "wide")
    meta = (tmp_path / "wide/meta.json").read_text()
    (tmp_path / "wide/meta.json").write_text(re.sub(r'"text_dim": \d+', '"text_dim": 4096', meta))
    assert "text_dim (128 and 4096)" in refused("train.py", "--data", toy / "encoded", "--augmented",
                                                tmp_path / "wide", "--out", out)
    assert "--model" in refused("train.py", "--model", "cad", *data(toy_paper), "--out", out, *SMALL,
                                "--resume", toy / "dit/state.pt")
    assert "not a training state" in refused(*cmd, "--resume", toy / "dit/config.json")
    assert "no such file" in refused(*cmd, "--resume", tmp_path / "nothing.pt")
    assert not out.exists()
