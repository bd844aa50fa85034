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

    # ---- encode.py

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
    (bad / "deep.json").write_text("[" * 100_000)
    return bad


@pytest.mark.parametrize("stage, options, words", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_wrong(bad, tmp_path, stage, options, words):
    line = refused(stage, *[str(word).format(bad=bad, tmp=tmp_path) for word in options])
    assert words in line
