"""The code in README.md and in the pages of docs/ works as it stands.

The Python blocks of a page, in order, are one program; it can rely on nothing else, and the files
that it names are there afterwards. The C++ blocks of all pages are one program that is compiled and
linked. docs/reference names everything public.
"""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch_rope
from pages import DOCS, ROOT, Block, blocks, pages, program_of
from test_cpp import run

# Python and C++ run; the others are shown. sh blocks of the README are run by .ci/run.
LANGUAGES = {"python", "cpp", "cmake", "sh", "bash", "console", "text", "diff", "json", "toml"}
# Directives of the site whose content is no code.
DIRECTIVES = re.compile(r"\{(toctree|image|figure|note|tip|warning)\}.*")
REFERENCE = re.compile(r"(\.\. (module|auto\w+|doxygen\w+):: .*\n|   :[\w-]+:.*\n)+")


def programs() -> list[str]:
    """Returns the pages with Python blocks."""
    return [page for page in pages() if program_of(page)]


def test_every_block_is_in_a_language_that_is_run_or_never_is() -> None:
    others = [
        f"{page}:{block.line} {block.language!r}"
        for page in pages()
        for block in blocks(page)
        if block.language not in LANGUAGES
        and not DIRECTIVES.fullmatch(block.language)
        and not (block.language == "{eval-rst}" and REFERENCE.fullmatch(block.text))
    ]
    assert others == []


def test_no_code_is_an_indented_block() -> None:
    indented = re.compile(r"^\n {4,}(?:import|from|def|class|#include|torch_rope|rope::)\b", re.M)
    for page in pages():
        lines = (ROOT / page).read_text().splitlines()
        for block in blocks(page):
            end = block.line + block.text.count("\n")
            lines[block.line - 1 : end - 1] = ["..."] * (end - block.line)
        assert not indented.search("\n".join(lines)), page


# ---- Links of the README; docs/build.sh checks those of the pages ----

LINK = re.compile(r"\[[^]]+\]\((?!https?:)([^)#]+)[^)]*\)")


def test_the_files_that_the_readme_links_to_exist() -> None:
    linked = LINK.findall((ROOT / "README.md").read_text())
    assert len(linked) > 10
    assert [path for path in linked if not (ROOT / path).is_file()] == []


def test_the_readme_on_a_package_index_has_no_links_to_files() -> None:
    distribution = importlib.metadata.distribution("torch-rope")
    if '"editable": true' in (distribution.read_text("direct_url.json") or ""):
        pytest.skip("an editable install has the README of the day it was made")
    readme = distribution.metadata["Description"]
    assert "import torch_rope" in readme
    assert LINK.findall(readme) == []


# ---- Python ----


@pytest.fixture(scope="module")
def server() -> Iterator["subprocess.Popen[str]"]:
    """A process that runs programs, without importing PyTorch again for each."""
    command = [sys.executable, ROOT / "tests" / "pages.py"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


def required() -> set[str]:
    """Returns the packages that the tests may count on."""
    files = [ROOT / "tests" / "requirements.txt", ROOT / "examples" / "requirements.txt"]
    text = "\n".join(file.read_text() for file in files)
    return {*re.findall(r"^([\w-]+)", text, re.MULTILINE), "torch", "torch_rope"}


def imported(program: str) -> set[str]:
    """Returns the packages that a program imports."""
    found = set()
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("page", programs())
def test_the_python_blocks_of_a_page_run(
    page: str, server: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    program = program_of(page)
    assert imported(program) <= required()
    for package in imported(program):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, which tests/requirements.txt installs")
    file = tmp_path / f"page_{Path(page).stem}.py"  # A file: torch.jit.script reads its source.
    file.write_text(program)
    assert server.stdin is not None and server.stdout is not None  # noqa: PT018
    print(file, file=server.stdin, flush=True)
    status = server.stdout.readline()
    if status != "0\n":
        output = (tmp_path / "output").read_text()
        pytest.fail(f"{page}, exit status {status}{output}", pytrace=False)
    for name in re.findall(r'"([\w-]+\.(?:onnx|pt|pt2|so))"', program):
        assert (tmp_path / name).stat().st_size > 0


# ---- C++ ----

GIVEN = ("x", "q", "k", "weight", "q_weight", "k_weight", "positions", "inv_freq", "cos", "sin")
AT_FILE_SCOPE = re.compile(
    r"^(?:(?:struct|class|template|namespace)\b"
    r"|(?!if|for|while)[\w:<>&*, ]+\([^;{}]*\) (?:const )?\{$)",
    re.MULTILINE,
)
CMAKE = """
cmake_minimum_required(VERSION 3.26)
project(pages LANGUAGES CXX)
find_package(rope REQUIRED)
add_executable(pages pages.cpp)
target_link_libraries(pages PRIVATE rope::rope)
"""


def translated(page: str, block: Block, number: int) -> str:
    """Returns a C++ block as a part of the program: a function, unless it has functions itself."""
    code = re.sub(r"^#include .*$", "", block.text, flags=re.MULTILINE)
    code = f'#line {block.line} "{page}"\n{code}'
    if not AT_FILE_SCOPE.search(code):
        given = ", ".join(f"at::Tensor {name}" for name in GIVEN)
        code = f"void block_{number}({given}) {{ {{\n{code}}} }}\n"
    return f"namespace page_{re.sub(r'[^a-z]+', '_', page)} {{\n{code}}}\n"


def test_the_cpp_blocks_of_all_pages_compile_and_link(compiler: None, tmp_path: Path) -> None:
    found = [(page, block) for page in pages() for block in blocks(page) if block.language == "cpp"]
    assert found
    includes = {
        line
        for _, block in found
        for line in re.findall(r"^#include .*$", block.text, re.MULTILINE)
    }
    parts = [translated(page, block, number) for number, (page, block) in enumerate(found)]
    source = [*sorted(includes), *parts, '#line 1 "pages.cpp"', "int main() {}"]
    (tmp_path / "pages.cpp").write_text("\n".join(source) + "\n")
    (tmp_path / "CMakeLists.txt").write_text(CMAKE)
    prefix = f"-DCMAKE_PREFIX_PATH={torch_rope.cmake_prefix_path}"
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", prefix)
    run("cmake", "--build", tmp_path / "build")


# ---- The reference ----

PYTHON_ENTRY = re.compile(
    r"^\.\. (module|auto(?:function|class|data)):: ([\w.]+)(?:\(\))?$", re.MULTILINE
)
CPP_ENTRY = re.compile(r"^\.\. doxygen(?:function|class|struct):: rope::(\w+)$", re.MULTILINE)


def entries_of_python() -> set[str]:
    """Returns the full names of what the pages of docs/reference list."""
    found, module = set(), ""
    for page in sorted((DOCS / "reference").glob("*.md")):
        module = ""
        for kind, name in PYTHON_ENTRY.findall(page.read_text()):
            if kind == "module":
                module = f"{name}."
            else:
                found.add(module + name)
    return found


def public_names() -> set[str]:
    """Returns the full names of what the package and its integrations define for users."""
    found = {f"torch_rope.{name}" for name in torch_rope.__all__}
    for path in (ROOT / "python" / "torch_rope" / "integrations").glob("[a-z]*.py"):
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            found |= {
                f"torch_rope.integrations.{path.stem}.{name}" for name in names if name[0] != "_"
            }
    return found


def test_the_reference_lists_every_public_name_of_python() -> None:
    assert entries_of_python() == public_names()


def test_the_reference_lists_every_public_name_of_cpp() -> None:
    headers = "\n".join(path.read_text() for path in (ROOT / "csrc" / "rope").glob("*.h"))
    code = re.sub(r"//.*", "", headers)
    functions = set(re.findall(r"^ROPE_API [^;()]*?(\w+)\(", code, re.MULTILINE))
    types = set(re.findall(r"^(?:class|struct) (?:ROPE_API )?(\w+)[^;]*?\{", code, re.MULTILINE))
    listed = CPP_ENTRY.findall((DOCS / "reference" / "cpp.md").read_text())
    assert len(functions) > 25
    assert len(types) > 15
    assert set(listed) == functions | types
    assert len(listed) == len(set(listed))


def test_the_reference_lists_every_operator() -> None:
    schemas = torch._C._jit_get_all_schemas()
    public = {
        schema.name.removeprefix("rope::")
        for schema in schemas
        if re.match(r"rope::[a-z]", schema.name)
    }
    page = (DOCS / "reference" / "operators.md").read_text()
    table = re.findall(r"^\| (`.*`) \| `(.*)` \|$", page, re.MULTILINE)
    listed = [(name, given) for names, given in table for name in re.findall(r"\w+", names)]
    assert sorted(name for name, _ in listed) == sorted(public)
    for name, given in listed:
        schema = getattr(torch.ops.rope, name).default._schema
        expected = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        assert re.findall(r"(\w+)(?:=None)?(?:, |$)", given) == expected


def test_the_reference_lists_every_option_and_variable() -> None:
    listed = set(re.findall(r"`(\w+)`", (DOCS / "reference" / "options.md").read_text()))
    for name in ("apply", "apply_cos_sin", "norm_apply", "norm_apply_cos_sin"):
        schema = getattr(torch.ops.rope, name).default._schema
        assert {argument.name for argument in schema.arguments} <= listed
    page = (DOCS / "reference" / "environment.md").read_text()
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "cmake").glob("*"), ROOT / "CMakeLists.txt"]
    text = "\n".join(path.read_text() for path in sources)
    variables = set(re.findall(r'(?:getenv\("|ENV\{|option\(|HINTS ENV |ENV )([A-Z]\w+)', text))
    assert variables >= {"ROPE_CUDA", "ROPE_PDL", "ROPE_HUGE_PAGES", "ROPE_X86_KERNELS"}
    unlisted = {variable for variable in variables if f"`{variable}" not in page}
    assert unlisted == {"LIBRARY_PATH"}  # the linker's own
