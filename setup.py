"""List the packages of this project. Everything else about the project is in pyproject.toml.

The list needs code: the folder kernels/ is imported as ``hybrid_moe_kernels``, because a package named ``kernels``
would shadow the Hugging Face library, and pyproject.toml cannot rename a package that it searches. A new folder under
kernels/ is found without a change here.
"""

from setuptools import find_namespace_packages, setup

caches = ["*__pycache__*"]
kernels = find_namespace_packages("kernels", exclude=caches)
others = find_namespace_packages(include=["hybrid_moe_ref*", "repro*"], exclude=caches)

setup(
    packages=[*others, "hybrid_moe_kernels", *(f"hybrid_moe_kernels.{name}" for name in kernels)],
    package_dir={"hybrid_moe_kernels": "kernels"},
)
