"""A page to watch a checkpoint think: type a prompt, see a picture come out of noise.

    python -m toy play
    python -m toy play --checkpoint "TA=out/ta" --checkpoint "TA + IA=out/toy/dit"

A small web server for this computer only (127.0.0.1) prints the page's address. Beside
the noisy picture x_t stands x_0, what the network takes it for. Two checkpoints draw the
same prompt from the same noise. Any checkpoint that sample.py reads will do, the real ones
too, only slower; of the toy's pictures the page also says what the detector sees in them.
"""

import io
import json
import math
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

# First: it keeps Ctrl-C quiet while torch is imported.
from common import Options, UserError, naming, number, one_line, reading

import torch

from encode import to_images
from sample import generate, load_pipeline, starting_noise, times
from toy.detector import as_detections, find_objects
from toy.recipe import GUIDANCE, SAMPLE_STEPS
from toy.report import data_url
from toy.world import COLORS, SHAPES, SIZE

PAGE = Path(__file__).with_suffix(".html")

# In the words of the training captions, which say all that is in a picture: "a red star"
# alone says too little. The default toy draws each of them right with the seeds 0 to 11,
# also the last five: two classes, which no original shows together.
EXAMPLES = [
    "a large red circle on dark ground",
    "a large yellow star before a light wall",
    "a green triangle top left before a dark wall",
    "a yellow circle top right on dark ground",
    "two stars , a purple star bottom left and a blue star top left before a grey wall",
    "two squares , a red square bottom left , left of a yellow square top right before a grey wall",
    "three circles , a red circle bottom left , a blue circle bottom right and a purple circle "
    "top right on grey ground",
    "a green circle top right and a blue star top left on grey ground",
    "a blue star bottom right and a yellow cross bottom left on grey ground",
    "a yellow star bottom right and a purple triangle top left before a grey wall",
    "a green triangle bottom left , left of a purple square top right before a grey wall",
    "a green star bottom left , below a red circle top right before a dark wall",
]
# What the page begins with for the toy's checkpoints, and for all others: the guidance of
# CAD-I's evaluation, and fewer steps than the paper's 250, which would take too long.
FOR_TOY = {"examples": EXAMPLES, "steps": SAMPLE_STEPS, "guidance": GUIDANCE}
FOR_OTHERS = {"examples": [], "steps": 50, "guidance": 8}


# --------------------------------------------------------------------------------------------
# Drawing

def load_checkpoint(word):
    """Return (name, Pipeline) of a word on the command line, FOLDER or NAME=FOLDER."""
    name, equals, folder = word.partition("=")
    # A folder may have a "=" in its own name.
    if not equals or Path(word).exists():
        name, folder = Path(word).name, word
    return name, load_pipeline(folder)


def is_of_toy(pipeline):
    """Tell whether a checkpoint is the toy's: by its pictures' size, and its text encoder's words."""
    pixels = pipeline.model.config["size"] * pipeline.vae.downscale
    return pixels == SIZE and pipeline.tokenizer.get_vocab().keys() >= {*SHAPES, *COLORS}


def draw(pipeline, prompt, steps, guidance, seed):
    """Return what the page shows of one picture, ready to be sent as JSON."""
    of_toy = is_of_toy(pipeline)
    unknown = []
    if of_toy:
        prompt, unknown = as_read(prompt, pipeline.tokenizer)
    # Large pictures take long to decode: ten of them must do.
    every = 1 if of_toy else math.ceil(steps / 10)
    frames = draw_frames(pipeline, prompt, steps, guidance, seed, every)
    urls = [{"t": t, "x_t": as_url(x_t), "x_0": as_url(x_0)} for t, x_t, x_0 in frames]
    answer = {"unknown": unknown, "frames": urls}

    if of_toy:
        _, _, picture = frames[-1]
        answer["objects"] = as_detections(find_objects(picture))
    return answer


@torch.no_grad()
def draw_frames(pipeline, prompt, steps, guidance, seed, every):
    """Return (t, x_t, x_0) of every so many steps for t from 1, pure noise, to 0, the picture.

    x_t and x_0 are PIL images; x_0 is the network's estimate of the clean one from this x_t.
    """
    noisy = [starting_noise(pipeline.model, [seed])]                    # (1, C, h, w) each
    clean = []

    def remember(i, x_t, x_0):
        noisy.append(x_t)
        clean.append(x_0)

    picture = generate(pipeline, [prompt], [seed], steps, guidance, on_step=remember)[0]

    # From the last x_t, which is the picture, nothing was estimated.
    moments = list(zip(times(steps).tolist(), noisy, clean))
    frames = []
    for t, x_t, x_0 in moments[::every]:
        latents = torch.cat([x_t.to(x_0), x_0]).float()                 # (2, C, h, w)
        images = to_images(pipeline.vae.decode(latents / pipeline.vae.scaling_factor))
        frames.append((t, *images))
    return [*frames, (0.0, picture, picture)]


def as_read(prompt, tokenizer):
    """Return a prompt as the toy's captions are written, and its words that none of them has.

    The toy's tokenizer splits at spaces alone, and knows words only as its captions write them.
    """
    known = tokenizer.get_vocab()
    words = re.findall(r"[^\s,.]+|,", prompt)
    words = [word if word in known else word.lower() for word in words]
    return " ".join(words), [word for word in words if word not in known]


def as_url(image):
    """Return a PIL image as a PNG in a data: URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return data_url(file.getvalue())


# --------------------------------------------------------------------------------------------
# The server. Any page in the browser can send requests to this computer: only our own may.

MAX_PROMPT = 1000               # characters; T5 reads 256 tokens of them


def some_words(text):
    """Return a prompt. Raises ValueError for a blank or an endless one."""
    if not 1 <= len(text.strip()) <= MAX_PROMPT:
        raise ValueError(f"must have 1 to {MAX_PROMPT} characters")
    return text.strip()


# What a request gives to `draw`, in the address as the page's own address holds it.
FIELDS = {"prompt": some_words,
          "steps": number(int, 1, 250),
          "guidance": number(float, 0, 30),
          "seed": number(int, 0, 2 ** 31 - 1)}
# Nothing is loaded from elsewhere, and no other page may show this one in a frame.
POLICY = ("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
          "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


def about(checkpoints):
    """Return what the page begins with: checkpoints, and examples and settings for them."""
    of_toy = all(is_of_toy(pipeline) for _, pipeline in checkpoints)
    known = []
    for name, pipeline in checkpoints:
        # One from elsewhere may not say how it was trained.
        training = pipeline.model.checkpoint_config.get("training") or {}
        known.append({"name": name, "training": training})
    return {**(FOR_TOY if of_toy else FOR_OTHERS), "checkpoints": known}


def asked(query):
    """Return the arguments of `draw` in a request's address. Raises UserError."""
    given = dict(parse_qsl(query))
    settings = {}
    for name, convert in FIELDS.items():
        with reading(name, "as the field on the page allows"):
            settings[name] = convert(given[name])
    return settings


class Server(ThreadingHTTPServer):
    """The page's server, on 127.0.0.1 only. It draws one request at a time; others wait."""

    def __init__(self, port, checkpoints):
        """Take a port, 0 for any free one. Raises OSError if it is taken."""
        with naming(f"--port {port}"):
            super().__init__(("127.0.0.1", port), Handler)
        self.checkpoints = checkpoints
        self.drawing = threading.Lock()

    def handle_error(self, request, client_address):
        """Say nothing when a browser closes a connection early."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET / (the page), GET /about and any POST, as /draw. A refusal is one line of text."""

    timeout = 30                # seconds that a silent connection is kept
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(explain)s\n"

    def parse_request(self):
        """Tell whether a request is to be answered: those of other pages are refused.

        They come under another host's name (DNS rebinding), or from another origin. A browser
        may leave the origin out where the page is this one.
        """
        if not super().parse_request():
            return False
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}")
        name = host.removesuffix(f":{self.server.server_port}")
        if name not in ("127.0.0.1", "localhost") or origin != f"http://{host}":
            self.send_error(403, explain="only this server's own page may ask")
            return False
        return True

    def do_GET(self):
        """Answer with the page, or with what it begins with."""
        path = self.path.partition("?")[0]
        if path == "/":
            self.reply(PAGE.read_text(encoding="utf-8"), "text/html; charset=utf-8")
        elif path == "/about":
            self.reply(json.dumps(about(self.server.checkpoints)))
        else:
            self.send_error(404, explain="no such page")

    def do_POST(self):
        """Answer with what each checkpoint has drawn, all frames at once."""
        try:
            settings = asked(self.path.partition("?")[2])
            with self.server.drawing:
                checkpoints = self.server.checkpoints
                pictures = [draw(pipeline, **settings) for _, pipeline in checkpoints]
        # Whatever fails, the page must hear of it.
        except Exception as error:  # noqa: BLE001
            status = 400 if isinstance(error, UserError) else 500
            self.send_error(status, explain=one_line(error))
        else:
            self.reply(json.dumps(pictures))

    def reply(self, text, kind="application/json"):
        """Send a whole answer."""
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        """Print nothing: what is typed here is nobody else's business."""


# --------------------------------------------------------------------------------------------

def main(argv=None):
    """Load the checkpoints, print the page's address, and serve it until Ctrl-C."""
    parser = Options(__doc__, prog="python -m toy play")
    add = parser.add
    add("--checkpoint", "FOLDER or NAME=FOLDER; a second one draws beside it (default: OUT/dit)",
        action="append")
    add("--out", "the toy's folder", "out/toy")
    add("--port", "of http://127.0.0.1:PORT; 0: any free one", 8000, number(int, 0, 65535))
    args = parser.parse_args(argv)

    default = Path(args.out) / "dit"
    named = args.checkpoint or [str(default)]
    if not args.checkpoint and not (default / "config.json").is_file():
        raise UserError(f"{default}: no checkpoint there: run `python -m toy` first, "
                        f"or give --checkpoint")
    checkpoints = [load_checkpoint(word) for word in named]
    with Server(args.port, checkpoints) as server:
        print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
