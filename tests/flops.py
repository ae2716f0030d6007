"""Floating-point operations of a run, counted."""

import torch
from torch.utils.flop_counter import FlopCounterMode


def attention_flops(q, k, v, *args, out_shape=None, **kwargs):
    causal = kwargs.get("is_causal", args[1] if len(args) > 1 else False)
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3] // (2 if causal else 1)


def attention_backward_flops(grad, q, k, v, out, lse, dropout, causal, *args, out_shape=None, **kwargs):
    return 10 * q[0] * q[1] * q[2] * k[2] * q[3] // (2 if causal else 1)


def flops(run):
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()
