"""The chat page by HTTP: what streams, what it folds, what it refuses; and in a browser, where there is one."""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mai_thinking.data.serial import solve
from mai_thinking.rl import chat as module
from mai_thinking.rl.chat import Chat, make_server
from mai_thinking.rl.template import template_of
from mai_thinking.training.model_files import load_model_and_tokenizer
from mai_thinking.training.sampling import sample_text

QUESTION = "Add up g3, r5, u2."
assert solve(QUESTION) is not None


@pytest.fixture(scope="module")
def chat(tiny_run: Path) -> Chat:
    model, tokenizer = load_model_and_tokenizer(tiny_run)
    return Chat(model, tokenizer, template_of(tiny_run), tokens=12, temperature=0.8, top_p=0.95, seed=0)


@pytest.fixture
def port(chat: Chat) -> Iterator[int]:
    with make_server(chat, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def ask(port: int, body: Any, path: str = "/", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_text_is_continued_as_it_is_on_the_command_line(chat: Chat, port: int) -> None:
    seed = chat._seed
    status, text = ask(port, {"text": "def ", "question": False})
    pieces = [event["text"] for event in events(text)]
    expected = sample_text(chat.model, chat.tokenizer, "def ", seed=seed, tokens=12)
    assert (status, "".join(pieces)) == (200, expected)
    assert len(pieces) > 1  # it streams


def test_of_a_question_thought_and_answer_are_told_apart(
    chat: Chat, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(model: Any, tokenizer: Any, prompt: str, *, streamer: Any, **settings: Any) -> str:
        assert prompt == f"Question: {QUESTION}\n"
        streamer.on_finalized_text("g: 3.\n<b>Answer</b>: 9\nAnswer: 10\n")
        return "g: 3.\n<b>Answer</b>: 9\nAnswer: 10\n"

    monkeypatch.setattr(module, "sample_text", written)
    _, text = ask(port, {"text": QUESTION, "question": True})
    assert events(text)[-1] == {"thought": "g: 3.\n<b>Answer</b>: 9", "answer": "10", "right": True}


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        ({"text": "", "question": True}, {}, 400, "is understood"),
        ({"text": "a", "question": 1}, {}, 400, "is understood"),
        (b"\xff\x00rubbish", {}, 400, "is understood"),
        (b"[" * 60_000, {}, 400, "is understood"),
        ([], {}, 400, "is understood"),
        (b'{"text": "\\ud800", "question": false}', {}, 400, "surrogate"),
        ({"text": "a b " * 2000, "question": False}, {}, 400, "longer than"),
        (b"x" * 70_000, {}, 413, ""),
        ({"text": "a", "question": True}, {"Host": "example.org"}, 403, "machine that it runs on"),
        ({"text": "a", "question": True}, {"Origin": "http://example.org"}, 403, "machine that it runs on"),
        ({"text": "a", "question": True}, {"Content-Length": "-1"}, 411, ""),
        ({"text": "a", "question": True}, {"Content-Length": "9" * 5000}, 413, ""),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(port: int, body: Any, headers: dict[str, str], status: int, words: str) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was read
        refused, told = ask(port, body, **headers)
        assert refused == status
        assert words in told
    assert ask(port, {"text": "def ", "question": False})[0] == 200
    assert ask(port, {"text": "def ", "question": False}, "/other")[0] == 404


def test_who_hangs_up_keeps_nobody_waiting(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    body = json.dumps({"text": "def ", "question": False}).encode()
    head = f"POST / HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for content in (b"", b"\x16\x03\x01\x02\x00\xff", b"GET", head, head + body[:5], head + body):
        with socket.create_connection(("127.0.0.1", port)) as one:
            one.sendall(content)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a farewell
    assert ask(port, {"text": "def ", "question": False})[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_nobody_from_outside_reaches_it(port: int) -> None:
    names = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for name in names - {"127.0.0.1"}:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((name, port), timeout=5)


class Browser:
    """Chromium over its debugging pipe: messages of JSON, each ended by a zero byte."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--remote-debugging-pipe"]
        # It reads from descriptor 3 and writes to 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{answers}', "bash", program, *flags]
        shell.append(f"--user-data-dir={profile}")
        self.process = subprocess.Popen(shell, pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self._stream = os.fdopen(self._answers, "rb")
        self._count = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            text = b""
            while (byte := self._stream.read(1)) != b"\0":
                assert byte, "the browser has gone"
                text += byte
            if (answer := json.loads(text)).get("id") == self._count:
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression on the page; of a promise, what it promises."""
        found = self.call("Runtime.evaluate", self.session, expression=script, awaitPromise=True, returnByValue=True)
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a condition holds on the page."""
        while not self.run(condition):
            time.sleep(0.02)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser_the_answer_stands_and_the_thought_folds(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def written(*_: Any, streamer: Any, **settings: Any) -> str:
        streamer.on_finalized_text("g: 3.\n<img src=x onerror='document.title=1'>\n")
        assert go_on.wait(60)
        streamer.on_finalized_text("Answer: 10\n")
        return "g: 3.\n<img src=x onerror='document.title=1'>\nAnswer: 10\n"

    monkeypatch.setattr(module, "sample_text", written)
    browser = Browser("chromium", tmp_path)
    try:
        browser.call("Page.navigate", browser.session, url=f"http://localhost:{port}/")
        browser.wait("document.readyState == 'complete' && document.forms.length")
        browser.run(f"document.querySelector('textarea').value = {json.dumps(QUESTION)}")
        browser.run("document.querySelector('button').click()")
        browser.wait("document.querySelector('details span').textContent.includes('<img')")
        assert browser.run("document.querySelector('details').open") is True  # one sees it think
        assert browser.run("document.querySelector('button').disabled") is True
        go_on.set()
        browser.wait("document.querySelector('.answer') !== null")
        assert browser.run("document.querySelector('.answer').textContent") == "10"
        assert browser.run("document.querySelector('.answer').className") == "answer right"
        assert browser.run("document.querySelector('details').open") is False
        assert browser.run("document.title + document.images.length") == "mai_thinking0"  # text, whatever it spells
    finally:
        go_on.set()
        browser.process.kill()
        browser.process.wait()
