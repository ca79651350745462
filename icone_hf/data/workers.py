"""What worker processes of a data loader have in common."""

import signal


def outlive_termination(worker: int) -> None:
    """Let a loader's worker ignore SIGTERM.

    Clusters send it to all processes of a job. The one that trains saves its work first, and needs its workers until
    then; they end when it does.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
