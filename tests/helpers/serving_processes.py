"""A server whose model two processes share, in tests: how it is started, and what it says of itself; takes no model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

SIZES = ("--dtype", "float32", "--cache-tokens", "4K", "--page-size", "16", "--max-requests", "16", "--max-batch-tokens", "128")


@contextmanager
def shared(folder: Path, *more: str, model: str = "tiny", sizes: tuple[str, ...] = SIZES) -> Iterator[tuple[Any, Any, Path]]:
    """`pqcache serve --tp 2` from when it is ready -> (a client, the process, the file with what it says)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = folder / "said.txt"
    command = [sys.executable, "-m", "hf_pqcache", "serve", model, "--tp", "2", "--port", str(port), *sizes, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    with said.open("w") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        while "ready: " not in said.read_text():
            assert server.poll() is None, said.read_text()
            time.sleep(0.1)
        assert "2 processes share the model" in said.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client, server, said
    finally:
        if more:
            server.send_signal(signal.SIGTERM)  # Ray's own processes end with it
            server.wait(60)
        server.kill()
        server.wait()


def figure(client: Any, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
