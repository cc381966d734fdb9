"""The command `tav`. No logic here: it reads the command line and calls the rooms that do the work.

Exit status: 0 done, 1 an error of ours, 2 something to mend on the command line, in the config or in a file, 75 stopped
by SIGTERM or Ctrl-C in good order (the same command continues), 130 stopped at once by Ctrl-C.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tav_jax import __version__, processes
from tav_jax.errors import InputError, LostError, MissingError, TavError
from tav_jax.stopping import Stop

DESCRIPTION = "One-shot video tuning on JAX: one clip and one sentence in, edited clips out."
SETTINGS = """\
settings:
  --config=FILE.py             a file with a get_config(); without it the paper's settings are used
  --config=RUN/config.json     the settings that a run has kept, to make it again in another --workdir
  --config.NAME=VALUE          one setting, such as --config.clip.path=man.mp4 --config.clip.prompt="a man is skiing"
                               --config.train.steps=300 --config.edit.prompts="('spider man is skiing',)"
"""
STATUS = """
exit status:
  0    finished
  2    something to mend, said in one sentence
  75   stopped by SIGTERM or Ctrl-C after the step under way, with a checkpoint: run the same line again to continue
  130  stopped at once by a second Ctrl-C; what is in finished checkpoints is kept
"""
EXAMPLES = """\
examples:
  tav demo   --out=demo
  tav train  --config=configs/man_skiing.py --workdir=runs/ski
  tav edit   --workdir=runs/ski --prompt="spider man is skiing on the beach, cartoon style"
  tav export --workdir=runs/ski --out=spider-ski
  tav plan   --config=configs/man_skiing.py --topology=v5e-8
"""
PLAN = """\
Compile a run's programs for a TPU that is not here, and say what each needs of it: memory, time at the least, what the
chips tell each other. Needs no weights and no clip. At full size a program takes many minutes; reports are kept.
"""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="tav", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    top.add_argument("--version", action="version", version=f"tav_jax {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="the whole job on a tiny embedded model, without downloads",
        description="The whole job on a tiny embedded model, without downloads: a drawn clip is learned, inverted and "
        "edited, and a page shows what came of it. Takes a few minutes on two cores.",
    )
    demo.add_argument("--out", default="tav-demo", help="a new or empty folder (default: %(default)s)")
    demo.add_argument("--prompt", action="append", default=[], help="an edit of your own; may be given several times")
    demo.add_argument("--clip", type=int, help="draw the clip with this number instead of the usual one")
    demo.add_argument("--steps", type=int, help="tuning steps")
    demo.add_argument("--seed", type=int, help="of all that is drawn at random (default: 0)")

    train = commands.add_parser(
        "train",
        help="learn a clip's motion; the same line again continues",
        description="Learn a clip's motion. The same line again continues, or says that the run is finished.",
        epilog=SETTINGS + STATUS,
        formatter_class=raw,
    )
    train.add_argument("--workdir", required=True, help="the run's folder, here or in a bucket (gs://…)")

    train.add_argument(
        "--debug-nans",
        action="store_true",
        help="check every operation, slowly, and name the first whose result is not a number",
    )

    edit = commands.add_parser(
        "edit",
        help="make edited clips from a tuned run",
        description="Make edited clips from a tuned run. All prompts share one inversion and one compilation.",
        formatter_class=raw,
    )
    edit.add_argument("--workdir", required=True, help="the folder of a `tav train`")
    edit.add_argument("--prompt", action="append", default=[], help="what to show instead; may be given several times")
    edit.add_argument("--out", help="folder for the videos (default: WORKDIR/edits)")
    edit.add_argument("--negative-prompt", help="what to keep away from (default: the config's)")
    edit.add_argument("--guidance", type=float, help="how strongly to follow the prompt (default: the config's, 12.5)")
    edit.add_argument(
        "--strength",
        type=float,
        help="the share of the steps that the prompt leads: less keeps more of the clip (default: the config's, 1)",
    )
    edit.add_argument("--steps", type=int, help="sampling steps (default: the config's, 50)")
    edit.add_argument("--inversion-steps", type=int, help="inversion steps (default: the config's, 50)")
    edit.add_argument("--no-inversion", action="store_true", help="start from noise instead of the inverted clip")
    edit.add_argument("--seed", type=int, action="append", default=[], help="of the noise, with --no-inversion")
    edit.add_argument("--gif", action="store_true", help="write GIFs instead of MP4s")
    edit.add_argument("--force", action="store_true", help="overwrite videos that are there already")

    export = commands.add_parser(
        "export",
        help="write a tuned run in the Diffusers layout",
        description="Write a tuned run as a pipeline directory in the Diffusers layout, with the UNet inflated to 3D.",
    )
    export.add_argument("--workdir", required=True, help="the folder of a `tav train`")
    export.add_argument("--out", required=True, help="the folder to write; it must not hold anything yet")
    export.add_argument("--step", type=int, help="which checkpoint (default: the newest)")

    plan = commands.add_parser(
        "plan",
        help="say whether a run fits a TPU, without having one",
        description=PLAN,
        epilog=SETTINGS + "  --config.model.path=sd1      or sd2, a directory, or a hub id that has either in its name",
        formatter_class=raw,
    )
    plan.add_argument(
        "--topology",
        action="append",
        required=True,
        help="such as v5e-8 or v5e:2x4; may be given several times (sweep)",
    )
    plan.add_argument(
        "--function", action="append", default=[], help="tune, invert, sample, encode or decode (default: all)"
    )
    plan.add_argument("--json", action="store_true", help="one line of JSON")
    plan.add_argument("--no-search", action="store_true", help="where it does not fit, do not look for what would")
    plan.add_argument("--sweep", action="store_true", help="a table and a picture over frames and topologies")
    plan.add_argument("--frames", default="8,16,24,32", help="of the sweep (default: %(default)s)")
    plan.add_argument("--every", action="store_true", help="compile every point of the sweep, not only the ends")
    plan.add_argument("--out", default="plan", help="folder for the sweep's files (default: %(default)s)")
    plan.add_argument("--cache", help="folder where reports are kept (default: the user's cache folder)")

    commands.add_parser("doctor", help="say what this machine has, what is missing, and what mends it")
    return top


def read_config(arguments: Sequence[str]) -> Any:
    """The config of `--config=FILE --config.NAME=VALUE …`, as absl and ml_collections read it."""
    from absl import flags
    from ml_collections import config_flags

    from tav_jax import config

    if unknown := [a for a in arguments if not a.startswith(("--config=", "--config."))]:
        raise InputError(f"{unknown[0]!r} is not an option; settings are --config.NAME=VALUE")
    names = [a.removeprefix("--config.").split("=")[0] for a in arguments if a.startswith("--config.")]
    if complaints := config.unknown(names):
        raise InputError("; ".join(complaints))
    path = next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), "")
    if path and not os.path.isfile(path.split(":")[0]):
        raise MissingError(f"{path} does not exist; give a config file such as configs/default.py")
    arguments = [_one_text_is_a_list(a, dict(config.leaves(config.get_config()))) for a in arguments]
    values = flags.FlagValues()
    before, sys.argv = sys.argv, ["tav", *arguments]  # where ml_collections looks for overrides
    try:
        if path.endswith(".json"):
            sys.argv = [a for a in sys.argv if not a.startswith("--config=")]
            kept = config.from_json(Path(path).read_text())
            config_flags.DEFINE_config_dict("config", kept, flag_values=values)
        else:
            config_flags.DEFINE_config_file("config", path or config.__file__, flag_values=values)
        values(sys.argv)
        return config.validate(values.config)
    except TavError:
        raise
    except Exception as error:  # whatever a config file, a misspelt name or a wrong type raises in there
        told = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()) or type(error).__name__
        raise InputError(f"the config cannot be read: {told}") from error
    finally:
        sys.argv = before


def _one_text_is_a_list(argument: str, known: dict[str, Any]) -> str:
    """`--config.edit.prompts=a man is skiing` means a list of one."""
    name, _, value = argument.removeprefix("--config.").partition("=")
    if isinstance(known.get(name), tuple) and not value.lstrip().startswith(("(", "[", "'", '"')):
        return f"--config.{name}=({value!r},)"
    return argument


def hush() -> None:
    """A failed write is told by Orbax's threads one by one, with tracebacks; the sentence that follows says it all."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    if arguments.command == "doctor":
        from tav_jax import doctor

        return doctor.report()
    if arguments.command == "plan":
        return run_plan(arguments, read_config(rest))
    hush()
    if arguments.command == "train":
        with Stop() as stop:  # before anything slow is imported
            return train(arguments, rest, stop)
    from tav_jax import cache

    cache.enable()
    if arguments.command == "demo":
        processes.refuse_several("tav demo")
        from tav_jax.sprites.demo import demo, settings_with

        chosen = settings_with(steps=arguments.steps, seed=arguments.seed)
        demo(arguments.out, arguments.prompt, chosen, number=arguments.clip)
        return 0
    processes.join()
    from tav_jax.run import Run

    job = Run.open(arguments.workdir)
    if arguments.command == "export":
        from tav_jax.weights import check_target

        processes.same({"--out": arguments.out, "--step": arguments.step})
        processes.from_first("looking at --out", lambda: check_target(arguments.out) and None)
        job.restore(arguments.step).save_pretrained(arguments.out)
        if processes.is_first():
            print(f"Wrote {arguments.out}.")
        return 0
    from tav_jax import config
    from tav_jax.edit import edit

    for name in ("negative_prompt", "guidance", "strength", "steps", "inversion_steps"):
        if (value := getattr(arguments, name)) is not None:
            job.config.edit[name] = value
    job.config = config.validate(job.config)
    paths = edit(
        job,
        arguments.prompt or job.config.edit.prompts,
        out=arguments.out,
        inversion=not arguments.no_inversion,
        seeds=arguments.seed or (0,),
        suffix=".gif" if arguments.gif else ".mp4",
        force=arguments.force,
    )
    if processes.is_first():
        print("\n".join(f"Wrote {path}" for path in paths))
    return 0


def train(arguments: argparse.Namespace, rest: Sequence[str], stop: Stop) -> int:
    processes.join()
    settings = read_config(rest)
    from tav_jax import cache
    from tav_jax.run import Run

    cache.enable()
    if arguments.debug_nans:
        import jax

        jax.config.update("jax_debug_nans", True)
    Run.start_or_continue(arguments.workdir, settings).train(stop)
    return 0


def run_plan(arguments: argparse.Namespace, config: Any) -> int:
    from tav_jax import plan

    plan.prepare()  # before anything imports JAX
    from tav_jax.plan import command

    options = {"names": arguments.function, "folder": arguments.cache}
    if arguments.sweep:
        counts = arguments.frames.split(",")
        if not all(count.strip().isdecimal() for count in counts):
            raise InputError(f"--frames is {arguments.frames!r}; give whole numbers such as 8,16,24,32")
        for path in command.sweep_to(
            config, arguments.topology, [int(n) for n in counts], arguments.out, every=arguments.every, **options
        ):
            print(f"Wrote {path}.")
        return 0
    if len(arguments.topology) > 1:
        raise InputError(f"{len(arguments.topology)} topologies are given; several are for --sweep only")
    command.plan(config, arguments.topology[0], as_json=arguments.json, search=not arguments.no_search, **options)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments, rest = parser().parse_known_args(argv)
    if rest and arguments.command not in ("train", "plan"):
        parser().error(f"{rest[0]} is not an option of `tav {arguments.command}`")
    try:
        return run(arguments, rest)
    except TavError as error:
        return end(str(error), error.exit_code)
    except KeyboardInterrupt:
        return end("stopped", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return end("the disk is full; what was finished is whole. Make room and run the same command again.", 2)
        if "RESOURCE_EXHAUSTED" in str(error):  # told too late for the place where it arose to say it better
            return end("the device's memory ran out; use fewer frames or a smaller size", TavError.exit_code)
        if lost := processes.loss(5.0):  # a program broke because another process has gone
            return end(lost, LostError.exit_code)
        raise


def end(sentence: str, code: int) -> int:
    """One sentence for the person at the terminal, and for the other processes if there are any."""
    print(f"tav: {sentence}", file=sys.stderr)
    processes.leave(sentence, code)
    return code


def entry() -> None:
    sys.exit(main())
