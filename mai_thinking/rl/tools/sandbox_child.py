"""The process that `mai_thinking.rl.tools.sandbox` starts: it locks itself in, then runs the program of its standard
input. Never started by hand. Imports nothing beyond the standard library.
"""

import ctypes
import os
import resource
import struct
import sys

_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
"""Of files, by version of Landlock; from 5 on all sixteen."""
_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_X86_64 = 0xC000003E
# What computing, importing and printing take, by x86-64's numbers.
_ALLOWED = (
    0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 19, 20, 24, 25, 28, 35, 39, 60, 63, 79, 96, 97, 98, 102, 104, 107,
    108, 131, 186, 201, 202, 217, 218, 228, 229, 230, 231, 257, 262, 318, 334,
)  # fmt: skip


def lock_in(library: str) -> None:
    """Give up all that a computation does not need, but for files below `library`. OSError where the kernel cannot."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments: object) -> int:
        result = int(getattr(libc, name)(*arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
        return result

    call("prctl", 38, 1, 0, 0, 0)  # no new privileges
    call("prctl", 4, 0, 0, 0, 0)  # not dumpable: nobody of this user may look in or attach
    version = call("syscall", _CREATE, None, 0, 1)
    rights = _ALL_RIGHTS.get(version, (1 << 16) - 1)
    # From 4 on no TCP, from 6 on no signals to others.
    attributes = struct.pack("=QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = call("syscall", _CREATE, ctypes.create_string_buffer(attributes), len(attributes), 0)
    place = os.open(library, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", _READ_FILE | _READ_FOLDER, place)
    call("syscall", _ADD_RULE, rules, 1, ctypes.create_string_buffer(rule), 0)
    os.close(place)
    call("syscall", _RESTRICT, rules, 0)
    os.close(rules)
    # Another architecture's call ends the process, one that is not on the list fails with EPERM.
    allowed = [struct.pack("=HBBI", 0x15, len(_ALLOWED) - at, 0, number) for at, number in enumerate(_ALLOWED)]
    program = b"".join(
        (
            struct.pack("=HBBI", 0x20, 0, 0, 4),
            struct.pack("=HBBI", 0x15, 1, 0, _X86_64),
            struct.pack("=HBBI", 0x06, 0, 0, 0x80000000),
            struct.pack("=HBBI", 0x20, 0, 0, 0),
            *allowed,
            struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | 1),
            struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000),
        )
    )
    code = ctypes.create_string_buffer(program)
    filter_ = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    call("prctl", 22, 2, ctypes.create_string_buffer(filter_), 0, 0)


def main() -> None:
    seconds, megabytes = float(sys.argv[1]), int(sys.argv[2])
    program = sys.stdin.buffer.read().decode("utf-8", "replace")
    whole = max(1, int(seconds + 0.999))
    memory = megabytes * 2**20
    for limit, most in (
        (resource.RLIMIT_CPU, whole), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 16),
    ):  # fmt: skip
        try:
            resource.setrlimit(limit, (most, most))
        except (OSError, ValueError):  # a lower one is there already, or the system has it not
            continue
    if sys.argv[3] == "True":
        try:
            lock_in(os.path.dirname(os.__file__))
        except (OSError, AttributeError):
            sys.exit("this system cannot isolate programs")
    sys.argv = ["program"]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
