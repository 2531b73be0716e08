"""Runs functions as several gloo ranks on this machine, and scripts, in processes that are forked from one that has
imported the library: a fresh Python takes six seconds of a core for that."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mai_thinking.launch.warm_workers import run_script

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ranks", "mai_thinking.recipes.grpo", "mai_thinking.recipes.pretrain"])


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """`function(rank, *arguments)` in `world` processes with torch.distributed initialised; the results by rank.

    AssertionError with every rank's traceback if a rank raises: the others then only say that it has gone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
    processes = [
        CONTEXT.Process(target=_rank_main, args=(rank, world, port, pipes[rank][1], function, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    answers: list[tuple[bool, Any]] = []
    try:
        for rank, (receiving, sending) in enumerate(pipes):
            sending.close()
            if not receiving.poll(timeout if all(worked for worked, _ in answers) else 10):
                answers.append((False, f"rank {rank} did not answer within {timeout} s"))
                continue
            try:
                answers.append(receiving.recv())
            except EOFError:
                processes[rank].join(5)
                answers.append((False, f"rank {rank} ended with {processes[rank].exitcode} and no answer"))
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    wrong = [f"rank {rank}:\n{answer}" for rank, (worked, answer) in enumerate(answers) if not worked]
    assert not wrong, "\n\n".join(wrong)
    return [answer for _, answer in answers]


def _rank_main(rank: int, world: int, port: int, pipe: Any, function: Callable[..., Any], arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    try:
        dist.init_process_group("gloo")
        answer = True, function(rank, *arguments)
        dist.destroy_process_group()
    except BaseException:
        answer = False, traceback.format_exc()
    pipe.send(answer)


def start_script(script: Path, *arguments: str, output: Path, **environment: str) -> Any:
    """The process of a script of ours with one thread; what it says goes to the file `output`, a new one. It ends with
    its last word, or with the server that it is forked from."""
    output.touch()
    process = CONTEXT.Process(target=_script_main, args=(str(script), list(arguments), environment, str(output)))
    process.start()
    return process


def _script_main(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    import torch

    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    run_script(script, arguments, environment)
