"""Check a recipe for a number of nodes and submit it to Slurm.

Renders the recipe's flags for that many GPUs into the run directory, lets Megatron and this project
check them as the run itself would, and only then calls sbatch.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_dion_tools.errors import ToolError
from megatron_dion_tools.local.flags import read_flags
from megatron_dion_tools.terminal import quiet_imports

SCRIPT = Path("examples", "slurm", "pretrain.sbatch")
SHARED = "common.args"
KEYS = {"description", "arguments", "topologies"}


@dataclass(frozen=True)
class Recipe:
    """A model, and how it is trained and spread.

    Attributes:
        path: of its file.
        description: one line.
        arguments: Megatron's flags, on any number of GPUs.
        topologies: by number of GPUs, more flags.
    """

    path: Path
    description: str
    arguments: list[str]
    topologies: dict[int, list[str]]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Reads a recipe; the file `common.args` beside it comes first.

        Raises:
            ToolError: it is not a recipe.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ToolError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(content, dict) or set(content) != KEYS:
            raise ToolError(f"{path}: not a recipe, which has {', '.join(sorted(KEYS))}")
        shared = path.parent / SHARED
        return cls(
            path,
            content["description"],
            [
                *(read_flags(shared) if shared.is_file() else []),
                *shlex.split(content["arguments"]),
            ],
            {int(gpus): shlex.split(flags) for gpus, flags in content["topologies"].items()},
        )

    def flags(self, gpus: int) -> list[str]:
        """All flags for a number of GPUs.

        Raises:
            ToolError: the recipe has no topology for it.
        """
        if gpus not in self.topologies:
            known = ", ".join(map(str, sorted(self.topologies)))
            raise ToolError(
                f"{self.path}: no topology for {gpus} GPUs, only for {known}: change --nodes or "
                "--gpus-per-node, or add one to the recipe"
            )
        return [*self.arguments, *self.topologies[gpus]]


def check(flags: Sequence[str], gpus: int) -> None:
    """What the run would refuse once it has started, as far as it can be known here.

    Raises:
        ToolError: with the line that the run would end with.
    """
    from megatron_dion.megatron.errors import ConfigurationError
    from megatron_dion.platforms import cpu

    cpu.install(hide_gpus=True)  # the machine that submits may have no GPU
    with quiet_imports(), contextlib.redirect_stdout(None):
        cpu.install_megatron_patches()
        from megatron_dion.megatron.pretrain import check_arguments

        try:
            check_arguments(flags, "cuda", gpus)
        except ConfigurationError as error:
            raise ToolError(str(error)) from error


def render(recipe: Recipe, flags: Sequence[str], gpus: int) -> str:
    """The text of an arguments file: a flag with its values on each line."""
    lines = [f"# {recipe.path.name} on {gpus} GPUs: {recipe.description}"]
    for word in flags:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return "\n".join(lines) + "\n"


def sbatch_command(arguments: argparse.Namespace, run_dir: Path, arguments_file: Path) -> list[str]:
    """The command that submits the run."""
    return [
        "sbatch",
        f"--job-name={arguments.job_name}",
        f"--nodes={arguments.nodes}",
        f"--gpus-per-node={arguments.gpus_per_node}",
        f"--output={run_dir / 'slurm-%j.log'}",
        *arguments.sbatch_flag,
        str(arguments.script),
        str(arguments_file),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags; what follows `--` is pretrain_gpt.py's."""
    parser.usage = "%(prog)s RECIPE --nodes N [options] [-- FLAG of pretrain_gpt.py ...]"
    parser.set_defaults(flags=[])
    parser.add_argument("recipe", type=Path, help="a file of examples/recipes/")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--job-name", help="default: the recipe's name")
    parser.add_argument("--run-dir", type=Path, help="default: runs/<job name>")
    parser.add_argument(
        "--sbatch-flag", action="append", default=[], metavar="FLAG", help="for example --time=2:00"
    )
    parser.add_argument(
        "--script", type=Path, default=SCRIPT, metavar="FILE", help="the job (%(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, print, and submit nothing")


def run(arguments: argparse.Namespace) -> int:
    """Check and submit; the exit code is sbatch's."""
    arguments.job_name = arguments.job_name or arguments.recipe.stem
    gpus = arguments.nodes * arguments.gpus_per_node
    if min(arguments.nodes, arguments.gpus_per_node) < 1:
        raise ToolError("--nodes and --gpus-per-node must be at least 1")
    recipe = Recipe.read(arguments.recipe)
    flags = [*recipe.flags(gpus), *arguments.flags]
    check(flags, gpus)
    run_dir = (arguments.run_dir or Path("runs", arguments.job_name)).absolute()
    arguments_file = run_dir / "recipe.args"
    command = sbatch_command(arguments, run_dir, arguments_file)
    text = render(recipe, flags, gpus)
    if arguments.dry_run:
        print(text + "\n" + shlex.join(command))
        return 0
    if not arguments.script.is_file():
        raise ToolError(
            f"--script {arguments.script} is not a file: submit from the repository's root"
        )
    if shutil.which("sbatch") is None:
        raise ToolError("there is no sbatch on this machine: use --dry-run, or a login node")
    run_dir.mkdir(parents=True, exist_ok=True)
    arguments_file.write_text(text, encoding="utf-8")
    environment = {**os.environ, "RUN_DIR": str(run_dir)}
    return subprocess.run(command, env=environment).returncode
