"""A page to talk to a model: `scripts/sample.py MODEL --serve`. For this machine alone; text streams, thoughts fold."""

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from mai_thinking.data.tokenizer import Encoder
from mai_thinking.errors import UsageError
from mai_thinking.model import MaiThinkingForCausalLM
from mai_thinking.rl.ask import judged
from mai_thinking.rl.template import Template
from mai_thinking.training.sampling import sample_text

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
_LARGEST = 65_536
"""Bytes of a request."""
_PATIENCE = 60
"""Seconds for which a connection may say nothing, or take nothing."""
_RULES = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


class Chat:
    """A model that answers one request at a time; those that come meanwhile wait."""

    def __init__(
        self, model: MaiThinkingForCausalLM, tokenizer: PreTrainedTokenizerBase, template: Template, **settings: Any
    ) -> None:
        """`settings` as for `sample_text`; the seed is that of the first answer."""
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self._seed, self._settings = settings.pop("seed", 0), settings
        self._encoder, self._lock = Encoder(tokenizer), threading.Lock()

    def prompt(self, text: str, *, question: bool) -> str:
        """What the model continues: `text`, or the frame around it. UsageError for what is no text, or too long."""
        prompt = self.template.prompt(text) if question else text
        if len(self._encoder.encode_prompt(prompt)) > (longest := self.model.config.max_position_embeddings):
            raise UsageError(f"the text is longer than the {longest:,} tokens that the model has learned to read")
        return prompt

    def reply(self, text: str, *, question: bool, tell: Callable[[dict[str, Any]], None]) -> None:
        """`tell` each piece of the response as `{"text"}`, then of a question `{"thought", "answer", "right"}`. What
        `tell` raises ends the writing."""
        prompt, streamer = self.prompt(text, question=question), _Pieces(self.tokenizer, tell)
        with self._lock:
            self._seed += 1
            response = sample_text(
                self.model, self.tokenizer, prompt, seed=self._seed - 1, streamer=streamer, **self._settings
            )
        if question:
            tell(dict(zip(("thought", "answer", "right"), judged(self.template, text, response), strict=True)))


class _Pieces(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._tell({"text": text})


def make_server(chat: Chat, port: int) -> ThreadingHTTPServer:
    """The server of the page, which others of this machine may reach and nobody else. `port` 0 takes a free one.
    UsageError if the port is taken."""
    page = (files("mai_thinking.rl") / "chat.html").read_bytes()

    class Handler(_Handler):
        def do_GET(self) -> None:
            if self.path != "/":
                return self.send_error(404)
            self._begin("text/html; charset=utf-8", length=len(page))
            self.wfile.write(page)

        def do_POST(self) -> None:
            if (asked := self._asked()) is None:
                return
            text, question = asked
            try:
                chat.prompt(text, question=question)
            except UsageError as error:
                return self.send_error(400, explain=str(error))
            self._begin("application/x-ndjson")
            chat.reply(text, question=question, tell=self._tell)
            self.wfile.write(b"0\r\n\r\n")

    try:
        return _Server((ADDRESS, port), Handler)
    except (OSError, OverflowError) as error:
        raise UsageError(f"--serve: port {port} cannot be had ({error}); name another") from None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody who hangs up is no error; all else is told on the terminal."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", _PATIENCE
    server_version, sys_version = "mai_thinking", ""
    error_message_format, error_content_type = "%(explain)s\n", "text/plain; charset=utf-8"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nobody reads it."""

    def parse_request(self) -> bool:
        """Requests that another site's page makes come by another name (DNS rebinding) or name their origin."""
        if not super().parse_request():
            return False
        names = {f"{name}:{self.connection.getsockname()[1]}" for name in _NAMES}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in names and (origin is None or origin.removeprefix("http://") in names):
            return True
        self.close_connection = True
        self.send_error(403, explain="this page is for the machine that it runs on")
        return False

    def _asked(self) -> tuple[str, bool] | None:
        """Text and whether it is a question; None if the request is refused, which has been told then."""
        length = self.headers.get("Content-Length", "")
        self.close_connection = True  # all of the body may not have been read
        if self.path != "/" or not length.isascii() or not length.isdigit():
            self.send_error(404 if self.path != "/" else 411)
        elif len(length) > 9 or int(length) > _LARGEST:
            self.send_error(413)
        else:
            try:
                asked = json.loads(self.rfile.read(int(length)))
                text, question = asked["text"], asked["question"]
                if isinstance(text, str) and text and isinstance(question, bool):
                    return text, question
            except (ValueError, KeyError, TypeError, RecursionError):
                pass
            self.send_error(400, explain="an object with a text and whether it is a question is understood")
        return None

    def _begin(self, kind: str, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", _RULES)
        self.send_header("Cache-Control", "no-store")
        self.send_header(*(("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))))
        self.end_headers()

    def _tell(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()


def serve(chat: Chat, port: int) -> None:
    """Until Ctrl-C."""
    with make_server(chat, port) as server:
        print(f"http://{ADDRESS}:{server.server_address[1]} has the model; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
