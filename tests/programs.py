"""What a traced function is made of, for tests about precision and memory."""

from collections.abc import Iterator

import jax


def equations(function, *arguments) -> Iterator:
    """Every equation of the traced function, those inside loops, branches and recomputed parts too."""
    todo = [jax.make_jaxpr(function)(*arguments).jaxpr]
    while todo:
        for equation in todo.pop().eqns:
            yield equation
            for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    todo.append(getattr(value, "jaxpr", value))
