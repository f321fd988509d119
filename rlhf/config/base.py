"""Types of settings, and the settings of an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Folder = Annotated[Path, AfterValidator(Path.expanduser)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Used in names of folders and in dotted names."""

Tag = Literal["helpful", "safety"]


def _absolute_file(code: str) -> str:
    """`my/file.py:name`, or `file:name` of the working directory, with the whole path: workers work elsewhere."""
    place, _, name = code.rpartition(":")
    file = Path(place if place.endswith(".py") else f"{place}.py").expanduser()
    return f"{file.absolute()}:{name}" if place.endswith(".py") or file.is_file() else code


Code = Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$"), AfterValidator(_absolute_file)]
"""`module:name`, or `path/to/file.py:name`."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name and is_number(cls.model_fields[info.field_name].annotation):
            raise PydanticCustomError("number_type", "should be a number")
        return value


def is_number(annotation: Any) -> bool:
    """Whether values of this type may be numbers, and not true or false, which Python takes for 1 and 0."""
    kinds = get_args(annotation) or (annotation,)
    if any(each is bool or isinstance(each, bool) for each in kinds):
        return False
    return any(
        each in (int, float) or isinstance(each, int) or (each is not annotation and is_number(each)) for each in kinds
    )


class OptimConfig(Settings):
    lr: Annotated[float, Field(ge=0.0)]
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Positive = 1e-5
    max_grad_norm: Positive = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: Fraction = 0.1
    """The cosine schedule ends at this fraction of `lr`."""
    warmup_ratio: Fraction = 0.0
    min_warmup_steps: Annotated[int, Field(ge=0)] = 0
