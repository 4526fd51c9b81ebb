"""Functions as syntax trees, and back."""

import ast
import functools
import inspect
from collections.abc import Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

from torch_rope.integrations._norms import Function, UnknownFormError


def definition_of(function: FunctionType) -> ast.FunctionDef:
    """Returns the syntax tree of a function, without annotations, defaults and decorators.

    Raises:
        UnknownFormError: If the source is not available.
    """
    try:
        lines, start = inspect.getsourcelines(function)
        # The source keeps its indentation, which belongs to strings of several lines.
        prefix = ["if True:\n"] if lines[0][:1].isspace() else []
        (block,) = ast.parse("".join([*prefix, *lines])).body
    except (OSError, SyntaxError) as error:
        raise UnknownFormError("its source is not available") from error
    definition = block.body[0] if isinstance(block, ast.If) else block
    if not isinstance(definition, ast.FunctionDef):
        raise UnknownFormError("its source is not that of a function")
    ast.increment_lineno(definition, start - 1 - len(prefix))
    definition.decorator_list = []
    definition.returns = None
    arguments = definition.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return _Plain().visit(definition)  # type: ignore[no-any-return]


class _Plain(ast.NodeTransformer):
    """Removes annotations of variables, which a function does not evaluate."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        """Makes it an assignment, if it has a value."""
        if node.value is None:
            return node
        return ast.copy_location(ast.Assign([node.target], node.value), node)


def is_source_of(definition: ast.FunctionDef, function: FunctionType) -> bool:
    """Returns whether a definition compiles to the code of a function, as far as its lines tell.

    The instructions may differ: they depend on the imports of the module.
    """
    module = compile(_module(definition), function.__code__.co_filename, "exec")
    code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
    return _outline(code) == _outline(function.__code__)


def compiled(
    definition: ast.FunctionDef, original: FunctionType, names: Mapping[str, object]
) -> FunctionType:
    """Compiles a definition into a function that has the globals and defaults of the original.

    Args:
        definition: The function's syntax tree.
        original: The original.
        names: What else the function refers to. The module of the original stays as it is.
    """
    (outer,) = ast.parse(f"def make({', '.join(names)}): return {definition.name}").body
    assert isinstance(outer, ast.FunctionDef)
    outer.body.insert(0, definition)
    code = compile(_module(outer), original.__code__.co_filename, "exec")
    made: dict[str, Any] = {}
    exec(code, original.__globals__, made)
    function: FunctionType = made["make"](**names)
    function.__defaults__, function.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    functools.update_wrapper(function, original)
    del function.__dict__["__wrapped__"]
    return function


def wrapped_like(function: FunctionType, wrapper: Any) -> Function:
    """Wraps a function in copies of the decorators of another.

    Raises:
        UnknownFormError: If a decorator does not hold the function that it wraps in a closure.
    """
    inner = getattr(wrapper, "__wrapped__", None)
    if inner is None:
        return function
    cells = (wrapper.__closure__ or ()) if isinstance(wrapper, FunctionType) else ()
    if not any(cell.cell_contents is inner for cell in cells):
        raise UnknownFormError("one of its decorators is unknown")
    inside = wrapped_like(function, inner)
    copy = FunctionType(
        wrapper.__code__,
        wrapper.__globals__,
        argdefs=wrapper.__defaults__,
        closure=tuple(CellType(inside) if c.cell_contents is inner else c for c in cells),
    )
    copy.__kwdefaults__ = wrapper.__kwdefaults__
    functools.update_wrapper(copy, inside)
    return copy


def _module(statement: ast.stmt) -> ast.Module:
    return ast.fix_missing_locations(ast.Module([statement], type_ignores=[]))


def _outline(code: CodeType) -> object:
    """Returns what a code refers to, and its lines but the first."""
    constants = [_outline(one) if isinstance(one, CodeType) else one for one in code.co_consts]
    lines = {line for _, _, line in code.co_lines()} - {code.co_firstlineno}
    return code.co_names, code.co_varnames, code.co_freevars, constants, lines
