"""Ranks that meet through a key-value store; each wait has an end.

No process group takes part: ranks must be able to talk where collectives hang.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from megatron_dion_tools.doctor.report import ranges


class LostError(Exception):
    """This rank cannot reach rank 0, or rank 0 goes on without it."""


class World:
    """What one rank knows of all ranks. All ranks call its methods in the same order.

    Attributes:
        rank: This one.
        size: How many ranks there should be.
        present: The ranks that have come to every meeting so far.
        missed: The meeting to which absent ranks did not come; empty while there are none.
    """

    def __init__(self, environ: Mapping[str, str], patience: float) -> None:
        """Find the other ranks that a launcher describes; without a launcher, be alone.

        Args:
            environ: The variables that torchrun sets, or a job script around srun.
            patience: Seconds that rank 0 waits for others. They wait twice as long for rank 0.

        Raises:
            LostError: Rank 0 cannot be reached, or the description is incomplete.
        """
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in wanted if name not in environ]
        if "RANK" in environ and missing:
            raise LostError(f"RANK is set, but not {' and '.join(missing)}")
        self._environ = environ
        self.patience = patience
        self.rank, self.size = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
        self.present = list(range(self.size))
        self.missed = ""
        self._store = self.connect()

    @property
    def is_complete(self) -> bool:
        """Whether no rank is absent."""
        return len(self.present) == self.size

    def connect(self) -> Store:
        """Open a connection to the store; a thread that may never come back needs its own."""
        if "RANK" not in self._environ:
            return dist.HashStore()  # type: ignore[attr-defined]  # not in stubs
        host, port = self._environ["MASTER_ADDR"], int(self._environ["MASTER_PORT"])
        launcher_hosts = self._environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            return dist.TCPStore(  # type: ignore[attr-defined]  # not in stubs
                host,
                port,
                is_master=self.rank == 0 and not launcher_hosts,
                timeout=timedelta(seconds=self.patience),
                wait_for_workers=False,
                multi_tenant=True,  # one server for all connections of rank 0
            )
        except dist.DistError as error:
            reason = str(error).partition("\n")[0]
            raise LostError(f"no rank 0 at {host}:{port} (MASTER_ADDR): {reason}") from error

    def meet(self, place: str, words: str = "") -> dict[int, str]:
        """Wait for all ranks that are present; rank 0 decides who is absent from then on.

        Args:
            place: The name of the meeting.
            words: What this rank says.

        Returns:
            By rank, on rank 0 what all ranks said that came, on others what rank 0 said.

        Raises:
            LostError: Rank 0 is gone, or has given up this rank.
        """
        try:
            self._store.set(f"{place}/{self.rank}", words)
            if self.rank == 0:
                return self._host(place, words)
            self._store.wait([place], timedelta(seconds=2 * self.patience))
            self.present, words_of_host = json.loads(self._store.get(place))
        except dist.DistError as error:
            raise LostError(f"rank 0 did not come to '{place}', or is gone") from error
        if self.rank not in self.present:
            raise LostError(f"came too late to '{place}': rank 0 waited {self.patience:g} s")
        return {0: words_of_host}

    def _host(self, place: str, words: str) -> dict[int, str]:
        keys = {rank: f"{place}/{rank}" for rank in self.present}
        if not self._all_set(keys.values()):
            self.present = [rank for rank, key in keys.items() if self._store.check([key])]
            self.missed = place
        said = {rank: self._store.get(keys[rank]).decode() for rank in self.present}
        self._store.set(place, json.dumps([self.present, words]))
        return said

    def leave(self) -> None:
        """End the last meeting; rank 0, which may hold the store, stays until all have left."""
        with contextlib.suppress(dist.DistError):
            self._store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            self._all_set(f"left/{rank}" for rank in self.present)

    def _all_set(self, keys: Iterable[str]) -> bool:
        try:
            self._store.wait(list(keys), timedelta(seconds=self.patience))
        except dist.DistError:
            return False
        return True

    def roll_call(self) -> str:
        """Say which ranks did not come, and where to."""
        absent = ranges(set(range(self.size)) - set(self.present))
        return f"rank {absent} did not come to '{self.missed}' within {self.patience:g} s"
