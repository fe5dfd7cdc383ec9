"""A whole device in one file, after docs/protocol.md alone: numpy, msgpack and ZeroMQ, no edge_sdk.

    python examples/minimal_device.py tcp://HOST:PORT NAME FILE.npz [KEYS]

It trains the family `mlp` on FILE's x and y. Without KEYS, a folder, nothing is encrypted."""

import hashlib
import sys
import time

import msgpack
import numpy as np
import zmq

PROTOCOL, PART_BYTES, WINDOW = 8, 524288, 8
PLAN = {"epochs": 1, "batch_size": 32, "optimizer": "adam", "lr": 1e-3, "momentum": 0, "seed": 0}
DONE = {*PLAN, "segments", "exit_weights", "distill", "distill_temperature", "logit_adjustment"}
KEYS = {"device.public": "PUBLIC", "device.secret": "SECRET", "server.public": "SERVER"}


def views(specs, stream=None):
    """A stream of float32, a new one if none is given, and its tensors by name."""
    places, end = {}, 0
    for spec in specs:
        begin = -(-end // 2) * 2  # multiples of 8 bytes
        end = begin + int(np.prod(spec["shape"]))
        places[spec["name"]] = begin, end, spec["shape"]
    stream = np.zeros(end, "<f4") if stream is None else stream
    return stream, {n: stream[b:e].reshape(shape) for n, (b, e, shape) in places.items()}


def forward(w, stage, h, is_training):
    """One stage: flatten (stage 1 only), linear, BatchNorm, ReLU. Its output is the last item."""
    place = 1 if stage == 1 else 0
    linear, norm = f"stages.{stage - 1}.{place}.weight", f"stages.{stage - 1}.{place + 1}."
    z, mean, var = h @ w[linear].T, w[norm + "running_mean"], w[norm + "running_var"]
    if is_training:
        mean[:], var[:] = 0.9 * mean + 0.1 * z.mean(0), 0.9 * var + 0.1 * z.var(0, ddof=1)
        mean, var = z.mean(0), z.var(0)  # this one is biased
    scale = 1 / np.sqrt(var + 1e-5)
    z = (z - mean) * scale
    return linear, norm, h, z, scale, np.maximum(z * w[norm + "weight"] + w[norm + "bias"], 0)


def gradients(g, w, first, h, y, weights, shift):
    """Of the joint loss, into g. Returns every exit's loss and right answers, sums of the batch."""
    kept, told, d, rows = [], [], 0, np.arange(len(y))
    for stage in range(first, first + len(weights)):
        kept.append(forward(w, stage, kept[-1][-1] if kept else h, True))
    for e in reversed(range(len(weights))):
        (linear, norm, h, z, scale, out), head = kept[e], f"exits.{first - 1 + e}."
        logits = out @ w[head + "weight"].T + w[head + "bias"]
        log_p = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
        p = np.exp(log_p + shift)  # by the labels' counts here
        told.insert(0, (-log_p[rows, y].sum(), (log_p.argmax(1) == y).sum()))
        dz = (p / p.sum(1, keepdims=True) - np.eye(len(p.T))[y]) * (weights[e] / len(y))
        g[head + "weight"][:], g[head + "bias"][:] = dz.T @ out, dz.sum(0)
        d = (d + dz @ w[head + "weight"]) * (out > 0)
        g[norm + "weight"][:], g[norm + "bias"][:] = (d * z).sum(0), d.sum(0)
        d = d * w[norm + "weight"]
        d = scale * (d - d.mean(0) - z * (d * z).mean(0))
        g[linear][:], d = d.T @ h, d @ w[linear]
    return np.array(told)


def train(job, stream, x, y):
    """Trains the tensors in the stream, a batch before each yield, and makes the job's update."""
    plan, rng, exits, steps = job["plan"], np.random.default_rng(job["plan"]["seed"]), [], 0
    (_, w), (gradient, g) = views(job["tensors"], stream), views(job["tensors"])
    counts = np.bincount(y, minlength=job["model"]["num_classes"])
    shift = plan.get("logit_adjustment", 0) * np.log(counts + 0.5)
    for segment in sorted(plan["segments"], key=lambda each: -each["first"]):  # deepest first
        first, last = segment["first"], segment["last"]
        weights = plan.get("exit_weights", [])[first - 1 : last]
        weights = weights if any(weights) else [1] * (last - first + 1)
        gradient[:], m, v, t, inputs = 0, 0, 0, 0, x
        for stage in range(1, first):
            inputs = forward(w, stage, inputs, False)[-1]
        for _ in range(plan["epochs"]):
            order, told, seen, size = rng.permutation(len(y)), 0, 0, plan["batch_size"]
            batches = [order[begin : begin + size] for begin in range(0, len(y), size)]
            for batch in (each for each in batches if len(each) >= min(3, size)):
                told = told + gradients(g, w, first, inputs[batch], y[batch], weights, shift)
                seen, t = seen + len(batch), t + 1
                if plan["optimizer"] == "sgd":
                    m = change = plan["momentum"] * m + gradient
                else:
                    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                    change = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
                stream -= plan["lr"] * change  # 0 where there is no gradient
                yield
        for exit, (loss, right) in enumerate((told / seen).tolist(), first):
            exits.append({"exit": exit, "loss": loss, "metric": right})
        steps += t
    trained = {e["exit"] - 1 for e in exits}
    specs = [spec for spec in job["tensors"] if int(spec["name"].split(".")[1]) in trained]
    update, places = views(specs)
    for name, place in places.items():
        place[...] = w[name]
    job["bytes"] = memoryview(np.asarray_chkfinite(update)).cast("B")  # else ValueError
    digest = hashlib.sha256(update).hexdigest()[:32]
    job["update"] = {"job": job["id"], "digest": digest, "num_examples": len(y), "tensors": specs}
    job["update"] |= {"num_steps": steps, "exits": exits, "phases": {}, "peak_memory_bytes": 0}


class Device:
    """welcome: None until this connection's hello is answered. job: its message and its state."""

    def __init__(self, endpoint, name, x, y, scaling, keys):
        self.x, self.y, self.welcome, self.run, self.job = x.reshape(len(x), -1), y, None, "", None
        profile = {"platform": "generic", "memory_total_bytes": 0, "memory_available_bytes": 0}
        self.hello = {"protocol": PROTOCOL, "client_id": name, "session": np.random.bytes(8).hex()}
        self.hello |= {"profile": profile | {"cores": 1, "gflops": 0}, "num_examples": len(y)}
        self.hello |= {"input_shape": x.shape[1:], "num_classes": max(y.tolist()) + 1}
        self.hello |= {"scaling": scaling}
        self.due, self.pause_s, self.is_over = 0.0, 2.0, False  # due: the next hello or heartbeat
        self.socket = zmq.Context().socket(zmq.DEALER)
        options = {"MAXMSGSIZE": 1048576, "SNDHWM": 32, "RCVHWM": 0, "IMMEDIATE": 1}
        options |= {"HEARTBEAT_IVL": 5000, "HEARTBEAT_TIMEOUT": 120000, "LINGER": 500}
        for file, key in KEYS.items() if keys else ():
            options[f"CURVE_{key}KEY"] = np.fromfile(f"{keys}/{file}", "u1").tobytes().strip()
        for option, value in options.items():
            self.socket.set(getattr(zmq, option), value)
        self.socket.connect(endpoint)

    def serve(self):
        while not self.is_over:
            is_training = self.job is not None and self.job["training"] is not None
            has_come = self.socket.poll(0 if is_training else 200)
            try:
                if has_come:
                    self.on_frames(self.socket.recv_multipart())
                elif is_training and next(self.job["training"], "trained"):
                    self.job["training"] = None
                    self.ask()  # or rather tell
            except (KeyError, TypeError, ValueError, msgpack.UnpackException) as error:
                if has_come:
                    self.send("fault", code="protocol", detail=f"refused: {error!a}"[:500])
                else:
                    self.end_job("tensors", f"refused: {error!a}"[:500])
            if time.monotonic() >= self.due and not self.is_over:
                self.say_hello_or_heartbeat(self.job or {"round": 0, "id": None})

    def say_hello_or_heartbeat(self, job):
        if self.welcome and not self.send("heartbeat", round=job["round"]):
            self.welcome = None  # the connection is lost
        if not self.welcome and self.send("hello", **self.hello, round=job["round"], job=job["id"]):
            self.pause_s = min(15.0, 1.3 * self.pause_s)
        pause_s = self.welcome["heartbeat_s"] if self.welcome else self.pause_s
        self.due = time.monotonic() + pause_s * np.random.uniform(0.8, 1.0)

    def send(self, tag, *raw, **fields):
        can_be_sent = bool(self.socket.poll(0, zmq.POLLOUT))  # else the next hello makes it good
        if can_be_sent:
            self.socket.send_multipart([msgpack.packb({"type": tag, **fields}), *raw], zmq.NOBLOCK)
        return can_be_sent

    def on_frames(self, frames):
        message = msgpack.unpackb(frames[0])
        tag, number, job = message["type"], message.get("round", 0), self.job
        is_mine = job is not None and number == job["round"]
        if len(frames) != (2 if tag == "part" else 1):
            raise ValueError(f"{tag} in {len(frames)} frames")
        if tag in ("welcome", "job", "fault"):
            getattr(self, f"on_{tag}")(message)
        elif tag == "part" and is_mine and job["have"] == message["index"] < job["asked"]:
            place = job["bytes"][job["have"] * PART_BYTES :][:PART_BYTES]
            if len(place) == len(frames[1]):
                place[:], job["have"] = frames[1], job["have"] + 1
                self.ask()
            else:
                self.end_job("protocol", f"part of {len(frames[1])} bytes, not {len(place)}")
        elif tag == "fetch" and is_mine and job["update"]:
            for index in range(message["first"], message["first"] + message["count"]):
                if part := job["bytes"][index * PART_BYTES :][:PART_BYTES]:
                    self.send("part", part, round=number, index=index)
        elif tag == "accepted" and is_mine:
            self.end_job()
        elif tag == "probe":
            self.send("heartbeat", round=job["round"] if job else 0)
        elif tag == "bye":
            self.send("bye")
            self.welcome, self.is_over = None, bool(message.get("is_final"))

    def on_welcome(self, welcome):
        if welcome["protocol"] != PROTOCOL:
            raise SystemExit(f"the coordinator speaks protocol {welcome['protocol']}")
        is_first, self.welcome, self.pause_s, self.due = not self.welcome, welcome, 2.0, 0.0
        job, self.run = self.job if welcome["run"] == self.run else None, welcome["run"]
        self.end_job()
        self.job = job
        if job and is_first:
            self.ask(is_again=True)

    def is_able(self, model, plan):
        models = self.welcome.get("variants") or [self.welcome["model"] | {"exit": model["exit"]}]
        is_plain = all(key in DONE or value in (0, None, "none", []) for key, value in plan.items())
        return model in models and model["family"] == "mlp" and is_plain

    def on_job(self, job):
        if self.job is None or self.job["id"] != job["id"]:
            self.job = job | {"plan": PLAN | job["plan"], "have": 0, "asked": 0, "update": None}
            stream, _ = views(job["tensors"])
            self.job |= {"stream": stream, "bytes": memoryview(stream).cast("B"), "training": None}
        if self.is_able(job["model"], job["plan"]):
            self.ask(is_again=True)
        else:
            self.end_job("config", "not welcome's model, or more than a plain joint loss")

    def ask(self, is_again=False):
        job = self.job
        if job["update"]:
            self.send("update", round=job["round"], **job["update"])
            return
        job["asked"] = job["have"] if is_again else job["asked"]
        under_way, parts = job["asked"] - job["have"], -(-len(job["bytes"]) // PART_BYTES)
        count = min(WINDOW - under_way, parts - job["asked"]) if under_way <= WINDOW // 2 else 0
        first = job["asked"] if count else job["have"]
        self.send("fetch", round=job["round"], have=job["have"], first=first, count=count)
        job["asked"] += count
        if job["have"] == parts and not job["training"]:
            job["training"] = train(job, job["stream"], self.x, self.y)

    def end_job(self, code="", detail=""):
        if code:
            self.send("fault", code=code, detail=detail, round=self.job["round"])
        self.job = None
        if self.welcome:
            variants = self.welcome.get("variants", [])
            model = (variants or [self.welcome["model"]])[-1]  # the largest: none is too large here
            able = self.is_able(model, self.welcome["plan"])
            self.send("ready", exit=model["exit"] * able, variant=len(variants) * able)

    def on_fault(self, fault):
        code, number = fault["code"], fault.get("round", 0)
        if code == "hello":
            self.welcome, self.due = None, 0.0
        elif code in ("admission", "data", "version") and not number:
            raise SystemExit(f"refused: {code}: {fault['detail']}")
        elif (number and (not self.job or number == self.job["round"])) or code == "protocol":
            self.end_job()


def main(endpoint, name, file, keys=None):
    held = np.load(file)
    x, is_pixels = held["x"].astype(np.float32), held["x"].dtype == np.uint8
    x, divisor = (x / np.float32(127.5) - 1, 127.5) if is_pixels else (x, None)
    scaling = {"low": float(x.min()), "high": float(x.max()), "divisor": divisor, "offset": 1.0}
    Device(endpoint, name, x, held["y"].astype(np.int64), scaling, keys).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
