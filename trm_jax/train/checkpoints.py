"""Orbax checkpoints: asynchronous, atomic, the newest K kept; frozen weights once per run."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from trm_jax.train import distributed, paths
from trm_jax.train.state import TrainState
from trm_jax.types import PyTree, UserError


class Checkpoints:
    """The checkpoints of one run: `workdir/checkpoints/STEP` and `workdir/frozen`.

    Args:
      workdir: the run's folder.
      keep: how many of the newest checkpoints stay.
      read_only: for evaluation and prediction; nothing is written or cleaned.
    """

    def __init__(self, workdir: Path, *, keep: int = 2, read_only: bool = False):
        self.read_only = read_only
        self._frozen_path = (workdir / "frozen").resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, read_only=read_only, create=not read_only
        )
        self._folder = (workdir / "checkpoints").resolve()
        if read_only and not self._folder.is_dir():
            raise UserError(f"{workdir} holds no checkpoints; train there first or name another")
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, None before the first."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts writing everything but `frozen`; an error of the last write surfaces here."""
        self._manager.check_for_errors()
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(_saved(state)))

    def restore(self, state: TrainState, shardings: TrainState, step: int) -> TrainState:
        """The checkpoint of `step`, laid out by `shardings` (any number of devices)."""
        target = jax.tree.map(_abstract, _saved(state), _saved(shardings))
        try:
            restored = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except ValueError as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(
                f"{self._folder}/{step} does not fit this config ({reason}); "
                "use the config that wrote it or another --workdir"
            ) from None
        return state.replace(**restored)

    def restore_weights(self, params: PyTree, extras: PyTree, ema: bool) -> tuple[PyTree, PyTree]:
        """(trained params or their moving average, extras) of the newest checkpoint.

        Args:
          params, extras: trees of jax.ShapeDtypeStruct with shardings.
          ema: whether the run keeps a moving average, which is then what predicts.

        Raises:
          UserError: there is no checkpoint yet.
        """
        step = self.latest_step()
        if step is None:
            raise UserError(f"{self._folder} holds no finished checkpoint; train first")
        name = "ema" if ema else "params"
        target = {name: params, "extras": extras}
        arguments = ocp.args.PyTreeRestore(
            target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        restored = self._manager.restore(step, args=arguments)
        return restored[name], restored["extras"]

    def save_frozen(self, frozen: PyTree) -> None:
        """Writes the frozen weights of a new run; those of a run that never started go."""
        if frozen:
            with ocp.StandardCheckpointer() as writer:
                writer.save(self._frozen_path, frozen, force=True)

    def restore_frozen(self, frozen: PyTree, shardings: PyTree) -> PyTree:
        """The run's frozen weights, laid out by `shardings`."""
        if not frozen:
            return frozen
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(self._frozen_path, jax.tree.map(_abstract, frozen, shardings))

    def close(self) -> None:
        """Waits for the writes under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def weights_hash(tree: PyTree) -> str:
    """SHA-256 over paths, shapes, dtypes and values of nested dicts of arrays, on the host."""
    digest = hashlib.sha256()
    for path, leaf in paths.flatten(tree).items():
        array = np.asarray(leaf)
        digest.update(f"{path} {array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def hash_frozen(frozen: PyTree, trained: PyTree) -> str:
    """weights_hash(frozen); UserError on a process whose weights are not those of process 0."""
    digest = weights_hash(frozen)
    if jax.process_count() > 1:
        hashes = {"trained": weights_hash(trained), "frozen": digest}
        distributed.agree("first weights", hashes)
    return digest


def _saved(state: TrainState) -> dict[str, PyTree]:
    names = ("step", "params", "opt_state", "extras", "ema", "sums")
    return {name: getattr(state, name) for name in names}


def _abstract(array, sharding):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
