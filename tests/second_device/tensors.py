"""A second device without a graphics card.

Tensors on it hold their values in ordinary memory but say that they are elsewhere. What mixes them
with the CPU's, draws random numbers there with the CPU's generator, or hands them to numpy is refused,
as on a graphics card. So graphs that pass here put every tensor where it must be, and nothing is said
about kernels, numbers of half precision, speed or memory.

To torch it is its device "lazy", which has no kernels of its own here, and whose backward passes run
on the thread that asks for them.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
operations = 0
"""That tensors There took part in."""
MOVES = {"_to_copy", "copy_", "copy", "set_data"}
"""Operations that take tensors from one device to another."""
DECIDES = {"to", "type_as", "cpu", "pin_memory"}
"""Those that inference mode hands on whole, though they are others in turn."""
READ = (Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__bool__)
"""Numbers that Python or torch.tensor read one by one."""
PICKS, PUTS = ("index", "_unsafe_index"), ("index_put", "_index_put", "_unsafe_index_put")
"""Operations whose places may be given on the CPU."""


class There(Tensor):
    """A tensor of the second device."""

    @staticmethod
    def __new__(cls, held: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE, requires_grad=held.requires_grad,
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in READ:
            return func(args[0].held)
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError("numpy can't read the second device: use Tensor.cpu() first")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """While it lasts, what is made on DEVICE is There."""

    def __enter__(self):
        # torch.tensor(numbers, device=DEVICE) makes them on the CPU and moves them by an operation.
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def each(x, change):
    """The same with all its tensors changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, (list, tuple)):
        parts = [each(y, change) for y in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return {k: each(y, change) for k, y in x.items()} if isinstance(x, dict) else x


def held(x: Tensor) -> Tensor:
    return x.held if isinstance(x, There) else x


def there(x: Tensor) -> There:
    return x if isinstance(x, There) else There(x)


def run(func, args: tuple, kwargs: dict):
    """An operation with the values that its tensors hold; what comes of it is where they are."""
    name = func._schema.name.split("::")[1]
    if name in DECIDES:
        with Elsewhere():
            return func.decompose(*args, **kwargs)
    if name == "_has_compatible_shallow_copy_type":
        return type(args[0]) is type(args[1])
    on_device = check(func, name, args, kwargs)
    if (wanted := kwargs.get("device")) is not None:
        on_device = torch.device(wanted).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*each(args, held), **each(kwargs, held))
    if func._schema.is_mutable and not func._schema.returns:
        return None
    if func._schema.is_mutable:
        return kwargs["out"] if "out" in kwargs else args[0]
    if not on_device:
        return result
    # A view of what was made outside of inference mode isn't of it, either.
    with torch.inference_mode(torch.is_inference_mode_enabled() and not of_others(func, args)):
        return each(result, there)


def of_others(func, args: tuple) -> bool:
    """Whether it gives a view of a tensor that inference mode has not made."""
    return func.is_view and isinstance(args[0], Tensor) and not args[0].is_inference()


def check(func, name: str, args: tuple, kwargs: dict) -> bool:
    """Whether it is about tensors There; refuses what a graphics card would."""
    tensors: list[Tensor] = []
    each((args, kwargs), lambda t: tensors.append(t) or t)
    ours = [t for t in tensors if isinstance(t, There)]
    global operations
    operations += bool(ours)
    wanted, generator = kwargs.get("device"), kwargs.get("generator")
    goes_there = bool(ours) if wanted is None else torch.device(wanted).type == DEVICE.type
    if generator is not None and goes_there and name not in MOVES:
        raise RuntimeError(f"{func}: a generator of '{generator.device}' for '{DEVICE}'")
    if name.startswith(PUTS):
        tensors = [t for t in (args[0], args[2]) if t.dim()]
    elif name.startswith(PICKS) and isinstance(args[1], (list, tuple)):
        tensors = [args[0]]
    # A number in a tensor may come from the CPU.
    mixed = ours and any(t.dim() and not isinstance(t, There) for t in tensors)
    if mixed and name not in MOVES:
        told = [f"{list(t.shape)} on {t.device}" for t in tensors]
        raise RuntimeError(f"{func}: tensors on two devices: {', '.join(told)}")
    return bool(ours)


def inside(work):
    """The same work, done Elsewhere."""

    def done(*args, **kwargs):
        with Elsewhere():
            return work(*args, **kwargs)

    return done
