"""What a rank holds of a parameter: a strategy's answer to ``fabric.explain()``."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning.fabric.plugins.precision.precision import dtype_name

WHOLE = "whole"


@dataclass(frozen=True, eq=False)
class Holding:
    """One parameter of the user's module, under its name there.

    ``parameter`` is the tensor that optimizers know, ``here`` what this rank keeps of it (the same tensor where that is
    all of it), ``shape`` that of the whole. ``layout`` says in words which part that is. ``gradients`` says how its
    gradient meets those of other ranks; empty: not at all. ``computes_in`` is the dtype that the strategy casts it to;
    None: what the precision says. ``has_gradient`` None: the gradient is kept where it cannot be seen.
    """

    name: str
    parameter: Tensor
    here: Tensor
    shape: tuple[int, ...]
    layout: str = WHOLE
    gradients: str = ""
    computes_in: str | None = None
    has_gradient: bool | None = None

    @classmethod
    def all_of(cls, name: str, parameter: Tensor, layout: str = WHOLE, gradients: str = "") -> "Holding":
        """Of a parameter that this rank has the whole of."""
        shape = () if is_lazy(parameter) else tuple(parameter.shape)
        return cls(name, parameter, parameter, shape, layout, gradients, has_gradient=parameter.grad is not None)


def ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"


def averaged(number: int, dtype: object = None) -> str:
    """How gradients of ``number`` ranks meet; nothing is said of one rank."""
    if number == 1:
        return ""
    return f"averaged over {ranks(number)}" + (f" in {dtype_name(dtype)}" if dtype is not None else "")  # type: ignore[arg-type]


def copy_on_each(number: int) -> str:
    return WHOLE if number == 1 else f"a copy on each of {ranks(number)}"
