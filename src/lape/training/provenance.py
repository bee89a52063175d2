"""What a result was made with: commit, versions, machine, command."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lape.files.characters import plural

PACKAGES = ("lape", "torch", "timm", "lightning-fabric")


def commit() -> str | None:
    """The commit of this code, with `-dirty` where files differ from it; None where it lies in no repository.

    Filed results are no code: what the last benchmark wrote makes the next one's commit no other.
    """
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie inside a repository of others
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    """The system and what computes on it."""
    import torch

    graphics = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    threads = f"{plural(os.cpu_count() or 1, 'core')}, torch threads: {torch.get_num_threads()}"
    return ", ".join([f"{platform.system()} {platform.machine()}", threads, *graphics])


def command() -> str:
    """The command that this process was started by."""
    words = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return words.encode(errors="backslashreplace").decode()  # names may hold bytes that are no UTF-8


def provenance() -> dict[str, Any]:
    """All of it, as `result.json` holds it."""
    return {
        "command": command(),
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": machine(),
    }
