"""The typed errors of all four packages, each with the exit code of the command line.

The text of an error says what happened and what to do next; it never holds a secret.
`LocalProtocolError` means that our own code or driver broke a rule; `RemoteProtocolError` means that a peer did,
and names the peer (after h11's two error types).
"""

from typing import ClassVar


class SecGeoError(Exception):
    """Base of every error that SecGeo raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(SecGeoError):
    """A configuration, agreement or local policy is missing, malformed or too weak."""

    exit_code = 3


class KeyFileError(SecGeoError):
    """A key file, certificate, enrolment request or roster cannot be used."""

    exit_code = 4


class TransportError(SecGeoError):
    """The network failed: unreachable, refused or too slow; the text says which."""

    exit_code = 5


class LocalProtocolError(SecGeoError):
    """Our own side was driven against the protocol's rules: a programming error, or a restart in mid-round."""

    exit_code = 6


class RemoteProtocolError(SecGeoError):
    """A peer broke the protocol.

    Attributes:
        peer: the identity of the party that is to blame, as the roster names it.
    """

    exit_code = 6

    def __init__(self, peer: str, message: str) -> None:
        super().__init__(f"{peer}: {message}")
        self.peer = peer


class BudgetExceeded(SecGeoError):
    """The next step would pass the privacy budget; it was refused before any noise was drawn."""

    exit_code = 7


class VerificationFailed(SecGeoError):
    """A signature, chain, digest or claim does not check."""

    exit_code = 8
