"""How a call is made: whether it must be right, must be refused, or may be either."""

from collections.abc import Callable
from random import Random
from typing import Any

from . import judge
from .draw import junk
from .judge import Wrong, expect

RIGHT, REFUSED = "right", "refused"

made = 0  # calls of this process


def call(function: Callable[..., Any], arguments: dict[str, Any], must: str = "") -> Any:
    """Return what a call gives; REFUSED if it was, where it may be."""
    global made
    made += 1
    before = judge.contents(arguments)
    try:
        result = function(**arguments)
    except (TypeError, ValueError) as error:
        judge.unchanged(before, arguments)
        if must == RIGHT:
            raise Wrong(f"refused: {error}") from error
        expect(str(error), "an error without a message")
        return REFUSED
    judge.unchanged(before, arguments)
    if must == REFUSED:
        raise Wrong("accepted, what must be refused")
    return result


def spoil(dice: Random, arguments: dict[str, Any], faults: dict[str, list[Any]]) -> tuple[Any, str]:
    """Return arguments of which one may be wrong, and what must become of the call."""
    kind = dice.random()
    if kind < 0.6:
        return arguments, RIGHT
    if kind < 0.8:
        name = dice.choice([*faults])
        return {**arguments, name: dice.choice(faults[name])}, REFUSED
    name = dice.choice([*faults])
    return {**arguments, name: junk(dice)}, ""
