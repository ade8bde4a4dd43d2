"""Packaging. Tool settings are in pyproject.toml.

The device code and the trainers live beside the library, not inside it, and are installed as `seal_fast.kernels` and
`seal_fast.train`: a top-level package called "kernels" would shadow the one that other libraries import.
"""

from pathlib import Path

from setuptools import setup

version: dict[str, str] = {}
exec(Path("seal_fast/version.py").read_text(encoding="utf-8"), version)

ROOMS = {"seal_fast.kernels": "kernels", "seal_fast.train": "train"}

packages = ["seal_fast"] + [f"seal_fast.{path.parent.name}" for path in sorted(Path("seal_fast").glob("*/__init__.py"))]
for name, folder in ROOMS.items():
    packages.append(name)
    packages.extend(f"{name}.{path.parent.name}" for path in sorted(Path(folder).glob("*/__init__.py")))

TRAIN = [
    "numpy>=1.24",
    "torchvision",
    "scikit-learn>=1.3",
    "matplotlib>=3.7",
    "tensorboard>=2.13",
    "tqdm>=4.65",
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
    install_requires=["torch>=2.6"],
    extras_require={
        "train": TRAIN,
        "test": [*TRAIN, "pytest>=8", "hypothesis>=6.100", "spikingjelly", "ruff>=0.8"],
    },
    entry_points={
        "console_scripts": [
            "seal-fast-teacher = seal_fast.train.teacher:main",
            "seal-fast-distill = seal_fast.train.distill:main",
            "seal-fast-demo = seal_fast.train.demo:main",
        ]
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
