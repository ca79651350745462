"""Servers on this machine that stores are kept on."""

import contextlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import free_port

needs_milvus = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pymilvus", "milvus_lite")),
    reason="pymilvus or milvus-lite isn't installed",
)


@contextlib.contextmanager
def milvus_server(folder):
    """Start `milvus-lite server`; yield its address."""
    from pymilvus import MilvusClient
    from pymilvus.exceptions import MilvusException

    address = f"http://127.0.0.1:{(port := free_port())}"
    command = Path(sys.executable).with_name("milvus-lite")
    arguments = ["server", "--data-dir", str(folder / "data"), "--host", "127.0.0.1", "--port", str(port)]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen([str(command), *arguments], stdout=log, stderr=log) as process,
    ):
        try:
            ends = time.monotonic() + 60
            while True:
                try:
                    MilvusClient(address, timeout=1).close()
                    break
                except MilvusException:
                    assert process.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < ends
            yield address
        finally:
            process.terminate()
