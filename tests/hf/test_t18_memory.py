"""T18, T21: a patched indexer takes bounded memory, measured as the process's peak."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Prints how much the peak grew, in MiB, over what is resident before the call.
SCRIPT = """
import resource, sys, warnings, torch, hisa
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

length, patched = int(sys.argv[1]), sys.argv[2] == "patched"
config = DeepseekV32Config(
    hidden_size=256, q_lora_rank=256, index_n_heads=64, index_head_dim=128, index_topk=64
)
indexer = DeepseekV32Indexer(config, layer_idx=0)
torch.manual_seed(0)
states, resid = torch.randn(1, length, 256), torch.randn(1, length, 256)
turn = torch.randn(1, length, 64)
mask = torch.ones(length, length, dtype=torch.bool).tril()[None]
if patched:
    hisa.patch(indexer, block_size=32, block_topk=4)
small = slice(0, 40)
with warnings.catch_warnings():  # touch everything that is loaded on first use
    warnings.simplefilter("ignore")
    indexer(states[:, small], resid[:, small], (turn[:, small],) * 2, mask[:, small, small], None)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
indexer(states, resid, (turn, turn), mask, None)
print(peak() - before)
"""


def growth(length: int, kind: str) -> float:
    pytest.importorskip("transformers")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(length), kind],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(result.stdout)


@pytest.mark.seconds(180)
def test_peak_memory_is_bounded() -> None:
    """The model's own indexer takes over 2 GiB here: one [S, H, T] tensor of scores is 1 GiB."""
    assert growth(2048, "patched") < 200


@pytest.mark.long
def test_peak_memory_at_4096() -> None:
    own, patched = growth(4096, "own"), growth(4096, "patched")
    assert own > 8000
    assert patched < own / 20 and patched < 300
