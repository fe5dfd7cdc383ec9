#!/usr/bin/env bash
# A coordinator and two devices on this machine, as three real programs with keys and encryption.
#   examples/two_devices.sh FOLDER        a new folder; the run, keys and logs stay in it
set -euo pipefail
PYTHON=${PYTHON:-python3} # of an environment that has edge-sdk, e.g. .venv/bin/python
PORT=${PORT:-5555}
mkdir "$1" && cd "$1"
edge-sdk() { "$PYTHON" -m edge_sdk.cli "$@"; }
edge-coordinator() { "$PYTHON" -m coordinator.cli "$@"; }
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

# Each device has data of its own, which the coordinator never sees; the coordinator has a test set.
"$PYTHON" - << 'END'
from edge_sdk.data import load_dataset, save_shard
from edge_sdk.data.partition import partition_iid

data = load_dataset("digits", seed=0, examples=400)
save_shard("test.npz", data.test)
for name, part in zip(("pi-1", "pi-2"), partition_iid(len(data.train), 2, seed=0)):
    save_shard(f"{name}.npz", data.train.take(part))
END

edge-coordinator keys
for name in pi-1 pi-2; do
    edge-coordinator invite --name $name --endpoint "tcp://127.0.0.1:$PORT" > $name.line
done
edge-coordinator serve --run-dir run --test test.npz --min-clients 2 --rounds 3 \
    --listen "tcp://127.0.0.1:$PORT" > coordinator.log 2>&1 &
server=$!
for name in pi-1 pi-2; do
    edge-sdk join - --config $name.toml --keys $name.keys < $name.line
    edge-sdk run --config $name.toml --data $name.npz --threads 1 --once > $name.log 2>&1 &
done
wait "$server"
edge-coordinator status --run-dir run
