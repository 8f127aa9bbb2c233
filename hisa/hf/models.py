"""The known indexers: one table row per model, with exactly what differs between them.

What they share is the flat indexer of DeepSeek-V3.2: `wq_b(q_resid)` gives the queries,
`k_norm(wk(hidden_states))` the keys, RoPE turns `qk_rope_head_dim` channels of both, and

    score(m, n) = softmax_scale * n_heads**-0.5 * sum_h weights_proj(hidden_states)[m, h]
                  * relu(dot(q[m, h], k[n]))

Most models multiply by softmax_scale before the ReLU, hy_v4 after it. The scale is positive, so
both are the formula above, and it is folded into the weights for all.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from hisa.module import HierarchicalIndexer


@dataclass(frozen=True)
class IndexerSpec:
    """What one model's indexer does in its own way."""

    model_type: str  # as in the model's config; names its module in transformers
    class_name: str
    rotary: str  # the function of the model's module that turns q and k
    rope_last: bool = False  # RoPE turns the last channels of a head, not the first
    key_norm_in_weight_dtype: bool = False  # keys are normed in the norm's own dtype (fp32)

    @property
    def module_name(self) -> str:
        """Name of the Python module that defines the indexer's class."""
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"


PLAIN = "apply_rotary_pos_emb"  # pairs channel i with channel i + R / 2, in all models but hy_v4_vl
INTERLEAVED = "apply_rotary_pos_emb_interleave"  # pairs channel 2i with channel 2i + 1

SPECS = (
    IndexerSpec("deepseek_v32", "DeepseekV32Indexer", PLAIN),
    IndexerSpec("glm_moe_dsa", "GlmMoeDsaIndexer", INTERLEAVED),
    IndexerSpec("axk2", "AXK2Indexer", PLAIN),
    IndexerSpec("hy_v4", "HYV4Indexer", PLAIN, rope_last=True, key_norm_in_weight_dtype=True),
    IndexerSpec("hy_v4_vl", "HYV4VLIndexer", PLAIN, rope_last=True, key_norm_in_weight_dtype=True),
    IndexerSpec("dots3_note", "Dots3NoteTextIndexer", INTERLEAVED),
)

# Every known indexer's forward takes these and then the cache, `past_key_values` up to transformers
# 5.23, `cache` since. Another signature is another indexer.
PARAMETERS = (
    "hidden_states",
    "q_resid",
    "position_embeddings",
    "attention_mask",
    "position_ids",
)
CACHE_NAMES = ("past_key_values", "cache")
ATTRIBUTES = (
    "wq_b",
    "wk",
    "k_norm",
    "weights_proj",
    "layer_idx",
    "n_heads",
    "head_dim",
    "qk_rope_head_dim",
    "index_topk",
    "softmax_scale",
)


def supported() -> str:
    """Return the supported models and indexer classes, for error messages."""
    return ", ".join(f"{spec.model_type} ({spec.class_name})" for spec in SPECS)


def looks_like_indexer(name: str, module: nn.Module) -> bool:
    """Return whether `module`, registered as `name`, is some kind of sparse attention indexer."""
    if isinstance(module, HierarchicalIndexer):
        return False  # nothing to replace
    if _is_known(module) or type(module).__name__.endswith("Indexer"):
        return True
    wrapper = any(_is_known(inner) for inner in module.modules())  # of one that is found by itself
    return name.rpartition(".")[2] == "indexer" and not wrapper


def is_shared_layer(module: nn.Module) -> bool:
    """Return whether `module` is an attention layer that reuses an earlier layer's selection."""
    return bool(getattr(module, "skip_topk", False)) and getattr(module, "indexer", module) is None


def recognise(name: str, module: nn.Module) -> IndexerSpec:
    """Return the table row of an indexer.

    The class that *defines* the forward decides, so a subclass is known as long as it inherits it.

    Raises:
        TypeError: if no row fits, or the signature or the attributes are not what a row expects.
    """
    where = f"{name or 'the model itself'} is a {type(module).__module__}.{type(module).__name__}"
    definer = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    spec = _find(definer)
    if spec is None:
        raise TypeError(
            f"{where}, an indexer that hisa.patch does not know. Supported: {supported()}"
        )
    found = tuple(inspect.signature(vars(definer)["forward"]).parameters)[1:]
    if found not in {(*PARAMETERS, cache) for cache in CACHE_NAMES}:
        raise TypeError(
            f"{where} whose forward takes ({', '.join(found)}); this version of hisa knows "
            f"({', '.join(PARAMETERS)}, {' or '.join(CACHE_NAMES)}). "
            "Use a transformers version that has it (5.17 to 5.24 do)"
        )
    missing = [name for name in ATTRIBUTES if getattr(module, name, None) is None]
    if not hasattr(sys.modules[spec.module_name], spec.rotary):
        missing.append(spec.rotary)
    if missing:
        raise TypeError(f"{where} without {', '.join(missing)}, which hisa.patch needs")
    return spec


def rotary(spec: IndexerSpec) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the model's own function that applies RoPE to queries and keys."""
    function: Callable[..., tuple[Tensor, Tensor]] = getattr(
        sys.modules[spec.module_name], spec.rotary
    )
    return function


def _is_known(module: nn.Module) -> bool:
    return any(_find(cls) for cls in type(module).__mro__)


def _find(cls: type) -> IndexerSpec | None:
    return _BY_CLASS.get((cls.__module__, cls.__qualname__))


_BY_CLASS = {(spec.module_name, spec.class_name): spec for spec in SPECS}
