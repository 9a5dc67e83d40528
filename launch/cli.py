"""What every launcher does the same way: flags, configs, one-line errors, exit codes."""

import difflib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from absl import flags  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

from trm_jax.train import distributed  # noqa: E402
from trm_jax.train.preemption import EXIT_CODE, Preempted  # noqa: E402
from trm_jax.train.roll_call import Missing  # noqa: E402
from trm_jax.types import UserError  # noqa: E402


def define_config(required: bool = True) -> None:
    """Adds --config (a file of configs/, with `:argument`) whose fields are flags as well."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, e.g. configs/demo.py or configs/coco.py:0.1",
        lock_config=True,
    )
    if required:
        flags.mark_flag_as_required("config")


def define_processes() -> None:
    """Adds --start_timeout, for commands that several processes can run together."""
    flags.DEFINE_float(
        "start_timeout", 300.0, "Seconds until all processes must be there", lower_bound=0.0
    )


def join_processes() -> None:
    """Joins the other processes of the run, if there are any; before jax sees a device."""
    distributed.initialize(flags.FLAGS["start_timeout"].value)


def no_arguments(arguments: Sequence[str]) -> None:
    """Raises UserError if there are words on the command line that are no flags."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is no flag; flags are written --name=value")


def run(main: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> None:
    """Parses the flags, calls `main` with the other words and exits.

    0: done; 2: the user's mistake, told in one line; 75: stopped by a signal after a checkpoint;
    1: anything else. What ends one process of several ends them all.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    if argv is not None:
        sys.argv = list(argv)  # where ml_collections looks for the overrides of config fields
    code, reason = 0, ""
    try:
        main(_parse(sys.argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code, reason = 2, str(error)
    except Preempted as stopped:
        print(stopped, file=sys.stderr)
        code, reason = EXIT_CODE, str(stopped)
    except (FloatingPointError, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        code, reason = 1, str(error)
    except Exception as error:  # noqa: BLE001 (the exit code must not depend on absl's handlers)
        traceback.print_exc()
        code, reason = 1, f"{type(error).__name__}: {_one_line(error)}"
    sys.stdout.flush()
    distributed.leave(code, reason)
    if code:
        sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    if any(word in ("--help", "-h", "-help", "--helpfull") for word in argv[1:]):
        module = sys.modules["__main__"]
        print((module.__doc__ or "").strip())
        print(flags.FLAGS.main_module_help())
        sys.exit(0)
    config = _config_argument(argv).partition(":")[0]
    if config and not os.path.isfile(config):
        # ml_collections would report it only when the first field is read.
        raise UserError(f"--config: there is no file {config}")
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        raise UserError(_misspelt(argv, str(error.args[0] if error.args else error))) from None
    except (OSError, flags.Error, ImportError, SyntaxError, ValueError, TypeError) as e:
        raise UserError(_one_line(e)) from None
    return rest[1:]


def _one_line(error: Exception) -> str:
    text = str(error)
    # What a config file refuses; ml_collections tells it with a traceback.
    text = re.sub(r"Error whilst parsing config file.*^ValueError: ", "", text, flags=re.S | re.M)
    text = " ".join(text.split())
    missing = re.match(r"flag --(\w+)=None: .* must have a value", text)
    if missing:
        return f"--{missing[1]} is missing; --help lists the flags"
    return re.sub(r"^FATAL Flags parsing error:?\s*", "", text) or type(error).__name__


def _misspelt(argv: Sequence[str], message: str) -> str:
    """Names the config field on the command line that does not exist, and the nearest one."""
    config = _config_argument(argv)
    known = _fields(_load(config)) if config else []
    for word in argv[1:]:
        name = word.split("=", 1)[0].lstrip("-")
        field = name.removeprefix("config.")
        if name.startswith("config.") and field not in known:
            near = difflib.get_close_matches(field, known, n=1, cutoff=0.0)
            hint = f"; did you mean --config.{near[0]}?" if near else ""
            return f"--config.{field}: the config has no such field{hint}"
    return " ".join(message.split())


def _config_argument(argv: Sequence[str]) -> str:
    """The value of --config, written with "=" or as the next word; "" if there is none."""
    value = ""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word in ("--config", "-config"):
            value = following
        elif word.startswith(("--config=", "-config=")):
            value = word.split("=", 1)[1]
    return value


def _load(argument: str) -> ConfigDict | None:
    import importlib.util

    path, _, option = argument.partition(":")
    spec = importlib.util.spec_from_file_location("config_module", path)
    if spec is None or spec.loader is None or not os.path.exists(path):
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(option)


def _fields(config: ConfigDict | None, prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in config.items() if config is not None else ():
        name = f"{prefix}{key}"
        names.append(name)
        if isinstance(value, ConfigDict):
            names += _fields(value, f"{name}.")
    return names
