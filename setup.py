"""Packaging of ssod_imwa; `pip install -e .[dev]` is what `make` does."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "ssod_imwa/__init__.py").read_text())[1]

setup(
    name="ssod_imwa",
    version=VERSION,
    description="Semi-supervised detection under iterative model weight averaging (IMWA)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ssod_imwa", "ssod_imwa.*"]),
    package_data={"ssod_imwa": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "timm>=1.0",
        "fvcore>=0.1.5",
        "iopath>=0.1.9",
        "pycocotools>=2.0.7",
        "faster-coco-eval>=1.6",
        "numpy>=1.24",
        "pillow>=10.1",
        "tensorboard>=2.14",
        "matplotlib>=3.7",
        "scikit-learn>=1.3",
        "rich>=13",
        "psutil>=5.9",
        "filelock>=3.12",
    ],
    extras_require={
        "dev": ["pytest>=8", "pytest-xdist>=3", "ruff>=0.9", "mypy>=1.13", "hypothesis>=6"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
