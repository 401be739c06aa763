"""Trainings in processes that are forked from the tests' own, which spares each of them the import of PyTorch."""

import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys

import torch

import train
from plumbing.files import command

SECONDS = 200           # after which a process that is not at its end is killed


def train_forked(out, world, *options, prepare=lambda rank: None):
    """Train in so many processes, as torchrun and a shell start them. Returns their exit codes and what they printed.
    prepare: called in each of them with its number, before train.py begins."""
    importlib.import_module("torch._dynamo")                # what is imported late, once here and not in every process
    out.mkdir(parents=True, exist_ok=True)
    printed = out / "printed.txt"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def work(rank):
        torch.set_num_threads(1)                            # the other threads are not there after a fork
        file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)           # they may be ignored here, as under nohup
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = ["train", *map(str, options), "--out", str(out)]
        prepare(rank)
        command(train.main)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=[rank], daemon=True) for rank in range(world)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
    finally:                                                # also when a test is interrupted
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes], printed.read_text()


def in_step(number, act, rank=0):
    """What prepares the process of this rank to call act() in the middle of a step, counted from one."""
    def prepare(own):
        draw = train.draw

        def draw_and_act(seed, step, *rest):
            if step == number - 1 and own == rank:
                act()
            return draw(seed, step, *rest)
        train.draw = draw_and_act
    return prepare


def signal_in_step(number, *signals, rank=0):
    """The same for an act that sends the process signals."""
    return in_step(number, lambda: [os.kill(os.getpid(), each) for each in signals], rank)


def short_of_memory(*numbers):
    """boot_losses for train.py, of which the calls with these numbers run out of memory, in either of PyTorch's words.
    """
    calls, losses = itertools.count(), train.boot_losses

    def boot_losses(*args, **condition):
        number = next(calls)
        if number in numbers:
            raise torch.OutOfMemoryError("CUDA out of memory") if number else RuntimeError("can't allocate memory")
        return losses(*args, **condition)
    return boot_losses
