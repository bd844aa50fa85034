"""A user's mistakes: each is one line that says what is wrong, exit code 2, and no traceback.

A row is (stage, its options, words of the line). {bad} is a folder of files that are wrong, {tmp} an empty one.
"""

import pytest
from conftest import photo, refused

MISTAKES = [
    # ---- cutmix.py
    ("cutmix.py", ["--images", "{tmp}/nowhere", "--out", "{tmp}/out"], "no such folder"),
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
    ("caption.py", ["aio", "--images", "{tmp}/nowhere", "--out", "{tmp}/out"], "no such folder"),
    ("caption.py", ["aio", "--images", "{bad}/photos", "--out", "{bad}/latin.jsonl"], "not from this"),
    ("caption.py", ["aio", "--images", "{bad}/photos", "--class-names", "{bad}/nothing", "--out",
                    "{bad}/nothing"], "is an input"),
    ("caption.py", ["aio", "--images", "{bad}/photos", "--out", "{bad}/photos/a.jsonl"], "is an input"),
    ("caption.py", ["llava", "--out", "{tmp}/out"], "--images"),
    ("caption.py", ["llava", "--images", "{bad}/photos", "--out", "{tmp}/out", "--model", "{tmp}/no"],
     "no such folder"),
    ("caption.py", ["llava", "--images", "{bad}/photos", "--out", "{tmp}/out", "--batch-size", 0],
     "--batch-size: 0: must"),
    ("caption.py", ["llava", "--images", "{bad}/photos", "--out", "{tmp}/out", "--workers", -1],
     "--workers: -1: must"),
    ("caption.py", ["llava", "--cutmix", "{bad}/nothing", "--out", "{tmp}/out"], "no composites in it"),
    ("caption.py", ["llava", "--images", "{bad}/photos", "--captioned", "{bad}/latin.jsonl", "--out",
                    "{tmp}/out"], "line 1: not JSON"),
    ("caption.py", ["extend", "--prompts", "{tmp}/none.txt", "--out", "{tmp}/out"], "no such file"),
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

    # ---- train.py

    # ---- evaluate.py

    # ---- toy
]


@pytest.fixture(scope="session")
def bad(tmp_path_factory):
    """Return a folder of inputs of all kinds that are wrong."""
    bad = tmp_path_factory.mktemp("bad")
    (bad / "empty").mkdir()
    (bad / "pointers").mkdir()
    (bad / "foreign").mkdir()
    (bad / "foreign/cutmix.jsonl").write_text("somebody's own\n")
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
    (bad / "deep.json").write_text("[" * 100_000)
    return bad


@pytest.mark.parametrize("stage, options, words", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_wrong(bad, tmp_path, stage, options, words):
    line = refused(stage, *[str(word).format(bad=bad, tmp=tmp_path) for word in options])
    assert words in line
