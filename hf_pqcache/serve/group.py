"""The processes of one tensor-parallel group on one machine: this one leads, the others follow it; knows no model, no engine.

A follower is told what to do over its input, which stays open as long as the leader lives: its end is the leader's. What it
has to say when it ends comes over its output, whose end is the follower's. So nobody waits for a process that is gone, however
it went, and whatever collective the others are in.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: What a follower runs.
FOLLOWER = "hf_pqcache.serve.follower"
#: Of the environment, what a leader must not leave behind.
WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
END_S = 5


class LostError(RuntimeError):
    """A process of the group has ended that should not have."""


class Group:
    """The followers of this process, which is rank 0 from now on, until `end`.

    Args:
        size: of the group, this process included.
        order: what followers are told, to be pickled.
        when_lost: called in a thread, once, with what is to be said of a follower that has ended by itself.

    Attributes:
        error: the same, once `when_lost` has returned, and `lost` is set.
    """

    def __init__(self, size: int, order: Any, when_lost: Callable[[LostError], None]) -> None:
        self.when_lost, self.lost = when_lost, threading.Event()
        self.error: LostError | None = None
        self._is_over, self._lock = False, threading.Lock()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["NCCL_GRAPH_MIXING_SUPPORT"] = "0"  # as transformers' engine wants it, before NCCL begins
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
        self.processes: list[subprocess.Popen[bytes]] = []
        told = pickle.dumps(order)
        for rank in range(1, size):
            environment = {**os.environ, **world, **quiet, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                [sys.executable, "-m", FOLLOWER],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the leader, which lets requests finish
            )
            self.processes.append(process)
            threading.Thread(target=self._watch, args=(rank, process, told), daemon=True).start()
        os.environ.update(world, RANK="0", LOCAL_RANK="0")

    def _watch(self, rank: int, process: subprocess.Popen[bytes], told: bytes) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.write(told)
            process.stdin.flush()
        said = process.stdout.read().decode(errors="replace").strip()
        code = process.wait()
        with self._lock:
            if self._is_over:
                return
            self._is_over = True  # of several that end, the first is told
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        who = f"process {rank} of the {len(self.processes) + 1} that share the model"
        error = LostError(f"{who} {how}{': ' + said if said else ''}")
        self.when_lost(error)
        self.error = error
        self.lost.set()

    def may_end(self) -> None:
        """From now on nobody is lost who ends."""
        with self._lock:
            self._is_over = True

    def end(self) -> None:
        """End the followers: at once if one is lost, else those that do not end by themselves soon. May be called again."""
        self.may_end()
        for process in self.processes:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(0 if self.lost.is_set() else END_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in WORLD:
            os.environ.pop(name, None)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
