"""The operators' contract for tensors without data: what a fake kernel can check."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _extension
from .checking import check_types

# Shape and dtype; None is the dtype of k. Sizes of the same letter are equal: M rows, N keys, H
# heads, D channels, P blocks, E edges of segments.
CONTRACT: dict[str, tuple[str, torch.dtype | None]] = {
    "k": ("N D", None),
    "q": ("M H D", None),
    "weights": ("M H", torch.float32),
    "k_scale": ("N", torch.float32),
    "ks": ("M", torch.int32),
    "ke": ("M", torch.int32),
    "cu_seqlens_k": ("E", torch.int32),
    "pooled_k": ("P D", None),
    "pooled_scale": ("P", torch.float32),
}

# The same on paged caches. None is the dtype of the keys that the pages hold. S sequences, W pages
# of a sequence, P pages in all.
PAGED: dict[str, tuple[str, torch.dtype | None]] = {
    "q": ("M H D", None),
    "weights": ("M H", torch.float32),
    "block_table": ("S W", torch.int32),
    "seq_lens": ("S", torch.int32),
    "pooled_k": ("P D", None),
    "pooled_scale": ("P", torch.float32),
}


def check_contract(k: Tensor, *, block_size: int | None = None, **tensors: Tensor | None) -> None:
    """Raise for the first tensor whose device, dtype or shape does not go with the others.

    Sizes and block_size may be symbolic. With one tensor on `meta`, torch calls a fake kernel for
    all of them.

    Raises:
        TypeError: a dtype differs.
        ValueError: a device or a shape differs.
    """
    module = _extension.require()
    sizes: dict[str, int] = {}
    for name, tensor in {"k": k, **tensors}.items():
        if tensor is None:
            continue
        letters, dtype = CONTRACT[name]
        shape = letters.split()
        if tensor.device != k.device:
            raise ValueError(
                f"{name}: expected a tensor on {k.device} as k is, got one on {tensor.device}"
            )
        if name == "k" and k.dtype not in (known := module.build_info()["dtypes"]):
            raise TypeError(f"k: expected one of {known}, got {k.dtype}")
        if tensor.dtype != (dtype or k.dtype):
            raise TypeError(_message(name, shape, dtype or k.dtype, tensor))
        if tensor.dim() != len(shape):
            raise ValueError(_message(name, shape, dtype or k.dtype, tensor))
        for letter, size in zip(shape, tensor.shape, strict=True):
            if size != sizes.setdefault(letter, size) or (letter == "E" and size == 0):
                raise ValueError(_message(name, shape, dtype or k.dtype, tensor))
        if name == "k" and block_size is not None:
            sizes["P"] = (sizes["N"] + block_size - 1) // block_size
    limited = (sizes.get("H", 1), sizes["D"], sizes["N"])
    if all(isinstance(size, int) for size in limited):
        module.check_sizes(*limited)


def check_paged_contract(pages: Tensor, *, block_size: int, **tensors: Tensor) -> dict[str, int]:
    """Raise for the first tensor of a paged call that does not go with the others.

    Sizes and block_size may be symbolic. The first of `tensors` says what D is.

    Returns:
        The size behind each letter of PAGED.

    Raises:
        TypeError: a dtype differs.
        ValueError: a device or a shape differs, or block_size is no multiple of the page's.
    """
    module = _extension.require()
    packed = pages.dtype == torch.uint8  # keys, then their scales
    if not packed and pages.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"pages: expected uint8, float32, bfloat16 or float16, got {pages.dtype}")
    if pages.dim() < 2:
        raise ValueError(f"pages: expected [P, ...], got {list(pages.shape)}")
    sizes: dict[str, int] = {"P": pages.shape[0]}
    for name, tensor in tensors.items():
        letters, dtype = PAGED[name]
        dtype = dtype or (torch.float8_e4m3fn if packed else pages.dtype)
        check_shape(name, tensor, letters, sizes, pages.device, dtype)
    page_size = _page_size(pages, sizes["D"])
    limited = (sizes.get("H", 1), sizes["D"], sizes["W"] * page_size)
    if all(isinstance(size, int) for size in limited):
        module.check_sizes(*limited)
    if all(isinstance(size, int) for size in (block_size, page_size)) and block_size % page_size:
        raise ValueError(
            f"block_size: expected a multiple of page_size = {page_size}, got {block_size}"
        )
    return sizes


def _page_size(pages: Tensor, dim: int) -> int:
    """Return how many tokens a page holds, or raise ValueError if pages do not hold tokens."""
    module, shape, packed = _extension.require(), pages.shape, pages.dtype == torch.uint8
    if isinstance(dim, int):
        module.check_dim("pages", dim)
    width = dim + 4 if packed else dim
    if packed and len(shape) == 2:
        page_size, shaped = shape[1] // width, shape[1] % width == 0
    elif packed and len(shape) == 4:
        page_size, shaped = shape[1], shape[2] == 1 and shape[3] == width
    else:
        page_size, shaped = shape[1], len(shape) == 3 and shape[2] == width
    known = module.build_info()["page_sizes"]
    if not shaped or (isinstance(page_size, int) and page_size not in known):
        raise ValueError(
            f"pages: expected page_size tokens of {width} elements, page_size one of {known}, "
            f"got {list(shape)} {pages.dtype}"
        )
    return page_size


def check_shape(
    name: str,
    tensor: Tensor,
    letters: str,
    sizes: dict[str, int],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise if `tensor` is not of the shape `letters`, a dtype that was asked for, and the device.

    Args:
        letters: as in CONTRACT. A letter of which the size is not known yet gets it here.
        sizes: what is known; changed in place.

    Raises:
        TypeError: not a tensor, or the dtype differs.
        ValueError: the device or the shape differs.
    """
    check_types(Tensor, **{name: tensor})
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    shape = letters.split()
    known = ", ".join(f"{letter} = {sizes[letter]}" for letter in shape if letter in sizes)
    message = _message(name, shape, dtype or tensor.dtype, tensor)
    if known:
        message = message.replace(", got ", f" with {known}, got ")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(message)
    if tensor.dim() != len(shape):
        raise ValueError(message)
    for letter, size in zip(shape, tensor.shape, strict=True):
        if size != sizes.setdefault(letter, size):
            raise ValueError(message)


def check_result(
    name: str, got: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise for a tensor that a result of this kind cannot be written to.

    Raises:
        TypeError: the dtype differs.
        ValueError: the device or the shape differs, or it is not contiguous.
    """
    sizes = [str(size) for size in shape]
    if got.dtype != dtype:
        raise TypeError(_message(name, sizes, dtype, got))
    if got.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {got.device}")
    if tuple(got.shape) != tuple(shape):
        raise ValueError(_message(name, sizes, dtype, got))
    if not got.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {got.stride()}")


def check_keys(name: str, k: Tensor) -> dict[str, int]:
    """Return the sizes of batched keys, B, N and D, or of packed ones, N and D.

    Raises:
        TypeError: not a tensor.
        ValueError: neither [B, N, D] nor [N, D].
    """
    check_types(Tensor, **{name: k})
    if k.dim() not in (2, 3):
        raise ValueError(f"{name}: expected [B, N, D] or [N, D], got {list(k.shape)}")
    return dict(zip("BND" if k.dim() == 3 else "ND", k.shape, strict=True))


def check_mask(mask: Tensor) -> None:
    """Raise TypeError or ValueError for what cannot be an attention mask of `mask_windows`."""
    known = _extension.require().build_info()["mask_dtypes"]
    if mask.dtype not in known:
        raise TypeError(f"mask: expected one of {known}, got {mask.dtype}")
    if mask.dim() != 3:
        raise ValueError(f"mask: expected [B, S, T], got {list(mask.shape)}")


def check_numbers(block_size: int, block_topk: int, topk: int, pooling: str) -> None:
    """Raise ValueError for what is not supported; a symbolic number is left alone."""
    module = _extension.require()
    if isinstance(block_size, int) and isinstance(block_topk, int) and isinstance(topk, int):
        module.check_block_sizes(block_size, block_topk, topk)
    module.check_pooling(pooling)


def _message(name: str, shape: Sequence[str], dtype: torch.dtype, got: Tensor) -> str:
    wanted, given = (str(d).removeprefix("torch.") for d in (dtype, got.dtype))
    return f"{name}: expected [{', '.join(shape)}] {wanted}, got {list(got.shape)} {given}"
