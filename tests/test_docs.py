"""The documents: links lead somewhere, names and commits exist, commands have the options they are given."""

import contextlib
import importlib
import io
import re
import subprocess

import pytest
from conftest import ROOT

NAMES = ("README.md", "NOTES.md", "EXERCISES.md", "toy/README.md")
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}
README = TEXTS["README.md"]


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_paths_lead_somewhere(name):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else [""]
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    for path in re.findall(r"`((?:\w+/)?\w+\.py)`", TEXTS[name]):
        assert (ROOT / path).exists(), path


def test_the_functions_that_the_readme_names_exist():
    for file, names in re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, )?)+)", README):
        for word in re.findall(r"\w+", names):
            assert re.search(rf"^(def |class |){word}\b", (ROOT / file).read_text(), re.M), word


def test_commits_exist():
    if (ROOT / ".git/shallow").exists() or not (ROOT / ".git").exists():
        pytest.skip("without the history nobody knows")
    for commit in set(re.findall(r"`([0-9a-f]{7})`", "".join(TEXTS.values()))):
        subprocess.run(["git", "cat-file", "-e", commit + "^{commit}"], cwd=ROOT, check=True)


def test_commands_have_the_options_that_they_are_given():
    code = "\n".join(TEXTS.values()).replace("\\\n", " ")
    for name, value in re.findall(r'\b([A-Z])="(.*?)"', code):
        code = re.sub(rf"^\${name}\b", value, code, flags=re.M)
    stage = r"(?<![/\w])(?:([a-z]+)\.py|-m toy[ .]?(tiny|tables|play|score|))\b"
    command = r" ?(aio|llava|extend|quality|clip|geneval|dpg|compare|curve|)\b([^`#\n]*--[^`#\n]*)"
    assert len(re.findall(stage + command, code)) > 60
    for file, part, word, rest in re.findall(stage + command, code):
        with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
            importlib.import_module(file or f"toy.{part or 'run'}").main([*word.split(), "--help"])
        for option in re.findall(r"(?<= )--[a-z-]+", rest):
            assert re.search(rf"{option}(?![\w-])", shown.getvalue()), f"{file} {part} {word} {option}"


def test_the_readme_is_short_and_has_both_commands_and_the_code_of_the_method():
    assert len(README.encode()) <= 14_000
    assert re.findall(r"^\.venv/bin/python -m pytest.*", README, re.M) == [".venv/bin/python -m pytest -q"]
    assert ".venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python -m toy\n" in README
    assert re.search(r"```python\n(def .*?)```", README, re.S)[1] in (ROOT / "toy/tiny.py").read_text()
