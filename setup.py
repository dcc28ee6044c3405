"""Install Megaprot: each top-level folder becomes the sub-package of the same name of ``megaprot``."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("common", "pretrain", "finetune", "tools", "launch")
VERSION = "0.1.0"


def packages() -> dict[str, str]:
    """Return {package name: folder} for every room and the packages inside it."""
    found = {}
    for room in ROOMS:
        found[f"megaprot.{room}"] = room
        for inner in find_packages(room):
            found[f"megaprot.{room}.{inner}"] = f"{room}/{inner.replace('.', '/')}"
    return found


setup(
    name="megaprot",
    version=VERSION,
    description="Protein language models at Megatron scale, from Pfam to predictions",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=list(packages()),
    package_dir=packages(),
    package_data={"": ["py.typed", "recipes/*.yaml", "slurm/*", "local/*.sh", "container/*"]},
    install_requires=[
        "torch>=2.10",
        "megatron-core>=0.16.1,<0.17",
        "numpy>=1.26",
        "numba>=0.62",  # native loops of data path and attention; older ones build on an LLVM with other types
        "edlib>=1.3.9",  # edit distances
        "isal>=1.7",  # gzip, three times as fast
        "psutil>=5.9",  # megatron-core's checkpoint writers import it
        "PyYAML>=6.0",
        "jsonargparse[signatures]>=4.40",
        "tqdm>=4.66",
        "transformers>=4.40",
        "safetensors>=0.4",
        "h5py>=3.10",
        "scipy>=1.11",
        "deepspeed>=0.19.8",
        "peft>=0.14",
        "matplotlib>=3.8",
        "obonet>=1.1",  # the Gene Ontology
    ],
    extras_require={
        "data": ["pyarrow>=14", "lmdb>=1.4", "zstandard>=0.22", "sentencepiece>=0.2"],
        "gpu": ["transformer-engine[pytorch]>=2.9"],
        "quantization": ["bitsandbytes>=0.45"],  # frozen towers in 8 or 4 bits
        "logging": ["tensorboard>=2.16", "wandb>=0.17"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "setuptools>=70.1",
            "wheel",
            "fair-esm>=2.0",
            "megatron-tokenizer-lite==0.0.2",
            "scikit-learn>=1.4",
            "tape-proteins>=0.5",
            "tensorboard>=2.16",
            "bitsandbytes>=0.45",
        ],
    },
    entry_points={"console_scripts": ["megaprot = megaprot.tools.cli:main"]},
)
