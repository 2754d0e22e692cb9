"""The exponential moving average of a model, kept in another model (IMWA eq. 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ssod_imwa.averaging.checks import (
    check_models,
    check_same,
    check_separate,
    check_supported,
    is_averaged,
    nonfinite,
)
from ssod_imwa.averaging.weights import tensor_identity

Decay = Callable[[int], float]
BUFFERS = ("ema", "copy", "skip")
# How a wrapper names what it holds, and where that is found.
WRAPPERS = (
    ("module.", "DataParallel or DistributedDataParallel", "model.module"),
    ("_orig_mod.", "torch.compile", "the model before it was compiled"),
    ("_fsdp_wrapped_module.", "FSDP", "an unsharded model"),
)

# Where a tensor is looked up: a module's dictionary and the key in it; and its full name. Module
# attributes would do, but 350 of them take longer to look up than a GPU takes for the update.
_Slot = tuple[dict[str, Tensor], str, str]


def constant_decay(decay: float) -> Decay:
    """The same decay at every iteration.

    Example:
        >>> constant_decay(0.9996)(0)
        0.9996
    """
    _check_decay(decay)
    return lambda t: decay


def warmup_decay(decay: float) -> Decay:
    """min(decay, 1 - 1 / (t + 1)): the plain mean of the first students, then the constant decay.

    The bound takes over after 1 / (1 - decay) iterations, 2500 for 0.9996. Mean Teacher and Soft
    Teacher start their teachers this way.

    Example:
        >>> [warmup_decay(0.7)(t) for t in range(4)]
        [0.0, 0.5, 0.6666666666666667, 0.7]
    """
    _check_decay(decay)
    return lambda t: min(decay, 1 - 1 / (t + 1))


class ModelEMA:
    """Keeps a teacher at omega_t = decay * omega_{t-1} + (1 - decay) * theta_t.

    One update reads both models and writes one, in a handful of multi-tensor calls. Tied tensors
    are moved once; integer and bool buffers are copied. With a decay d the teacher is a mean of
    about the last 1 / (1 - d) students.

    Args:
        teacher: updated in place; float32 or wider, because in bfloat16 a decay of 0.999 rounds
            every update away. The student may be narrower.
        student: has the teacher's parameters and buffers, by name.
        decay: in [0, 1], constant or a function of the member's own iteration t.
        buffers: floating buffers are averaged like parameters ("ema"), copied ("copy") or left
            alone ("skip", integer buffers too). Buffers that hold infinities when training begins,
            such as attention masks, are always copied: their mean is not a number.

    Raises:
        ValueError: names or shapes differ, or an argument is out of range.
        TypeError: a tensor cannot be averaged, or the teacher is in half precision.

    Example:
        >>> teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> _, _ = nn.init.zeros_(teacher.weight), nn.init.ones_(student.weight)
        >>> ema = ModelEMA(teacher, student, 0.75)
        >>> ema.update(0)
        >>> ema.update(1)
        >>> teacher.weight.item()
        0.4375
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        decay: float | Decay,
        *,
        buffers: str = "ema",
    ) -> None:
        if buffers not in BUFFERS:
            raise ValueError(f"buffers = {buffers!r} is not allowed (must be one of {BUFFERS})")
        self.teacher = teacher
        self.student = student
        self.decay = decay if callable(decay) else constant_decay(decay)
        self.buffers = buffers
        check_models({"teacher": teacher, "student": student})
        self._pairs = _pair(teacher, student)
        self._tensors: list[Tensor] = []
        self._memory: list[int] = []
        self._moved: list[tuple[list[Tensor], list[Tensor]]] = []
        self._copied: list[tuple[list[Tensor], list[Tensor]]] = []
        self._all: list[tuple[list[Tensor], list[Tensor]]] = []
        self._infinite = set(nonfinite(dict(student.named_buffers())))
        self._refresh()

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Move the teacher towards the student, after the optimizer's step t."""
        decay = self.decay(t)
        _check_decay(decay)
        self._refresh()
        for targets, sources in self._moved:
            if sources[0].dtype != targets[0].dtype:
                sources = [source.to(targets[0].dtype) for source in sources]
            torch._foreach_lerp_(targets, sources, 1 - decay)
        for targets, sources in self._copied:
            torch._foreach_copy_(targets, sources)

    @torch.no_grad()
    def copy(self) -> None:
        """Set the teacher to the student, every parameter and buffer."""
        self._refresh()
        for targets, sources in self._all:
            torch._foreach_copy_(targets, sources)

    def _refresh(self) -> None:
        """Look the tensors up again: a module may replace a buffer, or `to` move one."""
        tensors = [holder[name] for pair in self._pairs for holder, name, _ in pair]
        memory = [tensor.data_ptr() for tensor in tensors]
        if memory == self._memory:
            return
        # Held, so that the memory of a replaced buffer cannot be handed out again.
        self._tensors, self._memory = tensors, memory
        everything, moved, copied = [], [], []
        named = {}
        seen = set()
        for (*_, name), into, source in zip(
            (slot for slot, _ in self._pairs), tensors[::2], tensors[1::2], strict=True
        ):
            check_supported(f"teacher {name}", into)
            check_supported(f"student {name}", source)
            check_same({"the teacher": {name: into}, "the student": {name: source}}, types=False)
            identity = tensor_identity(into)
            # A tensor that the two share needs no update, a tied one needs a single one.
            if identity in seen or identity == tensor_identity(source):
                continue
            seen.add(identity)
            everything.append((into, source))
            named[f"teacher {name}"] = into
            if self._is_moved(name, into):
                moved.append((into, source))
            elif self.buffers != "skip":
                copied.append((into, source))
        check_separate(named)
        self._all, self._moved, self._copied = map(_grouped, (everything, moved, copied))

    def _is_moved(self, name: str, tensor: Tensor) -> bool:
        if not is_averaged(tensor):
            return False
        if not isinstance(tensor, nn.Parameter) and (
            self.buffers != "ema" or name in self._infinite
        ):
            return False
        if torch.finfo(tensor.dtype).bits < 32:
            raise TypeError(
                f"teacher {name} is {tensor.dtype}, in which small updates are rounded away; keep "
                "the teacher in float32 (teacher.float())"
            )
        return True


def _check_decay(decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"decay = {decay} is not allowed (must be in 0..1)")


def _slots(model: nn.Module) -> Iterator[_Slot]:
    # With the names of tied tensors, so that models that tie differently are still paired by name.
    for prefix, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is not None:
                    yield holder, name, f"{prefix}.{name}" if prefix else name


def _pair(teacher: nn.Module, student: nn.Module) -> list[tuple[_Slot, _Slot]]:
    teachers = {slot[2]: slot for slot in _slots(teacher)}
    students = {slot[2]: slot for slot in _slots(student)}
    if differing := sorted(teachers.keys() ^ students.keys()):
        holder = "teacher" if differing[0] in teachers else "student"
        raise ValueError(
            f"{differing[0]} is only in the {holder}; teacher and student must have equal names"
            f"{_hint_at_wrapper(differing)}"
        )
    return [(slot, students[name]) for name, slot in teachers.items()]


def _hint_at_wrapper(names: list[str]) -> str:
    """What to do if names are those of a module inside another."""
    for prefix, wrapper, inside in WRAPPERS:
        if any(name.startswith(prefix) for name in names):
            return f" (names that begin with {prefix!r} are those of {wrapper}: give {inside})"
    return ""


def _grouped(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Columns of the pairs, split by device and type for multi-tensor calls."""
    groups: dict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = {}
    for into, source in pairs:
        key = (into.device, into.dtype, source.device, source.dtype)
        groups.setdefault(key, []).append((into, source))
    return [([a for a, _ in group], [b for _, b in group]) for group in groups.values()]
