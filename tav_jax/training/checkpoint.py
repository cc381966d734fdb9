# pyright: reportCallIssue=false
"""What a run keeps, with Orbax: trained weights, Adam's moments, the step, the config, the base model's fingerprint.

The frozen weights are the base model's and are not kept: a checkpoint is about 0.9 GB for Stable Diffusion, not 4.
"""

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from tav_jax.distributed import processes
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.io.weights import flat
from tav_jax.training import checksums
from tav_jax.training.train_step import TrainState

# An old checkpoint is moved here before its files go one by one: what a kill leaves of it bears no checkpoint's name.
BIN = ".removed"


def _tree(state: TrainState) -> dict[str, Any]:
    """Plain tables of names, so that a checkpoint does not depend on a library's classes."""
    adam = state.opt_state[0]

    def values(state: nnx.State) -> dict[str, jax.Array]:
        return {name: leaf.get_value() for name, leaf in flat(state).items()}

    return {"trained": values(state.params), "mu": values(adam.mu), "nu": values(adam.nu), "count": adam.count}


def _fill(state: nnx.State, values: dict[str, jax.Array]) -> None:
    for name, leaf in flat(state).items():
        leaf.set_value(_unpinned(values[name]))


def _unpinned(x: jax.Array) -> jax.Array:
    """Orbax ties what it restores to a device; a program that met the same shapes untied would be compiled again. What
    lies on a mesh stays where it is."""
    return x if len(x.sharding.device_set) > 1 else jnp.asarray(jax.device_get(x))


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous: the next steps go on while files are written."""

    def __init__(self, directory: Any, *, keep_newest: int = 2, keep_every: int = 0, repair: bool = False):
        """Looks at what is there, before Orbax does. With `repair`, for the one process that writes here, damaged
        checkpoints are set aside and unfinished ones removed; `messages` says what was found."""
        self.directory = directory
        self.begun: int | None = None  # the step whose files may still be on their way
        self._repair = repair
        self._found, self.messages = processes.run_on_primary(
            "looking at the checkpoints", lambda: self._examine(repair)
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_newest,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            cleanup_tmp_directories=repair,
            todelete_subdir=BIN,
        )
        self.manager = ocp.CheckpointManager(directory, options=options, item_names=("train_state", "metadata"))

    def _examine(self, repair: bool) -> list[Any]:
        """The newest checkpoint that is whole, and what is to be said of the others."""
        self._empty_bin()
        found = checksums.examine(self.directory)
        return [found.newest, [self._complaint(damage, found.newest, repair) for damage in found.damaged]]

    def _complaint(self, damage: checksums.Damage, instead: int | None, repair: bool) -> str:
        kept = f"; it is kept as {checksums.set_aside(self.directory, damage.step)}" if repair else ""
        return f"The checkpoint of step {damage.step} is damaged ({damage.why}){kept}. Step {instead} is used."

    def _seal(self) -> None:
        """Called by Orbax when a checkpoint's files are all written, before it renames their folder. In a bucket they
        are written under their final name."""
        if jax.process_index() == 0:
            made = list(self.directory.glob(f"{self.begun}.orbax-checkpoint-tmp*"))
            checksums.put(made[0] if made else self.directory / str(self.begun))

    @property
    def newest(self) -> int | None:
        """The newest one that is whole."""
        return self._found if self.begun is None else self.begun

    def save(self, step: int, state: TrainState, about: dict[str, Any]) -> None:
        if step == self.begun or step in self.manager.all_steps():
            return
        self.wait()  # for the one before, as Orbax would: its seal must bear its own number
        items = ocp.args.Composite(
            train_state=ocp.args.StandardSave(_tree(state)),
            metadata=ocp.args.JsonSave({**about, "step": step}),
        )
        before, self.begun = self.begun, step
        try:
            self.manager.save(step, args=items)
        except (OSError, ValueError) as error:
            self.begun = before
            raise self._not_written(step, error) from error

    def wait(self) -> None:
        """Until everything that was saved is on the disk."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._not_written(self.begun, error) from error
        self._empty_bin()

    def _empty_bin(self) -> None:
        # In a bucket Orbax removes at once: nothing can be moved there.
        if self._repair and jax.process_index() == 0 and "://" not in str(self.directory):
            shutil.rmtree(self.directory / BIN, ignore_errors=True)

    def _not_written(self, step: int | None, error: Exception) -> InputError:
        if self.begun is not None and self.begun not in self.manager.all_steps(read=True):
            step = self.begun  # a write that failed in the background is told of when the next one begins
        return InputError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({_reason(error)}); earlier "
            "ones are whole. Make room, and run the same command again."
        )

    def read_metadata(self, step: int | None = None) -> dict[str, Any]:
        return self._restore(step, metadata=ocp.args.JsonRestore())["metadata"]

    def restore(self, state: TrainState, step: int | None = None) -> TrainState:
        """The saved state, in place of `state`'s values."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(state))
        found = self._restore(step, train_state=ocp.args.StandardRestore(shapes))["train_state"]
        adam = state.opt_state[0]
        _fill(state.params, found["trained"])
        _fill(adam.mu, found["mu"])
        _fill(adam.nu, found["nu"])
        moments = (adam._replace(count=_unpinned(found["count"])), *state.opt_state[1:])
        return TrainState(state.params, moments)

    def restore_params(self, state: nnx.State, step: int | None = None) -> None:
        """Only the trained weights, put into `state`: what an edit needs."""
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), state)
        saved = flat(self.restore(TrainState.create(zeros), step).params)
        _fill(state, {name: leaf.get_value() for name, leaf in saved.items()})

    def _restore(self, step: int | None, **items: Any) -> Any:
        step = self.newest if step is None else step
        if step is None:
            raise MissingError(f"{self.directory} holds no checkpoint yet; run `tav train` until one is written")
        if step not in (there := sorted(self.manager.all_steps())):
            raise MissingError(
                f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, there))}"
            )
        folder = self.directory / str(step)
        if step != self.newest and (why := checksums.flaw(folder)):
            raise WeightsError(f"the checkpoint of step {step} is damaged ({why}); take another of {self.directory}")
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # of many kinds, a bare Exception among them
            if checksums.flaw(folder) is None:  # the files are what was written: it is something else
                raise
            why = _reason(error.__cause__ or error)
            raise WeightsError(f"the checkpoint {folder} cannot be read ({why}); it is damaged") from error

    def close(self) -> None:
        self.manager.close()
        self._empty_bin()


def _reason(error: BaseException) -> str:
    said = str(error)
    if "No space left on device" in said:
        return "no space left on device"
    return (said.strip().splitlines() or [type(error).__name__])[0][:200]
