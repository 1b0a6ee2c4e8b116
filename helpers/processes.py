"""One process of a run among several (on one machine or more), and how it ends: by a signal, or with the others."""

import atexit
import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

SILENCE = 30  # seconds without a sign of life after which a process of a run counts as lost
_left = threading.Event()  # by `leave`


def world_size() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True in the one process that writes (rank 0 under a launcher, or the only one)."""
    return int(os.environ.get("RANK", 0)) == 0


def take_signals(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Make `handler` take SIGTERM and SIGINT (Ctrl-C, a notebook's stop button); returns what took them before.

    One that is ignored (`nohup`, a job in the background) stays ignored. Forked workers keep none of it.
    """
    _free_forked_workers()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    return {number: signal.signal(number, handler) for number, old in before.items() if old != signal.SIG_IGN}


@functools.cache
def _free_forked_workers() -> None:
    """From here on a forked process has the default for SIGTERM, and leaves Ctrl-C to its parent.

    A pool ends its workers by SIGTERM and waits for them: a handler of Python's may never run there (while a library
    waits for a lock), and a signal in the moment of the fork is lost to it. So SIGTERM waits until the default is back.
    """
    def in_child() -> None:
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if callable(taker := signal.getsignal(signal.SIGINT)) and taker is not signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        wait(signal.SIG_UNBLOCK)

    def wait(how: int) -> None:
        signal.pthread_sigmask(how, {signal.SIGTERM})

    os.register_at_fork(before=lambda: wait(signal.SIG_BLOCK), after_in_child=in_child,
                        after_in_parent=lambda: wait(signal.SIG_UNBLOCK))


def end_with_a_word() -> None:
    """Make SIGTERM and Ctrl-C end this process with a sentence and status 1 (`trainer.StopNotice`: in training)."""
    def stop(number: int, frame: Any) -> None:
        raise SystemExit(f"{signal.Signals(number).name}: what is done so far is kept, and the same command goes on "
                         "from there.")

    take_signals(stop)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Under a launcher the main process runs the block first and the others find what it has cached.

    On several machines the first process of each other machine follows, then the rest: caches need not be shared.
    """
    with together().main_process_first(), together().local_main_process_first():
        yield


def together() -> Any:
    """accelerate's state of all processes, to wait for each other; from the first call on one that ends ends all."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))
    if state.num_processes > 1:
        _end_together(state.process_index, state.num_processes)
    return state


@functools.cache
def _end_together(rank: int, world: int) -> None:
    """Until `leave`, the end of one of `world` processes ends them all, each with a sentence.

    One that dies closes its connections, and whatever the others wait for fails. A machine that hangs or is off the
    network closes nothing. So each process counts in the launcher's store, and ends where another is SILENCE seconds
    behind, or the store itself does not reply.
    """
    from torch.distributed import DistError
    from torch.distributed.distributed_c10d import _get_default_store

    again = "start the same command again on every machine: it goes on from the last checkpoint.\n"
    heard, store = dict.fromkeys(range(world), (0, time.monotonic())), _get_default_store().clone()

    def say_so(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        sys.__excepthook__(kind, error, trace)
        if issubclass(kind, DistError) or "by peer" in str(error):  # NCCL and the store, gloo
            sys.stderr.write(f"process {rank} of {world} ends, because another one has: its log says why; {again}")
            sys.stdout.flush()
            os._exit(1)  # at once: torn down after an error, NCCL's group of processes waits for a minute and more

    def count() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: `watch` sees that nothing is heard any more
            while not _left.wait(SILENCE / 6):
                for other, (before, _) in heard.items():
                    if (now := store.add(f"alive {other}", int(other == rank))) > before:
                        heard[other] = now, time.monotonic()

    def watch() -> None:
        while not _left.wait(1):
            since = time.monotonic() - SILENCE
            silent = [str(other) for other, (_, last) in heard.items() if last < since and other != rank]
            if silent:
                os.write(2, f"process {rank} of {world} ends, because process {', '.join(silent)} has been silent for "
                            f"{SILENCE} s; {again}".encode())
                os._exit(1)

    sys.excepthook = say_so
    atexit.register(_left.set)  # no thread is in the store when Python ends
    for work in (count, watch):
        threading.Thread(target=work, daemon=True).start()


def leave() -> None:
    """Leave the group of processes, at the end: PyTorch warns of one that is still open when a process ends."""
    together().wait_for_everyone()
    _left.set()
    together().destroy_process_group()
