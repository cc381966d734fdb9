"""A line between the processes of one run: who is there, what each of them says, and who has gone.

Process 0 listens and every other process keeps one connection to it. The system closes a connection the moment its
process dies, however it dies, so the others hear of it at once and by its number; a machine that falls silent is
noticed within a minute. Small values only, as lines of JSON: arrays travel through the devices.
"""

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from tav_jax.errors import InputError, ProcessLostError

MARGIN = 30  # seconds that the others wait longer than process 0, which knows who is late and says so
LONGEST = 16_000_000  # characters of one message
SILENCE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}  # a machine is given up after a minute


def name(numbers: Sequence[int]) -> str:
    """process 1, or: processes 1, 2"""
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


class _End:
    """One end of a connection: lines of JSON in both directions."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in SILENCE.items():
            if hasattr(socket, option):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.lines = connection.makefile("r", encoding="utf-8")
        self.inbox: queue.Queue[dict | None] = queue.Queue()  # None: nothing more will come
        self.sending = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError), self.sending:  # a lost end is noticed by the one who reads
            self.connection.sendall((json.dumps(message) + "\n").encode())

    def receive(self, seconds: float | None) -> dict | None:
        """The next message; None where the other end has gone, or what it says is none of ours."""
        self.connection.settimeout(seconds)
        try:
            message = json.loads(self.lines.readline(LONGEST) or "null")
        except TimeoutError:
            raise
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Line:
    """Made by `join`. `on_loss` is called once, with the sentence that says which process has gone."""

    def __init__(self, index: int, count: int, ends: dict[int, _End], on_loss: Callable[[str], None]):
        self.index, self.count, self.ends, self.on_loss = index, count, ends, on_loss
        self.turn = 0
        self.loss: str | None = None
        self.lost = threading.Event()
        self.once = threading.Lock()
        self.readers = [threading.Thread(target=self._read, args=item, daemon=True) for item in ends.items()]
        for reader in self.readers:
            reader.start()

    def _read(self, peer: int, end: _End) -> None:
        while (message := end.receive(None)) is not None:
            if "stop" in message:
                return self._lose(message["stop"])
            if "bye" in message:
                return end.inbox.put(None)
            end.inbox.put(message)
        self._lose(f"process {peer} has died or cannot be reached")

    def _lose(self, sentence: str) -> None:
        with self.once:
            if self.lost.is_set():
                return
            self.loss = sentence
            self.lost.set()
        for end in self.ends.values():
            end.inbox.put(None)  # whoever waits, waits no longer
            if self.index == 0:
                end.send({"stop": sentence})
        threading.Thread(target=self.on_loss, args=(sentence,), daemon=True).start()

    def exchange(self, what: str, value: Any, seconds: float) -> list[Any]:
        """Every process's value, in their order. All must call it, with the same words for what they do."""
        self.turn += 1
        mine = {"turn": f"{what} (exchange {self.turn})", "value": value}
        if self.index:
            self.ends[0].send(mine)
            return self._next(0, what, time.monotonic() + seconds + MARGIN)["values"]
        deadline = time.monotonic() + seconds
        said: dict[int, Any] = {0: json.loads(json.dumps(mine))}
        late = []
        for peer in self.ends:
            try:
                said[peer] = self._next(peer, what, deadline)
            except queue.Empty:
                late.append(peer)
        if late:
            self._give_up(f"{name(late)} did not come to “{what}” within {seconds:g} seconds")
        for peer, message in said.items():
            if message["turn"] != mine["turn"]:
                self._give_up(f"process {peer} is at “{message['turn']}” where process 0 is at “{mine['turn']}”")
        values = [said[peer]["value"] for peer in sorted(said)]
        for end in self.ends.values():
            end.send({"values": values})
        return values

    def _next(self, peer: int, what: str, deadline: float) -> dict:
        try:
            message = self.ends[peer].inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            if self.index == 0:
                raise
            raise ProcessLostError(f"process 0 gave no answer at “{what}”") from None
        if message is None:
            self.ends[peer].inbox.put(None)
            raise ProcessLostError(self.loss or f"process {peer} has finished where the others are at “{what}”")
        return message

    def _give_up(self, sentence: str) -> None:
        self.stop(sentence)
        raise ProcessLostError(sentence)

    def stop(self, sentence: str) -> None:
        """Tell the others why this process stops."""
        for end in self.ends.values():
            end.send({"stop": sentence})

    def close(self, seconds: float) -> None:
        """Process 0 goes last: what the others have to say of its going should be its own words."""
        if self.index == 0:
            deadline = time.monotonic() + seconds
            for reader in self.readers:
                reader.join(max(0.0, deadline - time.monotonic()))

    def say_goodbye(self) -> None:
        for end in self.ends.values():
            end.send({"bye": True})


# ------------------------------------------------------------------------------------------------------- the roll call


def join(
    host: str, port: int, count: int, index: int, about: dict[str, Any], seconds: float, on_loss: Callable[[str], None]
) -> Line:
    """Wait until all are there. `about` must be the same for all of them, or the line is refused."""
    card = {**about, "processes": count}
    deadline = time.monotonic() + seconds
    if index:
        ends = {0: _call(host, port, {"process": index, "card": card}, seconds, deadline)}
    else:
        ends = _gather(host, port, count, card, seconds, deadline)
    return Line(index, count, ends, on_loss)


def _gather(host: str, port: int, count: int, card: dict, seconds: float, deadline: float) -> dict[int, _End]:
    """On process 0: one end for each of the others."""
    ends: dict[int, _End] = {}

    def refuse(sentence: str, *more: _End) -> NoReturn:
        for end in (*ends.values(), *more):
            end.send({"stop": sentence})
            end.close()
        raise InputError(sentence)

    try:
        server = socket.create_server(("", port), family=_family(host, port))
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on port {port} ({error.strerror or error}); give another port to all processes "
            "with TAV_COORDINATOR=host:port (it and the next one must be free)"
        ) from error
    with server:
        while len(ends) < count - 1:
            try:
                server.settimeout(max(0.001, deadline - time.monotonic()))
                end = _End(server.accept()[0])
            except TimeoutError:
                missing = [n for n in range(1, count) if n not in ends]
                refuse(
                    f"{name(missing)} of {count} did not come within {seconds:g} seconds; start the same command on "
                    f"all {count}, or give them longer with TAV_WAIT=SECONDS"
                )
            peer, theirs = _introduced(end)
            if peer is None:
                end.close()  # a stranger at the door
            elif peer in ends or not 0 < peer < count:
                who = "two processes are" if peer in (0, *ends) else "a process is"
                refuse(f"{who} numbered {peer} of {count}; number them 0 to {count - 1}, each once (TAV_PROCESS)", end)
            elif different := differences([card, theirs], [0, peer]):
                refuse(f"the processes do not fit together: {different}; start the same on all of them", end)
            else:
                ends[peer] = end
    for end in ends.values():
        end.send({"go": True})
    return ends


def _introduced(end: _End) -> tuple[int | None, dict]:
    """The number and the card that somebody shows who has just called."""
    try:
        hello = end.receive(5.0) or {}
    except TimeoutError:
        hello = {}
    peer, card = hello.get("process"), hello.get("card")
    return (peer, card) if isinstance(peer, int) and isinstance(card, dict) else (None, {})


def _call(host: str, port: int, hello: dict, seconds: float, deadline: float) -> _End:
    """On the others: the end that leads to process 0."""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(0.1, min(5, deadline - time.monotonic())))
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"process 0 did not come to {host}:{port} within {seconds:g} seconds ({error.strerror or error}); "
                    "start the same command on all processes, or give them longer with TAV_WAIT=SECONDS"
                ) from error
            time.sleep(0.1)
    end = _End(connection)
    end.send(hello)
    try:
        answer = end.receive(max(0.0, deadline - time.monotonic()) + MARGIN) or {}
    except TimeoutError:
        answer = {}
    if "stop" in answer:
        raise InputError(answer["stop"])
    if "go" not in answer:
        raise InputError(f"what answers at {host}:{port} is not process 0 of this run, or it has stopped")
    return end


def _family(host: str, port: int) -> socket.AddressFamily:
    """IPv6 only where the address is nothing else."""
    try:
        found = {entry[0] for entry in socket.getaddrinfo(host, port)}
    except OSError:
        found = set()
    return socket.AF_INET6 if found == {socket.AF_INET6} else socket.AF_INET


def differences(tables: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> str:
    """What the first table and another one do not agree on, in words."""
    return "; ".join(
        f"{key} is {tables[0].get(key)!r} on process {numbers[0]} and {table.get(key)!r} on process {number}"
        for number, table in zip(numbers, tables, strict=True)
        for key in {**tables[0], **table}
        if tables[0].get(key) != table.get(key)
    )
