"""Weights that stay on disk: tensors over memory-mapped files, and a mode in which large new ones go there too."""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .edits import CompressionError
from .memory import give_back

# as safetensors writes them
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SMALL = 1 << 16  # bytes: what is smaller than this is held in memory
ENOUGH = 1 << 25  # bytes that a model may have read before their pages are let go


class Pages:
    """Files mapped as tensors. Their pages come into memory when they are read, and leave it with `release`.

    What the kernel holds of a file it may drop at any time; `release` takes it out of this process too, so that its memory is
    what it works on. A tensor keeps its own map alive, and takes it along when it goes.

    Args:
        scratch (path): a folder for the files of `spooled` (without names, so that nothing is left of them, whatever happens).
        small (`int`, defaults to `SMALL`): tensors of fewer bytes are held in memory.

    Example:

    ```python
    >>> import tempfile, torch
    >>> from safetensors.torch import save_file
    >>> from hf_compress.paging import Pages
    >>> folder = tempfile.mkdtemp()
    >>> save_file({"weight": torch.arange(6.0).view(2, 3)}, f"{folder}/model.safetensors")
    >>> pages = Pages(folder, small=0)
    >>> weight = pages.read(f"{folder}/model.safetensors")["weight"]
    >>> pages.release()
    >>> with pages.spooled():
    ...     rows = weight.index_select(0, torch.tensor([1]))
    >>> rows, pages.maps
    (tensor([[3., 4., 5.]]), 2)

    ```
    """

    def __init__(self, scratch: str | os.PathLike, small: int = SMALL) -> None:
        self.scratch, self.small = os.fspath(scratch), small
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._places: set[int] = set()
        self._read = 0

    @property
    def maps(self) -> int:
        """How many files are mapped."""
        return len(self._maps)

    def read(self, path: str | os.PathLike) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors file, over the file itself. Writing to them does not reach the file.

        Raises:
            CompressionError: the file is damaged, or holds a type of numbers that is not known here.
        """
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            try:
                header = json.loads(file.read(length)) if length <= os.path.getsize(path) else None
                entries = {name: entry for name, entry in header.items() if name != "__metadata__"}  # type: ignore[union-attr]
                spans = {name: tuple(entry["data_offsets"]) for name, entry in entries.items()}
                end = max((last for _, last in spans.values()), default=0)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CompressionError(f"{path} is no whole safetensors file; download or save it again.") from error
            if 8 + length + end != os.path.getsize(path):
                raise CompressionError(f"{path} is truncated or damaged; download or save it again.")
            if not end:
                return {name: torch.empty(entry["shape"], dtype=_dtype(entry, path)) for name, entry in entries.items()}
            area = self._map(file.fileno(), private=True)
        found = {}
        for name, entry in entries.items():
            dtype, shape, (first, last) = _dtype(entry, path), entry["shape"], spans[name]
            if last - first != math.prod(shape) * dtype.itemsize or first < 0:
                raise CompressionError(f"{path} is damaged: the size of {name!r} is not that of its shape {shape}.")
            if first == last:
                found[name] = torch.empty(shape, dtype=dtype)
                continue
            at = 8 + length + first
            tensor = torch.frombuffer(area, dtype=dtype, count=math.prod(shape), offset=at).view(shape)
            found[name] = tensor.clone() if last - first < self.small or at % dtype.itemsize else tensor
            self._places.add(found[name].data_ptr())
        return found

    def is_read(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies where `read` put one, and not in a file of its own."""
        return tensor.data_ptr() in self._places

    def store(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in a file of their own, which goes when the tensor does."""
        flat = tensor.detach().contiguous().reshape(-1)
        with tempfile.TemporaryFile(dir=self.scratch) as file:
            file.write(flat.view(torch.uint8).numpy().data)  # not through the map: a full disk is an error then
            file.flush()
            area = self._map(file.fileno(), private=False)
        return torch.frombuffer(area, dtype=tensor.dtype).view(tensor.shape)

    def _map(self, file: int, private: bool) -> mmap.mmap:
        if sys.platform == "win32":
            area = mmap.mmap(file, 0, access=mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE)
        else:
            # private and writable as torch wants it; nobody writes, so nothing is reserved for that
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
            area = mmap.mmap(file, 0, flags=flags if private else mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._maps.add(area)
        return area

    def release(self) -> None:
        """Take all pages out of this process's memory; they are read again where they are used again."""
        self._read = 0
        for area in list(self._maps):
            if hasattr(area, "madvise"):
                area.madvise(mmap.MADV_DONTNEED)
        give_back()

    @contextmanager
    def releasing(self, model: nn.Module) -> Iterator[None]:
        """While a model runs, let go of what it has read every `ENOUGH` bytes."""

        def count(size: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:  # a function: copies of the module share it
                self._read += size
                if self._read > ENOUGH:
                    self.release()

            return hook

        with ExitStack() as stack:
            for module in model.modules():
                size = sum(p.nbytes for p in module._parameters.values() if p is not None)
                if size:
                    stack.callback(module.register_forward_hook(count(size)).remove)
            yield

    def spooled(self) -> TorchDispatchMode:
        """A mode in which every large tensor that is made is written to a file and read from there."""
        return _Spooled(self)


def _dtype(entry: Mapping[str, Any], path: str | os.PathLike | Path) -> torch.dtype:
    try:
        return DTYPES[entry["dtype"]]
    except KeyError as error:
        raise CompressionError(f"{path} holds numbers of a type that cannot be cut: {entry.get('dtype')!r}.") from error


class _Spooled(TorchDispatchMode):
    def __init__(self, pages: Pages) -> None:
        super().__init__()
        self.pages = pages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.is_mutable:
            return made
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs or {})) if _is_plain(t)}

        def keep(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(keep(v) for v in value)
            if (
                type(value) is not torch.Tensor
                or not _is_plain(value)
                or value.nbytes < max(self.pages.small, 1)
                or not value.is_contiguous()
                or value.untyped_storage().data_ptr() in given
            ):
                return value
            stored = self.pages.store(value)
            self.pages.release()  # what it was made from
            return stored

        return keep(made)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is numbers in this computer's memory, and not packed by a library."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
