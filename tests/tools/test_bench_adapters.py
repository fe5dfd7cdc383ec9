"""tools/bench/adapters.py on a tiny model."""

from __future__ import annotations

from edge_sdk.protocol.messages import ModelSpec
from tools.bench.adapters import COLUMNS, PARTS, rows


def test_a_row_for_all_weights_and_for_each_kind():
    spec = ModelSpec(
        family="llama",
        input_shape=(6,),
        num_classes=5,
        exit=4,
        task="tokens",
        vocabulary=5,
        options={"dim": 8, "heads": 2, "ffn": 12},
    )
    found = rows({"tiny": spec}, batch=4, rank=2)
    assert [row["trained"] for row in found] == list(PARTS)
    assert all(set(row) == set(COLUMNS) for row in found)
    block = 4 * 8 * 8 + 3 * 8 * 12 + 2 * 8  # attention, feed-forward, norms
    exits = 4 * (8 + 8 * 5)
    lora, dema = 4 * 2 * 16 + 3 * 2 * 20, 2 * 8 * 2 + 2 * 2 + 1
    weights = [int(row["weights"].replace(",", "")) for row in found]
    wanted = [5 * 8 + 4 * block, 4 * lora, 4 * 7 * (2 * 2 + 2), 4 * dema, 2 * dema]
    assert weights == [count + exits for count in wanted]
    assert found[0]["of_all"] == "1.00"
    assert all(float(row["of_all"]) < 1 for row in found[1:])
