"""The hypernetwork against autograd and against the published sizes; each defect of published code
(P1 ...) as a test that fails on it."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from coordinator.personal.hypernetwork import Architecture, Hypernetwork, Rule
from edge_sdk.errors import ShapeError

TINY = Architecture(embedding=2, hidden=3, layers=2, chunk=4, spread=0.5)
ADAM = Rule(lr=0.1)
SGD = Rule(lr=0.1, momentum=0.9, weight_decay=0.01)
PUBLISHED = {  # of models for CIFAR-10, CIFAR-100, Tiny-ImageNet, EMNIST: weights and chunks
    234_006: 77, 268_814: 88, 347_178: 114, 523_242: 171, 565_386: 185,
    239_856: 79, 274_664: 90, 353_028: 115, 529_092: 173, 571_236: 186,
    773_796: 252, 408_100: 133, 246_356: 81, 577_736: 189, 237_098: 78, 568_478: 186,
}  # fmt: skip


def drawn(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def moved(network, client, size, seed=0):
    network.backward(client, drawn(size, seed))
    return network.step()


def values(network):
    return {name: p.detach().clone() for name, p in network._parameters.items()}


def distance(network, before):
    now = values(network)
    return sum(float((now[name] - value).square().sum()) for name, value in before.items()) ** 0.5


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_published_sizes():
    network = Hypernetwork(Architecture(), ADAM, seed=0)
    assert {k: network.layout(k).num_chunks for k in PUBLISHED} == PUBLISHED
    trunk = sum(torch.Size(network._shape(name)).numel() for name in network._trunk_names())
    assert trunk == 41_344
    heads = []
    for weights in (239_856, 274_664, 353_028, 529_092, 571_236):
        layout = network.layout(weights)
        layer = network._shape(f"head/{layout.head}/0/weight")
        assert layer == (3072, 128)
        heads.append(layout.num_chunks * (3072 * 128 + 3072))
    assert [round(count / 1e6, 1) for count in heads] == [31.3, 35.7, 45.6, 68.6, 73.7]


def test_weights_by_hand():
    # one embedding number v, one feature f = relu(2 v + 1), two chunks of two: W f + b, cut to 3
    one = Architecture(embedding=1, hidden=1, layers=1, chunk=2)
    network = Hypernetwork(one, Rule(lr=0.1, momentum=0.0), seed=0)
    state = {
        "trunk/0/weight": [[2.0]], "trunk/0/bias": [1.0], "embedding/2/a": [[1.0], [-3.0]],
        "head/2/0/weight": [[1.0], [2.0]], "head/2/0/bias": [0.5, 0.0],
        "head/2/1/weight": [[5.0], [7.0]], "head/2/1/bias": [4.0, 9.0],
    }  # fmt: skip
    network.load_state_dict({f"parameter/{n}": torch.tensor(v) for n, v in state.items()})
    # f = 3 and relu(-5) = 0
    assert network.generate("a", 3).tolist() == [3.5, 6.0, 4.0]
    # D = (1, 1), (2, 0): df = (1 + 2, 10), through the ReLU (3, 0); norms are far below the clip
    network.backward("a", torch.tensor([1.0, 1.0, 2.0]))
    gradients = {name: p.grad.tolist() for name, p in network._parameters.items()}
    assert gradients == {
        "trunk/0/weight": [[3.0]], "trunk/0/bias": [3.0], "embedding/2/a": [[6.0], [0.0]],
        "head/2/0/weight": [[3.0], [3.0]], "head/2/0/bias": [1.0, 1.0],
        "head/2/1/weight": [[0.0], [0.0]], "head/2/1/bias": [2.0, 0.0],
    }  # fmt: skip


@pytest.mark.parametrize("is_rectified", [True, False])
@pytest.mark.parametrize("chunk", [4, 0])
def test_gradient_is_that_of_half_the_squared_distance(chunk, is_rectified):
    sizes = Architecture(
        embedding=2, hidden=3, layers=3, chunk=chunk, spread=0.5, is_rectified=is_rectified
    )
    network = Hypernetwork(sizes, ADAM, seed=1)
    sent, trained = network.generate("a", 10), drawn(10)
    network.backward("a", sent - trained)
    free = {name: p.detach().clone().requires_grad_() for name, p in network._parameters.items()}
    x = next(p for name, p in free.items() if name.startswith("embedding/"))
    for layer in range(3):
        x = linear(x, free[f"trunk/{layer}/weight"], free[f"trunk/{layer}/bias"])
        x = x.relu() if layer < 2 or is_rectified else x
    head = "3" if chunk else "10"
    chunks = [
        free[f"head/{head}/{j}/weight"] @ x[j] + free[f"head/{head}/{j}/bias"]
        for j in range(3 if chunk else 1)
    ]
    made = torch.cat(chunks)[:10]
    assert torch.allclose(made, sent, atol=1e-6)
    (0.5 * (made - trained).square().sum()).backward()
    for name, parameter in network._parameters.items():
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, free[name].grad, rtol=1e-6, atol=1e-6), name


def test_gradients_of_clients_add_up_and_are_forgotten():
    network = Hypernetwork(TINY, ADAM, seed=0)
    network.backward("a", drawn(10))
    first = {name: p.grad.clone() for name, p in network._parameters.items()}
    network.step()
    assert all(p.grad is None for p in network._parameters.values())
    assert not network.generate("a", 10).requires_grad
    again = Hypernetwork(TINY, ADAM, seed=0)
    again.backward("a", drawn(10))
    again.backward("a", drawn(10))
    for name, parameter in again._parameters.items():
        assert torch.allclose(parameter.grad, 2 * first[name]), name


@pytest.mark.parametrize("rule", [ADAM, SGD])
def test_a_step_is_that_of_torch_on_what_took_part(rule):
    network = Hypernetwork(TINY, rule, seed=0)
    moved(network, "a", 10)
    moved(network, "b", 6, seed=1)
    before = values(network)
    moved(network, "b", 6, seed=2)
    # P3: a's embedding and head have momentum, and zeros for a gradient would move them on
    for name, value in before.items():
        assert torch.equal(network._parameters[name], value) == (
            name.startswith(("embedding/3/a", "head/3/"))
        ), name


def test_the_step_s_gradient_is_clipped_as_a_whole():
    network = Hypernetwork(TINY, Rule(lr=1.0, momentum=0.0), seed=0)
    network.generate("a", 10)
    before = values(network)
    norm = moved(network, "a", 10, seed=3)
    assert distance(network, before) == pytest.approx(norm, rel=1e-5)
    before = values(network)
    network.backward("a", 1e4 * drawn(10))
    assert network.step() > 50
    assert distance(network, before) == pytest.approx(50, rel=1e-4)


def test_absurd_deltas_take_no_step():
    network = Hypernetwork(TINY, ADAM, seed=0)
    network.generate("a", 10)
    before = values(network)
    network.backward("a", torch.full((10,), 3e38))
    assert not torch.isfinite(torch.tensor(network.step()))
    assert same(values(network), before)
    assert not network.state_dict()


def test_clients_of_one_size_share_a_head_and_all_the_trunk():
    network = Hypernetwork(TINY, ADAM, seed=0)
    for client, size in [("a", 10), ("b", 12), ("c", 5)]:  # M = 3, 3, 2
        network.generate(client, size)
    heads = {name for name in network._parameters if name.startswith("head/")}
    assert {name.split("/")[1] for name in heads} == {"3", "2"}
    # P1: nothing but the trunk is shared between sizes
    before = network.generate("c", 5)
    moved(network, "a", 10)
    trunk_only = network.generate("c", 5)
    assert not torch.equal(before, trunk_only)
    head = {n: p for n, p in values(network).items() if n.startswith("head/2/")}
    moved(network, "b", 12)
    assert all(torch.equal(network._parameters[n], p) for n, p in head.items())


def test_with_a_tolerance_similar_sizes_share_a_head():
    """P1. Heads for at most 1, 2, 3, 4, 6, 9, 13 chunks at a tolerance of a half: 5 and 6 share
    one, of which the smaller client uses and moves the first 5 layers only."""
    wide = Architecture(embedding=2, hidden=3, layers=2, chunk=4, tolerance=0.5)
    network = Hypernetwork(wide, ADAM, seed=0)
    heads = [network.layout(4 * chunks).head for chunks in range(1, 14)]
    assert heads == ["1", "2", "3", "4", "6", "6", "9", "9", "9", "13", "13", "13", "13"]
    moved(network, "large", 24)
    before = values(network)
    moved(network, "small", 20)
    for layer in range(6):
        name = f"head/6/{layer}/weight"
        assert torch.equal(network._parameters[name], before[name]) == (layer == 5)


def test_sizes_may_come_in_any_order():
    """P2: a lookup by order of appearance fails for descending sizes. And who comes first changes
    no initial value."""
    down, up = (Hypernetwork(TINY, ADAM, seed=4) for _ in range(2))
    clients = [("a", 30), ("b", 12), ("c", 3)]
    made = {name: down.generate(name, size) for name, size in clients}
    for name, size in reversed(clients):
        assert torch.equal(up.generate(name, size), made[name])
    assert not torch.equal(made["b"][:3], made["c"])
    other = Hypernetwork(TINY, ADAM, seed=5)
    assert not torch.equal(other.generate("a", 30), made["a"])


def test_one_embedding_and_one_head_by_size_without_chunks():
    """pFedHN: whatever the model's tensors, their heads are rows of one layer."""
    ancestor = Architecture(embedding=5, hidden=3, layers=4, chunk=0, is_rectified=False)
    network = Hypernetwork(ancestor, SGD, seed=0)
    assert network.generate("a", 10).shape == (10,)
    shapes = {name: tuple(p.shape) for name, p in network._parameters.items()}
    assert shapes["embedding/1/a"] == (1, 5)
    assert shapes["head/10/0/weight"] == (10, 3)
    assert shapes["head/10/0/bias"] == (10,)


@pytest.mark.parametrize("rule", [ADAM, SGD])
def test_a_resumed_one_goes_on_to_the_same_bits(rule):
    straight = Hypernetwork(TINY, rule, seed=0)
    for seed, (client, size) in enumerate([("b", 12), ("a", 10), ("c", 30), ("a", 10)]):
        moved(straight, client, size, seed)
    kept = straight.state_dict()
    taken = {name: kept[name].clone() for name in sorted(kept)}  # a file has its own order
    resumed = Hypernetwork(TINY, rule, seed=0)
    resumed.generate("z", 9)  # drawn before, forgotten
    resumed.load_state_dict(taken)
    for network in (straight, resumed):
        for client, size in [("c", 30), ("new", 7), ("a", 10)]:
            moved(network, client, size, 9)
    assert same(straight.state_dict(), resumed.state_dict())
    assert same({n: kept[n] for n in sorted(kept)}, taken), "a state that was taken stays"


def test_the_state_of_another_is_refused():
    network = Hypernetwork(TINY, ADAM, seed=0)
    moved(network, "a", 10)
    state = network.state_dict()
    wider = Hypernetwork(Architecture(embedding=2, hidden=5, layers=2, chunk=4), ADAM, seed=0)
    with pytest.raises(ShapeError, match=r"is \(4, 3\), expected \(4, 5\)"):
        wider.load_state_dict(state)
    with pytest.raises(ShapeError, match="missing: moment/momentum_buffer"):
        Hypernetwork(TINY, SGD, seed=0).load_state_dict(state)
    for name in ("head/x/0/weight", "trunk/2/bias", "head/3/0/gain", "other"):
        with pytest.raises(ShapeError, match=f"'{name}' is no parameter"):
            network.load_state_dict(state | {f"parameter/{name}": torch.zeros(3)})


def test_a_frozen_one_learns_embeddings_and_layers_that_nobody_trained():
    """P11: a head of a new size is a fresh one. P12: the frozen trunk's gradient is no part of the
    norm that is clipped, which would shorten the embedding's step."""
    plain = Rule(lr=1.0, momentum=0.0)
    network = Hypernetwork(TINY, plain, seed=1)
    moved(network, "a", 10)
    network.freeze()
    before = values(network)
    network.generate("novel", 10)
    start = network._parameters["embedding/3/novel"].detach().clone()
    network.backward("novel", 1e4 * drawn(10))
    moving = [n for n, p in network._parameters.items() if p.grad is not None]
    assert moving == ["embedding/3/novel"]
    assert network.step() > 50
    step = network._parameters["embedding/3/novel"] - start
    assert float(step.detach().norm()) == pytest.approx(50, rel=1e-4), "all of the norm is its own"
    moved(network, "other-size", 5, seed=1)
    now = values(network)
    assert same({name: now[name] for name in before}, before)
    assert any(name.startswith("head/2/") for name in network._moments)
    resumed = Hypernetwork(TINY, plain, seed=1)
    resumed.load_state_dict(network.state_dict())
    assert resumed.is_frozen
    for one in (network, resumed):
        moved(one, "other-size", 5, seed=2)
        moved(one, "novel", 10, seed=3)
    assert same(resumed.state_dict(), network.state_dict())
    after = values(network)
    assert same({name: after[name] for name in before}, before)
    assert not torch.equal(after["head/2/0/weight"], now["head/2/0/weight"])


def test_clients_that_ask_for_unlike_models_get_them():
    """Two clients whose targets differ end up with weights near their own, by a shared trunk and
    head: what an embedding is for. One that joins when these are frozen finds the way to a model
    that they know, by its embedding alone."""
    shape = Architecture(embedding=8, hidden=32, layers=3, chunk=16)
    network = Hypernetwork(shape, Rule(lr=0.01), seed=0)
    targets = {"a": drawn(40, 1), "b": drawn(40, 2)}

    def error(client, target):
        return float((network.generate(client, 40) - target).norm() / target.norm())

    def learn(client, target):
        network.backward(client, network.generate(client, 40) - target)
        network.step()

    for _ in range(200):
        for client, target in targets.items():
            learn(client, target)
    assert all(error(client, target) < 0.05 for client, target in targets.items())
    network.freeze()
    start = error("novel", targets["a"])
    for _ in range(200):
        learn("novel", targets["a"])
    assert error("novel", targets["a"]) < 0.2 * start
    assert all(error(client, target) < 0.05 for client, target in targets.items())
