"""Operators, and whatever else a process has once, however often vaekl is imported.

A module may be reloaded, and all of vaekl dropped and imported anew. torch has room for one
operator of a name, and compiled programs hold on to theirs. So an operator is defined once and
calls functions that each import replaces by its own; it is defined anew only if what it looks like
has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo

#: By name; kept by what the operators are kept by.
kept: dict[str, Any] = vars(torch.ops.vaekl).setdefault("kept", {})
_operators: dict[str, dict[str, Any]] = kept.setdefault("operators", {})


def define(
    name: str,
    schema: str,
    tags: Sequence[torch.Tag],
    forward: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """The operator ``vaekl::name``.

    Args:
        schema: Arguments and results, ``"(Tensor mu, ...) -> ..."``.
        tags: Of the operator.
        forward: Its implementation. It is Python as well; Dynamo is kept from tracing it, which it
            would try after a graph break in the caller.
        fake: The same for shapes, dtypes and strides alone.
    """
    operator = _operators.setdefault(name, {"functions": {}})
    functions = operator["functions"]
    functions["forward"], functions["fake"] = forward, fake
    if operator.get("looks") == (schema, tuple(tags)):
        return
    if "library" in operator:
        operator.pop("library")._destroy()
    library = torch.library.Library("vaekl", "FRAGMENT")
    library.define(name + schema, tags=tuple(tags))
    implementation = _disable_dynamo(_caller(functions, "forward"))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vaekl::{name}", _caller(functions, "fake"), lib=library)
    operator["library"], operator["looks"] = library, (schema, tuple(tags))
    if "backward" in functions:
        _register_gradients(name)


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Gradients of an operator, as of ``torch.library.register_autograd``."""
    functions = _operators[name]["functions"]
    is_new = "backward" not in functions
    functions["backward"], functions["context"] = backward, setup_context
    if is_new:
        _register_gradients(name)


def _register_gradients(name: str) -> None:
    functions = _operators[name]["functions"]
    torch.library.register_autograd(
        f"vaekl::{name}",
        _caller(functions, "backward"),
        setup_context=lambda ctx, inputs, output: functions["context"](ctx, inputs, output),
        lib=_operators[name]["library"],
    )


def _caller(functions: dict[str, Callable[..., Any]], which: str) -> Callable[..., Any]:
    """A call of whatever is the function then."""
    return lambda *arguments: functions[which](*arguments)
