"""Algorithm 1 and the equations, the optimiser, and what a run promises whatever happens to it."""

import itertools
import json
import math
import os
import resource
import signal
import socket

import numpy as np
import pytest
import torch
from conftest import FIXTURES, refused, run, stopped
from safetensors.torch import load_file, save_file

import encode
import model_cad
import sample
import train
from common import read_json, read_jsonl

# A run of seconds. Six samples a step, so that two and three ranks can share them.
SMALL = ["--preset", "toy", "--batch-size", "6", "--warmup", "2", "--log-every", "2",
         "--save-every", "3", "--sample-every", "0", "--seed", "3"]
CPU = torch.device("cpu")


def make_encoded(folder, count=36, size=8, **meta):
    """Write an encoded data set of random numbers, in one shard."""
    folder.mkdir()
    rng = torch.Generator().manual_seed(len(folder.name))
    lengths = torch.arange(count) % 8 + 2
    shard = {"mean": torch.randn(count, 4, size, size, generator=rng).half(),
             "std": 0.1 + torch.rand(count, 4, size, size, generator=rng).half(),
             "text": torch.randn(int(lengths.sum()), 24, generator=rng).bfloat16(),
             "offset": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])}
    samples = {"files": ["1.png"] * count, "captions": ["a picture"] * count}
    save_file(shard, folder / encode.shard_name(0), {"samples": json.dumps(samples)})
    save_file({"text": torch.zeros(1, 24).bfloat16()}, folder / "null.safetensors")
    whole = {"version": encode.VERSION, "shards": 1, "count": count, "latent_shape": [4, size, size],
             "text_dim": 24, "vae": str(FIXTURES / "vae_tiny"), "text_encoder": "none",
             "scaling_factor": 0.5, "autoencoder": "a", "T5": "b",
             "list_of_images_and_captions": folder.name, **meta}
    (folder / "meta.json").write_text(json.dumps(whole))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with encoded originals and composites."""
    folder = tmp_path_factory.mktemp("data")
    make_encoded(folder / "originals")
    # Rounding is not another encoder.
    make_encoded(folder / "composites", cutmix=["1/4"], precision_of_T5="torch.bfloat16")
    return folder


@pytest.fixture
def words(data, tmp_path):
    """Return a function: the options of a small run, into a folder of `tmp_path`."""
    sets = ["--data", data / "originals", "--augmented", data / "composites"]
    return lambda out, *more: [str(word) for word in (*sets, *SMALL, "--out", tmp_path / out, *more)]


def losses(out):
    """Return the losses in the log of a run."""
    return [row["loss"] for row in read_jsonl(out / "log.jsonl") if "loss" in row]


# ---- The method

def test_the_loss_is_the_mean_squared_error_of_the_noise_in_x_t():
    x_0 = torch.randn(2, 3, 4, 4)
    eps = torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.1, 0.7])
    share = t.double()[:, None, None, None]
    x_t = (1 - share).sqrt() * x_0 + share.sqrt() * eps

    def model(x, gamma, text, mask, coherence, coin):
        assert torch.allclose(x.double(), x_t, atol=1e-6)
        return 0.5 * x

    found = train.diffusion_losses(model, t, x_0, eps, None, None, None, None)
    expected = (0.5 * x_t - eps).square().mean((1, 2, 3))
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    assert train.gamma(torch.tensor([0.0, 0.25, 1.0])).tolist() == pytest.approx([1.0, 0.75, 1e-9])


def test_a_step_reads_a_composite_only_above_tau_draws_x_0_anew_and_drops_a_tenth_of_the_captions(
        words, monkeypatch):
    read = []
    real = encode.Encoded.moments
    monkeypatch.setattr(encode.Encoded, "moments",
                        lambda self, i: read.append((self.folder.name, i)) or real(self, i))
    t, z, lengths = [], [], []
    args = train.arguments(words("unused", "--p", 0.2))
    sets = [encode.Encoded(args.data), encode.Encoded(args.augmented)]
    for step in range(200):
        batch = train.read_batch(sets, args, step)
        t += batch["t"].tolist()
        z.append((train.draw_inputs(batch, 0.5, CPU)["x_0"] / 0.5 - batch["mean"]) / batch["std"])
        lengths += zip(batch["coherence"].tolist(), batch["lengths"].tolist())
    composites = [x for (name, _), x in zip(read, t) if name == "composites"]
    assert 0.4 < min(composites) < 0.42
    # Four standard errors.
    assert len(composites) / sum(x > 0.4 for x in t) == pytest.approx(0.2, abs=0.06)
    # None twice in an epoch, which is six steps; and all of both sets in the end.
    assert len(set(read[:36])) == 36
    assert len(read) == 1200 and len(set(read)) == 72
    z = torch.cat(z)
    assert abs(z.mean().item()) < 0.01
    assert z.std().item() == pytest.approx(1, abs=0.01)
    assert len(set(z.flatten(1).sum(1).tolist())) == 1200
    dropped = [length for coherence, length in lengths if not coherence]
    assert len(dropped) / 1200 == pytest.approx(0.1, abs=0.035)
    assert set(dropped) == {1}
    assert min(length for coherence, length in lengths if coherence) > 1
    args.seed = 1
    assert not torch.equal(batch["noise_seed"], train.read_batch(sets, args, step)["noise_seed"])


# ---- The optimiser

def in_float64(x, m, v, g, step, lr, decay, trust):
    """Return weights and moments after a step of LAMB as its paper writes it (without `trust`, AdamW)."""
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g ** 2
    u = (m / (1 - 0.9 ** step)) / (np.sqrt(v / (1 - 0.999 ** step)) + 1e-8) + decay * x
    return x - lr * (np.linalg.norm(x) / np.linalg.norm(u) if trust else 1.0) * u, m, v


@pytest.mark.parametrize("name, decay", [("lamb", 0.1), ("adamw", 0.1), ("lamb", 0.0)])
def test_clipping_rates_steps_and_averages_equal_the_formulas_in_float64(name, decay, device="cpu"):
    options = ["--optimizer", name, "--weight-decay", decay, "--clip", 2e-5, "--lr", 0.02, "--ema", 0.2,
               "--warmup", 3, "--rate", 0.7, "--schedule-steps", 6]
    args = train.arguments(["--data", "x", "--out", "y", *map(str, options)])
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
    torch.nn.init.zeros_(model[2].weight)
    optimizer = train.make_optimizer(model, args)
    model.to(device)
    averages = {w: w.detach().clone() for w in model.parameters()}
    # Without weight decay LAMB is Adam. Biases, norms and what starts at zero have no trust ratio.
    lamb = name == "lamb" and decay > 0
    kinds = [(decay, lamb), (0, False), (0, False), (0, False), (decay, False), (0, False)]
    now = [(w.detach().double().cpu().numpy(), 0.0, 0.0) for w in averages]
    expected = [x for x, _, _ in now]
    rng = np.random.default_rng(0)
    for step in range(1, 8):
        gradients = [1e-5 * rng.normal(size=w.shape) for w in averages]
        for w, g in zip(averages, gradients):
            w.grad = torch.tensor(g, dtype=torch.float32, device=device)
        norm = torch.nn.utils.get_total_norm([w.grad for w in averages])
        train.update(optimizer, averages, norm, step, args)
        # The norm is 8e-5, and clipping adds 1e-6 to it, as torch's own does.
        scale = 2e-5 / (math.sqrt(sum((g ** 2).sum() for g in gradients)) + 1e-6)
        # A warm-up, then a part of the cosine, at whose end it stays.
        lr = 0.02 * step / 3
        if step > 3:
            lr = 0.01 * (1 + math.cos(0.7 * math.pi * min(1, (step - 3) / 3)))
        average = min(0.2, step / (9 + step))
        for k, (g, kind) in enumerate(zip(gradients, kinds)):
            now[k] = in_float64(*now[k], scale * g, step, lr, *kind)
            expected[k] = average * expected[k] + (1 - average) * now[k][0]
    for (w, ema), (x, _, _), average in zip(averages.items(), now, expected):
        assert np.allclose(w.detach().cpu().numpy(), x, rtol=1e-4, atol=2e-6)
        assert np.allclose(ema.cpu().numpy(), average, rtol=1e-4, atol=2e-6)


# ---- What a run learns and leaves behind

def test_cad_as_deep_as_the_real_one_learns_from_the_start(words, tmp_path, monkeypatch):
    # As the release starts it, it stays at a loss of 1 for 200 steps.
    monkeypatch.setitem(model_cad.PRESETS, "toy", {**model_cad.PRESETS["toy"], "depth": 4, "layers": 4})
    train.main(words("cad", "--model", "cad", "--steps", 24, "--log-every", 8))
    assert losses(tmp_path / "cad")[-1] < 0.8


def test_a_run_leaves_a_checkpoint_lasting_copies_a_grid_and_a_page(words, data, tmp_path, capsys):
    out = tmp_path / "out"
    train.main(words("out", "--steps", 5, "--keep-every", 2, "--sample-every", 5, "--sample-steps", 2,
                     "--val", data / "originals", "--val-every", 3, "--warmup", 8))
    for step in (2, 4):
        kept = sample.load_model(out / f"step-{step:07d}")
        assert kept.checkpoint_config["training"]["steps"] == step
    training = read_json(out / "config.json", "")["training"]
    expected = {"TA": True, "IA": "1/4", "p": 0.5, "tau": 0.4, "images": 36, "composites": 36}
    assert expected.items() <= training.items()
    assert "36 of CutMix" in (out / "README.md").read_text()
    page = (out / "progress.html").read_text()
    assert page.count("<svg") == 3 and "samples/0000005.png" in page
    assert (out / "samples/0000005.png").exists()
    rows = read_jsonl(out / "log.jsonl")
    assert [(row["step"], len(row["val_bins"])) for row in rows if "val_loss" in row] == [(3, 10), (5, 10)]
    # What is saved is the average.
    state = torch.load(out / "state.pt", weights_only=True)
    saved = load_file(out / "model.safetensors")
    assert all(torch.equal(saved[name], state["ema"][name]) for name in saved)
    assert any(not torch.equal(saved[name], state["model"][name]) for name in saved)
    # That the warm-up is longer than the run shows in what is said first.
    assert "learning rate up to 0.00063" in capsys.readouterr().out


@pytest.mark.parametrize("count", [200, 7])
def test_validation_measures_ten_bins_of_t_of_fewer_pictures_too(words, tmp_path, count):
    val = make_encoded(tmp_path / "val", count)
    train.main(words("out", "--lr", 0, "--val", val, "--val-every", 1, "--steps", 2))
    first, second = [row["val_bins"] for row in read_jsonl(tmp_path / "out/log.jsonl") if "val_bins" in row]
    # Predicting nothing, as DiT does at its start, costs the variance of the noise, whatever t is.
    assert first == pytest.approx([1.0] * 10, abs=4 * math.sqrt(2 / 256 / max(1, count // 10)))
    assert first == second


def test_the_machine_hardly_changes_the_losses(words, tmp_path):
    train.main(words("plain", "--model", "cad", "--steps", 4))
    for name, more, rel in [("bf16", ["--precision", "bf16"], 0.02), ("parts", ["--micro-batch", 4], 1e-6),
                            ("threads", ["--workers", 2], 0), ("again", ["--checkpoint-activations"], 1e-6)]:
        train.main(words(name, "--model", "cad", "--steps", 4, *more))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=rel, abs=0)


def test_a_run_begins_with_the_released_weights_or_ours_at_another_size_of_latents(tmp_path):
    def tuned(start, out, size):
        folder = make_encoded(tmp_path / f"of-{size}", size=size)
        train.main(["--data", str(folder), "--out", str(out), "--batch-size", "4", "--init", str(start),
                    "--steps", "1", "--lr", "0", "--sample-every", "0"])
        assert f"beginning with the weights of {start}" in (out / "README.md").read_text()
        weights = load_file(out / "model.safetensors")
        assert len(weights["position"]) == (size // 2) ** 2
        return weights["text_embed.weight"]

    released = load_file(FIXTURES / "cad_tiny/model.safetensors")["map_text_tokens.weight"]
    assert torch.equal(tuned(FIXTURES / "cad_tiny", tmp_path / "out", 16), released)
    # Below the checkpoint that it begins with is room for a run.
    assert torch.equal(tuned(tmp_path / "out", tmp_path / "out/tuned", 8), released)


# ---- Kills, signals, ranks, failures

def same_end(one, two):
    """Check that two runs ended with the same bytes."""
    for name in ("log.jsonl", "model.safetensors", "config.json", "README.md"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    a, b = (torch.load(out / "state.pt", weights_only=True)["model"] for out in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


def train_in_turn(rank, jobs):
    """Be a rank of one run after the other: (port, ranks, options, "{rank}" for its number)."""
    for port, ranks, options in jobs:
        if rank < ranks:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks),
                              MASTER_ADDR="localhost", MASTER_PORT=str(port))
            train.main([word.replace("{rank}", str(rank)) for word in options])


def test_a_killed_run_goes_on_with_other_ranks_to_the_same_bytes_and_ranks_share_a_state(words, tmp_path):
    more = ["--model", "cad", "--schedule-steps", 16, "--micro-batch", 3, "--steps"]
    train.main(words("0", *more, 16))
    # In step 5: a state was saved at 3, between two rows of the log.
    ended = stopped(signal.SIGKILL, train, "add_gradient", 5, lambda: train.main(words("killed", *more, 16)))
    assert ended == -signal.SIGKILL
    with open(tmp_path / "killed/log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert torch.load(tmp_path / "killed/state.pt", weights_only=True)["done"] == 3

    # On two ranks these are the same sums; on three others, but the same ones at each start.
    # The last as on three nodes, whose folders of one name are three.
    jobs = []
    for ranks, out, steps, part in [(2, "killed", 16, 3), (3, "three", 4, 1), (3, "parts", 2, 1),
                                    (3, "parts", 4, 1), (3, "{rank}", 20, 1)]:
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        jobs.append((port, ranks, words(out, *more, steps, "--micro-batch", part)))
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="all nodes must share --out"):
        torch.multiprocessing.spawn(train_in_turn, [jobs], nprocs=3)
    same_end(tmp_path / "0", tmp_path / "killed")
    same_end(tmp_path / "three", tmp_path / "parts")
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "0")[:2], rel=1e-6)


def at_call(monkeypatch, name, numbers, happens):
    """Let `happens(result)` replace the result of these calls of a function of train.py, from 1."""
    real = getattr(train, name)
    calls = itertools.count(1)

    def function(*values):
        result = real(*values)
        return happens(result) if next(calls) in numbers else result

    monkeypatch.setattr(train, name, function)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_ends_the_first_step_at_once_saves_later_and_is_ignored_where_it_was(
        words, tmp_path, monkeypatch, capsys, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    # In the first step of a run, in the third of the next one, and in the first of the last.
    at_call(monkeypatch, "add_gradient", [1, 4, 5], lambda loss: signal.raise_signal(number) or loss)
    for saved in (False, True):
        with pytest.raises(SystemExit) as end:
            train.main(words("out", "--steps", 4, "--save-every", 4))
        assert end.value.code == 128 + number
        assert signal.getsignal(number) == before
        assert (tmp_path / "out/state.pt").exists() == saved
    assert f"stopped by {name}, saved after step 3; the same command goes on" in capsys.readouterr().out
    # As nohup does.
    signal.signal(number, signal.SIG_IGN)
    try:
        train.main(words("out", "--steps", 4))
    finally:
        signal.signal(number, before)


def test_a_rank_that_is_refused_ends_the_others_and_leaves_the_log_as_it_was(tmp_path):
    encoded = make_encoded(tmp_path / "encoded", vae=str(tmp_path / "nothing"))
    (tmp_path / "out").mkdir()
    log = tmp_path / "out/log.jsonl"
    log.write_text('{"step": 2, "loss": 0.5}\n')
    # Only rank 0 draws grids, and needs the autoencoder.
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py", "--data",
               encoded, *SMALL, "--out", log.parent, "--sample-every", 2)
    assert f"train.py: {tmp_path / 'nothing'}" in done.stderr
    assert "train.py: another rank has ended" in done.stderr
    assert log.read_text() == '{"step": 2, "loss": 0.5}\n'


def test_steps_that_are_not_finite_are_skipped_and_counted(words, tmp_path, monkeypatch, capsys):
    # The last one too: a broken sample is not the weights' fault, and they are saved.
    at_call(monkeypatch, "draw_inputs", [3, 7, 8, 10], lambda inputs: inputs | {"x_0": inputs["x_0"] / 0})
    train.main(words("out", "--steps", 10))
    rows = read_jsonl(tmp_path / "out/log.jsonl")
    assert [row.get("skipped") for row in rows] == [None, 1, None, 2, 1]
    # Of two steps that were both skipped no loss is known.
    assert ["loss" in row for row in rows] == [True, True, True, False, True]
    assert all(w.isfinite().all() for w in load_file(tmp_path / "out/model.safetensors").values())
    assert "step 8: 2 steps were skipped" in capsys.readouterr().out


def test_neither_what_is_spoilt_nor_a_full_disk_replaces_a_good_state_and_the_run_can_go_on(
        words, tmp_path, monkeypatch):
    begun = words("out")
    train.main([*begun, "--steps", "4", "--schedule-steps", "40"])
    state = tmp_path / "out/state.pt"
    good = state.read_bytes()

    def check_refusal(why, *more):
        assert why in refused("train.py", *begun, "--steps", 40, *more)
        assert state.read_bytes() == good
        assert not list(tmp_path.glob("out/.state.pt*"))

    # A state is due after each step, whose loss is that of the weights before it.
    check_refusal("the loss of its weights is not below 10", "--lr", 1e6, "--save-every", 1)
    check_refusal("step 6: the loss is", "--lr", 30, "--save-every", 4)
    with monkeypatch.context() as patch:
        at_call(patch, "add_gradient", range(1, 11), lambda loss: loss * math.nan)
        check_refusal("step 14: the loss is nan", "--save-every", 100)
    # As if the disk ended here: the weights still fit, the state does not.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, before[1]))
    try:
        check_refusal("state.pt: cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # A lower rate, and the schedule that the run was begun with.
    train.main([*begun, "--steps", "6", "--lr", "1e-4"])
    assert read_jsonl(tmp_path / "out/log.jsonl")[-1]["lr"] == train.lr_at(6, 1e-4, 2, 40, 0.7)


def test_a_state_or_start_of_other_data_or_settings_or_damaged_is_refused(words, data, tmp_path):
    train.main(words("out", "--steps", 4))
    other = make_encoded(tmp_path / "other", size=16)
    foreign = make_encoded(tmp_path / "foreign", T5="c")
    narrow = make_encoded(tmp_path / "narrow", text_dim=8)
    cut = make_encoded(tmp_path / "cut", max_tokens=5)
    for more, said in [(["--steps", 3], "is of step 4 already"),
                       (["--schedule-steps", 9], "(schedule steps 8, now 9)"),
                       (["--tau", 0.5], "tau 0.4, now 0.5"),
                       (["--data", data / "composites"], "lists of images and captions"),
                       (["--data", other, "--augmented", other], "latent shape"),
                       (["--augmented", other], "differ in latent_shape"),
                       (["--augmented", cut], "differ in max_tokens")]:
        assert said in refused("train.py", *words("out", "--steps", 6, *more))
    # The learning rate would be at the end of its schedule as soon as it has risen.
    long_warmup = words("new", "--steps", 9, "--warmup", 8, "--schedule-steps", 8)
    assert "must be shorter than the schedule, 8 steps" in refused("train.py", *long_warmup)
    tuned = ["--out", tmp_path / "tuned", "--init", tmp_path / "out", "--data"]
    assert "of other encoders" in refused("train.py", *tuned, foreign)
    assert "not weights for such data" in refused("train.py", *tuned, narrow)
    state = tmp_path / "out/state.pt"
    for damage in (state.read_bytes()[:-1000], b"hello\n"):
        state.write_bytes(damage)
        assert "not a training state" in refused("train.py", *words("out", "--steps", 6))
    # A checkpoint that was not trained here.
    state.unlink()
    (tmp_path / "out/log.jsonl").unlink()
    assert "config.json: not of this run" in refused("train.py", *words("out", "--steps", 6))
