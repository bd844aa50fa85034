"""Algorithm 1 and the equations, the optimiser, and what a run promises whatever happens to it."""

import json
import math
import resource
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, refused, run
from safetensors.torch import load_file, save_file

import encode
import model_cad
import train
from common import UserError, read_jsonl

# A run of seconds. Six samples a step, so that two and three ranks can share them.
SMALL = ["--preset", "toy", "--batch-size", "6", "--warmup", "2", "--log-every", "2",
         "--save-every", "4", "--sample-every", "0", "--seed", "3"]
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


@pytest.fixture
def words(toy_paper, tmp_path):
    """Return a function: the options of a small run on the toy's data, into a folder of `tmp_path`."""
    data = ["--data", toy_paper[0] / "encoded", "--augmented", toy_paper[0] / "encoded-cutmix"]
    return lambda out, *more: [str(word) for word in (*data, *SMALL, "--out", tmp_path / out, *more)]


@pytest.fixture
def batch(words, monkeypatch):
    """Return a function: a step's batch, as a rank reads it."""
    def read(step, *more, rank=0, world=1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        args = train.arguments(words("unused", *more))
        return train.read_batch(encode.Encoded(args.data), encode.Encoded(args.augmented), args, step)
    return read


def losses(out):
    """Return the losses in the log of a run."""
    return [row["loss"] for row in read_jsonl(out / "log.jsonl") if "loss" in row]


def make_encoded(folder, size=8, text_dim=24, **meta):
    """Write an encoded data set of random numbers, eight pictures in one shard."""
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    lengths = torch.arange(2, 10)
    shard = {"mean": torch.randn(8, 4, size, size, generator=rng).half(),
             "std": torch.rand(8, 4, size, size, generator=rng).half(),
             "text": torch.randn(int(lengths.sum()), text_dim, generator=rng).bfloat16(),
             "offset": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])}
    samples = {"files": [f"{i}.png" for i in range(8)], "captions": [f"picture {i}" for i in range(8)]}
    save_file(shard, folder / encode.shard_name(0), {"samples": json.dumps(samples)})
    save_file({"text": torch.zeros(1, text_dim).bfloat16()}, folder / "null.safetensors")
    whole = {"version": encode.VERSION, "shards": 1, "count": 8, "latent_shape": [4, size, size],
             "text_dim": text_dim, "vae": "none", "text_encoder": "none", "scaling_factor": 0.5,
             "autoencoder": "a", "T5": "b", "list_of_images_and_captions": "c", **meta}
    (folder / "meta.json").write_text(json.dumps(whole))
    return folder


# --------------------------------------------------------------------------------------
# The method

def test_composites_come_only_where_t_is_above_tau_and_there_with_probability_p():
    t = np.random.default_rng(1).random(40_000)
    chosen = train.choose(t, np.random.default_rng(2), 0.4, 0.3)
    assert chosen.dtype == bool
    assert not chosen[t <= 0.4].any()
    # Four standard errors.
    assert chosen[t > 0.4].mean() == pytest.approx(0.3, abs=0.012)
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
    assert train.gamma(torch.tensor([0.0, 0.25, 1.0])).tolist() == pytest.approx([1.0, 0.75, 1e-9])


def test_only_the_chosen_picture_is_read(batch, monkeypatch):
    read = []
    real = encode.Encoded.moments

    def moments(self, i):
        read.append(self.folder.name)
        return real(self, i)

    monkeypatch.setattr(encode.Encoded, "moments", moments)
    t = [x for step in range(30) for x in batch(step, "--p", 0.5)["t"].tolist()]
    assert len(read) == len(t) == 180
    composites = [x for name, x in zip(read, t) if name == "encoded-cutmix"]
    assert 20 < len(composites) < 100
    assert min(composites) > 0.4


def test_x_0_is_drawn_anew_and_a_tenth_of_the_captions_become_the_null_prompt(batch):
    z, pictures, lengths = [], [], []
    for step in range(200):
        read = batch(step, "--p", 0)
        inputs = train.draw_inputs(read, 0.5, torch.device("cpu"))
        z.append((inputs["x_0"] / 0.5 - read["mean"]) / read["std"])
        pictures += read["mean"].flatten(1).sum(1).tolist()
        lengths += zip(read["coherence"].tolist(), read["lengths"].tolist())
    # Every picture once in every epoch, which is six steps.
    assert len(set(pictures[:36])) == len(set(pictures)) == 36
    z = torch.cat(z)
    assert abs(z.mean().item()) < 0.01
    assert z.std().item() == pytest.approx(1, abs=0.01)
    assert len(set(z.flatten(1).sum(1).tolist())) == 1200
    dropped = [length for coherence, length in lengths if not coherence]
    assert len(dropped) / 1200 == pytest.approx(0.1, abs=0.035)
    assert set(dropped) == {1}
    assert min(length for coherence, length in lengths if coherence) > 1


def test_a_batch_is_a_function_of_seed_and_step_and_ranks_share_it(batch):
    def inputs(step, *more, **ranks):
        return train.draw_inputs(batch(step, *more, **ranks), 0.5, torch.device("cpu"))

    whole, again = inputs(7), inputs(7)
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name])
        for rank in range(3):
            third = inputs(7, rank=rank, world=3)[name]
            share = tensor[2 * rank:2 * rank + 2]
            # Text is padded to the longest caption of the rank.
            if name in ("text", "mask"):
                share = share[:, :third.shape[1]]
            assert torch.equal(share, third), name
    assert not torch.equal(whole["eps"], inputs(8)["eps"])
    assert not torch.equal(whole["eps"], inputs(7, "--seed", 1)["eps"])
    assert len(set(whole["coin"].tolist())) == 6


# --------------------------------------------------------------------------------------
# The optimiser

def in_float64(x, gradients, lr, decay, trust, betas=(0.9, 0.999), eps=1e-8):
    """Return the weights after steps of LAMB as its paper writes it (AdamW without `trust`)."""
    m = v = 0.0
    for step, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g ** 2
        u = (m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + eps) + decay * x
        ratio = np.linalg.norm(x) / np.linalg.norm(u) if trust else 1.0
        x = x - lr * ratio * u
    return x


@pytest.mark.parametrize("trust, decay", [(True, 0.1), (False, 0.1), (True, 0.0)])
def test_every_tensors_step_equals_the_formula_in_float64(trust, decay):
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(5, 7)), 3 * rng.normal(size=11)]
    ws = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in xs]
    optimizer = train.Lamb(ws, lr=0.02, weight_decay=decay, trust_ratio=trust)
    gradients = [[1e-5 * rng.normal(size=x.shape) for x in xs] for _ in range(6)]
    for gs in gradients:
        for w, g in zip(ws, gs):
            w.grad = torch.tensor(4 * g, dtype=torch.float32)
        # As if the gradient had been clipped to a quarter.
        optimizer.step(torch.tensor(0.25))
    for k, x in enumerate(xs):
        # Without weight decay, LAMB is Adam.
        expected = in_float64(x, [gs[k] for gs in gradients], 0.02, decay, trust and decay > 0)
        assert np.allclose(ws[k].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_biases_norms_and_what_starts_at_zero_have_no_trust_ratio():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3))
    torch.nn.init.zeros_(model[2].weight)
    args = train.arguments(["--data", "x", "--out", "y", "--lr", "0.01"])
    optimizer = train.make_optimizer(model, args)
    found = [(len(group["params"]), group["weight_decay"], group["trust_ratio"])
             for group in optimizer.param_groups]
    assert found == [(1, 0.01, True), (1, 0.01, False), (4, 0.0, False)]
    model[2].weight.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.allclose(model[2].weight, torch.full((3, 3), -0.01), rtol=1e-4)


def test_the_learning_rate_warms_up_and_falls_along_a_share_of_the_cosine():
    def lr(step):
        return train.lr_at(step, 1e-3, 5000, 500_000, 0.7)
    assert [lr(0), lr(2500), lr(5000)] == pytest.approx([0, 5e-4, 1e-3])
    s = (250_000 - 5000) / 495_000
    assert lr(250_000) == pytest.approx(0.5e-3 * (1 + math.cos(0.7 * math.pi * s)))
    assert lr(500_000) == lr(600_000) == pytest.approx(0.5e-3 * (1 + math.cos(0.7 * math.pi)))


def test_gradients_are_clipped_and_the_average_follows_its_formula():
    args = train.arguments(["--data", "x", "--out", "y", "--clip", "0.5", "--ema", "0.2", "--lr", "0.1",
                            "--warmup", "0", "--schedule-steps", "9"])
    layer = torch.nn.Linear(3, 3)
    averages = {w: w.detach().clone() for w in layer.parameters()}
    expected = averages[layer.weight].double()
    optimizer = train.make_optimizer(layer, args)
    m = 0
    for step in range(1, 5):
        for w in averages:
            w.grad = torch.randn_like(w)
        norm = torch.nn.utils.get_total_norm([w.grad for w in averages])
        m = 0.9 * m + 0.1 * layer.weight.grad * 0.5 / norm
        train.update(optimizer, averages, norm, step, args)
        assert torch.allclose(optimizer.state[layer.weight]["m"], m, rtol=1e-4, atol=1e-7)
        assert optimizer.param_groups[0]["lr"] == train.lr_at(step, 0.1, 0, 9, 0.7)
        decay = min(0.2, step / (9 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    assert torch.allclose(averages[layer.weight].double(), expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------
# What a run learns and leaves behind

def test_cad_as_deep_as_the_real_one_learns_from_the_start(words, tmp_path, monkeypatch):
    # As the release starts it, it stays at a loss of 1 for 200 steps.
    deep = {**model_cad.PRESETS["toy"], "depth": 4, "layers": 4}
    monkeypatch.setitem(model_cad.PRESETS, "toy", deep)
    train.main(words("cad", "--model", "cad", "--steps", 32, "--log-every", 8))
    assert losses(tmp_path / "cad")[-1] < 0.7


def test_a_run_leaves_a_checkpoint_lasting_copies_a_grid_and_a_page_to_look_at(words, toy_paper, tmp_path):
    out = tmp_path / "out"
    train.main(words("out", "--steps", 5, "--keep-every", 2, "--sample-every", 5, "--sample-steps", 2,
                     "--val", toy_paper[0] / "encoded", "--val-every", 3))
    for step in (2, 4):
        config = json.loads((out / f"step-{step:07d}/config.json").read_text())
        assert config["training"]["steps"] == step
        assert (out / f"step-{step:07d}/model.safetensors").exists()
    training = json.loads((out / "config.json").read_text())["training"]
    expected = {"TA": True, "IA": "all", "p": 0.5, "tau": 0.4, "images": 36, "composites": 36}
    assert expected.items() <= training.items()
    assert "36 of CutMix" in (out / "README.md").read_text()
    page = (out / "progress.html").read_text()
    assert page.count("<svg") == 3
    assert "samples/0000005.png" in page
    assert (out / "samples/0000005.png").exists()
    rows = read_jsonl(out / "log.jsonl")
    assert [(row["step"], len(row["val_bins"])) for row in rows if "val_loss" in row] == [(3, 10), (5, 10)]
    # What is saved is the average.
    state = torch.load(out / "state.pt", weights_only=True)
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(saved[name], state["ema"][name]) for name in saved)
    assert any(not torch.equal(saved[name], state["model"][name]) for name in saved)


def test_validation_measures_ten_bins_of_t(words):
    class PredictsNothing(torch.nn.Module):
        def forward(self, x, gamma, text, mask, coherence, coin):
            return torch.zeros_like(x)

    args = train.arguments(words("unused", "--micro-batch", 7))
    val = encode.Encoded(args.data)
    known = types.SimpleNamespace(args=args, val=val, meta=val.meta, ema=PredictsNothing(),
                                  device=torch.device("cpu"))
    bins = train.validation_losses(known)
    # Predicting nothing costs the variance of the noise, 1, whatever t is.
    assert bins == pytest.approx([1.0] * 10, abs=0.1)
    assert bins == train.validation_losses(known)


def test_the_machine_hardly_changes_the_losses(words, tmp_path):
    train.main(words("plain", "--model", "cad", "--steps", 4))
    for name, more, rel in [("bf16", ["--precision", "bf16"], 0.02), ("parts", ["--micro-batch", 4], 1e-6),
                            ("threads", ["--workers", 2], 0), ("again", ["--checkpoint-activations"], 1e-6)]:
        train.main(words(name, "--model", "cad", "--steps", 4, *more))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=rel, abs=0)


@pytest.mark.parametrize("size", [8, 16])
def test_fine_tuning_starts_from_a_released_checkpoint_at_another_size(tmp_path, size):
    folder = make_encoded(tmp_path / "encoded", size=size)
    train.main(["--data", str(folder), "--out", str(tmp_path / "out"), "--batch-size", "4",
                "--init", str(FIXTURES / "cad_tiny"), "--steps", "1", "--lr", "0", "--sample-every", "0"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model"], config["args"]["size"]) == ("cad", size)
    released = load_file(FIXTURES / "cad_tiny/model.safetensors")
    ours = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(ours["text_embed.weight"], released["map_text_tokens.weight"])
    assert len(ours["position"]) == (size // 2) ** 2
    assert "beginning with the weights of" in (tmp_path / "out/README.md").read_text()


# --------------------------------------------------------------------------------------
# Kills, signals, ranks, failures

def same_end(one, two):
    """Check that two runs ended with the same bytes."""
    for name in ("log.jsonl", "model.safetensors", "config.json", "README.md"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    a, b = (torch.load(out / "state.pt", weights_only=True)["model"] for out in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(words, tmp_path):
    more = ["--model", "cad", "--schedule-steps", 16]
    train.main(words("whole", *more, "--steps", 16))
    log = tmp_path / "killed/log.jsonl"
    command = [sys.executable, "train.py", *words("killed", *more, "--steps", 10 ** 6)]
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    # Step 6: a state was saved at 4, and none yet at 8.
    while not log.exists() or log.read_text().count("\n") < 3:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    with log.open("a") as file:
        file.write('{"step": 7, "lo')
    assert 0 < torch.load(tmp_path / "killed/state.pt", weights_only=True)["done"] < 16
    train.main(words("killed", *more, "--steps", 16))
    same_end(tmp_path / "whole", tmp_path / "killed")


def at_call(monkeypatch, name, numbers, happens):
    """Let `happens(result)` replace the result of these calls of a function of train.py, from 1."""
    real = getattr(train, name)
    calls = []

    def function(*values, **named):
        calls.append(1)
        result = real(*values, **named)
        return happens(result) if len(calls) in numbers else result

    monkeypatch.setattr(train, name, function)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_the_step_saves_and_exits_with_its_number(words, tmp_path, monkeypatch, capsys, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def twice(loss):
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        at_call(patch, "add_gradient", [3], twice)
        train.main(words("stopped", "--steps", 6))
    assert end.value.code == 128 + number
    assert f"stopped by {name}, saved after step 3; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    if name == "SIGTERM":
        train.main(words("stopped", "--steps", 6))
        train.main(words("whole", "--steps", 6))
        same_end(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_that_is_ignored_as_nohup_does_stays_so(words, monkeypatch):
    at_call(monkeypatch, "add_gradient", [2], lambda loss: signal.raise_signal(signal.SIGHUP) or loss)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train.main(words("out", "--steps", 4))
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["make_network", "add_gradient"])
def test_a_signal_before_the_first_step_ends_the_run_at_once(words, tmp_path, monkeypatch, name):
    at_call(monkeypatch, name, [1], lambda result: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        train.main(words("out", "--steps", 4))
    assert end.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "out/state.pt").exists()


def test_two_ranks_give_the_losses_of_one_and_go_on_with_their_own_bits(words, tmp_path):
    def two_ranks(out, steps):
        run(*TWO_RANKS, "train.py", *words(out, "--schedule-steps", 40, "--micro-batch", 2, "--steps", steps),
            check=True)

    two_ranks("whole", 4)
    two_ranks("parts", 2)
    two_ranks("parts", 4)
    same_end(tmp_path / "whole", tmp_path / "parts")
    train.main(words("one", "--schedule-steps", 40, "--steps", 4))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def test_ranks_that_find_different_states_are_refused(words, tmp_path):
    train.main(words("0", "--steps", 4))
    # As on two nodes, whose folders of one name are two.
    script = tmp_path / "each.py"
    script.write_text("import os, sys, train, common\n"
                      f"out = os.path.join({str(tmp_path)!r}, os.environ['RANK'])\n"
                      "common.command_line(lambda: train.main([*sys.argv[1:], '--out', out]))\n")
    done = run(*TWO_RANKS, script, *words("unused", "--steps", 8), PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "all nodes must share --out" in done.stderr
    assert not (tmp_path / "1/log.jsonl").exists()


def test_a_rank_that_is_refused_ends_the_others_and_leaves_the_log_as_it_was(tmp_path):
    encoded = make_encoded(tmp_path / "encoded", vae=str(tmp_path / "nothing"))
    (tmp_path / "out").mkdir()
    log = tmp_path / "out/log.jsonl"
    log.write_text('{"step": 2, "loss": 0.5}\n')
    # Only rank 0 draws grids, and needs the autoencoder.
    done = run(*TWO_RANKS, "train.py", "--data", encoded, *SMALL, "--out", log.parent, "--sample-every", 2)
    assert f"train.py: {tmp_path / 'nothing'}" in done.stderr
    assert "train.py: another rank has ended" in done.stderr
    assert log.read_text() == '{"step": 2, "loss": 0.5}\n'


def test_steps_that_are_not_finite_are_skipped_and_counted(words, tmp_path, monkeypatch, capsys):
    def broken(inputs):
        inputs["x_0"][0, 0, 0, 0] = math.inf
        return inputs

    # The last one too: a broken sample is not the weights' fault, and they are saved.
    at_call(monkeypatch, "draw_inputs", [3, 7, 8, 10], broken)
    train.main(words("out", "--steps", 10))
    rows = read_jsonl(tmp_path / "out/log.jsonl")
    assert [row.get("skipped") for row in rows] == [None, 1, None, 2, 1]
    # Of two steps that were both skipped no loss is known.
    assert ["loss" in row for row in rows] == [True, True, True, False, True]
    assert all(w.isfinite().all() for w in load_file(tmp_path / "out/model.safetensors").values())
    assert "step 8: 2 steps were skipped" in capsys.readouterr().out


def test_ten_bad_steps_in_a_row_end_the_run_and_a_lower_rate_goes_on(words, tmp_path, monkeypatch):
    train.main(words("out", "--steps", 4, "--schedule-steps", 40))
    good = (tmp_path / "out/state.pt").read_bytes()
    with monkeypatch.context() as patch:
        at_call(patch, "add_gradient", range(1, 11), lambda loss: loss * math.nan)
        line = refused("train.py", *words("out", "--steps", 40, "--save-every", 100))
    assert "step 14: the loss is nan" in line
    assert "lower --lr goes on from there" in line
    assert (tmp_path / "out/state.pt").read_bytes() == good
    # Without naming it, the run stays on its schedule.
    train.main(words("out", "--steps", 6, "--lr", 1e-4))
    rows = read_jsonl(tmp_path / "out/log.jsonl")
    assert {"step": 4, "lr_changed": [1e-3, 1e-4]} in rows
    assert rows[-1]["lr"] == train.lr_at(6, 1e-4, 2, 40, 0.7)


@pytest.mark.parametrize("optimizer, lr", [("lamb", 1e6), ("adamw", 1e30)])
def test_weights_that_one_step_spoilt_never_replace_a_good_state(words, tmp_path, optimizer, lr):
    begun = words("out", "--optimizer", optimizer, "--schedule-steps", 40)
    train.main([*begun, "--steps", "4"])
    good = (tmp_path / "out/state.pt").read_bytes()
    # A state is due after each step, whose loss is that of the weights before it.
    for every in ("1", "4"):
        line = refused("train.py", *begun, "--steps", 40, "--lr", lr, "--save-every", every)
        assert "lower --lr" in line
        assert (tmp_path / "out/state.pt").read_bytes() == good


def test_a_full_disk_leaves_the_last_state_whole_and_is_told_in_one_line(words, tmp_path):
    train.main(words("out", "--steps", 4, "--schedule-steps", 8))
    state = tmp_path / "out/state.pt"
    good = state.read_bytes()
    # As if the disk ended here: the weights still fit, the state does not.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, before[1]))
    try:
        line = refused("train.py", *words("out", "--steps", 8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "state.pt: cannot be written" in line
    assert state.read_bytes() == good
    assert not list(tmp_path.glob("out/.state.pt*"))


def test_a_state_of_other_data_or_settings_or_damaged_is_refused(words, toy_paper, tmp_path):
    train.main(words("out", "--steps", 4))
    for more, said in [(["--steps", 3], "is of step 4 already"),
                       (["--schedule-steps", 9], "(schedule steps 8, now 9)"),
                       (["--tau", 0.5], "tau 0.4, now 0.5"),
                       (["--data", toy_paper[0] / "encoded-cutmix"], "list of images and captions"),
                       (["--augmented", make_encoded(tmp_path / "other")], "differ in latent_shape")]:
        assert said in refused("train.py", *words("out", "--steps", 6, *more))
    whole = (tmp_path / "out/state.pt").read_bytes()
    for damage in (b"", b"hello\n", whole[:-1000]):
        (tmp_path / "out/state.pt").write_bytes(damage)
        assert "not a training state" in refused("train.py", *words("out", "--steps", 6))

    tuned = ["--data", tmp_path / "other", "--out", tmp_path / "tuned", "--init", tmp_path / "out"]
    assert "its channels is not the data's" in refused("train.py", *tuned)


def test_bad_data_is_one_line_from_a_thread_too(words, monkeypatch):
    def broken(self, i):
        raise UserError("00000.safetensors: damaged, delete it")

    monkeypatch.setattr(encode.Encoded, "moments", broken)
    for workers in (0, 2):
        line = refused("train.py", *words("out", "--workers", workers))
        assert line == "train.py: 00000.safetensors: damaged, delete it"


def test_a_warm_up_that_is_longer_than_the_run_is_said(words, capsys):
    train.main(words("short", "--warmup", 4, "--steps", 3))
    assert "reaches 0.00075, not 0.001" in capsys.readouterr().out
