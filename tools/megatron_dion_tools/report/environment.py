"""Of the report: with which software, where, and with which arguments the run was made."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_dion.megatron.progress import human_count
from megatron_dion.megatron.run_directory import Session
from megatron_dion_tools.report.folder import RunFolder
from megatron_dion_tools.report.pages import Html, element, row, table

_NONE = "–"


def environment(run: RunFolder) -> Iterator[Html]:
    """Versions, the starts of the run, and its arguments, those that differ from defaults first."""
    config = run.config
    facts = {
        **config["versions"],
        "git revision": config["git_revision"] or "not in a git repository",
        "device": config["platform"],
        "ranks": str(config["world_size"]),
    }
    yield table(("", ""), (row(name, value) for name, value in facts.items()))
    if run.starts:
        yield element("h3", "Starts")
        yield _starts(run)
    arguments, defaults = config["arguments"], config.get("defaults", {})
    differ = {k: v for k, v in arguments.items() if k in defaults and v != defaults[k]}
    alike = {k: v for k, v in arguments.items() if k not in differ}
    yield element("h3", "Arguments that differ from their defaults")
    yield _arguments(differ, defaults) if differ else element("p", _UNKNOWN, class_="none")
    yield element(
        "details",
        element("summary", f"{len(alike)} others, and those that Megatron derives"),
        _arguments(alike, defaults),
        class_="searched",
    )
    command = shlex.join(config["command_line"])
    yield element(
        "details",
        element("summary", "Command line"),
        element("p", element("code", command)),
    )


_UNKNOWN = (
    "The config.json of this run does not tell the defaults. Its command line tells what was set."
)


def _starts(run: RunFolder) -> Html:
    """With what was done since each; of a start before the first iteration there is nothing."""
    done = {session.start["iteration"]: session for session in run.sessions}
    rows = (
        row(
            str(start["iteration"]),
            start["time"].replace("T", " ").replace("+00:00", " UTC"),
            _topology(start),
            *_done(done.get(start["iteration"])),
        )
        for start in run.starts
    )
    headings = ("after iteration", "time", "ranks", "iterations", "tokens", "tokens per second")
    return table(headings, rows)


def _done(session: Session | None) -> tuple[str, str, str]:
    if session is None:
        return _NONE, _NONE, _NONE
    speed = human_count(session.tokens_per_second)
    return f"{len(session.iterations):,}", human_count(session.tokens), speed


def _topology(start: Mapping[str, Any]) -> str:
    sizes = {
        "TP": start["tensor_model_parallel_size"],
        "PP": start["pipeline_model_parallel_size"],
        "CP": start["context_parallel_size"],
        "EP": start["expert_model_parallel_size"],
        "DP": start["data_parallel_size"],
    }
    named = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    return f"{start['world_size']}: {' × '.join(named)}" if named else str(start["world_size"])


def _arguments(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> Html:
    rows = (
        row(
            element("code", name),
            element("code", _value(value)),
            element("code", _value(defaults[name]) if name in defaults else _NONE),
        )
        for name, value in arguments.items()
    )
    return table(("argument", "value", "default"), rows)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
