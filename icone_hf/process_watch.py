"""Ends all processes once one of them fails or dies.

Rank 0 listens, and every other rank keeps a connection to it. Who fails says so, whose connection closes is dead, and
rank 0 tells all others. So no process waits for a dead one: not over NCCL, which notices nothing, and not without a
launcher that looks after its processes. The operating system closes the connections of a killed process at once, and
those to a lost computer after half a minute.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from .errors import PeerError, exit_code

logger = logging.get_logger(__name__)

GRACE = 10.0  # seconds in which a process may end by itself after another's failure
NEWS = 3.0  # seconds that the news of a failure may need longer than the error that it causes elsewhere
CONNECTING = 30.0
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, probes

_watch: "_Watch | None" = None


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """End every process once one of them fails.

    All processes enter the block. One that waits for another, in a collective, can't be interrupted: it is ended, with
    a line that says why, unless it leaves the block by itself.

    Raises:
        PeerError: in place of an error that another process's failure has caused.
    """
    if not start():
        yield
        return
    try:
        yield
    except BaseException as error:
        if peer := stop(error):
            raise peer from error
        raise
    stop()


def start() -> bool:
    """Start to watch, in all processes at once.

    Returns:
        Whether it has started: not where there is one process, or a watch already.
    """
    global _watch
    if _watch is not None or PartialState().num_processes == 1:
        return False
    _watch = _Watch()
    return True


def stop(error: BaseException | None = None) -> PeerError | None:
    """Stop to watch; tell the others of an error.

    Returns:
        The failure of another process that came before the error, and may have caused it.
    """
    global _watch
    watch, _watch = _watch, None
    if watch is None:
        return None
    if error is not None:
        return watch.fail(error)
    watch.leave()
    return None


def is_running() -> bool:
    """Say whether the processes are watched."""
    return _watch is not None


class _Watch:
    """Hold one process's connections, read by threads."""

    def __init__(self) -> None:
        state = PartialState()
        self.rank, self.num_processes = state.process_index, state.num_processes
        self._first: PeerError | None = None  # failure of another process
        self._heard, self._left = threading.Event(), threading.Event()
        self._complete = threading.Event()  # rank 0 is connected with all others
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._server: socket.socket | None = None
        # Rank 0 says where it listens. The token keeps strangers out.
        offer: list[Any] = [None]
        if self.rank == 0:
            self._server = _listen()
            offer = [(self._server.getsockname()[1], secrets.token_hex())]
        port, token = broadcast_object_list(offer)[0]
        if self._server is not None:
            self._start(self._accept, self._server, token)
            self._complete.wait(CONNECTING)
        else:
            self._connect(port, token)
        state.wait_for_everyone()  # whoever fails from here on can tell all others

    # --- connections ---

    def _connect(self, port: int, token: str) -> None:
        address = ("127.0.0.1" if _is_one_computer() else os.environ.get("MASTER_ADDR", "127.0.0.1"), port)
        try:
            connection = socket.create_connection(address, timeout=CONNECTING)
        except OSError as error:
            logger.warning(f"Rank {self.rank} can't reach rank 0 at {address}, so neither notices if one dies: {error}")
            return
        connection.settimeout(None)
        _keep_alive(connection)
        self._connections.append(connection)
        self._send(connection, [token, self.rank, socket.gethostname(), os.getpid()])
        self._start(self._listen_to, connection.makefile(errors="replace"), "rank 0")

    def _accept(self, server: socket.socket, token: str) -> None:
        with contextlib.suppress(OSError):  # closed by leave
            while True:
                connection, _ = server.accept()
                _keep_alive(connection)
                self._start(self._greet, connection, token)

    def _greet(self, connection: socket.socket, token: str) -> None:
        lines = connection.makefile(errors="replace")
        with contextlib.suppress(OSError, ValueError, TypeError):  # whatever a stranger sends
            found, rank, host, pid = json.loads(lines.readline(1000))
            if secrets.compare_digest(found, token):
                self._connections.append(connection)
                if len(self._connections) == self.num_processes - 1:
                    self._complete.set()
                self._listen_to(lines, f"rank {rank} (process {pid} on {host})")

    def _listen_to(self, lines: TextIO, who: str) -> None:
        """Read one message, or notice the end."""
        line = ""
        with contextlib.suppress(OSError):
            line = lines.readline()
        if not line.endswith("\n"):
            self._hear(f"{who} has ended without a word: it was killed, or its computer is lost.", 1)
        elif message := json.loads(line):
            self._hear(*message)

    def _send(self, connection: socket.socket, message: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended
            connection.sendall((json.dumps(message) + "\n").encode())

    def _start(self, work: Any, *args: Any) -> None:
        threading.Thread(target=work, args=args, daemon=True, name="icone_hf process watch").start()

    # --- failures ---

    def _hear(self, message: str, code: int) -> None:
        """Take in the first failure of another process."""
        with self._lock:
            if self._first is not None or self._left.is_set():
                return
            self._first = PeerError(message, code)
        if self.rank == 0:
            self._tell([message, code])
        self._heard.set()
        if not self._left.wait(GRACE):
            print(f"Rank {self.rank} of {self.num_processes} ends, since {message}", file=sys.stderr, flush=True)
            os._exit(code)

    def fail(self, error: BaseException) -> PeerError | None:
        """Tell the others of an error; return its cause."""
        # torch reports by a RuntimeError that a peer has closed its connection. Our own errors follow from nothing.
        may_follow = isinstance(error, RuntimeError) and not type(error).__module__.startswith("icone_hf.")
        if may_follow:
            self._heard.wait(NEWS)
        message = [f"rank {self.rank} has failed: {type(error).__name__}: {error}", exit_code(error)]
        self.leave(None if self._first else message)
        return self._first if may_follow else None

    def leave(self, message: Any = None) -> None:
        """Tell the others that this process is done.

        Or the message says how it has failed.
        """
        with self._lock:
            self._left.set()
        self._tell(message)
        for connection in [*self._connections, self._server]:
            if connection is not None:
                with contextlib.suppress(OSError):  # the other end may have gone
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
                connection.close()

    def _tell(self, message: Any) -> None:
        for connection in list(self._connections):
            self._send(connection, message)


def _is_one_computer() -> bool:
    """Say whether all processes are on this computer."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def _listen() -> socket.socket:
    if _is_one_computer():
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _keep_alive(connection: socket.socket) -> None:
    """Ask now and then whether the other end lives."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
