"""The command `tav`: its parser, and what every command shares.

Exit status: 0 finished; 1 an internal error; 2 an error that the user can fix; 75 stopped by SIGTERM or Ctrl-C with the
state saved (the same command continues); 130 stopped at once by a second Ctrl-C.
"""

import argparse
import errno
import sys
from collections.abc import Sequence

from tav_jax import __version__
from tav_jax.distributed import processes
from tav_jax.errors import TavError

DESCRIPTION = "One-shot video tuning on JAX: from one clip and one sentence to edited clips."
SETTINGS = """\
settings:
  --config=FILE.py             a file with a get_config(); the default is the paper's settings
  --config=RUN/config.json     the settings of a run, to repeat it in another --workdir
  --config.NAME=VALUE          one setting, such as --config.clip.path=man.mp4 --config.clip.prompt="a man is skiing"
                               --config.train.steps=300 --config.edit.prompts="('spider man is skiing',)"
"""
STATUS = """
exit status:
  0    finished
  2    an error that you can fix, in one sentence
  75   stopped by SIGTERM or Ctrl-C after the current step, with a checkpoint: run the same command to continue
  130  stopped at once by a second Ctrl-C; finished checkpoints are kept
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
Compile the programs of a run with the TPU compiler, without a TPU, and report for each its memory, the least time of a
step and the communication between chips. Needs neither weights nor a clip. At full size a program takes minutes to
compile; reports are cached.
"""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="tav", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    top.add_argument("--version", action="version", version=f"tav_jax {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="run the whole method on a small embedded model, without downloads",
        description="Run the whole method on a small embedded model, without downloads: draw a clip, tune on it, "
        "invert it, sample edits, and write a page with the results. Takes a few minutes on two cores.",
    )
    demo.add_argument("--out", default="tav-demo", help="a new or empty directory (default: %(default)s)")
    demo.add_argument("--prompt", action="append", default=[], help="a prompt of your own; may be repeated")
    demo.add_argument("--clip", type=int, help="number of the clip to draw, in place of the default one")
    demo.add_argument("--steps", type=int, help="tuning steps")
    demo.add_argument("--seed", type=int, help="random seed (default: 0)")

    train = commands.add_parser(
        "train",
        help="tune on a clip; the same command continues a run",
        description="Tune on a clip. The same command continues a run, or says that it is finished.",
        epilog=SETTINGS + STATUS,
        formatter_class=raw,
    )
    train.add_argument("--workdir", required=True, help="the directory of the run, local or in a bucket (gs://…)")
    train.add_argument(
        "--debug-nans",
        action="store_true",
        help="run with jax_debug_nans, which is slow, and name the first operation that gives a NaN",
    )

    edit = commands.add_parser(
        "edit",
        help="sample edited clips from a tuned run",
        description="Sample edited clips from a tuned run. All prompts share one inversion and one compilation.",
        formatter_class=raw,
    )
    edit.add_argument("--workdir", required=True, help="the directory of a `tav train` run")
    edit.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    edit.add_argument("--step", type=int, help="use the checkpoint of this step (default: the newest)")
    edit.add_argument("--out", help="directory for the videos (default: WORKDIR/edits)")
    edit.add_argument("--negative-prompt", help="default: the config's")
    edit.add_argument("--guidance", type=float, help="scale of classifier-free guidance (default: the config's, 12.5)")
    edit.add_argument(
        "--strength",
        type=float,
        help="share of the sampling steps that use the prompt; less keeps more of the clip (default: the config's, 1)",
    )
    edit.add_argument("--steps", type=int, help="sampling steps, at most the inversion's (default: the config's, 50)")
    edit.add_argument("--inversion-steps", type=int, help="inversion steps (default: the config's, 50)")
    edit.add_argument("--no-inversion", action="store_true", help="start from random noise, not from the inverted clip")
    edit.add_argument("--seed", type=int, action="append", default=[], help="of the noise, with --no-inversion")
    edit.add_argument("--gif", action="store_true", help="write GIFs, not MP4s")
    edit.add_argument("--force", action="store_true", help="overwrite existing videos")

    export = commands.add_parser(
        "export",
        help="write a tuned run in the Diffusers layout",
        description="Write a tuned run as a pipeline directory in the Diffusers layout, with the 3D UNet.",
    )
    export.add_argument("--workdir", required=True, help="the directory of a `tav train` run")
    export.add_argument("--out", required=True, help="the directory to write, new or empty")
    export.add_argument("--step", type=int, help="use the checkpoint of this step (default: the newest)")

    plan = commands.add_parser(
        "plan",
        help="report whether a run fits a TPU, without having one",
        description=PLAN,
        epilog=SETTINGS + "  --config.model.path=sd1      or sd2, a directory, or a hub id that contains either",
        formatter_class=raw,
    )
    plan.add_argument("--topology", required=True, help="such as v5e-8 or v5e:2x4")
    plan.add_argument(
        "--function", action="append", default=[], help="tune, invert, sample, encode or decode (default: all)"
    )
    plan.add_argument("--json", action="store_true", help="print one line of JSON")
    plan.add_argument(
        "--no-search", action="store_true", help="if it does not fit, do not search for a change that does"
    )
    plan.add_argument("--cache", help="directory of the report cache (default: in the user's cache directory)")

    commands.add_parser("doctor", help="report versions, devices, what is missing and how to fix it")
    return top


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    # Every command is imported when it is used: `tav --help` must not wait for JAX.
    if arguments.command == "doctor":
        from tav_jax.cli import doctor

        return doctor.report()
    if arguments.command == "plan":
        from tav_jax.cli import plan

        return plan.run(arguments, rest)
    if arguments.command == "train":
        from tav_jax.cli import train

        return train.run(arguments, rest)
    if arguments.command == "edit":
        from tav_jax.cli import edit

        return edit.run(arguments)
    if arguments.command == "export":
        from tav_jax.cli import export

        return export.run(arguments)
    from tav_jax.cli import demo

    return demo.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    arguments, rest = parser().parse_known_args(argv)
    if rest and arguments.command not in ("train", "plan"):
        parser().error(f"{rest[0]} is not an option of `tav {arguments.command}`")
    try:
        return run(arguments, rest)
    except TavError as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("stopped", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return fail(
                "the disk is full; finished files are intact. Free some space and run the same command again.", 2
            )
        if "RESOURCE_EXHAUSTED" in str(error):  # outside of the code that can suggest a size
            return fail("the device's memory ran out; use fewer frames or a smaller size", TavError.exit_code)
        processes.wait_for_abort(error)
        raise


def fail(sentence: str, code: int) -> int:
    """Print one sentence, and end the other processes if there are any."""
    print(f"tav: {sentence}", file=sys.stderr)
    processes.exit_all(sentence, code)
    return code


def entry() -> None:
    sys.exit(main())
