"""A user's mistakes: each is one line that says what is wrong, exit code 2, and no traceback.

A row is (stage, its options, words of the line). {bad} is a folder of files that are wrong, {tmp}
an empty one.
"""

import pytest
from conftest import FIXTURES, photo, refused

SAMPLE = ["--checkpoint", FIXTURES / "cad_tiny", "--out", "{tmp}/out"]
MISTAKES = [
    # ---- cutmix.py
    ("cutmix.py", ["--images", "{tmp}/nowhere", "--out", "{tmp}/out"], "No such file"),
    ("cutmix.py", ["--images", "{bad}/empty", "--out", "{tmp}/out"], "no images in it"),
    ("cutmix.py", ["--images", "{bad}/photos/n1", "--out", "{tmp}/out"], "one class only"),
    ("cutmix.py", ["--images", "{bad}/pointers", "--out", "{tmp}/out"], "git-lfs pointer"),
    ("cutmix.py", ["--images", "{bad}/photos", "--out", "{bad}/photos/out"], "is an input"),
    ("cutmix.py", ["--images", "{bad}/photos", "--out", "{bad}/binary"], "Not a directory"),
    ("cutmix.py", ["--images", "{bad}/photos", "--out", "{bad}/foreign"], "not made by this"),
    ("cutmix.py", ["--images", "{bad}/photos", "--out", "{tmp}/out", "--size", 4], "--size: 4: must"),
    ("cutmix.py", ["--images", "{bad}/photos", "--out", "{tmp}/out", "--size", "x"], "invalid whole"),
    ("cutmix.py", ["--images", "{bad}/photos", "--out", "{tmp}/out", "--setting", "1/5"], "1/5"),
    ("cutmix.py", ["--images", "{bad}/photos", "--out", "{tmp}/out", "--time", 3], "--time"),
    ("cutmix.py", ["--images", "{bad}/photos"], "--out"),

    # ---- caption.py
    ("caption.py", ["aio", "--images", "{bad}/photos/n1", "--out", "{tmp}/out"], "no class folder"),
    ("caption.py", ["aio", "--images", "{tmp}/nowhere", "--out", "{tmp}/out"], "nowhere: No such file"),
    ("caption.py", ["aio", "--images", "{bad}/photos", "--out", "{bad}/latin.jsonl"], "not from this"),
    ("caption.py", ["aio", "--images", "{bad}/photos", "--class-names", "{bad}/nothing", "--out",
                    "{bad}/nothing"], "is an input"),
    ("caption.py", ["aio", "--images", "{bad}/photos", "--out", "{bad}/photos/a.jsonl"], "is an input"),
    ("caption.py", ["aio", "--images", "{bad}/photos", "--out", "{bad}/foreign/c"], "not made by this"),
    ("caption.py", ["llava", "--out", "{tmp}/out"], "--images"),
    ("caption.py", ["llava", "--images", "{bad}/photos", "--out", "{tmp}/out", "--model", "{tmp}/no"],
     "no such folder"),
    ("caption.py", ["llava", "--images", "{bad}/photos", "--out", "{tmp}/out", "--batch-size", 0],
     "--batch-size: 0: must"),
    ("caption.py", ["llava", "--images", "{bad}/photos", "--out", "{tmp}/out", "--workers", -1],
     "--workers: -1: must"),
    ("caption.py", ["llava", "--cutmix", "{bad}/nothing", "--out", "{tmp}/out"], "needs a caption"),
    ("caption.py", ["llava", "--images", "{bad}/photos", "--captioned", "{bad}/latin.jsonl", "--out",
                    "{tmp}/out"], "line 1: not JSON"),
    ("caption.py", ["extend", "--prompts", "{tmp}/none.txt", "--out", "{tmp}/out"], "No such file"),
    ("caption.py", ["extend", "--prompts", "{bad}/deep.json", "--out", "{tmp}/out"], "COCO's captions"),
    ("caption.py", ["extend", "--prompts", "{bad}/binary", "--out", "{tmp}/out"], "text in UTF-8"),
    ("caption.py", ["extend", "--prompts", "{bad}/nothing", "--out", "{bad}/nothing"], "is an input"),
    ("caption.py", ["extend", "--out", "{tmp}/out"], "--prompts"),
    ("caption.py", [], "required"),

    # ---- encode.py
    ("encode.py", ["--out", "{tmp}/out"], "needs --images, --captions and --out"),
    ("encode.py", ["--images", "{bad}/photos", "--captions", "{bad}/latin.jsonl", "--out", "{tmp}/out"],
     "latin.jsonl"),
    ("encode.py", ["--images", "{bad}/photos", "--captions", "{bad}/nothing", "--out", "{tmp}/out"],
     "nothing"),
    ("encode.py", ["--images", "{bad}/photos", "--captions", "{bad}/a.jsonl", "--out", "{tmp}/out",
                   "--vae", "{tmp}/vae"], "vae: no such folder"),
    ("encode.py", ["--images", "{bad}/empty", "--captions", "{bad}/a.jsonl", "--out", "{tmp}/out"],
     "no images in it"),
    ("encode.py", ["--images", "{bad}/pointers", "--captions", "{bad}/a.jsonl", "--out", "{tmp}/out"],
     "no image of"),
    ("encode.py", ["--images", "{bad}/photos", "--captions", "{bad}/a.jsonl", "--out", "{bad}/photos/n1"],
     "is an input"),
    ("encode.py", ["--images", "{bad}/photos", "--captions", "{bad}/a.jsonl", "--out", "{bad}/a.jsonl"],
     "is an input"),
    ("encode.py", ["--images", "{bad}/photos", "--captions", "{bad}/a.jsonl", "--out", "{tmp}/out",
                   "--vae", "{bad}/foreign", "--out", "{bad}/foreign"], "is an input"),
    ("encode.py", ["--size", 10 ** 9], "--size: 1000000000: must be"),
    ("encode.py", ["--batch-size", 0], "--batch-size: 0: must be"),
    ("encode.py", ["--text-dtype", "int8"], "--text-dtype"),
    ("encode.py", ["--check", "{bad}/photos"], "not an encoded data set"),

    # ---- sample.py
    ("sample.py", [*SAMPLE], "no prompts: give --prompt or --prompts"),
    ("sample.py", ["--checkpoint", "{tmp}", "--prompt", "a"], "--out"),
    ("sample.py", ["--checkpoint", "{tmp}/no", "--prompt", "a", "--out", "{tmp}/out"], "no such folder"),
    ("sample.py", ["--checkpoint", "{bad}/empty", "--prompt", "a", "--out", "{tmp}/out"], "no config.json"),
    ("sample.py", [*SAMPLE, "--prompts", "{tmp}/none.txt"], "none.txt"),
    ("sample.py", [*SAMPLE, "--prompts", "{bad}/nothing"], "no prompts in it"),
    ("sample.py", [*SAMPLE, "--prompts", "{bad}/binary"], "binary: not text"),
    ("sample.py", [*SAMPLE, "--prompts", "{bad}/latin.jsonl"], "latin.jsonl line 1"),
    ("sample.py", [*SAMPLE, "--prompts", "{bad}/deep.json"], "deep.json: not COCO's captions"),
    ("sample.py", [*SAMPLE, "--prompt", "half a character \ud83d"], "--prompt: invalid utf8"),
    ("sample.py", [*SAMPLE, "--prompt", "a", "--negative-prompt", "\ud83d"], "--negative-prompt: invalid"),
    ("sample.py", [*SAMPLE, "--prompt", "a", "--negative-prompt", "x", "--random-negative-prompt"],
     "give only one"),
    ("sample.py", [*SAMPLE, "--prompt", "a", "--format", "dpg"], "--images-per-prompt 4"),
    ("sample.py", [*SAMPLE, "--prompt", "a", "--limit", 1], "--limit"),
    ("sample.py", [*SAMPLE, "--prompt", "a", "--out", FIXTURES / "cad_tiny"], "is an input"),
    ("sample.py", [*SAMPLE, "--prompts", "{bad}/photos", "--out", "{bad}/photos"], "is an input"),
    ("sample.py", [*SAMPLE, "--prompts", "{tmp}/out/samples.jsonl"], "is an input"),
    ("sample.py", [*SAMPLE, "--prompt", "a", "--vae", "{tmp}/no"], "no such folder"),
    ("sample.py", [*SAMPLE, "--prompt", "a", "--spacing", "quadratic"], "quadratic"),
    *[("sample.py", [*SAMPLE, "--prompt", "a", option, value], f"{option}: {value}: must be")
      for option, value in [("--steps", 0), ("--steps", 10 ** 15), ("--images-per-prompt", 10 ** 15),
                            ("--guidance", "nan"), ("--guidance", "inf"), ("--clamp", -1),
                            ("--seed", 2 ** 70), ("--max-tokens", 0), ("--batch-size", 0)]],

    # ---- train.py
    ("train.py", ["--out", "{tmp}/out"], "--data"),
    ("train.py", ["--data", "{tmp}/none", "--out", "{tmp}/out"], "not an encoded data set"),
    ("train.py", ["--data", "{bad}/empty", "--out", "{tmp}/out"], "not an encoded data set"),
    ("train.py", ["--data", "{bad}/empty", "--out", "{bad}/empty"], "is an input"),
    ("train.py", ["--data", "x", "--val", "{bad}", "--out", "{bad}/empty/out"], "is an input"),
    ("train.py", ["--data", "x", "--init", "{tmp}/dit", "--out", "{tmp}/dit"], "is an input"),
    ("train.py", ["--data", "x", "--out", "y", "--init", "z", "--preset", "L"], "the checkpoint's"),
    ("train.py", ["--data", "x", "--out", "y", "--preset", "XL"], "dit has toy"),
    ("train.py", ["--data", "x", "--out", "y", "--model", "unet"], "--model: invalid choice"),
    ("train.py", ["--data", "x", "--out", "y", "--resume", "z"], "--resume"),
    ("train.py", ["--data", "x", "--out", "y", "--betas", 0.9, 1], "--betas: 1: must"),
    ("train.py", ["--data", "x", "--out", "y", "--steps", 2.5], "--steps: invalid whole number"),
    *[("train.py", ["--data", "x", "--out", "y", option, value], f"{option}: {value}: must be")
      for option, value in [("--p", 1.5), ("--tau", -1), ("--drop", "nan"), ("--lr", "inf"), ("--clip", 0),
                            ("--steps", 0), ("--steps", 10 ** 10), ("--seed", 2 ** 70), ("--val-images", 9),
                            ("--sample-every", -1), ("--batch-size", 10 ** 9), ("--workers", 10 ** 7)]],

    # ---- evaluate.py
    ("evaluate.py", [], "required"),
    ("evaluate.py", ["quality", "--real", "{bad}/photos"], "--real alone"),
    ("evaluate.py", ["quality", "--real", "{bad}/photos", "--fake", "{bad}/empty"], "no images in it"),
    ("evaluate.py", ["quality", "--real", "{bad}/photos", "--fake", "{bad}/binary"], "Not a directory"),
    ("evaluate.py", ["quality", "--real", "{bad}/binary", "--fake", "{bad}/photos", "--inception",
                     "{bad}/binary", "--dino", FIXTURES / "cad_tiny"], "binary: not a file of --save-stats"),
    ("evaluate.py", ["quality", "--real", "{tmp}/a.safetensors", "--fake", "{bad}/photos"], "No such file"),
    ("evaluate.py", ["quality", "--real", "{bad}/photos", "--fake", "{bad}/photos", "--inception",
                     "{bad}/binary", "--dino", "{tmp}/no"], "no: no such folder"),
    *[("evaluate.py", ["quality", "--real", "a", option, value], f"{option}: {value}: must be at {bound}")
      for option, value, bound in [("--size", 2 ** 40, "most 4096"), ("--seed", 2 ** 64, "most"),
                                   ("--k", 0, "least 1"), ("--k", 10 ** 10, "most 1000000000")]],
    ("evaluate.py", ["quality", "--real", "a", "--no-crop"], "--no-crop"),
    ("evaluate.py", ["clip", "--samples", "{bad}/nothing"], "no samples in it"),
    ("evaluate.py", ["clip", "--samples", "{bad}/latin.jsonl"], "line 1: not JSON"),
    ("evaluate.py", ["clip", "--samples", "{bad}/half.jsonl"], "half.jsonl line 1: not a sample"),
    ("evaluate.py", ["clip", "--samples", "{bad}/a.jsonl"], "line 1: not a sample (no 'prompt')"),
    ("evaluate.py", ["geneval", "--images", "{bad}/photos"], "no 00000/metadata.jsonl"),
    ("evaluate.py", ["geneval", "--images", "a", "--detections", "b", "c"], "a second one for --extended"),
    ("evaluate.py", ["dpg", "--images", "{bad}/photos", "--questions", "{bad}/nothing"], "no questions"),
    ("evaluate.py", ["quality", "--real", "{bad}/photos", "--save-stats", "{tmp}/v.npz"], "npz is neither"),
    ("evaluate.py", ["quality", "--real", "{bad}/binary", "--fake", "{bad}/photos", "--inception",
                     "{bad}/binary", "--dino", FIXTURES / "vae_tiny"], "no model.safetensors"),
    ("evaluate.py", ["dpg", "--images", "{bad}/photos", "--questions", "{bad}/binary"], "dpg_bench.csv"),
    ("evaluate.py", ["dpg", "--images", "{bad}/photos", "--questions", "{bad}/photos"], "Is a directory"),
    ("evaluate.py", ["compare", "{tmp}/absent"], "no results.json with scores in it"),
    ("evaluate.py", ["compare", "{bad}/deep.json"], "not a results.json of evaluate.py"),
    ("evaluate.py", ["curve", "{tmp}/absent", "--out", "{tmp}/fig.jsonl"], "must be a file that ends"),

    # ---- toy
    ("toy", ["--out", "{tmp}/x", "--images", 3], "--images: 3: must be at least 10"),
    ("toy", ["--out", "{tmp}/x", "--seed", 10 ** 20], "--seed"),
    ("toy", ["--out", "{bad}/binary"], "binary"),
    ("toy", ["--out", "{bad}/photos"], "holds files, and not the toy's"),
    ("toy.tables", ["--table", "3"], "--table"),
    ("toy.score", ["--samples", "{bad}/photos", "--out", "{tmp}/x"], "--format geneval"),
    ("toy.score", ["--samples", "{bad}/photos", "--real", "{bad}/photos", "--out", "{tmp}/x"], "64 x 64"),
    ("toy.tiny", ["--data", "{tmp}"], "python -m toy makes it"),
    ("toy.play", ["--out", "{tmp}"], "run `python -m toy` first"),
    ("toy.play", ["--checkpoint", "a", "--checkpoint", "b", "--checkpoint", "c"], "room for two"),
]


@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    """Return a folder of inputs of all kinds that are wrong."""
    bad = tmp_path_factory.mktemp("bad")
    (bad / "empty").mkdir()
    (bad / "pointers").mkdir()
    (bad / "foreign").mkdir()
    (bad / "foreign/cutmix.jsonl").write_text("somebody's own\n")
    (bad / "foreign/c.skipped.jsonl").write_text("somebody's own\n")
    (bad / "photos/n1").mkdir(parents=True)
    (bad / "photos/n2").mkdir()
    photo(1).save(bad / "photos/n1/1.png")
    photo(2).save(bad / "photos/n2/2.png")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    for name in ("1.png", "2.png"):
        (bad / "pointers" / name).write_text(pointer)
    (bad / "binary").write_bytes(bytes(range(256)))
    (bad / "nothing").write_bytes(b"")
    (bad / "latin.jsonl").write_bytes(b'{"file": "a", "caption": "caf\xe9"}\n')
    (bad / "a.jsonl").write_text('{"file": "n1/1.png", "caption": "a red dog"}\n')
    (bad / "half.jsonl").write_text('{"file": "n1/1.png", "prompt": "a dog \\ud83d"}\n')
    (bad / "deep.json").write_text("[" * 100_000)
    return bad


@pytest.mark.parametrize("stage, options, words", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_wrong(bad, tmp_path, stage, options, words):
    line = refused(stage, *[str(word).format(bad=bad, tmp=tmp_path) for word in options])
    assert words in line
