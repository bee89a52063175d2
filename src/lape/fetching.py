"""Files that are fetched by a name: whether that can be done is known within seconds.

The Hub's client tries again for minutes where there is no network, and tells neither which file it wants nor where to
put it.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from lape.errors import RunError, first_line

SECONDS = 8.0  # in which a server answers, or is given up
NAMES = ("model.safetensors", "pytorch_model.bin")  # of a model's weights on the Hub, as timm looks for them


@dataclass(frozen=True)
class Wanted:
    """A file of a repository on the Hub, under the first of some names that it has there."""

    repository: str
    names: tuple[str, ...] = NAMES
    revision: str | None = None

    @property
    def address(self) -> str:
        """Where it is fetched from."""
        import huggingface_hub

        return huggingface_hub.hf_hub_url(self.repository, self.names[0], revision=self.revision)

    def is_here(self) -> bool:
        """Whether the Hub's cache on this machine has it."""
        from huggingface_hub import try_to_load_from_cache

        kept = (try_to_load_from_cache(self.repository, name, revision=self.revision) for name in self.names)
        return any(isinstance(path, str) for path in kept)


def timm_weights(name: str) -> Wanted | None:
    """Return the file of a timm model's published weights; None where they are not on the Hub, or there are none."""
    from timm.models import get_pretrained_cfg

    try:
        cfg: Any = get_pretrained_cfg(name)
    except RuntimeError:  # timm says what is wrong with such a name
        return None
    if not getattr(cfg, "hf_hub_id", None):
        return None
    repository, _, revision = cfg.hf_hub_id.partition("@")
    names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else NAMES
    return Wanted(repository, names, revision or None)


def refuse_unreachable(wanted: Wanted | None, what: str, option: str) -> None:
    """Raise RunError within ten seconds where a file is neither on this machine nor to be had from the Hub.

    The message names the file, and where to put it; `what` is what it is for, and `option` where its path can be given.
    """
    if wanted is None or wanted.is_here():
        return
    reason = _why_not(wanted.address)
    if reason:
        raise RunError(
            f"{what} could not be downloaded ({reason}), and not found on this machine. The file wanted is "
            f"{wanted.address}. Fetch it where there is a network, and give {option}; or put it into the Hub's cache "
            f"({_cache()}): `hf download {wanted.repository}` does, also on another machine whose cache is then copied."
        )


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _why_not(address: str) -> str | None:
    """Return why a server does not answer in time; what it refuses, its client tells."""
    from huggingface_hub import get_hf_file_metadata

    answers: SimpleQueue[str | None] = SimpleQueue()

    def ask() -> None:
        try:
            get_hf_file_metadata(address, timeout=SECONDS)
        except Exception as error:  # the Hub's client and its network library raise kinds of their own
            answered = getattr(getattr(error, "response", None), "status_code", None)
            answers.put(None if answered and answered < 500 else first_line(error))
        else:
            answers.put(None)

    # Looking up a name of a host may take longer than any timeout, and cannot be interrupted.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=SECONDS)
    except Empty:
        return f"no answer within {SECONDS:.0f} seconds"
