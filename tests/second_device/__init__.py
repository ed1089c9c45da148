"""A custom node that makes ComfyUI believe in the second device of `tensors.py`; loaded beside the pack
in tests/host/test_second_device.py."""

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import comfy.cli_args
import comfy.model_management as mm
import execution
import torch.optim.optimizer as optimizer

from . import tensors
from .tensors import DEVICE, There, inside

ROOM = 16 << 30
"""Bytes that it says are free."""


def settle() -> None:
    """Once, when every node is loaded."""
    mm.cpu_state, mm.vram_state = mm.CPUState.GPU, mm.VRAMState.NORMAL_VRAM
    comfy.cli_args.args.gpu_only = "SECOND_DEVICE_ONLY" in os.environ
    mm.get_torch_device = lambda: DEVICE
    mm.get_free_memory = answered(mm.get_free_memory)
    mm.get_total_memory = answered(mm.get_total_memory)
    for asked in ("should_use_fp16", "should_use_bf16", "supports_fp8_compute"):
        setattr(mm, asked, lambda *_, **__: False)
    optimizer._get_fused_kernels_supported_devices = lambda: ["cpu", DEVICE.type]
    # Threads begin without the modes of the thread that starts them.
    submit = ThreadPoolExecutor.submit
    ThreadPoolExecutor.submit = lambda pool, work, *a, **k: submit(pool, inside(work), *a, **k)
    pack = modules_of_pack()
    pack["run"].drawing_device = lambda memory: mm.free_memory(memory, DEVICE) or DEVICE
    # It tells packed weights by their type, and goes round inference mode by their memory.
    training = pack["subject_training"]
    ordinary = training._ordinary
    training.Tensor, training._ordinary = There, lambda t: There(ordinary(t.held))


def modules_of_pack() -> dict:
    """The pack's modules in `nodes/` by name."""
    wanted = ("run", "subject_training")
    modules = {
        n.rpartition(".nodes.")[2]: m for n, m in list(sys.modules.items()) if ".nodes." in n
    }
    return {name: modules[name] for name in wanted}


def answered(asked):
    """A question about memory, answered for the second device."""

    def answer(dev=None, *both, **named):
        if dev is not None and dev.type != DEVICE.type:
            return asked(dev, *both, **named)
        return (ROOM, ROOM) if any(both) or any(named.values()) else ROOM

    return answer


def _execute(executor, *args, **kwargs):
    if mm.get_torch_device() != DEVICE:
        settle()
    before = tensors.operations
    inside(EXECUTE)(executor, *args, **kwargs)
    logging.info("on the second device: %d operations", tensors.operations - before)


EXECUTE = execution.PromptExecutor.execute
execution.PromptExecutor.execute = _execute
NODE_CLASS_MAPPINGS: dict[str, type] = {}
