"""What the wire costs: seconds per round and the coordinator's memory, beside one raw TCP stream.

    python -m tools.bench.wire [--megabytes 1,10,50] [--clients 1,4,16] [--rounds 3] [--csv FILE]

A round is the real one without training: every client is told a job of 20 float32 tensors, fetches
them, announces an update of the same size, and the coordinator fetches, checks and averages it. The
clients are processes without torch that hold only bytes. The floor is one raw loopback TCP stream
between two processes moving the same bytes, measured in the same run. Memory: the server process's
peak over its size before the model was made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_sdk.protocol.keys import KeyPair, make_keys, read_key, read_keys
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Accepted,
    Bye,
    DeviceProfile,
    ExitResult,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    ModelSpec,
    Part,
    Phase,
    Plan,
    Ready,
    Segment,
    Update,
    Welcome,
)
from edge_sdk.protocol.stream import PART_BYTES, digest_of, layout, num_parts, part_size
from tools.tables import made_by, print_row, write_csv

NUM_TENSORS = 20
RESULT = ExitResult(exit=1, loss=0.0, metric=0.0)
WINDOW = 8
SPEC = ModelSpec(family="bench", input_shape=(1, 1), num_classes=2, exit=1)
PLAN = Plan(segments=(Segment(first=1, last=1),))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--megabytes", default="1,10,50")
    add("--clients", default="1,4,16")
    add("--links", default="plain,curve")
    add("--rounds", type=int, default=3)
    add("--csv", type=Path)
    add("--serve", nargs=4, metavar=("MB", "CLIENTS", "ROUNDS", "KEYS"), help=argparse.SUPPRESS)
    add("--client", nargs=3, metavar=("ID", "ENDPOINT", "KEYS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve(int(args.serve[0]), int(args.serve[1]), int(args.serve[2]), args.serve[3])
    if args.client:
        return client(*args.client)
    rows = []
    for megabytes in map(int, args.megabytes.split(",")):
        for clients in map(int, args.clients.split(",")):
            floor_s = statistics.median(raw_tcp(2 * megabytes * clients) for _ in range(3))
            for link in args.links.split(","):
                rows.append(measure(megabytes, clients, link, args.rounds, floor_s))
                print_row(rows[-1], is_first=len(rows) == 1)
    if args.csv:
        write_csv(args.csv, rows, made_by("python -m tools.bench.wire", "shared"))
    return 0


def measure(
    megabytes: int, clients: int, link: str, rounds: int, floor_s: float
) -> dict[str, object]:
    """One cell: a fresh coordinator process and its client processes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        keys = "-" if link == "plain" else folder
        if keys != "-":
            make_client_list(Path(folder), clients)
        me = [sys.executable, __file__]
        command = [*me, "--serve", str(megabytes), str(clients), str(rounds), keys]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        server = stack.enter_context(process)
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        for number in range(clients):
            command = [*me, "--client", f"c{number}", endpoint, keys]
            stack.enter_context(subprocess.Popen(command))
        figures = json.loads(server.stdout.readline())
    return {
        "MB": megabytes,
        "clients": clients,
        "link": link,
        "round_s": round(figures["round_s"], 3),
        "floor_s": round(floor_s, 3),
        "ratio": round(figures["round_s"] / floor_s, 1),
        "server_cpu_s": round(figures["cpu_s"], 3),
        "base_MB": round(figures["base_MB"]),
        "peak_MB": round(figures["peak_MB"]),
        "models_over_base": round((figures["peak_MB"] - figures["base_MB"]) / megabytes, 1),
    }


def make_client_list(folder: Path, clients: int) -> None:
    make_keys(folder, "server")
    lines = []
    for number in range(clients):
        pair = make_keys(folder, f"c{number}")
        lines.append(f"c{number} {pair.public.decode()}\n")
    (folder / "clients").write_text("".join(lines))


def serve(
    megabytes: int,
    clients: int,
    rounds: int,
    keys: str,
    mark: Callable[[str], None] = lambda what: None,
) -> int:
    """The coordinator's process: the product's Router, ZmqCohort, OwnersMean. mark: is told "base"
    before the model is made, "begin" and "end" of each round."""
    import torch

    from coordinator.admission.client_list import Admission
    from coordinator.aggregation.mean import OwnersMean
    from coordinator.cohorts.base import Assignment, ClientUpdate, Offer
    from coordinator.config import RunConfig
    from coordinator.fleet.cohort import ZmqCohort
    from coordinator.fleet.spool import Spool
    from coordinator.links.router import Router
    from edge_sdk.protocol.tensors import specs_of

    torch.set_num_threads(1)
    pair: KeyPair | None = None
    admission = None
    if keys != "-":
        pair, admission = read_keys(Path(keys), "server"), Admission(Path(keys) / "clients")
    router = Router("tcp://127.0.0.1:*", pair, admission)
    print(router.endpoint, flush=True)
    config = RunConfig(
        method="owners-mean",
        model=SPEC,
        rounds=rounds + 1,
        quorum=1.0,
        min_clients=clients,
        late="drop",
    )
    spool = tempfile.TemporaryDirectory()
    cohort = ZmqCohort(router, Spool(Path(spool.name)), config, Offer(SPEC, PLAN), run="bench")
    ready = cohort.clients()
    base = resident_mb("VmRSS")
    mark("base")
    size = megabytes * 1_000_000 // 4 // NUM_TENSORS
    model = {f"stages.0.{i}": torch.randn(size) for i in range(NUM_TENSORS)}
    job = Assignment(model=SPEC, plan=PLAN, tensors=model, returns=specs_of(model))
    seconds, cpu = [], []
    for number in range(1, rounds + 2):  # the first one warms up
        mark("begin")
        start, start_cpu = time.monotonic(), time.process_time()
        mean = OwnersMean()
        for result in cohort.train({c.id: job for c in ready}, number, 0.0):
            assert isinstance(result, ClientUpdate), result
            mean.add_(result.tensors, result.num_examples)
            del result
        new = mean.result(model)
        seconds.append(time.monotonic() - start)
        cpu.append(time.process_time() - start_cpu)
        mark("end")
        # every client sent back what it got, so the mean is the model itself, to the last bit
        assert all(torch.equal(new[name], model[name]) for name in model)
        del mean, new
    mark("done")
    figures = {"round_s": statistics.median(seconds[1:]), "cpu_s": statistics.median(cpu[1:])}
    figures |= {"base_MB": base, "peak_MB": resident_mb("VmHWM")}
    cohort.close("bench finished", is_final=True)
    print(json.dumps(figures), flush=True)
    return 0


def client(name: str, endpoint: str, keys: str) -> int:
    """A device that holds bytes only: fetches a job, sends the same tensors back."""
    pair = server_key = None
    if keys != "-":
        pair, server_key = read_keys(Path(keys), name), read_key(Path(keys) / "server.public")
    link = Link(endpoint, pair, server_key)
    assert link.socket is not None
    profile = DeviceProfile(
        platform="bench", memory_total_bytes=1, memory_available_bytes=1, cores=1, gflops=1
    )
    hello = Hello(
        protocol=PROTOCOL,
        client_id=name,
        session="s",
        profile=profile,
        num_examples=1,
        input_shape=(1, 1),
        num_classes=2,
    )
    while not link.send(hello):
        time.sleep(0.05)
    job: Job | None = None
    data, received, asked = memoryview(b""), 0, 0
    while True:
        if not link.socket.poll(5_000):
            link.send(Heartbeat(round=job.round if job else 0))
        got = link.receive()
        if got is None:
            continue
        message, payload = got
        if isinstance(message, Welcome):
            link.send(Ready(exit=1))
        elif isinstance(message, Job):
            job, received, asked = message, 0, 0
            size = layout(job.tensors)[1]
            data = data if len(data) == size else memoryview(bytearray(size))
        elif isinstance(message, Fetch) and job:
            for index in range(message.first, message.first + message.count):
                size = part_size(len(data), index)
                if size:
                    start = index * PART_BYTES
                    part = Part(round=job.round, index=index)
                    link.send(part, data[start : start + size])
        elif isinstance(message, Bye):
            link.send(Bye())
            link.close(is_final=True)
            return 0
        elif isinstance(message, Part) and payload is not None:
            start = message.index * PART_BYTES
            data[start : start + len(payload)] = payload
            received += 1
        elif not isinstance(message, Accepted | Heartbeat):
            raise SystemExit(f"{name}: {message}")
        if job and isinstance(message, Job | Part):
            total = num_parts(len(data))
            if received == total:
                link.send(Fetch(round=job.round, have=total, first=total, count=0))
                zero, digest = Phase(wall_s=0.0), digest_of([data])
                link.send(
                    Update(
                        job=job.id,
                        digest=digest,
                        round=job.round,
                        num_examples=1,
                        num_steps=1,
                        exits=(RESULT,),
                        phases={"train": zero},
                        peak_memory_bytes=0,
                        tensors=job.tensors,
                    )
                )
            else:  # as training/worker does
                more = asked - received <= WINDOW // 2
                count = min(WINDOW - (asked - received), total - asked) if more else 0
                link.send(Fetch(round=job.round, have=received, first=asked, count=count))
                asked += count


def raw_tcp(megabytes: int) -> float:
    """Seconds for one stream between two processes, blocks of PART_BYTES, nothing checked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        total = megabytes * 1_000_000
        code = (
            "import socket,sys\n"
            f"s=socket.create_connection(('127.0.0.1',{listener.getsockname()[1]}))\n"
            f"b=memoryview(bytearray({PART_BYTES}))\nleft={total}\ns.recv(1)\n"
            "while left>0:\n"
            "    n=min(left,len(b)); s.sendall(b[:n]); left-=n\n"
        )
        sender = subprocess.Popen([sys.executable, "-c", code])
        connection, _ = listener.accept()
        with connection:
            buffer = memoryview(bytearray(PART_BYTES))
            start, got = time.monotonic(), 0
            connection.send(b"g")
            while got < total:
                got += connection.recv_into(buffer)
            elapsed = time.monotonic() - start
        sender.wait()
    return elapsed


def resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {field} in /proc/self/status; this benchmark needs Linux")


if __name__ == "__main__":
    sys.exit(main())
