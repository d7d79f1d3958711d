"""`sgld version`."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("sgld", "torch", "diffusers", "transformers")


def run() -> int:
    """Print the versions, as the packages' metadata says; torch takes seconds to import."""
    print(f"sgld {_version('sgld')}")
    print(f"python {platform.python_version()}")
    for package in _PACKAGES[1:]:
        print(f"{package} {_version(package)}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
