"""The page of `python -m toy play`, asked over HTTP as a browser asks it, and as an attacker would."""

import base64
import contextlib
import http.client
import io
import json
import re
import shutil
import socket
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image

from common import UserError, read_jsonl, to_images
from encode import encode_text
from sample import ddim
from toy import play, recipe, world

PROMPT = "a large red circle and a blue star top left on light ground"
ASKED = {"prompt": PROMPT, "models": ["TA"], "steps": 3, "guidance": 2, "seed": 1}


@pytest.fixture(scope="module")
def server(toy_paper):
    """Serve the toy paper's checkpoint under two names, on a free port."""
    out, _ = toy_paper
    # The checkpoint names its autoencoder relative to the repository.
    with contextlib.chdir(ROOT):
        painters = play.load_painters({"TA": out / "dit", "TA + IA": out / "dit"})
    with play.Server(0, painters) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def ask(server, method="POST", path="/draw", body=b"", **headers):
    """Send one request; return its status, its headers and its body."""
    usual = {"Host": f"127.0.0.1:{server.port}", "Content-Type": "application/json"}
    headers = usual | {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def draw(server, **changes):
    """Ask for a picture; return the events of the answer."""
    status, headers, content = ask(server, body=json.dumps(ASKED | changes))
    assert status == 200, content
    assert headers["Content-Type"] == "application/x-ndjson"
    return [json.loads(line) for line in content.splitlines()]


def error_line(server, status, **request):
    """Send a request that must be refused with a status; return its one line."""
    got, _, content = ask(server, **request)
    assert got == status, content
    line = json.loads(content)["error"]
    assert line and "\n" not in line and len(line) < 200
    return line


def pixels(url):
    """Return the picture in a data: URL as an array."""
    head, data = url.split(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


# ----------------------------------------------------------------------------------------------------------
# Drawing

def test_two_checkpoints_draw_step_by_step_and_end_with_ddims_picture(server):
    events = draw(server, models=["TA", "TA + IA"])
    model, vae, tokenizer, t5 = server.painters["TA"].pipeline
    cond = encode_text(tokenizer, t5, [PROMPT])
    null = encode_text(tokenizer, t5, [""])
    size = model.config["size"]
    noise = torch.randn(1, model.config["channels"], size, size,
                        generator=torch.Generator().manual_seed(1))
    x_0 = ddim(model, noise, cond, null, steps=3, guidance=2.0)
    expected = np.asarray(to_images(vae.decode(x_0 / vae.scaling_factor))[0], int)

    assert events[0] == {"event": "queued"}
    for model in (0, 1):
        mine = [event for event in events if event.get("model") == model]
        assert [event["event"] for event in mine] == ["begin", "step", "step", "step", "done"]
        steps = mine[1:-1]
        assert [step["step"] for step in steps] == [1, 2, 3]
        assert steps[-1]["t"] == 0 < steps[0]["t"]
        assert np.abs(pixels(steps[-1]["x_0"]) - expected).max() <= 1
        assert (pixels(steps[0]["x_0"]) != pixels(steps[0]["x_t"])).any()
        assert isinstance(mine[-1]["objects"], list)
        assert mine[-1]["verdict"]["right"] in (True, False)


def test_the_detector_and_the_verdict_know_a_drawn_scene():
    circle = {"shape": "circle", "color": "red", "radius": 24, "x": 32, "y": 32}
    image = world.draw({"objects": [circle], "grey": "dark", "background": "plain"})
    right = play.what_the_detector_sees(image, "a red circle")
    assert [(one["color"], one["shape"]) for one in right["objects"]] == [("red", "circle")]
    assert right["verdict"] == {"right": True, "reason": ""}
    x0, y0, x1, y1 = right["objects"][0]["box"]
    assert max(abs(x0 - 10), abs(y0 - 10), abs(x1 - 54), abs(y1 - 54)) <= 2
    wrong = play.what_the_detector_sees(image, "a blue circle")["verdict"]
    assert not wrong["right"] and "blue" in wrong["reason"]
    assert play.what_the_detector_sees(image, "something large")["verdict"] is None


def test_unknown_words_are_said_to_be_unknown_and_spelling_is_forgiven(server):
    events = draw(server, prompt="A red Circle, on a sofa")
    begin = events[1]
    assert begin["prompt"] == "a red circle , on a sofa"
    assert begin["unknown"] == ["sofa"]
    assert events[-1]["event"] == "done"
    # A comma is no word, and no word has the tokens that pad a caption or end it.
    for prompt in ("sofa bed", "sofa bed ,", "<pad>", "</s> .", ", ."):
        assert "none of these words" in error_line(server, 400, body=json.dumps(ASKED | {"prompt": prompt}))


@pytest.mark.parametrize("prompt, include, exclude", [
    ("a red circle", [{"class": "circle", "count": 1, "color": "red"}], []),
    ("a photo of three stars", [{"class": "star", "count": 3}], [{"class": "star", "count": 4}]),
    ("a red star left of a circle",
     [{"class": "circle", "count": 1},
      {"class": "star", "count": 1, "color": "red", "position": ["left of", 0]}], []),
    ("a star above and left of a circle",
     [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]},
      {"class": "star", "count": 1, "position": ["left of", 0]}], []),
    ("a red star top left and a blue circle bottom left on dark ground",
     [{"class": "circle", "count": 1, "color": "blue"},
      {"class": "star", "count": 1, "color": "red", "position": ["above", 0]}], []),
    ("two crosses , a red cross top and a red cross left",
     [{"class": "cross", "count": 2, "color": "red"}], [{"class": "cross", "count": 3}]),
    ("a large red star and a blue circle top left",
     [{"class": "star", "count": 1, "color": "red"}, {"class": "circle", "count": 1, "color": "blue"}], []),
])
def test_a_prompt_is_read_as_genevals_metadata(prompt, include, exclude):
    assert play.metadata_of(prompt) == {"include": include, "exclude": exclude}


@pytest.mark.parametrize("prompt", [
    "a red and a blue star",                            # the red one has no shape
    "a red blue star",
    "five stars",                                       # more than the toy counts
    "2 stars",
    "two red stars and a blue star",                    # three, of two colours
    "a small red star in the top left corner",          # a place in other words
    "a circle on the left of a star",
    "a top left star",
    "left of a star is a circle",
    "a star left of a circle above a square",           # only two things have a relation in the rules
    "a star behind a circle",
    "a red circle on a sofa",
    "dark ground",
])
def test_what_is_not_understood_is_not_judged(prompt):
    assert play.metadata_of(prompt) is None


def test_a_caption_of_the_toys_world_is_understood(toy_paper):
    for row in read_jsonl(toy_paper[0] / "captions.jsonl"):
        asked = play.metadata_of(row["caption"])
        shape = row["file"].split("/")[0]
        assert [clause["class"] for clause in asked["include"]] == [shape]


def test_the_toys_own_prompts_are_read_as_their_metadata_says(toy_paper):
    """The world wrote the metadata beside its prompts; here they are read from the words alone."""
    for kind in ("short", "long"):
        for row in read_jsonl(toy_paper[0] / f"prompts-{kind}.jsonl"):
            read = play.metadata_of(row["prompt"])
            assert read["exclude"] == row.get("exclude", [])
            for clause in row["include"]:
                same = [one for one in read["include"] if clause.items() <= one.items()]
                # A target's number in the list is the same: it comes first in both.
                assert same, (row["prompt"], clause, read)


def test_requests_are_drawn_one_at_a_time_and_the_rest_queue(server, monkeypatch):
    busy = []
    most = []
    draw_all = play.draw_all

    def counted(job):
        busy.append(job)
        most.append(len(busy))
        draw_all(job)
        busy.remove(job)

    monkeypatch.setattr(play, "draw_all", counted)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(draw(server))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [events[-1]["event"] for events in answers] == ["done"] * 3
    assert most == [1, 1, 1]


def test_a_full_queue_refuses_and_goes_on_afterwards(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(play, "draw_all", lambda job: gate.wait())
    studio = play.Studio()
    jobs = [play.Job(ASKED, []) for _ in range(play.MAX_WAITING + 2)]
    # At most one job is being drawn, MAX_WAITING wait: one of these finds no place.
    with pytest.raises(play.BadRequest, match="wait already"):
        for job in jobs:
            studio.submit(job)
    gate.set()
    assert jobs[0].events.get(timeout=60) is None
    assert jobs[play.MAX_WAITING - 1].events.get(timeout=60) is None


def test_who_has_gone_holds_no_place_in_the_queue(server, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(play, "draw_all", lambda job: gate.wait())
    body = json.dumps(ASKED).encode()
    head = (f"POST /draw HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n").encode()

    def asked():
        """Ask for a picture; return the connection, once the server has accepted the request."""
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        connection.sendall(head + body)
        answer = b""
        while b"queued" not in answer and b"503" not in answer:
            answer += connection.recv(65536)
        return connection, b"queued" in answer

    # One is being drawn, the others fill the queue.
    try:
        pages = [asked()[0] for _ in range(play.MAX_WAITING + 1)]
        refused_page, accepted = asked()
        assert not accepted
        for page in [*pages, refused_page]:
            page.close()
        time.sleep(0.5)
        late, accepted = asked()
        assert accepted
        late.close()
    finally:
        gate.set()


def test_two_threads_never_use_the_tokenizer_at_once():
    inside = []
    most = []

    def slow(text):
        inside.append(text)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()

    slow.unk_token_id = 2
    shared = play.SharedTokenizer(slow)
    threads = [threading.Thread(target=shared, args=("ring",)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    assert shared.unk_token_id == 2


def test_all_threads_share_the_tokenizer_of_a_text_encoder(server):
    tokenizers = {id(painter.pipeline.tokenizer) for painter in server.painters.values()}
    assert len(tokenizers) == 1
    assert isinstance(server.painters["TA"].pipeline.tokenizer, play.SharedTokenizer)


def test_checkpoints_that_share_encoders_are_checked_one_by_one(toy_paper, tmp_path):
    out, _ = toy_paper
    shutil.copytree(out / "dit", tmp_path / "dit")
    config = json.loads((tmp_path / "dit/config.json").read_text())
    config["training"]["T5"] = "0123456789abcdef"
    (tmp_path / "dit/config.json").write_text(json.dumps(config))
    with contextlib.chdir(ROOT), pytest.raises(UserError, match="0123456789abcdef"):
        play.load_painters({"TA": out / "dit", "other": tmp_path / "dit"})


def test_nobody_draws_for_a_closed_page(server):
    job = play.Job(ASKED, [server.painters["TA"]])
    job.abandoned.set()
    play.draw_one(job, 0, 1)
    assert job.events.get_nowait()["event"] == "begin"
    assert job.events.empty()


# ----------------------------------------------------------------------------------------------------------
# What must be refused

@pytest.mark.parametrize("changes, words", [
    ({"prompt": ""}, "empty"),
    ({"prompt": " \n\t "}, "empty"),
    ({"prompt": "a red circle " * 160}, "at most 2000"),
    ({"prompt": 7}, "text"),
    ({"prompt": "a red \x00 circle"}, "cannot be printed"),
    ({"prompt": "a red \ud800 circle"}, "cannot be printed"),
    ({"models": []}, "choose"),
    ({"models": ["../../etc/passwd"]}, "none of this name"),
    ({"models": [["TA"]]}, "none of this name"),
    ({"models": ["TA", "TA"]}, "twice"),
    ({"models": ["TA"] * 5}, "choose"),
    ({"steps": 0}, "steps"),
    ({"steps": 10 ** 9}, "steps"),
    ({"steps": 2.5}, "steps"),
    ({"steps": True}, "steps"),
    ({"guidance": float("nan")}, "guidance"),
    ({"guidance": "3"}, "guidance"),
    ({"seed": -1}, "seed"),
    ({"seed": None}, "seed"),
])
def test_settings_that_mean_nothing_get_one_line(server, changes, words):
    assert words in error_line(server, 400, body=json.dumps(ASKED | changes))


@pytest.mark.parametrize("body, status, words", [
    (b"", 400, "not JSON"),
    (bytes(range(256)), 400, "not JSON"),
    (b"[" * 8000, 400, "not JSON"),
    (b'"a red circle"', 400, "object"),
    (b"x" * 3_000_000, 413, "too large"),
])
def test_hostile_bodies_get_one_line_and_the_server_lives_on(server, body, status, words):
    assert words in error_line(server, status, body=body)
    assert draw(server, steps=1)[-1]["event"] == "done"


def test_a_body_without_a_length_is_refused(server):
    assert "length" in error_line(server, 411, body=iter([b"{}"]), Transfer_Encoding="chunked")


def test_text_is_never_read_as_html(server):
    """Tags come back only inside JSON, and the page has no function that would make markup of them."""
    hostile = "a red circle <script>alert(1)</script> <img src=x onerror=alert(2)>"
    status, headers, content = ask(server, body=json.dumps(ASKED | {"prompt": hostile, "steps": 1}))
    assert status == 200
    assert headers["Content-Type"] == "application/x-ndjson"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "<script>alert(1)</script>" in json.loads(content.splitlines()[1])["unknown"]
    page = play.PAGE.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|srcdoc", page)


@pytest.mark.parametrize("headers", [
    {"Host": "evil.example"},
    {"Host": "evil.example:8000"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
])
def test_pages_from_elsewhere_are_refused(server, headers):
    """Other names for this computer (DNS rebinding) and other pages' scripts reach nothing."""
    for request in ({"method": "GET", "path": "/"}, {"method": "GET", "path": "/world"},
                    {"body": json.dumps(ASKED)}):
        error_line(server, 403, **request, **headers)


def test_a_foreign_forms_type_is_refused(server):
    """A form on another page can send text/plain without asking; JSON it cannot."""
    assert "json" in error_line(server, 415, body=json.dumps(ASKED), Content_Type="text/plain")


@pytest.mark.parametrize("path", ["/draw", "/../../../../etc/passwd", "/%2e%2e/common.py", "/toy/play.py",
                                  "//127.0.0.1/", "/world/", "/\\windows"])
def test_no_path_leads_to_a_file(server, path):
    error_line(server, 404, method="GET", path=path)


def test_bytes_that_are_no_http_do_not_stop_the_server(server):
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/1.1\r\n\r\n", b"A" * 70_000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                assert b" 200 " not in connection.recv(65536)
    assert draw(server, steps=1)[-1]["event"] == "done"


# ----------------------------------------------------------------------------------------------------------
# The page and the command

def test_the_page_is_one_file_that_loads_nothing_from_elsewhere(server):
    status, headers, content = ask(server, method="GET", path="/?prompt=a+red+circle")
    page = content.decode()
    assert status == 200
    assert content == play.PAGE.read_bytes()
    assert re.findall(r"https?://[^\"' ]*", page) == ["http://www.w3.org/2000/svg"]     # a name, no address
    assert not re.search(r"<(link|iframe|object|embed)\b|\bimport\b|@import|\bsrc=|\bhref=", page)
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_the_page_learns_the_worlds_words_and_checkpoints(server):
    status, _, content = ask(server, method="GET", path="/world")
    known = json.loads(content)
    assert status == 200
    assert known["shapes"] == world.SHAPES
    assert set(known["colors"]) == set(world.COLORS)
    assert known["steps"] == recipe.SAMPLE_STEPS
    assert [model["name"] for model in known["models"]] == ["TA", "TA + IA"]
    assert all(model["toy"] for model in known["models"])
    assert "circle" in known["words"] and "sofa" not in known["words"]


# Enough of a browser for the page's script: elements that remember, sliders that keep their bounds.
BROWSER = """
class Element {
  constructor(id) { Object.assign(this, { id, dataset: {}, style: {}, children: [], text: "" }); }
  get value() { return this.text; }
  set value(value) {
    const [low, high] = { steps: [2, 100], guidance: [0, 15] }[this.id] || [-Infinity, Infinity];
    this.text = isNaN(Number(value)) ? value : String(Math.min(high, Math.max(low, Number(value))));
  }
  get nextElementSibling() { return document.getElementById(this.id + "-output"); }
  get classList() { return { toggle() {} }; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  setAttribute() {}
}
const elements = {};
const document = {
  getElementById: id => elements[id] ||= new Element(id),
  createElement: tag => new Element(tag),
  createElementNS: (namespace, tag) => new Element(tag),
  querySelectorAll: selector => selector === "#models input:checked" ? [{ value: "TA" }] : [],
};
const model = { name: "TA", kind: "", folder: "", toy: false, pixels: 256 };
const about = { models: [model], words: [], steps: 50, guidance: 8 };
const bodies = [];
let reply;
async function fetch(path, options) {
  if (path === "/world") return { json: async () => about };
  bodies.push(JSON.parse(options.body));
  return reply(options);
}
const location = { search: SEARCH };
const pause = milliseconds => new Promise(done => setTimeout(done, milliseconds));
const refusal = () => ({ ok: false, json: async () => ({ error: "8 requests wait already" }) });
const line = { event: "step", model: 0, step: 1, of: 2, t: 0.5, x_t: "", x_0: "" };

// The answer to a request: one step, and no more until the page aborts it.
function unfinished({ signal }) {
  const pieces = [new TextEncoder().encode(JSON.stringify(line) + "\\n")];
  const aborted = new Promise((_, fail) => {
    signal.addEventListener("abort", () => fail(Object.assign(new Error(), { name: "AbortError" })));
  });
  const read = async () => pieces.length ? { done: false, value: pieces.pop() } : aborted;
  return { ok: true, body: { getReader: () => ({ read }) } };
}
"""


def in_the_page(what_happens, search=""):
    """Run the page's script and then `what_happens` in node; return what that puts out as JSON."""
    node = shutil.which("node")
    if not node:
        pytest.skip("node runs the page's script")
    script = re.search(r"<script>(.*)</script>", play.PAGE.read_text(), re.DOTALL)[1]
    whole = (f"{BROWSER.replace('SEARCH', json.dumps(search))}\nreply = refusal;\n{script}\n"
             f"(async () => {{ await pause(50); {what_happens} }})();")
    done = subprocess.run([node, "-e", whole], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_key_held_down_on_the_seed_asks_for_one_picture():
    bodies = in_the_page("""
        for (let seed = 1; seed <= 5; seed++) {
            $("seed-slider").value = seed;
            $("seed-slider").oninput();
            $("seed-slider").onchange();
            await pause(20);
        }
        await pause(300);
        console.log(JSON.stringify(bodies));""")
    assert [body["seed"] for body in bodies] == [5]


def test_the_page_shows_the_steps_that_it_asks_for():
    shown, asked = in_the_page("""
        console.log(JSON.stringify([$("steps-output").textContent, bodies[0].steps]));""",
                               "?prompt=a&steps=999")
    assert shown == "100" and asked == 100


def test_after_an_aborted_and_a_refused_picture_the_first_one_can_be_replayed():
    disabled = in_the_page("""
        reply = unfinished;
        draw();
        await pause(50);
        reply = refusal;
        await draw();
        console.log(JSON.stringify([$("frame").disabled, $("play").disabled]));""")
    assert disabled == [False, False]


def test_without_a_toy_there_is_no_prompt_by_chance():
    assert in_the_page('console.log(JSON.stringify($("surprise").hidden));') is True


def test_a_long_prompt_is_left_to_the_server_which_says_what_is_wrong():
    assert "maxLength" not in play.PAGE.read_text()


def test_only_this_computer_is_served(server):
    assert server.server_address[0] == "127.0.0.1"


def test_checkpoints_are_found_and_named(toy_paper, tmp_path):
    """The toy's text encoder lies beside its checkpoint and is none."""
    out, _ = toy_paper
    assert play.found_checkpoints([out, tmp_path]) == {"dit": out / "dit"}
    run = tmp_path / "runs/dit-long-seed0/checkpoint"
    shutil.copytree(out / "dit", run)
    shutil.copytree(out / "dit", run / "step-0000008")
    assert play.found_checkpoints([out, tmp_path]) == {"dit": out / "dit", "dit-long-seed0": run}
    named = play.named_checkpoints([f"TA + IA={out}/dit", str(out / "dit"), "Someone/CAD-I"])
    assert named == {"TA + IA": f"{out}/dit", "dit": str(out / "dit"), "CAD-I": "Someone/CAD-I"}


def test_mistakes_end_in_one_line(server, toy_paper, tmp_path):
    out, _ = toy_paper
    line = refused("toy.play", "--out", tmp_path)
    assert "no checkpoint" in line and f"python -m toy --out {tmp_path}" in line
    assert "two are called dit" in refused("toy.play", "--checkpoint", "a/dit", "--checkpoint", "b/dit")
    assert "--port" in refused("toy.play", "--out", out, "--port", 70000)
    with contextlib.chdir(ROOT):
        line = refused("toy.play", "--out", out, "--port", server.port)
    assert "in use" in line and "--port" in line
