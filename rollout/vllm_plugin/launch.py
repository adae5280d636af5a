"""Launches of Triton kernels that cost the host little: a compiled kernel is kept and started without Triton's checks.

At each launch Triton works out anew, from every argument, which compiled form fits: the dtypes, which pointers lie on
16 bytes, which integers are 1 or multiples of 16. That takes longer than the launch. Here most arguments stay what they
are for good, and of the others the kernel names those that it is not to be specialised by (`do_not_specialize`). What
is left is a short key.

A kernel's parameters come in this order: tensors and integers that change from launch to launch, tensors and integers
that stay, constants.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class Launcher:
    """One kernel with its constants and the arguments that stay.

    The first launch of each key goes through Triton, as does every launch in Triton's interpreter.
    """

    def __init__(
        self, kernel: Any, stays: tuple[Tensor | int, ...], constants: dict[str, Any], keyed: tuple[str, ...]
    ) -> None:
        """`constants` holds launch options too. `keyed` names the changing parameters that a key tells apart."""
        self._kernel, self._stays, self._constants, self._keyed = kernel, stays, constants, keyed
        pointers = (it.data_ptr() if isinstance(it, Tensor) else it for it in stays)
        self._last = *pointers, *(constants[name] for name in kernel.arg_names if name in constants)
        self._compiled: dict[Hashable, tuple[Callable[..., None], int, Any, Any]] = {}

    def __call__(
        self, grid: tuple[int, int, int], key: Hashable, tensors: tuple[Tensor, ...], integers: tuple[int, ...]
    ) -> None:
        """Launches on the current stream of the tensors' device, which has to be the current one.

        `key` is to differ wherever the dtype of a tensor does, or what Triton specialises a `keyed` argument by: a
        tensor's alignment to 16 bytes, an integer's value. The other integers have to fit in 32 bits. Raises TypeError
        if Triton specialises by an argument that the key does not tell apart.
        """
        found = self._compiled.get(key)
        if found is None:
            self._launch_first(grid, key, (*tensors, *integers))
            return
        run, function, metadata, _ = found
        stream = torch._C._cuda_getCurrentRawStream(tensors[0].get_device())
        pointers = map(Tensor.data_ptr, tensors)  # for a tensor Triton would ask the driver whose memory it is
        run(*grid, stream, function, metadata, None, None, None, *pointers, *integers, *self._last)

    def _launch_first(self, grid: tuple[int, int, int], key: Hashable, changing: tuple[Tensor | int, ...]) -> None:
        compiled = self._kernel[grid](*changing, *self._stays, **self._constants)
        if compiled is None:  # by the interpreter
            return
        names = self._kernel.arg_names[: len(changing)]
        source = compiled.src
        for index, name in enumerate(names):
            if name not in self._keyed and (source.attrs.get((index,)) or (index,) in source.constants):
                raise TypeError(f"{self._kernel.__name__} is specialised by {name}; name it in its do_not_specialize")
        # The compiled kernel itself comes along because its code is unloaded with it.
        self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled
