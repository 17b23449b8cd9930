"""Types of command line values."""

import math
import re
from pathlib import Path
from typing import Any

import click

from gdfq.errors import UsageError
from gdfq.execution.budget import parse_bytes
from gdfq.execution.durations import seconds_of

PATH = click.Path(path_type=Path)


class Shape(click.ParamType):
    name = "CxHxW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        text = str(value).lower()
        if not re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})+", text):
            self.fail(f"a shape is written as for instance 3x32x32; got {value!r}.", param, ctx)
        return tuple(map(int, text.split("x")))


class DataPath(click.ParamType):
    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not Path(value).exists():
            self.fail(
                f"there is no data at {value}. Give an .npz file, a folder of images, or "
                "for a language model a text file.",
                param,
                ctx,
            )
        return Path(value)


class Numbers(click.ParamType):
    name = "a,b,c"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"give numbers with commas between, as 0.5,0.5,0.5; got {value!r}.", param, ctx
            )


class Seconds(click.FloatRange):
    """A finite number of seconds."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"give a number of seconds; got {value!r}.", param, ctx)
        return seconds


class Size(click.ParamType):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        size = parse_bytes(str(value))
        if size is None:
            self.fail(
                "a size is a number of bytes, or of KB, MB, GB (powers of 1,000) or KiB, MiB, GiB "
                f"(powers of 1,024), as 300KB; got {value!r}.",
                param,
                ctx,
            )
        return size


class Duration(click.ParamType):
    """A positive time, in seconds."""

    name = "TIME"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            return seconds_of(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
