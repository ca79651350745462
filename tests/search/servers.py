"""Servers on this machine that stores are kept on."""

import contextlib
import importlib.util
import subprocess
import sys
import time
import urllib.request
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


needs_s3 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lancedb", "moto", "flask")),
    reason="lancedb or moto[server] isn't installed",
)


@contextlib.contextmanager
def s3_server(folder):
    """Start moto's server; yield the environment variables by which LanceDB reaches it."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            ends = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"))
                    break
                except OSError:
                    assert process.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < ends
                    time.sleep(0.1)
            yield {
                "AWS_ENDPOINT": address,
                "AWS_ALLOW_HTTP": "true",
                "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "the-key",
                "AWS_SECRET_ACCESS_KEY": "the-secret",
            }
        finally:
            process.terminate()
