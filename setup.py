"""The list of packages, which pyproject.toml can't compute: kernels/ stands at the top and is installed as retro_jax.kernels."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["retro_jax", "retro_jax.*"], exclude=["retro_jax.kernels", "retro_jax.kernels.*"]),
        "retro_jax.kernels",
        *(f"retro_jax.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"retro_jax.kernels": "kernels"},
)
