"""Weights that a hub brings: what its clients raise and print, as one sentence."""

import logging
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from curation.errors import UserError


@contextmanager
def weights_of(name: str) -> Iterator[None]:
    """Around the loading of `name`. Raises UserError (exit code 1) that says which models work without a network."""
    from embeddings.models.registry import offline_sentence

    before = logging.root.manager.disable
    was_offline = _offline_without_its_host()
    logging.disable(logging.CRITICAL)  # the clients log each failure at length, on top of what they raise
    try:
        yield
    except Exception as error:  # hub clients raise OSError, RuntimeError, ValueError and exceptions of their own
        raise UserError(
            f"model {name}: its weights are not on this machine and cannot be downloaded; {offline_sentence()}",
            exit_code=1,
        ) from error
    finally:
        logging.disable(before)
        _set_offline(was_offline)


def _offline_without_its_host() -> bool:
    """Where the hub's name does not resolve, its client would try for a minute: told to look at its cache only.

    Returns what it was told before.
    """
    from huggingface_hub import constants

    was_offline = bool(constants.HF_HUB_OFFLINE)
    if not was_offline and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            _set_offline(True)
    return was_offline


def _set_offline(value: bool) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = value
