"""What accelerators can do at most, and the share of it that a run reaches."""

from __future__ import annotations

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of its `device_kind`; the makers' data sheets.
PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5p': 459e12,
    'TPU v5': 459e12,  # how a v5p names itself
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'NVIDIA H200': 989.4e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA H100': 989.4e12,
    'NVIDIA A100': 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, such as 'TPU v5p' or 'NVIDIA H100 80GB HBM3'; None where it is not known (CPUs)."""
    known = [name for name in PEAK_FLOPS if device_kind == name or device_kind.startswith((f'{name} ', f'{name}-'))]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def utilisation(flops: float, seconds: float, devices: int, device_kind: str) -> dict[str, float]:
    """`flops_per_second` of a step over all devices, and `mfu`, its share of their peak, where the peak is known.

    FLOPs are those the mathematics needs: recomputed layers count once (PaLM, appendix B).
    """
    achieved, peak = flops / max(seconds, 1e-9), peak_flops(device_kind)
    return {'flops_per_second': achieved} | ({'mfu': achieved / (devices * peak)} if peak else {})
