"""Check a recipe for a number of nodes and submit it to Slurm.

Renders the recipe's flags for that many GPUs into the run directory, lets Megatron and this project
check the flags as the run itself would, and only then calls sbatch.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import yaml

from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.flags import read_flags
from megatron_dion_tools.terminal import quiet_imports

SCRIPT = Path("examples", "slurm", "pretrain.sbatch")
SHARED = "common.args"
KEYS = {"description", "arguments", "topologies"}
CAPABILITIES = 9.0, 10.0
"""Compute capabilities of Hopper and Blackwell."""


class Recipe(NamedTuple):
    """Flags of a model and of its training, and more of them by number of GPUs."""

    path: Path
    description: str
    arguments: list[str]
    topologies: dict[int, list[str]]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Read a recipe; the flags of the file `common.args` beside it come first.

        Raises:
            ToolError: The file is not a recipe.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ToolError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict) or set(content) != KEYS:
            raise ToolError(f"{path}: a recipe must have the keys {', '.join(sorted(KEYS))}")
        shared = path.with_name(SHARED)
        arguments = [*(read_flags(shared) if shared.is_file() else [])]
        arguments += shlex.split(content["arguments"])
        topologies = {int(gpus): shlex.split(text) for gpus, text in content["topologies"].items()}
        return cls(path, content["description"], arguments, topologies)

    def flags(self, gpus: int) -> list[str]:
        """Return all flags for a number of GPUs.

        Raises:
            ToolError: The recipe has no topology for this number.
        """
        if gpus not in self.topologies:
            known = ", ".join(map(str, sorted(self.topologies)))
            fix = "change --nodes or --gpus-per-node, or add one to the recipe"
            raise ToolError(f"{self.path}: no topology for {gpus} GPUs, only for {known}: {fix}")
        return [*self.arguments, *self.topologies[gpus]]


def check(flags: Sequence[str], gpus: int, capabilities: Sequence[float] = CAPABILITIES) -> None:
    """Refuse what the run would refuse once it has started, as far as it can be known here.

    Args:
        flags: Of pretrain_gpt.py.
        gpus: The run's ranks.
        capabilities: Compute capabilities of GPUs that the run must start on.

    Raises:
        ToolError: It has the line that the run would end with.
    """
    from megatron_dion.platforms import cpu

    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as in rank.sh
    environment = mock.patch.dict(os.environ, CUDA_DEVICE_MAX_CONNECTIONS=connections)
    with quiet_imports(), contextlib.redirect_stdout(None), environment:
        cpu.install(hide_gpus=True)  # the machine that submits may have no GPU
        objections = {one: _objection(flags, gpus, one) for one in capabilities}
    for capability, line in objections.items():
        if line and set(objections.values()) != {line}:  # other GPUs would do
            line += f" (on compute capability {capability}, where it is {connections}; if the GPUs"
            line += " are others, give --compute-capability)"
        if line:
            raise ToolError(line)


def _objection(flags: Sequence[str], gpus: int, capability: float) -> str:
    """The line that a run would end with on GPUs of a compute capability, if any."""
    from megatron_dion.megatron.capabilities import importing
    from megatron_dion.megatron.errors import ConfigurationError

    major = int(capability)
    properties = mock.Mock(return_value=SimpleNamespace(major=major))
    pair = mock.Mock(return_value=(major, 0))
    gpu = {"get_device_properties": properties, "get_device_capability": pair}
    with mock.patch.multiple("torch.cuda", **gpu):
        try:
            with importing("pretrain_gpt.py"):
                from megatron_dion.megatron.pretrain import check_arguments
            check_arguments(flags, "cuda", gpus)
        except ConfigurationError as error:
            return str(error)
    return ""


def render(recipe: Recipe, flags: Sequence[str], gpus: int) -> str:
    """Return the text of an arguments file: a flag with its values on each line."""
    lines = [f"# {recipe.path.name} on {gpus} GPUs: {recipe.description}"]
    for word in flags:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags; what follows `--` is pretrain_gpt.py's."""
    parser.usage = "%(prog)s RECIPE --nodes N [options] [-- FLAG of pretrain_gpt.py ...]"
    parser.set_defaults(flags=[])
    add = parser.add_argument
    add("recipe", type=Path, help="a file of examples/recipes/")
    add("--nodes", type=int, required=True)
    add("--gpus-per-node", type=int, default=8)
    add("--run-dir", type=Path, help="default: runs/<the recipe's name>")
    add("--sbatch-flag", action="append", default=[], metavar="FLAG", help="as --time=2:00:00")
    what = "of the cluster's GPUs: all must do (9.0 10.0, Hopper and Blackwell)"
    add("--compute-capability", nargs="+", type=float, default=CAPABILITIES, help=what)
    add("--dry-run", action="store_true", help="check, print, and submit nothing")


def run(args: argparse.Namespace) -> int:
    """Check and submit; the exit code is sbatch's."""
    gpus = args.nodes * args.gpus_per_node
    recipe = Recipe.read(args.recipe)
    flags = [*recipe.flags(gpus), *args.flags]
    check(flags, gpus, args.compute_capability)
    run_dir = (args.run_dir or Path("runs", args.recipe.stem)).absolute()
    arguments_file = run_dir / "recipe.args"
    text = render(recipe, flags, gpus)
    command = ["sbatch", f"--job-name={args.recipe.stem}", f"--nodes={args.nodes}"]
    command += [f"--gpus-per-node={args.gpus_per_node}", f"--output={run_dir / 'slurm-%j.log'}"]
    command += [*args.sbatch_flag, str(SCRIPT), str(arguments_file)]
    if args.dry_run:
        print(f"{text}\n{shlex.join(command)}")
        return 0
    if not SCRIPT.is_file():
        raise ToolError(f"there is no {SCRIPT}: submit from the repository's root")
    if shutil.which("sbatch") is None:
        raise ToolError("there is no sbatch on this machine: use --dry-run, or a login node")
    run_dir.mkdir(parents=True, exist_ok=True)
    arguments_file.write_text(text, encoding="utf-8")
    environment = {**os.environ, "RUN_DIR": str(run_dir)}
    return subprocess.run(command, env=environment).returncode
