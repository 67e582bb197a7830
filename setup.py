"""Which packages exist. Everything else about the project is in pyproject.toml.

This part needs code because the folder kernels/ is imported as ``hybrid_moe_kernels`` (a package named
``kernels`` would shadow the Hugging Face library), and the declarative package search cannot rename.
A new op folder under kernels/ is found by itself.
"""

from setuptools import find_namespace_packages, setup

caches = ["*__pycache__*"]
kernels = find_namespace_packages("kernels", exclude=caches)
others = find_namespace_packages(include=["hybrid_moe_ref*", "repro*"], exclude=caches)

setup(
    packages=[*others, "hybrid_moe_kernels", *(f"hybrid_moe_kernels.{name}" for name in kernels)],
    package_dir={"hybrid_moe_kernels": "kernels"},
)
