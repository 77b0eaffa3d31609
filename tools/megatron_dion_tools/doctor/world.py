"""Ranks that find each other through a key-value store, each wait with an end.

No process group takes part: these words must get through where collectives hang.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from megatron_dion_tools.doctor.ranks import in_words


class LostError(Exception):
    """This rank can no longer reach rank 0; the message tells what it waited for."""


@dataclass
class World:
    """One rank's view of all ranks. Methods are called by all of them, in the same order.

    Attributes:
        rank: This one.
        size: How many there should be.
        store: Where they leave words for each other; with rank 0 or with the launcher.
        open_store: Opens a second connection to it, for a thread that may never come back.
        patience: Seconds that rank 0 waits for others. They wait twice as long for it.
        absent: The ranks that did not come, once that is known; from then on nobody waits for all.
        place: Where they did not come to.
    """

    rank: int
    size: int
    store: Store
    open_store: Callable[[], Store]
    patience: float
    absent: set[int] = field(default_factory=set)
    place: str = ""

    @property
    def present(self) -> list[int]:
        """The ranks that came so far."""
        return [rank for rank in range(self.size) if rank not in self.absent]

    def meet(self, place: str) -> bool:
        """Wait for all ranks; tell whether they came, here and everywhere before.

        Rank 0 decides who is absent, so that all act alike.
        """
        if self.absent:
            return False
        self.tell(f"{place}/{self.rank}")
        if self.rank == 0:
            self._miss(place)
            self.tell(f"{place}/absent", json.dumps(sorted(self.absent)))
        else:
            self.absent = set(json.loads(self.hear(f"{place}/absent")))
        if self.rank in self.absent:
            raise LostError(f"came too late to '{place}': rank 0 waited for {self.patience:g} s")
        return not self.absent

    def roll_call(self) -> str:
        """Say who did not come, and where to."""
        return (
            f"{in_words(self.absent)} did not come to '{self.place}' within {self.patience:g} s:"
            f" {len(self.present)} of {self.size} ranks are there"
        )

    def gather(self, place: str, words: str) -> dict[int, str]:
        """Return on rank 0 what each rank that is there gives, and nothing on the others."""
        self.tell(f"{place}/{self.rank}", words)
        if self.rank != 0:
            return {}
        self._miss(place)
        return {rank: self.hear(f"{place}/{rank}") for rank in self.present}

    def dismiss(self, code: int) -> int:
        """End all ranks with the exit code of rank 0, and none before it has spoken.

        A launcher ends all ranks as soon as one has failed, and rank 0 may hold the store.
        """
        if self.rank != 0:
            code = int(self.hear("exit code"))
            self.tell(f"left/{self.rank}")
            return code
        self.tell("exit code", str(code))
        self.tell("left/0")
        self._wait([f"left/{rank}" for rank in self.present], self.patience)
        return code

    def tell(self, key: str, words: str = "") -> None:
        """Leave words for the others.

        Raises:
            LostError: The store is gone.
        """
        try:
            self.store.set(key, words)
        except dist.DistError as error:
            raise LostError(f"rank 0 is gone, before '{key}'") from error

    def hear(self, key: str) -> str:
        """Wait for words that another rank leaves.

        Raises:
            LostError: Nobody does.
        """
        try:
            self.store.wait([key], timedelta(seconds=2 * self.patience))
            return self.store.get(key).decode()
        except dist.DistError as error:
            waited = f"{2 * self.patience:g} s"
            raise LostError(f"'{key}' did not come within {waited}, or rank 0 is gone") from error

    def _miss(self, place: str) -> None:
        """Finds out who of those present does not come to a place."""
        wanted = {rank: f"{place}/{rank}" for rank in self.present}
        if not self._wait(wanted.values(), self.patience):
            self.place = place
            self.absent |= {rank for rank, key in wanted.items() if not self.store.check([key])}

    def _wait(self, keys: Iterable[str], seconds: float) -> bool:
        try:
            self.store.wait(list(keys), timedelta(seconds=seconds))
        except dist.DistError:
            return False
        return True


def alone(patience: float) -> World:
    """Make a world of this process."""
    new: type[Store] = dist.HashStore  # type: ignore[attr-defined]  # not in torch's stubs
    return World(0, 1, new(), new, patience)


def join(environ: Mapping[str, str], patience: float) -> World:
    """Find the other ranks that a launcher describes; without a launcher, be alone.

    Args:
        environ: The variables that torchrun sets, or a job script around srun.
        patience: Seconds to wait for others.

    Raises:
        LostError: Rank 0 cannot be reached, or the description is incomplete.
    """
    if "RANK" not in environ:
        return alone(patience)
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if name not in environ]:
        raise LostError(f"RANK is set, but not {' and '.join(missing)}")
    rank = int(environ["RANK"])
    store = _connect(environ, patience, hosts=rank == 0 and not _launcher_hosts(environ))
    again = functools.partial(_connect, environ, patience, hosts=False)
    return World(rank, int(environ["WORLD_SIZE"]), store, again, patience)


def _connect(environ: Mapping[str, str], patience: float, *, hosts: bool) -> Store:
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]  # not in torch's stubs
            host,
            port,
            is_master=hosts,
            timeout=timedelta(seconds=patience),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        reason = "cannot listen on" if hosts else "no rank 0 answers at"
        raise LostError(f"{reason} {host}:{port}: {str(error).partition(chr(10))[0]}") from error


def _launcher_hosts(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
