"""The ssh transport against a real sshd: whom it trusts, and what it does when links and boards fail."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from orchestrator import reach as reaching
from orchestrator.errors import CommandTimeoutError, DeviceFullError, LinkError, StableError
from orchestrator.inventory import Device, parse_inventory
from orchestrator.reach import Reach
from orchestrator.settings import load_settings
from orchestrator.transports.ssh import SshTransport
from orchestrator.transports.ssh_address import endpoint_of
from orchestrator.transports.ssh_known_hosts import fingerprint
from tests.ssh_server import SshServer, make_key, public_part


@contextmanager
def running(server: SshServer) -> Iterator[SshServer]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    folder = tmp_path_factory.mktemp("sshd")
    with running(SshServer(folder, host_key_kinds=("ed25519", "ecdsa", "rsa"))) as started:
        yield started


@pytest.fixture(params=["sftp", "cat"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SshServer]:
    """A server with an sftp server, and one without."""
    options = {} if request.param == "sftp" else {"Subsystem": ""}
    with running(SshServer(tmp_path / "sshd", options)) as started:
        yield started


@contextmanager
def reached(server: SshServer, silence_s: float = 20.0, **fields: str) -> Iterator[SshTransport]:
    transport = SshTransport("board", lambda: endpoint_of(device(server, **fields)), silence_s=silence_s)
    try:
        yield transport
    finally:
        transport.close()


def device(server: SshServer, **fields: str) -> Device:
    text = f"version: 1\ndevices: [{{name: board, {server.fields(**fields)}}}]"
    return parse_inventory(text.encode(), Path("inventory.yaml")).devices[0]


def wait_for(condition: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


class Proxy:
    """Between client and server: counts what the client sends, and cuts the link after so many bytes."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.sent_bytes = 0
        self.cut_after: int | None = None
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        """Break every connection."""
        for pair in list(self._pairs):
            _break(*pair)

    def close(self) -> None:
        self._listener.close()
        self.cut()
        for pair in self._pairs:
            for end in pair:
                end.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            board = socket.create_connection(("127.0.0.1", self._target))
            self._pairs.append((client, board))
            for source, sink, counted in ((client, board, True), (board, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, counted), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1 << 14):
                if counted:
                    self.sent_bytes += len(data)
                    if self.cut_after is not None and self.sent_bytes > self.cut_after:
                        self.cut_after = None
                        self.cut()
                        return
                sink.sendall(data)
        except OSError:
            return
        finally:
            _break(source, sink)


def _break(*ends: socket.socket) -> None:
    for end in ends:
        try:
            end.shutdown(socket.SHUT_RDWR)  # closing would wait for whoever is reading
        except OSError:
            continue  # it is broken already


@contextmanager
def proxied(server: SshServer) -> Iterator[tuple[Proxy, SshTransport]]:
    proxy = Proxy(server.port)
    server.know(proxy.port)
    user = device(server).address
    assert user is not None
    address = f'"{user.partition("@")[0]}@127.0.0.1:{proxy.port}"'
    try:
        with reached(server, address=address) as transport:
            yield proxy, transport
    finally:
        proxy.close()


# ------------------------------------------------------------------ whom it trusts


def test_an_unknown_host_key_is_refused_with_what_accepts_it(server: SshServer, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.touch()
    with reached(server, known_hosts=str(known)) as transport:
        with pytest.raises(StableError, match="is unknown") as raised:
            transport.run(["true"], timeout_s=60)
        listed = subprocess.run(
            ["ssh-keygen", "-lf", f"{server.host_keys[0]}.pub"], capture_output=True, text=True, check=True
        )
        text = str(raised.value)
        assert listed.stdout.split()[1] in text
        assert known.read_text() == ""
        accept = text.partition("then: ")[2].strip()
        assert accept == f"ssh-keyscan -t ed25519 -p {server.port} 127.0.0.1 >> {known}"
        subprocess.run(["sh", "-c", accept], check=True, capture_output=True)
        assert transport.run(["true"], timeout_s=60).ok


def test_a_changed_host_key_is_refused_until_it_is_forgotten(server: SshServer, tmp_path: Path) -> None:
    known, other = tmp_path / "known_hosts", make_key(tmp_path / "other")
    name = f"[127.0.0.1]:{server.port}"
    known.write_text(f"# mine\n{name} {public_part(other)}\n")
    with reached(server, known_hosts=str(known)) as transport:
        with pytest.raises(StableError, match="has changed") as raised:
            transport.run(["true"], timeout_s=60)
        assert f"{known}:2" in str(raised.value)
        forget = str(raised.value).partition("old key: ")[2].partition(";")[0]
        assert forget == f"ssh-keygen -R '{name}' -f {known}"
        subprocess.run(["sh", "-c", forget], check=True, capture_output=True)
        with pytest.raises(StableError, match="is unknown"):
            transport.run(["true"], timeout_s=60)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_kind_of_host_key_that_is_recorded_is_asked_for(
    server: SshServer, tmp_path: Path, number: int
) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {public_part(server.host_keys[number])}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(known)], check=True, capture_output=True)
    assert "127.0.0.1" not in known.read_text()
    with reached(server, known_hosts=str(known)) as transport:
        assert transport.run(["true"], timeout_s=60).ok


def test_a_revoked_host_key_is_refused(server: SshServer, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"{server.known_hosts.read_text()}@revoked * {public_part(server.host_keys[0])}\n")
    with reached(server, known_hosts=str(known)) as transport, pytest.raises(StableError, match="revoked"):
        transport.run(["true"], timeout_s=60)


def test_a_wrong_key_is_refused_with_what_to_do(server: SshServer, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    with (
        reached(server, key_file=str(other)) as transport,
        pytest.raises(StableError, match=rf"refused every key: .*other.* ssh-copy-id -i {other}.pub"),
    ):
        transport.run(["true"], timeout_s=60)
    with (
        reached(server, key_file=str(tmp_path / "none")) as transport,
        pytest.raises(StableError, match="does not exist"),
    ):
        transport.run(["true"], timeout_s=60)
    (tmp_path / "text").write_text("no key")
    with (
        reached(server, key_file=str(tmp_path / "text")) as transport,
        pytest.raises(StableError, match="is no private key"),
    ):
        transport.run(["true"], timeout_s=60)


@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
def test_other_kinds_of_keys(server: SshServer, tmp_path: Path, kind: str) -> None:
    key = make_key(tmp_path / "key", kind)
    with server.authorized.open("a") as stream:
        stream.write(public_part(key) + "\n")
    with reached(server, key_file=str(key)) as transport:
        assert transport.run(["true"], timeout_s=60).ok


def test_an_encrypted_key_needs_the_agent(
    server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    key = make_key(tmp_path / "key", passphrase="secret")
    with server.authorized.open("a") as stream:
        stream.write(public_part(key) + "\n")
    with reached(server, key_file=str(key)) as transport:
        with pytest.raises(StableError, match=r"is encrypted.*ssh-add"):
            transport.run(["true"], timeout_s=60)
        askpass = tmp_path / "askpass"
        askpass.write_text("#!/bin/sh\necho secret\n")
        askpass.chmod(0o700)
        with private_agent() as agent:
            subprocess.run(
                ["ssh-add", str(key)],
                env={**os.environ, "SSH_AUTH_SOCK": agent, "SSH_ASKPASS": str(askpass),
                     "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": ":0"},
                check=True, capture_output=True, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            monkeypatch.setenv("SSH_AUTH_SOCK", agent)
            assert transport.run(["true"], timeout_s=60).ok


def test_an_agent_that_hangs_up_is_asked_only_when_no_key_file_was_taken(
    server: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hanging_up(tmp_path / "agent") as asked:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        with reached(server) as transport:
            assert transport.run(["true"], timeout_s=60).ok
        assert not asked
        strange = make_key(tmp_path / "strange")
        refusal = r"the ssh-agent at .* the connection.* refused .*strange.*ssh-add -l"
        with (
            reached(server, key_file=str(strange)) as transport,
            pytest.raises(StableError, match=refusal),
        ):
            transport.run(["true"], timeout_s=60)
        assert asked


@contextmanager
def hanging_up(path: Path) -> Iterator[list[int]]:
    """An ssh-agent that ends every connection at once; those it had."""
    had: list[int] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with suppress(OSError):  # its end
                while True:
                    with listener.accept()[0] as link:
                        had.append(link.fileno())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield had
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def private_agent() -> Iterator[str]:
    started = subprocess.Popen(["ssh-agent", "-D"], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    try:
        yield started.stdout.readline().partition("=")[2].partition(";")[0]
    finally:
        started.terminate()
        started.wait()
        started.stdout.close()


def behind_another(server: SshServer, home: Path, host: str) -> SshTransport:
    """A board called inner, reached through a second one; both are the same server. ``host``: lines of it."""
    (home / ".ssh").mkdir()
    user = str(device(server).address).partition("@")[0]
    (home / ".ssh/config").write_text(
        f"Host inner\n {host}\n Port {server.port}\n User {user}\n ProxyJump {user}@127.0.0.1:{server.port}\n"
    )
    inner = device(server, address="inner")
    return SshTransport("board", lambda: endpoint_of(inner, home))


@pytest.mark.parametrize("host", ["HostName localhost", "HostName 127.0.0.1\n HostKeyAlias my-board"])
def test_an_unknown_host_key_behind_another_board_is_accepted_through_it(
    server: SshServer, tmp_path: Path, host: str
) -> None:
    before = server.known_hosts.read_text()
    transport = behind_another(server, tmp_path, host)
    try:
        with pytest.raises(StableError, match="is unknown") as raised:
            transport.run(["true"], timeout_s=60)
        accept = str(raised.value).partition("then: ")[2].strip()
        subprocess.run(["sh", "-c", accept], check=True, capture_output=True, timeout=120)
        assert server.known_hosts.read_text().startswith(before)
        assert transport.run(["true"], timeout_s=60).ok
    finally:
        server.known_hosts.write_text(before)
        transport.close()


def test_a_board_behind_another_is_reached_through_it(server: SshServer, tmp_path: Path) -> None:
    transport = behind_another(server, tmp_path, "HostName 127.0.0.1")
    try:
        assert transport.run(["sh", "-c", "echo $SSH_CLIENT"], timeout_s=60).stdout.startswith(b"127.0.0.1 ")
    finally:
        transport.close()


def test_no_connection_is_left_to_a_board_whose_next_one_is_off(server: SshServer, tmp_path: Path) -> None:
    transport = behind_another(server, tmp_path, "HostName 127.0.0.1")
    configuration = tmp_path / ".ssh/config"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nothing listens there
        text = configuration.read_text()
        configuration.write_text(text.replace(f" Port {server.port}", f" Port {closed.getsockname()[1]}", 1))
        wait_for(lambda: not server.children())
        for _ in range(2):
            with pytest.raises(LinkError, match="no connection to 127"):
                transport.run(["true"], timeout_s=60)
        wait_for(lambda: not server.children())


# ------------------------------------------------------------------ when links and boards fail


def test_an_interrupted_push_sends_only_the_rest(either: SshServer, tmp_path: Path) -> None:
    source, remote = tmp_path / "source", tmp_path / "device/file"
    source.write_bytes(os.urandom(12_000_000))
    with proxied(either) as (proxy, transport):
        transport.run(["true"], timeout_s=60)
        proxy.cut_after = proxy.sent_bytes + 8_000_000
        with pytest.raises(LinkError):
            transport.push(source, str(remote))
        partial = remote.with_name(".file.partial")
        # The server may still be writing what had arrived.
        wait_for(lambda: not any(name.startswith("sshd") for name in map(comm, either.children())))
        held = partial.stat().st_size
        assert 2_000_000 < held < 8_000_000
        before = proxy.sent_bytes
        seen: list[int] = []
        transport.push(source, str(remote), progress=lambda done, _: seen.append(done))
        assert proxy.sent_bytes - before < (12_000_000 - held) * 1.05 + 100_000
        assert seen[0] > held
        assert remote.read_bytes() == source.read_bytes()
        assert [path.name for path in remote.parent.iterdir()] == ["file"]


def comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def test_the_rest_of_another_file_is_not_trusted(either: SshServer, tmp_path: Path) -> None:
    source, remote = tmp_path / "source", tmp_path / "file"
    source.write_bytes(os.urandom(300_000))
    for rest in (os.urandom(100_000), bytes(400_000)):
        remote.with_name(".file.partial").write_bytes(rest)
        with reached(either) as transport:
            transport.push(source, str(remote))
        assert remote.read_bytes() == source.read_bytes()


def test_a_command_ends_with_its_link(server: SshServer, tmp_path: Path) -> None:
    with proxied(server) as (proxy, transport), ThreadPoolExecutor(1) as pool:
        script = 'echo $$ >"$1.new"; mv "$1.new" "$1"; exec sleep 600'
        running = pool.submit(transport.run, ["sh", "-c", script, "sh", str(tmp_path / "pid")], timeout_s=600)
        wait_for((tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        wait_for(lambda: comm(pid) == "sleep\n")
        proxy.cut()
        with pytest.raises(LinkError) as raised:
            running.result()
        assert not isinstance(raised.value, CommandTimeoutError)
        wait_for(lambda: not Path(f"/proc/{pid}").exists())
        assert transport.run(["true"], timeout_s=60).ok


def test_a_restarted_server_is_reached_again(tmp_path: Path) -> None:
    with running(SshServer(tmp_path / "sshd")) as server, reached(server) as transport:
        assert transport.run(["true"], timeout_s=60).ok
        server.stop()
        for _ in range(2):  # the end of the link, then that there is no server
            with pytest.raises(LinkError):
                transport.run(["true"], timeout_s=60)
        with pytest.raises(LinkError, match="no connection"):
            transport.read_from("/proc/version", 0, 10)
        server.start()
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(transport.run, ["true"], timeout_s=60) for _ in range(4)]
        assert all(future.result().ok for future in futures)
        assert transport.read_from("/proc/version", 0, 5) == b"Linux"


def test_a_board_that_reboots_after_its_first_call_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaching, "_FIRST_REACH_S", 0.0)  # no patience with a board that was never there
    with running(SshServer(tmp_path / "sshd")) as server:
        reach = Reach(load_settings(environ={}, cwd=tmp_path), [device(server)])
        assert reach.spool("board") == str(server.home / ".stifarm-device")
        server.stop()

        def boot() -> None:
            wait_for(lambda: reach.underway("board").waits.startswith("out of reach"))
            server.start()

        with ThreadPoolExecutor(1) as pool:
            booting = pool.submit(boot)
            said = reach.retried("board", lambda: reach.transport("board").run(["echo", "up"], timeout_s=60))
            booting.result()
        assert said.stdout == b"up\n"
        reach.close()


def test_a_link_that_went_silent_is_noticed(tmp_path: Path) -> None:
    with running(SshServer(tmp_path / "sshd")) as server, reached(server, silence_s=6) as transport:
        assert transport.read_from("/proc/version", 0, 5) == b"Linux"
        assert transport.run(["true"], timeout_s=60).ok
        stopped = [pid for pid in server.children() if comm(pid).startswith("sshd")]
        assert stopped
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            for use in (
                lambda: transport.run(["true"], timeout_s=600),
                lambda: transport.read_from("/proc/version", 0, 5),
            ):
                try:
                    use()
                except LinkError as error:
                    assert not isinstance(error, CommandTimeoutError)  # noqa: PT017
                    break
            else:
                raise AssertionError("nobody noticed")
            assert transport.run(["true"], timeout_s=60).ok  # the server itself is well
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


def test_few_sessions_are_shared_by_many_threads(tmp_path: Path) -> None:
    with (
        running(SshServer(tmp_path / "sshd", {"MaxSessions": "4"})) as server,
        reached(server) as transport,
        ThreadPoolExecutor(8) as pool,
    ):
        (tmp_path / "source").write_bytes(bytes(100_000))

        def work(number: int) -> bytes:
            transport.push(tmp_path / "source", str(tmp_path / f"there-{number}"))
            return transport.run(["sh", "-c", f"sleep 0.1; echo {number}"], timeout_s=300).stdout

        assert list(pool.map(work, range(8))) == [f"{number}\n".encode() for number in range(8)]


def test_a_server_of_too_few_sessions_is_a_stable_error(tmp_path: Path) -> None:
    with (
        running(SshServer(tmp_path / "sshd", {"MaxSessions": "1"})) as server,
        reached(server) as transport,
        pytest.raises(StableError, match="MaxSessions"),
    ):
        transport.run(["true"], timeout_s=60)


def test_a_login_that_talks_disturbs_nothing(tmp_path: Path) -> None:
    chatty = "sh -c 'echo welcome; echo careful >&2; eval \"$SSH_ORIGINAL_COMMAND\"'"
    with (
        running(SshServer(tmp_path / "sshd", {"ForceCommand": chatty})) as server,
        reached(server) as transport,
    ):
        done = transport.run(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_s=60)
        assert (done.exit_code, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
        assert transport.read_from("/proc/version", 0, 5) == b"Linux"  # its sftp server is unusable


def test_an_account_without_a_shell_is_a_stable_error(tmp_path: Path) -> None:
    with (
        running(SshServer(tmp_path / "sshd", {"ForceCommand": "sh -c 'echo go away; exit 1'"})) as server,
        reached(server) as transport,
        pytest.raises(StableError, match="executes no commands: go away"),
    ):
        transport.run(["true"], timeout_s=60)


def test_an_sftp_server_that_answers_nonsense_is_contained(tmp_path: Path) -> None:
    program = tmp_path / "nonsense"
    for greeting, contained in ((r"\377\377\377\377", False), (r"\0\0\0\5\2\0\0\0\3\1\2", True)):
        program.write_text(f"#!/bin/sh\nprintf '{greeting}'\nyes\n")
        program.chmod(0o755)
        with (
            running(SshServer(tmp_path / f"sshd-{contained}", {"Subsystem": f"sftp {program}"})) as server,
            reached(server) as transport,
        ):
            if not contained:  # no sftp server at all
                assert transport.read_from("/proc/version", 0, 5) == b"Linux"
                continue
            with pytest.raises(StableError, match="nonsense"):
                transport.read_from("/proc/version", 0, 5)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_and_a_read_only_file_system_are_named(either: SshServer, tmp_path: Path) -> None:
    small, source = tmp_path / "small", tmp_path / "source"
    small.mkdir()
    source.write_bytes(os.urandom(3_000_000))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    try:
        with reached(either) as transport:
            with pytest.raises(DeviceFullError, match=r"[Nn]o space left on device.*Free space"):
                transport.push(source, str(small / "file"))
            assert list(small.iterdir()) == []
            subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
            with pytest.raises(StableError, match=r"[Rr]ead-only file system"):
                transport.push(source, str(small / "file"))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_the_default_work_folder_takes_programs(server: SshServer) -> None:
    with reached(server) as transport:
        assert transport.default_workdir() == str(server.home / ".stifarm-device")
    assert list(server.home.iterdir()) == []


def test_fingerprints_are_those_of_ssh_keygen(server: SshServer) -> None:
    import base64

    for key in server.host_keys:
        listed = subprocess.run(
            ["ssh-keygen", "-lf", f"{key}.pub"], capture_output=True, text=True, check=True
        )
        assert fingerprint(base64.b64decode(public_part(key).split()[1])) == listed.stdout.split()[1]
