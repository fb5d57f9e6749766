"""Real Python as text (modules of the library), latents planted in it, and an endpoint that answers by script."""

import json
import sysconfig
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import Float, Int

from everyscope.describe.explanations.config import ExplainConfig
from everyscope.describe.explanations.firings import Firings
from everyscope.describe.explanations.offline import Ground, lay_ground
from everyscope.describe.explanations.passages import Passages, join_blocks
from everyscope.describe.explanations.run import embedding_of, text_pieces
from everyscope.describe.explanations.traits import traits_of
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.text.blocks import Cursor, pack
from everyscope.text.config import TextConfig
from everyscope.text.documents import Document
from everyscope.text.tokenizer import load_tokenizer

CONTEXT = 128
MODULES = (
    "bdb calendar cmd code codecs copy csv dataclasses enum filecmp fnmatch fractions getopt glob hashlib heapq hmac netrc "
    "pprint queue shelve shlex shutil stat textwrap timeit trace uuid wave zipapp"
)


def firings_of_pairs(
    latents: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], activations: Float[np.ndarray, " n"], d_sae: int
) -> Firings:
    """Firings from pairs in order of token."""
    order = np.argsort(latents, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(latents, minlength=d_sae))])
    return Firings(starts, tokens[order], activations[order])


def library_files() -> list[Path]:
    """Modules that every supported Python has."""
    return [Path(sysconfig.get_paths()["stdlib"], f"{name}.py") for name in MODULES.split()]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def passages(tokenizer: Any) -> Passages:
    """Three quarters of some modules as training documents, the others held out."""
    documents = [Document(path.name, text, text) for path in library_files() if (text := path.read_text())]
    config = TextConfig(context=CONTEXT)

    def blocks(chosen: list[Document]) -> list[Any]:
        return list(pack(chosen, config, tokenizer, Cursor()))

    return join_blocks(
        blocks([one for number, one in enumerate(documents) if number % 4]),
        blocks([one for number, one in enumerate(documents) if not number % 4]),
        seed=0,
    )


@pytest.fixture(scope="session")
def ground(passages: Passages, tokenizer: Any) -> Ground:
    config = ExplainConfig(model=ModelConfig(), text=TextConfig(), trained=Path("none"), out=Path("none"))
    embed = embedding_of(load_language_model("tiny").model)
    return lay_ground(config, passages, traits_of(passages, text_pieces(tokenizer), "python", embed))


@pytest.fixture
def plant(passages: Passages) -> Callable[..., Firings]:
    """An SAE whose latent k fires exactly where the k-th array of booleans [tokens] is true."""

    def planted(*fires: np.ndarray) -> Firings:
        random = np.random.default_rng(0)
        where = [np.flatnonzero(one & passages.mask.ravel()) for one in fires]
        latents = np.repeat(np.arange(len(fires)), [len(one) for one in where])
        tokens = np.concatenate(where)
        order = np.argsort(tokens, kind="stable")
        return firings_of_pairs(latents[order], tokens[order], random.uniform(1, 2, len(tokens)), len(fires))

    return planted


class FakeEndpoint:
    """Answers chat completions on 127.0.0.1 by a script; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.script: Callable[[dict[str, Any], int], tuple[int, str]] = lambda payload, number: (200, completion("{}"))
        self.extra_headers: dict[str, str] = {}
        self.closing = threading.Event()
        lock, fake = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(fake.asked)
                    fake.asked.append({"path": self.path, **payload})
                    fake.headers.append(dict(self.headers))
                code, body = fake.script(payload, number)
                self.send_response(code)
                for name, value in fake.extra_headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda request, client_address: None  # a client that gave up waiting is no news
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def completion(text: str, prompt_tokens: int = 10, completion_tokens: int = 5) -> str:
    """A chat completion's body."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


@pytest.fixture
def fake() -> Iterator[FakeEndpoint]:
    endpoint = FakeEndpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="session")
def completed() -> Callable[..., str]:
    return completion
