"""Lets Megatron-Core run on CPU with gloo: call `enable_cpu()` before importing `megatron`.

Megatron-Core names CUDA devices in its source. On a machine without a GPU an
import hook rewrites those names while the modules are loaded:

* `torch.cuda.X` becomes `_device.X`, an object below that answers for the CPU
  and leaves `torch.cuda` itself untouched for everybody else in the process;
* `device="cuda"` becomes `device="cpu"`, `.cuda(...)` becomes `.cpu()`;
* the type names the optimizers compare (`'torch.cuda.FloatTensor'`, ...) become
  the CPU ones.

Nothing of Megatron's arithmetic changes. On a machine with a GPU the hook is
never installed.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Iterator, Sequence
from types import CodeType, ModuleType
from typing import Any

import torch

_REWRITES = (
    (re.compile(r"(['\"])torch\.cuda\.(Float|Half|BFloat16)Tensor\1"), r"\1torch.\2Tensor\1"),
    (re.compile(r"(?<!import )(?<!from )\btorch\.cuda\.(?=[A-Za-z_])"), "_device."),
    (re.compile(r"\bdevice\s*=\s*(['\"])cuda\1"), r"device=\1cpu\1"),
    (re.compile(r"\.cuda\([^()]*(?:\([^()]*\))?[^()]*\)"), ".cpu()"),
)


class _Stream:
    """A stream of a device that runs everything in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _Random:
    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()


class _CpuDevice:
    """What Megatron-Core asks of `torch.cuda`, answered for the CPU."""

    Stream = _Stream
    Event = _Event
    random = _Random

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> str:
        return "cpu"

    @staticmethod
    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def synchronize(device: Any = None) -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def current_stream(device: Any = None) -> _Stream:
        return _Stream()

    default_stream = current_stream

    @staticmethod
    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield


_DEVICE = _CpuDevice()


def _set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    """Takes the place of Megatron's setter, which queues a CUDA call that never runs here."""
    torch.set_rng_state(new_state)


class _CpuLoader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Past the bytecode cache: cached files hold the CUDA names.
        path = self.get_filename(fullname)
        source = self.get_data(path).decode("utf-8")
        for pattern, replacement in _REWRITES:
            source = pattern.sub(replacement, source)
        return self.source_to_code(source.encode(), path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["_device"] = _DEVICE
        super().exec_module(module)
        if module.__name__ == "megatron.core.tensor_parallel.random":
            module.__dict__["_set_cuda_rng_state"] = _set_rng_state
        elif module.__name__ == "megatron.core.jit":
            # The fused functions are compiled by TorchInductor: minutes on a CPU for no gain.
            module.__dict__["disable_jit_fuser"]()


class _CpuFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _CpuLoader(spec.loader.name, spec.loader.path)
        return spec


def enable_cpu() -> None:
    """Install the hook, once. Does nothing where a GPU is present.

    Raises:
        RuntimeError: Megatron-Core was imported before, with its CUDA names in place.
    """
    if torch.cuda.is_available() or any(isinstance(f, _CpuFinder) for f in sys.meta_path):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("enable_cpu() must run before megatron.core is imported")
    sys.meta_path.insert(0, _CpuFinder())
