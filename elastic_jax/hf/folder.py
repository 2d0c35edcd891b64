"""A folder with a Hugging Face model: config.json, safetensors files, tokenizer files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elastic_jax.arch import Arch
from elastic_jax.errors import UserError
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.families import arch_of
from elastic_jax.hf.name_map import HFTensor
from elastic_jax.hf.safetensors import SafetensorsFile

INDEX = 'model.safetensors.index.json'
PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt')


def read_arch(folder: str | os.PathLike[str]) -> Arch:
    """The Arch that a folder's config.json describes. Raises UserError naming what is not supported."""
    return arch_of(Config.read(Path(folder)))


class ModelFolder:
    """The tensors of a folder, over all of its files. Raises UserError when a file is missing, damaged or a pickle."""

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.files = {path: SafetensorsFile(path) for path in self._paths()}
        self.where = {name: file for file in self.files.values() for name in file.tensors}
        total = sum(len(file.tensors) for file in self.files.values())
        if total != len(self.where):
            raise UserError(f'{self.folder} holds {total - len(self.where)} tensors in two files; fetch it again')

    def _paths(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f'{index} is damaged ({error!r}); fetch it again') from error
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise UserError(f'{self.folder} lacks {missing[0]}, which {INDEX} names; fetch it again')
            return [self.folder / name for name in names]
        single = self.folder / 'model.safetensors'
        if single.is_file():
            return [single]
        pickles = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if pickles:
            raise UserError(
                f'{self.folder} holds {pickles[0]}, a pickle, which can run code when it is read; convert it to safetensors'
            )
        raise UserError(f'{self.folder} has no model.safetensors and no {INDEX}; give the folder of a Hugging Face model')

    def check(self, expected: Sequence[HFTensor], tied: bool) -> None:
        """Raises UserError naming the tensors that are missing, not expected, or of another shape than config.json says."""
        names = {tensor.name for tensor in expected}
        extra = [name for name in self.where if name not in names and not self._harmless(name, tied)]
        if tied and 'lm_head.weight' in extra:
            raise UserError(
                f'{self.folder} is tied by its config.json, but its lm_head.weight differs from the embedding; untie it'
            )
        multi_token = [name for name in extra if name.startswith('mtp.')]
        if multi_token:
            raise UserError(f'{self.folder} has multi-token prediction ({multi_token[0]}), which is not supported; remove it')
        missing = [tensor.name for tensor in expected if tensor.name not in self.where]
        for problem, found in (('lacks', missing), ('has unexpected', extra)):
            if found:
                more = f' and {len(found) - 3} more' if len(found) > 3 else ''
                raise UserError(
                    f'{self.folder} {problem} {", ".join(found[:3])}{more} by its config.json; fetch it again, or mend the config'
                )
        for tensor in expected:
            file = self.where[tensor.name]
            info = file.tensors[tensor.name]
            if info.shape != tensor.shape:
                raise UserError(
                    f'{file.path}: {tensor.name} has shape {list(info.shape)}, config.json means {list(tensor.shape)}; '
                    'fetch it again, or mend the config'
                )
            if info.dtype.kind in 'iub' or info.dtype.itemsize == 1:
                raise UserError(f'{file.path}: {tensor.name} is {info.dtype}, a quantised tensor; import an unquantised model')
            if info.dtype.itemsize > 4:
                raise UserError(f'{file.path}: {tensor.name} is {info.dtype}; convert it to float32, which is the widest here')

    def _harmless(self, name: str, tied: bool) -> bool:
        """Old files store the rotary frequencies, and a tied unembedding beside the embedding that it equals."""
        if name.endswith('rotary_emb.inv_freq'):
            return True
        if not (tied and name == 'lm_head.weight'):
            return False
        embedding = next((other for other in self.where if other.endswith(('embed_tokens.weight', 'embeddings.weight'))), None)
        return embedding is not None and self._same(name, embedding)

    def _same(self, name: str, other: str) -> bool:
        mine, theirs = self.where[name], self.where[other]
        if mine.tensors[name].shape != theirs.tensors[other].shape:
            return False
        rows = mine.tensors[name].rows
        step = max(1, (1 << 24) // max(1, mine.tensors[name].row_size))
        return all(
            np.array_equal(mine.read(name, at, min(rows, at + step)), theirs.read(other, at, min(rows, at + step)))
            for at in range(0, rows, step)
        )

    def dtype(self, name: str) -> np.dtype:
        return self.where[name].tensors[name].dtype

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.where[name].read(name, start, stop)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
