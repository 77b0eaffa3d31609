"""The table of subcommands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dion_tools import cli
from megatron_dion_tools.errors import ToolError, run_tool


def failing(error: Exception) -> int:
    raise error


def line_of(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a mistake ends."""
    with pytest.raises(SystemExit) as end:
        cli.main(words.split())
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    return line


def test_list_of_subcommands_needs_no_torch() -> None:
    code = (
        "import sys\nfrom megatron_dion_tools import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert set(cli.COMMANDS) <= set(ended.stdout.split())


@pytest.mark.parametrize("name", [*cli.COMMANDS, "data corpus"])
def test_each_describes_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: megatron-dion {name}" in said
    assert len(said.splitlines()) > 5


def test_flags_of_a_run_go_to_the_command_that_takes_them() -> None:
    args = cli.parse("launch recipe.yaml --nodes 2 -- --lr 1 --swiglu".split())
    assert (args.nodes, args.flags) == (2, ["--lr", "1", "--swiglu"])
    assert cli.parse("launch recipe.yaml --nodes 2".split()).flags == []
    with pytest.raises(ToolError, match="nothing may follow --, as --lr 1 does"):
        cli.parse("doctor -- --lr 1".split())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ToolError("no such thing"), "error: no such thing\n"),
        (FileNotFoundError(2, "No such file", "x"), "error: x: No such file\n"),
        (
            ModuleNotFoundError("No module named 'yaml'", name="yaml"),
            "error: it needs the package yaml: pip install 'megatron-dion[run,data]'\n",
        ),
    ],
)
def test_mistakes_are_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_tool(lambda: failing(error))
    assert (end.value.code, capsys.readouterr().err) == (2, said)


def test_faults_of_our_own_are_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError):
        run_tool(lambda: failing(ModuleNotFoundError("no", name="megatron_dion.plan")))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("data tokenizer --input a", "--output-prefix"),
        ("convergence update --write", "`megatron-dion convergence --write` is gone: leave it out"),
        ("data preprocess --json-keys a b", "call once for each key, with --json-key KEY"),
        ("--foo doctor", "unrecognized arguments: --foo "),
        ("doctor --timeout 0", "--timeout: must be a positive number of seconds, not 0"),
        ("doctor --timeout inf", "--timeout: must be a positive number of seconds, not inf"),
        ("nurse", "invalid choice: 'nurse'"),
        ("plan 8B --plot=a.png", "`megatron-dion plan --plot` is gone: --json has the figures"),
        ("launch recipe.yaml --nodes 1", "recipe.yaml: No such file or directory"),
    ],
)
def test_mistakes_of_the_command_line_are_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = line_of(words, capsys)
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize("gone", cli.REMOVED)
def test_what_is_gone_names_its_replacement(gone: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = f"error: `megatron-dion {gone}` is gone: {cli.REMOVED[gone]}"
    assert line_of(f"{gone} x", capsys) == said


def test_folders_may_have_the_names_of_actions_that_are_gone() -> None:
    folders = [Path("run"), Path("report")]
    assert cli.parse("convergence compare run report".split()).runs == folders


def test_module_is_the_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "megatron_dion_tools", "inspect", "."]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: . holds no complete checkpoint")


@pytest.mark.parametrize("main", ["print('x' * 10**6)", "[print('help'), exit(0)]"])
def test_reader_that_ends_first_is_no_error(main: str) -> None:
    code = f"from megatron_dion_tools import errors; errors.run_tool(lambda: {main})"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 141
