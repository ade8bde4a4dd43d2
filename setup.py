"""Packaging. Tool settings are in pyproject.toml.

The device code and the trainers live beside the library, not inside it, and are installed as `seal_fast.kernels` and
`seal_fast.train`: a top-level package called "kernels" would shadow the one that other libraries import.
"""

import os
import platform
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

version: dict[str, str] = {}
exec(Path("seal_fast/version.py").read_text(encoding="utf-8"), version)

ROOMS = {"seal_fast.kernels": "kernels", "seal_fast.train": "train"}

packages = ["seal_fast"] + [f"seal_fast.{path.parent.name}" for path in sorted(Path("seal_fast").glob("*/__init__.py"))]
for name, folder in ROOMS.items():
    packages.append(name)
    packages.extend(f"{name}.{path.parent.name}" for path in sorted(Path(folder).glob("*/__init__.py")))

sources = runpy.run_path("kernels/launch/sources.py")  # kernels/launch/cpu.py compares their digest as well

# Instruction sets of the CPU kernels and the flags that choose them; the best one is picked when the library is loaded.
# kernels/launch/cpu.py has the names in the same order. The baseline stays first: the linker keeps the first copy of
# code that several of them instantiate from the standard library.
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ISA = {"baseline": []}
if X86_64 and sys.platform != "win32":
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    ISA |= {"avx2": ["-mavx2", "-mfma"], "avx512": avx512}
if os.environ.get("SEAL_FAST_ISA"):  # names with commas between them: tests build one, which takes a third of the time
    ISA = {name: ISA[name] for name in os.environ["SEAL_FAST_ISA"].split(",")}
# No fused multiply-adds but where the source asks for one: spikes equal the reference bit for bit.
if sys.platform == "win32":
    FLAGS, OPENMP = ["/std:c++17", "/O2", "/fp:precise"], ["/openmp:experimental"]
else:
    FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
    FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    OPENMP = ["-fopenmp"]
MORE = os.environ.get("SEAL_FAST_CXXFLAGS", "").split()  # of the compiler and the linker, after all others


class BuildKernels(build_ext):
    """Compiles each source once for each instruction set, and links all of it into one library."""

    def build_extension(self, extension):
        """Build the library that kernels/launch/cpu.py loads; it is no Python module."""
        try:
            self._build(extension, OPENMP)
        except CompileError:  # as with Apple's compiler, which has no OpenMP: one thread then
            self._build(extension, [])

    def _build(self, extension, openmp):
        objects = []
        for isa, flags in ISA.items():
            objects += self.compiler.compile(
                extension.sources,
                output_dir=f"{self.build_temp}/{isa}",
                macros=[("SEAL_ISA", isa), ("SEAL_SOURCES", f"{sources['digest'](Path('kernels')):#x}")],
                extra_postargs=[*FLAGS, *openmp, *flags, *MORE],
                depends=extension.depends,
            )
        path = self.get_ext_fullpath(extension.name)
        linked = [] if sys.platform == "win32" else openmp
        self.compiler.link_shared_object(objects, path, extra_postargs=[*linked, *MORE], target_lang="c++")

    def get_export_symbols(self, extension):
        """The kernels export themselves."""
        return []


TRAIN = [
    "numpy>=1.24",
    "torchvision",
    "scikit-learn>=1.3",
    "matplotlib>=3.7",
    "tensorboard>=2.13",
    "tqdm>=4.65",
]

TEST = [
    *TRAIN,
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.7",
    "hypothesis>=6.100",
    "spikingjelly",
    "cupy-cuda12x; sys_platform == 'linux'",  # compiles CUDA C++ where there is no GPU, too
    "ruff>=0.8",
]

setup(
    name="seal-fast",
    version=version["__version__"],
    description="Fused spiking neurons and selective-alignment distillation for PyTorch",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=packages,
    package_dir=ROOMS,
    package_data={"seal_fast.kernels": ["*/*.cpp", "*/*.h", "*/*.cuh", "*/*.cu"]},
    ext_modules=[
        Extension(
            "seal_fast.kernels._cpu",
            sorted(str(path) for path in Path("kernels").glob("*/cpu.cpp")),
            depends=[f"kernels/{name}" for name in sources["read"](Path("kernels"))],
            optional=True,  # without a compiler the torch reference serves
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    install_requires=["torch>=2.6"],
    extras_require={
        "train": TRAIN,
        "test": TEST,
        "cuda12": ["cupy-cuda12x"],  # the CuPy kernels, with CUDA 12's runtime or CUDA 13's
        "cuda13": ["cupy-cuda13x"],
    },
    entry_points={
        "console_scripts": [
            "seal-fast-teacher = seal_fast.train.teacher:main",
            "seal-fast-distill = seal_fast.train.distill:main",
            "seal-fast-evaluate = seal_fast.train.evaluate:main",
            "seal-fast-demo = seal_fast.train.demo:main",
        ]
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
