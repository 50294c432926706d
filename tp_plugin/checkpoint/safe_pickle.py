"""Pickles that were written by someone else, read as data: reading a checkpoint must not run code that lies in it.

A pickle may name any function of any module and have it called. ``torch.load(weights_only=True)`` makes tensors,
numbers, strings and containers only; the few classes that DeepSpeed, Accelerate and torch's distributed checkpoint
(DCP) write beside them are listed here. A file that names anything else needs the user's explicit trust.
"""

from __future__ import annotations

import importlib
import pathlib
import pickle
from typing import IO, Any

import torch

from tp_plugin.errors import TPError

DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
NUMPY = (
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",  # as numpy 1 writes them
    "numpy.core.multiarray.scalar",
)
KNOWN = frozenset((*DEEPSPEED, *NUMPY, "_codecs.encode", "argparse.Namespace"))
"""Harmless classes and functions, by the names that a pickle has for them: they only hold what they are given."""

DCP_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},  # Python 3.13
}  # fmt: skip
"""What a ``.metadata`` file of DCP consists of, by module; and ``torch.<dtype>``."""

DAMAGE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError, OSError, pickle.UnpicklingError)
"""What the readers of torch and pickle raise for a truncated or damaged file."""


def load(path: pathlib.Path, *, trust: bool = False) -> Any:
    """The contents of a file that ``torch.save`` wrote; tensors are mapped from the file, on the CPU.

    Args:
        path: a file in torch's zip format.
        trust: run whatever the pickle says (``weights_only=False``).

    Raises:
        TPError: the file is truncated or damaged, or it names a class that is neither in :data:`KNOWN` nor allowed by
            ``torch.serialization.add_safe_globals``; the message names the class.
    """
    allowed: list[Any] = []
    try:
        if not trust:
            named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if unknown := sorted(set(named) - KNOWN):
                raise TPError(_needs_trust(path, unknown))
            allowed = _known_objects(named)
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)
    except TPError:
        raise
    except DAMAGE as error:
        raise TPError(
            f"checkpoint file {path} cannot be read ({_reason(error)}); it is truncated or damaged"
        ) from error


def load_dcp_metadata(path: pathlib.Path, *, trust: bool = False) -> Any:
    """The ``torch.distributed.checkpoint.metadata.Metadata`` in the file ``.metadata`` of a distributed checkpoint.

    Args:
        trust: run whatever the pickle says.

    Raises:
        TPError: the file is truncated or damaged, or it names a class that DCP does not write.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with path.open("rb") as file:
            metadata = pickle.load(file) if trust else _MetadataUnpickler(file, path).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise ValueError("it does not hold the metadata of a distributed checkpoint")
    except TPError:
        raise
    except DAMAGE as error:
        raise TPError(f"{path} cannot be read ({_reason(error)}); it is truncated or damaged") from error
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Refuses every class that is not in :data:`DCP_METADATA`.

    Torch's own restricted unpickler does not know the pickle protocol that DCP writes.
    """

    def __init__(self, file: IO[bytes], path: pathlib.Path):
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """The object that the pickle calls ``module.name``."""
        if name in DCP_METADATA.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise TPError(_needs_trust(self.path, [f"{module}.{name}"]))


def _known_objects(names: list[str]) -> list[tuple[Any, str]]:
    """The objects of those names in :data:`KNOWN`, as ``torch.serialization.safe_globals`` takes them."""
    found = []
    for name in names:
        # numpy 2 has these under another name; the old one only warns
        module, _, attribute = name.replace("numpy.core.", "numpy._core.").rpartition(".")
        try:
            found.append((getattr(importlib.import_module(module), attribute), name))
        except ImportError as error:
            raise TPError(f"{name} is needed to read the checkpoint: {error}; install {name.split('.')[0]}") from error
    if any(name.startswith("numpy.") for name in names):
        import numpy as np

        # a dtype is an instance of a class of its own, which the pickle does not name
        kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
        found += [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in kinds]
    return found


def _needs_trust(path: pathlib.Path, names: list[str]) -> str:
    return (
        f"{path} is a pickle that uses {', '.join(names)}, which could run any code while it is read. If you know who "
        "wrote the checkpoint, pass `--trust` to tp-plugin, or allow the class in your script before it loads the "
        f"checkpoint: `torch.serialization.add_safe_globals([{names[0].rpartition('.')[2]}])`"
    )


def _reason(error: Exception) -> str:
    """The message of ``error`` without torch's advice to switch ``weights_only`` off."""
    text = str(error)
    _, found, inner = text.partition("WeightsUnpickler error: ")
    return inner.partition("\n")[0].strip() if found else text
