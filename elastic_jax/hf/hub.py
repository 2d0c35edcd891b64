"""The Hugging Face hub: a model id becomes a local folder, and a folder is uploaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from elastic_jax.data.tokenizers import TOKENIZER_FILES
from elastic_jax.errors import UserError, WorkError

MODEL_ID = re.compile(r'\w[\w.-]*(/\w[\w.-]*)?')
PATTERNS = ['model*.safetensors', 'model.safetensors.index.json', 'config.json', *TOKENIZER_FILES]  # never a pickle, never code


def resolve(dir_or_id: str | os.PathLike[str]) -> Path:
    """The folder itself, or the hub's model of that id, downloaded to huggingface_hub's cache.

    Raises: UserError when it is neither a folder nor a model that can be fetched.
    """
    folder = Path(dir_or_id)
    if folder.is_dir():
        return folder
    name = os.fspath(dir_or_id)
    if folder.exists() or not MODEL_ID.fullmatch(name):
        raise UserError(f'{name} is no folder, and no id of the Hugging Face hub such as nvidia/name; give one of the two')
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS))
    except Exception as error:  # it raises its own errors, those of its HTTP client, OSError and ValueError
        raise UserError(
            f'{name} is no folder here and cannot be fetched from the Hugging Face hub ({_reason(error)}); check the id and the '
            'network, or give a folder'
        ) from error


def push(folder: str | os.PathLike[str], model_id: str) -> str:
    """Uploads an exported folder; returns its address. Raises WorkError when the hub refuses or cannot be reached."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(model_id, exist_ok=True)
        api.upload_folder(repo_id=model_id, folder_path=folder)
    except Exception as error:  # as in `resolve`
        raise WorkError(
            f'{folder} is written, but uploading it to {model_id} failed ({_reason(error)}); check the id, the network and your '
            'login (hf auth login)'
        ) from error
    return str(address)


def _reason(error: BaseException) -> str:
    line = ' '.join(str(error).split()) or type(error).__name__
    return line if len(line) <= 160 else line[:157] + '...'
