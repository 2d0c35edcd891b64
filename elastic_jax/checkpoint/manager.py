"""Writing checkpoints: Orbax's manager behind the items of the contract, saved in the background."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from elastic_jax.checkpoint.chunks import ARRAY_ITEMS, item_handlers, params_save
from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.checkpoint.stored import read_manifest
from elastic_jax.checkpoint.tree_reader import read_tree
from elastic_jax.errors import UserError, WorkError, reason
from elastic_jax.parallel.processes import are_several


class CheckpointManager:
    """Checkpoints of a workdir: `checkpoints/STEP` with the newest `keep`, and the frozen parent, pinned in `parent`.

    Items: params, opt_state, router, ordering (trees of arrays; an empty one is left out), data and manifest (JSON).
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 2):
        self.workdir = epath.Path(workdir).resolve()  # Orbax wants absolute paths
        self.root = self.workdir / 'checkpoints'
        self.failure: BaseException | None = None
        meeting = ocp.options.AsyncOptions(barrier_sync_fn=self._meet) if are_several() else None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True, async_options=meeting
        )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'{self.root} cannot be made ({error.strerror}); take a --workdir that can be written to') from error
        self.manager = ocp.CheckpointManager(self.root, options=options, item_handlers=item_handlers())

    def save(
        self, step: int, *, params: Any, opt_state: Any, router: Any, ordering: Any, data: dict[str, Any], manifest: Manifest
    ) -> None:
        """Saves in the background, replacing a checkpoint of the same step. Raises WorkError when an earlier save failed."""
        trees = {'opt_state': opt_state, 'router': router, 'ordering': ordering}
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
        items['params'] = params_save(params, manifest)
        items |= {'data': ocp.args.JsonSave(data), 'manifest': ocp.args.JsonSave(manifest.to_json())}
        try:
            self.manager.wait_until_finished()
            if step in self.manager.all_steps():
                self.manager.delete(step)
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)
        except (OSError, ValueError) as error:
            raise self._save_failed(step, error) from error

    def replace_manifest(self, step: int, manifest: Manifest) -> None:
        """Another manifest for a step that is saved, whole or not at all. Raises WorkError when it cannot be written."""
        path = self.root / str(step) / 'manifest' / 'metadata'
        temporary = path.parent / '.metadata.tmp'
        try:
            temporary.write_text(json.dumps(manifest.to_json()))
            temporary.replace(path)
        except OSError as error:
            raise self._save_failed(step, error) from error

    def _save_failed(self, step: int, error: BaseException) -> WorkError:
        good = self.latest()
        kept = 'there is no earlier checkpoint' if good is None else f'the checkpoint of step {good} is intact'
        what = f'step {step}' if step >= 0 else 'a checkpoint'
        return WorkError(
            f'saving {what} in {self.root} failed ({reason(error)}); {kept}: free some space or mend the disk, then rerun'
        )

    def steps(self) -> list[int]:
        """Steps that were saved completely, newest first."""
        return sorted((int(entry.name) for entry in self.root.iterdir() if entry.name.isdigit()), reverse=True)

    def latest(self) -> int | None:
        """The newest step that was saved completely."""
        return next(iter(self.steps()), None)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """All items of a step. `abstract` gives the tree of ShapeDtypeStructs of each array item; without one it comes as saved.

        Raises: UserError naming the item that is missing, damaged or of another shape.
        """
        directory = self.root / str(step)
        result: dict[str, Any] = {}
        for name in ARRAY_ITEMS:
            wanted = abstract.get(name)
            if not (directory / name).exists():
                if wanted is not None and jax.tree.leaves(wanted):
                    raise UserError(f'{directory} lacks {name}; use another checkpoint')
                result[name] = {}
                continue
            result[name] = read_tree(directory / name, wanted)
        # Orbax's own reader takes a missing or empty file for no data.
        path = directory / 'data' / 'metadata'
        try:
            result['data'] = json.loads(path.read_text())
        except (ValueError, OSError) as error:
            raise UserError(f'{path} is damaged or missing ({error}); use another checkpoint') from error
        return result

    def save_parent(self, params: Any, manifest: Manifest) -> None:
        """Pins the frozen parent in `WORKDIR/parent`, where no keep-policy reaches it."""
        items = ocp.args.Composite(params=params_save(params, manifest), manifest=ocp.args.JsonSave(manifest.to_json()))
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers())) as checkpointer:
                checkpointer.save(self.workdir / 'parent', args=items, force=True)
        except (OSError, ValueError) as error:
            raise self._save_failed(manifest.step, error) from error

    def restore_parent(self, abstract: Any) -> Any:
        """The parameters of the frozen parent. Raises UserError when it is missing or damaged."""
        read_manifest(self.workdir / 'parent')
        return read_tree(self.workdir / 'parent' / 'params', abstract)

    def _meet(self, key: str, timeout_ms: int) -> None:
        """Orbax has all processes meet at the end of a save, failed or not: one that failed would wait for those that wait for it
        in the middle. It leaves instead."""
        failure = sys.exc_info()[1]
        if failure is not None:
            self.failure = failure
            raise failure
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def check(self) -> None:
        """Raises WorkError when a save in the background has failed."""
        try:
            if self.failure is not None:
                raise self.failure
            self.manager.check_for_errors()
        except (OSError, ValueError) as error:
            raise self._save_failed(-1, error) from error

    def wait(self) -> None:
        """Returns when everything is on disk. Raises WorkError when a save failed."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._save_failed(-1, error) from error

    def close(self) -> None:
        """Waits for what is being saved. Raises WorkError when that failed."""
        try:
            self.manager.close()
        except (OSError, ValueError) as error:
            raise self._save_failed(-1, error) from error
