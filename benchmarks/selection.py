"""What the flags --data, --set and --only of the claims benchmarks mean."""

import ast
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from trm_jax.types import UserError


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """Config field -> value, of words config.FIELD=VALUE; a value that is no literal is a text."""
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.startswith("config."):
            raise UserError(f"--set={word}: write --set=config.FIELD=VALUE")
        try:
            values[name.removeprefix("config.")] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name.removeprefix("config.")] = text
    return values


def wanted(text: str, keys: Sequence[str]) -> dict[str, list[str]]:
    """Key -> accepted values, of a text KEY=VALUE[|VALUE],..; `keys` are the known ones."""
    found = {}
    # A comma inside a value, as in "tau fixed, include", is not followed by KEY=.
    for word in filter(None, re.split(r",(?=\w+=)", text)):
        key, equals, values = word.partition("=")
        if not equals or key not in keys:
            raise UserError(f"--only: {word!r} is not one of {'=, '.join(keys)}=")
        found[key] = values.split("|")
    return found


def choose(tasks: Sequence[harness.Task], text: str, keys: Sequence[str]) -> list[harness.Task]:
    """The tasks that --only=`text` wants; raises UserError if there is none."""
    accepted = wanted(text, keys)
    chosen = [task for task in tasks if matches(task, accepted)]
    if not chosen:
        raise UserError(f"--only={text}: no run matches")
    return chosen


def matches(task: harness.Task, accepted: Mapping[str, Sequence[str]]) -> bool:
    """Whether one of the task's places in the results has every accepted value."""
    of_task = {"name": task.name, "seed": task.seed or 0}
    places = [{"recipe": "", **condition, **of_task} for condition in task.conditions]
    return any(
        all(str(place.get(key)) in values for key, values in accepted.items()) for place in places
    )


def in_data(path: str) -> str:
    """A file or folder below TRM_DATA, "" where there is none."""
    root = os.environ.get("TRM_DATA", "")
    return str(Path(root) / path) if root and (Path(root) / path).exists() else ""
