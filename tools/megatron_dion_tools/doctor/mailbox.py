"""A key-value store by which ranks reach rank 0 where collectives hang; each wait has an end."""

import contextlib
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store


class LostError(Exception):
    """This rank cannot reach rank 0."""


class Mailbox:
    """The store that torchrun hosts, or else rank 0.

    Args:
        environ: The variables that torchrun sets, or a job script around srun. Without them this
            is the only rank.
        seconds: How long rank 0 waits for the letters of others. They wait twice as long for
            rank 0.

    Raises:
        LostError: Rank 0 cannot be reached, or the variables are incomplete.
    """

    def __init__(self, environ: Mapping[str, str], seconds: float) -> None:
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in wanted if name not in environ]
        if "RANK" in environ and missing:
            raise LostError(f"RANK is set, but not {' and '.join(missing)}")
        self._environ = environ
        self.seconds = seconds
        self.rank, self.size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        self._store = self.connect()

    def connect(self) -> Store:
        """Open a connection to the store; a thread that may never come back needs its own."""
        if "RANK" not in self._environ:
            return dist.HashStore()  # type: ignore[attr-defined]  # not in torch's stubs
        host, port = self._environ["MASTER_ADDR"], int(self._environ["MASTER_PORT"])
        launcher_hosts = self._environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            return dist.TCPStore(  # type: ignore[attr-defined]  # not in torch's stubs
                host,
                port,
                is_master=self.rank == 0 and not launcher_hosts,
                timeout=timedelta(seconds=self.seconds),
                wait_for_workers=False,
                multi_tenant=True,  # one server for all connections of rank 0
            )
        except dist.DistError as error:
            reason = str(error).partition("\n")[0]
            raise LostError(f"no rank 0 at {host}:{port} (MASTER_ADDR): {reason}") from error

    def tell_all(self, key: str, words: str) -> str:
        """Return the words of rank 0; those of other ranks do not count.

        Raises:
            LostError: Rank 0 says nothing.
        """
        try:
            if self.rank == 0:
                self._store.set(key, words)
            self._store.wait([key], timedelta(seconds=2 * self.seconds))
            return self._store.get(key).decode()
        except dist.DistError as error:
            waited = f"within {2 * self.seconds:g} s"
            raise LostError(f"rank 0 says no {key} {waited}, or is gone") from error

    def collect(self, key: str, words: str) -> dict[int, str]:
        """Return on rank 0 the words of all ranks that have said theirs in time."""
        with contextlib.suppress(dist.DistError):  # rank 0 is gone, which `tell_all` notices
            self._store.set(f"{key}/{self.rank}", words)
        if self.rank != 0:
            return {}
        keys = {rank: f"{key}/{rank}" for rank in range(self.size)}
        with contextlib.suppress(dist.DistError):
            self._store.wait(list(keys.values()), timedelta(seconds=self.seconds))
        there = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: self._store.get(key).decode() for rank, key in there.items()}
