"""The Python examples of the README and of the pages in docs/ run, each page as one program.

What they say that they make is there afterwards.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a page's examples take for granted.
GIVEN = {
    "README.md": "",
    "docs/integrations.md": """
import torch
import torch_rope

class Rotate(torch.nn.Module):
    def forward(self, x, positions):
        return torch_rope.apply(x, positions)

model, args = Rotate(), (torch.randn(2, 8, 5, 64), torch.arange(5))
""",
    "docs/norms.md": """
import torch
import torch_rope

q, k = torch.randn(2, 9, 4, 64), torch.randn(2, 9, 2, 64)
q_weight, k_weight = torch.rand(4 * 64), torch.rand(2 * 64)
positions = torch.arange(9)[:, None]
""",
    "docs/transformers.md": """
from transformers import LlamaConfig, LlamaModel

model = LlamaModel(LlamaConfig(hidden_size=64, num_hidden_layers=1, intermediate_size=64))
""",
}

# What a page's examples claim, checked after them in the same program. The files that they name are
# looked for besides.
CLAIMS = {
    "README.md": """
loaded = torch.jit.load("rotate.pt")
assert torch.equal(loaded(q, positions), torch_rope.apply(q, positions, max_wavelength=500000.0))
assert patch(model).already == [
    "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
]
assert all(layer.self_attn.q_proj.weight.grad.any() for layer in model.model.layers)
""",
    "docs/integrations.md": """
import onnx

operators = [node.op_type for node in onnx.load("model.onnx").graph.node]
assert operators.count("RotaryEmbedding") == 1
""",
    "docs/norms.md": """
flat = torch.nn.functional.rms_norm(q.flatten(-2), (4 * 64,), q_weight, eps=1e-6)
expected = torch_rope.apply(flat.view_as(q), positions)
assert torch.allclose(q_rotated, expected, atol=1e-5)
assert torch.equal(attention.rotary.q_norm.weight, q_norm)
""",
    "docs/transformers.md": """
from kernels.layer.globals import _KERNEL_MAPPING

assert patch(model).already == [
    "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
]
assert "rotary_pos_emb" in _KERNEL_MAPPING.get()
""",
}

# The packages that they import.
NEEDS = {
    "README.md": ["transformers"],
    "docs/integrations.md": ["onnxscript"],
    "docs/norms.md": [],
    "docs/transformers.md": ["transformers", "kernels"],
}


def examples(page: str) -> list[str]:
    """Returns the Python examples of a page."""
    return re.findall(
        r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE
    )


def test_every_page_with_examples_is_run() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert {str(page.relative_to(ROOT)) for page in pages if examples(str(page))} == set(GIVEN)


@pytest.mark.parametrize("page", GIVEN)
def test_the_examples_of_a_page_run(page: str, tmp_path: Path) -> None:
    for package in NEEDS[page]:
        pytest.importorskip(package)
    program = tmp_path / "page.py"  # A file: torch.jit.script reads its source.
    program.write_text("\n".join([GIVEN[page], *examples(page), CLAIMS[page]]))
    completed = subprocess.run(
        [sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert completed.returncode == 0, completed.stderr
    named = re.findall(r'"([\w-]+\.(?:onnx|pt|pt2|so|json))"', "\n".join(examples(page)))
    for name in named:
        assert (tmp_path / name).stat().st_size > 0
