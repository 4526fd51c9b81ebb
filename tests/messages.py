"""The messages of all errors, as the sources have them: what docs/errors.md lists."""

import ast
import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CHECKS = {
    "TORCH_CHECK": "RuntimeError",
    "TORCH_CHECK_VALUE": "ValueError",
    "TORCH_CHECK_TYPE": "TypeError",
    "TORCH_CHECK_INDEX": "IndexError",
    "TORCH_CHECK_NOT_IMPLEMENTED": "NotImplementedError",
}
# Not AttributeError, which is Python's own protocol, and not the private UnknownFormError.
EXCEPTIONS = {*CHECKS.values(), "ImportError"}
VARYING = "…"  # Whatever is not a literal.


class Message(NamedTuple):
    """A message, without the function that it begins with, and the exception that carries it."""

    text: str
    exception: str


def messages() -> dict[Message, set[str]]:
    """Returns the messages of the library, each with the files it is in."""
    found: dict[Message, set[str]] = {}
    for folder, suffixes, parse in (
        ("csrc", (".cpp", ".h", ".cu"), messages_of_cpp),
        ("python/torch_rope", (".py",), messages_of_python),
    ):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and "include" not in path.parts:  # a copy of an installation
                for message in parse(path.read_text()):
                    found.setdefault(message, set()).add(str(path.relative_to(ROOT)))
    return found


def without_function(text: str) -> str:
    """Removes the function that a message begins with."""
    return re.sub(rf"^[\w:.{VARYING}]*\(\): ", "", text)


def combined(parts: Iterable[list[str]]) -> Iterator[str]:
    """Joins parts that each have alternatives, in every combination."""
    for texts in product(*parts):
        yield without_function(re.sub(f"{VARYING}+", VARYING, "".join(texts)))


# ---- C++ ----

TOKEN = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])')|//[^\n]*|/\*.*?\*/|(?P<text>.)""", re.DOTALL
)
STRINGS = r'(?:"(?:\\.|[^"\\])*"\s*)+'


def split(source: str, separators: str = ",") -> list[str]:
    """Splits at separators outside parentheses, up to the parenthesis that closes all."""
    parts, depth = [""], 0
    for token in TOKEN.finditer(source):
        text = token["text"] or ""
        if text in (")", "]", "}") and depth == 0:
            break
        depth += (text in ("(", "[", "{")) - (text in (")", "]", "}"))
        if text and text in separators and depth == 0:
            parts.append("")
        else:
            parts[-1] += token["string"] or text
    return [part.strip() for part in parts]


class Cpp:
    """The text of expressions of a C++ file."""

    def __init__(self, source: str) -> None:
        """Collects constants and the prefixes that several checks share."""
        self.values: dict[str, list[str]] = {}
        for name, strings in re.findall(
            rf"constexpr const char\* (\w+)(?:<[^;=]*>)? =\s*({STRINGS});", source
        ):
            self.values.setdefault(name, []).append(self.literal(strings))
        self.prefixes = dict(re.findall(r"const std::string (\w+) = (expected\([^;]*\));", source))

    @staticmethod
    def literal(strings: str) -> str:
        """Returns the text of adjacent string literals."""
        return "".join(re.findall(r'"((?:\\.|[^"\\])*)"', strings)).replace('\\"', '"')

    def of(self, expression: str) -> list[str]:
        """Returns the alternatives for the text of an expression."""
        expression = self.prefixes.get(expression, expression)
        if re.fullmatch(STRINGS, expression):
            return [self.literal(expression)]
        if expression in self.values:
            return self.values[expression]
        if expression == "rule":  # The parameter of python.cpp for kRule<...>.
            return self.values["kRule"]
        if re.match(r"(rope::)?expected\(", expression):
            argument = split(expression.partition("(")[2])[1]
            return [f"expected {text} to " for text in self.of(argument)]
        condition, *branches = split(expression, "?")
        if branches and "::" not in condition:
            branches = split("?".join(branches).replace("::", "__"), ":")
            texts = [text for branch in branches for text in self.of(branch.split("?")[-1].strip())]
            if all(text.strip(VARYING) for text in texts):
                return texts
        return [VARYING]


def messages_of_cpp(source: str) -> Iterator[Message]:
    """Finds the messages of PyTorch's checks."""
    texts = Cpp(source)
    for check in re.finditer(r"\b(TORCH_CHECK\w*)\(", source):
        if check[1] in CHECKS:
            _, *arguments = split(source[check.end() :])
            for text in combined(map(texts.of, arguments)):
                yield Message(text, CHECKS[check[1]])


# ---- Python ----


def messages_of_python(source: str) -> Iterator[Message]:
    """Finds the messages of the built-in exceptions that are made."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for call in ast.walk(tree):
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in EXCEPTIONS
            and call.args
        ):
            around = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
            innermost = max(around, key=lambda function: function.lineno, default=tree)
            for text in combined([Python(innermost, call.lineno).of(call.args[0])]):
                yield Message(text, call.func.id)


def assign(statements: list[ast.stmt], line: int, values: dict[str, list[ast.expr]]) -> None:
    """Updates what names may hold at a line by the statements before it."""
    for statement in statements:
        if statement.lineno >= line:
            return
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    values[target.id] = [statement.value]
        elif isinstance(statement, ast.If):
            branches = [statement.body, statement.orelse]
            around = [b for b in branches if b and b[0].lineno <= line <= (b[-1].end_lineno or 0)]
            ends = (ast.Raise, ast.Return, ast.Continue, ast.Break)
            outcomes = []
            for branch in around or [b for b in branches if not (b and isinstance(b[-1], ends))]:
                outcomes.append(dict(values))
                assign(branch, line, outcomes[-1])
            for name in {name for outcome in outcomes for name in outcome}:
                held = [value for outcome in outcomes for value in outcome.get(name, [])]
                values[name] = list(dict.fromkeys(held))
        else:
            for inner in ("body", "handlers", "orelse", "finalbody"):
                assign(getattr(statement, inner, []), line, values)


class Python:
    """The text of expressions at a line of a Python function."""

    def __init__(self, function: ast.AST, line: int) -> None:
        """Collects what the names of the function may hold at the line."""
        self.values: dict[str, list[ast.expr]] = {}
        assign(getattr(function, "body", []), line, self.values)

    def of(self, node: ast.expr) -> list[str]:
        """Returns the alternatives for the text of an expression."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=values):
                return ["".join(texts) for texts in product(*map(self.of, values))]
            case ast.FormattedValue(value=value):
                return self.of(value)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [first + second for first, second in product(self.of(left), self.of(right))]
            case ast.IfExp(body=body, orelse=orelse):
                texts = [*self.of(body), *self.of(orelse)]
                return texts if all(text.strip(VARYING) for text in texts) else [VARYING]
            case ast.Name(id=name) if name in self.values:
                values = self.values.pop(name)  # One may be made from another of that name.
                return [text for value in values for text in self.of(value)]
            case ast.Call(func=ast.Name(id="message"), args=[_, argument, rule, got]):
                return self.of_message(argument, rule, got)
            case ast.Call(func=ast.Attribute(attr="error"), args=[argument, rule, got]):
                return self.of_message(argument, rule, got)
        return [VARYING]

    def of_message(self, *parts: ast.expr) -> list[str]:
        """Returns the alternatives for the form of all messages."""
        return [
            f"expected {argument} to {rule}, but got {got}"
            for argument, rule, got in product(*map(self.of, parts))
        ]
