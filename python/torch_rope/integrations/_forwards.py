"""Rewrites the forwards of attention classes so that norms and rotations run together.

NOTE [ The rewritten forward ]
An attention class normalizes q and k and rotates them, in this order or in the other, with nothing
in between but views:

    query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    ...
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

Its forward is compiled again from its syntax tree, with both calls deferred (see ``_deferred.py``):

    query_states = norm(self.q_norm, self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    ...
    query_states, key_states = rotate(apply_rotary_pos_emb, query_states, key_states, cos, sin)

A deferred tensor is only ever in a variable of the forward. Before a statement that uses the
variable for anything but a view of itself, its rotation or its norm, and before one that may write
to a tensor in place, ``query_states = settle(query_states)`` is inserted. What is not fused thus
happens in the original order, a norm or a rotation may be conditional, and a variable may hold a
deferred or an ordinary tensor.

Any call may write to a tensor, except those of norms, of rotations, of a few builtins, and of what
is named like a method of tensors that is not in place. Layers and PyTorch's functions only write to
their arguments, if at all: they count if an argument may share memory with the input of a deferred
call. The result of a layer counts as new memory.

The tree is walked twice: first to find the norms that reach a rotation and the rotations that reach
a norm, then to rewrite those.
"""

import ast
import functools
import inspect
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, TypeGuard

import torch
import torch.nn.functional
from torch import Tensor, nn

from torch_rope.integrations import _deferred
from torch_rope.integrations._deferred import fuses_norms
from torch_rope.integrations._norms import Function, UnknownFormError, recognize
from torch_rope.integrations._source import compiled, definition_of, is_source_of, wrapped_like

# The functions of _deferred.py, by their names in a rewritten forward.
_HELPERS = {
    f"_rope_{name}": getattr(_deferred, name)
    for name in ("norm", "rotate", "rotate_before_norms", "settle")
}

# The methods and attributes of deferred norms.
_VIEWS = ("view", "reshape", "transpose", "unsqueeze")
_PROPERTIES = ("shape", "dtype", "device")

# Builtin functions that call nothing that could write to a tensor.
_BUILTINS = ("bool", "float", "getattr", "hasattr", "int", "isinstance", "len", "range", "str")

# The keywords of rotation functions; one with others is left to the original.
_KEYWORDS = ("cos", "sin", "position_ids", "unsqueeze_dim")


def fused_forward(attention: type[nn.Module], functions: Iterable[str]) -> Function | None:
    """Returns a forward for a class in which norms and rotations run together.

    Args:
        attention: A class that defines a forward.
        functions: The names of rotation functions.

    Returns:
        The forward, or None if no norm is next to a rotation.

    Raises:
        UnknownFormError: If one is, but the forward cannot be rewritten.
    """
    forward = vars(attention)["forward"]
    original = inspect.unwrap(forward)
    if not isinstance(original, FunctionType):
        return None
    used = original.__code__.co_names
    rotations = {
        name: _why_no_norms(name, original.__globals__[name])
        for name in functions
        if name in used and callable(original.__globals__.get(name))
    }
    if not rotations:
        return None
    norms = _norms_of(attention, used)
    if not norms and not any(map(_is_norm, used)):
        return None
    definition = definition_of(original)
    if original.__code__.co_freevars or not is_source_of(definition, original):
        raise UnknownFormError("its source is not what runs")
    known = _Known(attention, original.__globals__, norms, rotations)
    found = _Walk(definition, known)
    if not found.fused:
        if found.reasons:
            raise UnknownFormError(found.reasons[0])
        return None
    definition = _Walk(definition_of(original), known, found.fused).definition
    return wrapped_like(compiled(definition, original, _HELPERS), forward)


def _why_no_norms(name: str, function: Function) -> str | None:
    """Returns why a function takes no deferred norms."""
    if fuses_norms(function):
        return None
    return f"{name} {'reorders pairs' if hasattr(function, 'fuses_norms') else 'is left alone'}"


# ---- The class ----


def _norms_of(attention: type[nn.Module], used: Container[str]) -> dict[str, str | None]:
    """Returns which of some attributes a class sets to norms, with the reason if one is unknown."""
    found: dict[str, list[type[nn.Module]]] = {}
    for base in attention.__mro__:
        init = vars(base).get("__init__")
        if not (issubclass(base, nn.Module) and base is not nn.Module and inspect.isfunction(init)):
            continue
        init = inspect.unwrap(init)
        try:
            definition = definition_of(init)
        except UnknownFormError:
            continue
        for node in ast.walk(definition):
            if not isinstance(node, ast.Assign):
                continue
            target = node.targets[0]
            if isinstance(target, ast.Attribute) and target.attr in used:
                kinds = _classes(node.value, init.__globals__)
                found.setdefault(target.attr, []).extend(kinds)
    norms = {name: _why_not(kinds) for name, kinds in found.items() if kinds}
    norms |= {
        name: f"the class of self.{name} is not known"
        for name, kinds in found.items()
        if not kinds and _is_norm(name)
    }
    return {name: why for name, why in norms.items() if why != _NO_NORM}


def _classes(value: ast.expr, names: dict[str, Any]) -> Iterator[type[nn.Module]]:
    """Resolves ``Norm(...)``, ``Norm(...).to(...)`` and ``Norm(...) if which else Other(...)``."""
    if isinstance(value, ast.IfExp):
        yield from _classes(value.body, names)
        yield from _classes(value.orelse, names)
    elif isinstance(value, ast.Call):
        if isinstance(value.func, ast.Attribute) and isinstance(value.func.value, ast.Call):
            yield from _classes(value.func.value, names)
            return
        kind = _resolved(value.func, names)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            yield kind


def _resolved(node: ast.expr, names: dict[str, Any]) -> Any:
    """Returns what a dotted name refers to, or None."""
    path = ast.unparse(node).split(".")
    return functools.reduce(lambda x, name: getattr(x, name, None), path[1:], names.get(path[0]))


# Why a class is not recognized that is not named like a norm either.
_NO_NORM = "it is no norm"


def _is_norm(name: str) -> bool:
    return "norm" in name.lower()


def _why_not(kinds: Iterable[type[nn.Module]]) -> str | None:
    """Returns why none of these classes is recognized."""
    why = _NO_NORM
    for kind in kinds:
        try:
            recognize(kind)
            return None
        except UnknownFormError as error:
            if _is_norm(kind.__name__):
                why = str(error)
    return why


# ---- The forward ----

_Site = tuple[int, int, int | None, int | None]

# Statements without others in them.
_SIMPLE = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Raise, ast.Assert)

# Code that may read a variable later than at its own place.
_NESTED = (ast.Lambda, ast.FunctionDef, ast.GeneratorExp)


@dataclass(frozen=True)
class _Fact:
    """What is known of a value that comes from a norm or a rotation.

    Attributes:
        sites: The place of the call, or of several in different branches.
        name: What is called.
        is_norm: Whether it is a norm.
        obstacle: What keeps it from being fused. Without an obstacle, the value is deferred.
    """

    sites: frozenset[_Site]
    name: str
    is_norm: bool
    obstacle: str | None = None

    @property
    def is_deferred(self) -> bool:
        """Whether the call may still be fused."""
        return self.obstacle is None


def _never(fact: _Fact) -> bool:
    return False


def _if_norm(fact: _Fact) -> bool:
    return fact.is_norm


@dataclass(frozen=True)
class _Known:
    """What is known of the names in a forward.

    Attributes:
        attention: The class.
        globals: The global variables.
        norms: The attributes with norms, and why one is unknown.
        rotations: The rotation functions, and why one takes no norms.
    """

    attention: type[nn.Module]
    globals: dict[str, Any]
    norms: dict[str, str | None]
    rotations: dict[str, str | None]


class _Walk:
    """Walks through a forward. See NOTE [ The rewritten forward ].

    Attributes:
        definition: The forward, rewritten if there is a choice.
        fused: The calls of norms and rotations that can be fused.
        reasons: Why calls next to each other cannot.
    """

    def __init__(
        self,
        definition: ast.FunctionDef,
        known: _Known,
        choice: set[_Site] | None = None,
    ) -> None:
        """Walks through a forward.

        Args:
            definition: The forward.
            known: What is known of its names.
            choice: The calls to fuse; None to find them and rewrite nothing.
        """
        self.definition = definition
        self.fused: set[_Site] = set()
        self.reasons: list[str] = []
        self._known = known
        self._choice = choice
        self._facts: dict[str, _Fact] = {}  # Of the variables, before the current statement.
        self._needed: set[str] = set()  # The variables that it needs as tensors.
        # Whose memory a variable may share: other variables, or statements that made it.
        self._shares: dict[str, set[str]] = {}
        self._locals = _names(definition, ast.Store) | {
            node.arg for node in ast.walk(definition.args) if isinstance(node, ast.arg)
        }
        arguments = [*definition.args.posonlyargs, *definition.args.args]
        self._self = arguments[0].arg if arguments else ""
        nested = [n for n in ast.walk(definition) if isinstance(n, _NESTED) and n is not definition]
        self._read_later = {name for node in nested for name in _names(node, ast.Load)}
        definition.body = self._block(definition.body)

    # Statements

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        return [new for statement in statements for new in self._statement(statement)]

    def _statement(self, statement: ast.stmt) -> list[ast.stmt]:
        """Returns what a statement becomes, after those that compute what it needs."""
        if isinstance(statement, ast.If):
            if self._may_write(statement.test):
                self._needed |= self._facts.keys()
            self._share(statement.test)
            statement.test, _ = self._used(statement.test, statement)
            settled = self._settle(statement)
            for name in _names(statement.test, ast.Store):
                self._facts.pop(name, None)
            before = dict(self._facts), dict(self._shares)
            statement.body = self._block(statement.body)
            after = self._facts, self._shares
            self._facts, self._shares = before
            statement.orelse = self._block(statement.orelse)
            self._merge(*after)
            return [*settled, statement]
        if isinstance(statement, ast.AnnAssign):  # Without a value, it does nothing.
            return [statement]
        if self._may_write(statement):
            self._needed |= self._facts.keys()
        self._share(statement)
        facts: dict[str, _Fact] = {}
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            facts = self._assign(statement, statement.targets[0])
        elif isinstance(statement, _SIMPLE):
            facts = self._facts_of(_names(statement, ast.Store), self._children(statement))
        else:  # A loop and the like, in which nothing is deferred.
            self._needed |= _names(statement, ast.Load)
        settled = self._settle(statement)
        if not isinstance(statement, ast.AugAssign):
            for name in _names(statement, ast.Store, ast.Del):
                self._facts.pop(name, None)
        self._facts |= facts
        return [*settled, statement]

    def _assign(self, statement: ast.Assign, target: ast.expr) -> dict[str, _Fact]:
        """Handles an assignment to one target; returns the facts of its variables."""
        value = statement.value
        if isinstance(target, ast.Name):
            own = (None, target.id)  # Another variable would share memory with a view.
            statement.value, fact = self._used(
                value, statement, lambda fact: _root(value) in own, target.id
            )
            return self._facts_of([target.id], fact)
        self._children(target)
        names = [name.id for name in getattr(target, "elts", ()) if isinstance(name, ast.Name)]
        if not self._is_rotation(value):
            statement.value, fact = self._used(value, statement)
            return self._facts_of(names, fact)
        assert isinstance(value, ast.Call)
        statement.value, fact = self._rotation(value)
        if fact is None or len(names) != 2:
            return {}
        statement.value = self._deferred("rotate_before_norms", value)
        return self._facts_of(names, fact)

    def _facts_of(self, names: Collection[str], fact: _Fact | None) -> dict[str, _Fact]:
        if fact and fact.is_deferred and self._read_later.intersection(names):
            fact = self._kept_from(fact, f"a function that reads {' or '.join(names)}")
        return dict.fromkeys(names, fact) if fact else {}

    def _kept_from(self, fact: _Fact, obstacle: str) -> _Fact:
        """Returns the fact of a value that is not in a variable, with an obstacle."""
        if self._choice is not None:  # It was deferred because of another use.
            raise UnknownFormError(f"{obstacle} needs the result of {fact.name}")
        return replace(fact, obstacle=obstacle)

    def _settle(self, statement: ast.stmt) -> list[ast.stmt]:
        """Returns statements that compute the deferred variables that this one needs."""
        deferred = {name: fact for name, fact in self._facts.items() if fact.is_deferred}
        # A rotation computes both its results.
        needed = [deferred[name].sites for name in deferred.keys() & self._needed]
        sites = frozenset[_Site]().union(*needed)
        names = [name for name, fact in deferred.items() if fact.sites & sites]
        for name in names:
            self._facts[name] = replace(deferred[name], obstacle=_text(statement))
        self._needed = set()
        if self._choice is None:
            return []
        settled = ast.parse("".join(f"{name} = _rope_settle({name})\n" for name in names)).body
        for node in (node for new in settled for node in ast.walk(new)):
            ast.copy_location(node, statement)
        return settled

    def _merge(self, others: dict[str, _Fact], shares: dict[str, set[str]]) -> None:
        """Adds what is known at the end of another branch."""
        for name in shares.keys() | self._shares.keys():
            self._shares[name] = self._shares.get(name, {name}) | shares.get(name, {name})
        for name, other in others.items():
            fact = self._facts.setdefault(name, other)
            if not fact.is_deferred:
                self._facts[name] = other
            elif other.is_deferred and other.is_norm != fact.is_norm:
                raise UnknownFormError(f"{name} is either normalized or rotated")
            elif other.is_deferred:
                self._facts[name] = replace(fact, sites=fact.sites | other.sites)

    # Memory

    def _share(self, statement: ast.stmt | ast.expr) -> None:
        """Records whose memory the variables share that a statement or a condition sets."""
        value = statement.value if isinstance(statement, ast.Assign) else statement
        shared = self._shared(value) | {f"line {statement.lineno}"}
        for name in _names(statement, ast.Store):
            self._shares[name] = shared
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
                for name in _names(node, ast.Load):
                    self._shares[name] = self._shares.get(name, {name}) | shared

    def _shared(self, node: ast.AST) -> set[str]:
        """Returns whose memory a value may share."""
        if isinstance(node, ast.Name):
            return self._shares.get(node.id, {node.id})
        if isinstance(node, ast.Attribute) and node.attr in _PROPERTIES:
            return set()
        if name := self._attribute(node):
            return {f"self.{name}"} | self._shares.get(self._self, set())
        if isinstance(node, ast.Call):
            if self._is_layer(node.func):
                return set()
            if self._is_method(node.func):
                return self._shared(node.func.value)
        if isinstance(node, ast.Subscript):
            return self._shared(node.value)
        return set[str]().union(*map(self._shared, ast.iter_child_nodes(node)))

    def _may_write(self, node: ast.AST, shared: set[str] | None = None) -> bool:
        """Returns whether code may write to memory, by default to that of what is deferred."""
        if shared is None:
            deferred = [name for name, fact in self._facts.items() if fact.is_deferred]
            shared = set[str]().union(*(self._shares.get(name, {name}) for name in deferred))
        calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
        return _writes_in_place(node) or any(self._call_may_write(call, shared) for call in calls)

    def _call_may_write(self, call: ast.Call, shared: set[str]) -> bool:
        function = call.func
        if self._is_rotation(call) or self._is_known_norm(function):
            return False
        if self._is_layer(function) or self._is_torch(function):
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            return any(self._shared(argument) & shared for argument in given)
        if isinstance(function, ast.Name):
            names = self._locals | self._known.globals.keys()
            return function.id not in _BUILTINS or function.id in names
        return not self._is_method(function)

    def _attribute(self, node: ast.AST) -> str:
        """Returns the attribute in ``self.attribute``, or nothing."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return node.attr if node.value.id == self._self else ""
        return ""

    def _is_layer(self, function: ast.expr) -> bool:
        """Returns whether a called function is a layer, which has no attribute in the class."""
        name = self._attribute(function)
        is_set = bool(name) and not hasattr(self._known.attention, name)
        return is_set and not self._is_known_norm(function)

    def _is_known_norm(self, function: ast.expr) -> bool:
        """Returns whether a called function is a norm of a recognized class."""
        name = self._attribute(function)
        return name in self._known.norms and self._known.norms[name] is None

    def _is_method(self, function: ast.expr) -> TypeGuard[ast.Attribute]:
        """Returns whether a called function is a method of tensors that is not in place."""
        if not isinstance(function, ast.Attribute) or self._attribute(function):
            return False
        name = function.attr
        return hasattr(Tensor, name) and name[-1] != "_" and not self._is_torch(function)

    def _is_torch(self, function: ast.expr) -> bool:
        """Returns whether a called function is one of PyTorch's."""
        if not isinstance(function, ast.Attribute) or _names(function, ast.Load) & self._locals:
            return False
        owner = _resolved(function.value, self._known.globals)
        return owner is torch or owner is torch.nn.functional

    # Expressions

    def _used(
        self,
        node: ast.expr,
        user: ast.AST,
        keeps: Callable[[_Fact], bool] = _never,
        target: str | None = None,
    ) -> tuple[ast.expr, _Fact | None]:
        """Handles an expression that something uses.

        Args:
            node: The expression.
            user: What uses it.
            keeps: Whether a deferred value with this fact may stay deferred.
            target: The variable to which it is assigned as it is.

        Returns:
            What the expression becomes, and the fact of its value.
        """
        root = _root(node)
        new, fact = self._expression(node, target)
        if fact and fact.is_deferred and not keeps(fact):
            if root is None:
                return new, self._kept_from(fact, _text(user))
            self._needed.add(root)
            fact = replace(fact, obstacle=_text(user))
        return new, fact

    def _children(self, node: ast.AST) -> _Fact | None:
        """Handles the parts of a node that needs their values; returns the fact of a norm."""
        facts: list[_Fact | None] = []
        for name, value in ast.iter_fields(node):
            parts = value if isinstance(value, list) else [value]
            for index, part in enumerate(parts):
                if isinstance(part, ast.expr):
                    parts[index], fact = self._used(part, node)
                    facts.append(fact)
                elif isinstance(part, ast.AST):
                    facts.append(self._children(part))
            if not isinstance(value, list):
                setattr(node, name, parts[0])
        return next((fact for fact in facts if fact and fact.is_norm), None)

    def _expression(self, node: ast.expr, target: str | None) -> tuple[ast.expr, _Fact | None]:
        if isinstance(node, ast.Name):
            return node, self._facts.get(node.id) if isinstance(node.ctx, ast.Load) else None
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            fact = self._facts.get(node.value.id)
            if node.attr in _PROPERTIES and fact and fact.is_norm:
                return node, None
        if isinstance(node, ast.Call):
            if self._attribute(node.func) in self._known.norms:
                return self._norm(node, target)
            if self._is_rotation(node):
                return self._rotation(node)[0], None
            if isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS:
                return self._view(node, node.func)
        fact = self._children(node)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if self._is_layer(node.func):
                return node, None  # It computes a new value.
            if _is_norm(name) and (isinstance(node.func, ast.Name) or self._is_torch(node.func)):
                why = f"{name} is a function, not a layer"
                return node, _Fact(frozenset({_site(node)}), name, True, why)
        return node, fact

    def _view(self, node: ast.Call, method: ast.Attribute) -> tuple[ast.expr, _Fact | None]:
        shared = self._shared(method.value)
        is_plain = not node.keywords and not any(self._may_write(a, shared) for a in node.args)
        method.value, fact = self._used(method.value, node, lambda fact: fact.is_norm and is_plain)
        node.args = [self._used(argument, node)[0] for argument in node.args]
        for keyword in node.keywords:
            self._children(keyword)
        return node, fact

    def _norm(self, node: ast.Call, target: str | None) -> tuple[ast.expr, _Fact | None]:
        site, name = _site(node), ast.unparse(node.func)
        why = self._known.norms[self._attribute(node.func)]
        if len(node.args) != 1 or node.keywords:
            self._children(node)
            return node, _Fact(frozenset({site}), name, True, why or _text(node))
        argument = node.args[0]
        is_own = isinstance(argument, ast.Name) and argument.id == target and why is None
        node.args[0], fact = self._used(argument, node, lambda fact: not fact.is_norm and is_own)
        if fact and not fact.is_norm:
            if fact.is_deferred:
                self.fused |= {site, *fact.sites}
                return self._deferred("norm", node), fact
            self.reasons.append(_reason(fact, name, why))
            return node, None
        if why is not None or self._choice is None:
            return node, _Fact(frozenset({site}), name, True, why)
        if site not in self._choice:
            return node, None
        return self._deferred("norm", node), _Fact(frozenset({site}), name, True)

    def _is_rotation(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return node.func.id in self._known.rotations
        return False

    def _rotation(self, node: ast.Call) -> tuple[ast.expr, _Fact | None]:
        """Handles the call of a rotation; returns the fact of its results, unless it has norms."""
        site, name = _site(node), ast.unparse(node.func)
        why = self._known.rotations[name]
        if any(keyword.arg not in _KEYWORDS for keyword in node.keywords):
            why = f"unknown keywords in {_text(node)}"
        shared = self._shared(node)
        writing = [part for part in (*node.args, *node.keywords) if self._may_write(part, shared)]
        normed: set[_Site] = set()
        for index, argument in enumerate(node.args):
            # A norm in the call comes before what the other arguments write.
            fuses = why is None and all(part is argument for part in writing)
            keeps = _if_norm if fuses else _never
            node.args[index], fact = self._used(argument, node, keeps)
            if fact and fact.is_deferred:
                normed |= fact.sites
            elif fact and fact.is_norm:
                self.reasons.append(_reason(fact, name, why))
        for keyword in node.keywords:
            self._children(keyword)
        if normed:
            self.fused |= {*normed, site}
            return self._deferred("rotate", node), None
        if self._choice is not None and site not in self._choice:
            return node, None
        return node, _Fact(frozenset({site}), name, False, why)

    def _deferred(self, helper: str, node: ast.Call) -> ast.expr:
        """Returns the call of a helper with a function and its arguments, if there is a choice."""
        if self._choice is None:
            return node
        function = ast.copy_location(ast.Name(f"_rope_{helper}", ast.Load()), node)
        call = ast.Call(function, [node.func, *node.args], node.keywords)
        return ast.copy_location(call, node)


def _reason(fact: _Fact, name: str, why: str | None) -> str:
    """Returns why a norm and a rotation, one after the other, are not fused."""
    obstacle = fact.obstacle or ""
    if not obstacle.startswith("`"):
        return obstacle
    return why or f"{obstacle} is between {fact.name} and {name}"


def _text(node: ast.AST) -> str:
    """Returns the first line of a node, as code."""
    return f"`{ast.unparse(node).splitlines()[0]}`"


def _site(node: ast.Call) -> _Site:
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _root(node: ast.expr) -> str | None:
    """Returns the variable that an expression is or is a view of."""
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr not in _VIEWS:
            return None
        node = node.func.value
    return node.id if isinstance(node, ast.Name) else None


def _names(node: ast.AST, *contexts: type[ast.expr_context]) -> set[str]:
    """Returns the variables that a node uses in one of these ways."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, contexts)}


def _writes_in_place(node: ast.AST) -> bool:
    """Returns whether a node may change a tensor or PyTorch's state, whatever it calls."""
    return any(
        isinstance(node, ast.AugAssign)
        or (isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        or (isinstance(node, ast.keyword) and node.arg in ("out", "inplace"))
        or (isinstance(node, ast.Attribute) and node.attr.endswith("_") and node.attr[-2:] != "__")
        for node in ast.walk(node)
    )
