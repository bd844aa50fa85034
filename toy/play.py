"""A page to watch a checkpoint think: type a prompt, see the picture appear out of the noise, step by step.

    python -m toy play
    python -m toy play --checkpoint "TA=out/ta" --checkpoint "TA + IA=out/toy/dit"

Opens a small web server for this computer only (127.0.0.1) and prints the page's address. Beside the noisy
picture x_t stands the network's estimate of the clean one, x_0. Several checkpoints draw the same prompt from
the same noise side by side. On toy pictures the page shows what the detector sees and GenEval's verdict. Any
checkpoint that sample.py can read works, the real ones too, only slower and without a detector.
"""

import argparse
import base64
import errno
import functools
import io
import json
import math
import os
import queue
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image

from common import (HelpFormatter, UserError, between, command_line, local_device, one_line,
                    read_json, to_images)
from encode import encode_text, load_text_encoder, load_vae
from evaluate import geneval_verdict
from sample import MODELS, TEXT_ENCODER, VAE, batch_texts, gamma, load_model
from toy.detector import detect
from toy.world import BACKGROUNDS, COLORS, GREYS, PLACES, SHAPES, SIZE

PAGE = Path(__file__).with_suffix(".html")
MAX_BODY = 8192             # bytes of a request
MAX_DISCARDED = 2 ** 20     # bytes of a refused request that are read away before it is answered
MAX_PROMPT = 500            # characters
MAX_STEPS = 250
MAX_GUIDANCE = 30
MAX_MODELS = 4              # checkpoints that draw side by side
MAX_WAITING = 8             # requests that may wait while one is being drawn
CLAMP = 1.2                 # bound of |x_0|, as sample.py's


# ----------------------------------------------------------------------------------------------------------
# What a prompt asks for, as GenEval's metadata

NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
# The phrases that say where a thing stands -> column and row of a 3 x 3 grid.
WHERE = {phrase: place for place, phrase in PLACES.items()}
WHERE |= {"on the left": (0, 1), "on the right": (2, 1), "on the top": (1, 0), "on the bottom": (1, 2)}


def asked_for(prompt):
    """Return what a prompt in the toy's words asks for, as one line of GenEval's metadata, or None.

    "a red circle above two stars" -> {"include": [{"class": "star", "count": 2},
    {"class": "circle", "count": 1, "color": "red", "position": ["above", 0]}], "exclude": [...]}.
    None: no shape is named, or one is named twice, which GenEval's rules cannot tell apart.
    """
    things = mentioned(prompt.split())
    shapes = [thing["class"] for thing in things]
    if not shapes or len(set(shapes)) < len(shapes):
        return None

    clauses = [{key: thing[key] for key in ("class", "count", "color") if key in thing} for thing in things]
    exclude = []
    for clause in clauses:
        if clause["count"] > 1:
            exclude.append({"class": clause["class"], "count": clause["count"] + 1})
    metadata = {"include": clauses, "exclude": exclude}

    # A place relates two things. GenEval wants the one that is placed behind the one it is related to.
    if len(things) == 2:
        placed, relations = relation_between(prompt, *things)
        if relations:
            include = [clauses[1 - placed]]
            for relation in relations:
                include.append({**clauses[placed], "position": [relation, 0]})
            metadata["include"] = include
    return metadata


def mentioned(words):
    """Return the things that words name, in order: dicts with `class`, `count`, perhaps `color`, `word`.

    `word` is the index of the shape's own word.
    """
    singular = {}
    for shape in SHAPES:
        singular |= {shape: shape, shape + "s": shape, shape + "es": shape}
    things = []
    color = None
    count = 1
    for index, word in enumerate(words):
        if word in COLORS:
            color = word
        elif word in NUMBERS:
            count = NUMBERS[word]
        elif word in singular:
            thing = {"class": singular[word], "count": count, "word": index}
            if color:
                thing["color"] = color
            things.append(thing)
            # The next thing has a colour and a number of its own.
            color = None
            count = 1
    return things


def relation_between(prompt, first, second):
    """Return which of two things is placed (0 or 1), and its relations to the other: (0, ["left of"])."""
    words = prompt.split()
    before = " ".join(words[:first["word"]])
    between_them = " ".join(words[first["word"] + 1:second["word"]])
    after = " ".join(words[second["word"] + 1:])

    for relation in RELATIONS:
        if between_them.startswith(relation):
            return 0, [relation]
    # A phrase belongs to the thing it follows, or to the first one if the prompt begins with it.
    for placed, text in ((0, before), (0, between_them), (1, after)):
        for phrase, (column, row) in WHERE.items():
            if text.startswith(phrase):
                sideways = {0: ["left of"], 2: ["right of"]}.get(column, [])
                upwards = {0: ["above"], 2: ["below"]}.get(row, [])
                return placed, sideways + upwards
    return 0, []


def what_the_detector_sees(image, prompt):
    """Return the objects found in a toy picture and GenEval's verdict on it, ready to be sent as JSON.

    `verdict` is None where the prompt asks for nothing that GenEval's rules can check.
    """
    found = detect(image)
    objects = []
    for shape, things in found.items():
        for thing in things:
            box = [int(edge) for edge in thing["box"]]
            objects.append({"shape": shape, "color": thing["color"], "box": box,
                            "score": round(float(thing["score"]), 2)})
    verdict = None
    metadata = asked_for(prompt)
    if metadata:
        right, reason = geneval_verdict(found, metadata, lambda thing, shape: thing["color"])
        # A thing in a corner has two clauses, one for each direction, and may fail both alike.
        faults = dict.fromkeys(reason.split("; "))
        verdict = {"right": bool(right), "reason": "; ".join(faults)}
    return {"objects": objects, "verdict": verdict}


# ----------------------------------------------------------------------------------------------------------
# Checkpoints

class Painter:
    """A checkpoint with its autoencoder and its text encoder: draws one picture, showing each step."""

    def __init__(self, name, folder, device):
        """Load a checkpoint that sample.py can read, from a folder or the hub. Raises UserError."""
        self.name = name
        self.folder = str(folder)
        self.model = load_model(folder, device)
        source = self.model.checkpoint
        self.vae = shared_vae(source.get("vae") or VAE, device)
        self.tokenizer, self.t5 = shared_text_encoder(source.get("text_encoder") or TEXT_ENCODER, device)
        self.pixels = self.model.config["size"] * self.vae.downscale
        # The toy's detector knows the toy's pictures only. Its checkpoints are known by their words.
        words = self.tokenizer.get_vocab()
        of_the_toy = all(word in words for word in [*SHAPES, *COLORS])
        self.is_toy = of_the_toy and self.pixels == SIZE

    def about(self):
        """Return what the page shows of a checkpoint."""
        training = self.model.checkpoint.get("training") or {}
        kind = "TA" if training.get("TA") else ""
        if training.get("IA"):
            kind = f"{kind} + IA".removeprefix(" + ")
        return {"name": self.name, "kind": kind, "folder": self.folder, "toy": self.is_toy,
                "pixels": self.pixels}

    def unknown_words(self, prompt):
        """Return the words of a prompt that the tokenizer has no token for, each once."""
        unknown = []
        for word in prompt.split():
            tokens = self.tokenizer(word, add_special_tokens=False).input_ids
            if self.tokenizer.unk_token_id in tokens and word not in unknown:
                unknown.append(word)
        return unknown

    @torch.no_grad()
    def draw(self, prompt, steps, guidance, seed, show):
        """Draw one picture and return it (PIL).

        After each step `show(step, t, noisy, clean)` gets the pictures (PIL) of x_t and of the estimate of
        x_0; for large pictures, which take long to decode, only after some of the steps.
        """
        # Two checkpoints on a thread each are faster than one after the other on two threads.
        device = self.vae.quant_conv.weight.device
        cond = encode_text(self.tokenizer, self.t5, [prompt])
        null = encode_text(self.tokenizer, self.t5, [""])
        shape = (1, self.model.config["channels"], self.model.config["size"], self.model.config["size"])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        every = 1 if self.pixels <= 64 else math.ceil(steps / 10)
        image = None
        for step, t, x_t, x_0 in denoise(self.model, noise, cond, null, steps, guidance, CLAMP):
            if step % every == 0 or step == steps:
                both = torch.cat([x_t, x_0]).float()
                noisy, image = to_images(self.vae.decode(both / self.vae.scaling_factor))
                show(step, t, noisy, image)
        return image


@functools.cache
def shared_vae(path_or_repo, device):
    """Return an autoencoder, which several checkpoints may share."""
    return load_vae(path_or_repo, device)


@functools.cache
def shared_text_encoder(path_or_repo, device):
    """Return a tokenizer and its T5 encoder, which several checkpoints may share."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_text_encoder(path_or_repo, device, dtype)


def denoise(model, noise, cond, null, steps, guidance, clamp):
    """Yield (step, t, x_t, x_0) after each step of sample.ddim, for one picture."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    x = noise.double()
    one = torch.ones(1, device=noise.device)
    caption = model.condition(*cond, one)
    both = model.condition(*batch_texts(cond, null, 1), torch.cat([one, 0 * one]))
    state = None
    for i in range(steps):
        g = gamma(t[i])
        g_next = gamma(t[i + 1])
        if guidance and i > 0:
            eps, state = model.denoise(torch.cat([x, x]).float(), g.float().expand(2), both, state)
            eps_cond, eps_null = eps.double().chunk(2)
            eps = eps_cond + guidance * (eps_cond - eps_null)
        else:
            eps, state = model.denoise(x.float(), g.float().expand(1), caption, state)
            eps = eps.double()
            if guidance and state is not None:
                state = torch.cat([state, state])
        x_0 = (x - (1 - g).sqrt() * eps) / g.sqrt()
        x_0 = x_0.clamp(-clamp, clamp)
        eps = (x - g.sqrt() * x_0) / (1 - g).sqrt()
        x = g_next.sqrt() * x_0 + (1 - g_next).sqrt() * eps
        yield i + 1, float(t[i + 1]), x, x_0


def named_checkpoints(words):
    """Return {name: folder} for the values of --checkpoint, each FOLDER or NAME=FOLDER. Raises UserError."""
    named = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or "/" in name or Path(word).exists():
            folder = word
            name = Path(word).name or word
        if not name.strip() or not folder:
            raise UserError(f"--checkpoint {word}: neither FOLDER nor NAME=FOLDER")
        if name in named:
            raise UserError(f"--checkpoint {word}: two are called {name}: give names, NAME=FOLDER")
        named[name] = folder
    return named


def found_checkpoints(out):
    """Return {name: folder} for the checkpoints in the toy's folder, its own run `dit` first.

    Raises UserError if there are none.
    """
    named = {}
    for file in sorted(Path(out).glob("**/config.json")):
        folder = file.parent
        # step-0050000 and the like are earlier states of a run that is in the list itself.
        if folder.name.startswith("step-") or not (folder / "model.safetensors").exists():
            continue
        # A text encoder has the same two files, but no `model` of ours in its config.json.
        if read_json(file, "a config.json").get("model") in MODELS:
            named[folder.relative_to(out).as_posix()] = folder
    if not named:
        raise UserError(f"{out}: no checkpoint there: `python -m toy --out {out}` trains one in minutes "
                        "(or give --checkpoint)")
    return dict(sorted(named.items(), key=lambda item: item[0] != "dit"))


# ----------------------------------------------------------------------------------------------------------
# Requests: checked first, then drawn one after the other

class BadRequest(Exception):
    """A request that is refused, with the HTTP status that says so and one line for its sender."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


def parse_request(body, painters):
    """Return the settings in a request's JSON body, all of them checked. Raises BadRequest.

    They are `prompt`, `models` (names), `steps`, `guidance` and `seed`.
    """
    try:
        request = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise BadRequest(400, "the request is not JSON in UTF-8") from None
    if not isinstance(request, dict):
        raise BadRequest(400, "the request is not a JSON object")

    prompt = request.get("prompt")
    if not isinstance(prompt, str):
        raise BadRequest(400, "prompt: must be text")
    if not prompt.strip():
        raise BadRequest(400, "the prompt is empty: type one, or click one together")
    if len(prompt) > MAX_PROMPT:
        raise BadRequest(400, f"the prompt has {len(prompt)} characters: at most {MAX_PROMPT} are read")
    if not all(character.isprintable() or character.isspace() for character in prompt):
        raise BadRequest(400, "the prompt has characters that cannot be printed")

    names = request.get("models")
    if not isinstance(names, list) or not 1 <= len(names) <= MAX_MODELS:
        raise BadRequest(400, f"checkpoints: choose one to {MAX_MODELS} of them")
    for name in names:
        if not isinstance(name, str) or name not in painters:
            raise BadRequest(400, "checkpoints: there is none of this name")
    if len(set(names)) < len(names):
        raise BadRequest(400, "checkpoints: one is named twice")

    return {"prompt": prompt, "models": names,
            "steps": number(request, "steps", int, 1, MAX_STEPS),
            "guidance": number(request, "guidance", (int, float), 0, MAX_GUIDANCE),
            "seed": number(request, "seed", int, 0, 2 ** 31 - 1)}


def number(request, name, kind, low, high):
    """Return a number of a request. Raises BadRequest if it is none, of another kind, or out of bounds."""
    value = request.get(name)
    # True is an int to Python, and NaN fails both comparisons.
    valid = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    if not valid:
        raise BadRequest(400, f"{name}: must be a number from {low} to {high}")
    return value


def as_read(prompt, painter):
    """Return a prompt as its text encoder should read it, and which of its words it does not know.

    The toy's words are lower case with spaces around commas and full stops. Raises BadRequest if no word
    is known.
    """
    prompt = " ".join(prompt.split())
    if painter.is_toy:
        for mark in (",", "."):
            prompt = prompt.replace(mark, f" {mark} ")
        prompt = " ".join(prompt.lower().split())
    unknown = painter.unknown_words(prompt)
    if all(word in unknown for word in prompt.split()):
        raise BadRequest(400, f"{painter.name} knows none of these words")
    return prompt, unknown


class Job:
    """A request on its way: where its events go, and whether anybody still wants them."""

    def __init__(self, settings, painters):
        self.settings = settings
        self.painters = painters
        self.events = queue.Queue()
        self.abandoned = threading.Event()


class Abandoned(Exception):
    """Nobody waits for this picture any more."""


class Studio:
    """Draws one request at a time, in the order of their arrival, in a thread of its own."""

    def __init__(self):
        self.jobs = queue.Queue(maxsize=MAX_WAITING)
        threading.Thread(target=self.work, daemon=True).start()

    def submit(self, job):
        """Put a job at the end of the queue. Raises BadRequest if too many wait already."""
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            raise BadRequest(503, f"{MAX_WAITING} requests wait already: try again in a moment") from None

    def work(self):
        """Draw the jobs for ever. The event None ends each."""
        while True:
            job = self.jobs.get()
            if not job.abandoned.is_set():
                draw_all(job)
            job.events.put(None)


def draw_all(job):
    """Let all checkpoints of a job draw at the same time, each in a thread, and wait for them."""
    threads = []
    cores = max(1, (os.cpu_count() or 1) // len(job.painters))
    for index in range(len(job.painters)):
        threads.append(threading.Thread(target=draw_one, args=(job, index, cores), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def draw_one(job, index, cores):
    """Let checkpoint number `index` of a job draw; put each step and the result into the job's events."""
    painter = job.painters[index]
    settings = job.settings
    torch.set_num_threads(cores)

    def show(step, t, noisy, clean):
        if job.abandoned.is_set():
            raise Abandoned
        job.events.put({"event": "step", "model": index, "step": step, "of": settings["steps"],
                        "t": round(t, 4), "x_t": as_data_url(noisy), "x_0": as_data_url(clean)})

    try:
        began = time.perf_counter()
        prompt, unknown = as_read(settings["prompt"], painter)
        job.events.put({"event": "begin", "model": index, "prompt": prompt, "unknown": unknown})
        image = painter.draw(prompt, settings["steps"], settings["guidance"], settings["seed"], show)
        seconds = time.perf_counter() - began
        seen = what_the_detector_sees(image, prompt) if painter.is_toy else {}
        job.events.put({"event": "done", "model": index, "seconds": round(seconds, 2), **seen})
    except Abandoned:
        pass
    # The page must hear of any failure, and the next request must find a server that still runs.
    except Exception as error:  # noqa: BLE001
        job.events.put({"event": "error", "model": index, "error": one_line(error)})


def as_data_url(image):
    """Return a PIL image as a PNG in a data: URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# ----------------------------------------------------------------------------------------------------------
# The server

# The page may run its own script and talk to this server; nothing from elsewhere is loaded.
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Server(ThreadingHTTPServer):
    """The page's server: on 127.0.0.1, a thread for each connection, one studio for all."""

    daemon_threads = True

    def __init__(self, port, painters):
        """Bind to a port (0: any free one). Raises UserError if it is in use."""
        self.painters = painters
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(f"--port {port}: {error.strerror.lower()}: choose another one") from None
            raise
        self.port = self.server_address[1]
        self.studio = Studio()

    def handle_error(self, request, client_address):
        """Say nothing when a browser closes a connection early."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET / (the page), GET /world (its words and checkpoints) and POST /draw (events, NDJSON)."""

    protocol_version = "HTTP/1.1"
    server_version = "toy"
    sys_version = ""
    timeout = 30                            # seconds that a silent connection is kept
    body_was_read = False
    error_content_type = "text/plain"
    error_message_format = "%(message)s\n"

    def do_GET(self):
        """Answer with the page, or with what it needs to know."""
        try:
            self.check_origin()
            path = urlsplit(self.path).path
            if path == "/":
                self.reply(200, "text/html; charset=utf-8", PAGE.read_bytes())
            elif path == "/world":
                self.reply_json(200, about(self.server.painters))
            else:
                raise BadRequest(404, "no such page")
        except (BadRequest, ValueError) as error:
            self.refuse(error)

    def do_POST(self):
        """Draw: check the request, queue it, and send what happens as it happens."""
        try:
            self.check_origin()
            if urlsplit(self.path).path != "/draw":
                raise BadRequest(404, "no such page")
            settings = parse_request(self.read_body(), self.server.painters)
            painters = [self.server.painters[name] for name in settings["models"]]
            for painter in painters:
                as_read(settings["prompt"], painter)
            job = Job(settings, painters)
            self.server.studio.submit(job)
        except (BadRequest, ValueError) as error:
            self.refuse(error)
            return
        self.stream(job)

    def check_origin(self):
        """Refuse requests that do not come from this server's own page. Raises BadRequest.

        A page elsewhere can make a browser send requests here, under another host's name (DNS rebinding)
        or with an Origin of its own.
        """
        hosts = [f"127.0.0.1:{self.server.port}", f"localhost:{self.server.port}"]
        if self.server.port == 80:
            hosts += ["127.0.0.1", "localhost"]
        if self.headers.get_all("Host", []) not in [[host] for host in hosts]:
            raise BadRequest(403, f"this page lives at http://{hosts[0]}/ only")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in hosts]:
            raise BadRequest(403, "requests from other pages are refused")

    def read_body(self):
        """Return the bytes of a request's JSON body. Raises BadRequest."""
        # A foreign page cannot send this type without asking first, and is never allowed to.
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest(415, "the request must be application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise BadRequest(411, "the request has no length")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise BadRequest(413, f"the request is too large: at most {MAX_BODY} bytes are read")
        self.body_was_read = True
        return self.rfile.read(int(length))

    def stream(self, job):
        """Send a job's events as they come, one JSON object a line, in chunks."""
        self.begin(200, "application/x-ndjson", {"Transfer-Encoding": "chunked"})
        try:
            event = {"event": "queued"}
            while event is not None:
                self.send_chunk(json.dumps(event).encode() + b"\n")
                event = self.next_event(job)
            self.send_chunk(b"")
        # The browser has gone: the page was closed, or a new picture was asked for.
        except OSError:
            job.abandoned.set()

    def next_event(self, job):
        """Return a job's next event (None: it was the last), or a sign of life after a second without."""
        try:
            return job.events.get(timeout=1)
        except queue.Empty:
            return {"event": "waiting"}

    def send_chunk(self, data):
        """Send one chunk of a body; an empty one ends it."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def begin(self, status, kind, headers):
        """Send a status and the headers of every answer. The connection is closed after the answer."""
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def reply(self, status, kind, body):
        """Send a whole answer."""
        self.begin(status, kind, {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def reply_json(self, status, value):
        """Send a whole answer that is a JSON object."""
        self.reply(status, "application/json", json.dumps(value).encode())

    def refuse(self, error):
        """Send one line that says why a request is refused."""
        # A body that nobody reads would reset the connection before its sender has read the answer.
        length = self.headers.get("Content-Length", "")
        if self.command == "POST" and length.isascii() and length.isdigit() and not self.body_was_read:
            self.rfile.read(min(int(length[:9]), MAX_DISCARDED))
        self.reply_json(getattr(error, "status", 400), {"error": one_line(error)})

    def log_message(self, *args):
        """Print nothing: what is asked for is nobody's business, and may be anything."""


def about(painters):
    """Return what the page needs to know: the toy's words, the checkpoints, the limits."""
    places = [{"phrase": phrase, "column": column, "row": row} for (column, row), phrase in PLACES.items()]
    toy = next((painter for painter in painters.values() if painter.is_toy), None)
    words = sorted(toy.tokenizer.get_vocab()) if toy else []
    return {"models": [painter.about() for painter in painters.values()],
            "words": [word for word in words if not word.startswith("<")],
            "shapes": SHAPES, "colors": COLORS, "greys": GREYS, "backgrounds": BACKGROUNDS,
            "places": places, "max_prompt": MAX_PROMPT, "size": SIZE,
            "steps": 25 if toy else 50, "guidance": 3 if toy else 8}


# ----------------------------------------------------------------------------------------------------------
# The command

def main(argv=None):
    """Load the checkpoints, open the page, serve it until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m toy play", description=__doc__,
                                     formatter_class=HelpFormatter)
    add = functools.partial(parser.add_argument, metavar="X")
    add("--checkpoint", action="append", default=[],
        help="FOLDER or NAME=FOLDER, may be given again (default: all in --out)")
    add("--out", default="out/toy", help="the toy's folder, where checkpoints are looked for")
    add("--port", type=int, default=8000, help="of http://127.0.0.1:PORT; 0: any free one")
    args = parser.parse_args(argv)
    between(args, 0, 65535, "port")

    named = named_checkpoints(args.checkpoint) or found_checkpoints(args.out)
    device = local_device()
    painters = {}
    for name, folder in named.items():
        painters[name] = Painter(name, folder, device)
    if any(painter.is_toy for painter in painters.values()):
        # The detector draws its templates when it is first used: now, not while somebody waits.
        detect(Image.new("RGB", (SIZE, SIZE), next(iter(COLORS.values()))))
    server = Server(args.port, painters)
    print(f"{', '.join(painters)}: http://127.0.0.1:{server.port}/ (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    command_line(main)
