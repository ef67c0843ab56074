"""Packaging of sp3llm. `pip install .` carries the bundled model and the calibration manifest."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "sp3llm" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

EXTRAS = {
    # 0.4.12 loads tasks once and hands them over; 0.4.13's own command finds the functions that
    # tasks of ours name, too. lm-eval itself names neither torch nor transformers.
    "eval": ["lm-eval>=0.4.13"],
    # Figures of `score --task`: GLUE's, and through its scipy correlations.
    "tasks": ["scikit-learn>=1.3"],
    "quantize": ["bitsandbytes>=0.48.1"],
    "recover": ["peft>=0.15"],
    "dev": ["pytest>=8", "pytest-xdist[psutil]>=3.5", "hypothesis>=6", "ruff>=0.8"],
}
EXTRAS["all"] = sorted({need for name in EXTRAS if name != "dev" for need in EXTRAS[name]})

setup(
    name="sp3llm",
    version=VERSION,
    description="Compress Hugging Face models into smaller ones of the same architecture",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # The calibration manifest, and the presets and offline tasks of `sp3llm score`, live elsewhere
    # in the repository, and inside the installed package.
    packages=[
        *find_packages(include=["sp3llm", "sp3llm.*"]),
        "sp3llm.calib_data",
        "sp3llm.presets",
        "sp3llm.tasks",
    ],
    package_dir={
        "sp3llm": "sp3llm",
        "sp3llm.calib_data": "calib_data",
        "sp3llm.presets": "eval/presets",
        "sp3llm.tasks": "eval/tasks",
    },
    package_data={
        "sp3llm": ["bundled/llama-8m/*", "py.typed"],
        "sp3llm.reporting": ["templates/*"],
        "sp3llm.calib_data": ["*.json"],
        "sp3llm.presets": ["*.yaml"],
        "sp3llm.tasks": ["*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.4",
        "accelerate>=1.9",
        "safetensors>=0.4.5",
        "huggingface_hub>=1.5",
        "numpy>=2.0",
        "rich>=13",
        # Named and hub text sets and .parquet files, which --calib takes by default.
        "datasets>=3.0",
        # Models that ship tokenizer.model alone.
        "sentencepiece>=0.2",
        "protobuf>=4.21.1",
        # report.html, which every run writes: its pictures and its page. torch brings jinja2 too.
        "matplotlib>=3.8.4",
        "jinja2>=3.1",
        # Whether memory holds the models whose samples it shows. accelerate brings it too.
        "psutil>=5.9",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sp3llm = sp3llm.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
