"""The sampler against closed forms, and the command as people use it."""

import json

import pytest
import torch
from conftest import FIXTURES, refused, run
from PIL import Image

import sample
from common import read_jsonl


class Known:
    """A `denoise` whose distribution is known: x_0 ~ N(mean, std^2), whose best eps has a closed form."""

    def __init__(self, std=0.0):
        self.std = std

    def condition(self, text, mask, coherence):
        mean = (text.mean(2) * mask).sum(1) / mask.sum(1)               # the caption says it
        return mean[:, None, None, None]

    def denoise(self, x, gamma, context, state=None):
        x, g = x.double(), gamma.double()[:, None, None, None]
        variance = g * self.std ** 2 + 1 - g
        return ((1 - g).sqrt() * (x - g.sqrt() * context) / variance).float(), None


def texts(value, batch=3, length=4):
    return torch.full((batch, length, 5), value), torch.ones(batch, length, dtype=torch.bool)


def test_ddim_finds_the_only_picture_there_is_whatever_the_steps():
    noise = torch.randn(3, 2, 4, 4)
    for steps in (1, 2, 7):
        x_0 = sample.ddim(Known(), noise, texts(0.25), texts(0.0), steps, guidance=0, clamp=1.2)
        assert torch.allclose(x_0, torch.full_like(x_0, 0.25), atol=1e-2 if steps == 1 else 1e-4)


def test_ddim_with_many_steps_transports_noise_to_a_gaussian():
    """The probability-flow map from N(0, 1) to N(mean, std^2) is x_0 = mean + std * noise."""
    noise = torch.randn(3, 2, 4, 4).clamp(-2, 2)
    x_0 = sample.ddim(Known(0.3), noise, texts(0.1), texts(0.0), 2000, guidance=0, clamp=None)
    assert torch.allclose(x_0, 0.1 + 0.3 * noise, atol=5e-3)


def test_guidance_moves_on_from_the_null_prediction_by_w_except_at_the_first_step():
    noise, w = torch.randn(2, 1, 2, 2), 1.5
    seen = []

    class Spy(Known):
        def denoise(self, x, gamma, context, state=None):
            seen.append((len(x), gamma[0].item(), state))
            return super().denoise(x, gamma, context)[0], torch.full((len(x), 1, 1), float(len(seen)))
    x_0 = sample.ddim(Spy(0.5), noise, texts(0.2, 2), texts(-0.1, 1, 1), 3, w, clamp=0.4)
    assert [n for n, _, _ in seen] == [2, 4, 4]                         # both halves in one batch
    assert seen[0][2] is None and (seen[1][2] == 1).all() and len(seen[1][2]) == 4 and (seen[2][2] == 2).all()
    x, known = noise.double(), Known(0.5)
    for i, t in enumerate((1.0, 2 / 3, 1 / 3)):
        g, g_next = max(1 - t, 1e-9), 1 - max(t - 1 / 3, 0)
        gamma = torch.full((2,), g, dtype=torch.float64)
        cond, null = (known.denoise(x.float(), gamma, torch.full((2, 1, 1, 1), mean))[0].double()
                      for mean in (0.2, -0.1))
        eps = cond if i == 0 else cond + w * (cond - null)
        clean = ((x - (1 - g) ** 0.5 * eps) / g ** 0.5).clamp(-0.4, 0.4)
        x = g_next ** 0.5 * clean + (1 - g_next) ** 0.5 * (x - g ** 0.5 * clean) / (1 - g) ** 0.5
    assert torch.allclose(x_0.double(), x, atol=1e-5)


def test_no_guidance_costs_one_pass_a_step():
    model, rows = Known(0.5), []
    denoise = model.denoise
    model.denoise = lambda x, *rest: rows.append(len(x)) or denoise(x, *rest)
    sample.ddim(model, torch.randn(2, 1, 2, 2), texts(0.2, 2), texts(0.0, 1), 4, guidance=0)
    assert rows == [2, 2, 2, 2]


def pixels(path):
    return torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).int()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    words = ["a large red circle", "a star", "a small blue cross above a large green ring . it is grey .",
             "ring", "a"]
    rows = [{"prompt": prompt, "tag": "x", "extra": [1]} for prompt in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(toy_paper, out, *words):
    return ["sample.py", "--checkpoint", toy_paper[0] / "dit", "--out", out, "--steps", "3",
            "--guidance", "2", *words]


def test_an_image_is_the_same_whatever_the_batch_size_and_after_a_kill(toy_paper, tmp_path, prompts):
    one, many = tmp_path / "one", tmp_path / "many"
    for out, size in ((one, 1), (many, 4)):
        done = run(*command(toy_paper, out, "--prompts", prompts, "--batch-size", size, "--seed", 7))
        assert done.returncode == 0, done.stderr
    for n in range(5):
        assert (pixels(one / f"{n:06d}.png") - pixels(many / f"{n:06d}.png")).abs().max() <= 1
    rows = read_jsonl(one / "samples.jsonl")
    assert [row["seed"] for row in rows] == [7, 8, 9, 10, 11] and rows[1]["prompt"] == "a star"
    before = {n: (one / f"{n:06d}.png").read_bytes() for n in range(5)}
    for n in (1, 3):
        (one / f"{n:06d}.png").unlink()                                 # as if it had been killed
    (one / "samples.jsonl").unlink()
    stamp = (one / "000000.png").stat().st_mtime_ns
    done = run(*command(toy_paper, one, "--prompts", prompts, "--batch-size", "1", "--seed", 7))
    assert done.returncode == 0, done.stderr
    assert (one / "000000.png").stat().st_mtime_ns == stamp             # what is whole is not made again
    assert all((one / f"{n:06d}.png").read_bytes() == before[n] for n in range(5))
    assert Image.open(one / "sheet.png").size[0] > 96 and read_jsonl(one / "samples.jsonl") == rows
    assert "other settings" in refused(*command(toy_paper, one, "--prompts", prompts, "--seed", 8))


def test_ranks_share_the_prompts_and_the_last_one_finishes(toy_paper, tmp_path, prompts):
    for rank in ("1", "0"):
        done = run(*command(toy_paper, tmp_path / "two", "--prompts", prompts, "--batch-size", "1"),
                   RANK=rank, WORLD_SIZE="2")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "two/samples.jsonl").exists() == (rank == "0")
    done = run(*command(toy_paper, tmp_path / "one", "--prompts", prompts, "--batch-size", "1"))
    assert done.returncode == 0, done.stderr
    for n in range(5):
        assert (tmp_path / f"two/{n:06d}.png").read_bytes() == (tmp_path / f"one/{n:06d}.png").read_bytes()


def test_geneval_folders_keep_the_metadata_and_dpg_grids_have_the_prompts_names(toy_paper, tmp_path, prompts):
    done = run(*command(toy_paper, tmp_path / "g", "--prompts", prompts, "--format", "geneval",
                        "--images-per-prompt", "2"))
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "g/00002/metadata.jsonl").read_text())
    assert row == read_jsonl(prompts)[2] and (tmp_path / "g/00004/samples/0001.png").exists()
    folder = tmp_path / "dpg-prompts"
    folder.mkdir()
    for name in ("12", "COCO_7"):
        (folder / f"{name}.txt").write_text("a red circle\n")
    done = run(*command(toy_paper, tmp_path / "d", "--prompts", folder, "--format", "dpg",
                        "--images-per-prompt", "4"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "d").glob("*.png")} == {"12.png", "COCO_7.png"}
    assert Image.open(tmp_path / "d/12.png").size == (128, 128)


def test_mistakes_end_in_one_line_and_exit_code_2(toy_paper, tmp_path):
    out = tmp_path / "out"
    assert "no prompts" in refused(*command(toy_paper, out))
    assert "no such file" in refused(*command(toy_paper, out, "--prompts", tmp_path / "none.txt"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\nnot json\n')
    assert "line 2" in refused(*command(toy_paper, out, "--prompts", tmp_path / "bad.jsonl"))
    (tmp_path / "empty.txt").write_text("\n")
    assert "no prompts in it" in refused(*command(toy_paper, out, "--prompts", tmp_path / "empty.txt"))
    assert "--steps" in refused(*command(toy_paper, out, "--prompt", "a", "--steps", "0"))
    assert "checkpoint" in refused("sample.py", "--checkpoint", tmp_path / "checkpoint", "--prompt", "a",
                                   "--out", out)
    text = toy_paper[0] / "t5"                                          # 128 wide; the tiny CAD wants 24
    assert "24" in refused("sample.py", "--checkpoint", FIXTURES / "cad_tiny", "--prompt", "a", "--out", out,
                           "--text-encoder", text, "--vae", FIXTURES / "vae_tiny")
    other = tmp_path / "other"                                          # DiT's config beside CAD's weights
    other.mkdir()
    (other / "config.json").write_text((toy_paper[0] / "dit/config.json").read_text())
    (other / "model.safetensors").write_bytes((FIXTURES / "cad_tiny/model.safetensors").read_bytes())
    assert "does not fit" in refused("sample.py", "--checkpoint", other, "--prompt", "a", "--out", out)
