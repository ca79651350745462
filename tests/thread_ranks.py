"""Ranks as threads of one process: what is computed between them takes milliseconds. Processes: test_distributed.py."""

import threading

import torch

SECONDS = 30  # that a rank waits for the others


class Ranks:
    """Give every thread its rank, and exchange tensors between them; stands for torch.distributed."""

    def __init__(self, count):
        self.count = count
        self.barrier = threading.Barrier(count, timeout=SECONDS)
        self.shared, self.own = [None] * count, threading.local()

    def exchange(self, tensor):
        self.shared[self.own.rank] = tensor.clone()
        self.barrier.wait()
        everyones = list(self.shared)
        self.barrier.wait()  # nobody goes on to the next exchange before all have read
        return everyones

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.exchange(tensor)))

    def all_gather(self, places, tensor):
        for place, theirs in zip(places, self.exchange(tensor), strict=True):
            place.copy_(theirs)

    def broadcast(self, tensor, src):
        tensor.copy_(self.exchange(tensor)[src])


def on_ranks(count, function, monkeypatch):
    """Call `function(rank)` in so many threads at once and return what each returns."""
    ranks, results, errors = Ranks(count), [None] * count, []

    def run(rank):
        ranks.own.rank = rank
        try:
            results[rank] = function(rank)
        except Exception as error:
            errors.append(error)
            ranks.barrier.abort()

    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: count)
        patch.setattr(torch.distributed, "get_rank", lambda: ranks.own.rank)
        for name in ("all_reduce", "all_gather", "broadcast"):
            patch.setattr(torch.distributed, name, getattr(ranks, name))
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results
