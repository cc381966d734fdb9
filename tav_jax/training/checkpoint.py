# pyright: reportCallIssue=false
"""Checkpoints, with Orbax: trained weights, Adam's state, step, config, and the fingerprint of the base model.

Frozen weights are those of the base model and are not saved: a checkpoint of Stable Diffusion has about 0.9 GB, not 4.
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

# An old checkpoint is moved here before its files are deleted, so that a kill cannot leave half of it under its name.
REMOVED = ".removed"


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous: training continues while files are written."""

    def __init__(self, directory: Any, *, keep_newest: int = 2, keep_every: int = 0, repair: bool = False):
        """Verifies the existing checkpoints. With `repair`, for the one process that saves here, damaged checkpoints
        are renamed and unfinished ones removed; `messages` describes what was found."""
        self.directory = directory
        self._saving: int | None = None  # the step whose files may not be complete yet
        self._repair = repair
        self._found, self.messages = processes.run_on_primary("verifying the checkpoints", self._examine)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_newest,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            cleanup_tmp_directories=repair,
            todelete_subdir=REMOVED,
        )
        self.manager = ocp.CheckpointManager(directory, options=options, item_names=("train_state", "metadata"))

    def _examine(self) -> list[Any]:
        """The newest intact checkpoint, and a message for each damaged one after it."""
        self._delete_removed()
        found = checksums.examine(self.directory)
        messages = []
        for step, reason in found.damaged:
            renamed = f"; it is kept as {checksums.set_aside(self.directory, step)}" if self._repair else ""
            damaged = f"The checkpoint of step {step} is damaged ({reason}){renamed}"
            messages.append(f"{damaged}. Step {found.newest} is used.")
        return [found.newest, messages]

    @property
    def newest(self) -> int | None:
        """The step of the newest intact checkpoint."""
        return self._found if self._saving is None else self._saving

    # ------------------------------------------------------------------------------------------- saving

    def save(self, step: int, state: TrainState, metadata: dict[str, Any]) -> None:
        if step == self._saving or step in self.manager.all_steps():
            return
        self.wait()  # for the previous one, as Orbax would: its checksums are written for `_saving`
        items = ocp.args.Composite(
            train_state=ocp.args.StandardSave(_tree(state)),
            metadata=ocp.args.JsonSave({**metadata, "step": step}),
        )
        before, self._saving = self._saving, step
        try:
            self.manager.save(step, args=items)
        except (OSError, ValueError) as error:
            self._saving = before
            raise self._write_error(step, error) from error

    def wait(self) -> None:
        """Wait until everything that was saved is on disk."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._write_error(self._saving, error) from error
        self._delete_removed()

    def _write_checksums(self) -> None:
        """Called by Orbax when a checkpoint's files are complete, before it renames their directory. In a bucket they
        are written under their final name."""
        if jax.process_index() == 0:
            unfinished = list(self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"))
            checksums.write(unfinished[0] if unfinished else self.directory / str(self._saving))

    def _delete_removed(self) -> None:
        # In a bucket Orbax deletes at once: nothing can be moved there.
        if self._repair and jax.process_index() == 0 and "://" not in str(self.directory):
            shutil.rmtree(self.directory / REMOVED, ignore_errors=True)

    def _write_error(self, step: int | None, error: Exception) -> InputError:
        if self._saving is not None and self._saving not in self.manager.all_steps(read=True):
            step = self._saving  # a write that failed in the background is reported when the next one starts
        return InputError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({_reason(error)}); earlier ones "
            "are intact. Free some space and run the same command again."
        )

    # ------------------------------------------------------------------------------------------- restoring

    def read_metadata(self, step: int | None = None) -> dict[str, Any]:
        return self._restore(step, metadata=ocp.args.JsonRestore())["metadata"]

    def restore(self, state: TrainState, step: int | None = None) -> TrainState:
        """The saved state, by default the newest. Its arrays replace those of `state`, which gives the shapes."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(state))
        saved = self._restore(step, train_state=ocp.args.StandardRestore(shapes))["train_state"]
        adam = state.opt_state[0]
        _fill(state.params, saved["trained"])
        _fill(adam.mu, saved["mu"])
        _fill(adam.nu, saved["nu"])
        opt_state = (adam._replace(count=_uncommitted(saved["count"])), *state.opt_state[1:])
        return TrainState(state.params, opt_state)

    def restore_params(self, params: nnx.State, step: int | None = None) -> None:
        """Load only the trained weights into `params`."""
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), params)
        saved = flat(self.restore(TrainState.create(zeros), step).params)
        _fill(params, {name: leaf.get_value() for name, leaf in saved.items()})

    def _restore(self, step: int | None, **items: Any) -> Any:
        step = self.newest if step is None else step
        if step is None:
            raise MissingError(f"{self.directory} holds no checkpoint yet; run `tav train` until one is written")
        if step not in (steps := sorted(self.manager.all_steps())):
            raise MissingError(
                f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps)) or 'none'}"
            )
        checkpoint = self.directory / str(step)
        if step != self.newest and (reason := checksums.damage(checkpoint)):
            raise WeightsError(f"the checkpoint of step {step} is damaged ({reason}); use another of {self.directory}")
        try:
            return self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # of many types, even a bare Exception
            if checksums.damage(checkpoint) is None:  # the files are intact: the cause is another one
                raise
            reason = _reason(error.__cause__ or error)
            raise WeightsError(f"the checkpoint {checkpoint} cannot be read ({reason}); it is damaged") from error


def _tree(state: TrainState) -> dict[str, Any]:
    """Plain dicts by name, so that a checkpoint does not depend on the classes of a library."""
    adam = state.opt_state[0]

    def values(state: nnx.State) -> dict[str, jax.Array]:
        return {name: leaf.get_value() for name, leaf in flat(state).items()}

    return {"trained": values(state.params), "mu": values(adam.mu), "nu": values(adam.nu), "count": adam.count}


def _fill(state: nnx.State, values: dict[str, jax.Array]) -> None:
    for name, leaf in flat(state).items():
        leaf.set_value(_uncommitted(values[name]))


def _uncommitted(x: jax.Array) -> jax.Array:
    """Orbax commits arrays to a device, and a committed argument would compile the training step again. Arrays on
    several devices keep their sharding."""
    return x if len(x.sharding.device_set) > 1 else jnp.asarray(jax.device_get(x))


def _reason(error: BaseException) -> str:
    message = str(error)
    if "No space left on device" in message:
        return "no space left on device"
    return (message.strip().splitlines() or [type(error).__name__])[0][:200]
