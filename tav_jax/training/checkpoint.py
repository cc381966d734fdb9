# pyright: reportCallIssue=false
"""Checkpoints, with Orbax: trained weights, Adam's state, step, config, and the fingerprint of the base model.

Frozen weights are not saved, since they are the base model's: a checkpoint of Stable Diffusion takes about 0.9 GB.
"""

import functools
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from tav_jax.distributed import processes
from tav_jax.errors import InputError, MissingError, WeightsError, short_repr
from tav_jax.io import paths
from tav_jax.io.weights import flat
from tav_jax.training import checksums
from tav_jax.training.train_step import TrainState

# Old checkpoints are moved here and then deleted, so that a kill leaves no partial checkpoint under its final name.
REMOVED = ".removed"


class Checkpoints:
    """The checkpoints of one run. Saving is asynchronous: training continues while files are written.

    The constructor verifies the existing checkpoints; `messages` has a sentence for each damaged one. With `repair`,
    which requires the run's lock, it also renames damaged checkpoints and removes unfinished ones.
    """

    def __init__(self, directory: Any, *, keep_newest: int = 2, keep_every: int = 0, repair: bool = False):
        self.directory = directory
        self._repair = repair
        self._saving: Any = None  # names, shapes and dtypes of the state that is being written
        self.newest: int | None  # the newest intact checkpoint, perhaps not completely on disk yet
        self.newest, self.messages = processes.run_on_primary("verifying the checkpoints", self._verify)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_newest,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            cleanup_tmp_directories=repair,
            todelete_subdir=REMOVED,
        )
        self.manager = ocp.CheckpointManager(
            _plain_path(directory), options=options, item_names=("train_state", "metadata")
        )

    def _verify(self) -> list[Any]:
        """The step of the newest intact checkpoint, and a message for each newer one, which is damaged."""
        self._delete_removed()
        found = checksums.examine(self.directory)
        messages = []
        for step, reason in found.damaged:
            kept = f"; it is kept as {checksums.rename_damaged(self.directory, step)}" if self._repair else ""
            messages.append(f"The checkpoint of step {step} is damaged ({reason}){kept}. Step {found.newest} is used.")
        return [found.newest, messages]

    def save(self, step: int, state: TrainState, metadata: dict[str, Any]) -> None:
        if step == self.newest or step in self.manager.all_steps():
            return
        self.wait()  # until then, `_seal` needs the previous value of `newest`
        arrays = _to_dict(state)
        self._saving = _describe(arrays)
        metadata_item = ocp.args.JsonSave({**metadata, "step": step})
        items = ocp.args.Composite(train_state=ocp.args.StandardSave(arrays), metadata=metadata_item)
        previous, self.newest = self.newest, step
        try:
            self.manager.save(step, args=items)
        except (OSError, ValueError) as error:
            self.newest = previous
            raise self._write_error(step, error) from error

    def wait(self) -> None:
        """Wait until the saved checkpoint is on disk."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._write_error(self.newest, error) from error
        self._delete_removed()

    def _seal(self) -> None:
        """Read the names, shapes and dtypes of the arrays back, then write the checksums.

        Orbax calls this when a checkpoint's files are complete, before it renames their directory. A bucket has no
        rename: there Orbax writes under the final name."""
        if jax.process_index() == 0:
            unfinished = list(self.directory.glob(f"{self.newest}.orbax-checkpoint-tmp*"))
            checkpoint = unfinished[0] if unfinished else self.directory / str(self.newest)
            handler = ocp.StandardCheckpointHandler()
            if _describe(handler.metadata(_plain_path(checkpoint / "train_state"))) != self._saving:
                raise ValueError("its arrays differ when they are read back")
            checksums.write(checkpoint)

    def _delete_removed(self) -> None:
        # In a bucket nothing can be moved: Orbax deletes the checkpoint itself.
        if self._repair and jax.process_index() == 0 and "://" not in str(self.directory):
            shutil.rmtree(self.directory / REMOVED, ignore_errors=True)

    def _write_error(self, step: int | None, error: Exception) -> InputError:
        reason = _reason(error)
        return InputError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({reason}); earlier ones are "
            f"intact. {'Free some space' if 'space' in reason else 'Check the disk'} and run the same command again."
        )

    def read_metadata(self, step: int | None = None) -> dict[str, Any]:
        return self._restore(step, metadata=ocp.args.JsonRestore())["metadata"]

    def restore(self, state: TrainState, step: int | None = None) -> TrainState:
        """Load a saved state, by default the newest, into the variables of `state`. Shapes must be equal."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _to_dict(state))
        saved = self._restore(step, train_state=ocp.args.StandardRestore(shapes))["train_state"]
        adam = state.opt_state[0]
        for variables, name in ((state.params, "trained"), (adam.mu, "mu"), (adam.nu, "nu")):
            for path, variable in flat(variables).items():
                variable.set_value(_uncommitted(saved[name][path]))
        opt_state = (adam._replace(count=_uncommitted(saved["count"])), *state.opt_state[1:])
        return TrainState(state.params, opt_state)

    def _restore(self, step: int | None, **items: Any) -> Any:
        """Read a checkpoint. `tav train` may remove the newest one meanwhile: then read the next one."""
        if step is not None or self._repair:
            return self._read(self.newest if step is None else step, **items)
        while True:
            result = error = None
            try:
                result = self._read(self.newest, **items)
            except (MissingError, WeightsError) as caught:
                error = caught
            if not processes.any_process(error is not None):
                return result
            previous = self.newest
            self.newest, self.messages = processes.run_on_primary("verifying the checkpoints", self._verify)
            if self.newest == previous:
                if error:
                    raise error
                return result
            self.manager.reload()

    def _read(self, step: int | None, **items: Any) -> Any:
        if step is None:
            raise MissingError(f"{self.directory} holds no checkpoint yet; run `tav train` until one is written")
        self._check_exists(step)
        checkpoint = self.directory / str(step)
        if step != self.newest and (reason := checksums.damage(checkpoint)):
            self._check_exists(step)
            raise WeightsError(f"the checkpoint of step {step} is damaged ({reason}); use another of {self.directory}")
        try:
            restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises errors of many types, even Exception itself
            self._check_exists(step)
            if checksums.damage(checkpoint) is None:  # the error has another cause
                raise
            reason = _reason(error.__cause__ or error)
            raise WeightsError(f"the checkpoint {checkpoint} cannot be read ({reason}); it is damaged") from error
        self._check_exists(step)  # it may be incomplete if its files were removed meanwhile
        return restored

    def _check_exists(self, step: int) -> None:
        if step not in (steps := checksums.steps(self.directory)):
            found = ", ".join(map(str, reversed(steps))) or "none"
            raise MissingError(f"{self.directory} has no checkpoint of step {step}; it has {found}")


def _to_dict(state: TrainState) -> dict[str, Any]:
    """Arrays by name in plain dicts, so that the format does not depend on the classes of Flax and optax."""
    adam = state.opt_state[0]

    def values(state: nnx.State) -> dict[str, jax.Array]:
        return {name: leaf.get_value() for name, leaf in flat(state).items()}

    return {"trained": values(state.params), "mu": values(adam.mu), "nu": values(adam.nu), "count": adam.count}


def _describe(arrays: Any) -> dict[str, Any]:
    """The shape and dtype of each array."""
    flat_arrays = jax.tree_util.tree_flatten_with_path(getattr(arrays, "tree", arrays))[0]
    return {jax.tree_util.keystr(path): (tuple(x.shape), jnp.dtype(x.dtype)) for path, x in flat_arrays}


@functools.cache
def _plain_path(directory: Any) -> Any:
    """The directory, or a link to it if Orbax would misread its path: it expands patterns in its own paths, and
    TensorStore takes backslashes for slashes and needs UTF-8."""
    if "://" in str(directory) or (not re.search(r"[*?[\]\\:]", str(directory)) and str(directory).isprintable()):
        return directory
    processes.require_single_process(f"the directory {short_repr(str(directory))}, whose name has special characters,")
    with paths.reporting(directory):
        directory.mkdir(parents=True, exist_ok=True)
    link = paths.temporary_directory() / "checkpoints"
    link.symlink_to(directory, target_is_directory=True)
    return link


def _uncommitted(x: jax.Array) -> jax.Array:
    """Orbax commits arrays to a device, and a committed argument would recompile the training step. Arrays on several
    devices keep their sharding."""
    return x if len(x.sharding.device_set) > 1 else jnp.asarray(jax.device_get(x))


def _reason(error: BaseException) -> str:
    message = str(error)
    if "No space left on device" in message:
        return "no space left on device"
    return (message.strip().splitlines() or [type(error).__name__])[0][:200]
