"""Logging in to an ssh server: with the keys of files and of the ssh-agent, never with a password."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import paramiko

from orchestrator.errors import DeviceError, LinkError, StableError
from orchestrator.transports.ssh_address import Endpoint
from orchestrator.transports.ssh_known_hosts import fingerprint


def log_in(transport: paramiko.Transport, endpoint: Endpoint, device: str) -> None:
    """Authenticate on a connection whose host key was checked.

    Raises: StableError (no key that the server takes, with what to do), LinkError (the link was lost).
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
    agent = paramiko.Agent()
    try:
        for name, key in _keys(endpoint, agent, locked, device):
            try:
                further = transport.auth_publickey(endpoint.user, key)
            except paramiko.AuthenticationException:
                tried.append(name)
                if transport.is_active():
                    continue
                break  # it has seen too many keys
            except (paramiko.SSHException, EOFError) as error:
                raise _lost(endpoint, error, device) from error
            if not further:
                return
            raise StableError(
                f"{endpoint} wants more than a key: {', '.join(further)}.",
                "Allow logging in with the key alone (AuthenticationMethods in its sshd_config).",
                device=device,
            )
    finally:
        agent.close()
    raise _refused(endpoint, tried, locked, device)


def _keys(
    endpoint: Endpoint, agent: paramiko.Agent, locked: list[Path], device: str
) -> Iterator[tuple[str, paramiko.PKey]]:
    """(name for messages, key) in the order of trying; encrypted files are added to ``locked``."""
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
        for key in agent.get_keys():
            yield f"the agent's {key.get_name()} {fingerprint(key.asbytes())}", key


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
