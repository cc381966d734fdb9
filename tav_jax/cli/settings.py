"""The config of a command line: `--config=FILE --config.NAME=VALUE …`."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tav_jax import config
from tav_jax.errors import InputError, MissingError, TavError


def read_config(arguments: Sequence[str]) -> Any:
    """Parsed by absl and ml_collections, then validated."""
    from absl import flags
    from ml_collections import config_flags

    if unknown := [a for a in arguments if not a.startswith(("--config=", "--config."))]:
        raise InputError(f"{unknown[0]!r} is not an option; settings are --config.NAME=VALUE")
    names = [a.removeprefix("--config.").split("=")[0] for a in arguments if a.startswith("--config.")]
    if complaints := config.unknown_settings(names):
        raise InputError("; ".join(complaints))
    path = next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), "")
    if path and not os.path.isfile(path.split(":")[0]):
        raise MissingError(f"{path} does not exist; give a config file such as configs/default.py")
    known = dict(config.leaves(config.get_config()))
    arguments = [_single_text_to_list(argument, known) for argument in arguments]
    values = flags.FlagValues()
    saved_argv, sys.argv = sys.argv, ["tav", *arguments]  # where ml_collections reads overrides
    try:
        if path.endswith(".json"):
            sys.argv = [a for a in sys.argv if not a.startswith("--config=")]
            stored = config.from_json(Path(path).read_text())
            config_flags.DEFINE_config_dict("config", stored, flag_values=values)
        else:
            config_flags.DEFINE_config_file("config", path or config.__file__, flag_values=values)
        values(sys.argv)
        return config.validate(values.config)
    except TavError:
        raise
    except Exception as error:  # of many kinds: from the config file itself, a misspelt name, a wrong type
        message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()) or type(error).__name__
        raise InputError(f"the config cannot be read: {message}") from error
    finally:
        sys.argv = saved_argv


def _single_text_to_list(argument: str, known: dict[str, Any]) -> str:
    """`--config.edit.prompts=a man is skiing` is a list of one text."""
    name, _, value = argument.removeprefix("--config.").partition("=")
    if isinstance(known.get(name), tuple) and not value.lstrip().startswith(("(", "[", "'", '"')):
        return f"--config.{name}=({value!r},)"
    return argument


def silence_background_tracebacks() -> None:
    """Orbax's threads log a failed write with tracebacks; the one sentence that follows says the same."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None
