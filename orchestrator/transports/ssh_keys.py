"""Logging in to an ssh server: with the keys of files and of the ssh-agent, never with a password."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import paramiko

from orchestrator.errors import DeviceError, LinkError, StableError
from orchestrator.transports.ssh_address import Endpoint
from orchestrator.transports.ssh_agent import AgentTroubleError, SshAgent
from orchestrator.transports.ssh_known_hosts import fingerprint


def log_in(transport: paramiko.Transport, endpoint: Endpoint, device: str) -> None:
    """Authenticate on a connection whose host key was checked.

    Raises: StableError (no key that the server takes, an ssh-agent that is needed and does not answer, with
    what to do), LinkError (the link was lost).
    """
    tried: list[str] = []
    try:
        transport.auth_none(endpoint.user)
        return  # a board without passwords: it lets anybody in
    except paramiko.BadAuthenticationType as error:
        if "publickey" not in error.allowed_types:
            raise StableError(
                f"{endpoint} takes no keys, only {', '.join(error.allowed_types)}.",
                "Allow PubkeyAuthentication in its sshd_config.",
                device=device,
            ) from error
    except paramiko.AuthenticationException:
        tried.append("no key at all")
    except (paramiko.SSHException, EOFError) as error:
        raise _lost(endpoint, error, device) from error
    locked: list[Path] = []
    with closing(SshAgent(os.environ.get("SSH_AUTH_SOCK", ""))) as agent:
        try:
            for name, key in _keys(endpoint, agent, locked, device):
                if _takes(transport, endpoint, key, device):
                    return
                tried.append(name)
                if not transport.is_active():
                    break  # it has seen too many keys
        except AgentTroubleError as error:
            raise _no_help(agent, error, endpoint, tried, device) from error
    raise _refused(endpoint, tried, locked, device)


def _takes(transport: paramiko.Transport, endpoint: Endpoint, key: paramiko.PKey, device: str) -> bool:
    """Whether the server lets us in with a key. Raises: AgentTroubleError, StableError, LinkError."""
    try:
        further = transport.auth_publickey(endpoint.user, key)
    except paramiko.AuthenticationException:
        return False
    except AgentTroubleError:
        raise
    except (paramiko.SSHException, EOFError) as error:
        raise _lost(endpoint, error, device) from error
    if further:
        raise StableError(
            f"{endpoint} wants more than a key: {', '.join(further)}.",
            "Allow logging in with the key alone (AuthenticationMethods in its sshd_config).",
            device=device,
        )
    return True


def _keys(
    endpoint: Endpoint, agent: SshAgent, locked: list[Path], device: str
) -> Iterator[tuple[str, paramiko.PKey]]:
    """(name for messages, key) in the order of trying; encrypted files are added to ``locked``. The agent is
    asked only when no file was taken. Raises: AgentTroubleError, StableError."""
    for path in endpoint.key_files:
        try:
            yield str(path), paramiko.PKey.from_path(str(path))
        except FileNotFoundError as error:
            if endpoint.own_keys:
                raise StableError(
                    f"the key {path} does not exist.", "Give a key_file that does.", device=device
                ) from error
        except (TypeError, paramiko.PasswordRequiredException):
            locked.append(path)
        except OSError as error:
            raise StableError(
                f"the key {path} cannot be read: {error.strerror}.", "Correct its permissions.", device=device
            ) from error
        except (ValueError, paramiko.SSHException) as error:
            raise StableError(
                f"{path} is no private key of a kind known here: {error}",
                "Give the private key (not the .pub file): ed25519, ecdsa or rsa.",
                device=device,
            ) from error
    if endpoint.agent or locked:
        for key in agent.offered():
            yield f"the agent's {key.get_name()} {fingerprint(key.asbytes())}", key


def _no_help(
    agent: SshAgent, error: AgentTroubleError, endpoint: Endpoint, tried: list[str], device: str
) -> DeviceError:
    before = f"; {endpoint} refused {'; '.join(tried)[:500]}" if tried else ""
    return StableError(
        f"the ssh-agent at {agent.path} {error}{before}.",
        "Start it anew (ssh-add -l must answer) or unset SSH_AUTH_SOCK; or give a key_file without a"
        " passphrase, which needs no agent.",
        device=device,
    )


def _refused(endpoint: Endpoint, tried: list[str], locked: list[Path], device: str) -> DeviceError:
    if locked:
        return StableError(
            f"the key {locked[0]} is encrypted, and no ssh-agent offers it.",
            f"Unlock it for this session: ssh-add {locked[0]}. No password is ever asked for here.",
            device=device,
        )
    if not tried:
        return StableError(
            f"there is no key to log in to {endpoint} with.",
            "Make one (ssh-keygen -t ed25519), bring it there (ssh-copy-id), or give key_file.",
            device=device,
        )
    public = next((f"-i {path}.pub " for path in endpoint.key_files if path.exists()), "")
    return StableError(
        f"{endpoint} refused every key: {'; '.join(tried)[:500]}.",
        f"Bring the public key there: ssh-copy-id {public}-p {endpoint.port} {endpoint.user}@{endpoint.host};"
        " or give user and key_file in the inventory.",
        device=device,
    )


def _lost(endpoint: Endpoint, error: Exception, device: str) -> DeviceError:
    return LinkError(
        f"the link to {endpoint} was lost while logging in: {str(error) or type(error).__name__}.",
        "Try again.",
        device=device,
    )
