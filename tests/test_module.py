"""`HierarchicalIndexer`: HISA around projections, for models that no table row of the patch knows.

Catches positions counted from the wrong key, entries of a batch that see each other, rows lost or
repeated between chunks, a scale on the wrong side, and parameters saved twice or not at all.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hisa
from tests.builders import int32

HEADS, CHANNELS, HIDDEN = 4, 16, 24
SIZES: dict[str, Any] = {"block_size": 8, "block_topk": 3, "topk": 12}
Indexer = hisa.HierarchicalIndexer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scores(batch: int, rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and weights of a batch."""
    return (
        random(batch, rows, HEADS, CHANNELS),
        random(batch, keys, CHANNELS, seed=1),
        random(batch, rows, HEADS, seed=2),
    )


def by_hand(q: Tensor, k: Tensor, weights: Tensor, **options: Any) -> Tensor:
    """What hisa.index selects for one sequence, as positions."""
    indices = hisa.index(q, k, weights, **{**SIZES, **options})
    ks = options.get("ks", torch.zeros(len(q), dtype=torch.int32)).clamp(min=0)
    return torch.where(indices >= 0, indices + ks[:, None], -1)


def causal_ends(rows: int, keys: int) -> Tensor:
    return torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32).clamp(min=0)


def exact(indexer: nn.Module) -> nn.Module:
    """Give parameters small integers, so that a product does not depend on how many rows it has."""
    for parameter in indexer.parameters():
        nn.init.zeros_(parameter)
        parameter.data += torch.randint(-1, 2, parameter.shape)
    return indexer


def projections() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    return (
        exact(nn.Sequential(nn.Linear(HIDDEN, HEADS * CHANNELS), nn.Unflatten(-1, (HEADS, -1)))),
        exact(nn.Linear(HIDDEN, CHANNELS)),
        exact(nn.Linear(HIDDEN, HEADS)),
    )


def states(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (*shape, HIDDEN), generator=generator).float()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [70, 5, 0])
def test_a_batch_is_each_entry_alone(rows: int, causal: bool) -> None:
    q, k, weights = scores(3, rows, 70)
    found = Indexer(**SIZES).select(q, k, weights, causal=causal)
    assert found.shape == (3, rows, 12) and found.dtype == torch.int32
    ends = {"ke": causal_ends(rows, 70)} if causal else {}
    for entry in range(3):
        assert torch.equal(found[entry], by_hand(q[entry], k[entry], weights[entry], **ends))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_windows_of_ones_own(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows outside of the keys, empty, and reversed ones: none reaches a neighbour's keys."""
    monkeypatch.setattr("hisa.module.CHUNK_BYTES", chunk * 3 * HEADS * CHANNELS * 4)
    q, k, weights = scores(3, 50, 60)
    generator = torch.Generator().manual_seed(4)
    ks, ke = torch.randint(-20, 90, (2, 3, 50), generator=generator, dtype=torch.int32)
    found = Indexer(**SIZES).select(q, k, weights, ks=ks, ke=ke)
    assert (found >= 0).any() and (found < 60).all()
    for entry in range(3):
        own = by_hand(q[entry], k[entry], weights[entry], ks=ks[entry], ke=ke[entry])
        assert torch.equal(found[entry], own)
        assert torch.equal(
            own,
            Indexer(**SIZES).select(q[entry], k[entry], weights[entry], ks=ks[entry], ke=ke[entry]),
        )


def test_packed() -> None:
    lengths = [37, 0, 1, 62]
    edges = int32([0, *itertools.accumulate(lengths)])
    (q,), (k,), (weights,) = scores(1, 100, 100)
    indexer = Indexer(**SIZES)
    ks, ke = hisa.causal_windows(edges, edges)
    found = indexer.select(q, k, weights, cu_seqlens_k=edges)
    assert torch.equal(found, by_hand(q, k, weights, ks=ks, ke=ke, cu_seqlens_k=edges))
    whole = indexer.select(q, k, weights, cu_seqlens_k=edges, causal=False)
    for start, length in zip(edges.tolist(), lengths, strict=False):
        own = slice(start, start + length)
        for result, causal in ((found, True), (whole, False)):
            alone = indexer.select(q[own], k[own], weights[own], causal=causal)
            assert torch.equal(result[own], torch.where(alone >= 0, alone + start, -1))
    last = edges[1:][int32(lengths) > 0].long() - 1  # a decode step of each sequence
    step = indexer.select(q[last], k, weights[last], ks=ks[last], ke=ke[last], cu_seqlens_k=edges)
    assert torch.equal(step, found[last])


@pytest.mark.parametrize("by", ["left_padding", "attention_mask"])
def test_left_padding_does_not_matter(by: str) -> None:
    pads, length = [0, 5, 8, 41], 70
    q, k, weights = scores(4, length, length)
    position = torch.arange(length)
    mask = (position >= int32(pads)[:, None, None]) & (position <= position[:, None])
    given: dict[str, Any] = {"attention_mask": mask, "left_padding": int32(pads)}
    indexer = Indexer(**SIZES)
    found = indexer.select(q, k, weights, **{by: given[by]})
    for entry, pad in enumerate(pads):
        alone = indexer.select(q[entry, pad:], k[entry, pad:], weights[entry, pad:])
        assert torch.equal(found[entry, pad:], torch.where(alone >= 0, alone + pad, -1))
        assert (found[entry, :pad] == -1).all()


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_and_decoding(
    rows: int, precision: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill at once, a few rows at a time, in pieces and token by token: the same bits."""
    indexer = Indexer(*projections(), **SIZES, precision=precision)
    hidden = states(90) if packed else states(2, 90)
    at = hidden.dim() - 2
    whole = indexer(hidden)
    row_bytes = (1 if packed else 2) * 128 * CHANNELS * 4  # as many heads as there may be, float32
    monkeypatch.setattr("hisa.module.CHUNK_BYTES", rows * row_bytes)
    calls: list[int] = []
    index: Any = hisa.index

    def spy(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
        calls.append(len(q))
        result: Tensor = index(q, *arguments, **options)
        return result

    monkeypatch.setattr(hisa, "index", spy)
    assert torch.equal(indexer(hidden), whole)
    assert len(calls) == -(-90 // rows) and sum(calls) == 90 * (1 if packed else 2)
    project: Any = indexer.project_keys
    for edges in ([0, 50, 51, 90], list(range(91))):
        keys = project(hidden.narrow(at, 0, 0))
        for start, end in itertools.pairwise(edges):
            new = hidden.narrow(at, start, end - start)
            keys = torch.cat([keys, project(new)], at)
            piece = indexer(new, keys=keys)
            assert torch.equal(piece, whole.narrow(at, start, end - start)), (start, end)


def test_inputs_are_cut_together() -> None:
    """As many inputs as the projections want, of which all but the first may have no batch."""
    queries, keys, weights = projections()
    position = torch.arange(40.0)[None, :, None]
    indexer = Indexer(
        lambda x, at: queries(x + at), lambda x, at: keys(x + at), lambda x, at: weights(x), **SIZES
    )
    hidden = states(2, 40)
    moved = hidden + position
    want = Indexer(**SIZES).select(queries(moved), keys(moved), weights(hidden))
    assert torch.equal(indexer(hidden, position), want)


@pytest.mark.parametrize("options", [{}, {"power_of_two": True}, {"hadamard": True}], ids=str)
def test_fp8(options: dict[str, Any]) -> None:
    """The same as quantising by hand; keys that are fp8 already are taken as they are."""
    q, k, weights = scores(2, 50, 50)
    indexer = Indexer(**SIZES, precision="fp8", **options)
    turned = [hisa.quantize.rotate_hadamard(x) if "hadamard" in options else x for x in (q, k)]
    rounded = {"power_of_two": "power_of_two" in options}
    (q8, q_scale), (k8, k_scale) = (hisa.quantize_fp8(x, **rounded) for x in turned)
    found = indexer.select(q, k, weights)
    for entry in range(2):
        want = by_hand(
            q8[entry],
            k8[entry],
            weights[entry] * q_scale[entry],
            k_scale=k_scale[entry],
            ke=causal_ends(50, 50),
        )
        assert torch.equal(found[entry], want)
    assert torch.equal(indexer.select(q, k8, weights, k_scale=k_scale), found)
    plain = Indexer(**SIZES).select(q8, k8, weights * q_scale, k_scale=k_scale)
    assert torch.equal(plain, found)
    assert torch.equal(indexer.select(q, k / 2, weights, k_scale=torch.full((2, 50), 2.0)), found)
    assert not torch.equal(Indexer(**SIZES).select(q, k, weights), found)


def test_key_scales() -> None:
    q, k, weights = scores(2, 50, 50)
    k_scale = random(2, 50, seed=5).abs()
    found = Indexer(**SIZES).select(q, k, weights, k_scale=k_scale)
    for entry in range(2):
        own = q[entry], k[entry], weights[entry]
        want = by_hand(*own, k_scale=k_scale[entry], ke=causal_ends(50, 50))
        assert torch.equal(found[entry], want)
        assert torch.equal(Indexer(**SIZES).select(*own, k_scale=k_scale[entry]), want)


@pytest.mark.parametrize(
    ("q_dtype", "k_dtype", "scored"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float32),
    ],
)
def test_dtypes(q_dtype: torch.dtype, k_dtype: torch.dtype, scored: torch.dtype) -> None:
    (q,), (k,), (weights,) = scores(1, 50, 50)
    q, k, weights = q.to(q_dtype), k.to(k_dtype), weights.to(q_dtype)
    want = by_hand(q.to(scored), k.to(scored), weights.float(), ke=causal_ends(50, 50))
    assert torch.equal(Indexer(**SIZES).select(q, k, weights), want)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_settings_are_used(pooling: str) -> None:
    (q,), (k,), (weights,) = scores(1, 90, 90)
    sizes: dict[str, Any] = {"block_size": 8, "block_topk": 4, "topk": 9, "pooling": pooling}
    assert torch.equal(
        Indexer(**sizes).select(q, k, weights),
        by_hand(q, k, weights, ke=causal_ends(90, 90), **sizes),
    )


def test_empty() -> None:
    for shape in ((0, 5, 5), (2, 0, 5), (2, 3, 0)):
        found = Indexer(**SIZES).select(*scores(*shape), causal=False)
        assert found.shape == (*shape[:2], 12) and (found == -1).all()
    assert Indexer(*projections(), **SIZES)(states(2, 0)).shape == (2, 0, 12)
    (q,), (k,), (weights,) = scores(1, 5, 3)
    assert (Indexer(**SIZES).select(q, k, weights)[:2] == -1).all()  # before the first key


def test_is_a_module() -> None:
    queries, keys, weights = projections()
    indexer = Indexer(queries, keys, lambda x: weights(x), **SIZES)
    assert sorted(indexer.state_dict()) == [
        "project_keys.bias",
        "project_keys.weight",
        "project_queries.0.bias",
        "project_queries.0.weight",
    ]
    assert list(dict(indexer.named_children())) == ["project_queries", "project_keys"]
    assert "block_size=8, block_topk=3, topk=12, pooling='mean', precision='model'" in repr(indexer)
    moved = Indexer(*projections(), **SIZES).to(torch.bfloat16)
    assert {parameter.dtype for parameter in moved.parameters()} == {torch.bfloat16}
    assert moved(states(2, 40).bfloat16()).shape == (2, 40, 12)
    assert not Indexer(**SIZES).state_dict()
    whole = Indexer(*projections(), **SIZES)
    again = pickle.loads(pickle.dumps(whole))
    assert torch.equal(again(states(2, 40)), whole(states(2, 40)))
    assert not whole(states(2, 40)).requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("precision", ["model", "fp8"])
@pytest.mark.seconds(180)
def test_compile(backend: str, precision: str) -> None:
    torch._dynamo.reset()
    indexer = Indexer(*projections(), **SIZES, precision=precision)
    compiled = torch.compile(indexer, fullgraph=True, backend=backend)
    hidden, padding = states(2, 60), int32([0, 7])
    assert torch.equal(compiled(hidden), indexer(hidden))
    assert torch.equal(
        compiled(hidden, left_padding=padding), indexer(hidden, left_padding=padding)
    )
    edges = int32([0, 20, 60])
    assert torch.equal(
        compiled(hidden[0], cu_seqlens_k=edges), indexer(hidden[0], cu_seqlens_k=edges)
    )


class OwnIndexer(nn.Module):
    """An indexer of another form: gated heads and normalised keys, from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(HIDDEN, HEADS * CHANNELS + CHANNELS)
        self.gate = nn.Linear(HIDDEN, HEADS)

    def queries(self, x: Tensor) -> Tensor:
        q: Tensor = self.fused(x)[..., CHANNELS:].unflatten(-1, (HEADS, CHANNELS))
        return q

    def keys(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.fused(x)[..., :CHANNELS], dim=-1)

    def weights(self, x: Tensor) -> Tensor:
        weights: Tensor = self.gate(x).sigmoid() * CHANNELS**-0.5
        return weights

    def forward(self, x: Tensor) -> Tensor:
        """Return the 12 best tokens of each query, [B, S, 12], without an order."""
        dots = torch.einsum("bshd,bnd->bshn", self.queries(x), self.keys(x)).relu()
        found = (self.weights(x)[..., None] * dots).sum(2)
        future = torch.ones(found.shape[-2:]).triu(1).bool()
        return found.masked_fill(future, -torch.inf).topk(12, -1).indices


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OwnIndexer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            tokens = layer(x).long()
            rows = torch.arange(len(x))[:, None, None]
            keep = (tokens >= 0) & (tokens <= torch.arange(x.shape[1])[:, None])
            x = x + (x[rows, tokens] * keep[..., None]).mean(2)
        return x


def wrap(model: nn.Module, **sizes: Any) -> None:
    for own in list(model.modules()):
        if isinstance(own, OwnIndexer):
            hierarchical = Indexer(own.queries, own.keys, own.weights, topk=12, **sizes)
            own.forward = hierarchical.forward  # type: ignore[method-assign, assignment]


def test_a_model_that_no_table_row_knows() -> None:
    torch.manual_seed(0)
    model = Model().double()  # whose scores have no near-ties in fp32
    x, names = random(2, 60, HIDDEN, seed=6).double(), list(model.state_dict())
    own = model(x)
    with pytest.raises(TypeError, match="does not know"):
        hisa.patch(model)
    wrap(model, block_size=8, block_topk=8)  # 64 tokens: all
    torch.testing.assert_close(model(x), own)
    assert list(model.state_dict()) == names
    wrap(model, block_size=8, block_topk=2)
    pruned = model(x)
    assert not torch.allclose(pruned, own)
    copied = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(copied(x), pruned)  # a copy has methods of its own


def test_patching_leaves_it_alone() -> None:
    holder = nn.ModuleDict({"indexer": Indexer(*projections(), **SIZES)})
    with pytest.warns(UserWarning, match="contains no indexer"):
        assert hisa.patch(holder).status().layers == ()
