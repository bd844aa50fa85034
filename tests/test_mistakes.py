"""A user's mistakes: each is one line that says what is wrong, exit code 2, and no traceback.

A row is (the command as a user types it, words of the line). {bad} is a folder of files that are
wrong, {tmp} an empty one, {fixtures} that of the recorded numbers.
"""

import pytest
from conftest import FIXTURES, photo, refused

# Each is right; in a row, what is added to it is wrong. The later of two values of an option counts.
CUTMIX = "cutmix.py --images {bad}/photos --out {tmp}/out"
AIO = "caption.py aio --images {bad}/photos --out {tmp}/out"
LLAVA = "caption.py llava --images {bad}/photos --out {tmp}/out"
EXTEND = "caption.py extend --out {tmp}/out --prompts "
ENCODE = "encode.py --images {bad}/photos --captions {bad}/a.jsonl --out {tmp}/out"
SAMPLE = "sample.py --checkpoint {fixtures}/cad_tiny --out {tmp}/out"
TRAIN = "train.py --data x --out y"
QUALITY = "evaluate.py quality --real {bad}/photos --fake {bad}/photos --inception {bad}/binary"
DPG = "evaluate.py dpg --images {bad}/photos --questions "

MISTAKES = [
    ("cutmix.py --images {bad}/photos", "--out"),
    (CUTMIX + " --images {tmp}/nowhere", "No such file"),
    (CUTMIX + " --images {bad}/empty", "no images in it"),
    (CUTMIX + " --images {bad}/photos/n1", "one class only"),
    (CUTMIX + " --images {bad}/pointers", "git-lfs pointer"),
    (CUTMIX + " --out {bad}/photos/out", "is an input"),
    (CUTMIX + " --out {bad}/binary", "Not a directory"),
    (CUTMIX + " --out {bad}/foreign", "not made by this"),
    (CUTMIX + " --size x", "invalid whole"),
    (CUTMIX + " --setting 1/5", "1/5"),

    ("caption.py", "required"),
    ("caption.py llava --out {tmp}/out", "--images"),
    ("caption.py extend --out {tmp}/out", "--prompts"),
    ("caption.py llava --cutmix {bad}/nothing --out {tmp}/out", "needs a caption"),
    (AIO + " --images {bad}/photos/n1", "no class folder"),
    (AIO + " --out {bad}/latin.jsonl", "not made by this"),
    (AIO + " --out {bad}/foreign/c", "not made by this"),
    (AIO + " --out {bad}/photos/a.jsonl", "is an input"),
    (AIO + " --out {bad}/nothing --class-names {bad}/nothing", "is an input"),
    (EXTEND + "{bad}/nothing --out {bad}/nothing", "is an input"),
    (EXTEND + "{bad}/deep.json", "COCO's captions"),
    (EXTEND + "{bad}/binary", "text in UTF-8"),

    ("encode.py --out {tmp}/out", "needs --images, --captions and --out"),
    ("encode.py --check {bad}/photos", "not an encoded data set"),
    (ENCODE + " --captions {bad}/latin.jsonl", "latin.jsonl line 1: not JSON"),
    (ENCODE + " --captions {bad}/nothing", "nothing"),
    (ENCODE + " --images {bad}/pointers", "no image of"),
    (ENCODE + " --vae {tmp}/vae", "vae: no such folder"),
    (ENCODE + " --text-dtype int8", "--text-dtype"),
    (ENCODE + " --out {bad}/photos/n1", "is an input"),
    (ENCODE + " --out {bad}/a.jsonl", "is an input"),
    (ENCODE + " --out {bad}/foreign --vae {bad}/foreign", "is an input"),

    ("sample.py --checkpoint {tmp} --prompt a", "--out"),
    (SAMPLE, "no prompts: give --prompt or --prompts"),
    (SAMPLE + " --prompt a --checkpoint {tmp}/no", "no such folder"),
    (SAMPLE + " --prompt a --checkpoint {bad}/empty", "no config.json"),
    (SAMPLE + " --prompts {tmp}/none.txt", "none.txt"),
    (SAMPLE + " --prompts {bad}/nothing", "no prompts in it"),
    (SAMPLE + " --prompt half-\ud83d", "--prompt: invalid utf8"),
    (SAMPLE + " --prompt a --negative-prompt \ud83d", "--negative-prompt: invalid"),
    (SAMPLE + " --prompt a --negative-prompt x --random-negative-prompt", "give only one"),
    (SAMPLE + " --prompt a --format dpg", "--images-per-prompt 4"),
    (SAMPLE + " --prompt a --limit 1", "--limit"),
    (SAMPLE + " --prompt a --out {fixtures}/cad_tiny", "is an input"),
    (SAMPLE + " --prompts {bad}/photos --out {bad}/photos", "is an input"),
    (SAMPLE + " --prompts {tmp}/out/samples.jsonl", "is an input"),

    ("train.py --out {tmp}/out", "--data"),
    (TRAIN + " --data {bad}/empty --out {bad}/empty", "is an input"),
    (TRAIN + " --data {tmp}/none", "not an encoded data set"),
    (TRAIN + " --val {bad} --out {bad}/empty/out", "is an input"),
    (TRAIN + " --init {tmp}/dit --out {tmp}/dit", "is an input"),
    (TRAIN + " --init z --preset L", "the checkpoint's"),
    (TRAIN + " --preset XL", "dit has toy"),
    (TRAIN + " --model unet", "--model: invalid choice"),
    (TRAIN + " --resume z", "--resume"),
    (TRAIN + " --betas 0.9 1", "--betas: 1: must"),
    (TRAIN + " --steps 2.5", "--steps: invalid whole number"),

    ("evaluate.py", "required"),
    ("evaluate.py quality --real {bad}/photos", "--real alone"),
    ("evaluate.py quality --real {bad}/photos --save-stats {tmp}/v.npz", "npz is neither"),
    (QUALITY + " --real {bad}/binary --dino {fixtures}/cad_tiny", "binary: not a file of --save-stats"),
    (QUALITY + " --dino {fixtures}/vae_tiny", "no model.safetensors"),
    (QUALITY + " --dino {bad}/model", "tokenizer.json: a git-lfs pointer"),
    ("evaluate.py clip --samples {bad}/nothing", "no samples in it"),
    ("evaluate.py clip --samples {bad}/half.jsonl", "half.jsonl line 1: not a sample"),
    ("evaluate.py clip --samples {bad}/a.jsonl", "line 1: not a sample (no 'prompt')"),
    ("evaluate.py geneval --images {bad}/photos", "no 00000/metadata.jsonl"),
    ("evaluate.py geneval --images a --detections b c", "a second one for --extended"),
    (DPG + "{bad}/nothing", "no questions"),
    (DPG + "{bad}/binary", "dpg_bench.csv"),
    ("evaluate.py compare {tmp}/absent", "no results.json with scores in it"),
    ("evaluate.py compare {bad}/deep.json", "deep.json: not a results.json of evaluate.py"),
    ("evaluate.py compare {bad}/a-3.json", "a-3.json: not a results.json of evaluate.py"),
    ("evaluate.py compare {bad}/a-nan.json", "a-nan.json: not a results.json of evaluate.py"),
    ("evaluate.py curve {tmp}/absent --out {tmp}/fig.jsonl", "must be a file that ends"),

    ("toy --out {tmp}/x --seed 100000000000000000000", "--seed"),
    ("toy --out {bad}/binary", "binary"),
    ("toy --out {bad}/photos", "holds files, and not the toy's"),
    ("toy.tables --table 3", "--table"),
    ("toy.score --samples {bad}/photos --out {tmp}/x", "samples.jsonl: No such file"),
    ("toy.score --samples {bad}/photos --real {bad}/photos --out {tmp}/x", "64 x 64"),
    ("toy.tiny --data {tmp}", "python -m toy makes it"),
    ("toy.play --out {tmp}", "run `python -m toy` first"),
]

# Values beyond an option's bounds, which stand beside the option.
OUT_OF_BOUNDS = {
    CUTMIX: ["--size 4"],
    LLAVA: ["--batch-size 0", "--workers -1"],
    ENCODE: ["--size 1000000000", "--batch-size 0"],
    SAMPLE + " --prompt a": [
        "--steps 0", "--steps 1000000000000", "--images-per-prompt 1000000000000", "--guidance nan",
        "--guidance inf", "--clamp -1", "--seed 9999999999999999999", "--max-tokens 0", "--batch-size 0"],
    TRAIN: [
        "--p 1.5", "--tau -1", "--drop nan", "--lr inf", "--clip 0", "--steps 0", "--steps 10000000000",
        "--seed 9999999999999999999", "--val-images 9", "--sample-every -1", "--batch-size 1000000000",
        "--workers 10000000"],
    QUALITY: ["--size 5000", "--seed 9999999999999999999", "--k 0", "--k 10000000000"],
    "toy --out {tmp}/x": ["--images 3"],
}
for command, wrong in OUT_OF_BOUNDS.items():
    for words in wrong:
        MISTAKES.append((f"{command} {words}", "{}: {}: must be at ".format(*words.split())))


@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    """Return a folder of inputs of all kinds that are wrong."""
    bad = tmp_path_factory.mktemp("bad")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    texts = {
        "pointers/1.png": pointer,
        "pointers/2.png": pointer,
        "model/model.safetensors": "",
        "model/tokenizer.json": pointer,
        "foreign/cutmix.jsonl": "somebody's own\n",
        "foreign/c.skipped.jsonl": "somebody's own\n",
        "nothing": "",
        "a.jsonl": '{"file": "n1/1.png", "caption": "a red dog"}\n',
        "half.jsonl": '{"file": "n1/1.png", "prompt": "a dog \\ud83d"}\n',
        "deep.json": "[" * 100_000,
        "a-3.json": '{"quality": 3}',
        "a-nan.json": '{"quality": {"scores": {"fid": NaN}}}',
    }
    for folder in ("empty", "pointers", "model", "foreign", "photos/n1", "photos/n2"):
        (bad / folder).mkdir(parents=True)
    for name, text in texts.items():
        (bad / name).write_text(text)
    photo(1).save(bad / "photos/n1/1.png")
    photo(2).save(bad / "photos/n2/2.png")
    (bad / "binary").write_bytes(bytes(range(256)))
    (bad / "latin.jsonl").write_bytes(b'{"file": "a", "caption": "caf\xe9"}\n')
    return bad


@pytest.mark.parametrize("command, words", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_wrong(bad, tmp_path, command, words):
    stage, *options = [word.format(bad=bad, tmp=tmp_path, fixtures=FIXTURES) for word in command.split()]
    assert words in refused(stage, *options)
