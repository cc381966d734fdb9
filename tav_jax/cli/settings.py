"""Reads the config from `--config=FILE --config.NAME=VALUE …`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tav_jax import config
from tav_jax.errors import InputError, MissingError, TavError


def read_config(arguments: Sequence[str]) -> Any:
    """The validated config. absl and ml_collections parse the overrides."""
    from absl import flags
    from ml_collections import config_flags

    if unknown := [a for a in arguments if not a.startswith(("--config=", "--config."))]:
        raise InputError(f"{unknown[0]!r} is not an option; settings are --config.NAME=VALUE")
    files = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    overrides = [a for a in arguments if a.startswith("--config.")]
    if problems := config.unknown_settings(a.removeprefix("--config.").split("=")[0] for a in overrides):
        raise InputError("; ".join(problems))
    path = files[-1] if files else ""
    if path and not os.path.isfile(path.split(":")[0]):
        raise MissingError(f"{path} does not exist; give a config file such as configs/default.py")
    known = dict(config.leaves(config.get_config()))
    argv, values = ["tav", *(_quote_single_text(a, known) for a in overrides)], flags.FlagValues()
    try:
        if path.endswith(".json"):
            stored = config.from_json(Path(path).read_text())
            config_flags.DEFINE_config_dict("config", stored, flag_values=values, sys_argv=argv)
        else:
            config_flags.DEFINE_config_file("config", path or config.__file__, flag_values=values, sys_argv=argv)
        values(argv)
        return config.validate(values.config)
    except TavError:
        raise
    except Exception as error:  # of any type: the config file is a program
        message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()) or type(error).__name__
        raise InputError(f"the config cannot be read: {message}") from error


def _quote_single_text(argument: str, known: dict[str, Any]) -> str:
    """Accept `edit.prompts=a man is skiing` for a setting that is a list of texts."""
    name, _, value = argument.removeprefix("--config.").partition("=")
    if isinstance(known[name], tuple) and not value.lstrip().startswith(("(", "[", "'", '"')):
        return f"--config.{name}=({value!r},)"
    return argument


def silence_background_tracebacks() -> None:
    """Orbax's threads log the traceback of a failed write. `tav` reports the same error in one sentence."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
