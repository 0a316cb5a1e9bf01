"""pyproject.toml says everything but this: the C++ ops are built at installation, where there is a compiler."""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ours = runpy.run_path(str(Path(__file__).parent / "dsv4/ops/build.py"))


class Build(build_ext):
    """Without a compiler the installation goes on: the ops then run in torch, and `dsv4 doctor` says why."""

    def build_extension(self, ext: Extension) -> None:
        try:
            ours["build"](Path(self.get_ext_fullpath(ext.name)), reuse=True)
        except ours["BuildError"] as error:
            print(f"dsv4 will run without its C++ ops: {error}")


setup(ext_modules=[Extension(f"dsv4.ops.cpu.{ours['NAME']}", sources=[], optional=True)], cmdclass={"build_ext": Build})
