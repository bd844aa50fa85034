"""A page to watch a checkpoint think: type a prompt, see the picture appear step by step.

    python -m toy play
    python -m toy play --checkpoint "TA=out/ta" --checkpoint "TA + IA=out/toy/dit"

Starts a small web server for this computer only (127.0.0.1) and prints the page's address.
Beside the noisy picture x_t stands the network's estimate of the clean one, x_0. Several
checkpoints draw the same prompt from the same noise side by side. On toy pictures the page
shows what the detector sees, and GenEval's verdict. Any checkpoint that sample.py can read
works, the real ones too, only slower and without a detector.
"""

import argparse
import base64
import contextlib
import errno
import functools
import io
import json
import math
import os
import queue
import select
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image

from common import (HelpFormatter, UserError, between, command_line, local_device, one_line,
                    read_json, to_images)
from evaluate import geneval_verdict
from sample import (MODELS, check_encoders, encoder_names, generate, load_model,
                    load_pipeline)
from toy.detector import detect
from toy.recipe import GUIDANCE, SAMPLE_STEPS
from toy.world import BACKGROUNDS, COLORS, GREYS, PLACES, SHAPES, SIZE, background_phrases

PAGE = Path(__file__).with_suffix(".html")
MAX_BODY = 32768            # bytes of a request
MAX_DISCARDED = 2 ** 20     # bytes of a refused request that are read before the answer
MAX_PROMPT = 2000           # characters; T5 reads 256 tokens of them
MAX_STEPS = 250
MAX_GUIDANCE = 30
MAX_MODELS = 4              # checkpoints that draw side by side
MAX_WAITING = 8             # requests that may wait while one is being drawn
# What the page begins with where no checkpoint is the toy's.
REAL_STEPS = 50             # the paper takes 250, for which a page would have to wait too long
REAL_GUIDANCE = 8           # that of CAD-I's evaluation


# ------------------------------------------------------------------------------------------
# What a prompt asks for, as GenEval's metadata

MARKS = (",", ".")
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}       # as far as the toy's world counts
SIZES = ("large", "small", "tiny")
RELATIONS = ("left of", "right of", "above", "below")


def phrases():
    """Return {phrase: (kind, what it means)}: all that a prompt is read by."""
    table = {}
    for words in ("a", "an", "and", "half", "to the", "photo of", "image of", *MARKS):
        table[words] = ("link", None)
    for size in SIZES:
        table[size] = ("size", None)
    for background, grey in product(BACKGROUNDS, GREYS):
        for words in background_phrases(background, grey):
            table[words] = ("ground", None)

    # Both plural endings are accepted for every shape,
    # which is simpler than knowing which one is right.
    for shape in SHAPES:
        for ending in ("", "s", "es"):
            table[shape + ending] = ("shape", shape)
    for color in COLORS:
        table[color] = ("color", color)
    for word, number in NUMBERS.items():
        table[word] = ("count", number)
    for place, words in PLACES.items():
        table[words] = ("place", place)
    for relation in RELATIONS:
        table[relation] = ("relation", relation)
    return table


PHRASES = phrases()
LONGEST = max(len(phrase.split()) for phrase in PHRASES)


def metadata_of(prompt):
    """Return what a prompt asks for, as GenEval's metadata, or None: it cannot be judged.

    "a red circle above a star" becomes {"include": [{"class": "star", "count": 1}, {"class":
    "circle", "count": 1, "color": "red", "position": ["above", 0]}], "exclude": []}.

    Read are prompts in the words of the toy's captions: numbers up to four, a size and a colour
    before a shape, a place behind it ("a red star top left"), a relation between two things, the
    ground. With any other word, or one in another place, it is None: half a prompt is not judged.

    GenEval's rules check no size and no ground. They check a place only as a relation: of two
    things that both have one. Of several things of one class they check the number, and a colour
    that all of them have.
    """
    things = mentioned(prompt)
    if not things:
        return None

    # "two stars , a red star left and a red star right": one clause for all of a class.
    include = []
    exclude = []
    for shape in dict.fromkeys(thing["class"] for thing in things):
        clause = clause_for([thing for thing in things if thing["class"] == shape])
        if clause is None:
            return None
        include.append(clause)
        # Whoever asks for two does not want three.
        if clause["count"] > 1:
            exclude.append({"class": shape, "count": clause["count"] + 1})

    # GenEval's list names the thing that another one's place is seen from before that one. Who
    # stands above and to the left of it has two clauses.
    if len(things) == len(include) == 2:
        first, second = include
        relations = relations_of(*things)
        if relations:
            include = [second]
            for relation in relations:
                include.append({**first, "position": [relation, 0]})
    # Of a chain, "a star left of a circle above a square", a part would be lost.
    elif len(include) > 1 and any(thing["relations"] for thing in things):
        return None
    return {"include": include, "exclude": exclude}


def first_phrase(words):
    """Return the longest phrase that words begin with, or None."""
    # If "left" were tried first, it would be found where "left of" is meant.
    for length in range(LONGEST, 0, -1):
        phrase = " ".join(words[:length])
        if phrase in PHRASES:
            return phrase
    return None


def as_phrases(prompt):
    """Return the (kind, meaning) of each phrase of a prompt, or None: a word is not understood."""
    words = prompt.split()
    found = []
    while words:
        phrase = first_phrase(words)
        if phrase is None:
            return None
        found.append(PHRASES[phrase])
        words = words[len(phrase.split()):]
    return found


def mentioned(prompt):
    """Return the things that a prompt names, in their order, as dicts, or None: not understood.

    Each has `class`, `count`, `color` (None if it is not said), `place` (a key of PLACES, or
    None) and `relations`: where the thing before it is, seen from this one.
    """
    phrases_found = as_phrases(prompt)
    if phrases_found is None:
        return None

    things = []
    said = {}               # a colour and a number, until the shape that they belong to is named
    relations = []          # named since the last thing
    before = None           # the kind of the last phrase
    for kind, meaning in phrases_found:
        if kind in ("color", "count"):
            # "a red blue star": one of the two would be lost.
            if kind in said:
                return None
            said[kind] = meaning
        elif kind == "shape":
            things.append({"class": meaning, "count": said.get("count", 1),
                           "color": said.get("color"), "place": None, "relations": relations})
            said = {}
            relations = []
        # "a red and a blue star": the red one would be lost.
        elif said and kind != "size":
            return None
        elif kind == "place":
            if before != "shape":
                return None
            things[-1]["place"] = meaning
        elif kind == "relation":
            relations.append(meaning)
        before = kind

    # Behind the last thing nothing may be left over, and before
    # the first one there is nothing that it could be seen from.
    if said or relations or (things and things[0]["relations"]):
        return None
    return things


def clause_for(things):
    """Return GenEval's clause for all mentions of a class: how many, of which colour if of one.

    None if it is not clear how many there are.
    """
    alone = [thing for thing in things if thing["count"] == 1]
    several = [thing for thing in things if thing["count"] > 1]
    if several:
        # "two stars , a red star left and a red star right": the two are described once more.
        # "two red stars and a blue star" are three, which no clause tells apart.
        count = several[0]["count"]
        once_more = len(alone) == count and several[0]["color"] is None
        if len(several) > 1 or (alone and not once_more):
            return None
    else:
        count = len(alone)
    clause = {"class": things[0]["class"], "count": count}

    # A clause has one colour for all of its objects. Where the colours
    # differ, or one is not said, the objects are only counted.
    colors = {thing["color"] for thing in alone or things}
    if len(colors) == 1 and None not in colors:
        clause["color"] = colors.pop()
    return clause


def relations_of(first, second):
    """Return where the first of two things is, seen from the second: a list of RELATIONS."""
    if second["relations"]:
        return second["relations"]

    # Both have a place of their own: a thing without one fills the frame, and is everywhere.
    relations = []
    if first["place"] and second["place"]:
        # A corner differs from the opposite one in
        # both directions, which makes two relations.
        column, row = first["place"]
        other_column, other_row = second["place"]
        if column != other_column:
            relations.append("left of" if column < other_column else "right of")
        if row != other_row:
            relations.append("above" if row < other_row else "below")
    return relations


def what_the_detector_sees(image, prompt):
    """Return the objects found in a toy picture and GenEval's verdict, ready to be sent as JSON.

    `verdict` is None where `metadata_of` cannot read the prompt.
    """
    found = detect(image)

    # Plain numbers instead of numpy's.
    objects = []
    for shape, things in found.items():
        for thing in things:
            box = [int(edge) for edge in thing["box"]]
            objects.append({"shape": shape, "color": thing["color"], "box": box,
                            "score": round(float(thing["score"]), 2)})

    verdict = None
    metadata = metadata_of(prompt)
    if metadata:
        # The toy's detector reports an object's colour
        # itself, so no classifier has to look again.
        right, reason = geneval_verdict(found, metadata, lambda thing, shape: thing["color"])
        # A thing in a corner has two clauses, one for each direction, and may fail both alike.
        faults = dict.fromkeys(reason.split("; "))
        verdict = {"right": bool(right), "reason": "; ".join(faults)}
    return {"objects": objects, "verdict": verdict}


# ------------------------------------------------------------------------------------------
# Checkpoints

class SharedTokenizer:
    """A tokenizer that one thread uses at a time; the fast ones fail if two do."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.lock = threading.Lock()

    def __call__(self, *arguments, **options):
        with self.lock:
            return self.tokenizer(*arguments, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


class Painter:
    """A checkpoint with its autoencoder and text encoder: draws a picture, showing each step."""

    def __init__(self, name, folder, pipeline):
        """Remember what the page calls a checkpoint, where it is from, and its networks."""
        self.name = name
        self.folder = str(folder)
        self.pipeline = pipeline
        self.pixels = pipeline.model.config["size"] * pipeline.vae.downscale

        # The toy's detector knows the toy's pictures only. The toy's checkpoints are known by
        # their pictures' size and by their text encoder's words.
        words = pipeline.tokenizer.get_vocab()
        of_the_toy = all(word in words for word in [*SHAPES, *COLORS])
        self.is_toy = of_the_toy and self.pixels == SIZE

    def about(self):
        """Return what the page shows of a checkpoint."""
        # A checkpoint from elsewhere may not say how it was trained.
        training = self.pipeline.model.checkpoint_config.get("training") or {}
        augmentations = [key for key in ("TA", "IA") if training.get(key)]
        return {"name": self.name, "kind": " + ".join(augmentations), "folder": self.folder,
                "toy": self.is_toy, "pixels": self.pixels}

    def unknown_words(self, prompt):
        """Return the words of a prompt that the tokenizer has no token for, each once."""
        tokenizer = self.pipeline.tokenizer
        # The token of unknown words, and those like <pad>, which mean no word.
        special = set(tokenizer.all_special_ids)
        unknown = []
        for word in prompt.split():
            # A word may become several tokens; one of these among them is enough.
            tokens = tokenizer(word, add_special_tokens=False).input_ids
            if special.intersection(tokens) and word not in unknown:
                unknown.append(word)
        return unknown

    def draw(self, prompt, steps, guidance, seed, show):
        """Draw one picture and return it (PIL).

        After a step `show(step, t, noisy, clean)` gets the pictures (PIL) of x_t and of the
        estimate of x_0. Large pictures take long to decode: they are shown ten times only.
        """
        vae = self.pipeline.vae
        every = 1 if self.pixels <= SIZE else math.ceil(steps / 10)

        @torch.no_grad()
        def after_step(i, x_t, x_0):
            step = i + 1
            if step % every == 0 or step == steps:
                # As at the end of sample.py's `generate`; once for both pictures.
                latents = torch.cat([x_t, x_0]).float()                      # (2, C, h, w)
                noisy, clean = to_images(vae.decode(latents / vae.scaling_factor))
                # The time t falls from 1, pure noise, to 0.
                show(step, 1 - step / steps, noisy, clean)

        images = generate(self.pipeline, [prompt], [seed], steps, guidance, on_step=after_step)
        return images[0]


def load_painters(named):
    """Return {name: Painter} for {name: folder}. Raises UserError.

    Checkpoints with the same autoencoder and text encoder share them: a real T5 has gigabytes.
    """
    pipelines = {}
    painters = {}
    for name, folder in named.items():
        model = load_model(folder, local_device())
        encoders = encoder_names(folder, model.checkpoint_config)
        if encoders in pipelines:
            # This is a copy of the tuple with another network: the autoencoder
            # and the text encoder in it are the ones that are loaded already.
            pipeline = pipelines[encoders]._replace(model=model)
            check_encoders(folder, pipeline)
        else:
            pipeline = load_pipeline(folder)
            # Connections and checkpoints that draw at the same time ask the same tokenizer.
            pipeline = pipeline._replace(tokenizer=SharedTokenizer(pipeline.tokenizer))
            pipelines[encoders] = pipeline

        painters[name] = Painter(name, folder, pipeline)
    return painters


def named_checkpoints(words):
    """Return {name: folder} for the values of --checkpoint, FOLDER or NAME=FOLDER each.

    Raises UserError.
    """
    named = {}
    for word in words:
        name, equals, folder = word.partition("=")
        # A folder may have a "=" in its own name.
        if not equals or "/" in name or Path(word).exists():
            folder = word
            name = Path(word).name or word

        # The page chooses checkpoints by their names, so each needs one of its own.
        if not name.strip() or not folder:
            raise UserError(f"--checkpoint {word}: neither FOLDER nor NAME=FOLDER")
        if name in named:
            raise UserError(f"--checkpoint {word}: two are called {name}: "
                            "give names, NAME=FOLDER")
        named[name] = folder
    return named


def found_checkpoints(folders):
    """Return {name: folder} for the checkpoints in folders of the toy, its own run `dit` first.

    Raises UserError if there are none.
    """
    named = {}
    for out in map(Path, folders):
        # Sorted, the page lists them in the same order every time.
        for file in sorted(out.glob("**/config.json")):
            folder = file.parent
            # step-0050000 and the like are earlier states of a run that is in the list itself.
            if folder.name.startswith("step-") or not (folder / "model.safetensors").exists():
                continue
            # A text encoder has the same two files, but no `model` of ours in its config.json.
            if read_json(file, "a config.json").get("model") in MODELS:
                parts = folder.relative_to(out).parts
                # The tables' runs lie in runs/NAME/checkpoint.
                name = "/".join(part for part in parts if part not in ("runs", "checkpoint"))
                # A folder that is itself a checkpoint lends it its name.
                # Where two would get the same name, the first one keeps it.
                named.setdefault(name or out.name, folder)
    if not named:
        raise UserError(f"{folders[0]}: no checkpoint there: `python -m toy --out {folders[0]}` "
                        "trains one in minutes (or give --checkpoint)")

    # The page chooses the first one by itself: the toy's main run.
    if "dit" in named:
        named = {"dit": named["dit"]} | named
    return named


# ------------------------------------------------------------------------------------------
# Requests: checked first, then drawn one after the other

class BadRequest(Exception):
    """A request that is refused: an HTTP status, and one line for its sender."""

    def __init__(self, status, line):
        super().__init__(line)
        self.status = status


def parse_request(body, painters):
    """Return the settings in a request's JSON body, all of them checked. Raises BadRequest.

    They are `prompt`, `models` (names), `steps`, `guidance` and `seed`.
    """
    # Any bytes can arrive here. RecursionError is
    # for JSON nested too deep for the parser.
    try:
        request = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise BadRequest(400, "the request is not JSON in UTF-8") from None
    if not isinstance(request, dict):
        raise BadRequest(400, "the request is not a JSON object")

    # Each refusal is a line for the person who types: it is sent as the answer.
    prompt = request.get("prompt")
    if not isinstance(prompt, str):
        raise BadRequest(400, "prompt: must be text")
    if not prompt.strip():
        raise BadRequest(400, "the prompt is empty: type one, or click one together")
    if len(prompt) > MAX_PROMPT:
        raise BadRequest(400, f"the prompt has {len(prompt)} characters: at most {MAX_PROMPT} "
                              "are read")
    # Line breaks and tabs may pass: `as_read` turns them into single spaces.
    if not all(character.isprintable() or character.isspace() for character in prompt):
        raise BadRequest(400, "the prompt has characters that cannot be printed")

    # Names are looked up among the checkpoints that are loaded, and never used as paths.
    names = request.get("models")
    if not isinstance(names, list) or not 1 <= len(names) <= MAX_MODELS:
        raise BadRequest(400, f"checkpoints: choose one to {MAX_MODELS} of them")
    for name in names:
        if not isinstance(name, str) or name not in painters:
            raise BadRequest(400, "checkpoints: there is none of this name")
    if len(set(names)) < len(names):
        raise BadRequest(400, "checkpoints: one is named twice")

    return {"prompt": prompt, "models": names,
            "steps": checked_number(request, "steps", int, 1, MAX_STEPS),
            "guidance": checked_number(request, "guidance", (int, float), 0, MAX_GUIDANCE),
            "seed": checked_number(request, "seed", int, 0, 2 ** 31 - 1)}


def checked_number(request, name, kind, low, high):
    """Return a number of a request. Raises BadRequest: of another kind, or out of bounds."""
    value = request.get(name)
    # True is an int to Python, and NaN fails both comparisons.
    valid = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    if not valid:
        raise BadRequest(400, f"{name}: must be a number from {low} to {high}")
    return value


def as_read(prompt, painter):
    """Return a prompt as its text encoder should read it, and the words that it does not know.

    The toy's words are in lower case, with spaces around commas and full stops. Raises
    BadRequest if no word is known.
    """
    prompt = " ".join(prompt.split())
    if painter.is_toy:
        # The toy's tokenizer splits at spaces and knows lower case only.
        for mark in MARKS:
            prompt = prompt.replace(mark, f" {mark} ")
        prompt = " ".join(prompt.lower().split())

    # Some unknown words do no harm, and the page is told of them. With nothing
    # else in the prompt, the picture would have nothing to do with it.
    unknown = painter.unknown_words(prompt)
    words = [word for word in prompt.split() if word not in MARKS]
    if all(word in unknown for word in words):
        raise BadRequest(400, f"{painter.name} knows none of these words")
    return prompt, unknown


class Job:
    """A request on its way: where its events go, and whether anybody still wants them."""

    def __init__(self, settings, painters):
        self.settings = settings
        self.painters = painters

        # The threads that draw put events in, the connection's thread takes them out.
        self.events = queue.Queue()
        # The connection's thread sets this when the browser has gone.
        # Those that draw look at it whenever they have a step to show.
        self.abandoned = threading.Event()


class Abandoned(Exception):
    """Nobody waits for this picture any more."""


class Studio:
    """Draws one request at a time, in the order of their arrival, in a thread of its own."""

    def __init__(self):
        self.waiting = []
        self.changed = threading.Condition()
        # A daemon thread does not keep the program alive after Ctrl-C.
        threading.Thread(target=self.work, daemon=True).start()

    def submit(self, job):
        """Put a job at the end of the queue. Raises BadRequest if too many wait already."""
        with self.changed:
            # Whoever has gone holds no place.
            self.waiting = [one for one in self.waiting if not one.abandoned.is_set()]
            # To wait for room would keep the browser waiting, too, without a word.
            if len(self.waiting) >= MAX_WAITING:
                raise BadRequest(503, f"{MAX_WAITING} requests wait already: try again in a "
                                      "moment")
            self.waiting.append(job)
            self.changed.notify()

    def work(self):
        """Draw the jobs for ever. The event None ends each."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                job = self.waiting.pop(0)
            # The browser may have gone while its request was waiting.
            if not job.abandoned.is_set():
                draw_all(job)
            job.events.put(None)


def draw_all(job):
    """Let all checkpoints of a job draw at the same time, each in a thread, and wait for them."""
    threads = []

    # Real networks divide the cores among them.
    share = max(1, (os.cpu_count() or 1) // len(job.painters))
    for index, painter in enumerate(job.painters):
        # The toy's network is so small that several cores would only wait for each other.
        cores = 1 if painter.is_toy else share
        thread = threading.Thread(target=draw_one, args=(job, index, cores), daemon=True)
        threads.append(thread)
        thread.start()

    for thread in threads:
        thread.join()


def draw_one(job, index, cores):
    """Let checkpoint number `index` of a job draw on `cores` cores.

    Each step and the result become events of the job.
    """
    painter = job.painters[index]
    settings = job.settings
    torch.set_num_threads(cores)

    def show(step, t, noisy, clean):
        if job.abandoned.is_set():
            # An exception is the only way out of the sampling
            # loop, which knows nothing of this page.
            raise Abandoned
        job.events.put({"event": "step", "model": index, "step": step,
                        "of": settings["steps"], "t": round(t, 4),
                        "x_t": as_data_url(noisy), "x_0": as_data_url(clean)})

    try:
        began = time.perf_counter()
        prompt, unknown = as_read(settings["prompt"], painter)
        job.events.put({"event": "begin", "model": index, "prompt": prompt,
                        "unknown": unknown})

        image = painter.draw(prompt, settings["steps"], settings["guidance"],
                             settings["seed"], show)

        # The clock stops before the detector looks: its time is not the checkpoint's.
        seconds = time.perf_counter() - began
        seen = what_the_detector_sees(image, prompt) if painter.is_toy else {}
        job.events.put({"event": "done", "model": index, "seconds": round(seconds, 2), **seen})
    except Abandoned:
        pass
    # Whatever fails, the page must hear of it, and the next request must find a studio.
    except Exception as error:  # noqa: BLE001
        job.events.put({"event": "error", "model": index, "error": one_line(error)})


def as_data_url(image):
    """Return a PIL image as a PNG in a data: URL."""
    buffer = io.BytesIO()
    # Speed counts more than size: the bytes stay on this computer.
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# ------------------------------------------------------------------------------------------
# The server

# The page may run its own script and talk to this server; nothing from elsewhere is loaded.
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
          "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


class Server(ThreadingHTTPServer):
    """The page's server: on 127.0.0.1, a thread for each connection, one studio for all."""

    daemon_threads = True

    def __init__(self, port, painters):
        """Bind to a port (0: any free one). Raises UserError if it is in use."""
        self.painters = painters
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            # Only these two can be solved by another
            # port; the rest is not the user's mistake.
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                reason = error.strerror.lower()
                raise UserError(f"--port {port}: {reason}: choose another one") from None
            raise

        # For port 0 the system has chosen one.
        self.port = self.server_address[1]
        self.studio = Studio()

    def handle_error(self, request, client_address):
        """Say nothing when a browser closes a connection early."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET / (the page), GET /world (its words, the checkpoints) and POST /draw (events).

    Nothing else exists here: no path is ever turned into the name of a file.
    """

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
                self.reply_json(200, what_the_page_knows(self.server.painters))
            else:
                raise BadRequest(404, "no such page")
        # urlsplit raises ValueError for an address that it cannot take apart.
        except (BadRequest, ValueError) as error:
            self.refuse(error)

    def do_POST(self):
        """Draw: check the request, queue it, and send what happens as it happens."""
        try:
            self.check_origin()
            if urlsplit(self.path).path != "/draw":
                raise BadRequest(404, "no such page")

            # All checks come before the first byte of
            # the answer: after it, the status is sent.
            settings = parse_request(self.read_body(), self.server.painters)
            painters = [self.server.painters[name] for name in settings["models"]]
            for painter in painters:
                # Called only for its error, so that such a
                # prompt need not wait in the queue first.
                as_read(settings["prompt"], painter)

            job = Job(settings, painters)
            self.server.studio.submit(job)
        except (BadRequest, ValueError) as error:
            self.refuse(error)
            return
        self.stream(job)

    def check_origin(self):
        """Refuse requests that do not come from this server's own page. Raises BadRequest.

        A page elsewhere can make a browser send requests here: under another host's name (DNS
        rebinding), or with an Origin of its own.
        """
        hosts = [f"127.0.0.1:{self.server.port}", f"localhost:{self.server.port}"]
        # Browsers leave out HTTP's own port.
        if self.server.port == 80:
            hosts += ["127.0.0.1", "localhost"]

        # This also refuses a request with several Host headers, or with none.
        if self.headers.get_all("Host", []) not in [[host] for host in hosts]:
            raise BadRequest(403, f"this page lives at http://{hosts[0]}/ only")

        # A browser may leave out Origin where the page
        # is its own, so none is no reason to refuse.
        origin = self.headers.get("Origin")
        if origin is not None and origin not in [f"http://{host}" for host in hosts]:
            raise BadRequest(403, "requests from other pages are refused")

    def read_body(self):
        """Return the bytes of a request's JSON body. Raises BadRequest."""
        # A foreign page cannot send this type without asking first, and is never allowed to.
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest(415, "the request must be application/json")

        # `isdigit` alone would let digits of other scripts pass.
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise BadRequest(411, "the request has no length")
        # The number's own length comes first, so
        # that `int` never reads thousands of digits.
        if len(length) > 9 or int(length) > MAX_BODY:
            raise BadRequest(413, f"the request is too large: at most {MAX_BODY} bytes are "
                                  "read")

        # `refuse` must not wait for the same bytes once more.
        self.body_was_read = True
        return self.rfile.read(int(length))

    def stream(self, job):
        """Send a job's events as they come, one JSON object a line, in chunks."""
        self.begin(200, "application/x-ndjson", {"Transfer-Encoding": "chunked"})
        try:
            # The first event is sent at once: the page
            # learns that its request was accepted.
            event = {"event": "queued"}
            while event is not None:
                self.send_chunk(json.dumps(event).encode() + b"\n")
                event = self.next_event(job)
            # Without an empty chunk the browser would take the answer for cut off.
            self.send_chunk(b"")
        # The browser has gone: the page was closed, or a new picture was asked for.
        except OSError:
            job.abandoned.set()

    def next_event(self, job):
        """Return a job's next event, or a sign of life after a second without one.

        None: there will be no more. Raises ConnectionError if the browser has gone.
        """
        # Looked for often: until it is noticed, such a request holds a place in the queue.
        for _ in range(10):
            if self.browser_has_gone():
                raise ConnectionAbortedError
            with contextlib.suppress(queue.Empty):
                return job.events.get(timeout=0.1)
        return {"event": "waiting"}

    def browser_has_gone(self):
        """Tell whether the other end has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        # A closed connection can be read, and has nothing. What else may come stays there.
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def send_chunk(self, data):
        """Send one chunk of a body; an empty one ends it."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def begin(self, status, kind, headers):
        """Send a status and the headers of every answer, after which the connection is closed."""
        self.close_connection = True
        self.send_response(status)

        self.send_header("Content-Type", kind)

        # These keep the page to itself: no foreign scripts, no guessing
        # of types, no address handed on, nothing kept in a cache.
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
        # A body that nobody reads resets the connection before its sender reads the answer.
        length = self.headers.get("Content-Length", "")
        if length.isascii() and length.isdigit() and not self.body_was_read:
            self.rfile.read(min(int(length[:9]), MAX_DISCARDED))
        self.reply_json(getattr(error, "status", 400), {"error": one_line(error)})

    def log_message(self, *args):
        """Print nothing: what is asked for is nobody's business, and may be anything."""


def what_the_page_knows(painters):
    """Return what the page needs to know: the toy's words, the checkpoints, the limits."""
    places = []
    for (column, row), phrase in PLACES.items():
        places.append({"phrase": phrase, "column": column, "row": row})

    # The words of the toy's text encoder; without a toy's checkpoint nothing is clicked together.
    words = []
    toys = [painter for painter in painters.values() if painter.is_toy]
    if toys:
        words = sorted(toys[0].pipeline.tokenizer.get_vocab())

    # Special tokens such as <pad> are no words to type. The page begins with the steps
    # and the guidance of the toy's scores: real networks get more of both.
    return {"models": [painter.about() for painter in painters.values()],
            "words": [word for word in words if not word.startswith("<")],
            "shapes": SHAPES, "colors": COLORS, "greys": GREYS, "backgrounds": BACKGROUNDS,
            "places": places, "size": SIZE,
            "steps": SAMPLE_STEPS if toys else REAL_STEPS,
            "guidance": GUIDANCE if toys else REAL_GUIDANCE}


# ------------------------------------------------------------------------------------------
# The command

def main(argv=None):
    """Load the checkpoints, open the page, serve it until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m toy play", description=__doc__,
                                     formatter_class=HelpFormatter)
    add = functools.partial(parser.add_argument, metavar="X")
    add("--checkpoint", action="append", default=[],
        help="FOLDER or NAME=FOLDER, may be given again (default: all in --out)")
    add("--out", nargs="+", default=["out/toy", "out/toy-tables"],
        help="the toy's folders, where checkpoints are looked for")
    add("--port", type=int, default=8000, help="of http://127.0.0.1:PORT; 0: any free one")
    args = parser.parse_args(argv)
    between(args, 0, 65535, "port")

    # If no checkpoint is named, the page offers whatever the toy has trained so far.
    painters = load_painters(named_checkpoints(args.checkpoint) or found_checkpoints(args.out))
    if any(painter.is_toy for painter in painters.values()):
        # The detector draws its templates when it is first used: not while somebody waits.
        detect(Image.new("RGB", (SIZE, SIZE), next(iter(COLORS.values()))))

    server = Server(args.port, painters)
    print(f"{', '.join(painters)}: http://127.0.0.1:{server.port}/ (Ctrl-C ends it)", flush=True)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    command_line(main)
