"""Straight code for a few rows: the calls of torch that a function comes down to, recorded once and repeated from then on.

For a few rows it takes several times longer to find out how tensors lie than to multiply them, and it comes out the same every
time. Views are not repeated one by one: a tensor is taken from the memory that it lies in, whatever led to it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tenfold.structure.plan import unhurried
from tenfold.structure.products import PLAIN
from tenfold.structure.traced import is_traced

CALLS = 3  # from which one on a function is recorded: most numbers of rows come once, that of decoding stays
PROGRAMS = 16  # that are kept
WRITING = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or")),
}
READING = {
    "item",
    "tolist",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
    "equal",
    "allclose",
}


class Straight:
    """Calls ``function(*operands)`` and returns its result, by straight code where that is known.

    The function must do the same for all operands of the same shapes, layouts and types, whatever their numbers are.
    """

    def __init__(self):
        self._known: dict[tuple, Callable[..., Tensor] | int | None] = {}

    def __call__(self, function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
        first, *rest = operands
        key = first.shape, first.stride(), first.dtype, *[(x.stride(), x.storage_offset(), x.dtype) for x in rest]
        known = self._known.get(key, 0)
        if callable(known):
            return known(*operands)
        with unhurried():  # from the first call on, so that all calls compute the same
            if known is None or not all(type(x) in PLAIN for x in operands):
                return function(*operands)
            if known + 1 < CALLS:
                if len(self._known) >= PROGRAMS:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = known + 1
                return function(*operands)
            with Recorder(operands) as recorder:
                made = function(*operands)
        program = recorder.program(made)
        self._known[key] = program if program is not None and torch.equal(program(*operands), made) else None
        return made


def serves(x: Tensor) -> bool:
    """Whether what is done with ``x`` may be recorded and repeated."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return False
    # where it is followed tensors may have no memory of their own; a trace is for other sizes, too
    return not is_traced() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


class Recorder(TorchFunctionMode):
    """Writes down what is called while it is entered.

    Every tensor lies in a memory with a number: those of ``operands``, then those that were made.
    """

    def __init__(self, operands: tuple[Tensor, ...]):
        super().__init__()
        self._memories: dict[tuple[int, torch.dtype], int] = {}
        self._first: list[Tensor] = []  # of every memory, and held, else another one could come to lie there
        self._lines: list[str] = []
        self._names: dict[str, object] = {}
        self._fresh: str | None = None  # what the line before has made and left empty: a product can make it itself
        self._sound = True
        for operand in operands:
            self._sound &= _memory(operand) not in self._memories
            self._add(operand)
        self._operands = len(operands)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self._note(func, args, kwargs, made)
        return made

    def program(self, made: Tensor) -> Callable[..., Tensor] | None:
        """A function of the operands that does what was recorded and returns ``made``; None where that can't be done."""
        result = self._text(made)
        if not self._sound:
            return None
        arguments = ", ".join(f"t{k}" for k in range(self._operands))
        source = "\n    ".join([f"def straight({arguments}):", *self._lines, f"return {result}"])
        names = {"as_strided": torch.as_strided} | self._names
        exec(source, names)  # text of this class, as dataclasses make their methods
        return names["straight"]  # type: ignore[return-value]

    def _note(self, func, args, kwargs, made) -> None:
        name = getattr(func, "__name__", "")
        changes = name in WRITING or (name.endswith("_") and not name.endswith("__"))
        changes = changes or kwargs.get("out") is not None or kwargs.get("inplace", False)
        if not isinstance(made, Tensor) and not changes:
            several = isinstance(made, list | tuple) and any(isinstance(x, Tensor) for x in made)
            views = several and all(isinstance(x, Tensor) and _memory(x) in self._memories for x in made)
            self._sound &= views if several else name not in READING
            return
        if not changes and _memory(made) in self._memories:  # a view: where it is used, it is taken from its memory
            return
        if name == "new_empty" and (number := self._memories.get(_memory(args[0]))) is not None:  # asks for a type only
            args = (self._first[number], *args[1:])
        fresh, self._fresh = self._fresh, None
        if func is torch.baddbmm and kwargs.get("beta") == 0 and fresh == self._text(kwargs.get("out")):
            self._lines[-1] = f"{fresh} = {self._name(torch.bmm)}({self._text(args[1])}, {self._text(args[2])})"
            return
        call = ", ".join([*map(self._text, args), *(f"{key}={self._text(value)}" for key, value in kwargs.items())])
        line = f"{self._name(func)}({call})"
        if isinstance(made, Tensor) and _memory(made) not in self._memories:
            number = self._add(made)
            line = f"t{number} = {line}"
            self._fresh = f"t{number}" if name == "new_empty" else None
        self._lines.append(line)

    def _add(self, value: Tensor) -> int:
        self._memories[_memory(value)] = number = len(self._first)
        self._first.append(value)
        return number

    def _text(self, value) -> str:
        if isinstance(value, list | tuple):
            inside = ", ".join(map(self._text, value))
            return f"[{inside}]" if isinstance(value, list) else f"({inside},)" if value else "()"
        if not isinstance(value, Tensor):
            return self._name(value)
        number = self._memories.get(_memory(value))
        if number is None:
            self._sound = False
            return ""
        first = self._first[number]
        offset = value.storage_offset() - first.storage_offset()
        if offset == 0 and value.shape == first.shape and value.stride() == first.stride():
            return f"t{number}"
        start = f"t{number}.storage_offset() + {offset}" if number == 0 else str(value.storage_offset())
        return f"as_strided(t{number}, {tuple(value.shape)}, {value.stride()}, {start})"

    def _name(self, value) -> str:
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        name = next(name for k in count() if (name := f"c{k}") not in self._names)
        self._names[name] = value
        return name


def _memory(value: Tensor) -> tuple[int, torch.dtype]:
    return value.untyped_storage().data_ptr(), value.dtype
