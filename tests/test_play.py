"""The page: its frames are the sampler's own, words it does not know are named, and what it refuses."""

import http.client
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from common import read_json
from encode import to_images
from model_dit import DiT
from toy import play
from toy.world import draw

ASKED = {"prompt": play.EXAMPLES[0], "steps": 11, "guidance": 1.5, "seed": 7}


@pytest.fixture(scope="module")
def server(toy_paper, tmp_path_factory):
    """Serve the page with the toy paper's checkpoint, and a random one of larger pictures."""
    small = toy_paper[0] / "dit"
    large = tmp_path_factory.mktemp("large")
    config = read_json(small / "config.json", "a checkpoint")
    config["args"]["size"] = 10
    sample.save_checkpoint(large, DiT(**config["args"]), config)
    checkpoints = [play.load_checkpoint(f"small={small}"), play.load_checkpoint(f"large={large}")]
    with play.Server(0, checkpoints) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def ask(server, query="", method="POST", path="/draw", **headers):
    """Send one request and return (status, text of the answer)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    query = query if isinstance(query, str) else urlencode(query)
    connection.request(method, f"{path}?{query}", headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def pixels(url):
    """Return the pixels of a PNG in a data: URL."""
    return np.asarray(Image.open(urlopen(url))).astype(int)


def test_the_frames_go_from_pure_noise_to_the_picture_that_sample_py_makes(server):
    own = f"http://127.0.0.1:{server.server_port}"
    small, large = json.loads(ask(server, ASKED, Origin=own)[1])
    frames = small["frames"]
    assert [frame["t"] for frame in frames] == pytest.approx([1 - i / 11 for i in range(12)])

    _, pipeline = server.checkpoints[0]
    picture = sample.generate(pipeline, [ASKED["prompt"]], [7], 11, 1.5)[0]
    assert (pixels(frames[-1]["x_0"]) == np.asarray(picture)).all()
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(7))
    noise = to_images(pipeline.vae.decode(noise / pipeline.vae.scaling_factor).detach())[0]
    assert abs(pixels(frames[0]["x_t"]) - np.asarray(noise)).max() <= 1

    # Large pictures take long to decode, and are not the detector's.
    assert len(large["frames"]) == 7 and pixels(large["frames"][0]["x_t"]).shape == (80, 80, 3)
    assert "objects" in small and "objects" not in large


def test_the_page_shows_what_the_detector_sees(server, monkeypatch):
    circle = {"shape": "circle", "color": "red", "radius": 24, "x": 32, "y": 32}
    picture = draw({"grey": "dark", "background": "plain", "objects": [circle]})
    monkeypatch.setattr(play, "draw_frames", lambda *_: [(0.0, picture, picture)])
    objects = json.loads(ask(server, ASKED)[1])[0]["objects"]
    (thing,) = objects["circle"]
    assert (list(objects), thing["color"]) == (["circle"], "red")
    assert np.allclose(thing["box"], [10, 10, 54, 54], atol=1)


def test_words_are_read_as_captions_have_them_and_strange_ones_are_named(server):
    tokenizer = server.checkpoints[0][1].tokenizer
    read = play.as_read("A Large red circle on dark dragons.", tokenizer)
    assert read == ("a large red circle on dark dragons", ["dragons"])
    assert play.as_read("An image of circle", tokenizer) == ("An image of circle", [])
    # Half a character, and what is no text at all.
    strange = json.loads(ask(server, "prompt=a+%ED%A0%BD+%00&steps=1&guidance=0&seed=0")[1])[0]
    assert len(strange["unknown"]) == 2 and len(strange["frames"]) == 2


def test_a_second_request_waits_until_the_first_one_is_drawn(server, monkeypatch):
    log = []
    monkeypatch.setattr(play, "draw", lambda _, seed, **others: (log.append(seed), time.sleep(0.05)))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: ask(server, {**ASKED, "seed": seed}), (1, 2)))
    assert log in ([1, 1, 2, 2], [2, 2, 1, 1])


@pytest.mark.parametrize("status, words, asked", [
    (403, "own page", {"Host": "evil.example"}),
    (403, "own page", {"Origin": "http://evil.example"}),
    (404, "no such page", {"method": "GET", "path": "/../play.py"}),
    (414, "too long", {"query": "a" * 70_000}),
    (400, "no 'prompt'", {"query": "&%ff=%00"}),
    (400, "no 'prompt'", {"query": {**ASKED, "prompt": ""}}),
    (400, "1 to 1000 characters", {"query": {**ASKED, "prompt": " "}}),
    (400, "1 to 1000 characters", {"query": {**ASKED, "prompt": "a" * 1001}}),
    (403, "own page", {"Host": "127.0.0.1:1"}),
    (400, "steps: not as the field", {"query": {**ASKED, "steps": "1.5"}}),
    (400, "must be at least 0", {"query": {**ASKED, "guidance": "nan"}}),
])
def test_what_the_page_itself_would_not_ask_is_refused_in_one_line(server, status, words, asked):
    found, line = ask(server, **{"query": ASKED, **asked})
    assert (found, line.count("\n"), words in line) == (status, 1, True), line


def test_the_page_is_for_this_computer_alone_and_loads_nothing_from_elsewhere(server):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(OSError, match=f"Address already in use: '--port {server.server_port}'"):
        play.Server(server.server_port, [])
    _, page = ask(server, method="GET", path="/", query="prompt=a+red+circle")
    assert "<h1>" in page and not re.search(r"https?:|src=|@import|innerHTML", page)
    about = json.loads(ask(server, method="GET", path="/about")[1])
    assert [known["name"] for known in about["checkpoints"]] == ["small", "large"]
    for known in about["checkpoints"]:
        assert known["training"]["TA"] and known["training"]["IA"] and known["training"]["tau"] == 0.4
