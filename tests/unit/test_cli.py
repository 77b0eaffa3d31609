"""The table of subcommands."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dion import cli
from megatron_dion.commands.errors import ToolError, run_tool
from megatron_dion.spelling import did_you_mean


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_dion", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_list_of_subcommands_needs_no_torch() -> None:
    code = (
        "import sys\nfrom megatron_dion import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert set(cli.COMMANDS) <= set(ended.stdout.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_describes_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: megatron-dion {name}" in said
    assert len(said.splitlines()) > 5


@pytest.mark.parametrize("step", ["corpus", "tokenizer", "preprocess"])
def test_steps_of_data(step: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["data", step, "--help"])
    assert end.value.code == 0
    assert f"usage: megatron-dion data {step}" in capsys.readouterr().out


def test_flags_of_a_run_go_to_the_command_that_takes_them() -> None:
    args = cli.parse("launch recipe.yaml --nodes 2 -- --lr 1 --swiglu".split())
    assert (args.nodes, args.flags) == (2, ["--lr", "1", "--swiglu"])
    assert cli.parse("launch recipe.yaml --nodes 2".split()).flags == []
    with pytest.raises(SystemExit) as end:
        cli.parse("doctor -- --lr 1".split())
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("inspect folder --verfy", ": did you mean --verify?"),
        ("inspect folder --zzz", "unrecognized arguments: --zzz"),
    ],
)
def test_misspelt_flags_are_named(
    words: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse(words.split())
    assert end.value.code == 2
    said = capsys.readouterr().err.rstrip()
    assert said.endswith(meant)


def test_several_misspelt_flags() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--dion-rank-fraction", "--dion-momentum", "--lr"):
        parser.add_argument(flag)
    message = "unrecognized arguments: --dion-rank=0.5 --zzz --dion-momentun 1"
    assert did_you_mean(message, parser) == ": did you mean --dion-rank-fraction, --dion-momentum?"
    assert did_you_mean("argument --lr: invalid float value: '--dion-rank'", parser) == ""


READER_HAS_GONE = """
import os
from megatron_dion.commands.errors import ToolError, run_tool
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
def main():
    print("line\\n" * {lines})
    {end}
run_tool("x", main)
"""


@pytest.mark.parametrize(
    ("lines", "end", "code", "said"),
    [
        (1, "return None", 0, ""),
        (100_000, "return None", 1, ""),
        (1, "raise ToolError('bad')", 1, "x: error: bad\n"),
    ],
)
def test_reader_may_stop_reading(lines: int, end: str, code: int, said: str) -> None:
    script = READER_HAS_GONE.format(lines=lines, end=end)
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, env=buffered)
    assert (ended.returncode, ended.stderr) == (code, said)


def failing(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ToolError("no such thing"), "megatron-dion plan: error: no such thing"),
        (FileNotFoundError(2, "No such file", "x"), "megatron-dion plan: error: x: No such file"),
        (
            ModuleNotFoundError("No module named 'yaml'", name="yaml"),
            "megatron-dion plan: error: it needs the package yaml: "
            "pip install 'megatron-dion[run,data]'",
        ),
    ],
)
def test_mistakes_are_one_line(error: Exception, said: str) -> None:
    with pytest.raises(SystemExit) as end:
        run_tool("megatron-dion plan", lambda: failing(error))
    assert end.value.code == said


def test_faults_of_our_own_are_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError):
        run_tool("x", lambda: failing(ModuleNotFoundError("no", name="megatron_dion.plan")))


def test_away_from_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("plan", "160M", "--dp", "8", "--optimizer", "dion:1/4")
    assert ended.returncode == 0, ended.stderr
    for words, named in (
        ("convergence check", "no cases in tests/convergence: name some, or start in a checkout"),
        ("launch recipe.yaml --nodes 1", "recipe.yaml: No such file or directory"),
        ("inspect .", ". holds no checkpoint"),
    ):
        ended = run(*words.split())
        assert ended.returncode == 1
        assert named in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
