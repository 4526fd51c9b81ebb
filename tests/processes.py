"""Processes for tests of torch.distributed: started once, then given one function after another."""

import faulthandler
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

# Longer than any test takes on a busy machine: processes that wait for each other in vain fail.
SECONDS = 60


class Processes:
    """A process group on the CPU (gloo) that runs functions for tests."""

    def __init__(self, size: int, folder: Path) -> None:
        """Prepares ``size`` processes, which meet in a file of ``folder``."""
        self.size = size
        self._folder = folder
        self._starts = 0
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Calls a function of a module in every process, and fails where one of them does."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        waiting = list(self._connections)
        while waiting:
            ready = wait(waiting, SECONDS)
            if not ready:
                self._fail(f"{len(waiting)} of {self.size} processes hang")
            for connection in ready:
                assert isinstance(connection, Connection)
                waiting.remove(connection)
                try:
                    error = connection.recv()
                except EOFError:
                    error = "it died"
                if error is not None:
                    rank = self._connections.index(connection)
                    self._fail(f"in process {rank} of {self.size}: {error}")

    def stop(self) -> None:
        """Ends the processes, whatever they do."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        context = get_context("spawn")
        self._starts += 1
        store = self._folder / f"store-{self._starts}"  # A file of its own: no port can be taken.
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _fail(self, reason: str) -> None:
        # The others may wait for the one that failed: the next test starts new ones.
        self.stop()
        pytest.fail(reason, pytrace=False)


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    """Runs what comes over the connection, until it is closed, and answers None or the error."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size
    )
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(SECONDS - 10)
        try:
            function(*arguments)
            connection.send(None)
        except BaseException:
            connection.send(traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
