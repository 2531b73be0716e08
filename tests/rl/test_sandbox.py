"""Ways out of the sandbox of the tool `python`, each tried: nothing is read, written, sent, started or ended, and
nothing hangs."""

import ctypes
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mai_thinking.rl.tools.sandbox import isolation, run_python


def kernel_can() -> bool:
    """Whether this kernel has Landlock and seccomp, asked without the code under test: where it has, nothing is
    skipped because the sandbox does not work."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(444, None, 0, 1) > 0 and Path("/proc/sys/kernel/seccomp/actions_avail").exists()


pytestmark = pytest.mark.skipif(not kernel_can(), reason="this kernel has no Landlock or no seccomp")

DENIED = ("PermissionError", "OSError", "RuntimeError", "BlockingIOError", "ImportError", "FileNotFoundError")
FILES = """
open('{secret}').read()
open('{secret}', 'rb', 0).read()
__import__('os').open('{secret}', 0)
__import__('pathlib').Path('{secret}').read_text()
__import__('os').listdir('{folder}')
list(__import__('os').scandir('{folder}'))
__import__('os').open('{folder}', 0o200000) and print(open('/proc/self/fd/3/secret').read())
__import__('os').symlink('{secret}', '{folder}/link')
__import__('os').link('{secret}', '{folder}/link')
__import__('os').rename('{secret}', '{folder}/other')
__import__('os').remove('{secret}')
__import__('os').truncate('{secret}', 0)
__import__('os').chmod('{secret}', 0)
__import__('os').mkdir('{folder}/new')
__import__('os').mkfifo('{folder}/pipe')
open('{folder}/new', 'w').write('x')
open('/tmp/mai-thinking-escape', 'w').write('x')
open('/dev/shm/mai-thinking-escape', 'w').write('x')
open('/etc/passwd').read()
open('/proc/self/environ').read()
open('/proc/1/cmdline').read()
open('/proc/self/mem', 'r+b')
open('/proc/self/root{secret}').read()
open('/proc/self/cwd{secret}').read()
open('/dev/mem', 'rb')
open(__import__('os').__file__, 'a').write('x')
__import__('os').execv('/bin/cat', ['cat', '{secret}'])
__import__('os').chroot('{folder}')
__import__('os').mknod('{folder}/new')
__import__('os').utime('{secret}')
__import__('os').setxattr('{secret}', 'user.x', b'x')
__import__('mmap').mmap(__import__('os').open('{secret}', 2), 0)[0:1]
__import__('tempfile').TemporaryFile()
__import__('sqlite3').connect('{folder}/new').execute('create table x (y)')
__import__('ctypes').CDLL(None).system(b'cat {secret} > {folder}/new') and 1 / 0
__import__('shutil').copy('{secret}', '{folder}/new')
""".strip().splitlines()
NETWORK = """
__import__('socket').socket()
__import__('socket').socketpair()
__import__('socket').create_connection(('127.0.0.1', {port}), 1)
__import__('socket').socket(__import__('socket').AF_UNIX)
__import__('urllib.request').request.urlopen('http://127.0.0.1:{port}')
__import__('asyncio').run(__import__('asyncio').sleep(0))
""".strip().splitlines()
PROCESSES = """
__import__('os').fork()
[__import__('os').fork() for _ in range(99)]
__import__('os').system('true') and 1 / 0
__import__('subprocess').run(['true'])
__import__('os').posix_spawn('/bin/true', ['true'], {{}})
__import__('multiprocessing').Process(target=print).start()
__import__('threading').Thread(target=print).start()
__import__('os').kill({parent}, 9)
__import__('os').killpg({parent}, 9)
__import__('signal').pidfd_send_signal(__import__('os').pidfd_open({parent}), 9)
__import__('os').setuid(0)
__import__('os').nice(-5)
__import__('pty').fork()
__import__('resource').prlimit({parent}, 0, (0, 0))
__import__('os').sched_setaffinity({parent}, [0])
__import__('fcntl').fcntl(1, 8, {parent})
__import__('pickle').loads(b"cos\\nsystem\\n(S'cat {secret}'\\ntR.") and 1 / 0
""".strip().splitlines()
GREEDY = {
    "while True: pass": "took too long",
    "__import__('time').sleep(999)": "took too long",
    "__import__('signal').signal(24, lambda *a: None)\nwhile True: pass": "took too long",
    "x = 'a' * 10**10": "exit code",
    "x = []\nwhile True: x.append(bytearray(10**7))": "exit code",
    "9 ** 9 ** 9": "took too long",
    "while True: print('x' * 10**4)": "wrote too much",
    "import os\nos.close(1)\nos.close(2)\nwhile True: pass": "took too long",
    "def f(): f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()": "",
    "raise SystemExit(3)": "exit code 3",
    "(" * 10**5: "",
    "\0": "exit code",
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, object]:
    (tmp_path / "secret").write_text("CANARY")
    return {"secret": tmp_path / "secret", "folder": tmp_path, "parent": os.getpid()}


@pytest.mark.parametrize("escape", [*FILES, *NETWORK, *PROCESSES])
def test_an_escape_is_stopped(places: dict[str, object], escape: str) -> None:
    folder = Path(str(places["folder"]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        code = escape.format(**places, port=server.getsockname()[1])
        outcome = run_python(f"print({code})", seconds=5.0, megabytes=256)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()
    assert outcome.failed, outcome
    assert any(error in outcome.output for error in (*DENIED, "ZeroDivisionError")), outcome
    assert "CANARY" not in outcome.output
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert (folder / "secret").read_text() == "CANARY"
    assert not [path for path in ("/tmp/mai-thinking-escape", "/dev/shm/mai-thinking-escape") if os.path.exists(path)]


@pytest.mark.parametrize("code", GREEDY, ids=[code[:20] for code in GREEDY])
def test_a_greedy_program_is_ended(code: str) -> None:
    begin = time.monotonic()
    outcome = run_python(code, seconds=0.3, megabytes=128)
    assert outcome.failed
    assert GREEDY[code] in outcome.failed
    assert len(outcome.output) <= 65_536
    assert time.monotonic() - begin < 30


def test_the_isolation_is_whole() -> None:
    assert isolation() == ""


def test_without_the_lock_the_same_program_reads_the_file(places: dict[str, object]) -> None:
    """The negative control: it is the kernel's hold that stops the others."""
    code = f"print(open('{places['secret']}').read())"
    assert run_python(code, seconds=5.0, megabytes=256, locked=False).output == "CANARY\n"
    assert "CANARY" not in run_python(code, seconds=5.0, megabytes=256).output


def test_what_computing_takes_is_there() -> None:
    code = "import collections, datetime, decimal, fractions, itertools, json, math, random, re, statistics, string\n"
    code += "print(math.isqrt(10**20), json.dumps({'a': [1.5]}), re.sub('a', 'b', 'aa'), sorted({'x', 'y'}))"
    outcome = run_python(code, seconds=5.0, megabytes=256)
    assert (outcome.output, outcome.failed) == ("10000000000 {\"a\": [1.5]} bb ['x', 'y']\n", "")


def test_the_environment_of_the_trainer_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAI_THINKING_SECRET", "CANARY")
    outcome = run_python("import os; print(dict(os.environ), os.getcwd())", seconds=5.0, megabytes=256)
    assert "CANARY" not in outcome.output
    assert "/" in outcome.output


def test_no_process_is_left() -> None:
    """Also of a program that is ended."""
    run_python("while True: pass", seconds=0.2, megabytes=128)
    children = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=False
    )
    assert "sandbox_child" not in children.stdout
